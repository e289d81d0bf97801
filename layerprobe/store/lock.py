"""One writer per store: a lock that the kernel releases when its process ends, however it ends.

The lock is on `run.lock` in the store, held through an open file descriptor; the content of the file only names the
holder in error messages. If the file system has no locks, a warning on stderr says so, and the run continues.

Must never know what is written under the lock.
"""

import errno
import json
import os
import shlex
import socket
import sys
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from layerprobe.errors import LockError, StoreError, telling_refusals
from layerprobe.forking import watch_forks
from layerprobe.store.guard import open_inside
from layerprobe.store.paths import NamedPath
from layerprobe.telling import find_stderr

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["LOCK_FILE", "StoreLock", "check_held", "find_holder", "is_abandoned", "refuse_held"]

LOCK_FILE = "run.lock"
_MOST_BYTES = 1 << 16
# Errors of a file system without locks, such as a network one whose server has none.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class StoreLock(AbstractContextManager["StoreLock"]):
    """Lock a store for writing.

    Args:
        folder: The store; must exist.

    Raises:
        LockError: another run holds the lock; the message names its process.
        StoreError: the folder cannot be written.
    """

    def __init__(self, folder: Path | NamedPath) -> None:
        self._folder = NamedPath.of(folder)
        self._path = self._folder / LOCK_FILE
        self._descriptor: int | None = None
        self._is_locked = True

    def __enter__(self) -> "StoreLock":
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> "StoreLock":
        """Acquire the lock and return `self`."""
        with telling_refusals(self._path, "written", "Choose another folder."):
            while not self._try_once():
                pass
        return self

    @property
    def descriptor(self) -> int | None:
        """The file descriptor that holds the lock, to share with other processes; None while there is no lock."""
        return self._descriptor if self._is_locked else None

    @property
    def is_held(self) -> bool:
        """Whether this process holds the store; False in a process that was forked from it."""
        return self._descriptor is not None

    def release(self, keeps_file: bool = False) -> None:
        """Release the lock, if it is held.

        Args:
            keeps_file: Keep the lock file, which marks the folder as abandoned.
        """
        if self._descriptor is None:
            return
        # Unlink before unlocking: whoever takes the lock in between sees that its file has no name any more. If the
        # folder was moved, the name may belong to the lock of another run.
        with suppress(OSError):
            if not keeps_file and _has_name(self._descriptor, self._path):
                os.unlink(self._path)
        descriptor, self._descriptor = self._descriptor, None
        with suppress(OSError):  # the descriptor is closed all the same, and the caller's error says more
            os.close(descriptor)

    def check(self) -> None:
        """Check that the path of the folder still leads to the locked folder; see `check_held`."""
        # without locks, another run may share the file and remove it
        if self.descriptor is not None:
            check_held(self._folder, self.descriptor)

    def _try_once(self) -> bool:
        """Try to take the lock; False if the file was unlinked meanwhile, because its holder has just ended."""
        # do not follow a link out of the folder, or block on a pipe
        careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | careful, 0o666)
        try:
            self._lock(descriptor)
            if not _has_name(descriptor, self._path):
                os.close(descriptor)
                return False
            with suppress(OSError):  # a full disk must not prevent locking
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _describe_holder().encode())
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(self)
        return True

    def _lock(self, descriptor: int) -> None:
        reason = "Python has no file locks on this system"
        if fcntl is not None:
            try:
                # `flock` locks the open file, not the process, so a second lock of this process is refused too.
                # Over NFS the server holds the lock.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if not _is_held(descriptor):
                    self._lock(descriptor)  # only a short check by another process
                    return
                raise _refuse(self._folder, _name_holder(self._path)) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self._is_locked = False
                reason = error.strerror or str(error)
        print(
            f"layerprobe: {self._folder}: cannot be locked ({reason}). Make sure that no other run writes there.",
            file=find_stderr(),
        )

    def _forget(self) -> None:
        """Close the file in a forked process, which would otherwise keep the lock after its parent's death."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def check_held(folder: Path | NamedPath, descriptor: int) -> None:
    """Check that the path of a folder still leads to the folder that was locked.

    Args:
        folder: The store.
        descriptor: Holds its lock.

    Raises:
        StoreError: the folder was moved or removed, and another run may have begun under its name.
    """
    path = NamedPath.of(folder) / LOCK_FILE
    with telling_refusals(path, "read"):
        if not _has_name(descriptor, path):
            raise StoreError(
                f"{folder}: was moved, replaced or removed while the run was under way. Put back what was there, or "
                "choose another folder, and run the same command again."
            )


def find_holder(folder: Path | NamedPath) -> str | None:
    """Return which process is writing into a store, as far as can be told from here; None if none is.

    Args:
        folder: The store; need not exist.
    """
    if fcntl is None:
        return None
    try:
        with open_inside(folder, LOCK_FILE) as file:
            return _name_holder(folder / LOCK_FILE) if _is_held(file.fileno()) else None
    except (OSError, StoreError):
        return None


def is_abandoned(folder: Path) -> bool:
    """Return whether a folder was locked by a process that has since ended; False if that cannot be told.

    Args:
        folder: The folder that the process wrote into.
    """
    if fcntl is None:
        return False
    try:
        with open_inside(folder, LOCK_FILE) as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            # an empty file means that its creator has not locked it yet, so it has not written anything either
            return bool(file.read(1))
    except (OSError, StoreError):
        return False


def refuse_held(folder: Path | NamedPath) -> None:
    """Check that no run is writing into a folder, before doing work that would be lost.

    Only acquiring the lock afterwards keeps others out.

    Raises:
        LockError: another run is writing there; the message names its process.
    """
    if (holder := find_holder(folder)) is not None:
        raise _refuse(folder, holder)


def _refuse(folder: Path | NamedPath, holder: str) -> LockError:
    return LockError(
        f"{folder}: another run is writing there ({holder}). Wait for it or end it, and run the same command again; or "
        "choose another folder."
    )


def _is_held(descriptor: int) -> bool:
    """Return whether a writer holds the lock; such checks take a shared lock for a moment."""
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


_held = watch_forks(StoreLock._forget)


def _has_name(descriptor: int, path: NamedPath) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _describe_holder() -> str:
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.orig_argv),
    }
    return json.dumps(holder, indent=1)


def _name_holder(path: Path | NamedPath) -> str:
    """Describe the holder of a lock from its file, as far as possible."""
    found: Any = None
    with suppress(OSError, ValueError, RecursionError), open_inside(path.parent, path.name) as file:
        found = json.loads(file.read(_MOST_BYTES))
    if not isinstance(found, dict):
        return "it has not said which"
    said = {key: " ".join(str(found.get(key, "?")).split()) for key in ("host", "pid", "since", "command")}
    return f"process {said['pid']} on {said['host']}, since {said['since']}: {said['command']}"
