"""Buffers and lanes: nothing is overwritten on its way, and waiting is counted.

`DelayedStreams` is a device on which no copy happens before somebody waits for it, in another thread if need be: a
stage reused or a buffer handed on too early shows as wrong data.
"""

import gc
import re
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import layerprobe as lp
from layerprobe.capture import packing, probe
from layerprobe.capture.casting import cast_into
from layerprobe.capture.staging import (
    BufferPool,
    DirectLane,
    HostBuffer,
    Room,
    StagedLane,
    fetch,
    hold_stages,
    make_lane,
    send,
)
from layerprobe.capture.streams import PlainCopies
from layerprobe.capture.target import Target
from layerprobe.capture.units import AnnouncedBatch
from layerprobe.errors import StoreError
from layerprobe.store.description import StoredSite
from layerprobe.store.writer import ShardWriter

CPU = torch.device("cpu")


class DelayedStreams:
    """Queue every copy; do it, and those before it, when its event is waited for or held."""

    def __init__(self, holds: bool = True) -> None:
        self.num_copies = 0
        self._queue: list[tuple[int, Tensor, Tensor]] = []
        self._holds = holds
        self.has_computed = True
        self._lock = threading.Lock()

    def record(self) -> str:
        return "made"

    def hold(self, event: int | str) -> None:
        if self._holds and isinstance(event, int):  # the model has one stream here, which never waits for itself
            self.wait(event)

    def copy(self, target: Tensor, source: Tensor, after: Any) -> int:
        assert after == "made"
        with self._lock:
            self.num_copies += 1
            self._queue.append((self.num_copies, target, source))
            return self.num_copies

    def wait(self, event: int) -> None:
        with self._lock, torch.no_grad():
            while self._queue and self._queue[0][0] <= event:
                _, target, source = self._queue.pop(0)
                target.copy_(source)

    def has_passed(self, event: str) -> bool:
        assert event == "made"
        return self.has_computed


def _site(
    dtype: torch.dtype = torch.float32, kind: str = "token", name: str = "layers.0", width: int = 3
) -> StoredSite:
    return StoredSite(name, kind, dtype, width)


def _fill(lane: StagedLane, buffer: HostBuffer, values: list[Tensor]) -> None:
    row = 0
    for value in values:
        lane.put(0, buffer.target(0, row, row + len(value)), lambda target, value=value: cast_into(target, value))
        row += len(value)


VALUES = [torch.full((length, 3), float(number + 1)) for number, length in enumerate([2, 5, 1, 4, 7, 3, 7, 2])]


def test_staged_values_arrive_whole_whatever_the_delay() -> None:
    lane, buffer = StagedLane(CPU, DelayedStreams(), pinned=False), HostBuffer([_site()], Room(31, 8), pinned=False)
    _fill(lane, buffer, VALUES)
    assert not buffer.target(
        0, 29, 31
    ).values.any()  # the last copy has not happened: the test would see a missing wait
    lane.fence()()
    assert torch.equal(buffer.target(0, 0, 31).values, torch.cat(VALUES))


def test_delayed_streams_show_a_stage_that_is_reused_too_early() -> None:
    lane = StagedLane(CPU, DelayedStreams(holds=False), pinned=False)
    buffer = HostBuffer([_site()], Room(31, 8), pinned=False)
    _fill(lane, buffer, VALUES)
    lane.fence()()
    assert not torch.equal(buffer.target(0, 0, 31).values, torch.cat(VALUES))


def test_staged_int8_rows_arrive_with_their_scales() -> None:
    lane, buffer = (
        StagedLane(CPU, DelayedStreams(), pinned=False),
        HostBuffer([_site(torch.int8)], Room(31, 8), pinned=False),
    )
    _fill(lane, buffer, VALUES)
    lane.fence()()
    expected = Target(torch.empty(31, 3, dtype=torch.int8), torch.empty(31))
    cast_into(expected, torch.cat(VALUES))
    got = buffer.target(0, 0, 31)
    assert expected.scale is not None
    assert got.scale is not None
    assert torch.equal(got.values, expected.values)
    assert torch.equal(got.scale, expected.scale)


def test_lane_keeps_two_stages_per_site_and_no_more() -> None:
    lane, buffer = StagedLane(CPU, DelayedStreams(), pinned=False), HostBuffer([_site()], Room(40, 8), pinned=False)
    made: list[int] = []
    for _ in range(10):
        lane.put(0, buffer.target(0, 0, 4), lambda target: made.append(target.values.data_ptr()))
    assert len(set(made)) == 2
    assert made[::2] == made[:1] * 5


def test_stage_that_is_too_small_is_gone_before_a_larger_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at once might not fit."""
    lane, buffer = StagedLane(CPU, DelayedStreams(), pinned=False), HostBuffer([_site()], Room(80, 8), pinned=False)
    alive: list[weakref.ref[Tensor]] = []
    made: list[int] = []
    make_stage = StagedLane._make_stage

    def watch(lane: StagedLane, target: Target) -> Any:
        gc.collect()
        made.append(sum(one() is not None for one in alive))
        stage = make_stage(lane, target)
        alive.append(weakref.ref(stage.values))
        return stage

    monkeypatch.setattr(StagedLane, "_make_stage", watch)
    for count in (4, 4, 40, 40):
        lane.put(0, buffer.target(0, 0, count), partial(cast_into, value=torch.ones(count, 3)))
    assert made == [0, 1, 1, 1]
    lane.fence()()
    assert torch.equal(buffer.target(0, 0, 40).values, torch.ones(40, 3))


def test_stage_has_room_for_batches_that_are_a_little_larger() -> None:
    lane, buffer = StagedLane(CPU, DelayedStreams(), pinned=False), HostBuffer([_site()], Room(80, 8), pinned=False)
    places: list[int] = []
    for count in (40, 40, 45, 41):
        lane.put(0, buffer.target(0, 0, count), lambda target: places.append(target.values.data_ptr()))
    assert places[2:] == places[:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("kind", ["token", "example", "attention"])
def test_what_stages_take_is_known_before_there_are_any(dtype: torch.dtype, kind: str) -> None:
    if (kind, dtype) == ("attention", torch.int8):
        return  # refused
    sites, room = [_site(dtype, kind), _site(dtype, kind, "layers.1", 5)], Room(21, 9, 171)
    lane, buffer = StagedLane(CPU, PlainCopies(), pinned=False), HostBuffer(sites, room, pinned=False)
    for key, _ in enumerate([*sites, *sites]):
        lane.put(key % 2, buffer.target(key % 2, 0, room.of(kind)), lambda _: None)
    stages = [stage for made in lane._stages.values() for stage in made]
    taken = [*(stage.values for stage in stages), *(stage.scale for stage in stages if stage.scale is not None)]
    assert hold_stages(torch.device("meta"), sites, room).numel() == sum(tensor.nbytes for tensor in taken)
    assert len(stages) == 4 and not hold_stages(CPU, sites, room).numel()  # there values go to the buffer itself


def test_lane_gives_back_its_stages_once_their_values_have_arrived() -> None:
    lane, buffer = StagedLane(CPU, DelayedStreams(), pinned=False), HostBuffer([_site()], Room(40, 8), pinned=False)
    kept: list[weakref.ref[Tensor]] = []

    def produce(target: Target) -> None:
        target.values.fill_(2.0)
        kept.append(weakref.ref(target.whole))

    lane.put(0, buffer.target(0, 0, 4), produce)
    lane.shrink()
    gc.collect()
    assert kept[0]() is None
    assert torch.equal(buffer.target(0, 0, 4).values, torch.full((4, 3), 2.0))
    lane.put(0, buffer.target(0, 4, 8), produce)  # and goes on
    lane.fence()()
    assert torch.equal(buffer.target(0, 0, 8).values, torch.full((8, 3), 2.0))


def test_a_copy_to_a_device_that_is_not_cuda_is_over_when_it_is_made() -> None:
    """On mps a copy that is not waited for reads what has come into the memory of its source by then."""
    seen: list[tuple[str, bool]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((func.overloadpacket.__name__, (kwargs or {}).get("non_blocking") or False))
            return func(*args, **(kwargs or {}))

    source = torch.arange(5)
    with Watch():
        sent = send(source, torch.device("meta"))
    assert sent.device.type == "meta" and seen == [("_to_copy", False)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_sent_does_not_wait_for_the_model() -> None:
    large, done = torch.ones(8192, 8192, device="cuda"), torch.cuda.Event()
    # the first time pins memory and starts the library of products, which wait for the device on their own account
    send(torch.arange(1 << 16), torch.device("cuda"))
    torch.cuda.synchronize()
    large = large @ large
    torch.cuda.synchronize()
    for _ in range(20):
        large = large @ large
    done.record()
    sent = send(torch.arange(1 << 16), torch.device("cuda"))
    assert not done.query()
    assert torch.equal(sent.cpu(), torch.arange(1 << 16))


def test_what_is_fetched_is_on_the_host_and_the_same() -> None:
    given = [torch.arange(6).view(2, 3), torch.tensor([[1.0, 0.0]])]
    assert all(torch.equal(one, other) for one, other in zip(fetch(given), given, strict=True))
    assert fetch([]) == []


def test_fence_before_anything_was_put_waits_for_nothing() -> None:
    StagedLane(CPU, DelayedStreams()).fence()()
    DirectLane().fence()()


def test_plain_copies_are_over_when_they_return() -> None:
    lane, buffer = StagedLane(CPU, PlainCopies(), pinned=False), HostBuffer([_site()], Room(31, 8), pinned=False)
    _fill(lane, buffer, VALUES)
    assert torch.equal(buffer.target(0, 0, 31).values, torch.cat(VALUES))
    lane.fence()()


def test_lane_on_the_cpu_makes_values_in_the_buffer_itself() -> None:
    lane = make_lane(CPU)
    assert isinstance(lane, DirectLane)
    assert not lane.pinned
    buffer = HostBuffer([_site()], Room(4, 4), lane.pinned)
    seen: list[int] = []
    lane.put(0, buffer.target(0, 1, 3), lambda target: seen.append(target.values.data_ptr()))
    assert seen == [buffer.target(0, 1, 3).values.data_ptr()]


def test_lane_elsewhere_waits_for_each_copy() -> None:
    lane = make_lane(torch.device("meta"))
    assert isinstance(lane, StagedLane)
    assert not lane.pinned


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_stages_arrive_whole() -> None:
    device = torch.device("cuda")
    lane = make_lane(device)
    assert lane.pinned
    buffer = HostBuffer([_site()], Room(31, 8), pinned=True)
    assert isinstance(lane, StagedLane)
    _fill(lane, buffer, [value.to(device) for value in VALUES])
    lane.fence()()
    assert torch.equal(buffer.target(0, 0, 31).values, torch.cat(VALUES))


@pytest.mark.parametrize("dtype", ["float16", "int8", None])
@pytest.mark.parametrize("pool", [None, "mean"])
def test_store_behind_delayed_copies_holds_the_same_bytes(
    make_bert: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, dtype: str | None, pool: str | None
) -> None:
    model = make_bert()
    monkeypatch.setattr(probe, "DEFAULT_SHARD_BYTES", 1000)
    batches = [torch.randint(1, 100, (2, 3 + number % 5)) for number in range(12)]

    def run(folder: Any) -> list[bytes]:
        with torch.no_grad(), lp.Probe(model, ["layers.*", "pooler"], to=folder, dtype=dtype, pool=pool):
            for input_ids in batches:
                model(input_ids)
        return [path.read_bytes() for path in sorted(folder.glob("shard-*"))]

    expected = run(tmp_path / "direct")
    monkeypatch.setattr(packing, "make_lane", lambda device: StagedLane(device, DelayedStreams(), pinned=False))
    assert run(tmp_path / "delayed") == expected
    assert len(expected) > 2


def test_buffer_that_grows_waits_for_what_is_on_its_way(
    tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "make_lane", lambda device: StagedLane(device, DelayedStreams(), pinned=False))
    stored = [_site(name="layers.2", width=32)]
    sink = packing.StoreSink(
        tmp_path,
        ShardWriter(tmp_path),
        pool=None,
        dtype=None,
        device=CPU,
        shard_bytes=1,
        fingerprint="0",
        stored=stored,
    )
    batches = [torch.randint(1, 100, (2, length)) for length in (3, 5, 2)]
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.2", to=sink):
        sink.begin_unit(0, 0, Room(1, 1))  # too small for any of them
        for number, ids in enumerate(batches):
            ordinals, lengths = [2 * number, 2 * number + 1], [ids.shape[1]] * 2
            sink.announce(AnnouncedBatch(ordinals, lengths, ids.shape[1], ids.flatten()))
            tiny_bert(ids)
        sink.end_unit()
    with torch.no_grad():
        expected = torch.cat([tiny_bert(ids).last_hidden_state.flatten(0, 1) for ids in batches])
    assert torch.equal(load_file(tmp_path / "shard-000000.safetensors")["layers.2"], expected)


# host buffers


def test_buffer_has_room_per_kind() -> None:
    buffer = HostBuffer([_site(), _site(kind="example", name="pooler", width=5)], Room(6, 2), pinned=False)
    assert buffer.target(0, 0, 6).values.shape == (6, 3)
    assert buffer.target(1, 0, 2).values.shape == (2, 5)
    assert buffer.fits(Room(6, 2))
    assert not buffer.fits(Room(7, 2))
    assert not buffer.fits(Room(6, 3))


def test_buffer_counts_only_what_it_holds() -> None:
    assert HostBuffer([_site()], Room(6, 2), pinned=False).fits(Room(6, 1000))
    assert HostBuffer([_site(kind="example")], Room(6, 2), pinned=False).fits(Room(1000, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_grown_buffer_keeps_what_is_used(dtype: torch.dtype) -> None:
    buffer = HostBuffer([_site(dtype), _site(dtype, "example", "pooler")], Room(4, 2), pinned=False)
    torch.manual_seed(0)
    rows, vectors = torch.randn(3, 3), torch.randn(2, 3)
    cast_into(buffer.target(0, 0, 3), rows)
    cast_into(buffer.target(1, 0, 2), vectors)
    before = [buffer.target(0, 0, 3), buffer.target(1, 0, 2)]
    kept = [(t.values.clone(), None if t.scale is None else t.scale.clone()) for t in before]
    buffer.grow(Room(10, 2), Room(3, 2))
    assert (buffer.room.rows, buffer.room.examples) == (10, 2)
    buffer.grow(Room(5, 7), Room(3, 2))
    assert (buffer.room.rows, buffer.room.examples) == (10, 7)
    for index, (values, scale) in enumerate(kept):
        target = buffer.target(index, 0, len(values))
        assert torch.equal(target.values, values)
        if scale is not None:
            assert target.scale is not None
            assert torch.equal(target.scale, scale)


def test_buffer_that_fits_is_not_moved() -> None:
    buffer = HostBuffer([_site()], Room(4, 2), pinned=False)
    place = buffer.target(0, 0, 4).values.data_ptr()
    buffer.grow(Room(4, 100))
    assert buffer.target(0, 0, 4).values.data_ptr() == place


def test_buffer_made_under_inference_mode_is_written_from_any_mode() -> None:
    with torch.inference_mode():
        buffer = HostBuffer([_site(torch.int8)], Room(4, 4), pinned=False)
        cast_into(buffer.target(0, 0, 2), torch.ones(2, 3))
    cast_into(buffer.target(0, 2, 4), torch.ones(2, 3))
    assert not buffer.target(0, 0, 4).values.is_inference()


# the pool of buffers


def _pass() -> None:
    return None


def _make_buffer() -> HostBuffer:
    return HostBuffer([_site()], Room(1, 1), pinned=False)


def test_a_buffer_is_made_only_where_none_is_free() -> None:
    made: list[HostBuffer] = []

    def make() -> HostBuffer:
        made.append(_make_buffer())
        return made[-1]

    pool = BufferPool(make, 2)
    first = pool.acquire(_pass)
    pool.release(first)
    assert pool.acquire(_pass) is first
    assert pool.acquire(_pass) is not first
    assert len(made) == 2


def test_a_large_buffer_begins_with_zeros_and_takes_values() -> None:
    rows = 1 << 20
    target = HostBuffer([_site(width=4)], Room(rows, 1), pinned=False).target(0, 0, rows)
    assert not target.values.any()
    target.values.fill_(3)
    assert bool((target.values == 3).all())


def test_caller_waits_for_a_buffer_and_the_wait_is_counted() -> None:
    pool = BufferPool(_make_buffer, 1)
    buffer = pool.acquire(_pass)
    stalled_before, asked, got = pool.stalled_s, threading.Event(), []
    # `check` runs under the pool's lock, which is free again only once the caller waits
    thread = threading.Thread(target=lambda: got.append(pool.acquire(asked.set)))
    thread.start()
    assert asked.wait(30)
    pool.release(buffer)
    thread.join(30)
    assert got == [buffer]
    assert pool.stalled_s > stalled_before


def test_wait_for_a_device_that_computes_is_no_stall() -> None:
    """The host of a GPU runs ahead, and waits for a buffer that the GPU has yet to fill."""
    streams = DelayedStreams()
    lane = StagedLane(CPU, streams, pinned=False)
    assert not lane.is_busy()
    lane.put(0, _make_buffer().target(0, 0, 1), lambda target: cast_into(target, torch.ones(1, 3)))
    assert not lane.is_busy()
    streams.has_computed = False
    looked, num_looks = threading.Event(), 0

    def look() -> bool:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 3:  # time and again, since it may be idle by now
            looked.set()
        return lane.is_busy()

    pool = BufferPool(_make_buffer, 1, look)
    buffer, got = pool.acquire(_pass), []
    thread = threading.Thread(target=lambda: got.append(pool.acquire(_pass)))
    thread.start()
    assert looked.wait(30)
    pool.release(buffer)
    thread.join(30)
    assert got == [buffer]
    assert pool.stalled_s == 0


def test_wait_counts_as_a_stall_from_when_the_device_has_nothing_to_do() -> None:
    answers, idle = iter([True, True, False]), threading.Event()

    def look() -> bool:
        if is_busy := next(answers, False):
            return is_busy
        idle.set()
        return False

    pool = BufferPool(_make_buffer, 1, look)
    buffer = pool.acquire(_pass)
    thread = threading.Thread(target=lambda: pool.acquire(_pass))
    thread.start()
    # set under the pool's lock, which is free again only once the caller waits
    assert idle.wait(30)
    assert pool.stalled_s == 0
    pool.release(buffer)
    thread.join(30)
    assert pool.stalled_s > 0


def test_lanes_that_make_values_at_once_are_never_busy() -> None:
    assert not DirectLane().is_busy()
    lane = StagedLane(CPU, PlainCopies(), pinned=False)
    lane.put(0, _make_buffer().target(0, 0, 1), lambda target: cast_into(target, torch.ones(1, 3)))
    assert not lane.is_busy()


def test_failure_of_the_writer_is_raised_in_the_caller_that_waits() -> None:
    pool = BufferPool(_make_buffer, 1)
    buffer = pool.acquire(_pass)
    asked, failed, raised = threading.Event(), threading.Event(), []

    def check() -> None:
        asked.set()
        if failed.is_set():
            raise StoreError("the writer stopped")

    def wait() -> None:
        with pytest.raises(StoreError, match="the writer stopped") as caught:
            pool.acquire(check)
        raised.append(caught.value)

    thread = threading.Thread(target=wait)
    thread.start()
    assert asked.wait(30)
    failed.set()
    pool.release(buffer)
    thread.join(30)
    assert len(raised) == 1


def test_a_buffer_of_a_megabyte_is_private_and_begins_with_a_page() -> None:
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("only Linux tells")
    rows = (1 << 20) // (64 * _site(width=64).dtype.itemsize)
    values = HostBuffer([_site(width=64)], Room(rows, 1), pinned=False).target(0, 0, 1).values
    address, found, inside = values.data_ptr(), "", False
    assert address % 4096 == 0, "it would be written through a copy"
    for line in smaps.read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
            found = match[3] if inside else found
            continue
        if line.startswith("VmFlags:") and inside:
            assert found == "rw-p"
            # memory that is not at hand anyway is dear in large pages
            assert "hg" not in line.split()
            return
    raise AssertionError("the buffer is in no mapping")


def test_a_buffer_that_cannot_be_made_is_asked_for_again() -> None:
    attempts: list[int] = []

    def make() -> HostBuffer:
        attempts.append(1)
        if len(attempts) == 1:
            raise MemoryError
        return _make_buffer()

    pool = BufferPool(make, 1)
    with pytest.raises(MemoryError):
        pool.acquire(_pass)
    assert pool.acquire(_pass) is not None
