"""Room on the disk: the exact bytes of a shard are kept before it is computed, and a full disk loses nothing."""

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from faults import FaultySystem, Step, check_shards, fail
from layerprobe.cli.views import describe_status
from layerprobe.errors import SpaceError
from layerprobe.extract import engine, space
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.extract.run import run_extraction
from layerprobe.extract.space import RoomKeeper
from layerprobe.models import LoadedModel
from layerprobe.store import durable, places, progress, writer
from layerprobe.store.progress import StoreStatus, read_status

OPTIONS = ExtractOptions(shard_bytes=10_000)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fill(disk: Path, spare: int) -> Path:
    """Take all room of a disk but so much."""
    filler = disk / "filler"
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - spare)
    return filler


SITES: dict[str, dict[str, Any]] = {
    "rows": {},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "int8"},
    "float8": {"dtype": "float8_e4m3fn"},
    "pooled": {"pool": "mean"},
    "pooled int8": {"pool": "mean", "dtype": "int8"},
    "attention": {"sites": ["layers.*.attention.weights", "layers.0"], "dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", SITES)
def test_what_is_reserved_is_what_the_shard_takes(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    reserved: dict[str, int] = {}

    def note(path: Path, size: int) -> None:
        reserved[path.name] = size
        durable.reserve_file(path, size)

    monkeypatch.setattr(space, "reserve_file", note)
    records = [{"text": text, "n": n, "中": "文"} for n, text in enumerate(texts)]
    lp.extract(tiny, records, tmp_path / "acts", shard_size=3_000, **SITES[kind])
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "acts").glob("shard-*")}
    assert sizes.keys() == reserved.keys() and len(sizes) > 1
    for name, size in sizes.items():
        # the digits of counts of what is not finite, an entry per tensor, may take one more block of padding
        assert 0 <= reserved[name] - size <= 4096, name


@pytest.mark.parametrize("kind", SITES)
def test_the_values_of_a_shard_begin_with_a_block_and_records_end_it(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, kind: str
) -> None:
    records = [{"text": text, "n": n} for n, text in enumerate(texts)]
    store = lp.extract(tiny, records, tmp_path / "acts", shard_size=3_000, **SITES[kind])
    for shard in store.iter_shards():
        tensors = shard.header.tensors
        order = sorted(tensors, key=lambda name: (tensors[name].start, tensors[name].stop))
        assert tensors[next(name for name in order if name in store.sites)].start % 4096 == 0
        assert order[-1] == "records"


def test_a_count_of_what_is_not_finite_fits_into_what_is_reserved(
    tiny: LoadedModel, make_bert: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_bert(vocab_size=len(tiny.tokenizer))
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.fill_(float("nan"))
    too_small: list[Step] = []

    def look(step: Step) -> None:
        # the file is cut to its size, never made longer
        if step.name == "ftruncate" and os.fstat(step.arguments[0]).st_size < step.arguments[1]:
            too_small.append(step)

    monkeypatch.setattr(durable, "os", FaultySystem(look))
    store = lp.extract(model, texts, tmp_path / "acts", tokenizer=tiny.tokenizer, shard_size=10_000)
    assert store.index is not None and len(store.index["nonfinite"]) == len(store.sites) and not too_small


@pytest.mark.parametrize("is_long", [False, True])
def test_a_long_run_tries_the_disk_and_a_short_one_does_not(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    tried: list[Path] = []

    def probe(folder: Path) -> bool:
        tried.append(folder)
        return False

    monkeypatch.setattr(places, "is_direct_better", probe)
    if is_long:
        monkeypatch.setattr(engine, "_PROBED_BYTES", 50_000)
    store = lp.extract(tiny, texts, tmp_path / "acts", shard_size=10_000)
    assert store.is_complete and tried == ([tmp_path / "acts"] if is_long else [])


def test_a_full_disk_stops_before_the_unit_is_computed_and_the_same_call_goes_on(
    tiny: LoadedModel, texts: list[str], small_disk: Path, tmp_path: Path
) -> None:
    plan = plan_extraction(tiny, texts, small_disk / "acts", OPTIONS)
    computed = 0

    def count(*_: object) -> None:
        nonlocal computed
        computed += 1

    filler = fill(small_disk, 50_000)
    handle = tiny.model.register_forward_pre_hook(count)
    try:
        with pytest.raises(
            SpaceError, match=r"shard-\d+\.safetensors: .*No space left on device\): it takes "
        ) as caught:
            run_extraction(plan)
        at_once = computed
        assert check_shards(plan.folder) < plan.num_units and not list(plan.folder.glob("*.tmp"))
        assert "are missing. Make room on the disk" in str(caught.value) and "--wait-for-space" in str(caught.value)
        filler.unlink()
        run_extraction(plan)
    finally:
        handle.remove()
    assert lp.open(plan.folder).is_complete
    # no batch went through the model for nothing
    computed_again, computed = computed, 0
    undisturbed = plan_extraction(tiny, texts, tmp_path / "whole", OPTIONS)
    handle = tiny.model.register_forward_pre_hook(count)
    run_extraction(undisturbed)
    handle.remove()
    assert at_once < computed_again == computed
    assert contents(plan.folder) == contents(tmp_path / "whole")


def test_a_run_that_waits_says_so_once_and_goes_on_when_there_is_room(
    tiny: LoadedModel,
    texts: list[str],
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filler = fill(small_disk, 50_000)
    looks = 0

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            nonlocal looks
            looks += 1
            if looks == 3:
                filler.unlink()
            return self.is_set()

    plan = plan_extraction(tiny, texts, small_disk / "acts", OPTIONS, wait_for_space=True)
    report = run_extraction(plan, stop=Waits())
    said = capsys.readouterr().err
    assert report.is_complete and looks == 3
    assert report.waited_s > 0 and report.num_waiting == 0 and " for room on the disk" in str(report)
    assert said.count("Waiting for room.") == 1 and said.count("there is room again: going on.") == 1
    lp.extract(tiny, texts, tmp_path / "whole", shard_size=10_000)
    assert contents(plan.folder) == contents(tmp_path / "whole")


def test_a_plan_that_does_not_fit_is_refused_unless_it_may_wait(
    tiny: LoadedModel, texts: list[str], small_disk: Path
) -> None:
    fill(small_disk, 8_192)
    with pytest.raises(SpaceError, match=r"the disk has .* free: [\d,]+ bytes missing\. .*--wait-for-space"):
        plan_extraction(tiny, texts, small_disk / "acts", OPTIONS)
    assert plan_extraction(tiny, texts, small_disk / "acts", OPTIONS, wait_for_space=True).missing_bytes > 8_192


def test_room_reserved_by_a_run_that_was_killed_counts_as_free(
    tiny: LoadedModel, texts: list[str], small_disk: Path
) -> None:
    folder = small_disk / "acts"
    plan = plan_extraction(tiny, texts, folder, OPTIONS)
    run_extraction(plan)
    for path in folder.glob("shard-*"):
        path.unlink()
    durable.reserve_file(folder / "shard-000003.safetensors", shutil.disk_usage(small_disk).free - 30_000)
    run_extraction(plan_extraction(tiny, texts, folder, OPTIONS))
    assert lp.open(folder).is_complete


@pytest.mark.parametrize("spare", [0, 4_096, 12_288, 40_960, 77_824, 90_112])
def test_a_disk_that_fills_up_anywhere_is_an_error_with_a_way_on(
    tiny: LoadedModel, texts: list[str], small_disk: Path, spare: int
) -> None:
    plan = plan_extraction(tiny, texts, small_disk / "acts", OPTIONS)
    filler = fill(small_disk, spare)
    with pytest.raises(SpaceError, match=r"No space left on device.*Make room on the disk"):
        run_extraction(plan)
    check_shards(plan.folder)
    filler.unlink()
    assert run_extraction(plan).is_complete


# the first flush is that of the folder without its index
@pytest.mark.parametrize(("call", "nth"), [("write", 1), ("fsync", 1), ("replace", 0)])
def test_a_shard_that_does_not_fit_though_reserved_is_waited_for_in_the_writer(
    tiny: LoadedModel,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: str,
    nth: int,
) -> None:
    # as on a file system that copies on write, or where a quota is only counted later
    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            monkeypatch.undo()
            return self.is_set()

    plan = plan_extraction(tiny, texts, tmp_path / "acts", OPTIONS, wait_for_space=True)
    run_extraction(plan)
    (plan.folder / "shard-000002.safetensors").unlink()
    before = contents(plan.folder)
    monkeypatch.setattr(durable, "os", FaultySystem(fail(call, errno.EDQUOT, nth)))
    assert run_extraction(plan, stop=Waits()).is_complete
    assert "Disk quota exceeded" in capsys.readouterr().err
    assert {name: data for name, data in contents(plan.folder).items() if name in before} == before


def test_a_wait_ends_when_it_is_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop = threading.Event()

    def attempt() -> None:
        stop.set()
        raise SpaceError("no room.")

    with pytest.raises(SpaceError, match="no room"):
        RoomKeeper(tmp_path, True, stop).attempt(attempt)
    assert capsys.readouterr().err == ""


def test_waits_grow_longer_up_to_half_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    waited: list[float] = []

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waited.append(timeout)
            return False

    def attempt() -> int:
        if len(waited) < 9:
            raise SpaceError("no room.")
        return 5

    assert RoomKeeper(None, True, Waits()).attempt(attempt) == 5
    assert waited == [1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert capsys.readouterr().err.splitlines() == [
        "layerprobe: no room. Waiting for room.",
        "layerprobe: there is room again: going on.",
    ]


def test_a_wait_is_told_and_that_of_two_threads_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = [100.0], list[tuple[float, bool]]()
    monkeypatch.setattr(space.time, "monotonic", lambda: clock[0])

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            clock[0] += 5
            return False

    keeper = RoomKeeper(None, True, Waits(), lambda seconds, is_waiting: told.append((seconds, is_waiting)))
    tries = 0

    def attempt() -> None:
        nonlocal tries
        tries += 1
        if tries == 2:
            # as another thread would, which also finds room at its second try
            keeper.attempt(attempt)
        elif tries < 4:
            raise SpaceError("no room.")

    keeper.attempt(attempt)
    assert told == [(0, True), (5, True), (0, True), (5, True), (0, True), (0, False)]
    assert tries == 4


def test_a_wait_that_is_given_up_is_over(tmp_path: Path) -> None:
    stop, told = threading.Event(), list[bool]()

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            self.set()
            return True

    def attempt() -> None:
        raise SpaceError("no room.")

    with pytest.raises(SpaceError, match="no room"):
        RoomKeeper(tmp_path, True, Waits(), lambda _, is_waiting: told.append(is_waiting)).attempt(attempt)
    assert told == [True, True, False] and not stop.is_set()


def test_status_says_that_a_run_waits_for_room(
    tiny: LoadedModel, texts: list[str], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler, seen, clock = fill(small_disk, 50_000), list[StoreStatus](), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    plan = plan_extraction(tiny, texts, small_disk / "acts", OPTIONS, wait_for_space=True)

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert shutil.disk_usage(small_disk).free == 0  # not one byte is left to say it with
            clock[0] += timeout or 0
            seen.append(read_status(plan.folder))
            if len(seen) == 3:
                filler.unlink()
            return self.is_set()

    report = run_extraction(plan, stop=Waits())
    assert report.is_complete and report.waited_s == 1 + 2 + 4
    assert [status.waited_s for status in seen[1:]] == [1, 3]
    for status in seen[1:]:
        assert status.state == "running" and status.is_waiting
    assert "room      waiting for it on the disk, 3.0 s so far" in describe_status(seen[-1])


def test_a_run_that_fails_waits_for_no_room(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_extraction(tiny, texts, tmp_path / "acts", OPTIONS, wait_for_space=True)
    waiting = threading.Event()

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waiting.set()
            return super().wait(30)

    def refuse(*_: object) -> int:
        raise SpaceError("no room.")

    monkeypatch.setattr(writer, "commit_shard", refuse)
    stop, calls = Waits(), 0

    def later(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first shard is with the writer
            assert waiting.wait(30)
            raise KeyboardInterrupt

    handle = tiny.model.register_forward_pre_hook(later)
    with pytest.raises(KeyboardInterrupt):
        run_extraction(plan, stop=stop)
    handle.remove()
    assert stop.is_set()
