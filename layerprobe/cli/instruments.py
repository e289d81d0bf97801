"""Commands that measure a model: profile.

They parse arguments and call the library, and compute nothing; `main` registers them.
"""

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli.arguments import Device, Model
from layerprobe.cli.outcomes import check_place, say_wrote
from layerprobe.errors import OptionError

__all__ = ["profile"]


def profile(
    model: Model,
    batch: Annotated[int, typer.Option(min=1, help="Texts in the batch.")] = 32,
    length: Annotated[int, typer.Option(min=1, help="Tokens per text, special tokens included.")] = 128,
    repeats: Annotated[
        int, typer.Option(min=1, help="Measured forward passes, alternating with as many bare ones.")
    ] = 10,
    patterns: Annotated[
        list[str] | None,
        typer.Option("--sites", "-s", metavar="PATTERN", help="Steps inside layers; repeatable. Default: all."),
    ] = None,
    by: Annotated[
        str, typer.Option(help="Rows of the table: layer, site, or place (a site over all layers).")
    ] = "layer",
    compare: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help="hidden_states: compare ways to read every layer."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers to a .json file.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="PICTURE", help="Write a .png, .svg or .pdf file with one bar per layer."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a torch profiler trace with ranges named by site.")
    ] = None,
    device: Device = None,
) -> None:
    """Measure what each layer of a model costs: time, operations, bytes, memory.

    Example: layerprobe profile demo --batch 8 --length 64 --by place
    """
    from layerprobe.analysis.figures import check_picture
    from layerprobe.analysis.results import give_json
    from layerprobe.cost.comparison import COMPARISONS
    from layerprobe.cost.comparison import compare as compare_ways
    from layerprobe.cost.results import BY
    from layerprobe.extract.network import make_random_batch
    from layerprobe.models import load_model
    from layerprobe.profile import profile as measure

    if by not in BY:
        raise OptionError(f"--by {by!r}: use {', '.join(BY)}.")
    if compare is not None and compare not in COMPARISONS:
        raise OptionError(f"--compare {compare!r}: use {', '.join(COMPARISONS)}.")
    for path in (json_file, trace):
        if path is not None:
            check_place(path)
    if out is not None:
        check_picture(out)
    loaded = load_model(model, device)
    given = make_random_batch(loaded, batch, length)
    found = measure(loaded, given, repeats=repeats, sites=patterns)
    typer.echo(found.table(by))
    compared = None if compare is None else compare_ways(loaded, given, compare, repeats=repeats)
    if compared is not None:
        typer.echo(f"\n{compared}")
    if json_file is not None:
        give_json(found.describe() | ({} if compared is None else {"compare": compared.describe()}), json_file)
    if out is not None:
        found.plot(out)
    if trace is not None:
        found.to_chrome_trace(trace)
    say_wrote(json_file, out, trace)
