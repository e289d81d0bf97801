"""A path with two faces: where it is, from wherever the program goes, and what its user calls it.

A program may change its working folder while a store is open; what was opened by a relative path stays where it was.
Messages keep the path that was given, which is short. A `NamedPath` is opened like any path, and written like a text.

Must never know what lies under a path.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["NamedPath"]


@dataclass(frozen=True)
class NamedPath(os.PathLike[str]):
    """A path that the working folder does not move.

    Args:
        path: Where it is; absolute.
        said: What messages call it.
    """

    path: Path
    said: Path = field(compare=False)

    @classmethod
    def of(cls, given: "str | Path | NamedPath") -> "NamedPath":
        """Hold on to where a path leads now.

        Raises:
            OSError: it is relative, and the working folder is gone.
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
        """Of the file or folder itself."""
        return self.path.name

    @property
    def parent(self) -> "NamedPath":
        """The folder that it lies in."""
        return NamedPath(self.path.parent, self.said.parent)

    def with_name(self, name: str) -> "NamedPath":
        """Give another file of the same folder."""
        return self.parent / name
