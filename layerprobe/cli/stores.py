"""Commands that inspect a store: info, show, status, verify.

They parse arguments and call the library, and compute nothing; `main` registers them.
"""

from contextlib import suppress
from typing import Annotated

import typer

from layerprobe.cli.arguments import Where
from layerprobe.errors import FormatError, MissingExample, OptionError

__all__ = ["info", "show", "status", "verify"]


def _parse_ordinal(text: str) -> int:
    """Parse an ordinal, which may begin with a dash like an option, such as -1."""
    try:
        return int(text)
    except ValueError as error:
        what = "neither an option nor a whole number" if text.startswith("-") else "no whole number"
        raise typer.BadParameter(f"{text!r} is {what}") from error


def info(folder: Where) -> None:
    """Show what a store holds.

    Example: layerprobe info acts
    """
    from layerprobe.cli.views import describe_store
    from layerprobe.store.reader import open_store

    typer.echo(describe_store(open_store(folder)))


def show(
    folder: Where,
    example: Annotated[
        int,
        typer.Argument(
            metavar="EXAMPLE",
            parser=_parse_ordinal,
            help="Ordinal of the example; negative numbers count from the end.",
        ),
    ],
) -> None:
    """Print an example's tokens and the norm of each site.

    Example: layerprobe show acts 17
    """
    from layerprobe.cli.views import describe_example
    from layerprobe.store.reader import open_store

    typer.echo(describe_example(open_store(folder).example(example)))


def status(folder: Where) -> None:
    """Show the progress of a run without disturbing it.

    Prints rates, time left, time until the disk is full, and whether its process is alive.

    Example: layerprobe status acts
    """
    from layerprobe.cli.views import describe_status
    from layerprobe.store.progress import read_status

    typer.echo(describe_status(read_status(folder)))


def verify(
    folder: Where,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged files; run the same extraction again to recompute them.")
    ] = False,
    recompute: Annotated[
        int | None, typer.Option(metavar="N", help="Run N random examples through the model again and compare.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model for --recompute. Default: the one that the store names."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed for --recompute. Default: 0.")] = None,
    device: Annotated[str | None, typer.Option(help="Device for --recompute: cpu, cuda or cuda:1.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")] = False,
) -> None:
    """Read every byte of a store and compare it with what was written; exit code 1 if anything is wrong.

    Example: layerprobe verify acts --recompute 16
    """
    from layerprobe.store.verify import verify as verify_store

    if recompute is None and any(value is not None for value in (model, device, seed)):
        raise OptionError("--model, --device and --seed say what --recompute N runs: pass that too.")
    if recompute is not None and recompute < 1:
        raise OptionError(f"--recompute is {recompute}: it must be at least 1.")
    progress = False if quiet else None
    audit = None
    if recompute is not None:
        from layerprobe.extract.audit import plan_audit

        # planned first, so that its errors come before hours of reading; damage is left to the report, which says more
        with suppress(FormatError, MissingExample):
            audit = plan_audit(folder, model, recompute, seed or 0, device=device)
    report = verify_store(folder, repair, progress)
    typer.echo(str(report))
    if not report.ok:
        if recompute is not None:
            after = "run the extraction first, then this again without --repair" if repair else "repair it first"
            typer.echo(f"no example was run again: the store is damaged, {after}")
        raise typer.Exit(1)
    if recompute is not None:
        from layerprobe.extract.audit import plan_audit

        audited = (audit or plan_audit(folder, model, recompute, seed or 0, device=device)).run(progress)
        typer.echo(str(audited))
        if not audited.ok:
            raise typer.Exit(1)
