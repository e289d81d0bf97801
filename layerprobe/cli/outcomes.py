"""What commands share: refusing options that do not go together, and what they do with a result.

A result is written by the suffix of a name, its table printed, and what was written said. Names are checked before
anything is computed. Must never know which result it is.
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
    """Make sure that a result can be written under a name, beside it as JSON, and kept in a folder.

    Raises:
        OptionError: the suffix says nothing that is written here, or it would lie in a store.
        StoreError: a folder is not there, or a file is in the place of one.
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
    """Make sure that no option is given that would be ignored.

    Args:
        given: By each option's name its value; None or False where it is not given.
        why: Follows the names: why they are no use here, and what to do.

    Raises:
        OptionError: one or more are given.
    """
    useless = [name for name, value in given.items() if value is not None and value is not False]
    if useless:
        raise OptionError(f"{', '.join(useless)} {why}")


def check_place(name: str | Path) -> None:
    """Make sure that a file can be written under a name.

    Raises:
        OptionError: it would lie in a store.
        StoreError: its folder is not there, or it is a folder itself.
    """
    from layerprobe.store.format import need_parent

    need_parent(Path(name))
    if Path(name).is_dir():
        raise StoreError(f"{name}: is a folder. Choose the name of a file.")


def conclude(
    found: Any, out: str | None, *, json: str | None = None, kept: str | None = None, more: str = "", quiet: bool
) -> None:
    """Print the table of a result, write it, and say what was written.

    Args:
        found: Has `table`, `to_json`, and `to_csv` and `plot` where `out` may ask for them.
        out: As checked by `check_out`.
        json: Another file for all of it.
        kept: What was written before.
        more: Printed below the table.
        quiet: Whether to print nothing.
    """
    # before what can fail, a picture above all
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
    """Name the files that were written, a line each; None stands for one that was not asked for."""
    for path in paths:
        if path is not None and not quiet:
            typer.echo(f"wrote {path}")
