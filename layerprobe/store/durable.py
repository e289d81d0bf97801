"""Files and folders that survive a power loss: written whole, flushed, renamed, and their folder flushed.

Large files go past the system's page cache where the file system lets them: it would copy every byte once more, at
the cost of the forward pass beside it, to keep what nobody reads soon. One aligned buffer serves as a bounce, so
neither the format nor the shard buffers need any alignment.

Must never know what is in a file.
"""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from layerprobe.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows, where files are written the usual way
    fcntl = None

__all__ = ["commit_file", "flush_tree", "make_folder"]

_DIRECT = getattr(os, "O_DIRECT", 0)
_BOUNCE_BYTES = 4 << 20
_BLOCK_BYTES = 4096


def commit_file(path: Path, pieces: "Sequence[bytes | memoryview]") -> None:
    """Write a file and make it permanent, replacing an older one whole.

    Args:
        path: Its final name; `.tmp` is added while it is written.
        pieces: Its bytes, one after the other.

    Raises:
        StoreError: the system refused.

    Cost: no copy of the data but for a bounce of 4 MiB.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        size = sum(len(piece) for piece in pieces)
        descriptor = _open(partial, is_direct=size >= _BOUNCE_BYTES)
        try:
            if _is_direct(descriptor):
                _write_direct(descriptor, pieces)
            else:
                for piece in pieces:
                    _write_all(descriptor, piece)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written ({error.strerror or error}). What was committed before stays readable; "
            "run the same command again when the cause is gone."
        ) from error


def _open(path: Path, is_direct: bool) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
    if is_direct and _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o666)
        except OSError:
            pass  # not every file system has it; what else is wrong shows again at once
    return os.open(path, flags, 0o666)


def _is_direct(descriptor: int) -> bool:
    return fcntl is not None and bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT)


def _write_direct(descriptor: int, pieces: "Sequence[bytes | memoryview]") -> None:
    """Write through an aligned bounce buffer; the last, incomplete block goes the usual way."""
    with mmap.mmap(-1, _BOUNCE_BYTES) as bounce, memoryview(bounce) as room:
        filled = 0
        for piece in pieces:
            rest = memoryview(piece).cast("B")
            while len(rest):
                count = min(len(rest), _BOUNCE_BYTES - filled)
                room[filled : filled + count] = rest[:count]
                rest, filled = rest[count:], filled + count
                if filled == _BOUNCE_BYTES:
                    _write_blocks(descriptor, room)
                    filled = 0
        whole = filled - filled % _BLOCK_BYTES
        _write_blocks(descriptor, room[:whole])
        _end_direct(descriptor)
        _write_all(descriptor, room[whole:filled])


def _write_blocks(descriptor: int, blocks: memoryview) -> None:
    while len(blocks):
        try:
            written = os.write(descriptor, blocks)
        except OSError:
            if not _is_direct(descriptor):
                raise
            # Some file systems refuse only when written to; the usual way tells whether that was all.
            _end_direct(descriptor)
            continue
        blocks = blocks[written:]
        if written % _BLOCK_BYTES:
            _end_direct(descriptor)


def _end_direct(descriptor: int) -> None:
    assert fcntl is not None
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)


def _write_all(descriptor: int, piece: "bytes | memoryview") -> None:
    rest = memoryview(piece).cast("B")
    while len(rest):
        # Linux writes at most 2 GiB a call
        rest = rest[os.write(descriptor, rest) :]


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, permanently."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _flush_folder(path.parent)


def flush_tree(folder: Path) -> None:
    """Make a folder's files permanent, and their names in it."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle for a folder; its rename is durable by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
