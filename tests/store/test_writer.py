"""The writer thread: order, failures in the caller's thread, values counted, buffers always given back."""

import contextlib
import linecache
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from faults import check_shards
from layerprobe.capture.staging import NO_ROOM, BufferPool, HostBuffer
from layerprobe.errors import NonFiniteError, StoreError
from layerprobe.store.description import StoredSite
from layerprobe.store.durable import commit_file
from layerprobe.store.format import read_header
from layerprobe.store.headers import ShardHeader
from layerprobe.store.writer import ShardJob, ShardWriter


def make_job(unit: int, rows: Tensor | None = None, released: list[int] | None = None, **changes: Any) -> ShardJob:
    rows = torch.ones(2, 3) if rows is None else rows
    tensors = [
        ("example", torch.tensor([unit])),
        ("offsets", torch.tensor([0, len(rows)])),
        ("input_ids", torch.arange(len(rows))),
        ("layers.0", rows),
    ]
    header = ShardHeader(unit, 1, len(rows), unit, "f" * 32, **changes)
    done = [] if released is None else released
    return ShardJob(header, tensors, lambda: None, lambda: done.append(unit))


def write_all(writer: ShardWriter, *jobs: ShardJob) -> None:
    writer.start()
    for job in jobs:
        writer.submit(job)
    writer.close()


def test_shards_are_committed_in_order_and_buffers_given_back(tmp_path: Path) -> None:
    released: list[int] = []
    writer = ShardWriter(tmp_path)
    write_all(writer, *(make_job(unit, released=released) for unit in range(5)))
    writer.check()
    assert [header.unit for header in writer.committed] == released == list(range(5))
    assert writer.num_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert [read_header(tmp_path / header.file).unit for header in writer.committed] == list(range(5))
    assert not [thread for thread in threading.enumerate() if thread.name == "layerprobe-writer"]


@pytest.mark.parametrize("is_better", [True, False])
def test_a_disk_is_tried_once_before_the_first_shard_and_written_the_better_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_better: bool
) -> None:
    said: list[object] = []

    def probe(folder: Path) -> bool:
        said.append(folder)
        return is_better

    def commit(path: Path, pieces: Any, is_direct: bool) -> None:
        said.append(is_direct)
        commit_file(path, pieces, is_direct)

    monkeypatch.setattr("layerprobe.store.places.is_direct_better", probe)
    monkeypatch.setattr("layerprobe.store.places.commit_file", commit)
    writer = ShardWriter(tmp_path, probes_disk=True)
    write_all(writer, *map(make_job, range(3)))
    writer.check()
    assert said == [tmp_path, *[is_better] * 3] and check_shards(tmp_path) == 3
    said.clear()
    write_all(ShardWriter(tmp_path, num_threads=3, probes_disk=True))
    assert said == [tmp_path]


def test_several_writers_commit_side_by_side(tmp_path: Path) -> None:
    meeting = threading.Barrier(2, timeout=60)

    def meet(commit: Callable[[], int]) -> int:
        meeting.wait()
        return commit()

    released: list[int] = []
    writer = ShardWriter(tmp_path, attempt=meet, num_threads=2)
    write_all(writer, *(make_job(unit, released=released) for unit in range(6)))
    writer.check()
    assert sorted(header.unit for header in writer.committed) == sorted(released) == list(range(6))
    assert writer.num_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name == "layerprobe-writer"]


def wait_for_failure(writer: ShardWriter) -> None:
    """Come back once a thread of the writer has failed."""
    with contextlib.suppress(StoreError):
        for _ in range(6000):
            writer.check()
            time.sleep(0.01)
        raise AssertionError("no thread has failed")


def fail_too(commit: Callable[[], int]) -> int:
    raise RuntimeError("cable 1 is out")


def find_room(commit: Callable[[], int]) -> int:
    """As after a wait for it."""
    return commit()


@pytest.mark.parametrize("then", [fail_too, find_room])
def test_of_several_writers_the_first_failure_is_told_and_every_buffer_given_back(
    tmp_path: Path, then: Callable[[Callable[[], int]], int]
) -> None:
    meeting, broken = threading.Barrier(2, timeout=60), threading.Lock()

    def fail(commit: Callable[[], int]) -> int:
        meeting.wait()
        if broken.acquire(blocking=False):
            raise RuntimeError("cable 0 is out")
        wait_for_failure(writer)
        return then(commit)

    released: list[int] = []
    writer = ShardWriter(tmp_path, attempt=fail, num_threads=2)
    write_all(writer, *(make_job(unit, released=released) for unit in range(2)))
    with pytest.raises(StoreError, match="the writer stopped: cable 0 is out"):
        writer.check()
    assert sorted(released) == [0, 1] and not writer.committed and not list(tmp_path.iterdir())


def test_where_the_system_has_no_thread_for_a_writer_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def start_two(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    writer = ShardWriter(tmp_path, num_threads=4)
    with pytest.raises(StoreError, match=r"no thread for writer 3\. Ask for fewer writers") as caught:
        writer.start()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert len(started) == 2 and not any(thread.is_alive() for thread in started)


def test_a_job_is_written_only_when_its_values_are_ready(tmp_path: Path) -> None:
    rows = torch.zeros(2, 3)
    job = make_job(0, rows)

    def arrive() -> None:
        rows.fill_(4)

    write_all(ShardWriter(tmp_path), ShardJob(job.header, job.tensors, arrive, job.release))
    entry = read_header(tmp_path / "shard-000000.safetensors").tensors["layers.0"]
    raw = (tmp_path / "shard-000000.safetensors").read_bytes()[entry.start : entry.stop]
    assert torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist() == [4.0] * 6


def test_a_failure_of_the_thread_is_raised_in_the_caller_with_its_cause(tmp_path: Path) -> None:
    released: list[int] = []
    writer = ShardWriter(tmp_path / "missing")
    writer.start()
    writer.submit(make_job(0, released=released))
    writer.close()
    with pytest.raises(StoreError, match=r"shard-000000\.safetensors: cannot be written") as caught:
        writer.check()
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(StoreError, match="cannot be written"):
        writer.submit(make_job(1, released=released))
    assert released == [0]


def test_an_unexpected_failure_names_the_folder_and_keeps_its_cause(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("the copy engine broke")

    released: list[int] = []
    job = make_job(0, released=released)
    writer = ShardWriter(tmp_path)
    write_all(writer, ShardJob(job.header, job.tensors, fail, job.release), make_job(1, released=released))
    with pytest.raises(StoreError, match="the writer stopped: the copy engine broke") as caught:
        writer.check()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert released == [0, 1]
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_the_last_shards_are_waited_for_leaves_no_thread_that_writes(tmp_path: Path) -> None:
    """The lock of the folder is given back next: a shard that came after would be in another run's way."""
    own = threading.get_ident()

    def interrupt() -> None:
        # once `close` has asked the thread to end, behind the second job
        while writer._jobs.qsize() < 2:
            time.sleep(0.01)
        signal.pthread_kill(own, signal.SIGINT)
        while writer._error is None:
            time.sleep(0.01)

    released: list[int] = []
    job = make_job(0, released=released)
    writer = ShardWriter(tmp_path)
    writer.start()
    writer.submit(ShardJob(job.header, job.tensors, interrupt, job.release))
    writer.submit(make_job(1, released=released))
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "layerprobe-writer"]
    assert released == [0, 1] and not list(tmp_path.iterdir()) and not writer.committed


def interrupt_at(number: int, action: Callable[[], object], settle: Callable[[], object]) -> bool:
    """Do something with Ctrl-C at one of the lines that it runs, its libraries' too; gives whether it came so far."""
    lines = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal lines
        file = frame.f_code.co_filename
        if Path(file).stem not in ("writer", "buffers", "threading", "queue"):
            return None
        # a tracer can raise between the end of a `with` and its exit, where no signal is taken
        if event == "line" and not linecache.getline(file, frame.f_lineno).lstrip().startswith("with "):
            lines += 1
            if lines == number:
                sys.settrace(None)
                settle()
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def end_in_time(action: Callable[[], object]) -> None:
    """Do something that may never end, in a thread that nobody waits for then."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for ever"


def test_ctrl_c_at_any_line_leaves_nobody_waiting_for_ever(tmp_path: Path) -> None:
    """Of another thread the line may let go just before: then that one has done its part when Ctrl-C comes."""

    def is_interrupted(number: int) -> bool:
        writer, released = ShardWriter(tmp_path / str(number)), list[int]()
        buffers: BufferPool = BufferPool(lambda: HostBuffer([], NO_ROOM, False), 1)

        def write_one() -> None:
            writer.start()
            buffer = buffers.acquire(writer.check)
            job = make_job(0)
            writer.submit(replace(job, release=lambda: [buffers.release(buffer), released.append(0)]))
            buffers.release(buffers.acquire(writer.check))
            writer.close()

        def let_the_thread_work() -> None:
            if not released:
                time.sleep(0.01)

        (tmp_path / str(number)).mkdir()
        is_cut = interrupt_at(number, write_one, let_the_thread_work)
        end_in_time(writer.close)
        end_in_time(partial(buffers.acquire, lambda: None))
        # one that Ctrl-C kept from starting stays in the list
        left = [thread for thread in threading.enumerate() if thread.name == "layerprobe-writer"]
        assert not any(thread.is_alive() for thread in left)
        for thread in left:
            thread.name = "never started"
        return is_cut

    number = 1
    while is_interrupted(number):
        number += 1
    assert number > 50 and check_shards(tmp_path / str(number)) == 1


@pytest.mark.parametrize("changes", [{"num_examples": 2}, {"num_tokens": 3}])
def test_a_shard_that_nobody_could_read_is_not_written(tmp_path: Path, changes: dict[str, int]) -> None:
    released: list[int] = []
    job = make_job(0, released=released)
    writer = ShardWriter(tmp_path)
    write_all(writer, replace(job, header=replace(job.header, **changes)))
    with pytest.raises(
        StoreError, match=r"not written, since nobody could read it: '(example|input_ids)' is torch\.int64"
    ):
        writer.check()
    assert released == [0] and not list(tmp_path.iterdir())


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "dtype", "count"),
    [
        ([[1.0, 2.0]], torch.float32, 0),
        ([[NAN, INF], [-INF, 0.0]], torch.float32, 3),
        ([[70000.0, 1.0]], torch.float16, 1),
        ([[NAN, 1.0]], torch.bfloat16, 1),
        ([[NAN, 448.0]], torch.float8_e4m3fn, 1),
        ([], torch.float32, 0),
    ],
)
def test_values_that_are_not_finite_are_counted(
    tmp_path: Path, values: list[list[float]], dtype: torch.dtype, count: int
) -> None:
    rows = torch.tensor(values).reshape(-1, 2).to(dtype)
    writer = ShardWriter(tmp_path)
    write_all(writer, make_job(0, rows))
    writer.check()
    expected = {"layers.0": count} if count else {}
    assert read_header(tmp_path / "shard-000000.safetensors").nonfinite == expected == writer.committed[0].nonfinite


def test_values_clipped_by_a_cast_are_added_to_those_found(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    write_all(writer, make_job(0, torch.tensor([[NAN]]), nonfinite={"layers.0": 2}))
    assert writer.committed[0].nonfinite == {"layers.0": 3}


def test_the_error_policy_writes_no_shard_that_holds_such_values(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "error")
    write_all(writer, make_job(0), make_job(1, torch.tensor([[INF, NAN]])), make_job(2))
    with pytest.raises(NonFiniteError, match=r"shard-000001.*2 at 'layers\.0'.*wider dtype"):
        writer.check()
    assert [file.name for file in tmp_path.iterdir()] == ["shard-000000.safetensors"]


def test_a_thread_that_dies_between_two_jobs_is_told_and_nobody_waits_for_it(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.start()
    buffers: BufferPool = BufferPool(lambda: HostBuffer([], NO_ROOM, False), 1)
    held = buffers.acquire(writer.check)
    first = make_job(0)
    # what is raised as a job is left ends the thread, and the buffer is never given back
    writer.submit(ShardJob(first.header, first.tensors, first.wait_ready, partial(sys.exit, "gone")))
    with pytest.raises(StoreError, match=r"the writer stopped: gone\. What was committed before stays readable"):
        buffers.acquire(writer.check)
    buffers.release(held)
    writer.close()
    assert [header.unit for header in writer.committed] == [0] and check_shards(tmp_path) == 1


def test_a_site_knows_its_bytes_on_disk_with_its_scale() -> None:
    assert StoredSite("layers.0", "token", torch.float16, 384).bytes_per_vector == 768
    assert StoredSite("layers.0", "token", torch.int8, 384).bytes_per_vector == 388


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64]
)
def test_every_kind_of_value_is_told_as_torch_tells_it(tmp_path: Path, dtype: torch.dtype) -> None:
    """All bit patterns of two bytes, as the top of each dtype's own."""
    size = dtype.itemsize
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8).view(-1, 2)
    raw = torch.zeros(1 << 16, max(2, size), dtype=torch.uint8)
    raw[:, -2:] = patterns
    values = raw.view(dtype)
    writer = ShardWriter(tmp_path)
    write_all(writer, make_job(0, values))
    expected = int((~torch.isfinite(values.float() if size == 1 else values)).sum())
    assert writer.committed[0].nonfinite == ({"layers.0": expected} if expected else {})
    assert bool(expected) == dtype.is_floating_point
