"""Files and folders that survive a power loss: written whole, flushed, renamed, and their folder flushed.

Large files go past the system's page cache where the file system lets them: it would copy every byte once more, at
the cost of the forward pass beside it, to keep what nobody reads soon. They are written from where they lie where the
disk takes that, else through one aligned buffer, so that nobody need care how anything is aligned. Nothing is written
through a memory map, where a full disk is a signal that kills instead of an error.

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
except ImportError:  # Windows, where files are written the usual way
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
# A write of its own costs more than the copy of less than this.
_LEAST_IN_PLACE = 1 << 20
# What a trial of a disk writes at once, and how often each way; the name of its file goes on with a number.
TRIAL_PREFIX = "probe-"
_PROBE_BYTES = 16 << 20
_NUM_PROBES = 3
# A copy into the page cache is taken from the forward pass: the disk may take so much longer without it.
_WORTH_OF_NO_COPY = 1.5
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# What a file system says that cannot set space aside.
_NO_RESERVE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def commit_file(path: Path | NamedPath, pieces: "Sequence[bytes | memoryview]", is_direct: bool = True) -> None:
    """Write a file and make it permanent, replacing an older one whole.

    Args:
        path: Its final name; `.tmp` is added while it is written.
        pieces: Its bytes, one after the other.
        is_direct: Whether it goes past the page cache, if it is large and the file system lets it.

    Raises:
        SpaceError: the disk is full, or a quota used up.
        StoreError: the system refused.

    Cost: no copy of a piece of a megabyte or more whose address, less its offset in the file, is a multiple of 512; the
    others are copied once, through 4 MiB.
    """
    partial = path.with_name(path.name + ".tmp")
    size = sum(len(piece) for piece in pieces)
    try:
        descriptor = _open(partial, is_direct and size >= _BOUNCE_BYTES)
        try:
            _write_pieces(descriptor, pieces)
            # what was reserved, or left by a run that ended here, may be longer
            os.ftruncate(descriptor, size)
            _sync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
        flush_folder(path.parent)
    except OSError as error:
        raise tell_failure(path, error, size) from error


def is_direct_better(folder: Path) -> bool:
    """Try whether large files had better go to a folder's disk past the page cache.

    Both ways in turns, a few times, into files that have no name: they leave nothing behind, whatever happens.

    Returns:
        Whether the best time past the page cache is within half as much again of the best through it; True where there
        is but one way, as on macOS and Windows, or the folder takes no files, which shows when one is written.

    Cost: 96 MiB on the disk, and 16 MiB of memory meanwhile.
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
    """Make so many bytes, a multiple of 8 from the start of a page on, that no disk can store in much less."""
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
    """Set space aside for a file that `commit_file` will write: in the very `.tmp` that it writes into.

    Where the file system cannot do that, only what is free now is looked at.

    Args:
        path: The file's final name.
        size: Bytes; `commit_file` gives back what it does not need.

    Raises:
        SpaceError: there is not so much; nothing is left behind.
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
    """Give the call that sets space aside in an open file; None where the system has none.

    On Linux its own: where the file system cannot, `posix_fallocate` writes a byte into every block instead.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None, use_errno=True)
            # the plain name has 32-bit sizes in a 32-bit glibc; musl has no other
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
    """Put a refusal of the system into words: what it hit, why, what is missing, and how to continue.

    Args:
        path: What could not be written.
        error: What the system said.
        size: Bytes of the file, where they are known.
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
            # a quota, or a part of the disk that is not for everyone
            what += f": it takes {size:,} bytes, more than you may use, though the disk has {free:,} free"
    return SpaceError(
        f"{what}. Make room on the disk: what was committed before stays readable, and the same command goes on from "
        "there."
    )


def _open(path: Path | NamedPath, is_direct: bool) -> int:
    # no O_TRUNC: it would give back what was reserved
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if is_direct and _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o666)
        except OSError:
            pass  # not every file system has it; what else is wrong shows again at once
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
    """A file that is written past the page cache, in whole blocks.

    A large piece goes to the disk from where it lies, if it lies in memory as the disk wants it: with a sector's start
    where a block of the file begins. What does not goes through an aligned bounce buffer; beside a forward pass on two
    cores that copy cost more than all else the writer does.

    Args:
        descriptor: Of the file, opened for direct writes.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # Freed with the last that points to it: after a refusal the error's traceback still does, and closing would
        # fail.
        self._room = memoryview(mmap.mmap(-1, _BOUNCE_BYTES))
        self._filled = 0
        self._writes_in_place = True

    def write(self, piece: "bytes | memoryview") -> None:
        """Write a piece but for what does not fill a block, which waits for the next one."""
        rest = memoryview(piece).cast("B")
        lead = -self._filled % _BLOCK_BYTES
        if len(rest) >= _LEAST_IN_PLACE and self._writes_in_place and _begins_sector(rest[lead:]):
            self._bounce(rest[:lead])
            self._empty_bounce()
            rest = rest[lead:]
            whole = len(rest) - len(rest) % _BLOCK_BYTES
            refused = self._write_blocks(rest[:whole])
            # some disks want more of an address than a sector
            self._writes_in_place = not refused
            rest = rest[whole - len(refused) :]
        self._bounce(rest)

    def end(self) -> None:
        """Write what is left, the last, incomplete block the usual way."""
        whole = self._filled - self._filled % _BLOCK_BYTES
        left = self._room[whole : self._filled]
        self._filled = whole
        self._empty_bounce()
        _end_direct(self._descriptor)
        _write_all(self._descriptor, left)

    def _bounce(self, rest: memoryview) -> None:
        while len(rest):
            count = min(len(rest), _BOUNCE_BYTES - self._filled)
            # by numpy, which lets other Python threads run meanwhile, the forward's among them
            room = np.frombuffer(self._room[self._filled : self._filled + count], np.uint8)
            np.copyto(room, np.frombuffer(rest[:count], np.uint8))
            rest, self._filled = rest[count:], self._filled + count
            if self._filled == _BOUNCE_BYTES:
                self._empty_bounce()

    def _empty_bounce(self) -> None:
        if refused := self._write_blocks(self._room[: self._filled]):
            # Some file systems refuse only when written to; the usual way tells whether that was all.
            _end_direct(self._descriptor)
            _write_all(self._descriptor, refused)
        self._filled = 0

    def _write_blocks(self, blocks: memoryview) -> memoryview:
        """Write whole blocks, and give back what the system refuses to write so."""
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
        # Linux writes at most 2 GiB a call
        rest = rest[os.write(descriptor, rest) :]


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, permanently."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush_folder(path.parent)


def commit_folder(partial: Path, folder: Path) -> None:
    """Make a folder that is written already permanent, with all that is in it, under its final name."""
    for file in [*partial.rglob("*"), partial]:
        (flush_folder if file.is_dir() else flush_file)(file)
    os.replace(partial, folder)
    flush_folder(folder.parent)


def flush_folder(folder: Path | NamedPath) -> None:
    """Make the names in a folder permanent, those that are gone too."""
    if os.name != "nt":  # Windows has no handle for a folder; its rename is durable by itself
        flush_file(folder)


def flush_file(path: Path | NamedPath) -> None:
    """Make what is in a file permanent, whoever wrote it."""
    # Windows flushes only what may be written
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Wait until a file is on the disk: on macOS `fsync` alone ends at the drive's own cache."""
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if fcntl is not None and full_sync is not None:
        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.fcntl(descriptor, full_sync)
            return
    os.fsync(descriptor)
