"""The input records that a shard keeps: each example's text and its other fields.

Hides how they lie in a shard. Must never know of sites or tokenizers.
"""

from typing import Any

from layerprobe.errors import FormatError
from layerprobe.store.guard import brief, parse_record
from layerprobe.store.shards import Shard

__all__ = ["RECORD_TENSORS", "has_records", "read_record"]

RECORD_TENSORS = ("record_offsets", "records")


def has_records(shard: Shard) -> bool:
    """Tell whether a shard keeps what its examples were made of."""
    return "record_offsets" in shard.header.tensors


def read_record(shard: Shard, ordinal: int, label: str) -> dict[str, Any]:
    """Read an example's record: `text` and `fields`, each if it was kept; empty where the shard keeps none.

    Args:
        shard: The one that has the example.
        ordinal: Of the example.
        label: What to call the file in a message.

    Raises:
        FormatError: it is damaged.
    """
    if not has_records(shard):
        return {}
    position, _, _ = shard.span(ordinal)
    first, last = shard.part("record_offsets", position, position + 2).tolist()
    num_bytes = shard.header.tensors["records"].shape[0]
    if not 0 <= first <= last <= num_bytes:
        raise FormatError(f"{label}: record {ordinal} is damaged: it lies at {first} to {last} of {num_bytes} bytes.")
    try:
        return parse_record(shard.part("records", first, last).numpy().tobytes())
    except ValueError as error:
        raise FormatError(f"{label}: record {ordinal} is damaged ({brief(error)}).") from error
