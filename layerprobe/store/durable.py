"""Write files and folders that survive a power loss: write, flush, rename, flush the folder.

Large files use direct I/O (O_DIRECT) where the file system supports it: the page cache would copy every byte once more,
at the expense of the forward pass, to cache what is not read soon. Data is written in place where its alignment
allows, else through an aligned buffer, so callers need not care about alignment. Nothing is written through a memory
map, where a full disk is a fatal signal instead of an error.

Must never know what is in a file.
"""

import contextlib
import ctypes
import errno
import math
import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from layerprobe.errors import SpaceError, StoreError
from layerprobe.store.paths import NamedPath

try:
    import fcntl
except ImportError:  # Windows, where files are written through the page cache
    fcntl = None

__all__ = [
    "TRIAL_PREFIX",
    "commit_file",
    "commit_folder",
    "flush_file",
    "flush_folder",
    "is_direct_better",
    "make_folder",
    "make_noise",
    "reserve_file",
    "tell_failure",
]

_DIRECT = getattr(os, "O_DIRECT", 0)
_BOUNCE_BYTES = 4 << 20
_BLOCK_BYTES = 4096
_SECTOR_BYTES = 512
# Below this, a separate write costs more than a copy into the buffer.
_LEAST_IN_PLACE = 1 << 20
# File name prefix (followed by the pid), bytes per write, and writes per method of the disk probe.
TRIAL_PREFIX = "probe-"
_PROBE_BYTES = 16 << 20
_NUM_PROBES = 3
# Copying into the page cache takes time from the forward pass, so direct I/O may be this much slower.
_WORTH_OF_NO_COPY = 1.5
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Errors of a file system that cannot preallocate.
_NO_RESERVE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def commit_file(path: Path | NamedPath, pieces: "Sequence[bytes | memoryview]", is_direct: bool = True) -> None:
    """Write a file durably and atomically, replacing an older one.

    Args:
        path: The final name; `.tmp` is appended while writing.
        pieces: The content, in order.
        is_direct: Whether to use direct I/O, if the file has 4 MiB or more and the file system supports it.

    Raises:
        SpaceError: the disk is full, or a quota is exhausted.
        StoreError: the system refused.

    Cost: no copy of a piece of 1 MiB or more whose address, minus its offset in the file, is a multiple of 512; other
    pieces are copied once, through a 4 MiB buffer.
    """
    partial = path.with_name(path.name + ".tmp")
    size = sum(len(piece) for piece in pieces)
    try:
        descriptor = _open(partial, is_direct and size >= _BOUNCE_BYTES)
        try:
            _write_pieces(descriptor, pieces)
            # a reserved file, or one left by an interrupted run, may be longer
            os.ftruncate(descriptor, size)
            _sync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
        flush_folder(path.parent)
    except OSError as error:
        raise tell_failure(path, error, size) from error


def is_direct_better(folder: Path) -> bool:
    """Measure whether large files are better written to a folder's disk with direct I/O.

    Alternates both ways three times, in unlinked files, so that nothing is left behind.

    Returns:
        Whether the best direct time is at most 1.5 times the best time through the page cache. Also True if there is
        only one way, as on macOS and Windows, or if the folder is not writable, which the first real write reports.

    Cost: 96 MiB written to disk, and 16 MiB of memory while it runs.
    """
    block = make_noise(_PROBE_BYTES)
    best = {True: math.inf, False: math.inf}
    try:
        for _ in range(_NUM_PROBES if _DIRECT else 0):
            for is_direct in best:
                best[is_direct] = min(best[is_direct], _time_write(folder, block, is_direct))
    except OSError:
        return True
    return best[True] <= _WORTH_OF_NO_COPY * best[False]


def make_noise(num_bytes: int) -> memoryview:
    """Make a page-aligned block of incompressible bytes; `num_bytes` must be a multiple of 8."""
    block = memoryview(mmap.mmap(-1, num_bytes))
    np.random.default_rng(0).random(out=np.frombuffer(block, np.float64))
    return block


def _time_write(folder: Path, block: memoryview, is_direct: bool) -> float:
    path = folder / f"{TRIAL_PREFIX}{os.getpid()}.tmp"
    descriptor = _open(path, is_direct)
    try:
        os.unlink(path)
        start = time.perf_counter()
        _write_pieces(descriptor, [block])
        _sync(descriptor)
        return time.perf_counter() - start
    finally:
        os.close(descriptor)


def reserve_file(path: Path | NamedPath, size: int) -> None:
    """Reserve space for a file that `commit_file` will write, in the same `.tmp` file.

    If the file system cannot preallocate, only check the free space.

    Args:
        path: The file's final name.
        size: Bytes to reserve; `commit_file` gives back what it does not need.

    Raises:
        SpaceError: there is not enough space; nothing is left behind.
        StoreError: the system refused.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            _allocate(descriptor, partial, size)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise tell_failure(path, error, size) from error


def _wrap_fallocate(call: Callable[..., int]) -> Callable[[int, int, int], None]:
    def reserve(descriptor: int, start: int, size: int) -> None:
        while call(descriptor, 0, start, size):
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))

    return reserve


def _find_fallocate() -> Callable[[int, int, int], None] | None:
    """Find the system call that preallocates space in an open file; None if there is none.

    On Linux use `fallocate` itself: `posix_fallocate` falls back to writing a byte into every block.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None, use_errno=True)
            # in a 32-bit glibc the plain name takes 32-bit sizes; musl has only the plain name
            call = getattr(libc, "fallocate64", None) or libc.fallocate
            call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
            return _wrap_fallocate(call)
    return getattr(os, "posix_fallocate", None)


_fallocate = _find_fallocate()


def _allocate(descriptor: int, path: Path | NamedPath, size: int) -> None:
    if _fallocate is not None:
        try:
            _fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in _NO_RESERVE:
                raise
    if size > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tell_failure(path: Path | NamedPath, error: OSError, size: int = 0) -> StoreError:
    """Turn an OS error into a `StoreError` that says what failed, why, what is missing and how to continue.

    Args:
        path: The file or folder that could not be written.
        error: The error of the system.
        size: Size of the file in bytes; 0 if unknown.
    """
    what = f"{path}: cannot be written ({error.strerror or error})"
    if error.errno not in _NO_SPACE:
        return StoreError(
            f"{what}. What was committed before stays readable; run the same command again when the cause is gone."
        )
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path.parent).free
        if size > free:
            what += f": it takes {size:,} bytes, the disk has {free:,} free, {size - free:,} are missing"
        elif size:
            # a quota, or blocks reserved for root
            what += f": it takes {size:,} bytes, more than you may use, though the disk has {free:,} free"
    return SpaceError(
        f"{what}. Make room on the disk: what was committed before stays readable, and the same command goes on from "
        "there."
    )


def _open(path: Path | NamedPath, is_direct: bool) -> int:
    # no O_TRUNC: it would free the reserved space
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if is_direct and _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o666)
        except OSError:
            pass  # not every file system supports O_DIRECT; any other error recurs below
    return os.open(path, flags, 0o666)


def _is_direct(descriptor: int) -> bool:
    return fcntl is not None and bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT)


def _write_pieces(descriptor: int, pieces: "Sequence[bytes | memoryview]") -> None:
    if not _is_direct(descriptor):
        for piece in pieces:
            _write_all(descriptor, piece)
        return
    file = _DirectFile(descriptor)
    for piece in pieces:
        file.write(piece)
    file.end()


class _DirectFile:
    """A file written with direct I/O, in whole blocks.

    A large piece is written in place if its memory is aligned: a block of the file must start at a sector-aligned
    address. Everything else is copied through an aligned bounce buffer; next to a forward pass on two cores, that copy
    costs more than all other work of the writer.

    Args:
        descriptor: File descriptor opened with O_DIRECT.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # Never closed explicitly, but freed with its last reference: after a failed write the traceback still holds a
        # view of it, and closing would raise.
        self._room = memoryview(mmap.mmap(-1, _BOUNCE_BYTES))
        self._filled = 0
        self._writes_in_place = True

    def write(self, piece: "bytes | memoryview") -> None:
        """Write a piece; what is left in the bounce buffer waits for the next one."""
        rest = memoryview(piece).cast("B")
        lead = -self._filled % _BLOCK_BYTES
        if len(rest) >= _LEAST_IN_PLACE and self._writes_in_place and _begins_sector(rest[lead:]):
            self._bounce(rest[:lead])
            self._empty_bounce()
            rest = rest[lead:]
            whole = len(rest) - len(rest) % _BLOCK_BYTES
            refused = self._write_blocks(rest[:whole])
            # some disks require more than sector alignment of the address
            self._writes_in_place = not refused
            rest = rest[whole - len(refused) :]
        self._bounce(rest)

    def end(self) -> None:
        """Write what is left, the last partial block through the page cache."""
        whole = self._filled - self._filled % _BLOCK_BYTES
        left = self._room[whole : self._filled]
        self._filled = whole
        self._empty_bounce()
        _end_direct(self._descriptor)
        _write_all(self._descriptor, left)

    def _bounce(self, rest: memoryview) -> None:
        while len(rest):
            count = min(len(rest), _BOUNCE_BYTES - self._filled)
            # numpy releases the GIL, so the forward pass can run meanwhile
            room = np.frombuffer(self._room[self._filled : self._filled + count], np.uint8)
            np.copyto(room, np.frombuffer(rest[:count], np.uint8))
            rest, self._filled = rest[count:], self._filled + count
            if self._filled == _BOUNCE_BYTES:
                self._empty_bounce()

    def _empty_bounce(self) -> None:
        if refused := self._write_blocks(self._room[: self._filled]):
            # Some file systems reject direct I/O only on write; the retry shows whether that was the cause.
            _end_direct(self._descriptor)
            _write_all(self._descriptor, refused)
        self._filled = 0

    def _write_blocks(self, blocks: memoryview) -> memoryview:
        """Write whole blocks with direct I/O; return the blocks that the system rejects."""
        while len(blocks):
            try:
                written = os.write(self._descriptor, blocks)
            except OSError:
                if not _is_direct(self._descriptor):
                    raise
                break
            blocks = blocks[written:]
            if written % _BLOCK_BYTES:
                _end_direct(self._descriptor)
        return blocks


def _begins_sector(piece: memoryview) -> bool:
    return np.frombuffer(piece, np.uint8).ctypes.data % _SECTOR_BYTES == 0


def _end_direct(descriptor: int) -> None:
    assert fcntl is not None
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)


def _write_all(descriptor: int, piece: "bytes | memoryview") -> None:
    rest = memoryview(piece).cast("B")
    while len(rest):
        # Linux writes at most 2 GiB per call
        rest = rest[os.write(descriptor, rest) :]


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, durably."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush_folder(path.parent)


def commit_folder(partial: Path, folder: Path) -> None:
    """Commit a folder that is already written: flush its content, then rename it to its final name."""
    for file in [*partial.rglob("*"), partial]:
        (flush_folder if file.is_dir() else flush_file)(file)
    os.replace(partial, folder)
    flush_folder(folder.parent)


def flush_folder(folder: Path | NamedPath) -> None:
    """Flush a folder, so that its created, renamed and removed names are durable."""
    if os.name != "nt":  # Windows has no folder handles to flush; its rename is durable
        flush_file(folder)


def flush_file(path: Path | NamedPath) -> None:
    """Flush a file to disk, whoever wrote it."""
    # Windows flushes only writable handles
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Flush a file to disk; on macOS plain `fsync` only reaches the drive's cache."""
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if fcntl is not None and full_sync is not None:
        with contextlib.suppress(OSError):  # not every file system supports it
            fcntl.fcntl(descriptor, full_sync)
            return
    os.fsync(descriptor)
