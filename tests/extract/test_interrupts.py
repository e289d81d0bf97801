"""Ctrl-C at moments drawn by lot: the process always ends, and the same command gives the same bytes."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from faults import check_shards

pytestmark = pytest.mark.slow

NUM_TRIES, DEADLINE_S = 12, 120
# One process imports everything and forks a run for each Ctrl-C. One that does not end is killed, as its status tells.
TEMPLATE = """
import os, select, signal, sys, time
import torch
import layerprobe
from layerprobe.models import load_model

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.SIG_IGN)
lines = [f"the quick brown fox {'jumps over ' * (n % 7)}" for n in range(60)]
loaded, deadline_s = load_model(sys.argv[1], "cpu"), float(sys.argv[2])
for order in sys.stdin:
    folder, after_s = order.rsplit(" ", 1)
    start = time.perf_counter()
    if (child := os.fork()) == 0:
        status = 0
        try:
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                layerprobe.extract(loaded, lines, folder, shard_size=20_000, batch_tokens=64, progress=False, writers=2)
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt:
            status = 130
        os._exit(status)
    descriptor = os.pidfd_open(child)
    if float(after_s) >= 0 and not select.select([descriptor], [], [], float(after_s))[0]:
        os.kill(child, signal.SIGINT)
    if not select.select([descriptor], [], [], deadline_s)[0]:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(descriptor)
    print(status, time.perf_counter() - start, flush=True)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_ctrl_c_always_ends_a_run_and_the_same_run_goes_on_to_the_same_bytes(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    draw, folder = random.Random(0), tmp_path / "acts"
    process = subprocess.Popen(
        [sys.executable, "-c", TEMPLATE, str(tiny_model_folder), str(DEADLINE_S)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def run(where: Path, after_s: float) -> tuple[int, float]:
        assert process.stdin is not None and process.stdout is not None
        print(where, after_s, file=process.stdin, flush=True)
        status, seconds = process.stdout.readline().split()
        return int(status), float(seconds)

    with process:
        try:
            status, seconds = run(tmp_path / "whole", -1)
            assert status == 0 and check_shards(tmp_path / "whole") > 3
            for _ in range(NUM_TRIES):
                status, _ = run(folder, draw.uniform(0, seconds))
                assert status in (0, 130), "it did not end by itself"
                if folder.exists():
                    check_shards(folder)
            assert run(folder, -1)[0] == 0
        finally:
            process.kill()
    assert contents(folder) == contents(tmp_path / "whole")
