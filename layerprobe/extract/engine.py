"""The engine of a run: units through a probed model into shards.

Sends the length-sorted batches of a unit through the model and hands the full buffer to the writer while the next unit
goes on. A unit is known by its input before it is run. Runs in one process or in several at once: which units are
whose is decided above.

Must never know of progress bars or of other processes.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from layerprobe.capture.buffers import Room
from layerprobe.capture.casting import resolve_dtype
from layerprobe.capture.early import can_end_early
from layerprobe.capture.packing import StoreSink
from layerprobe.capture.probe import Probe
from layerprobe.capture.units import AnnouncedBatch, encode_record
from layerprobe.cores import using_cores
from layerprobe.errors import InputError, SpaceError
from layerprobe.extract.batching import Batch, FlatBatch
from layerprobe.extract.calling import ModelCaller
from layerprobe.extract.cutting import Unit
from layerprobe.extract.flat import FlatForm, attending_flat
from layerprobe.extract.forward import CUDA_GRAPHS, compile_network, running, tracing
from layerprobe.extract.inputs import InputDigest, Record
from layerprobe.extract.plan import Plan
from layerprobe.extract.reports import RunReport
from layerprobe.extract.space import RoomKeeper
from layerprobe.extract.tokens import TokenizedUnit, tokenize
from layerprobe.store.format import ShardHeader
from layerprobe.store.kept import KeptRows
from layerprobe.store.writer import ShardWriter

__all__ = ["UnitEngine", "check_units", "ending_waits", "tokenize_missing"]

# A run that writes so much tries first which way its disk takes it better.
_PROBED_BYTES = 1 << 30


class UnitEngine(AbstractContextManager["UnitEngine"]):
    """Run units of a plan, one after the other, into its store.

    Args:
        plan: Its store is held and begun.
        keeper: Keeps room for each shard.
        report: Counts what was done so far, here.
        advance: Told how many examples have just gone through.
        share: How many processes share the cores.

    `committed` are the shards that are whole.
    """

    def __init__(
        self, plan: Plan, keeper: RoomKeeper, report: RunReport, advance: Callable[[int], None], share: int = 1
    ) -> None:
        self._plan = plan
        self._keeper = keeper
        self._advance = advance
        self._share = share
        self.report = report
        num_writers = min(plan.options.writers, plan.num_units)
        self._writer = ShardWriter(
            plan.place,
            plan.options.nonfinite,
            keeper.attempt,
            num_writers,
            probes_disk=plan.num_bytes >= _PROBED_BYTES,
        )
        self._sink = StoreSink(
            plan.place,
            self._writer,
            pool=plan.options.pool,
            dtype=resolve_dtype(plan.options.dtype),
            device=plan.device,
            # of a short run no more than it will write: pinned memory is taken whole, and at once
            shard_bytes=min(plan.rule.shard_bytes, plan.num_bytes),
            fingerprint=plan.fingerprint,
            stored=plan.stored,
            keeps_part=plan.rule.kept is not None,
            packs_in_graphs=plan.options.compile != CUDA_GRAPHS,
        )
        model = compile_network(plan.model, plan.options.compile)
        form = FlatForm.of(plan.model) if plan.is_flat else None
        self._caller = ModelCaller(model, plan.device, form, self._sink.shrink)
        names, stops = [site.name for site in plan.sites], can_end_early(model)
        self._probe = Probe(model, names, to=self._sink, stop=stops, this_thread=True)
        self._open = contextlib.ExitStack()

    @property
    def committed(self) -> list[ShardHeader]:
        """Headers of the shards that this engine has written."""
        return self._writer.committed

    def __enter__(self) -> "UnitEngine":
        with self._open as entering:
            entering.callback(self._count)
            entering.enter_context(using_cores(self._share))
            entering.enter_context(running(self._plan.model, self._plan.precision))
            entering.enter_context(tracing(self._plan.options.compile))
            if self._plan.is_flat:
                entering.enter_context(attending_flat(self._plan.model))
            entering.enter_context(self._probe)
            self._open = entering.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._open.__exit__(*raised)

    def run(self, unit: Unit, tokenized: TokenizedUnit) -> None:
        """Run one unit; its shard is committed while the next one runs, the last one's by the end of the block."""
        num_truncated = tokenized.num_truncated
        rows, room = None, tokenized.room
        if self._plan.rule.kept is not None:
            ordinals = range(unit.first_example, unit.first_example + len(unit.records))
            rows = self._plan.rule.kept.choose(tokenized.ids, tokenized.offsets, ordinals)
            room = Room(len(rows.positions), len(unit.records))
        header = ShardHeader(
            unit.number,
            len(unit.records),
            room.rows,
            unit.first_example,
            self._plan.fingerprint,
            num_truncated,
        )
        records = [encode_record(_make_record(record)) for record in unit.records]
        self._keeper.reserve(header, self._plan.stored, room, sum(map(len, records)), rows is not None)
        self._sink.begin_unit(unit.number, unit.first_example, room, num_truncated)
        for batch in self._cut(tokenized):
            self._caller.call(batch, lambda part: self._sink.announce(_announce(unit, tokenized, records, part, rows)))
            self.report.num_computed += batch.input_ids.numel()
            self.report.num_padding += batch.num_padding
            self.report.num_repeated += len(batch.members) - batch.num_sequences + batch.num_filling
            self.report.num_tokens += sum(batch.lengths)
            self.report.num_examples += len(batch.members)
            self._count()
            self._advance(len(batch.members))
        self._sink.end_unit()
        self.report.num_truncated += num_truncated

    def _cut(self, tokenized: TokenizedUnit) -> Iterator[Batch | FlatBatch]:
        return self._plan.cut(tokenized)

    def _count(self) -> None:
        """Take over what others count."""
        self.report.num_units = len(self._writer.committed)
        self.report.num_bytes = self._writer.num_bytes
        self.report.stalled_s = self._sink.stalled_s
        self.report.num_halved = self._caller.num_halved


@contextlib.contextmanager
def ending_waits(stop: threading.Event) -> Iterator[None]:
    """Let the writer wait for room no longer once the run has failed: Ctrl-C would wait for it."""
    try:
        yield
    except SpaceError:  # nobody waits then, or a wait was ended
        raise
    except BaseException:
        stop.set()
        raise


def tokenize_missing(plan: Plan, unit: Unit) -> TokenizedUnit | None:
    """Give the ids of a unit, or None where it is done already."""
    if unit.number in plan.done:
        return None
    texts = [record.text for record in unit.records]
    start, end = unit.first_example, unit.first_example + len(texts)
    if end <= len(plan.first_texts) and tuple(texts) == plan.first_texts[start:end]:
        return plan.first.part(start, end)
    return tokenize(plan.tokenizer, texts, plan.rule.max_length)


def check_units(plan: Plan) -> Iterator[Unit]:
    """Go through the units of a plan.

    Raises:
        InputError: a unit is not what it was when the plan was made.
    """
    digest, num_units = InputDigest(plan.source.name), 0
    for unit in plan.units():
        for record in unit.records:
            digest.add(record)
        if (num_units := unit.number + 1) > plan.num_units or digest.digest() != plan.digests[unit.number]:
            raise _changed(plan)
        yield unit
    if num_units < plan.num_units:
        raise _changed(plan)


def _announce(
    unit: Unit,
    tokenized: TokenizedUnit,
    records: Sequence[bytes],
    batch: Batch | FlatBatch,
    rows: KeptRows | None,
) -> AnnouncedBatch:
    kept = None if rows is None else [rows.of(member) for member in batch.members]
    has_copies = len(batch.sequences) > batch.num_sequences - batch.num_filling
    if isinstance(batch, FlatBatch) and not has_copies:
        input_ids = batch.input_ids[0]
    else:
        input_ids = tokenized.gather(batch.members)
    if kept is not None:
        parts = zip(input_ids.split(batch.lengths), kept, strict=True)
        input_ids = torch.cat([own[positions] for own, positions in parts])
    return AnnouncedBatch(
        ordinals=[unit.first_example + member for member in batch.members],
        lengths=batch.lengths,
        num_positions=batch.input_ids.shape[1],
        input_ids=input_ids,
        records=[records[member] for member in batch.members],
        sequences=batch.sequences if has_copies else None,
        kept=kept,
        num_filling=batch.num_filling,
        is_flat=isinstance(batch, FlatBatch),
    )


def _make_record(record: Record) -> dict[str, Any]:
    """Give what travels with an example."""
    return {"text": record.text, **({"fields": record.fields} if record.fields else {})}


def _changed(plan: Plan) -> InputError:
    # a unit is told from its planned one before it is run, so the input as it is now left nothing in the store
    return InputError(
        f"{plan.source.name}: changed while the run was under way. What {plan.place} holds is of the input as it was: "
        "put that back and run the same command again, pass overwrite=True (--overwrite), or choose another folder."
    )
