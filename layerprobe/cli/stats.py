"""The command that measures statistics of values without storing them: stats.

It parses arguments and calls the library, and computes nothing; `main` registers it.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from layerprobe.cli.allocator import keep_freed_memory
from layerprobe.cli.arguments import Device, Field, Model, Sites, Texts
from layerprobe.cli.outcomes import check_place, refuse_given, say_wrote
from layerprobe.collecting import keep_for_good
from layerprobe.errors import OptionError

__all__ = ["stats"]

# Options that apply to a single sink only.
_OWN = {"low": "histogram", "high": "histogram", "bins": "histogram", "k": "topk", "context": "topk", "units": "topk"}
_SINKS = ("moments", "covariance", "histogram", "topk", "cka")


def stats(
    model: Model,
    texts: Texts,
    patterns: Sites = None,
    sink: Annotated[str, typer.Option(help="Statistic: moments, covariance, histogram, topk or cka.")] = "moments",
    low: Annotated[float | None, typer.Option(help="histogram: lower edge of the first bin. Default: -10.")] = None,
    high: Annotated[float | None, typer.Option(help="histogram: upper edge of the last bin. Default: 10.")] = None,
    bins: Annotated[int | None, typer.Option(help="histogram: number of bins. Default: 200.")] = None,
    k: Annotated[int | None, typer.Option("--top", help="topk: tokens per unit. Default: 10.")] = None,
    context: Annotated[int | None, typer.Option(help="topk: tokens of context on either side. Default: 5.")] = None,
    units: Annotated[
        list[int] | None,
        typer.Option("--unit", help="topk: a unit to print; repeatable. Default: the three with the largest value."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the table as JSON.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Write every sum to a .safetensors file, for loading and merging."
        ),
    ] = None,
    field: Field = "text",
    max_length: Annotated[
        int | None, typer.Option(help="Truncate texts to this many tokens. Default: the model's limit.")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens per batch, padding included; 1024 on a CPU.")] = None,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress bar and no closing line.")] = False,
) -> None:
    """Measure statistics of activations over all texts, without storing them.

    Example: layerprobe stats demo texts.txt --sites 'layers.*'
    """
    from safetensors.torch import save

    from layerprobe.analysis.results import give_json
    from layerprobe.capture.statistics import format_said
    from layerprobe.capture.topk import TopK
    from layerprobe.extract.network import choose_sites
    from layerprobe.extract.options import ExtractOptions
    from layerprobe.extract.stream import stream_texts
    from layerprobe.models import load_model
    from layerprobe.sites.resolve import map_model
    from layerprobe.store.durable import commit_file

    own = {"low": low, "high": high, "bins": bins, "k": k, "context": context, "units": units}
    measuring = _make_sink(sink, {name: value for name, value in own.items() if value is not None})
    if out is not None and out.suffix != ".safetensors":
        raise OptionError(f"-o {str(out)!r}: {out.suffix or 'no suffix'!r} is not '.safetensors'.")
    for path in (json_file, out):
        if path is not None:
            check_place(path)
    options = ExtractOptions(sites=patterns or None, field=field, max_length=max_length, batch_tokens=batch_tokens)
    loaded = load_model(model, device)
    for site in choose_sites(map_model(loaded.model), options.sites):
        for unit in units or []:
            if site.width is not None and not -site.width <= unit < site.width:
                raise OptionError(f"--unit {unit}: {site.name!r} has {site.width}.")
    keep_freed_memory()
    keep_for_good()
    report = stream_texts(loaded, texts, measuring, options, progress=not quiet)
    said = measuring.list_tops(loaded.tokenizer, units) if isinstance(measuring, TopK) else measuring.summary()
    typer.echo(format_said(said) if isinstance(measuring, TopK) else str(measuring))
    if not quiet:
        typer.echo(f"\n{report}")
    if json_file is not None:
        told = {"examples": report.num_examples, "tokens": report.num_tokens, "truncated": report.num_truncated}
        document = {"model": model, "input": texts, "sink": sink, **told, "sites": said}
        give_json(document, json_file)
    if out is not None:
        commit_file(out, [save(measuring.state_dict())])
    say_wrote(json_file, out, quiet=quiet)


def _make_sink(name: str, own: dict[str, Any]) -> Any:
    from layerprobe.capture.covariances import Covariance, CrossCovariance
    from layerprobe.capture.summaries import Histogram, Moments
    from layerprobe.capture.topk import TopK

    if name not in _SINKS:
        raise OptionError(f"--sink {name!r}: use {', '.join(_SINKS)}.")
    for option, value in own.items():
        if _OWN[option] != name:
            flag = {"k": "top", "units": "unit"}.get(option, option)
            refuse_given({f"--{flag}": value}, f"goes with --sink {_OWN[option]}, not with {name}. Leave it out.")
    own.pop("units", None)
    makers = {
        "moments": Moments,
        "covariance": Covariance,
        "histogram": Histogram,
        "topk": TopK,
        "cka": CrossCovariance,
    }
    return makers[name](**own)
