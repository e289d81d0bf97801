"""The command line: parses, calls, prints.

Every command is a thin door to a function of the library. An error is one line on stderr and exit code 2, Ctrl-C exit
code 130. Computes nothing.
"""

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli.views import describe_example, describe_store
from layerprobe.errors import LayerProbeError, OptionError
from layerprobe.version import __version__

__all__ = ["app", "main"]

_MODEL_HELP = "A hub id, a folder, or 'demo' (real MiniLM weights from the demo extra)."
_SITES_HELP = "A site pattern such as 'layers.*', 'layers.-4:' or 'layers.0,5.ffn.act'; repeat for several."
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\Z")
_POWERS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4}

app = typer.Typer(
    name="layerprobe",
    help="Take activations out of Hugging Face encoder models, read them back, understand them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # plain text: no boxes, no colours, nothing that a log or a pipe would have to strip
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
Sites = Annotated[list[str] | None, typer.Option("--sites", "-s", metavar="PATTERN", help=_SITES_HELP)]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A store.")]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,
) -> None:
    if version:
        typer.echo(f"layerprobe {__version__}")
        raise typer.Exit


@app.command()
def sites(model: Model, patterns: Sites = None) -> None:
    """List the sites of a model: name, module, kind, width.

    Example: layerprobe sites demo --sites 'layers.0.*.*'
    """
    from layerprobe.models import load_model
    from layerprobe.sites.resolve import sites as list_sites

    typer.echo(str(list_sites(load_model(model, "cpu").model, patterns)))


@app.command(short_help="Extract sites for every text into a store.")
def extract(
    model: Model,
    texts: Annotated[
        str,
        typer.Argument(
            metavar="INPUT", help="A .txt (a text per line), .jsonl, .csv or .parquet file, a folder of them, or '-'."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the store.")],
    patterns: Sites = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16, bfloat16, float8_e4m3fn or int8; the model's own if not given."),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(help="cls, mean, max or last: one vector per text, over all real tokens, special ones included."),
    ] = None,
    field: Annotated[str, typer.Option(help="Field of a record that holds the text.")] = "text",
    max_length: Annotated[
        int | None, typer.Option(help="Longest text in tokens; the model's limit if not given.")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Padded tokens per batch; 1024 on a CPU.")] = None,
    shard_size: Annotated[str, typer.Option(help="What a shard should hold: 64MB, 1GiB.")] = "128MiB",
    nonfinite: Annotated[
        str, typer.Option(help="warn or error at values that are not finite or overflow the dtype.")
    ] = "warn",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; CUDA if there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run in DIR.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Extract sites for every text into a store; the same command again goes on where it was stopped.

    Example: layerprobe extract demo texts.txt -o acts --dtype float16
    """
    from layerprobe.extract.plan import DEFAULT_SITES, ExtractOptions, plan_extraction
    from layerprobe.extract.run import run_extraction

    options = ExtractOptions(
        sites=patterns or DEFAULT_SITES,
        dtype=dtype,
        pool=pool,
        field=field,
        max_length=max_length,
        batch_tokens=batch_tokens,
        shard_bytes=_parse_size(shard_size),
        nonfinite=nonfinite,
    )
    plan = plan_extraction(model, texts, out, options, device=device, overwrite=overwrite)
    if not quiet:
        typer.echo(str(plan))
    if dry_run:
        return
    try:
        report = run_extraction(plan, progress=not quiet)
    except KeyboardInterrupt:
        typer.echo(f"stopped: whole shards are kept in {out}. Run the same command again to go on.", err=True)
        raise
    if not quiet:
        typer.echo(str(report))
    elif report.nonfinite:
        typer.echo(str(report), err=True)


@app.command()
def info(folder: Folder) -> None:
    """Say what a store holds.

    Example: layerprobe info acts
    """
    from layerprobe.store.reader import open_store

    typer.echo(describe_store(open_store(folder)))


# -1 is an example, not an option
@app.command(context_settings={"ignore_unknown_options": True})
def show(
    folder: Folder,
    example: Annotated[int, typer.Argument(metavar="EXAMPLE", help="Its ordinal; negative ones count from the last.")],
) -> None:
    """Print an example's tokens and the norm of each site.

    Example: layerprobe show acts 17
    """
    from layerprobe.store.reader import open_store

    typer.echo(describe_example(open_store(folder).example(example)))


def _parse_size(text: str) -> int:
    match = _SIZE.match(text.strip())
    if not match:
        raise OptionError(f"no size {text!r}: write a number and a unit, such as 64MB or 1GiB.")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[unit])


def main() -> None:
    """Run the command line and turn errors into exit codes."""
    # tokenizers would warn of every fork after its first use
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # --debug counts wherever it stands
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        status = app(arguments or ["--help"], prog_name="layerprobe", standalone_mode=False)
    except LayerProbeError as error:
        if "--debug" in sys.argv[1:]:
            raise
        print(f"layerprobe: {' '.join(str(error).splitlines())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        status = _report_usage(error)
    sys.exit(status)


def _report_usage(error: Exception) -> int:
    """Print a mistake in the command itself in one line; anything else is a bug and shows its traceback."""
    if type(error).__name__ == "Abort":
        return 130
    if not hasattr(error, "format_message"):
        raise error
    message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    print(f"layerprobe: {message}. Try 'layerprobe --help'.", file=sys.stderr)
    return 2
