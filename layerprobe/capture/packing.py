"""Pack captured rows into shards: the sink behind `Probe(to="acts/")` and `extract`.

The rows of a call are appended to the open unit's buffer. A finished call's rows stay, an abandoned call's are
overwritten by the next. A unit is sealed when its buffer is full (`Probe`) or on request (`extract`) and becomes one
shard.

Hides how buffers rotate: there is one more than there are writer threads. Must never know of modules or hooks.
"""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerprobe.capture.abilities import SinkAbilities
from layerprobe.capture.calls import Call
from layerprobe.capture.casting import NOT_PLAIN, cast_into
from layerprobe.capture.pooling import Pool, pool_rows
from layerprobe.capture.select import BatchSelection, Run, copy_runs, write_pairs, write_rows
from layerprobe.capture.sinks import is_per_token, select_tokens
from layerprobe.capture.staging import NO_ROOM, BufferPool, HostBuffer, Lane, Room, make_lane
from layerprobe.capture.turns import Turns
from layerprobe.capture.units import AnnouncedBatch, OpenUnit, check_storable, list_tensors, measure_site, room_for
from layerprobe.errors import CaptureError
from layerprobe.sites.resolve import Site
from layerprobe.store.claiming import claim_place
from layerprobe.store.description import StoredSite, commit_description
from layerprobe.store.fingerprint import fingerprint_run
from layerprobe.store.headers import MOST_EXAMPLES, MOST_TOKENS, ShardHeader
from layerprobe.store.index import commit_index
from layerprobe.store.lock import StoreLock
from layerprobe.store.places import Place, find_place
from layerprobe.store.writer import ShardJob, ShardWriter

__all__ = ["StoreSink"]


@dataclass(eq=False)
class _Pending:
    """The running call and the destination of its rows."""

    thread: int
    call: Call
    batch: AnnouncedBatch | None = None
    selection: BatchSelection | None = None
    room: Room = NO_ROOM
    # set if values need only a casting copy: the rectangles to copy
    runs: Sequence[Run] | None = None
    values: dict[int, Tensor] | None = None
    # sites whose values a compiled graph has already gathered and cast
    packed: set[int] = field(default_factory=set)
    input_ids: Tensor | None = None
    # number of values beyond the range of float8, counted on the device
    overflow: dict[int, Tensor] = field(default_factory=dict)
    is_displaced: bool = False


class StoreSink(SinkAbilities):
    """Stream captured rows into a store.

    Without `stored`, the first call determines the widths, and units are cut as buffers fill. With it, the caller opens
    and seals units (`begin_unit`, `end_unit`) and announces every batch.

    Args:
        where: The store. With a description it is created; without one, the caller owns it.
        writer: A writer that has not been started.
        pool, dtype: Pooling and cast applied to the rows.
        device: Device on which the model computes the rows.
        shard_bytes: Size of a buffer, and so of a shard.
        description: Content of `store.json`; None if the caller writes it.
        fingerprint: Fingerprint of the plan; with a description it is computed from that and the sites.
        stored: Layout of the sites on disk, if known.
        keeps_part: Whether announced batches select the rows to keep.
        packs_in_graphs: Whether compiled graphs may gather and cast rows. The number of rows changes with almost every
            batch, and CUDA graphs are recorded once per shape.
    """

    forgets_abandoned = True

    def __init__(
        self,
        where: Path | Place,
        writer: ShardWriter,
        *,
        pool: Pool,
        dtype: torch.dtype | None,
        device: torch.device,
        shard_bytes: int,
        fingerprint: str = "",
        description: Mapping[str, Any] | None = None,
        stored: Sequence[StoredSite] | None = None,
        keeps_part: bool = False,
        packs_in_graphs: bool = True,
    ) -> None:
        self.place = find_place(where)
        self.writer = writer
        self.buffers: BufferPool | None = None
        self._pool = pool
        self._keeps_part = keeps_part
        self._packs_in_graphs = packs_in_graphs
        self.packed_dtype = dtype
        self._shard_bytes = shard_bytes
        self._fingerprint = fingerprint
        self._description = description
        self._stored = list(stored) if stored is not None else None
        self._announced: AnnouncedBatch | None = None
        self._sites: Sequence[Site] = ()
        self._lane: Lane = make_lane(device)
        self._unit: OpenUnit | None = None
        self._room = NO_ROOM
        self._next_unit = 0
        self._next_example = 0
        self._lock: StoreLock | None = None
        self._made_folder: Path | None = None
        # a unit is a run of consecutive examples, so calls take turns
        self._turns = Turns()

    @property
    def copies_at_once(self) -> bool:
        """Whether a value may be overwritten once `receive` returns; those of the first call are kept until it ends."""
        return self._stored is not None

    @property
    def packs_rows(self) -> bool:
        """Whether a compiled graph may gather and cast rows itself, to `packed_dtype`, and call `receive_rows`."""
        is_plain = self._packs_in_graphs and self._pool is None and not self._keeps_part
        return is_plain and self.packed_dtype in (None, torch.float32, torch.float16, torch.bfloat16)

    @property
    def stalled_s(self) -> float:
        """Seconds the forward pass has waited for a buffer while its device was idle."""
        return self.buffers.stalled_s if self.buffers is not None else 0.0

    def open(self, sites: Sequence[Site]) -> None:
        check_storable(sites, self._pool, self.packed_dtype)
        self._sites = sites
        if self._description is not None:
            folder = self.place.folder
            made = None if folder is None or folder.path.exists() else folder.path
            self._lock = claim_place(self.place)
            self._made_folder = made
        try:
            self.writer.start()
        except BaseException:
            self._let_go()
            raise

    def shrink(self) -> None:
        """Free the device memory kept between calls, after an out-of-memory error."""
        self._lane.shrink()

    def close(self, error: BaseException | None) -> None:
        try:
            self._close(error)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Release the lock, and remove a folder that was created but received no call."""
        if self._lock is not None:
            self._lock.release()
        # without a call nothing is known, not even the width of the sites
        if self._made_folder is not None and self._stored is None:
            with contextlib.suppress(OSError):
                self._made_folder.rmdir()

    def _close(self, error: BaseException | None) -> None:
        try:
            # Without a description the caller decides which units are complete; a unit it has not ended is discarded.
            with self._turns.lock:  # another thread may be adding the rows of a call, or finish one too late
                self._turns.holder = None
                if self._unit is not None and self._unit.used.examples and self._description is not None:
                    self.end_unit()
        finally:
            self.writer.close()
        if error is None:
            self.writer.check()
            if self._description is not None and self._stored is not None:
                if self._lock is not None:
                    self._lock.check()
                commit_index(self.place, self.writer.committed)

    # calls

    def announce(self, batch: AnnouncedBatch) -> None:
        """Announce the batch of the model's next call."""
        self._announced = batch

    def begin(self, call: Call) -> None:
        self.writer.check()  # before taking the turn: after a failure nothing would return it
        if self._description is None and self._announced is None:
            raise CaptureError(
                "the model was called once more than the run has called it: by a sink, a pool or a hook, or by the "
                "model itself. Let them use a model of their own."
            )
        pending = _Pending(threading.get_ident(), call, self._announced)
        self._turns.take(pending)
        self._announced = None

    def receive(self, call: Call, index: int, value: Tensor) -> None:
        pending: _Pending = call.state
        if pending is not self._turns.holder:
            raise CaptureError(
                f"{self._sites[index].name!r} was made after another call of the model began inside this one: a store "
                "takes one call at a time. Use a second model, or capture into memory."
            )
        if value.requires_grad:  # detach creates a new tensor object, which is not free
            value = value.detach()
        if self._stored is None or pending.values is not None:
            if pending.values is None:
                pending.values = {}
            # held until the call ends, by which time the model may have modified a `module:` site's output
            pending.values[index] = value.clone() if self._sites[index].is_by_name else value
            return
        if pending.selection is None:
            self._reserve(pending, call, value)
        stored, unit, selection = self._stored[index], self._unit, pending.selection
        assert unit is not None and selection is not None
        is_plain = stored.kind == "token" and stored.dtype not in NOT_PLAIN
        wanted = (selection.num_sequences, selection.num_positions, stored.width)
        if is_plain and pending.runs is not None and value.shape == wanted:
            # fast path for most values of most runs; `_put` would do the same in many more steps
            copy_runs(unit.buffer.values[index], unit.used.rows, value, pending.runs)
        else:
            self._put(pending, index, value)

    def receive_rows(self, call: Call, index: int, rows_TD: Tensor) -> None:
        """Receive rows that are already gathered and cast."""
        call.state.packed.add(index)
        self.receive(call, index, rows_TD)

    def finish(self, call: Call) -> None:
        pending: _Pending = call.state
        try:
            with self._turns.lock:
                if pending is self._turns.holder:  # otherwise another thread has closed the probe meanwhile
                    if pending.values is not None:
                        self._establish(pending, call)
                    if not pending.is_displaced:
                        self._commit_call(pending)
        finally:
            self._turns.end(pending)
        if pending.is_displaced:
            raise CaptureError(
                "another call of the model began inside this one, from a pool or a hook: a store takes one call at a "
                "time. Let that use a model of its own."
            )

    def abandon(self, call: Call) -> None:
        if call.state is not None:
            self._turns.end(call.state)

    def _establish(self, pending: _Pending, call: Call) -> None:
        """Determine the sites' layout on disk from the first call, write `store.json`, and pack the call's rows."""
        assert pending.values is not None and self._description is not None
        self._stored = [
            measure_site(site, pending.values[index], self._pool, self.packed_dtype, index in pending.packed)
            for index, site in enumerate(self._sites)
        ]
        described = {site.name: site.describe() for site in self._stored}
        description = {**self._description, "sites": described}
        self._fingerprint = fingerprint_run(description)
        commit_description(self.place, {**description, "fingerprint": self._fingerprint})
        values, pending.values = pending.values, None
        self._reserve(pending, call, values[0])
        for index, value in values.items():
            self._put(pending, index, value)

    def _reserve(self, pending: _Pending, call: Call, value: Tensor) -> None:
        """Select the rows of a call and make room for them."""
        batch = pending.batch
        if batch is not None:
            pending.selection, pending.input_ids = batch.select(value.device), batch.input_ids
        else:
            pending.selection, pending.input_ids = select_tokens(call.context(0), value)
        needed = pending.room = room_for(pending.selection)
        unit = self._unit
        if unit is not None:
            # Compare with the initial room of the buffers: which buffer a unit gets depends on timing, and one that has
            # grown would hold more. The shard's own limits are checked as well, because a buffer limits rows or
            # examples only if it stores sites of that kind.
            wanted = unit.used.plus(needed)
            is_read = wanted.rows <= MOST_TOKENS and wanted.examples <= MOST_EXAMPLES
            fits = is_read and self._room.holds(wanted, unit.buffer.kinds)
            if batch is None and unit.used.examples and not fits:
                self.end_unit()
            elif not unit.buffer.fits(wanted):
                self._lane.fence()()  # pending copies must finish before their buffer is reallocated
                unit.buffer.grow(wanted, unit.used)
        if self._unit is None:
            self.begin_unit(self._next_unit, self._next_example, needed)
        if self._lane.is_direct and not (batch is not None and batch.num_filling):
            pending.runs = pending.selection.runs if pending.selection.index is None else None

    def _put(self, pending: _Pending, index: int, value: Tensor) -> None:
        assert self._stored is not None and self._unit is not None
        selection = pending.selection
        assert selection is not None
        site, stored, unit = self._sites[index], self._stored[index], self._unit
        if pending.batch is not None and pending.batch.num_filling:
            value = value[: -pending.batch.num_filling]
        overflow = None
        if stored.dtype == torch.float8_e4m3fn:
            overflow = pending.overflow.setdefault(index, torch.zeros((), dtype=torch.int64, device=value.device))
        start, count = unit.used.of(stored.kind), pending.room.of(stored.kind)
        target = unit.buffer.target(index, start, start + count, overflow)
        if index in pending.packed:
            rows_TD = selection.repeat_rows(value)
            if len(rows_TD) != count:
                raise CaptureError(f"{site.name!r} gave {len(rows_TD)} rows for {count} tokens.")
            produce = partial(cast_into, value=rows_TD)
        elif stored.kind == "attention":
            produce = partial(write_pairs, weights_BHSS=value, selection=selection)
        elif stored.kind == "token":
            produce = partial(write_rows, value=value, selection=selection)
        else:
            is_pooled = is_per_token(site, value)
            vectors = pool_rows(value, selection.distinct, self._pool) if is_pooled else value
            vectors = selection.repeat_vectors(vectors)
            if tuple(vectors.shape) != tuple(target.values.shape):
                raise CaptureError(
                    f"{site.name!r} gave {tuple(vectors.shape)} vectors for {count} examples of width {stored.width}."
                )
            produce = partial(cast_into, value=vectors)
        self._lane.put(index, target, produce)

    def _commit_call(self, pending: _Pending) -> None:
        unit, selection = self._unit, pending.selection
        assert unit is not None and selection is not None and pending.input_ids is not None
        batch = pending.batch
        first = self._next_example
        unit.ordinals.extend(batch.ordinals if batch else range(first, first + len(selection.lengths)))
        unit.lengths.extend(selection.lengths)
        unit.input_ids.append(pending.input_ids)
        if batch is not None and batch.kept is not None:
            unit.positions.extend(batch.kept)
        unit.used = unit.used.plus(pending.room)
        if pending.overflow:
            with self._lane.joined():
                unit.add_clipped(pending.overflow)
        if batch is not None and batch.records is not None:
            unit.records.extend(batch.records)
        self._next_example += len(selection.lengths)

    # units

    def begin_unit(self, number: int, first_example: int, room: Room, num_truncated: int = 0) -> None:
        """Open a unit with at least this much room, waiting for a free buffer."""
        assert self._stored is not None
        if self.buffers is None:
            self.buffers = self._make_buffers(room)
        buffer = self.buffers.acquire(self.writer.check)
        buffer.grow(room)
        self._unit = OpenUnit(number, first_example, buffer, num_truncated)

    def end_unit(self) -> None:
        """Seal the open unit and hand it to the writer."""
        unit, stored = self._unit, self._stored
        assert unit is not None and stored is not None and self.buffers is not None
        self._unit = None
        self._next_unit = unit.number + 1
        with self._lane.joined():
            clipped = unit.count_clipped(stored)
        header = ShardHeader(
            unit=unit.number,
            num_examples=unit.used.examples,
            num_tokens=unit.used.rows,
            first_example=unit.first_example,
            fingerprint=self._fingerprint,
            num_truncated=unit.num_truncated,
            nonfinite=clipped,
        )
        release = partial(self.buffers.release, unit.buffer)
        try:
            if self._lock is not None:
                self._lock.check()
            self.writer.submit(ShardJob(header, list_tensors(unit, stored), self._lane.fence(), release))
        except BaseException:
            release()
            raise

    def _make_buffers(self, first: Room) -> BufferPool:
        """Create buffers of the shard size, divided between rows, examples and pairs as in the first batch."""
        assert self._stored is not None
        size: dict[str, int] = {"token": 0, "example": 0, "attention": 0}
        for site in self._stored:
            size[site.kind] += site.bytes_per_vector
        pairs_per_row = max(1.0, first.pairs / max(1, first.rows))  # each token forms a pair with itself
        # Texts average more than one token, so room for one vector per row is enough for one per example.
        rows = int(self._shard_bytes / (size["token"] + size["example"] + size["attention"] * pairs_per_row))
        pairs = int(rows * pairs_per_row)
        room = self._room = Room(*map(max, first, Room(min(rows, MOST_TOKENS), min(rows, MOST_EXAMPLES), pairs)))
        make = partial(HostBuffer, self._stored, room, self._lane.pinned)
        return BufferPool(make, self.writer.num_threads + 1, self._lane.is_busy)
