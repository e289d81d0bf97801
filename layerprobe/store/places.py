"""The location of a store: a local folder, or a prefix in an object store.

A store is a flat set of files, each written atomically. Writers and readers are given a `Place` and need not know which
kind it is, except for what only a folder has: files to map, locks, free space.

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
    """The location of a store. `str(place)` names it in messages, without secrets."""

    @property
    def folder(self) -> NamedPath | None:
        """The local folder; None for a remote place."""
        ...

    def label(self, file: str) -> str:
        """Return the name of a file for messages."""
        ...

    def list_files(self, folder: str = "") -> list[str]:
        """List the names in the place, or in a folder of it; empty if that does not exist."""
        ...

    def list_sizes(self) -> dict[str, int]:
        """Return the sizes in bytes of the files in the place, by name; empty if it does not exist."""
        ...

    def exists(self, file: str) -> bool:
        """Return whether a file exists."""
        ...

    def size(self, file: str) -> int:
        """Return the size of a file in bytes. Raises StoreError if it does not exist."""
        ...

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Read a byte range that lies inside the file. Raises StoreError."""
        ...

    def commit(self, file: str, pieces: "Sequence[bytes | memoryview]") -> None:
        """Write a file atomically and durably. Raises StoreError."""
        ...

    def remove(self, file: str) -> None:
        """Remove a file if it exists. Raises StoreError."""
        ...

    def checked_by(self, check: Callable[[], None]) -> "Place":
        """Return the same place, whose retries can be cancelled: `check` raises when nobody waits any more."""
        ...

    def tried(self) -> "Place":
        """Measure how large files are best written here, and return the place that writes them that way."""
        ...


@runtime_checkable
class Placed(Protocol):
    """An object with a place, such as an open store."""

    @property
    def place(self) -> Place:
        """Its location."""
        ...


@dataclass(frozen=True)
class LocalPlace:
    """A local folder.

    Args:
        folder: The folder; need not exist yet.
        is_direct: Whether to write large files with direct I/O, if the file system supports it.
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
            with contextlib.suppress(FileNotFoundError):  # an active run may remove files meanwhile
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
    """Return whether a value is a path, a URL or a place."""
    is_place = not isinstance(where, type) and all(hasattr(where, name) for name in ("label", "list_files", "commit"))
    return is_place or isinstance(where, (str, Path, NamedPath))


def find_place(where: "str | Path | NamedPath | Place") -> Place:
    """Return the place that a path or a URL names; a place is returned as it is.

    Raises:
        OptionError: the value names no place, the URL scheme is not supported, or a package for it is not installed.
        StoreError: the path is relative, and the working folder no longer exists.
    """
    # an empty string, such as from an unset shell variable, would mean the working folder
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
    """Return the place of an open store, or of one named by a path or a URL; raises as `find_place` does."""
    return find_place(where.place if isinstance(where, Placed) else where)


def need_folder(place: Place) -> NamedPath:
    """Return the local folder of a place.

    Raises:
        StoreError: the place is remote.
    """
    if place.folder is None:
        raise StoreError(f"{place}: is not a folder of this machine. Copy the store into one for this.")
    return place.folder
