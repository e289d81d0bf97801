"""Build the header of a shard, and parse and validate one without trusting it.

A header is checked against itself and against fixed bounds, so callers may rely on it: tensors lie back to back in the
file, counts match the tensors, and no size overflows 64 bits. The checksums detect damage, not tampering: a forger can
recompute them.

Must never know of files.
"""

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
import xxhash

from layerprobe.errors import StoreError
from layerprobe.store.guard import MOST_COUNT, SMALL, brief, parse_json

__all__ = [
    "BLANK_CHECKSUM",
    "DTYPES",
    "FORMAT_VERSION",
    "MOST_EXAMPLES",
    "MOST_TOKENS",
    "POSITIONS",
    "SCALE_SUFFIX",
    "ShardHeader",
    "TensorEntry",
    "build_header",
    "check_shapes",
    "check_stored",
    "checksum",
    "lay_out",
    "parse_header",
    "parse_shard_name",
]

FORMAT_VERSION = 1
SCALE_SUFFIX = ":scale"
# Positions of the kept rows; present only if the store does not keep every row.
POSITIONS = "positions"

_SHARD_NAME = re.compile(r"shard-([0-9]{6,12})\.safetensors\Z")
_COUNT = re.compile(r"(0|[1-9][0-9]{0,17})\Z")
_DIGEST = re.compile(r"[0-9a-f]{16}\Z")
_TO_NAME = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_FROM_NAME = {name: dtype for dtype, name in _TO_NAME.items()}
DTYPES = tuple(_TO_NAME)
# The values of the first site start at a multiple of this in the file, so that they are page-aligned when mapped and
# can be written with O_DIRECT without a copy.
_ALIGNMENT = 4096
BLANK_CHECKSUM = "0" * 16
# Offsets and positions of a shard's examples take 8 bytes each in memory; this bounds them.
MOST_EXAMPLES = 1 << 24
# The sum of squared lengths, which locates attention weights, stays within 64 bits.
MOST_TOKENS = 1 << 31
_MOST_UNIT = 10**12 - 1
# torch counts elements and bytes in 64 bits, even for an empty tensor.
_MOST_ELEMENTS = 1 << 48
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a shard: its dtype, shape and byte range in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class ShardHeader:
    """The parsed header of a shard.

    Args:
        unit: Number of the unit; it is also in the file name.
        num_examples, num_tokens: Counts of this shard.
        first_example: Ordinal of the unit's first example.
        fingerprint: Fingerprint of the plan that the shard belongs to.
        num_truncated: Number of examples truncated to the maximum length.
        nonfinite: Count of non-finite values by site; sites without any are omitted.
        checksums: xxh3-64 of each tensor's bytes.
        tensors: Dtype, shape and byte range of each tensor.
    """

    unit: int
    num_examples: int
    num_tokens: int
    first_example: int
    fingerprint: str
    num_truncated: int = 0
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return _name_shard(self.unit)


def _name_shard(unit: int) -> str:
    """Return the file name of a unit's shard."""
    return f"shard-{unit:06d}.safetensors"


def parse_shard_name(name: str) -> int | None:
    """Parse the unit from a file name; None if it is not a shard's."""
    match = _SHARD_NAME.match(name)
    return int(match.group(1)) if match and _name_shard(int(match.group(1))) == name else None


def checksum(data: "bytes | memoryview") -> str:
    """Compute xxh3-64 as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def lay_out(shapes: "Sequence[tuple[str, torch.dtype, Sequence[int]]]") -> dict[str, TensorEntry]:
    """Lay tensors out back to back; offsets are relative to the end of the header."""
    entries: dict[str, TensorEntry] = {}
    position = 0
    for name, dtype, shape in shapes:
        stop = position + dtype.itemsize * math.prod(shape)
        entries[name] = TensorEntry(dtype, tuple(shape), position, stop)
        position = stop
    return entries


def build_header(
    header: ShardHeader, shapes: "Sequence[tuple[str, torch.dtype, Sequence[int]]]", checksums: Mapping[str, str]
) -> bytes:
    """Serialize a header, preceded by its length.

    Args:
        header: Counts; its own `checksums` and `tensors` are ignored.
        shapes: Name, dtype and shape of each tensor, in file order.
        checksums: Checksum of each tensor.

    Raises:
        StoreError: the header or a count exceeds what a reader accepts.
    """
    entries = {
        name: {"dtype": _TO_NAME[one.dtype], "shape": list(one.shape), "data_offsets": [one.start, one.stop]}
        for name, one in lay_out(shapes).items()
    }
    metadata = {
        "format": f"layerprobe/{FORMAT_VERSION}",
        "header_checksum": BLANK_CHECKSUM,
        "unit": str(header.unit),
        "examples": str(header.num_examples),
        "tokens": str(header.num_tokens),
        "first_example": str(header.first_example),
        "truncated": str(header.num_truncated),
        "fingerprint": header.fingerprint,
        "nonfinite": json.dumps(dict(header.nonfinite)),
        "checksums": json.dumps(dict(checksums)),
    }
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    before = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in takewhile(_is_before_values, shapes))
    text += b" " * (-(8 + len(text) + before) % _ALIGNMENT)
    try:
        _check_counts(header)
        if len(text) > SMALL.num_bytes:
            raise ValueError(f"its header has {len(text):,} bytes; at most {SMALL.num_bytes:,} are read")
    except ValueError as error:
        raise StoreError(
            f"{header.file}: cannot be written ({error}). Ask for fewer sites or smaller shards."
        ) from error
    own = checksum(text)
    return struct.pack("<Q", len(text)) + text.replace(BLANK_CHECKSUM.encode(), own.encode(), 1)


def _is_before_values(entry: "tuple[str, torch.dtype, Sequence[int]]") -> bool:
    """Return whether a tensor precedes all site values: ordinals, offsets, ids and int8 scales do."""
    name, dtype, _ = entry
    return dtype == torch.int64 or name.endswith(SCALE_SUFFIX)


def parse_header(text: bytes) -> ShardHeader:
    """Parse and check the header of a shard; offsets are relative to its end.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RecursionError: it is not a header of format 1, or contradicts
            itself.
    """
    entries = parse_json(text, SMALL)
    metadata = entries.pop("__metadata__")
    if metadata["format"] != f"layerprobe/{FORMAT_VERSION}":
        raise ValueError(f"format {brief(repr(metadata['format']))} is not layerprobe/{FORMAT_VERSION}")
    own = metadata["header_checksum"]
    if not _DIGEST.match(own) or checksum(text.replace(own.encode(), BLANK_CHECKSUM.encode(), 1)) != own:
        raise ValueError("its own checksum does not match")
    tensors = {name: _parse_entry(name, entry) for name, entry in entries.items()}
    _check_places(tensors)
    nonfinite = parse_json(metadata["nonfinite"].encode(), SMALL)
    checksums = parse_json(metadata["checksums"].encode(), SMALL)
    header = ShardHeader(
        unit=_parse_count(metadata["unit"]),
        num_examples=_parse_count(metadata["examples"]),
        num_tokens=_parse_count(metadata["tokens"]),
        first_example=_parse_count(metadata["first_example"]),
        fingerprint=metadata["fingerprint"],
        num_truncated=_parse_count(metadata["truncated"]),
        nonfinite=dict(nonfinite.items()),
        checksums=dict(checksums.items()),
        tensors=tensors,
    )
    _check_counts(header)
    if not isinstance(header.fingerprint, str) or not all(type(count) is int for count in nonfinite.values()):
        raise ValueError("its fingerprint is no text, or a count in nonfinite is no whole number")
    if set(checksums) != set(tensors):
        raise ValueError("checksums and tensors do not name the same")
    if not all(_DIGEST.match(digest) for digest in checksums.values()):
        raise ValueError("a checksum is not of 16 hexadecimal digits")
    check_shapes(header)
    return header


def _check_counts(header: ShardHeader) -> None:
    for what, count, most in (
        ("unit", header.unit, _MOST_UNIT),
        ("examples", header.num_examples, MOST_EXAMPLES),
        ("tokens", header.num_tokens, MOST_TOKENS),
        ("first_example", header.first_example, MOST_COUNT),
    ):
        if count > most:
            raise ValueError(f"{what} is {count:,}; at most {most:,} are read")


def _check_places(tensors: Mapping[str, TensorEntry]) -> None:
    """Check that tensors lie back to back, each aligned to its item size."""
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise ValueError(f"{brief(repr(name))} begins at {entry.start}, the tensor before it ends at {position}")
        if entry.stop > entry.start and entry.start % entry.dtype.itemsize:
            raise ValueError(f"{brief(repr(name))} begins at {entry.start}, not aligned to its {entry.dtype}")
        position = entry.stop


def check_shapes(header: ShardHeader) -> None:
    """Check the tensors that every shard has, and its records and positions if present, against its counts.

    Raises:
        ValueError, KeyError: a tensor does not match, or is missing.
    """
    count = header.num_examples
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "example": (torch.int64, (count,)),
        "offsets": (torch.int64, (count + 1,)),
        "input_ids": (torch.int64, (header.num_tokens,)),
    }
    if "record_offsets" in header.tensors or "records" in header.tensors:
        records = header.tensors["records"]
        wanted["record_offsets"] = (torch.int64, (count + 1,))
        wanted["records"] = (torch.uint8, (records.stop - records.start,))
    if POSITIONS in header.tensors:
        wanted[POSITIONS] = (torch.int64, (header.num_tokens,))
    for name, (dtype, shape) in wanted.items():
        found = header.tensors[name]
        if (found.dtype, found.shape) != (dtype, shape):
            raise ValueError(f"{name!r} is {found.dtype} of shape {brief(found.shape)}, not {dtype} of {shape}")


def _parse_count(text: str) -> int:
    if not _COUNT.match(text):
        raise ValueError(f"a count of {brief(text)}")
    return int(text)


def _parse_entry(name: str, entry: dict[str, Any]) -> TensorEntry:
    dtype = _FROM_NAME[entry["dtype"]]
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"{brief(repr(name))} has a size that is no whole number")
    elements = room = 1
    for extent in shape:
        elements *= extent
        room *= max(1, extent)
        if room > _MOST_ELEMENTS or len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"{brief(repr(name))} of shape {brief(shape)} does not fill its {stop - start} bytes")
    if stop - start != elements * dtype.itemsize:
        raise ValueError(f"{brief(repr(name))} of shape {brief(shape)} does not fill its {stop - start} bytes")
    return TensorEntry(dtype, shape, start, stop)


def check_stored(header: ShardHeader, layout: "Mapping[str, tuple[torch.dtype, tuple[int, ...]]]") -> None:
    """Check that a shard holds tensors of these dtypes and shapes.

    Raises:
        ValueError: a tensor is missing or differs.
    """
    for name, (dtype, shape) in layout.items():
        entry = header.tensors.get(name)
        if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
            found = "nothing" if entry is None else f"{entry.dtype} of {entry.shape}"
            raise ValueError(f"{name!r} is {found}; store.json asks for {dtype} of {shape}")
