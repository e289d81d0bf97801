"""What `layerprobe status` says of a run: while it goes on, when it was killed, when it stopped, when it is done."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import layerprobe
from layerprobe.errors import FormatError, StoreError
from layerprobe.models import LoadedModel
from layerprobe.store import progress
from layerprobe.store.format import read_header
from layerprobe.store.progress import Done, ProgressFile, StoreStatus, read_status

extract: Any = layerprobe.extract
SHARD_BYTES = 10_000


def done(number: int) -> Done:
    return Done(number, 8, 10 * number, 80, 100 * number, 1000 * number, 8000 - 1000 * number, 0.25 * number)


def begun(folder: Path) -> Path:
    """A store without shards."""
    folder.mkdir()
    (folder / "store.json").write_text('{"format": 1, "plan": {"units": 8}, "input": {"examples": 80}}')
    return folder


def change(folder: Path, **fields: Any) -> None:
    path = folder / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_run_under_way_is_told_from_inside_it(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    seen: list[StoreStatus] = []
    handle = tiny.model.register_forward_hook(lambda *_: seen.append(read_status(folder)) if folder.exists() else None)
    try:
        extract(tiny, texts, folder, shard_size=SHARD_BYTES)
    finally:
        handle.remove()
    assert {status.state for status in seen} == {"running"} and len(seen) > 3
    for status in seen:
        assert status.is_alive and status.process is not None and str(os.getpid()) in status.process
        assert status.num_examples == len(texts) and status.num_units is not None
        assert status.free_bytes and status.heard_s is not None and status.missing_bytes
    last = read_status(folder)
    shards = len(list(folder.glob("shard-*")))
    assert (last.state, last.num_units_done, last.num_units) == ("complete", shards, shards)
    assert (last.num_examples_done, last.num_examples) == (len(texts), len(texts))
    assert not (folder / "progress.json").exists()


def test_paces_are_those_of_the_last_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, clock, now = begun(tmp_path / "acts"), [0.0], [0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with ProgressFile(folder) as told:
        told.begin(lambda: done(now[0]))
        first = read_status(folder)
        assert first.tokens_per_s == 0 and first.remaining_s is None and first.full_s is None
        for second in range(1, 5):
            clock[0], now[0] = float(second), second
            told.tick()
        status = read_status(folder)
        assert (status.tokens_per_s, status.bytes_per_s, status.stalled) == (100, 1000, 0.25)
        assert (status.num_examples_done, status.num_examples) == (40, 80)
        assert status.remaining_s == 4 and status.missing_bytes == 4000 and status.free_bytes is not None
        assert status.full_s == pytest.approx(status.free_bytes / 1000)
        # five minutes later nothing of that is left, but what came since
        clock[0], now[0] = 400.0, 5
        told.tick()
        clock[0], now[0] = 410.0, 6
        told.tick()
        late = read_status(folder)
        assert late.tokens_per_s == 10 and late.remaining_s == 20


def test_it_is_written_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, clock, asked = begun(tmp_path / "acts"), [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])

    def measure() -> Done:
        asked.append(clock[0])
        return done(1)

    with ProgressFile(folder) as told:
        told.begin(measure)
        for tenth in range(1, 26):
            clock[0] = 100 + tenth / 10
            told.tick()
        assert asked == [100, 101, 102]


def fail(folder: Path, error: BaseException) -> None:
    with contextlib.suppress(type(error)), ProgressFile(folder) as told:
        told.begin(lambda: done(2))
        raise error


def test_a_run_that_fails_or_is_asked_to_stop_says_so(tmp_path: Path) -> None:
    folder = begun(tmp_path / "acts")
    fail(folder, StoreError("disk:\nbroken"))
    status = read_status(folder)
    assert (status.state, status.reason) == ("stopped", "StoreError: disk: broken")
    assert status.tokens_per_s is None and status.num_units_done == 0 and status.num_units == 8
    fail(folder, KeyboardInterrupt())
    assert read_status(folder).reason == "KeyboardInterrupt"
    with ProgressFile(folder) as told:
        told.begin(lambda: done(2))
    assert (read_status(folder).state, read_status(folder).reason) == ("stopped", "it was asked to")
    (folder / "index.json").write_text('{"shards": [], "examples": 80}')
    with ProgressFile(folder) as told:
        told.begin(lambda: done(8))
    assert read_status(folder).state == "complete" and not (folder / "progress.json").exists()


def test_a_failed_run_is_stopped_and_the_next_one_completes(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "acts"

    def fail_late(*_: Any) -> None:
        if folder.exists() and len(list(folder.glob("shard-*.safetensors"))) >= 2:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError), layerprobe.Probe(tiny.model, "layers.0", to=fail_late):
        extract(tiny, texts, folder, shard_size=SHARD_BYTES)
    status = read_status(folder)
    assert (status.state, status.reason) == ("stopped", "RuntimeError: out of luck")
    held = [read_header(path).num_examples for path in folder.glob("shard-*.safetensors")]
    assert (status.num_units_done, status.num_examples_done) == (len(held), sum(held)) and len(held) >= 2
    extract(tiny, texts, folder, shard_size=SHARD_BYTES)
    assert read_status(folder).state == "complete"


@pytest.mark.slow
def test_a_killed_run_is_told_even_before_anyone_has_asked_how_it_ended(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog .\n" * 3000)
    folder = tmp_path / "acts"
    command = [sys.executable, "-m", "layerprobe", "extract", tiny_model_folder, tmp_path / "a.txt", "-o", folder, "-q"]
    process = subprocess.Popen([*map(str, command), "--shard-size", "60kB"])
    try:
        while len(list(folder.glob("shard-*.safetensors"))) < 2:
            assert process.poll() is None
        assert read_status(folder).state == "running"
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        zombie = read_status(folder)
    finally:
        process.kill()
        process.wait()
    gone = read_status(folder)
    for status in (zombie, gone):
        assert (status.state, status.is_alive) == ("killed", False)
        assert status.tokens_per_s is None and 2 <= status.num_units_done < (status.num_units or 0)
        assert 0 < status.num_examples_done < 3000 == status.num_examples


def test_another_process_of_the_same_number_is_not_taken_for_the_run(tmp_path: Path) -> None:
    folder = begun(tmp_path / "acts")
    with ProgressFile(folder) as told:
        told.begin(lambda: done(1))
        assert read_status(folder).state == "running"
        if progress._read_stat(os.getpid())[1] is None:
            pytest.skip("this system does not say when a process began")
        change(folder, process_start="1")
        assert read_status(folder).state == "killed"


def test_a_run_on_another_machine_is_running_as_long_as_it_is_heard_of(tmp_path: Path) -> None:
    folder = begun(tmp_path / "acts")
    with ProgressFile(folder) as told:
        told.begin(lambda: done(1))
        for field in ("host", "space"):
            change(folder, **{field: "elsewhere"})
            status = read_status(folder)
            assert (status.state, status.is_alive) == ("running", None)
            change(folder, updated=time.time() - 100)
            status = read_status(folder)
            assert status.state == "silent" and status.heard_s is not None and status.heard_s >= 100
            told.begin(lambda: done(1))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"state": "running"}', '{"state": "running", "pid": -1}', "x" * 100]
)
def test_a_progress_file_that_is_none_is_as_if_it_were_not_there(tmp_path: Path, text: str) -> None:
    folder = begun(tmp_path / "acts")
    (folder / "progress.json").write_text(text)
    status = read_status(folder)
    assert (status.state, status.num_units, status.num_examples) == ("incomplete", 8, 80)
    assert (status.num_units_done, status.num_examples_done) == (0, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"pace": {"seconds": -1}},
        {"pid": 10**30},
        {"updated": "now"},
        {"units": 1.5},
        {"waited_s": -1},
        {"is_waiting": 1},
    ],
)
def test_fields_that_cannot_be_are_not_believed(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = begun(tmp_path / "acts")
    with ProgressFile(folder) as told:
        told.begin(lambda: done(1))
        change(folder, **fields)
        assert read_status(folder).state in ("incomplete", "killed")


def test_a_full_disk_stops_nothing_and_leaves_nothing(small_disk: Path) -> None:
    folder = begun(small_disk / "acts")
    with open(small_disk / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(1 << 12))
    with ProgressFile(folder) as told:
        told.begin(lambda: done(1))
    assert [file.name for file in folder.iterdir()] == ["store.json"]


def test_a_run_of_an_older_version_says_nothing_of_room(tmp_path: Path) -> None:
    folder = begun(tmp_path / "acts")
    with ProgressFile(folder) as told:
        told.begin(lambda: done(1))
        path = folder / "progress.json"
        said = json.loads(path.read_text())
        assert said.pop("waited_s") == 0 and said.pop("is_waiting") is False
        path.write_text(json.dumps(said))
        assert read_status(folder).state == "running" and not read_status(folder).is_waiting


def test_nothing_is_written_where_there_is_no_folder() -> None:
    with ProgressFile(None) as told:
        told.begin(lambda: done(1))
        told.tick()


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is not a store: it has no store\.json"):
        read_status(tmp_path)
    folder = begun(tmp_path / "acts")
    (folder / "index.json").write_text("{}")
    with pytest.raises(FormatError, match=r"index\.json: is damaged\. Run 'layerprobe verify"):
        read_status(folder)


def test_a_store_under_a_url_has_a_status(tiny: LoadedModel, texts: list[str]) -> None:
    pytest.importorskip("fsspec")
    extract(tiny, texts, "memory://status/acts", shard_size=SHARD_BYTES)
    status = read_status("memory://status/acts")
    assert status.state == "complete" and status.num_examples_done == len(texts) and status.free_bytes is None
