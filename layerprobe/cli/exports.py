"""Commands that convert, join and transfer stores: export, merge, push, pull.

They parse arguments and call the library, and compute nothing; `main` registers them.
"""

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli.arguments import Quiet, Where

__all__ = ["export", "merge", "pull", "push"]

Hub = Annotated[str, typer.Argument(metavar="URL", help="hf://datasets/USER/NAME")]


def export(
    folder: Where,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="File to write; for zarr, a folder.")],
    to: Annotated[
        str | None,
        typer.Option("--to", help="Format: parquet, arrow, npz or zarr. Default: by the suffix of OUT, else parquet."),
    ] = None,
    patterns: Annotated[
        list[str] | None,
        typer.Option("--sites", "-s", metavar="PATTERN", help="Sites to export; repeatable. Default: all."),
    ] = None,
    rows: Annotated[str | None, typer.Option("--rows", help="One table row per: examples (default) or tokens.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a store as one Parquet, Arrow, npz or Zarr file.

    Example: layerprobe export acts --to parquet -o acts.parquet --sites 'layers.-1'
    """
    from layerprobe.store.export import export as export_store

    progress = False if quiet else None
    report = export_store(folder, out, to, sites=patterns, rows=rows, overwrite=overwrite, progress=progress)
    if not quiet:
        typer.echo(str(report))


def merge(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The joined store: new, or an existing one of the same plan.")
    ],
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Stores to join.")],
    link: Annotated[bool, typer.Option("--link", help="Hard-link shards instead of copying them.")] = False,
    quiet: Quiet = False,
) -> None:
    """Join stores that hold parts of the same plan. The exit code is 1 if parts are missing.

    Example: layerprobe merge acts machine-1/acts machine-2/acts
    """
    from layerprobe.store.merge import merge as merge_stores

    report = merge_stores(out, folders, link=link, progress=False if quiet else None)
    if not quiet:
        typer.echo(str(report))
    if not report.is_complete:
        raise typer.Exit(1)


def push(
    folder: Where,
    url: Hub,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is new.")] = False,
) -> None:
    """Upload a complete store to the Hugging Face hub, as the user logged in with 'hf auth login'.

    Example: layerprobe push acts hf://datasets/someone/acts
    """
    from layerprobe.store.hub import push as push_store

    typer.echo(str(push_store(folder, url, private=private)))


def pull(url: Hub, folder: Annotated[Path, typer.Argument(metavar="DIR", help="Target folder, new or empty.")]) -> None:
    """Download a store from the Hugging Face hub.

    Example: layerprobe pull hf://datasets/someone/acts acts
    """
    from layerprobe.store.hub import pull as pull_store

    typer.echo(str(pull_store(url, folder)))
