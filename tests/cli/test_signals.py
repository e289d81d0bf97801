"""SIGTERM: the shard under way is finished where there is time, and the same command goes on."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import layerprobe as lp
from faults import check_shards
from layerprobe.cli import main as cli
from layerprobe.cli.signals import Terminator
from layerprobe.models import LoadedModel

# The command line itself, but every forward says that it is there and waits for the end of standard input.
COMMAND = """
import select
import sys
from pathlib import Path
from torch.nn.modules.module import register_module_forward_pre_hook
from layerprobe.cli.main import main

store, moment = Path(sys.argv.pop(1)), sys.argv.pop(1)

def wait(module, args):
    if type(module).__name__ == "BertEncoder" and moment == ("run" if (store / "store.json").exists() else "plan"):
        print("computing", flush=True)
        # a signal that comes before the first wait is seen after it
        while not select.select([sys.stdin], [], [], 0.1)[0]:
            pass

register_module_forward_pre_hook(wait)
main()
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("\n".join("the quick brown fox jumps " * (1 + line % 5) for line in range(30)))
    return tmp_path / "a.txt"


@contextlib.contextmanager
def started(
    model: Path, source: Path, folder: Path, *options: str, moment: str = "run"
) -> "Iterator[subprocess.Popen[str]]":
    command = [
        sys.executable,
        "-c",
        COMMAND,
        str(folder),
        moment,
        "extract",
        str(model),
        str(source),
        "-o",
        str(folder),
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, "--shard-size", "60kB", "-q", "--device", "cpu", *options],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        # as many threads as here: with more of them the last digits differ
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_line(stream: Any) -> str:
    return stream.readline().rstrip("\n")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_the_same_command_goes_on(model: Path, source: Path, folder: Path) -> None:
    store = lp.extract(str(model), source, folder, shard_size=60_000, device="cpu")
    assert store.is_complete and not list(folder.glob("*.tmp")) and not (folder / "run.lock").exists()
    lp.extract(str(model), source, folder.parent / "whole", shard_size=60_000, device="cpu")
    assert contents(folder) == contents(folder.parent / "whole")


@pytest.mark.slow
def test_the_shard_under_way_is_finished(tiny_model_folder: Path, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    with started(tiny_model_folder, source, folder) as process:
        assert read_line(process.stdout) == "computing"
        process.send_signal(signal.SIGTERM)
        said = read_line(process.stderr)
        assert said == f"layerprobe: SIGTERM: {folder} ends after the current shard, in 30 s at the latest."
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 143
        assert process.stderr is not None
        assert (
            process.stderr.read()
            == f"stopped: whole shards are kept in {folder}. Run the same command again to go on.\n"
        )
    assert check_shards(folder) == 1 and not lp.open(folder).is_complete
    assert not list(folder.glob("*.tmp")) and not (folder / "run.lock").exists()
    assert_the_same_command_goes_on(tiny_model_folder, source, folder)


def test_the_end_of_the_grace_ends_at_once(tiny_model_folder: Path, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    with started(tiny_model_folder, source, folder, "--grace", "0.01") as process:
        assert read_line(process.stdout) == "computing"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
        assert "in 0.01 s at the latest" in read_line(process.stderr)
        said = read_line(process.stderr)
        assert said == f"layerprobe: terminated: {folder} keeps its whole shards. Run the same command again to go on."
    assert check_shards(folder) == 0
    assert_the_same_command_goes_on(tiny_model_folder, source, folder)


def test_a_second_one_ends_at_once(tiny_model_folder: Path, source: Path, tmp_path: Path) -> None:
    with started(tiny_model_folder, source, tmp_path / "acts", "--grace", "9999") as process:
        assert read_line(process.stdout) == "computing"
        process.send_signal(signal.SIGTERM)
        assert "ends after the current shard" in read_line(process.stderr)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143 and "terminated: " in read_line(process.stderr)
    assert check_shards(tmp_path / "acts") == 0


def test_before_there_is_a_shard_nothing_is_waited_for(tiny_model_folder: Path, source: Path, tmp_path: Path) -> None:
    with started(tiny_model_folder, source, tmp_path / "acts", moment="plan") as process:
        assert read_line(process.stdout) == "computing"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143 and "terminated: " in read_line(process.stderr)
    assert not (tmp_path / "acts").exists()


def test_a_plan_takes_away_what_it_made(tiny_model_folder: Path, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    command = [sys.executable, "-c", COMMAND, str(folder), "plan", "extract", str(tiny_model_folder), str(source)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, "-o", str(folder), "--device", "cpu", "--plan", "1e6"],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    ) as process:
        assert read_line(process.stdout) == "computing"
        assert list(tmp_path.glob("layerprobe-plan-*"))
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
        assert process.stderr is not None and process.stderr.read() == ""
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.slow
def test_a_wait_for_room_is_ended(tiny_model_folder: Path, source: Path, small_disk: Path) -> None:
    with open(small_disk / "filler", "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(small_disk).free - 100_000)
    with started(tiny_model_folder, source, small_disk / "acts", "--wait-for-space", moment="never") as process:
        assert read_line(process.stderr).endswith("Waiting for room.")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
        assert "ends after the current shard" in read_line(process.stderr)
        assert read_line(process.stderr).startswith("stopped: whole shards are kept in")
    check_shards(small_disk / "acts")
    (small_disk / "filler").unlink()
    assert lp.extract(str(tiny_model_folder), source, small_disk / "acts", shard_size=60_000, device="cpu").is_complete


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_line(tiny_model_folder: Path, source: Path, small_disk: Path) -> None:
    with open(small_disk / "filler", "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(small_disk).free - 100_000)
    with started(tiny_model_folder, source, small_disk / "acts", moment="never") as process:
        said = process.communicate()[1]
    assert process.returncode == 2 and said.count("\n") == 1
    assert said.startswith("layerprobe: ") and "missing" in said and "--wait-for-space" in said


def test_the_handling_of_signals_is_left_as_it_was(
    tiny_model_folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mine(number: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine)
    try:
        monkeypatch.setattr(
            sys,
            "argv",
            ["layerprobe", "extract", str(tiny_model_folder), str(source), "-o", str(tmp_path / "acts"), "-q"],
        )
        with pytest.raises(SystemExit):
            cli.main()
        assert signal.getsignal(signal.SIGTERM) is mine
        with Terminator("acts", 1.0):
            assert signal.getsignal(signal.SIGTERM) is not mine
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_library_leaves_signals_alone(tiny: LoadedModel, tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    seen: list[dict[Any, Any]] = []
    handle = tiny.model.register_forward_pre_hook(
        lambda *_: seen.append({number: signal.getsignal(number) for number in before})
    )
    try:
        lp.extract(tiny, ["the dog", "fox"], tmp_path / "acts")
    finally:
        handle.remove()
    assert seen and all(found == before for found in seen)
