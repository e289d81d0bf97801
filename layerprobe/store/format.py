"""Format 1: the bytes of a shard and the names of a store's files, read and checked wherever they lie.

A shard is one safetensors file whose header also carries counts, a checksum per tensor and a checksum of itself.
`docs/format.md` is the normative page. A shard exists when its final name does.

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
# Where merge holds a shard against its header before it is one of the store.
STAGE_FOLDER = "merge.tmp"

# Of a shard elsewhere, asked for first: a header of hundreds of sites fits, so one request mostly does.
_FIRST_BYTES = 1 << 16
_MOST_NONFINITE = (1 << 63) - 1


def is_leftover(name: str) -> bool:
    """Whether a name in a store's folder is what a run or a merge leaves that ended midway; the next one removes it."""
    final = name.removesuffix(".tmp")
    own = (STORE_FILE, INDEX_FILE, PROGRESS_FILE, TOKENIZER_FOLDER)
    is_trial = final.startswith(TRIAL_PREFIX) and final.removeprefix(TRIAL_PREFIX).isdigit()
    is_own = final in own or parse_shard_name(final) is not None or is_trial
    return name == STAGE_FOLDER or (name != final and is_own)


def clear_leftovers(folder: Path) -> None:
    """Remove what an ended run or merge left in a store's folder."""
    for path in [path for path in folder.iterdir() if is_leftover(path.name)]:
        remove_path(path)


def remove_path(path: Path) -> None:
    """Remove a file or a whole folder, if it is there; a link itself, never what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def need_store(place: Place) -> None:
    """Make sure that there is a store, complete or not.

    Raises:
        StoreError: there is none.
    """
    if not place.exists(STORE_FILE):
        is_there = bool(place.list_files()) if place.folder is None else _is_folder(place.folder)
        what = f"is not a store: it has no {STORE_FILE}" if is_there else "does not exist"
        raise StoreError(f"{place}: {what}. Make one with 'layerprobe extract MODEL INPUT -o {place}'.")


def _is_folder(folder: NamedPath) -> bool:
    """Whether a folder is there.

    Raises:
        StoreError: something else is, or the system does not say.
    """
    try:
        mode = os.stat(folder).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StoreError(f"{folder}: cannot be read ({error.strerror or error}).") from error
    if not stat.S_ISDIR(mode):
        raise StoreError(f"{folder}: is a file, not the folder of a store. Give the folder.")
    return True


def check_keepable(folder: Path) -> None:
    """Make sure that something other than a store can be kept in a folder, which need not be there.

    Raises:
        OptionError: it is a store, or lies in one.
        StoreError: a file is in its place, or in that of a folder above it.
    """
    real = Path(os.path.realpath(folder))
    above = [one for one in (real, *real.parents) if one.exists()]
    if not above[0].is_dir():
        raise StoreError(f"{folder}: {above[0]} is a file. Choose another folder.")
    _refuse_inside(folder, above)


def need_parent(path: str | Path) -> Path:
    """Make sure, before anything is computed, that a file that is none of a store can be written; gives the path.

    Raises:
        OptionError: it would lie in a store.
        StoreError: its folder is not there.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise StoreError(f"{path}: there is no folder {path.parent}. Make it, or choose another path.")
    # a link is written through
    _refuse_inside(path, Path(os.path.realpath(path)).parents)
    return path


def _refuse_inside(path: Path, folders: Iterable[Path]) -> None:
    for folder in folders:
        if _is_store(folder):
            raise OptionError(f"{path}: lies in the store {folder}. Choose another folder.")


def _is_store(folder: Path) -> bool:
    """Whether a folder holds a store; what other programs call `store.json` is none."""
    try:
        return os.path.isfile(folder / STORE_FILE) and "fingerprint" in read_json(folder / STORE_FILE)
    except StoreError:  # damaged, if there are shards beside it
        return any(parse_shard_name(name) is not None for name in os.listdir(folder))


def checksum_file(place: Place, file: str) -> str:
    """Work out the checksum of a small file of a store; xxh3-64 of its bytes.

    Raises:
        StoreError: it cannot be read.
    """
    return checksum(place.read(file, 0, place.size(file)))


def _view_bytes(tensor: Tensor) -> memoryview:
    """Look at a contiguous tensor's memory; no copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def commit_shard(
    folder: Path | Place,
    header: ShardHeader,
    tensors: Sequence[tuple[str, Tensor]],
    checksums: Mapping[str, str] | None = None,
) -> int:
    """Write one shard and make it permanent.

    Args:
        folder: The store.
        header: Counts; its `checksums` and `tensors` are computed here.
        tensors: Contiguous CPU tensors in file order, widest dtype first so that each is aligned.
        checksums: Of each tensor, where they are known; None to work them out.

    Returns:
        Size of the file in bytes.

    Raises:
        StoreError: the system refused to write; nothing is left but perhaps a `.tmp` file.

    Cost: no copy of the data in memory; one pass where checksums are not known, one sequential write.
    """
    views = [(name, tensor, _view_bytes(tensor)) for name, tensor in tensors]
    sums = {name: checksum(view) for name, _, view in views} if checksums is None else checksums
    head = build_header(header, [(name, tensor.dtype, tensor.shape) for name, tensor in tensors], sums)
    find_place(folder).commit(header.file, [head, *(view for _, _, view in views)])
    return len(head) + sum(len(view) for _, _, view in views)


def bound_shard(header: ShardHeader, shapes: "Sequence[tuple[str, torch.dtype, Sequence[int]]]") -> int:
    """Work out how many bytes a shard takes, before any of its values is made.

    Args:
        header: As for `commit_shard`.
        shapes: Name, dtype and shape of each tensor.

    Returns:
        The bytes at most: exact but for the digits of what is not finite, which are known last and may take one more
        block of padding.
    """
    worst = replace(header, nonfinite={name: _MOST_NONFINITE for name, _, _ in shapes})
    head = build_header(worst, shapes, dict.fromkeys((name for name, _, _ in shapes), BLANK_CHECKSUM))
    return len(head) + sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in shapes)


def read_json(path: Path | NamedPath) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FormatError: it is not one.
    """
    with telling_refusals(path, "read"):
        text = read_inside(path.parent, path.name, _bound_json(path.name).num_bytes)
    return _parse_json(str(path), path.name, text)


def load_json(place: Place, file: str) -> dict[str, Any]:
    """Read a JSON object, wherever it lies; as `read_json`."""
    if place.folder is not None:
        return read_json(place.folder / file)
    return _parse_json(place.label(file), file, read_bounded(place, file, _bound_json(file)))


def read_bounded(place: Place, file: str, bounds: JsonBounds) -> bytes:
    """Read a whole file of a store.

    Raises:
        FormatError: it is larger than that.
        StoreError: it cannot be read.
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
    """Read and check the header of a shard against itself and against the file's size.

    Raises:
        FormatError: the file is cut, damaged, or no shard of format 1.
        StoreError: the file cannot be read.
    """
    with open_shard(path) as (_, header):
        return header


@contextlib.contextmanager
def open_shard(path: Path | NamedPath) -> Iterator[tuple[BinaryIO, ShardHeader]]:
    """Hold a shard open, its header read; as `read_header`."""
    with contextlib.ExitStack() as held:
        with telling_refusals(path, "read"):
            file = held.enter_context(open_inside(path.parent, path.name))
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            text = file.read(_header_length(str(path), prefix, size))
        yield file, _check_header(str(path), path.name, text, size)


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
