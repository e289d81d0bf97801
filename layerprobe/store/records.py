"""The input records that a shard keeps: each example's text and its other fields.

Hides how records are laid out in a shard. Must never know of sites or tokenizers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from layerprobe.errors import FormatError
from layerprobe.store.catalog import Catalog
from layerprobe.store.guard import brief, parse_record
from layerprobe.store.shards import Shard, span_of

__all__ = ["RECORD_TENSORS", "has_records", "iter_records", "read_record", "read_records"]

RECORD_TENSORS = ("record_offsets", "records")


def has_records(shard: Shard) -> bool:
    """Return whether a shard keeps the input records of its examples."""
    return "record_offsets" in shard.header.tensors


def read_record(shard: Shard, ordinal: int, label: str) -> dict[str, Any]:
    """Read an example's record: `text` and `fields`, each if it was kept; empty if the shard keeps none.

    Args:
        shard: The shard that holds the example.
        ordinal: Ordinal of the example.
        label: What to call the file in messages.

    Raises:
        FormatError: the record is damaged.
    """
    if not has_records(shard):
        return {}
    position, _, _ = span_of(shard, ordinal)
    first, last = shard.part("record_offsets", position, position + 2).tolist()
    return _parse(shard, ordinal, label, (first, last), lambda: shard.part("records", first, last).numpy().tobytes())


def read_records(shard: Shard, ordinals: Sequence[int], label: str) -> Iterator[dict[str, Any]]:
    """Read the records of many examples of a shard, in their order; raises as `read_record` does.

    Cost: fetches all records of the shard, verified against their checksum.
    """
    if not has_records(shard):
        yield from ({} for _ in ordinals)
        return
    # copy, because unaligned data in the file cannot be viewed as integers
    begins, records = shard.tensor("record_offsets").numpy().copy().data, shard.tensor("records").numpy().data
    for ordinal in ordinals:
        position = shard.position[ordinal - shard.header.first_example]
        first, last = begins[position], begins[position + 1]
        yield _parse(shard, ordinal, label, (first, last), records[first:last].tobytes)


def iter_records(catalog: Catalog, ordinals: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield many examples of a store with their records, shard by shard; ascending ordinals stay in order."""
    for shard, own in catalog.iter_parts(ordinals, RECORD_TENSORS):
        yield from zip(own, read_records(shard, own, catalog.place.label(shard.header.file)), strict=True)


def _parse(shard: Shard, ordinal: int, label: str, span: tuple[int, int], read: Callable[[], bytes]) -> dict[str, Any]:
    first, last = span
    num_bytes = shard.header.tensors["records"].shape[0]
    if not 0 <= first <= last <= num_bytes:
        raise FormatError(f"{label}: record {ordinal} is damaged: it lies at {first} to {last} of {num_bytes} bytes.")
    try:
        return parse_record(read())
    except ValueError as error:
        raise FormatError(f"{label}: record {ordinal} is damaged ({brief(error)}).") from error
