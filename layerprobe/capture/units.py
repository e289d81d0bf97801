"""An open unit, and the layout of its tensors in a shard.

What a sink tracks about a unit while it fills, and how each site is stored on disk. Hides the order of the tensors in
the file. Must never know of modules or hooks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerprobe.capture.pooling import Pool, pool_rows
from layerprobe.capture.select import BatchSelection
from layerprobe.capture.sinks import check_pooled, is_per_token
from layerprobe.capture.staging import NO_ROOM, HostBuffer, Room
from layerprobe.errors import CaptureError, OptionError
from layerprobe.sites.resolve import Site
from layerprobe.store.description import Counts, StoredSite
from layerprobe.store.headers import POSITIONS, SCALE_SUFFIX

__all__ = [
    "AnnouncedBatch",
    "OpenUnit",
    "check_storable",
    "encode_record",
    "list_shapes",
    "list_tensors",
    "measure_site",
    "room_for",
]

# created once: json.dumps would create one per record
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, eq=False)
class AnnouncedBatch:
    """What the extractor knows of a batch before the model runs, so that no mask need be read back from a device.

    Args:
        ordinals: Ordinals of its examples.
        lengths: Number of real tokens per example.
        num_positions: S.
        input_ids: int64 `[T]` on the CPU, without padding; those of the kept rows only.
        records: Encoded record of each example, from `encode_record`, or None.
        sequences: For each example its sequence in the batch, if identical texts share one; otherwise None.
        kept: For each example the increasing positions, among its real tokens, of the rows to keep; None for all.
        num_filling: Number of filler sequences at the end of the batch, which belong to no example.
        is_flat: Whether the examples are concatenated into one sequence, each of `sequences` once.
    """

    ordinals: Sequence[int]
    lengths: Sequence[int]
    num_positions: int
    input_ids: Tensor
    records: Sequence[bytes] | None = None
    sequences: Sequence[int] | None = None
    kept: Sequence[Tensor] | None = None
    num_filling: int = 0
    is_flat: bool = False

    def select(self, device: torch.device) -> BatchSelection:
        """Return the selection of the batch's rows for values on `device`."""
        if self.is_flat:
            selection = BatchSelection.from_flat(self.lengths, device, self.sequences)
        else:
            selection = BatchSelection.from_lengths(self.lengths, self.num_positions, device, self.sequences)
        return selection if self.kept is None else selection.keep(self.kept)


@dataclass(eq=False)
class OpenUnit:
    """An open unit: its buffer and the finished calls in it."""

    number: int
    first_example: int
    buffer: HostBuffer
    num_truncated: int = 0
    used: Room = NO_ROOM
    ordinals: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    input_ids: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)
    # number of values beyond the range of float8, counted on the device
    overflow: dict[int, Tensor] = field(default_factory=dict)

    def add_clipped(self, counts: Mapping[int, Tensor]) -> None:
        """Add the counts of one call, by site."""
        for index, count in counts.items():
            if index not in self.overflow:
                # accumulate in place: freed memory could be reused before another stream has read it
                with torch.inference_mode(False):
                    self.overflow[index] = torch.zeros_like(count)
            self.overflow[index].add_(count)

    def count_clipped(self, stored: Sequence[StoredSite]) -> dict[str, int]:
        """Return the number of values beyond the range of float8, for sites that have any."""
        # one copy for all sites, because each copy waits for all pending device work
        counts = torch.stack(list(self.overflow.values())).tolist() if self.overflow else []
        return {stored[index].name: count for index, count in zip(self.overflow, counts, strict=True) if count}


def measure_site(
    site: Site, value: Tensor, pool: Pool, dtype: torch.dtype | None, is_packed: bool = False
) -> StoredSite:
    """Derive a site's layout on disk from one of its values; `is_packed`: from rows `[T, D]` that are already cast.

    Raises:
        CaptureError: the value is neither `[B, S, D]` nor `[B, D]`.
    """
    if is_packed:
        return StoredSite(site.name, "token", value.dtype, value.shape[1])
    if site.kind == "attention":
        return StoredSite(site.name, "attention", dtype or value.dtype, value.shape[1])
    per_token = is_per_token(site, value)
    if value.ndim != (3 if per_token else 2):
        raise CaptureError(
            f"{site.name!r} has shape {tuple(value.shape)}: a store takes [batch, positions, width] or "
            "[batch, width]. Capture this site into memory instead."
        )
    width = value.shape[2] if per_token else value.shape[1]
    if callable(pool) and per_token:
        every_token = BatchSelection.from_lengths([value.shape[1]], value.shape[1], value.device)
        width = pool_rows(value[:1].detach(), every_token, pool).shape[1]
    kind = "token" if per_token and pool is None else "example"
    return StoredSite(site.name, kind, dtype or value.dtype, width)


def check_storable(sites: Sequence[Site], pool: Pool, dtype: torch.dtype | None) -> None:
    """Check that sites can be stored with these options and have the same tokens, as a shard requires.

    Raises:
        OptionError: attention weights that are pooled or stored as int8; sites of both encoder and decoder, or sites
            whose rows are the encoder's tokens as the decoder sees them.
    """
    check_pooled(sites, pool)
    matrices = [site.name for site in sites if site.kind == "attention"]
    if matrices and dtype == torch.int8:
        raise OptionError(
            f"{matrices[0]!r} is one matrix per head, int8 has a scale per vector: ask for a float dtype."
        )
    sources = [site.name for site in sites if site.kind == "source" or ".cross_attention.weights" in site.name]
    if sources:
        raise OptionError(f"{sources[0]!r} has a row per token of the other half: capture it into memory instead.")
    if len({site.name.startswith("encoder.") for site in sites}) > 1:
        raise OptionError("a store has the tokens of one stack: ask for encoder sites or for decoder sites.")


def room_for(selection: BatchSelection) -> Room:
    """Return the room that a batch's rows need."""
    return Room(selection.num_rows, len(selection.lengths), selection.num_pairs)


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Encode an example's record as stored in a shard."""
    return _encode(record).encode()


def list_shapes(
    stored: Sequence[StoredSite], counts: Counts, num_pairs: int, record_bytes: int, has_positions: bool
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Return the shapes that `list_tensors` will give for a unit with records, before any value is computed.

    Args:
        stored: The sites.
        counts: Rows and examples of the unit.
        num_pairs: Query-key pairs of the unit.
        record_bytes: Size of all its records.
        has_positions: Whether rows are stored with their positions.
    """
    num_rows, num_examples = counts.num_tokens, counts.num_examples
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "example": (torch.int64, (num_examples,)),
        "offsets": (torch.int64, (num_examples + 1,)),
        "input_ids": (torch.int64, (num_rows,)),
        **({POSITIONS: (torch.int64, (num_rows,))} if has_positions else {}),
        "record_offsets": (torch.int64, (num_examples + 1,)),
        "records": (torch.uint8, (record_bytes,)),
    }
    for site in stored:
        shapes |= site.layout(counts, num_pairs)
    listed = [(name, dtype, shape) for name, (dtype, shape) in shapes.items()]
    return sorted(listed, key=lambda named: _file_order(named[0], named[1]))


def list_tensors(unit: OpenUnit, stored: Sequence[StoredSite]) -> list[tuple[str, Tensor]]:
    """List the tensors of a shard in file order: widest dtype first, so that each is aligned, and records last."""
    lengths = torch.tensor([0, *unit.lengths], dtype=torch.int64, device="cpu")
    tensors = [
        ("example", torch.tensor(unit.ordinals, dtype=torch.int64, device="cpu")),
        ("offsets", lengths.cumsum(0)),
        ("input_ids", torch.cat(unit.input_ids) if unit.input_ids else torch.empty(0, dtype=torch.int64, device="cpu")),
    ]
    if unit.positions:
        tensors.append((POSITIONS, torch.cat(unit.positions)))
    if unit.records:
        sizes = torch.tensor([0, *map(len, unit.records)], dtype=torch.int64, device="cpu")
        tensors.append(("record_offsets", sizes.cumsum(0)))
        tensors.append(("records", torch.frombuffer(bytearray(b"".join(unit.records)), dtype=torch.uint8)))
    for index, site in enumerate(stored):
        target = unit.buffer.target(index, 0, unit.used.of(site.kind))
        tensors.append((site.name, target.values))
        if target.scale is not None:
            tensors.append((site.name + SCALE_SUFFIX, target.scale))
    return sorted(tensors, key=lambda named: _file_order(named[0], named[1].dtype))


def _file_order(name: str, dtype: torch.dtype) -> tuple[int, bool]:
    # records last: their arbitrary length would leave later one-byte values unaligned to a block
    return -dtype.itemsize, name == "records"
