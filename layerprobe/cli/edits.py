"""Commands that change what a model computes: patch.

Parse and call; compute nothing. `main` gives each its name and place.
"""

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.errors import OptionError

__all__ = ["patch"]


def patch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id or a folder of a model that fills masks.")],
    clean: Annotated[str, typer.Option(metavar="TEXT", help="The text with the right answer; one [MASK] in it.")],
    corrupt: Annotated[str, typer.Option(metavar="TEXT", help="The same with other words, of as many tokens.")],
    answer: Annotated[str, typer.Option(metavar="TOKEN", help="Whose logit at the mask is measured: one token.")],
    patterns: Annotated[
        list[str] | None, typer.Option("--sites", "-s", metavar="PATTERN", help="Sites to patch; repeat for several.")
    ] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="Patch heads one by one at all positions: layers.*.attention.context.")
    ] = False,
    method: Annotated[str, typer.Option(help="exact runs each patch, attribution estimates all by one gradient.")] = (
        "exact"
    ),
    batch_size: Annotated[int, typer.Option(min=1, help="Copies per forward.")] = 32,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="A .png, .svg or .pdf picture, .csv or .json; patch.png."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; CUDA if there is one.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Patch clean's values into corrupt one by one: which sites carry the answer, as a table and a picture.

    Example: layerprobe patch bert-base-uncased --clean 'Rome is in [MASK].' --corrupt 'Oslo is in [MASK].' \
        --answer italy
    """
    out = out or Path("patch.png")
    if out.suffix not in (".png", ".svg", ".pdf", ".csv", ".json"):
        raise OptionError(f"--out {str(out)!r}: no format {out.suffix!r}: use .png, .svg, .pdf, .csv or .json.")
    if not out.parent.is_dir():
        raise OptionError(f"--out {str(out)!r}: the folder {str(out.parent)!r} does not exist. Make it first.")
    from layerprobe.edit.masked import patch_masked
    from layerprobe.models import load_model

    found = patch_masked(
        load_model(model, device),
        clean,
        corrupt,
        answer,
        patterns or ("layers.*.attention.context" if heads else ["embeddings", "layers.*"]),
        positions=not heads,
        heads=heads,
        method=method,
        batch_size=batch_size,
        progress=False if quiet else None,
    )
    if not quiet:
        typer.echo(str(found))
    writers = {".csv": found.to_csv, ".json": found.to_json}
    writers.get(out.suffix, found.plot)(out)
    if not quiet:
        typer.echo(f"written to {out}")
