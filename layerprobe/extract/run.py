"""Do a planned run: text to shards, unit by unit, resumable at every unit.

Tokenises a unit, sends its length-sorted batches through the probed model and hands the full buffer to the writer while
the next unit goes on. A unit is committed whole or not at all; what is missing is done by running the same thing again.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn
from tqdm import tqdm

from layerprobe.capture.calls import Sink, is_sink
from layerprobe.capture.early import can_end_early
from layerprobe.capture.packing import StoreSink
from layerprobe.capture.probe import DEFAULT_SHARD_BYTES, Probe
from layerprobe.capture.select import Pool, resolve_dtype
from layerprobe.capture.staging import Room
from layerprobe.capture.units import AnnouncedBatch, encode_record
from layerprobe.errors import InputError, OptionError, SpaceError
from layerprobe.extract.ahead import tokenize_ahead
from layerprobe.extract.batching import Batch, TokenizedUnit, cut_batches, tokenize
from layerprobe.extract.folder import hold_store
from layerprobe.extract.forward import compile_network, compute_in
from layerprobe.extract.inputs import InputDigest, Record
from layerprobe.extract.plan import DEFAULT_SITES, ExtractOptions, Plan, Unit, plan_extraction
from layerprobe.extract.reports import RunReport
from layerprobe.extract.space import RoomKeeper
from layerprobe.extract.stream import call_model, stream_texts
from layerprobe.models import LoadedModel, evaluating
from layerprobe.store.format import ShardHeader
from layerprobe.store.kept import KeptRows
from layerprobe.store.places import Place
from layerprobe.store.progress import Done, ProgressFile
from layerprobe.store.reader import Store, open_store
from layerprobe.store.writer import ShardWriter, commit_index
from layerprobe.tables import format_bytes

__all__ = ["RunReport", "extract", "run_extraction"]

_LOG_INTERVAL_S = 10.0


SinkType = TypeVar("SinkType", bound=Sink)


@overload
def extract(
    model: nn.Module | LoadedModel | str,
    texts: Any,
    to: str | Path | Place,
    *,
    sites: str | Sequence[str] = ...,
    dtype: str | torch.dtype | None = ...,
    pool: Pool = ...,
    tokenizer: Any = ...,
    field: str = ...,
    max_length: int | None = ...,
    batch_tokens: int | None = ...,
    shard_size: int = ...,
    nonfinite: str = ...,
    keep: float = ...,
    tokens: str = ...,
    precision: str | None = ...,
    compile: bool | str = ...,
    device: str | None = ...,
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
    sites: str | Sequence[str] = ...,
    tokenizer: Any = ...,
    field: str = ...,
    max_length: int | None = ...,
    batch_tokens: int | None = ...,
    device: str | None = ...,
    progress: bool | None = ...,
) -> SinkType: ...
def extract(
    model: nn.Module | LoadedModel | str,
    texts: Any,
    to: Any,
    *,
    sites: str | Sequence[str] = DEFAULT_SITES,
    dtype: str | torch.dtype | None = None,
    pool: Pool = None,
    tokenizer: Any = None,
    field: str = "text",
    max_length: int | None = None,
    batch_tokens: int | None = None,
    shard_size: int = DEFAULT_SHARD_BYTES,
    nonfinite: str = "warn",
    keep: float = 1.0,
    tokens: str = "all",
    precision: str | None = None,
    compile: bool | str = False,  # noqa: A002 - what torch calls it
    device: str | None = None,
    overwrite: bool = False,
    wait_for_space: bool = False,
    progress: bool | None = None,
) -> Any:
    """Extract sites for every text into a store, resumably, or into a sink.

    Args:
        model: A model, what `load_model` gave, or a name: a hub id, a folder, or `demo`. It runs in eval mode and is
            left as it was.
        texts: A list of strings or mappings, a file (`.txt`, `.jsonl`, `.csv`, `.parquet`), a folder of them, or `-`.
        to: Folder of the store, or a URL under `s3://`, `gs://`, `hf://` or `memory://`. One that holds part of the
            same run is gone on with. Or a sink, such as `Moments()`: what concerns stores is then refused.
        sites: Patterns.
        dtype: Stored dtype; None for the model's own.
        pool: None for a row per token, or `cls`, `mean`, `max`, `last`, or a callable on `[T, D]` rows. Over all real
            tokens, special ones included.
        tokenizer: A fast tokenizer; None for the one the model came with.
        field: Field of a record that holds the text; its other fields travel with the example.
        max_length: Longest text in tokens, special ones included; None for the model's limit. Longer ones are cut and
            counted.
        batch_tokens: Padded tokens per batch; None for 1,024 on a CPU and 16,384 elsewhere.
        shard_size: Bytes of a shard, and of each of the two buffers.
        nonfinite: `warn` counts values that are not finite, `error` stops at them.
        keep: Share of the rows to keep, above 0: a draw without a seed, by example and position. The reader knows the
            positions of those that are kept.
        tokens: Which tokens to keep rows of: `all`, `first`, `cls`, `special` (those that the tokenizer puts around a
            text), or `nonspecial`.
        precision: What the forward computes in: `bfloat16` or `float16` by autocast; None for the dtype of the weights.
        compile: True to compile the model for the run, or the name of torch's backend; the model itself stays as it is.
        device: Where to put a model given by name.
        overwrite: Replace another run in the folder; the very same run is gone on with.
        wait_for_space: On a full disk wait for room instead of stopping.
        progress: Whether to say on stderr what is done; None for only on a terminal.

    Returns:
        The complete store, or the sink.

    Raises:
        InputError, ModelError, SiteError, OptionError, ArchitectureError: before any work.
        PlanError: the folder holds another run, with the fields that differ.
        SpaceError: the disk cannot hold the store, or the next shard, with the bytes that are missing.
        LockError: another run is writing there; its process is named.
        NonFiniteError: with `nonfinite="error"`.
        StoreError: the disk refused; what was committed stays, and the same call goes on.

    Cost: two buffers of `shard_size` and one batch, however many texts.

    Example:
        >>> import layerprobe as lp
        >>> store = lp.extract("demo", ["The kettle whistled.", "Who left?"], "memory://acts", pool="mean")
        >>> store.sites[:2], store["layers.5"].pooled().shape
        (['embeddings', 'layers.0'], torch.Size([2, 384]))
    """
    options = ExtractOptions(
        sites=[sites] if isinstance(sites, str) else list(sites),
        dtype=dtype,
        pool=pool,
        field=field,
        max_length=max_length,
        batch_tokens=batch_tokens,
        shard_bytes=shard_size,
        nonfinite=nonfinite,
        keep=keep,
        tokens=tokens,
        precision=precision,
        compile=compile,
    )
    shows_progress = sys.stderr.isatty() if progress is None else progress
    if is_sink(to):
        stored = {"dtype": dtype, "pool": pool, "overwrite": overwrite, "wait_for_space": wait_for_space}
        stored |= {"nonfinite": nonfinite != "warn", "shard_size": shard_size != DEFAULT_SHARD_BYTES}
        stored |= {"keep": keep != 1, "tokens": tokens != "all", "precision": precision, "compile": compile}
        given = [name for name, value in stored.items() if value]
        if given:
            raise OptionError(f"extract into a {type(to).__name__}: {given[0]} concerns stores. Leave it out.")
        streamed = stream_texts(model, texts, to, options, tokenizer=tokenizer, device=device, progress=shows_progress)
        if shows_progress:
            print(streamed, file=sys.stderr)
        return to
    plan = plan_extraction(
        model,
        texts,
        to,
        options,
        tokenizer=tokenizer,
        device=device,
        overwrite=overwrite,
        wait_for_space=wait_for_space,
    )
    if shows_progress:
        print(plan, file=sys.stderr)
    report = run_extraction(plan, shows_progress)
    if shows_progress or report.nonfinite:
        print(report, file=sys.stderr)
    return open_store(to)


def run_extraction(plan: Plan, progress: bool = False, stop: threading.Event | None = None) -> RunReport:
    """Do what a plan says is missing.

    Args:
        plan: What to do.
        progress: Whether to show a bar on stderr.
        stop: Set to end the run after the unit under way; what is committed stays. A run that fails sets it.

    Returns:
        What was done now, without what an earlier run had done.

    Raises:
        LockError, NonFiniteError, StoreError: as `extract`.
    """
    stop = stop or threading.Event()
    keeper = RoomKeeper(plan.place.folder, plan.wait_for_space, stop)
    with hold_store(plan, keeper) as plan, ProgressFile(plan.place.folder) as told:
        return _run_plan(plan, keeper, stop, progress, told)


def _run_plan(plan: Plan, keeper: RoomKeeper, stop: threading.Event, progress: bool, told: ProgressFile) -> RunReport:
    start = time.perf_counter()
    plan = replace(plan, model=compile_network(plan.model, plan.options.compile))
    report, num_units = RunReport(), 0
    writer = ShardWriter(plan.place, plan.options.nonfinite, keeper.attempt)
    sink = StoreSink(
        plan.place,
        writer,
        pool=plan.options.pool,
        dtype=resolve_dtype(plan.options.dtype),
        device=plan.device,
        shard_bytes=plan.rule.shard_bytes,
        fingerprint=plan.fingerprint,
        stored=plan.stored,
        keeps_part=plan.rule.kept is not None,
    )
    probe = Probe(plan.model, [site.name for site in plan.sites], to=sink, stop=can_end_early(plan.model))
    # a log file wants a line now and then, and none of a short run
    interval_s = 0.1 if sys.stderr.isatty() else _LOG_INTERVAL_S
    bar = tqdm(
        total=plan.num_examples,
        initial=sum(header.num_examples for header in plan.done.values()),
        unit=" examples",
        disable=not progress,
        leave=False,
        mininterval=interval_s,
        delay=interval_s,
    )

    def advance(num_examples: int) -> None:
        bar.update(num_examples)
        told.tick()

    told.begin(lambda: _measure(plan, report, writer, sink))
    digest = InputDigest(plan.source.name)
    precision = compute_in(plan.model, plan.precision)
    with bar, evaluating(plan.model), torch.inference_mode(), precision, probe, _ending(stop):
        for unit, tokenized in tokenize_ahead(plan.units(), partial(_tokenize_missing, plan)):
            if stop.is_set():
                report.is_complete = False
                break
            for record in unit.records:
                digest.add(record)
            if (num_units := unit.number + 1) > plan.num_units or digest.digest() != plan.digests[unit.number]:
                raise _changed(plan)
            if tokenized is not None:
                _run_unit(plan, keeper, sink, unit, tokenized, report, advance)
                bar.set_postfix_str(_describe_pace(report, writer.num_bytes, time.perf_counter() - start), False)
    if report.is_complete and num_units < plan.num_units:
        raise _changed(plan)
    if report.is_complete:
        headers = [*plan.done.values(), *writer.committed]
        keeper.attempt(lambda: commit_index(plan.place, headers))
    report.num_bytes = writer.num_bytes
    report.stalled_s = sink.stalled_s
    for header in writer.committed:
        report.nonfinite.update(header.nonfinite)
    report.seconds = time.perf_counter() - start
    return report


def _changed(plan: Plan) -> InputError:
    # a unit is told from its planned one before it is run, so the input as it is now left nothing in the store
    return InputError(
        f"{plan.source.name}: changed while the run was under way. What {plan.place} holds is of the input as it was: "
        "put that back and run the same command again, or run with --overwrite, or into another folder."
    )


@contextlib.contextmanager
def _ending(stop: threading.Event) -> Iterator[None]:
    """Let the writer wait for room no longer once the run has failed: Ctrl-C would wait for it."""
    try:
        yield
    except SpaceError:  # nobody waits then, or a wait was ended
        raise
    except BaseException:
        stop.set()
        raise


def _measure(plan: Plan, report: RunReport, writer: ShardWriter, sink: StoreSink) -> Done:
    """Say how far a run is, for those who look at its folder."""
    examples = sum(header.num_examples for header in plan.done.values()) + report.num_examples
    return Done(
        units=len(plan.done) + len(writer.committed),
        num_units=plan.num_units,
        examples=examples,
        num_examples=plan.num_examples,
        tokens=report.num_tokens,
        num_bytes=writer.num_bytes,
        # an input that grows under way ends as an error, but not here
        missing_bytes=max(0, round(plan.num_bytes * (1 - examples / plan.num_examples))),
        stalled_s=sink.stalled_s,
    )


def _tokenize_missing(plan: Plan, unit: Unit) -> TokenizedUnit | None:
    if unit.number in plan.done:
        return None
    return tokenize(plan.tokenizer, [record.text for record in unit.records], plan.rule.max_length)


def _run_unit(
    plan: Plan,
    keeper: RoomKeeper,
    sink: StoreSink,
    unit: Unit,
    tokenized: TokenizedUnit,
    report: RunReport,
    advance: Callable[[int], None],
) -> None:
    num_truncated = sum(tokenized.truncated)
    rows, room = None, tokenized.room
    if plan.rule.kept is not None:
        ordinals = range(unit.first_example, unit.first_example + len(unit.records))
        rows = plan.rule.kept.choose(tokenized.ids, ordinals)
        room = Room(len(rows.positions), len(unit.records))
    header = ShardHeader(
        unit.number,
        len(unit.records),
        room.rows,
        unit.first_example,
        plan.fingerprint,
        num_truncated,
    )
    record_bytes = sum(len(encode_record(_make_record(record))) for record in unit.records)
    keeper.reserve(header, plan.stored, room, record_bytes, rows is not None)
    sink.begin_unit(unit.number, unit.first_example, room, num_truncated)
    pad_id, side = plan.tokenizer.pad_token_id or 0, plan.tokenizer.padding_side
    for batch in cut_batches(tokenized, plan.batch_tokens, pad_id, side):
        report.num_halved += call_model(
            plan.model, plan.device, batch, lambda part: sink.announce(_announce(unit, tokenized, part, side, rows))
        )
        report.num_computed += batch.input_ids.numel()
        report.num_padding += int((batch.attention_mask == 0).sum())
        report.num_repeated += len(batch.members) - len(batch.input_ids)
        report.num_tokens += sum(batch.lengths)
        report.num_examples += len(batch.members)
        advance(len(batch.members))
    sink.end_unit()
    report.num_truncated += num_truncated


def _announce(
    unit: Unit, tokenized: TokenizedUnit, batch: Batch, padding_side: str, rows: KeptRows | None
) -> AnnouncedBatch:
    kept = None if rows is None else [rows.of(member) for member in batch.members]
    ids = [token_id for member in batch.members for token_id in tokenized.ids[member]]
    input_ids = torch.tensor(ids, dtype=torch.int64)
    if kept is not None:
        parts = zip(input_ids.split(batch.lengths), kept, strict=True)
        input_ids = torch.cat([own[positions] for own, positions in parts])
    return AnnouncedBatch(
        ordinals=[unit.first_example + member for member in batch.members],
        lengths=batch.lengths,
        num_positions=batch.input_ids.shape[1],
        padding_side=padding_side,
        input_ids=input_ids,
        records=[_make_record(unit.records[member]) for member in batch.members],
        sequences=batch.sequences if len(batch.sequences) > len(batch.input_ids) else None,
        kept=kept,
    )


def _make_record(record: Record) -> dict[str, Any]:
    """Give what travels with an example."""
    return {"text": record.text, **({"fields": record.fields} if record.fields else {})}


def _describe_pace(report: RunReport, num_bytes: int, seconds: float) -> str:
    return f"{report.num_tokens / max(seconds, 1e-9):,.0f} tokens/s, {format_bytes(num_bytes)} written"
