"""Commands that change what a model computes: patch.

They parse arguments and call the library, and compute nothing; `main` registers them.
"""

from typing import Annotated

import typer

from layerprobe.cli.arguments import Device, Quiet
from layerprobe.cli.outcomes import check_out, conclude

__all__ = ["patch"]


def patch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder of a masked language model.")],
    clean: Annotated[str, typer.Option(metavar="TEXT", help="The text with the right answer, with one [MASK].")],
    corrupt: Annotated[
        str, typer.Option(metavar="TEXT", help="The same text with other words and the same number of tokens.")
    ],
    answer: Annotated[str, typer.Option(metavar="TOKEN", help="The token whose logit at the mask is measured.")],
    patterns: Annotated[
        list[str] | None, typer.Option("--sites", "-s", metavar="PATTERN", help="Sites to patch; repeatable.")
    ] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="Patch single heads at all positions (layers.*.attention.context).")
    ] = False,
    method: Annotated[
        str, typer.Option(help="exact (run each patch) or attribution (estimate all from one gradient).")
    ] = "exact",
    batch_size: Annotated[int, typer.Option(min=1, help="Patched copies per forward pass.")] = 32,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="Write a .png, .svg, .pdf, .csv or .json file.")
    ] = "patch.png",
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Find the sites that carry the model's answer at [MASK].

    Patches values of the clean text into the corrupt one, one at a time. Prints a table and draws a picture.

    Example: layerprobe patch bert-base-uncased --clean 'Rome is in [MASK].' --corrupt 'Oslo is in [MASK].' \
        --answer italy
    """
    check_out(out)
    from layerprobe.edit.masked import patch_masked
    from layerprobe.models import load_model
    from layerprobe.sites.resolve import map_model

    loaded = load_model(model, device)
    default = ["layers.*.attention.context"] if heads else map_model(loaded.model).leave_out_missing()
    found = patch_masked(
        loaded,
        clean,
        corrupt,
        answer,
        patterns or default,
        positions=not heads,
        heads=heads,
        method=method,
        batch_size=batch_size,
        progress=False if quiet else None,
    )
    conclude(found, out, quiet=quiet)
