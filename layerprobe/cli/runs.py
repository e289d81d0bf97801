"""Commands that run a model: sites, extract.

They parse arguments and call the library, and compute nothing; `main` registers them.
"""

import re
from decimal import Decimal
from typing import Annotated

import typer

from layerprobe.cli.allocator import keep_freed_memory
from layerprobe.cli.arguments import Device, Field, Model, Quiet, Sites, Texts
from layerprobe.cli.outcomes import refuse_given
from layerprobe.cli.signals import TERMINATED, Terminator, leaving_on_sigterm
from layerprobe.collecting import keep_for_good
from layerprobe.errors import OptionError, SpaceError

__all__ = ["extract", "sites"]

_PRECISION_HELP = (
    "Precision of the forward pass: float32, bfloat16, float16, or on CUDA tf32; or fp32, bf16, fp16. "
    "Default: the dtype of the weights."
)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\Z", re.IGNORECASE)
_COUNT = re.compile(r"\d+(?:_\d+)*(?:\.\d+)?(?:[eE]\+?\d{1,2})?\Z")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def sites(model: Model, patterns: Sites = None) -> None:
    """List the sites of a model: name, module, kind, width.

    Example: layerprobe sites demo --sites 'layers.0.*.*'
    """
    from layerprobe.models import load_model
    from layerprobe.sites.resolve import sites as list_sites

    typer.echo(str(list_sites(load_model(model, "cpu").model, patterns)))


def extract(
    model: Model,
    texts: Texts,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="DIR", help="Folder of the store, or a URL such as s3://bucket/acts.")
    ],
    patterns: Sites = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Stored dtype: float32, float16, bfloat16, float8_e4m3fn or int8. Default: the model's."),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            help="Store one vector per text: cls, mean, max or last, over all real tokens, special tokens included."
        ),
    ] = None,
    field: Field = "text",
    max_length: Annotated[
        int | None, typer.Option(help="Truncate texts to this many tokens. Default: the model's limit.")
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens per batch, padding included; a longer text gets its own batch. Long runs try larger ones by "
            "default."
        ),
    ] = None,
    padding_free: Annotated[
        bool | None,
        typer.Option(
            "--padding-free/--padding",
            help="Concatenate the texts of a batch, or pad them. Default: concatenate where possible.",
        ),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            help="Approximate size of a shard, such as 64MB; at most a million tokens. Default: 128MiB, on CUDA 1GiB."
        ),
    ] = None,
    nonfinite: Annotated[
        str, typer.Option(help="What to do if values are not finite or overflow the dtype: warn or error.")
    ] = "warn",
    keep: Annotated[
        float, typer.Option(help="Keep a random share of the rows, such as 0.05. The draw needs no seed.")
    ] = 1.0,
    tokens: Annotated[
        str,
        typer.Option(
            help="Keep the rows of these tokens: all, first, cls, special (also if typed in the text) or nonspecial."
        ),
    ] = "all",
    precision: Annotated[str | None, typer.Option(help=_PRECISION_HELP)] = None,
    compiles: Annotated[bool, typer.Option("--compile", help="Compile the model for the run.")] = False,
    replays: Annotated[
        bool,
        typer.Option("--cuda-graphs", help="Compile, and replay a CUDA graph for each of a few batch shapes."),
    ] = False,
    writers: Annotated[
        int, typer.Option(help="Shards written at once. Raise it if `stalled` shows that one writer is too slow.")
    ] = 1,
    device: Device = None,
    devices: Annotated[
        str | None, typer.Option(help="Use several devices, such as '0,1' or 'cpu,cpu': one process each, one store.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a different run in DIR; the same run is resumed.")
    ] = False,
    wait_for_space: Annotated[
        bool, typer.Option("--wait-for-space", help="On a full disk, wait for space instead of stopping.")
    ] = False,
    grace: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Time after SIGTERM to finish the current shard. Default: 30."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    price: Annotated[
        str | None,
        typer.Option(
            "--plan", metavar="N", help="Measure a sample, print what N texts (such as 1e9) would cost, and stop."
        ),
    ] = None,
    price_seconds: Annotated[
        float | None,
        typer.Option("--plan-seconds", metavar="SECONDS", help="Approximate duration of --plan. Default: 60."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Extract activations for every text into a store. Run the same command again to resume a stopped run.

    Example: layerprobe extract demo texts.txt -o acts --dtype float16
    """
    from layerprobe.extract.forward import CUDA_GRAPHS
    from layerprobe.extract.options import ExtractOptions
    from layerprobe.extract.plan import plan_extraction
    from layerprobe.extract.run import run_extraction

    options = ExtractOptions(
        sites=patterns or None,
        dtype=dtype,
        pool=pool,
        field=field,
        max_length=max_length,
        batch_tokens=batch_tokens,
        padding_free=padding_free,
        shard_bytes=None if shard_size is None else _parse_size(shard_size),
        nonfinite=nonfinite,
        keep=keep,
        tokens=tokens,
        precision=precision,
        compile=CUDA_GRAPHS if replays else compiles,
        writers=writers,
    )
    if price is None and price_seconds is not None:
        raise OptionError(f"--plan-seconds {price_seconds:g} without --plan: nothing is measured. Add --plan N.")
    keep_freed_memory()
    if price is not None:
        given = {
            "--dry-run": dry_run,
            "--overwrite": overwrite,
            "--wait-for-space": wait_for_space,
            "--grace": grace,
            "--quiet": quiet,
        }
        refuse_given(given, "with --plan: it prints a cost and writes no store. Leave it out.")
        if devices is not None:
            raise OptionError(f"--plan with --devices {devices}: one device is measured. Use --device.")
        from layerprobe.extract.pricing import price_extraction

        seconds = 60.0 if price_seconds is None else price_seconds
        with leaving_on_sigterm():
            typer.echo(str(price_extraction(model, texts, out, options, _parse_count(price), seconds, device=device)))
        return
    if out.startswith("memory://"):
        raise OptionError(f"-o {out}: that is this process's memory, gone when the command ends. Give a folder.")
    stopped = f"stopped: whole shards are kept in {out}. Run the same command again to go on."
    with Terminator(out, 30.0 if grace is None else grace) as terminator:
        plan = plan_extraction(
            model,
            texts,
            out,
            options,
            device=device,
            devices=devices,
            overwrite=overwrite,
            wait_for_space=wait_for_space,
        )
        if not quiet:
            typer.echo(str(plan))
        if dry_run:
            return
        terminator.defer()
        keep_for_good()
        try:
            report = run_extraction(plan, not quiet, terminator.stop)
        except KeyboardInterrupt:
            typer.echo(stopped, err=True)
            raise
        except SpaceError as error:
            if not terminator.stop.is_set():
                raise
            # SIGTERM ended a wait for disk space
            typer.echo(stopped, err=True)
            raise typer.Exit(TERMINATED) from error
    if not report.is_complete:
        typer.echo(stopped, err=True)
        raise typer.Exit(TERMINATED)
    if not quiet:
        typer.echo(str(report))
    elif report.nonfinite:
        typer.echo(str(report), err=True)


def _parse_count(text: str) -> int:
    match = _COUNT.match(text.strip())
    count = Decimal(match.group()) if match else Decimal("0.5")
    if count != count.to_integral_value():
        raise OptionError(f"--plan {text!r}: it is a number of texts: write 1000000000, 1_000_000_000 or 1e9.")
    return int(count)


def _parse_size(text: str) -> int:
    match = _SIZE.match(text.strip())
    if not match:
        raise OptionError(f"no size {text!r}: write a number and a unit, such as 64MB or 1GiB.")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.lower()])
