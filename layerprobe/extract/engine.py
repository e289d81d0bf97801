"""Run units through a probed model into shards.

Sends the batches of a prepared unit through the model, and hands the full buffer to the writer while the next unit
runs. Works in one process or in several; which process does which unit is decided by the caller.

Must never know of progress bars or of other processes.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from layerprobe.capture.casting import resolve_dtype
from layerprobe.capture.early import can_end_early
from layerprobe.capture.packing import StoreSink
from layerprobe.capture.probe import Probe
from layerprobe.cores import using_cores
from layerprobe.errors import SpaceError
from layerprobe.extract.batching import Batch, FlatBatch
from layerprobe.extract.calling import ModelCaller
from layerprobe.extract.flat import FlatForm, attending_flat
from layerprobe.extract.forward import CUDA_GRAPHS, compile_network, running, tracing
from layerprobe.extract.plan import Plan
from layerprobe.extract.preparing import PreparedUnit, ReadyBatch
from layerprobe.extract.reports import RunReport
from layerprobe.extract.space import RoomKeeper
from layerprobe.store.headers import ShardHeader
from layerprobe.store.writer import ShardWriter

__all__ = ["UnitEngine", "ending_waits"]

# Runs that write at least this much first test which way of writing is faster on their disk.
_PROBED_BYTES = 1 << 30


class UnitEngine(AbstractContextManager["UnitEngine"]):
    """Run units of a plan, one after the other, into its store.

    Args:
        plan: Its store is locked and initialised.
        keeper: Reserves disk space for each shard.
        report: Counts what this process has done so far.
        advance: Called with the number of examples that have just been processed.
        share: Number of processes that share the cores.

    `committed` lists the headers of the committed shards.
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
            # for a short run no more than it will write: pinned memory is allocated in full up front
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

    def run(self, prepared: PreparedUnit) -> None:
        """Run one unit; its shard is committed while the next unit runs, or on exit for the last one."""
        unit, room, num_truncated = prepared.unit, prepared.room, prepared.num_truncated
        header = ShardHeader(
            unit.number,
            len(unit.records),
            room.rows,
            unit.first_example,
            self._plan.fingerprint,
            num_truncated,
        )
        record_bytes = sum(map(len, prepared.records))
        self._keeper.reserve(header, self._plan.stored, room.pairs, record_bytes, prepared.keeps_part)
        self._sink.begin_unit(unit.number, unit.first_example, room, num_truncated)
        for ready in prepared.batches:
            batch = ready.batch
            self._caller.call(batch, partial(self._announce, prepared, ready))
            self.report.num_computed += batch.input_ids.numel()
            self.report.num_padding += batch.num_padding
            self.report.num_repeated += len(batch.members) - batch.num_sequences + batch.num_filling
            self.report.num_tokens += sum(batch.lengths)
            self.report.num_examples += len(batch.members)
            self._count()
            self._advance(len(batch.members))
        self._sink.end_unit()
        self.report.num_truncated += num_truncated

    def _announce(self, prepared: PreparedUnit, ready: ReadyBatch, part: Batch | FlatBatch) -> None:
        """Announce a batch to the sink, or a part of a batch that ran out of memory."""
        self._sink.announce(ready.announced if part is ready.batch else prepared.announce(part))

    def _count(self) -> None:
        """Copy the counters of the writer, the sink and the caller into the report."""
        self.report.num_units = len(self._writer.committed)
        self.report.num_bytes = self._writer.num_bytes
        self.report.stalled_s = self._sink.stalled_s
        self.report.num_halved = self._caller.num_halved


@contextlib.contextmanager
def ending_waits(stop: threading.Event) -> Iterator[None]:
    """Stop the writer from waiting for disk space once the run has failed, so that Ctrl-C does not hang."""
    try:
        yield
    except SpaceError:  # then nothing is waiting, or the wait was already ended
        raise
    except BaseException:
        stop.set()
        raise
