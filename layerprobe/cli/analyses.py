"""Commands that analyse a store: diff, plot, check, report.

They parse arguments and call the library, and compute nothing; `main` registers them.
"""

from typing import Annotated

import typer

from layerprobe.cli.arguments import Json, Quiet, Seed, StoredSites, Table, Vector, Where
from layerprobe.cli.outcomes import check_out, conclude, refuse_given
from layerprobe.errors import OptionError

__all__ = ["check", "diff", "plot", "report"]

MaxRows = Annotated[
    int | None, typer.Option(metavar="ROWS", help="Approximate number of rows to draw at random. Default: all.")
]


def diff(
    folder: Where,
    out: Table = None,
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs", help="Compare every pair of sites, not only adjacent ones.")
    ] = False,
    patterns: StoredSites = None,
    cosine: Annotated[str, typer.Option(help="Cosine of raw, centred or zscored rows.")] = "raw",
    max_rows: MaxRows = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Measure how far rows move from layer to layer, and the geometry of each layer.

    Example: layerprobe diff acts -o acts.csv
    """
    from layerprobe.analysis.differences import differences

    check_out(out)
    found = differences(
        folder,
        sites=patterns,
        pairs="all" if all_pairs else "adjacent",
        cosine=cosine,
        max_rows=max_rows,
        seed=seed,
        progress=False if quiet else None,
    )
    conclude(found, out, quiet=quiet)


def check(
    folder: Where,
    json: Json = None,
    out: Table = None,
    patterns: StoredSites = None,
    max_rows: MaxRows = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Find what would distort cosine similarities in a store.

    Reports constant, outlying and rogue dimensions, and rows that are not finite.

    The exit code is 1 if a row is not finite or a site is constant.

    Example: layerprobe check acts
    """
    from layerprobe.analysis.check import check as check_store

    check_out(out, json=json)
    found = check_store(folder, sites=patterns, max_rows=max_rows, seed=seed, progress=False if quiet else None)
    conclude(found, out, json=json, quiet=quiet)
    if not found.is_sound:
        raise typer.Exit(1)


def plot(
    folder: Where,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Write a .png, .svg or .pdf file.")],
    patterns: StoredSites = None,
    color: Annotated[
        str | None,
        typer.Option(help="Colour by token, position, norm, or a record field. Default: label, if there is one."),
    ] = None,
    method: Annotated[str, typer.Option(help="Projection: pca, tsne or umap.")] = "pca",
    points: Annotated[
        str | None, typer.Option(help="Plot rows or examples. Default: whichever the colour belongs to.")
    ] = None,
    pool: Vector = None,
    shared: Annotated[bool, typer.Option("--shared", help="One PCA basis for all layers.")] = False,
    max_points: Annotated[
        int | None, typer.Option(help="Maximum number of points. Default: 10,000, or 2,000 for t-SNE.")
    ] = None,
    attention: Annotated[
        int | None, typer.Option(metavar="EXAMPLE", help="Draw the attention weights of this example, head by head.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed. Default: 0.")] = None,
    quiet: Quiet = False,
) -> None:
    """Draw each layer's points in two components, one panel per layer; or an example's attention, one panel per head.

    Example: layerprobe plot acts -o layers.png --color token
    """
    from layerprobe.report.attention import plot_attention
    from layerprobe.report.plots import plot as draw

    if attention is not None:
        given = {"--color": color, "--points": points, "--pool": pool, "--max-points": max_points, "--seed": seed}
        given |= {"--shared": shared, "--method": method != "pca"}
        refuse_given(given, "with --attention: a map of weights has no points. Leave it out.")
        if patterns is not None and len(patterns) > 1:
            raise OptionError(f"--attention with {len(patterns)} sites: one picture holds the heads of one. Name one.")
        plot_attention(folder, attention, out, site=patterns[0] if patterns else None)
    else:
        picture = draw(
            folder,
            out,
            site=patterns or "layers.*",
            color=color,
            method=method,
            points=points,
            pool=pool,
            shared=shared,
            max_points=max_points,
            seed=seed or 0,
            progress=False if quiet else None,
        )
        if not quiet:
            typer.echo(picture.table())
    if not quiet:
        typer.echo(f"wrote {out}")


def report(
    folder: Where,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Write a .html file.")],
    patterns: StoredSites = None,
    labels: Annotated[str | None, typer.Option(metavar="FIELD", help="Record field with the labels.")] = None,
    points: Annotated[str, typer.Option(help="examples, or rows for one point per token.")] = "examples",
    pool: Vector = None,
    max_points: Annotated[int, typer.Option(help="Maximum number of points, drawn at random.")] = 10_000,
    max_rows: Annotated[
        int, typer.Option(metavar="ROWS", help="Approximate number of rows for the curves, drawn at random.")
    ] = 100_000,
    attention: Annotated[
        list[int] | None,
        typer.Option(metavar="EXAMPLE", help="Show the attention weights of this example; repeatable."),
    ] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Write a store as one self-contained page: points by layer, curves, heat maps, classes, attention.

    Example: layerprobe report acts -o report.html
    """
    from layerprobe.report.page import report as write

    page = write(
        folder,
        out,
        site=patterns,
        labels=labels,
        points=points,
        pool=pool,
        max_points=max_points,
        max_rows=max_rows,
        attention=attention,
        seed=seed,
        progress=False if quiet else None,
    )
    if not quiet:
        typer.echo(page.table())
