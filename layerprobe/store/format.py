"""Read, check and write the files of a store in format 1: names, shards and JSON, local or remote.

A shard is one safetensors file whose header also carries counts, a checksum per tensor and a checksum of itself.
`docs/format.md` is the normative specification. A shard is committed once it has its final name.

Must never know of models, hooks or devices.
"""

import contextlib
import math
import os
import shutil
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from layerprobe.errors import FormatError, OptionError, StoreError, telling_refusals
from layerprobe.store.durable import TRIAL_PREFIX
from layerprobe.store.guard import LARGE, SMALL, JsonBounds, brief, open_inside, parse_json, read_inside
from layerprobe.store.headers import (
    BLANK_CHECKSUM,
    ShardHeader,
    TensorEntry,
    build_header,
    checksum,
    parse_header,
    parse_shard_name,
)
from layerprobe.store.paths import NamedPath
from layerprobe.store.places import Place, find_place
from layerprobe.tables import format_count

__all__ = [
    "INDEX_FILE",
    "PROGRESS_FILE",
    "STAGE_FOLDER",
    "STORE_FILE",
    "TOKENIZER_FILE",
    "TOKENIZER_FOLDER",
    "bound_shard",
    "check_keepable",
    "checksum_file",
    "clear_leftovers",
    "commit_shard",
    "is_leftover",
    "load_header",
    "load_json",
    "load_start",
    "need_parent",
    "need_store",
    "open_shard",
    "read_bounded",
    "read_header",
    "read_json",
    "remove_path",
]

STORE_FILE = "store.json"
INDEX_FILE = "index.json"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILE = f"{TOKENIZER_FOLDER}/tokenizer.json"
PROGRESS_FILE = "progress.json"
# Staging folder: merge checks each shard here before it renames it into the store.
STAGE_FOLDER = "merge.tmp"

# First request for a remote shard: large enough that a header with hundreds of sites usually takes one read.
_FIRST_BYTES = 1 << 16
_MOST_NONFINITE = (1 << 63) - 1


def is_leftover(name: str) -> bool:
    """Return whether a file name is a leftover of an interrupted run or merge, which the next one removes."""
    final = name.removesuffix(".tmp")
    own = (STORE_FILE, INDEX_FILE, PROGRESS_FILE, TOKENIZER_FOLDER)
    is_trial = final.startswith(TRIAL_PREFIX) and final.removeprefix(TRIAL_PREFIX).isdigit()
    is_own = final in own or parse_shard_name(final) is not None or is_trial
    return name == STAGE_FOLDER or (name != final and is_own)


def clear_leftovers(folder: Path) -> None:
    """Remove the leftovers of interrupted runs and merges from a store's folder."""
    for path in [path for path in folder.iterdir() if is_leftover(path.name)]:
        remove_path(path)


def remove_path(path: Path) -> None:
    """Remove a file or a whole folder if it exists; a symbolic link itself, never its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def need_store(place: Place) -> None:
    """Check that a store exists, complete or not.

    Raises:
        StoreError: there is none.
    """
    if not place.exists(STORE_FILE):
        is_there = bool(place.list_files()) if place.folder is None else _is_folder(place.folder)
        what = f"is not a store: it has no {STORE_FILE}" if is_there else "does not exist"
        raise StoreError(f"{place}: {what}. Make one with 'layerprobe extract MODEL INPUT -o {place}'.")


def _is_folder(folder: NamedPath) -> bool:
    """Return whether a folder exists.

    Raises:
        StoreError: the path is not a folder, or the system refused to look.
    """
    with telling_refusals(folder, "read"):
        try:
            mode = os.stat(folder).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return False
    if not stat.S_ISDIR(mode):
        raise StoreError(f"{folder}: is a file, not the folder of a store. Give the folder.")
    return True


def check_keepable(folder: Path) -> None:
    """Check that a folder, existing or not, can hold something other than a store.

    Raises:
        OptionError: it is a store, or lies inside one.
        StoreError: the folder, or one above it, is a file.
    """
    real = Path(os.path.realpath(folder))
    above = [one for one in (real, *real.parents) if one.exists()]
    if not above[0].is_dir():
        raise StoreError(f"{folder}: {above[0]} is a file. Choose another folder.")
    _refuse_inside(folder, above)


def need_parent(path: str | Path) -> Path:
    """Check, before any computation, that a file that is not part of a store can be written; return its path.

    Raises:
        OptionError: it would lie inside a store.
        StoreError: its folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise StoreError(f"{path}: there is no folder {path.parent}. Make it, or choose another path.")
    # writing follows symbolic links
    _refuse_inside(path, Path(os.path.realpath(path)).parents)
    return path


def _refuse_inside(path: Path, folders: Iterable[Path]) -> None:
    for folder in folders:
        if _is_store(folder):
            raise OptionError(f"{path}: lies in the store {folder}. Choose another folder.")


def _is_store(folder: Path) -> bool:
    """Return whether a folder holds a store, and not just another program's `store.json`."""
    try:
        return os.path.isfile(folder / STORE_FILE) and "fingerprint" in read_json(folder / STORE_FILE)
    except StoreError:  # damaged: still a store if there are shards beside it
        return any(parse_shard_name(name) is not None for name in os.listdir(folder))


def checksum_file(place: Place, file: str) -> str:
    """Compute the checksum (xxh3-64) of a small file of a store.

    Raises:
        StoreError: the file cannot be read.
    """
    return checksum(place.read(file, 0, place.size(file)))


def _view_bytes(tensor: Tensor) -> memoryview:
    """View the memory of a contiguous tensor as bytes, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def commit_shard(
    folder: Path | Place,
    header: ShardHeader,
    tensors: Sequence[tuple[str, Tensor]],
    checksums: Mapping[str, str] | None = None,
) -> int:
    """Write one shard and commit it durably.

    Args:
        folder: The store.
        header: Counts; its `checksums` and `tensors` are computed here.
        tensors: Contiguous CPU tensors in file order, widest dtype first so that each is aligned.
        checksums: Checksum of each tensor if already known; None to compute them.

    Returns:
        The file size in bytes.

    Raises:
        StoreError: the system refused to write; at most a `.tmp` file is left behind.

    Cost: no copy of the data in memory; one pass over it if checksums are not given; one sequential write.
    """
    views = [(name, tensor, _view_bytes(tensor)) for name, tensor in tensors]
    sums = {name: checksum(view) for name, _, view in views} if checksums is None else checksums
    head = build_header(header, [(name, tensor.dtype, tensor.shape) for name, tensor in tensors], sums)
    find_place(folder).commit(header.file, [head, *(view for _, _, view in views)])
    return len(head) + sum(len(view) for _, _, view in views)


def bound_shard(header: ShardHeader, shapes: "Sequence[tuple[str, torch.dtype, Sequence[int]]]") -> int:
    """Compute an upper bound on the size of a shard, before any of its values exist.

    Args:
        header: As for `commit_shard`.
        shapes: Name, dtype and shape of each tensor.

    Returns:
        The size in bytes: exact except for the digits of the non-finite counts, which are known last and may take one
        more block of padding.
    """
    worst = replace(header, nonfinite={name: _MOST_NONFINITE for name, _, _ in shapes})
    head = build_header(worst, shapes, dict.fromkeys((name for name, _, _ in shapes), BLANK_CHECKSUM))
    return len(head) + sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in shapes)


def read_json(path: Path | NamedPath) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FormatError: the file is not a JSON object of a store.
        StoreError: the file cannot be read.
    """
    with telling_refusals(path, "read"):
        text = read_inside(path.parent, path.name, _bound_json(path.name).num_bytes)
    return _parse_json(str(path), path.name, text)


def load_json(place: Place, file: str) -> dict[str, Any]:
    """Read a JSON object from any place; raises as `read_json` does."""
    if place.folder is not None:
        return read_json(place.folder / file)
    return _parse_json(place.label(file), file, read_bounded(place, file, _bound_json(file)))


def read_bounded(place: Place, file: str, bounds: JsonBounds) -> bytes:
    """Read a whole file of a store.

    Raises:
        FormatError: the file is larger than the bounds allow.
        StoreError: the file cannot be read.
    """
    if (size := place.size(file)) > bounds.num_bytes:
        raise FormatError(f"{place.label(file)}: has {size:,} bytes; at most {bounds.num_bytes:,} are read.")
    return place.read(file, 0, size)


def _bound_json(file: str) -> JsonBounds:
    return LARGE if file == INDEX_FILE else SMALL


def _parse_json(label: str, file: str, text: bytes) -> dict[str, Any]:
    try:
        value = parse_json(text, _bound_json(file))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{label}: is not the JSON of a store ({brief(error)}).") from error
    if not isinstance(value, dict):
        raise FormatError(f"{label}: holds {type(value).__name__}, not a JSON object.")
    return value


def read_header(path: Path | NamedPath) -> ShardHeader:
    """Read the header of a shard and check it against itself and the file's size.

    Raises:
        FormatError: the file is truncated, damaged, or not a shard of format 1.
        StoreError: the file cannot be read.
    """
    with open_shard(path) as (_, header):
        return header


@contextlib.contextmanager
def open_shard(path: Path | NamedPath) -> Iterator[tuple[BinaryIO, ShardHeader]]:
    """Open a shard and read its header; raises as `read_header` does."""
    with contextlib.ExitStack() as held:
        with telling_refusals(path, "read"):
            file = held.enter_context(open_inside(path.parent, path.name))
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            text = file.read(_header_length(str(path), prefix, size))
        yield file, _check_header(str(path), path.name, text, size)


def load_header(place: Place, file: str) -> ShardHeader:
    """Read and check the header of a shard from any place; raises as `read_header` does."""
    return read_header(place.folder / file) if place.folder is not None else load_start(place, file)[0]


def load_start(place: Place, file: str) -> tuple[ShardHeader, bytes]:
    """Read the header of a shard with range requests.

    Returns:
        The header, and the first bytes of the file, which usually include the ordinals and offsets too.

    Raises:
        FormatError, StoreError: as `read_header`.

    Cost: two requests, or three if the header exceeds 64 KiB.
    """
    label, size = place.label(file), place.size(file)
    first = place.read(file, 0, min(size, _FIRST_BYTES))
    end = 8 + _header_length(label, first[:8], size)
    if end > len(first):
        first += place.read(file, len(first), end)
    return _check_header(label, file, first[8:end], size), first


def _header_length(label: str, prefix: bytes, size: int) -> int:
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(SMALL.num_bytes, size - 8):
        raise FormatError(f"{label}: is cut or no shard: {format_count(size, 'byte')} cannot hold its header.")
    return length


def _check_header(label: str, file: str, text: bytes, size: int) -> ShardHeader:
    length = len(text)
    try:
        header = parse_header(text)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(
            f"{label}: its header is damaged ({brief(error)}). "
            "Remove it and run the same extraction again to make it anew."
        ) from error
    end = max((entry.stop for entry in header.tensors.values()), default=0)
    if 8 + length + end != size:
        raise FormatError(
            f"{label}: holds {format_count(size, 'byte')}, its header asks for {8 + length + end:,}. The file is cut."
        )
    if header.file != file:
        raise FormatError(f"{label}: says it is {header.file}. Give it back its name.")
    shifted = {
        name: TensorEntry(entry.dtype, entry.shape, entry.start + 8 + length, entry.stop + 8 + length)
        for name, entry in header.tensors.items()
    }
    return replace(header, tensors=shifted)
