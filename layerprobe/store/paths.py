"""A path that keeps both its absolute location and the form in which the user gave it.

A program may change its working folder while a store is open; a store opened by a relative path must stay where it is.
Messages use the path as given, which is short. A `NamedPath` opens like any path and formats as the given one.

Must never know what lies under a path.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["NamedPath"]


@dataclass(frozen=True)
class NamedPath(os.PathLike[str]):
    """A path that does not depend on the working folder.

    Args:
        path: The absolute path.
        said: The path as given, for messages.
    """

    path: Path
    said: Path = field(compare=False)

    @classmethod
    def of(cls, given: "str | Path | NamedPath") -> "NamedPath":
        """Resolve a path against the current working folder.

        Raises:
            OSError: it is relative, and the working folder no longer exists.
        """
        return given if isinstance(given, NamedPath) else cls(Path(given).absolute(), Path(given))

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.said)

    def __truediv__(self, name: str) -> "NamedPath":
        return NamedPath(self.path / name, self.said / name)

    @property
    def name(self) -> str:
        """Name of the file or folder itself."""
        return self.path.name

    @property
    def parent(self) -> "NamedPath":
        """The folder that contains it."""
        return NamedPath(self.path.parent, self.said.parent)

    def with_name(self, name: str) -> "NamedPath":
        """Return the path of another file in the same folder."""
        return self.parent / name
