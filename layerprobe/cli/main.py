"""The command line interface of the library.

An error prints one line on stderr and gives exit code 2; Ctrl-C gives 130, SIGTERM 143. Computes nothing; the commands
are in the other files of this folder.
"""

import os
import sys
import traceback
from contextlib import suppress
from typing import Annotated

import typer

from layerprobe.cli import analyses, classifiers, edits, exports, generations, instruments, runs, stats, stores
from layerprobe.errors import LayerProbeError, first_line
from layerprobe.telling import find_stderr
from layerprobe.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="layerprobe",
    help="Extract activations of Hugging Face encoder models, read them back and analyse them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # plain text without boxes and colours, which logs and pipes would have to strip
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,
) -> None:
    if version:
        typer.echo(f"layerprobe {__version__}")
        raise typer.Exit


app.command()(runs.sites)
app.command(short_help="Extract activations for every text into a store.")(runs.extract)
app.command()(stores.info)
app.command(short_help="Show the progress of a run.")(stores.status)
app.command(short_help="Check every byte of a store; repair it, or recompute examples.")(stores.verify)
# so that -1 is parsed as an ordinal, not as an option
app.command(context_settings={"ignore_unknown_options": True})(stores.show)
app.command(short_help="Write a store as one Parquet, Arrow, npz or Zarr file.")(exports.export)
app.command(short_help="Join stores that hold parts of the same plan.")(exports.merge)
app.command(short_help="Upload a complete store to the Hugging Face hub.")(exports.push)
app.command(short_help="Download a store from the Hugging Face hub.")(exports.pull)
app.command(short_help="Measure how far rows move from layer to layer.")(analyses.diff)
app.command(short_help="Draw each layer's points, or an example's attention.")(analyses.plot)
app.command(short_help="Write a store as one self-contained page.")(analyses.report)
app.command(short_help="Find what would distort cosine similarities in a store.")(analyses.check)
app.command(short_help="Measure how well each layer separates classes.")(classifiers.classify)
app.command(short_help="Generate text from stored states of a layer.")(generations.generate)
app.command(short_help="Fit a small decoder to each layer, to measure what can be read from it.")(
    generations.fit_decoder
)
app.command(short_help="Show what the model would predict from each layer.")(generations.lens)
app.command(short_help="Find the sites that carry the model's answer at [MASK].")(edits.patch)
app.command(short_help="Measure what each layer of a model costs.")(instruments.profile)
app.command(short_help="Measure statistics of activations over all texts, without storing them.")(stats.stats)


def main() -> None:
    """Run the command line and turn errors into exit codes."""
    _open_missing()
    # if unset, tokenizers warns about every fork after its first use
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # --debug is accepted at any position
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        status = app(arguments or ["--help"], prog_name="layerprobe", standalone_mode=False)
    except LayerProbeError as error:
        status = _report(" ".join(str(error).splitlines()))
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        lost = _give_up_stdout() if isinstance(error, OSError) else None
        if lost is not None:
            status = _report(f"standard output: cannot be written ({lost.strerror or lost}).")
        elif _ran_out(error):
            status = _report(
                f"memory ran out ({first_line(error)}). Allow the process more, or ask it for fewer sites, smaller "
                "shards or smaller batches."
            )
        else:
            status = _report_usage(error)
    sys.exit(status)


def _report(text: str) -> int:
    """Print an error in one line, after its traceback with `--debug`; return the exit code."""
    if "--debug" in sys.argv[1:]:
        traceback.print_exc()
    print(f"layerprobe: {text}", file=find_stderr())
    return 2


def _open_missing() -> None:
    """Open missing standard streams, or files opened later would get their descriptors."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - as long as the process lives


def _give_up_stdout() -> OSError | None:
    """Return the error if standard output cannot be written, such as on a full disk, and redirect it to /dev/null."""
    try:
        print(flush=True)
    except OSError as error:
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        return error
    return None


def _ran_out(error: Exception) -> bool:
    """Return whether an error means that memory ran out, in Python or, if it is loaded, in torch."""
    if isinstance(error, MemoryError) or "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from layerprobe.extract.memory import ran_out

    return ran_out(error)


def _report_usage(error: Exception) -> int:
    """Print a usage error in one line; re-raise anything else, which is a bug, with its traceback."""
    if type(error).__name__ == "Abort":
        return 130
    if not hasattr(error, "format_message"):
        raise error
    message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    # the subcommand, as far as it was parsed
    command = getattr(getattr(error, "ctx", None), "command_path", "layerprobe")
    print(f"layerprobe: {message}. Try '{command} --help'.", file=sys.stderr)
    return 2
