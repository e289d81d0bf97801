"""Shared by commands: refusing options that conflict, and printing and writing a result.

The suffix of a file name selects the format of a result; its table and the names of written files are printed. Names
are checked before anything is computed. Must never know which result it is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from layerprobe.errors import OptionError, StoreError

__all__ = ["check_out", "check_place", "conclude", "refuse_given", "say_wrote"]

_PICTURES = (".png", ".svg", ".pdf")
_TEXTS = (".csv", ".json")


def check_out(
    out: str | None,
    suffixes: Sequence[str] = (*_TEXTS, *_PICTURES),
    *,
    json: str | None = None,
    save: str | None = None,
) -> None:
    """Check that a result can be written to a file, to a JSON file, and saved to a folder.

    Raises:
        OptionError: the suffix is not supported, or the file would lie in a store.
        StoreError: a folder does not exist, a file has the name of a folder, or a folder has the name of a file.
    """
    if json is not None:
        check_place(json)
    if save is not None:
        from layerprobe.store.format import check_keepable

        check_keepable(Path(save))
    if out is None:
        return
    path = Path(out)
    if path.suffix.lower() not in suffixes:
        raise OptionError(f"--out {out}: {path.suffix or 'no suffix'!r} is not {', '.join(suffixes)}.")
    check_place(out)
    if path.suffix.lower() in _PICTURES:
        from layerprobe.analysis.figures import check_picture

        check_picture(path)


def refuse_given(given: Mapping[str, object], why: str) -> None:
    """Refuse options that would be ignored.

    Args:
        given: The value of each option by its name; None or False if it is not given.
        why: End of the error message, after the names: why they have no effect here, and what to do.

    Raises:
        OptionError: one or more are given.
    """
    useless = [name for name, value in given.items() if value is not None and value is not False]
    if useless:
        raise OptionError(f"{', '.join(useless)} {why}")


def check_place(name: str | Path) -> None:
    """Check that a file can be written to a path.

    Raises:
        OptionError: it would lie in a store.
        StoreError: its folder does not exist, or the path is a folder.
    """
    from layerprobe.store.format import need_parent

    need_parent(Path(name))
    if Path(name).is_dir():
        raise StoreError(f"{name}: is a folder. Choose the name of a file.")


def conclude(
    found: Any, out: str | None, *, json: str | None = None, kept: str | None = None, more: str = "", quiet: bool
) -> None:
    """Print the table of a result, write its files, and print their names.

    Args:
        found: A result with `table` and `to_json`, and with `to_csv` and `plot` if `out` may select them.
        out: File for the result, as checked by `check_out`.
        json: File for the whole result as JSON.
        kept: A path that was written before.
        more: Text to print below the table.
        quiet: Whether to print nothing.
    """
    # before anything that may fail, such as drawing a picture
    if not quiet:
        typer.echo(found.table())
        if more:
            typer.echo(f"\n{more}")
    if json is not None:
        found.to_json(json)
    if out is not None:
        suffix = Path(out).suffix.lower()
        write = found.to_csv if suffix == ".csv" else found.to_json if suffix == ".json" else found.plot
        write(out)
    say_wrote(kept, json, out, quiet=quiet)


def say_wrote(*paths: str | Path | None, quiet: bool = False) -> None:
    """Print the names of the files that were written, one per line; None is skipped."""
    for path in paths:
        if path is not None and not quiet:
            typer.echo(f"wrote {path}")
