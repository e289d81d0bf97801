"""A store under a URL: list objects, read byte ranges and write each object with one PUT, through fsspec.

A request that fails for a possibly transient reason (a server's 5xx, a timeout, a truncated body) is retried a bounded
number of times with exponential backoff. Then it raises a `StoreError` with the URL and the last cause.

Hides fsspec and its drivers. Must never know what is in an object, and never reveal a secret.
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

# Drivers that write an object atomically, which commits rely on.
_DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "memory": "fsspec"}
# Errors that a retry cannot fix.
_FINAL_ERRORS = (
    FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError, TypeError, AttributeError,
    NotImplementedError, ImportError,
)  # fmt: skip
# The same by class name, so that no driver need be imported.
_FINAL_NAMES = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "NoSuchBucket",
    "OfflineModeIsEnabled",
)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
# Size limit of one object in a single PUT to S3.
_MOST_PUT_BYTES = 5 << 30
_QUERY = re.compile(r"(\w+://[^\s?'\"]+)\?[^\s'\"]+")
_USER = re.compile(r"(\w+://)[^\s/@'\"]+@")


def is_url(where: object) -> bool:
    """Return whether a value is a URL rather than a path."""
    return _URL.match(str(where)) is not None


@dataclass(frozen=True)
class Patience:
    """How often and how long a request is retried.

    Args:
        attempts: Number of attempts in all.
        first_wait_s: Seconds before the second attempt. Each further wait doubles, and up to half of it is random, so
            that many readers do not retry at once.
        longest_wait_s: Upper bound on a wait, in seconds.
        timeout_s: Seconds that a server may stay silent.
    """

    attempts: int = 6
    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.first_wait_s, self.longest_wait_s) < 0 or self.timeout_s <= 0:
            raise OptionError(f"{self}: ask for at least one attempt, waits of 0 or more, and a time-out above 0.")

    def wait_s(self, attempt: int) -> float:
        """Return the seconds to wait after this many failed attempts."""
        longest = min(self.longest_wait_s, self.first_wait_s * 2 ** (attempt - 1))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, hides nothing


class RemotePlace:
    """A place for a store under `s3://`, `gs://`, `hf://` or `memory://`.

    The driver finds keys, tokens and endpoints itself: in the environment, its own files or fsspec's configuration.
    Picklable; a forked process opens its own connections.

    Args:
        url: URL of the store: bucket and prefix.
        patience: How often and how long a request is retried.

    Raises:
        OptionError: the URL names no store, its scheme is not supported, or a package for it is not installed.
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
        """Return the same place, sharing its connection, whose retries can be cancelled.

        Args:
            check: Called before a request is retried; raises if nobody waits for it any more. Not pickled.
        """
        # not `copy`, which uses `__reduce__` and would connect anew
        checked = object.__new__(type(self))
        checked.__dict__ = {**self.__dict__, "_check": check}
        return checked

    def tried(self) -> "RemotePlace":
        """Return the place itself: there is only one way to write an object."""
        return self

    def __str__(self) -> str:
        return _mask(self.url)

    def label(self, file: str) -> str:
        """Return the name of a file for messages."""
        return f"{self}/{file}"

    def list_files(self, folder: str = "") -> list[str]:
        """List the names directly in the place, or in a folder of it."""
        return [name for name, _ in self._list(folder)]

    def list_sizes(self) -> dict[str, int]:
        """Return the sizes in bytes of the files in the place, by name."""
        return {name: int(entry["size"]) for name, entry in self._list("") if entry["type"] == "file"}

    def _list(self, folder: str) -> list[tuple[str, dict[str, Any]]]:
        def ask(fs: Any, root: str) -> list[tuple[str, dict[str, Any]]]:
            path = f"{root}/{folder}".rstrip("/")
            try:
                found = fs.ls(path, detail=True)
            except FileNotFoundError:
                return []
            named = [(str(entry["name"]).rstrip("/"), entry) for entry in found]
            # some tools create an object for a folder, which then lists itself
            return [(name.rsplit("/", 1)[-1], entry) for name, entry in named if name.strip("/") != path.strip("/")]

        return self._try(folder, "read", ask)

    def exists(self, file: str) -> bool:
        """Return whether a file exists."""

        def ask(fs: Any, root: str) -> bool:
            try:
                return fs.info(f"{root}/{file}")["type"] == "file"
            except FileNotFoundError:
                return False

        return self._try(file, "read", ask)

    def size(self, file: str) -> int:
        """Return the size of a file in bytes."""
        return self._try(file, "read", lambda fs, root: int(fs.info(f"{root}/{file}")["size"]))

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Read a byte range, which must lie inside the file.

        Raises:
            StoreError: the file does not exist, or the server did not return the bytes.
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
        """Write an object atomically, in one PUT, replacing an older one.

        Raises:
            StoreError: it could not be written; an older object is unchanged.

        Cost: `s3://` streams from the pieces; other drivers need one copy of them. S3 objects of 5 GiB or more use a
        multipart upload, which becomes an object once its last part has arrived.
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
        """Remove a file if it exists."""

        def ask(fs: Any, root: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(f"{root}/{file}")

        self._try(file, "removed", ask)

    def _connect(self) -> tuple[Any, str]:
        """Return the driver and the store's path for it; a forked process creates its own driver."""
        # no lock, which a fork could leave locked for ever; if two threads both create a driver, no harm is done
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
            # retry only here: nested retries would multiply
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
        """Make a request, and retry it while that may help.

        Raises:
            StoreError: the request failed; gives the last cause.
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
    """A readable file over several byte buffers, without joining them."""

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
    """Remove possible secrets from URLs: user info, and queries with their signatures."""
    return _USER.sub(r"\1", _QUERY.sub(r"\1", text))
