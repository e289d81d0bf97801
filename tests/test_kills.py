"""A real command killed again and again, at every step and at moments drawn by lot: no row lost, doubled or changed.

A command would spend its time importing torch and what reads a model, so one process does that and forks a command for
each kill. It dies by SIGKILL before a chosen call of the system, at a chosen line of layerprobe, or after a while.
"""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import layerprobe as lp
from faults import check_shards

pytestmark = pytest.mark.slow

NUM_LINES, NUM_MOMENTS = 70, 70

TEMPLATE = """
import contextlib, io, json, os, select, signal, sys, threading, time
import torch
from transformers import AutoConfig, BertModel, BertTokenizerFast
import layerprobe
from layerprobe.cli.main import main
from layerprobe.extract import folder, run
from layerprobe.store import durable, lock
from faults import FaultySystem

torch.set_num_threads(1)
PACKAGE = os.path.dirname(layerprobe.__file__)
count = 0

def die_at(number):
    global count
    count += 1
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)

def trace(frame, event, argument):
    if not frame.f_code.co_filename.startswith(PACKAGE):
        return None
    if event == "line":
        die_at(threshold)
    return trace

def run_command(order):
    global threshold
    threshold = order["number"]
    sys.argv = ["layerprobe", *order["arguments"]]
    if order["kind"] == "step":
        durable.os = lock.os = FaultySystem(lambda step: die_at(threshold))
        durable._fallocate = durable.os.fallocate
    if order["kind"] == "line":
        threading.settrace(trace)
        sys.settrace(trace)
    try:
        main()
    except SystemExit as ended:
        sys.settrace(None)
        with open(order["report"], "w") as report:
            report.write(str(count))
        os._exit(ended.code or 0)

# what it imports, and patterns that it compiles, are there for each run
sys.argv = ["layerprobe", "sites", sys.argv[1]]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()

for line in sys.stdin:
    order = json.loads(line)
    start = time.perf_counter()
    if (child := os.fork()) == 0:
        run_command(order)
    if order["kind"] == "moment":
        descriptor = os.pidfd_open(child)
        if not select.select([descriptor], [], [], order["number"])[0]:
            os.kill(child, signal.SIGKILL)
        os.close(descriptor)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"status": status, "seconds": time.perf_counter() - start}), flush=True)
"""


class Killer:
    """Runs one command over and over, each time in a fork of a process that has imported everything."""

    def __init__(self, process: "subprocess.Popen[str]", arguments: list[str], report: Path) -> None:
        self._process = process
        self._arguments = arguments
        self._report = report
        self.kills: Counter[str] = Counter()

    def run(self, folder: Path, kind: str = "never", number: float = 0) -> tuple[bool, float]:
        """Run the command, perhaps to its death; gives whether it came to its end, and its seconds."""
        order = {"arguments": [*self._arguments, "-o", str(folder)], "kind": kind, "number": number}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({**order, "report": str(self._report)}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert answer["status"] in (0, -9), answer
        self.kills[kind] += answer["status"] == -9
        return answer["status"] == 0, answer["seconds"]

    def count(self, folder: Path, kind: str) -> int:
        """Count the steps or lines of a whole run."""
        assert self.run(folder, kind, -1)[0]
        return int(self._report.read_text())


@pytest.fixture
def killer(tiny_model_folder: Path, tmp_path: Path) -> Iterator[Killer]:
    lines = ["the quick brown fox jumps over the lazy dog . " * (1 + line % 5) for line in range(24)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    arguments = ["extract", str(tiny_model_folder), str(tmp_path / "a.txt"), "--shard-size", "200kB", "-q"]
    process = subprocess.Popen(
        [sys.executable, "-c", TEMPLATE, str(tiny_model_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    with process:
        yield Killer(process, [*arguments, "--device", "cpu"], tmp_path / "count")
        process.kill()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def go_on(killer: Killer, folder: Path, expected: dict[str, bytes], kind: str, number: float) -> None:
    """Kill a run, hold what it left, and when it is through compare it with an undisturbed one and begin anew."""
    kept = {name: data for name, data in contents(folder).items() if name.startswith("shard-")}
    is_through, _ = killer.run(folder, kind, number)
    if folder.exists():
        check_shards(folder)
        left = contents(folder)
        assert all(left[name] == data for name, data in kept.items() if not name.endswith(".tmp"))
        assert all(left[name] == expected[name] for name in left if name.endswith(".safetensors"))
        assert "index.json" not in left or lp.open(folder).is_complete
    if is_through:
        assert contents(folder) == expected
        shutil.rmtree(folder)


def test_no_kill_loses_doubles_or_changes_a_row(
    killer: Killer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, draw = tmp_path / "acts", random.Random(0)
    is_through, seconds = killer.run(tmp_path / "whole")
    assert is_through and check_shards(tmp_path / "whole") >= 3
    expected = contents(tmp_path / "whole")
    num_steps = killer.count(tmp_path / "steps", "step")
    num_lines = killer.count(tmp_path / "lines", "line")
    assert contents(tmp_path / "steps") == contents(tmp_path / "lines") == expected
    for step in range(1, num_steps + 1):
        if folder.exists():
            shutil.rmtree(folder)
        # each step of a first run, and of the run that goes on after it
        go_on(killer, folder, expected, "step", step)
        go_on(killer, folder, expected, "step", 1 + draw.randrange(num_steps))
        go_on(killer, folder, expected, "never", 0)
    for _ in range(NUM_LINES):
        go_on(killer, folder, expected, "line", 1 + draw.randrange(num_lines))
    for _ in range(NUM_MOMENTS):
        go_on(killer, folder, expected, "moment", draw.uniform(0, seconds))
    go_on(killer, folder, expected, "never", 0)
    assert not folder.exists()
    with capsys.disabled():
        print(f" {killer.kills.total()} kills: {dict(killer.kills)}", end="")
    assert killer.kills["step"] >= num_steps and killer.kills.total() >= 200
