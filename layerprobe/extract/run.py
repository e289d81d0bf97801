"""`layerprobe.extract`: carry out a plan in this process or in several, with progress and a report.

A run can be resumed at any unit: each is committed whole or not at all, and running the same call again does the units
that are missing.
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn

from layerprobe.capture.calls import Sink, is_sink
from layerprobe.capture.pooling import Pool
from layerprobe.errors import OptionError, StoreError
from layerprobe.extract.ahead import prepare_ahead
from layerprobe.extract.crew import run_crew
from layerprobe.extract.engine import UnitEngine, ending_waits
from layerprobe.extract.folder import hold_store
from layerprobe.extract.options import ExtractOptions, check_call
from layerprobe.extract.plan import Plan, plan_extraction
from layerprobe.extract.preparing import check_units, prepare_missing
from layerprobe.extract.reports import RunReport
from layerprobe.extract.resume import find_done
from layerprobe.extract.space import RoomKeeper
from layerprobe.extract.stream import stream_texts
from layerprobe.models import LoadedModel
from layerprobe.sites.stacks import find_weight_dtype
from layerprobe.store.headers import ShardHeader
from layerprobe.store.index import commit_index
from layerprobe.store.places import Place
from layerprobe.store.progress import Done, ProgressFile
from layerprobe.store.reader import Store, open_store
from layerprobe.tables import format_bytes
from layerprobe.telling import find_stderr, make_run_bar

__all__ = ["extract", "run_extraction"]

SinkType = TypeVar("SinkType", bound=Sink)


@overload
def extract(
    model: nn.Module | LoadedModel | str,
    texts: Any,
    to: str | Path | Place,
    *,
    sites: str | Sequence[str] | None = ...,
    dtype: str | torch.dtype | None = ...,
    pool: Pool = ...,
    tokenizer: Any = ...,
    field: str = ...,
    max_length: int | None = ...,
    batch_tokens: int | None = ...,
    padding_free: bool | None = ...,
    shard_size: int | None = ...,
    nonfinite: str = ...,
    keep: float = ...,
    tokens: str = ...,
    precision: str | None = ...,
    compile: bool | str = ...,
    writers: int = ...,
    device: str | int | None = ...,
    devices: str | Sequence[int | str] | None = ...,
    overwrite: bool = ...,
    wait_for_space: bool = ...,
    progress: bool | None = ...,
) -> Store: ...
@overload
def extract(
    model: nn.Module | LoadedModel | str,
    texts: Any,
    to: SinkType,
    *,
    sites: str | Sequence[str] | None = ...,
    tokenizer: Any = ...,
    field: str = ...,
    max_length: int | None = ...,
    batch_tokens: int | None = ...,
    device: str | int | None = ...,
    progress: bool | None = ...,
) -> SinkType: ...
def extract(
    model: nn.Module | LoadedModel | str,
    texts: Any,
    to: Any,
    *,
    sites: str | Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    pool: Pool = None,
    tokenizer: Any = None,
    field: str = "text",
    max_length: int | None = None,
    batch_tokens: int | None = None,
    padding_free: bool | None = None,
    shard_size: int | None = None,
    nonfinite: str = "warn",
    keep: float = 1.0,
    tokens: str = "all",
    precision: str | None = None,
    compile: bool | str = False,  # noqa: A002 - what torch calls it
    writers: int = 1,
    device: str | int | None = None,
    devices: str | Sequence[int | str] | None = None,
    overwrite: bool = False,
    wait_for_space: bool = False,
    progress: bool | None = None,
) -> Any:
    """Extract activations for every text into a store, where a stopped run can be resumed, or into a sink.

    Args:
        model: A model, the result of `load_model`, or a name: a hub id, a folder, or `demo`. It runs in eval mode and
            is left as it was.
        texts: A list of strings or mappings, a file (`.txt`, `.jsonl`, `.csv`, `.parquet`), a folder of them, a data
            set of the hub as `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`, or `-` for standard input, one text
            per line.
        to: Folder of the store, or a URL under `s3://`, `gs://`, `hf://` or `memory://`. A store that already holds
            part of the same run is resumed. Or a sink, such as `Moments()`: options for stores are then refused.
        sites: Patterns; None for the embeddings and every layer, as far as the model has them.
        dtype: Stored dtype; None for the model's own. With `precision` on CUDA, autocast computes norms in float32, so
            the layers of most encoders are stored in float32 unless you give `float16` or `bfloat16`.
        pool: None for a row per token, or `cls`, `mean`, `max`, `last`, or a callable on `[T, D]` rows. Over all real
            tokens, special ones included.
        tokenizer: A fast tokenizer; None for the one that the model came with.
        field: Field of a record that holds the text; the other fields are stored with the example.
        max_length: Maximum length of a text in tokens, special tokens included; None for the model's limit. Longer
            texts are truncated and counted.
        batch_tokens: Tokens per batch, padding included. A longer text gets a batch of its own. None chooses: on a CPU
            2,048 (1,024 with padding), elsewhere 16,384; runs of a million tokens or more first try whether a larger
            batch is faster.
        padding_free: Concatenate texts into one sequence, each attending only to itself, instead of padding them.
            Faster; rows differ in their last digits. None: wherever model, sites and device allow it, confirmed by a
            trial run.
        shard_size: Approximate bytes of a shard and of each buffer; there is one more buffer than `writers`. The tokens
            of a text are estimated from its bytes, by the ratio in the first 2,000 texts, or 16 MiB of them; other
            fields do not count. If later texts have more tokens a byte, shards and buffers are larger in proportion. In
            any case a shard has at most about a million tokens and 65,536 texts. None for 128 MiB, on CUDA 1 GiB; a
            resumed run keeps its own.
        nonfinite: `warn` counts NaN and infinite values; `error` stops the run at the first shard that has one.
        keep: Share of the rows to keep, above 0; drawn without a seed, by example and position. The positions of the
            kept rows can be read back.
        tokens: Tokens whose rows are kept: `all`, `first`, `cls`, `special` (those that the tokenizer adds around a
            text), or `nonspecial`. They are recognised by id, so a special token typed in a text counts too.
        precision: Precision of the forward pass: `bfloat16` or `float16` by autocast, `tf32` on CUDA (`bf16`, `fp16`
            and `fp32` are short names). None keeps what the calling program has set for torch; usually that is nothing,
            and the forward pass computes in the dtype of the weights, as with `float32`.
        compile: True to compile the model for the run, or the name of torch's backend; the model itself is not changed.
            `reduce-overhead`, torch's name for it, also replays CUDA graphs, one for each of a few shapes to which
            batches are then padded.
        writers: Shards written at once. Raise it if a single write does not saturate the disk or the link, as with an
            object store; `stalled` in the report shows it.
        device: Device for a model given by name.
        devices: Several devices, `[0, 1]` or `"cuda:0,cuda:1"`: one process for each, all into one store. On CPUs they
            share the cores; with a different number of threads the last digits differ.
        overwrite: Replace a different run in the folder; the same run is resumed.
        wait_for_space: On a full disk, wait for space instead of stopping.
        progress: Show progress on stderr; None: only on a terminal.

    Returns:
        The complete store, or the sink.

    Raises:
        InputError, ModelError, SiteError, OptionError, ArchitectureError: before any work.
        PlanError: the folder holds another run; the error lists the fields that differ.
        SpaceError: the disk cannot hold the store or the next shard; the error says how many bytes are missing.
        LockError: another run is writing there; its process is named.
        NonFiniteError: with `nonfinite="error"`.
        StoreError: writing failed; what was committed stays, and the same call resumes.

    Cost: two buffers of `shard_size` (one more for each further writer), one batch, and 16 MiB of the first texts,
        however many there are.

    Example:
        >>> import layerprobe as lp
        >>> store = lp.extract("demo", ["The kettle whistled.", "Who left?"], "memory://acts", pool="mean")
        >>> store.sites[:2], store["layers.5"].pooled().shape
        (['embeddings', 'layers.0'], torch.Size([2, 384]))
    """
    check_call(to, overwrite, wait_for_space, progress)
    options = ExtractOptions(
        sites=sites,
        dtype=dtype,
        pool=pool,
        field=field,
        max_length=max_length,
        batch_tokens=batch_tokens,
        padding_free=padding_free,
        shard_bytes=shard_size,
        nonfinite=nonfinite,
        keep=keep,
        tokens=tokens,
        precision=precision,
        compile=compile,
        writers=writers,
    )
    shows_progress = find_stderr().isatty() if progress is None else progress
    if is_sink(to):
        beside = {"overwrite": overwrite, "wait_for_space": wait_for_space, "devices": devices is not None}
        if given := [*options.list_for_stores(), *(name for name, value in beside.items() if value)]:
            raise OptionError(f"extract into a {type(to).__name__}: {given[0]} concerns stores. Leave it out.")
        streamed = stream_texts(model, texts, to, options, tokenizer=tokenizer, device=device, progress=shows_progress)
        if shows_progress:
            print(streamed, file=find_stderr())
        return to
    plan = plan_extraction(
        model,
        texts,
        to,
        options,
        tokenizer=tokenizer,
        device=device,
        devices=devices,
        overwrite=overwrite,
        wait_for_space=wait_for_space,
    )
    if shows_progress:
        print(plan, file=find_stderr())
    report = run_extraction(plan, shows_progress)
    if shows_progress or report.nonfinite:
        print(report, file=find_stderr())
    return open_store(plan.place)


def run_extraction(plan: Plan, progress: bool = False, stop: threading.Event | None = None) -> RunReport:
    """Do the units of a plan that are missing.

    Args:
        plan: What to do.
        progress: Whether to show a bar on stderr.
        stop: Set it to end the run after the current unit; what is committed stays. A run that fails sets it.

    Returns:
        What this run did, not counting what earlier runs had done.

    Raises:
        LockError, NonFiniteError, StoreError: as `extract`.
    """
    stop = stop or threading.Event()
    report, told = RunReport(), ProgressFile(plan.place.folder)

    def count_wait(seconds: float, is_waiting: bool) -> None:
        report.count_wait(seconds, is_waiting)
        told.tick()

    keeper = RoomKeeper(plan.place.folder, plan.wait_for_space, stop, count_wait)
    with hold_store(plan, keeper) as (plan, lock), told:
        return _run_plan(plan, keeper, stop, progress, told, lock, report)


def _run_plan(
    plan: Plan,
    keeper: RoomKeeper,
    stop: threading.Event,
    progress: bool,
    told: ProgressFile,
    lock: int | None,
    report: RunReport,
) -> RunReport:
    start = time.perf_counter()
    num_done = sum(header.num_examples for header in plan.done.values())
    bar = make_run_bar(progress, plan.num_examples, num_done)

    def advance(num_examples: int) -> None:
        bar.update(num_examples)
        told.tick()
        bar.set_postfix_str(_describe_pace(report, time.perf_counter() - start), False)

    told.check = keeper.check
    told.begin(lambda: _measure(plan, report))
    # start no processes if there is nothing to do
    is_done = len(plan.done) == plan.num_units
    run_units = _run_here if plan.crew is None or is_done else partial(_run_elsewhere, lock)
    with bar:
        committed = run_units(plan, keeper, stop, report, advance)
    if report.is_complete:
        headers = [*plan.done.values(), *committed]
        keeper.attempt(lambda: commit_index(plan.place, headers))
    for header in committed:
        report.nonfinite.update(header.nonfinite)
    report.value_bytes = _count_value_bytes(plan, report)
    report.seconds = time.perf_counter() - start
    return report


def _run_here(
    plan: Plan, keeper: RoomKeeper, stop: threading.Event, report: RunReport, advance: Callable[[int], None]
) -> list[ShardHeader]:
    """Do the missing units in this process and return the headers of the committed shards."""
    engine = UnitEngine(plan, keeper, report, advance)
    with engine, ending_waits(stop):
        for prepared in prepare_ahead(check_units(plan), partial(prepare_missing, plan)):
            if stop.is_set():
                report.is_complete = False
                break
            if prepared is not None:
                engine.run(prepared)
    return engine.committed


def _run_elsewhere(
    lock: int | None,
    plan: Plan,
    keeper: RoomKeeper,
    stop: threading.Event,
    report: RunReport,
    advance: Callable[[int], None],
) -> list[ShardHeader]:
    """Do the missing units in one process per device and return the headers of the committed shards."""
    # each process loads the model by name, so move this copy off the first device to free its memory
    plan.model.to("cpu")
    torch.cuda.empty_cache()
    run_crew(plan, lock, report, advance, stop)
    # a folder that was moved is the better reason for shards that are gone
    found, _ = keeper.attempt(lambda: find_done(plan.place, plan.description))
    committed = [header for number, header in found.items() if number not in plan.done]
    if report.is_complete and len(found) < plan.num_units:
        raise StoreError(f"{plan.place}: a shard that was committed is gone or damaged. Run the same command again.")
    return committed


def _measure(plan: Plan, report: RunReport) -> Done:
    """Report how far the run is, for the progress file."""
    examples = sum(header.num_examples for header in plan.done.values()) + report.num_examples
    return Done(
        units=len(plan.done) + report.num_units,
        num_units=plan.num_units,
        examples=examples,
        num_examples=plan.num_examples,
        tokens=report.num_tokens,
        num_bytes=report.num_bytes,
        # an input that grows during the run is an error, but it is raised elsewhere
        missing_bytes=max(0, round(plan.num_bytes * (1 - examples / plan.num_examples))),
        stalled_s=report.stalled_s,
        waited_s=report.waited_s,
        is_waiting=report.num_waiting > 0,
    )


def _count_value_bytes(plan: Plan, report: RunReport) -> int | None:
    """Count the bytes of values that the model produced; None if the plan does not determine their size."""
    is_autocast = plan.precision not in (None, "tf32")
    if is_autocast and plan.options.dtype is not None:
        return None
    size = 0
    for site, stored in zip(plan.sites, plan.stored, strict=True):
        count = {"token": report.num_computed, "example": report.num_examples - report.num_repeated}.get(site.kind)
        if count is None or site.width is None:
            return None
        dtype = stored.dtype if plan.options.dtype is None else find_weight_dtype(plan.model)
        size += count * site.width * dtype.itemsize
    return size


def _describe_pace(report: RunReport, seconds: float) -> str:
    return f"{report.num_tokens / max(seconds, 1e-9):,.0f} tokens/s, {format_bytes(report.num_bytes)} written"
