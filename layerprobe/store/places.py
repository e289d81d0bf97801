"""Where a store lies: a local folder, or a prefix of an object store.

A store is a flat set of files, each written whole or not at all. Those who write and read one are handed a `Place` and
do not ask which kind it is, but for the few things that only a folder has: files to map, locks, free space.

Must never know what is in a file.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from layerprobe.errors import FormatError, OptionError, StoreError, telling_refusals
from layerprobe.store.durable import commit_file, is_direct_better, make_folder
from layerprobe.store.guard import NO_LINKS, brief, exists_inside, open_inside
from layerprobe.store.paths import NamedPath
from layerprobe.store.remote import RemotePlace, is_url

__all__ = ["LocalPlace", "Place", "Placed", "find_place", "find_store", "names_place", "need_folder"]


class Place(Protocol):
    """Where a store lies. `str(place)` names it in messages, without secrets."""

    @property
    def folder(self) -> NamedPath | None:
        """The local folder; None elsewhere."""
        ...

    def label(self, file: str) -> str:
        """Name a file in messages."""
        ...

    def list_files(self, folder: str = "") -> list[str]:
        """List the names of what lies in the place or in a folder of it; empty where that does not exist."""
        ...

    def list_sizes(self) -> dict[str, int]:
        """List the names and bytes of the files in the place; empty where it does not exist."""
        ...

    def exists(self, file: str) -> bool:
        """Whether a file is there."""
        ...

    def size(self, file: str) -> int:
        """Bytes of a file. Raises StoreError where it is not there."""
        ...

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Read a run of bytes that lies inside the file. Raises StoreError."""
        ...

    def commit(self, file: str, pieces: "Sequence[bytes | memoryview]") -> None:
        """Write a file whole or not at all, and permanently. Raises StoreError."""
        ...

    def remove(self, file: str) -> None:
        """Remove a file if it is there. Raises StoreError."""
        ...

    def checked_by(self, check: Callable[[], None]) -> "Place":
        """Give the same place for someone who may come to wait no longer: `check` raises where nobody does."""
        ...

    def tried(self) -> "Place":
        """Try how large files are best written here, and give the place that writes them so."""
        ...


@runtime_checkable
class Placed(Protocol):
    """What lies in a place, as an open store does."""

    @property
    def place(self) -> Place:
        """Where it lies."""
        ...


@dataclass(frozen=True)
class LocalPlace:
    """A folder of this machine.

    Args:
        folder: Need not exist yet.
        is_direct: Whether large files go past the page cache, where the file system lets them.
    """

    folder: NamedPath
    is_direct: bool = field(default=True, compare=False)

    def __str__(self) -> str:
        return str(self.folder)

    def label(self, file: str) -> str:
        return str(self.folder / file)

    def list_files(self, folder: str = "") -> list[str]:
        path = self.folder / folder
        if folder and os.path.islink(path):
            raise FormatError(f"{path}: is a link. {NO_LINKS}")
        with telling_refusals(path, "read"):
            try:
                return os.listdir(path)
            except FileNotFoundError:
                return []

    def list_sizes(self) -> dict[str, int]:
        sizes = {}
        for name in self.list_files():
            with contextlib.suppress(FileNotFoundError):  # a run goes on meanwhile
                said = os.lstat(self.folder / name)
                if stat.S_ISREG(said.st_mode):
                    sizes[name] = said.st_size
        return sizes

    def exists(self, file: str) -> bool:
        return exists_inside(self.folder, file)

    def size(self, file: str) -> int:
        with telling_refusals(self.folder / file, "read"):
            return os.lstat(self.folder / file).st_size

    def read(self, file: str, start: int, stop: int) -> bytes:
        with telling_refusals(self.folder / file, "read"), open_inside(self.folder, file) as opened:
            opened.seek(start)
            data = opened.read(stop - start)
        if len(data) != stop - start:
            raise StoreError(f"{self.folder / file}: cannot be read (it ends at {start + len(data)}, before {stop}).")
        return data

    def commit(self, file: str, pieces: "Sequence[bytes | memoryview]") -> None:
        path = self.folder / file
        if path.parent != self.folder:
            make_folder(path.parent.path)
        commit_file(path, pieces, self.is_direct)

    def remove(self, file: str) -> None:
        with telling_refusals(self.folder / file, "removed"):
            (self.folder / file).path.unlink(missing_ok=True)

    def checked_by(self, check: Callable[[], None]) -> "LocalPlace":
        return self

    def tried(self) -> "LocalPlace":
        return replace(self, is_direct=is_direct_better(self.folder.path))


def names_place(where: object) -> bool:
    """Whether a value is a path or a URL, or a place itself."""
    is_place = not isinstance(where, type) and all(hasattr(where, name) for name in ("label", "list_files", "commit"))
    return is_place or isinstance(where, (str, Path, NamedPath))


def find_place(where: "str | Path | NamedPath | Place") -> Place:
    """Find the place that a path or a URL names; a place is itself.

    Raises:
        OptionError: it names none, stores do not lie under such a URL, or what it takes is not installed.
        StoreError: it is relative to a working folder that is gone.
    """
    # an empty text, which a shell makes of what is not set, would be the folder of the program
    if where == "" or not names_place(where):
        raise OptionError(f"{brief(repr(where))} names no store: give a path, or a URL such as s3://bucket/acts.")
    if not isinstance(where, (str, Path, NamedPath)):
        return where
    if is_url(where):
        return RemotePlace(str(where))
    try:
        return LocalPlace(NamedPath.of(where))
    except OSError as error:
        raise StoreError(f"{where}: the working folder is gone. Give an absolute path.") from error


def find_store(where: "str | Path | NamedPath | Place | Placed") -> Place:
    """Find where a store lies that is open, or that a path or a URL names; raises as `find_place` does."""
    return find_place(where.place if isinstance(where, Placed) else where)


def need_folder(place: Place) -> NamedPath:
    """Give the folder of a place, for what only a folder can do.

    Raises:
        StoreError: it has none.
    """
    if place.folder is None:
        raise StoreError(f"{place}: is not a folder of this machine. Copy the store into one for this.")
    return place.folder
