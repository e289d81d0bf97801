"""Threads are those that the cores, the affinity and the quota of a container can feed, and no more."""

import os
from pathlib import Path

import pytest
import torch

from layerprobe.cores import count_cores, using_cores


def write_quota(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


HERE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
GROUP = "proc/self/cgroup"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, HERE),
        ({GROUP: "0::/"}, HERE),
        ({GROUP: "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, HERE),
        ({GROUP: "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1),
        ({GROUP: "0::/", "sys/fs/cgroup/cpu.max": "20000 100000"}, 1),
        ({GROUP: "0::/", "sys/fs/cgroup/cpu.max": "990000000 100000"}, HERE),
        # the group around it has less
        ({GROUP: "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "100000 100000"}, 1),
        # in a container the group's own path is not there
        ({GROUP: "0::/../../a", "sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
        (
            {
                GROUP: "12:memory:/a\n4:cpu,cpuacct:/a",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        (
            {
                GROUP: "4:cpu:/a",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            },
            HERE,
        ),
        ({GROUP: "nonsense\n\n::", "sys/fs/cgroup/cpu.max": "a b c"}, HERE),
    ],
)
def test_cores_are_those_allowed_within_the_quota(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert count_cores(write_quota(tmp_path, files)) == cores


def test_threads_are_lowered_to_the_share_of_a_process_and_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(64)
    try:
        with using_cores(environment={}):
            assert torch.get_num_threads() == min(64, count_cores())
        with using_cores(share=10_000, environment={}):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 64
        with using_cores(share=10_000, environment={"OMP_NUM_THREADS": "64"}):
            assert torch.get_num_threads() == 64
        # of two runs the one that began first ends first
        first, second = using_cores(share=10_000, environment={}), using_cores(share=10_000, environment={})
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 64
        torch.set_num_threads(1)
        with using_cores(environment={}):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
