"""Format 1: the bytes of a shard, the names of a store's files, and how a file becomes permanent.

A shard is one safetensors file whose header also carries counts, a checksum per tensor and a checksum of itself.
`docs/format.md` is the normative page. A commit is: write `.tmp`, flush it to disk, rename, flush the folder. A shard
exists when its final name does.

Must never know of models, hooks or devices.
"""

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from layerprobe.errors import FormatError, StoreError
from layerprobe.store.durable import commit_file
from layerprobe.store.places import Place, find_place

__all__ = [
    "FORMAT_VERSION",
    "INDEX_FILE",
    "SCALE_SUFFIX",
    "STORE_FILE",
    "TOKENIZER_FOLDER",
    "ShardHeader",
    "TensorEntry",
    "check_site",
    "checksum",
    "commit_bytes",
    "commit_shard",
    "fingerprint_of",
    "load_header",
    "load_json",
    "load_start",
    "parse_shard_name",
    "read_header",
    "read_json",
    "shard_name",
]

FORMAT_VERSION = 1
STORE_FILE = "store.json"
INDEX_FILE = "index.json"
TOKENIZER_FOLDER = "tokenizer"
SCALE_SUFFIX = ":scale"

_SHARD_NAME = re.compile(r"shard-(\d{6,})\.safetensors\Z")
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
# Data begins at a multiple of this, so that mapped tensors are aligned for any vector unit.
_ALIGNMENT = 64
_MOST_HEADER_BYTES = 100_000_000
_MOST_JSON_BYTES = 1_000_000_000
_BLANK = "0" * 16
# Of a shard elsewhere, asked for first: a header of hundreds of sites fits, so one request mostly does.
_FIRST_BYTES = 1 << 16


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a shard: dtype, shape and where its bytes lie in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself.

    Args:
        unit: Number of the unit, which is also in the file's name.
        num_examples, num_tokens: Counts of this shard.
        first_example: Ordinal of the first example of the unit.
        fingerprint: Of the plan that the shard belongs to.
        num_truncated: Examples that were cut to the maximum length.
        nonfinite: Count of values that are not finite, by site; sites without any are left out.
        checksums: xxh3-64 of each tensor's bytes.
        tensors: Where each tensor lies.
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
        return shard_name(self.unit)


def shard_name(unit: int) -> str:
    """Name the file of a unit."""
    return f"shard-{unit:06d}.safetensors"


def parse_shard_name(name: str) -> int | None:
    """Read the unit out of a file name; None if it is not a shard's."""
    match = _SHARD_NAME.match(name)
    return int(match.group(1)) if match and shard_name(int(match.group(1))) == name else None


def checksum(data: "bytes | memoryview") -> str:
    """xxh3-64 as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def fingerprint_of(fields: Mapping[str, Any]) -> str:
    """xxh3-128 of what tells one run from another, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True, default=str).encode())


def _view_bytes(tensor: Tensor) -> memoryview:
    """Look at a contiguous tensor's memory; no copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def commit_shard(folder: Path | Place, header: ShardHeader, tensors: Sequence[tuple[str, Tensor]]) -> int:
    """Write one shard and make it permanent.

    Args:
        folder: The store.
        header: Counts; its `checksums` and `tensors` are worked out here.
        tensors: Contiguous CPU tensors in file order, widest dtype first so that each is aligned.

    Returns:
        Size of the file in bytes.

    Raises:
        StoreError: the system refused to write; nothing is left but perhaps a `.tmp` file.

    Cost: no copy of the data in memory; one pass for checksums, one sequential write.
    """
    views = [(name, tensor, _view_bytes(tensor)) for name, tensor in tensors]
    head = _build_header(header, views)
    find_place(folder).commit(header.file, [head, *(view for _, _, view in views)])
    return len(head) + sum(len(view) for _, _, view in views)


def _build_header(header: ShardHeader, views: Iterable[tuple[str, Tensor, memoryview]]) -> bytes:
    entries: dict[str, Any] = {}
    checksums: dict[str, str] = {}
    position = 0
    for name, tensor, view in views:
        offsets = [position, position + len(view)]
        entries[name] = {"dtype": _TO_NAME[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        checksums[name] = checksum(view)
        position += len(view)
    metadata = {
        "format": f"layerprobe/{FORMAT_VERSION}",
        "header_checksum": _BLANK,
        "unit": str(header.unit),
        "examples": str(header.num_examples),
        "tokens": str(header.num_tokens),
        "first_example": str(header.first_example),
        "truncated": str(header.num_truncated),
        "fingerprint": header.fingerprint,
        "nonfinite": json.dumps(dict(header.nonfinite)),
        "checksums": json.dumps(checksums),
    }
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    own = checksum(text)
    return struct.pack("<Q", len(text)) + text.replace(_BLANK.encode(), own.encode(), 1)


def commit_bytes(path: Path, data: bytes) -> None:
    """Write a small file and make it permanent, replacing an older one whole.

    Raises:
        StoreError: the system refused.
    """
    commit_file(path, [data])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FormatError: it is not one.
    """
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ValueError("it is larger than any that layerprobe writes")
        text = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise FormatError(f"{path}: is not the JSON of a store ({error}).") from error
    return _parse_json(str(path), text)


def load_json(place: Place, file: str) -> dict[str, Any]:
    """Read a JSON object, wherever it lies; as `read_json`."""
    if place.folder is not None:
        return read_json(place.folder / file)
    size = place.size(file)
    if size > _MOST_JSON_BYTES:
        raise FormatError(f"{place.label(file)}: is not the JSON of a store: it has {size:,} bytes.")
    return _parse_json(place.label(file), place.read(file, 0, size))


def _parse_json(label: str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{label}: is not the JSON of a store ({error}).") from error
    if not isinstance(value, dict):
        raise FormatError(f"{label}: holds {type(value).__name__}, not a JSON object.")
    return value


def read_header(path: Path) -> ShardHeader:
    """Read and check the header of a shard against itself and against the file's size.

    Raises:
        FormatError: the file is cut, damaged, or no shard of format 1.
        StoreError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            text = file.read(_header_length(str(path), prefix, size))
    except FormatError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return _check_header(str(path), path.name, text, size)


def load_header(place: Place, file: str) -> ShardHeader:
    """Read and check the header of a shard, wherever it lies; as `read_header`."""
    return read_header(place.folder / file) if place.folder is not None else load_start(place, file)[0]


def load_start(place: Place, file: str) -> tuple[ShardHeader, bytes]:
    """Read a shard's header by byte range.

    Returns:
        The header, and the first bytes of the file, which mostly hold the tensors of ordinals and offsets too.

    Raises:
        FormatError, StoreError: as `read_header`.

    Cost: two requests, three for a header beyond 64 KiB.
    """
    label, size = place.label(file), place.size(file)
    first = place.read(file, 0, min(size, _FIRST_BYTES))
    end = 8 + _header_length(label, first[:8], size)
    if end > len(first):
        first += place.read(file, len(first), end)
    return _check_header(label, file, first[8:end], size), first


def _header_length(label: str, prefix: bytes, size: int) -> int:
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(_MOST_HEADER_BYTES, size - 8):
        raise FormatError(f"{label}: is cut or no shard: {size} bytes cannot hold its header.")
    return length


def _check_header(label: str, file: str, text: bytes, size: int) -> ShardHeader:
    length = len(text)
    try:
        header = _parse_header(text)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(
            f"{label}: its header is damaged ({error}). Remove it and run the same extraction again to make it anew."
        ) from error
    end = max((entry.stop for entry in header.tensors.values()), default=0)
    if 8 + length + end != size:
        raise FormatError(f"{label}: holds {size} bytes, its header asks for {8 + length + end}. The file is cut.")
    if header.file != file:
        raise FormatError(f"{label}: says it is {header.file}. Give it back its name.")
    shifted = {
        name: TensorEntry(entry.dtype, entry.shape, entry.start + 8 + length, entry.stop + 8 + length)
        for name, entry in header.tensors.items()
    }
    return ShardHeader(**{**header.__dict__, "tensors": shifted})


def _parse_header(text: bytes) -> ShardHeader:
    """Parse and check a header; any surprise is one of the errors that `read_header` expects."""
    entries = json.loads(text)
    metadata = entries.pop("__metadata__")
    if metadata["format"] != f"layerprobe/{FORMAT_VERSION}":
        raise ValueError(f"format {metadata['format']!r} is not layerprobe/{FORMAT_VERSION}")
    own = metadata["header_checksum"]
    if len(own) != 16 or checksum(text.replace(own.encode(), _BLANK.encode(), 1)) != own:
        raise ValueError("its own checksum does not match")
    tensors = {name: _parse_entry(name, entry) for name, entry in entries.items()}
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise ValueError(f"{name!r} begins at {entry.start}, the tensor before it ends at {position}")
        position = entry.stop
    header = ShardHeader(
        unit=_count(metadata["unit"]),
        num_examples=_count(metadata["examples"]),
        num_tokens=_count(metadata["tokens"]),
        first_example=_count(metadata["first_example"]),
        fingerprint=str(metadata["fingerprint"]),
        num_truncated=_count(metadata["truncated"]),
        nonfinite={str(site): int(count) for site, count in json.loads(metadata["nonfinite"]).items()},
        checksums=dict(json.loads(metadata["checksums"])),
        tensors=tensors,
    )
    shapes = {
        "example": (header.num_examples,),
        "offsets": (header.num_examples + 1,),
        "input_ids": (header.num_tokens,),
    }
    for name, shape in shapes.items():
        if tensors[name].shape != shape or tensors[name].dtype != torch.int64:
            raise ValueError(f"{name!r} is {tensors[name].dtype} of shape {tensors[name].shape}, not int64 of {shape}")
    if set(header.checksums) != set(tensors):
        raise ValueError("checksums and tensors do not name the same")
    return header


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(f"a count of {value}")
    return value


def _parse_entry(name: str, entry: dict[str, Any]) -> TensorEntry:
    dtype = _FROM_NAME[entry["dtype"]]
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"{name!r} has a size that is no whole number")
    elements = 1
    for extent in shape:
        elements *= extent
    if stop - start != elements * dtype.itemsize:
        raise ValueError(f"{name!r} of shape {shape} does not fill its {stop - start} bytes")
    return TensorEntry(dtype, shape, start, stop)


def check_site(site: str, said: Mapping[str, Any]) -> None:
    """Check what `store.json` says of a site; what is wrong is a KeyError, TypeError or ValueError."""
    kind, dtype, width = said["kind"], said["dtype"], said["width"]
    has_dtype = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
    if kind not in ("token", "example", "attention") or not has_dtype or type(width) is not int or width < 0:
        raise ValueError(f"{site!r} is of kind {kind!r}, dtype {dtype!r}, width {width!r}")
