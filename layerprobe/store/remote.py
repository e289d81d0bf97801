"""A store under a URL: objects listed, read by byte range and written by one PUT each, through fsspec.

A request that fails in a way that may pass (a server's 5xx, a time-out, a body that was cut) is made again, a bounded
number of times and ever later. Then it is a `StoreError` that names the URL and the last cause.

Hides fsspec and the drivers under it. Must never know what is in an object, and never say a secret.
"""

import contextlib
import io
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from layerprobe.errors import OptionError, StoreError, first_line
from layerprobe.packages import need_package
from layerprobe.store.paths import NamedPath

__all__ = ["Patience", "RemotePlace", "is_url"]

_Found = TypeVar("_Found")

# Each writes an object whole or not at all, which is what a commit rests on.
_DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "memory": "fsspec"}
# What asking again does not change.
_FINAL_ERRORS = (
    FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError, TypeError, AttributeError,
    NotImplementedError, ImportError,
)  # fmt: skip
# By name, so that no driver is imported to know them.
_FINAL_NAMES = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "NoSuchBucket",
    "OfflineModeIsEnabled",
)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
# Of one object; S3 takes no more in one PUT.
_MOST_PUT_BYTES = 5 << 30
_QUERY = re.compile(r"(\w+://[^\s?'\"]+)\?[^\s'\"]+")
_USER = re.compile(r"(\w+://)[^\s/@'\"]+@")


def is_url(where: object) -> bool:
    """Whether it names a place by URL rather than by path."""
    return _URL.match(str(where)) is not None


@dataclass(frozen=True)
class Patience:
    """How often and how long a request is tried.

    Args:
        attempts: In all.
        first_wait_s: Before the second; each further wait is twice as long, and up to half of it is left to chance so
            that many readers do not come back at once.
        longest_wait_s: No wait is longer.
        timeout_s: How long a server may say nothing.
    """

    attempts: int = 6
    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.first_wait_s, self.longest_wait_s) < 0 or self.timeout_s <= 0:
            raise OptionError(f"{self}: ask for at least one attempt, waits of 0 or more, and a time-out above 0.")

    def wait_s(self, attempt: int) -> float:
        """Seconds to wait after so many failed attempts."""
        longest = min(self.longest_wait_s, self.first_wait_s * 2 ** (attempt - 1))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, hides nothing


class RemotePlace:
    """A place for a store under `s3://`, `gs://`, `hf://` or `memory://`.

    Keys, tokens and endpoints come from where the driver looks for them: the environment, its own files, fsspec's
    configuration. Can be pickled; a process that was forked makes connections of its own.

    Args:
        url: Of the store: bucket and prefix.
        patience: How often and how long a request is tried.

    Raises:
        OptionError: stores do not lie under such URLs, or what it takes is not installed.
    """

    folder: NamedPath | None = None

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        match = _URL.match(url)
        protocol = match.group(1) if match else ""
        if protocol not in _DRIVERS:
            raise OptionError(
                f"{_mask(url)}: stores do not lie under {protocol}://. Give a local path, or a URL that begins with "
                f"{', '.join(f'{known}://' for known in _DRIVERS)}."
            )
        if not url[len(protocol) + 3 :].strip("/"):
            raise OptionError(f"{url!r}: names no store. Give a bucket and a prefix: {protocol}://bucket/acts.")
        self.url = url.rstrip("/")
        self.patience = patience or Patience()
        self._check: Callable[[], None] | None = None
        self._protocol = protocol
        self._connected: tuple[int, Any, str] | None = None
        self._connect()

    def __reduce__(self) -> "tuple[type[RemotePlace], tuple[str, Patience]]":
        return RemotePlace, (self.url, self.patience)

    def checked_by(self, check: Callable[[], None]) -> "RemotePlace":
        """Give the same place, connected as it is, for someone who may come to wait no longer.

        Args:
            check: Called before a request is tried again; raises where nobody waits for it any more. Not pickled.
        """
        # not by `copy`, which would connect anew, as a place does that comes out of a pickle
        checked = object.__new__(type(self))
        checked.__dict__ = {**self.__dict__, "_check": check}
        return checked

    def tried(self) -> "RemotePlace":
        """Give the place itself: there is one way to write an object."""
        return self

    def __str__(self) -> str:
        return _mask(self.url)

    def label(self, file: str) -> str:
        """Name a file in messages."""
        return f"{self}/{file}"

    def list_files(self, folder: str = "") -> list[str]:
        """List what lies in the place or in a folder of it, without what lies deeper."""
        return [name for name, _ in self._list(folder)]

    def list_sizes(self) -> dict[str, int]:
        """List the names and bytes of the files in the place."""
        return {name: int(entry["size"]) for name, entry in self._list("") if entry["type"] == "file"}

    def _list(self, folder: str) -> list[tuple[str, dict[str, Any]]]:
        def ask(fs: Any, root: str) -> list[tuple[str, dict[str, Any]]]:
            path = f"{root}/{folder}".rstrip("/")
            try:
                found = fs.ls(path, detail=True)
            except FileNotFoundError:
                return []
            named = [(str(entry["name"]).rstrip("/"), entry) for entry in found]
            # a prefix that is an object too, as some tools make for a folder, lists itself
            return [(name.rsplit("/", 1)[-1], entry) for name, entry in named if name.strip("/") != path.strip("/")]

        return self._try(folder, "read", ask)

    def exists(self, file: str) -> bool:
        """Whether a file is there."""

        def ask(fs: Any, root: str) -> bool:
            try:
                return fs.info(f"{root}/{file}")["type"] == "file"
            except FileNotFoundError:
                return False

        return self._try(file, "read", ask)

    def size(self, file: str) -> int:
        """Bytes of a file."""
        return self._try(file, "read", lambda fs, root: int(fs.info(f"{root}/{file}")["size"]))

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Read a run of bytes, which must lie inside the file.

        Raises:
            StoreError: the file is not there, or the server does not give them.
        """
        if start == stop:
            return b""

        def ask(fs: Any, root: str) -> bytes:
            data = fs.cat_file(f"{root}/{file}", start=start, end=stop)
            if len(data) != stop - start:
                raise EOFError(f"{len(data):,} of {stop - start:,} bytes came")
            return data

        return self._try(file, "read", ask)

    def commit(self, file: str, pieces: "Sequence[bytes | memoryview]") -> None:
        """Write an object whole, in one PUT, replacing an older one whole.

        Raises:
            StoreError: it could not be written; an older one is as it was.

        Cost: `s3://` is fed from the pieces; other drivers want one copy of them. Objects beyond 5 GiB go in parts,
        which become one object when the last has come.
        """

        def ask(fs: Any, root: str) -> None:
            if self._protocol == "s3":
                body = _Pieces(pieces)
                fs.pipe_file(
                    f"{root}/{file}", body, chunksize=_MOST_PUT_BYTES if len(body) < _MOST_PUT_BYTES else 1 << 28
                )
            else:
                fs.pipe_file(f"{root}/{file}", b"".join(pieces))

        self._try(file, "written", ask)

    def remove(self, file: str) -> None:
        """Remove a file if it is there."""

        def ask(fs: Any, root: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(f"{root}/{file}")

        self._try(file, "removed", ask)

    def _connect(self) -> tuple[Any, str]:
        """Give the driver and the store's path in its words; a forked process needs a driver of its own."""
        # no lock, which a fork could leave locked for ever: two threads that both make a driver do no harm
        connected = self._connected
        if connected is None or connected[0] != os.getpid():
            connected = self._connected = (os.getpid(), *self._make_driver())
        return connected[1:]

    def _make_driver(self) -> tuple[Any, str]:
        what = f"{self}: {self._protocol}://"
        fsspec = need_package("fsspec", what, "remote")
        driver = _DRIVERS[self._protocol]
        need_package(driver, what, "remote" if driver in ("fsspec", "s3fs") else None)
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self._protocol == "s3":
            # one set of retries, ours: three nested ones would multiply
            wanted = {"connect_timeout": self.patience.timeout_s, "read_timeout": self.patience.timeout_s}
            own: Mapping[str, Any] = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            options["config_kwargs"] = {**wanted, "retries": {"total_max_attempts": 1}, **own}
        try:
            fs = fsspec.filesystem(self._protocol, **options)
        except ImportError as error:
            raise OptionError(f"{what}: {driver} cannot be used ({first_line(error)}). Install it again.") from error
        if self._protocol == "s3":
            fs.retries = 1
        return fs, fs._strip_protocol(self.url).rstrip("/")

    def _try(self, file: str, what: str, ask: Callable[[Any, str], _Found]) -> _Found:
        """Make a request, and again where that may help.

        Raises:
            StoreError: the last cause.
        """
        attempt = 1
        while True:
            try:
                return ask(*self._connect())
            except OptionError:
                raise
            except Exception as error:
                is_final = isinstance(error, _FINAL_ERRORS) or type(error).__name__ in _FINAL_NAMES
                if is_final or attempt == self.patience.attempts:
                    raise self._describe(file, what, error, attempt) from error
            time.sleep(self.patience.wait_s(attempt))
            if self._check is not None:
                self._check()
            attempt += 1

    def _describe(self, file: str, what: str, error: Exception, attempts: int) -> StoreError:
        cause = _mask(" ".join(str(error).split())) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            cause = "there is no such object or bucket"
        tried = f", after {attempts} attempts" if attempts > 1 else ""
        hint = "Look at the name and the permissions" if attempts == 1 else "Try again when the server answers"
        kept = " What was committed before stays readable." if what == "written" else ""
        label = self.label(file) if file else str(self)
        return StoreError(f"{label}: cannot be {what} ({cause}{tried}).{kept} {hint}.")


class _Pieces(io.RawIOBase):
    """Pieces of bytes as one file to be read, without joining them."""

    def __init__(self, pieces: "Sequence[bytes | memoryview]") -> None:
        self._pieces = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        self._length = sum(map(len, self._pieces))
        self._position = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: slice) -> bytes:
        start, stop, _ = where.indices(self._length)
        return b"".join(self._between(start, stop))

    def _between(self, start: int, stop: int) -> list[memoryview]:
        found, first = [], 0
        for piece in self._pieces:
            part = piece[max(0, start - first) : max(0, stop - first)]
            if len(part):
                found.append(part)
            first += len(piece)
        return found

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer).cast("B")
        filled = 0
        for part in self._between(self._position, min(self._length, self._position + len(room))):
            room[filled : filled + len(part)] = part
            filled += len(part)
        self._position += filled
        return filled


def _mask(text: str) -> str:
    """Take out of URLs what may be a secret: users, and queries with their signatures."""
    return _USER.sub(r"\1", _QUERY.sub(r"\1", text))
