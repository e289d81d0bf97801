"""Count the cores that a run can really use: those it may run on, within the CPU quota of its container.

torch counts the cores it may run on but ignores the quota. Threads beyond the quota are throttled in the middle of a
layer, and all others wait for them.

Hides where Linux keeps these limits. Must never know of models.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from layerprobe.sharing import SharedSetting

__all__ = ["count_cores", "few_cores", "using_cores", "using_few_cores"]

# Variables by which a user sets the number of threads.
_ASKED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def _set_threads(_: object, count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


_threads = SharedSetting(lambda _: torch.get_num_threads(), _set_threads)


def count_cores(root: Path = Path("/")) -> int:
    """Count the cores that this process can keep busy; at least 1.

    Args:
        root: Folder that holds `proc` and `sys`.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, int(min(allowed, _find_quota(root))))


@contextlib.contextmanager
def using_cores(share: int = 1, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Limit torch to as many threads as there are cores, while this is open.

    Args:
        share: Number of processes that share the cores.
        environment: If it sets a number of threads, nothing is changed.
    """
    most = max(1, count_cores() // share)
    with _threads.held(torch) as before:
        if most < before and not any(environment.get(name) for name in _ASKED):
            torch.set_num_threads(most)
        yield


def few_cores() -> int:
    """Return the number of threads for an analysis: few, since its batches are small and waiting threads cost more."""
    return max(1, min(count_cores() // 2, 4))


@contextlib.contextmanager
def using_few_cores() -> Iterator[None]:
    """Compute with half of the cores, at most four, while this is open."""
    with _threads.held(torch) as before:
        torch.set_num_threads(min(before, few_cores()))
        yield


def _find_quota(root: Path) -> float:
    """Return the CPU quota of this process's control groups, in cores; inf if there is none."""
    quota = math.inf
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            mounted, read = root / "sys/fs/cgroup", _read_quota
        elif "cpu" in controllers.split(","):
            mounted, read = root / "sys/fs/cgroup" / controllers, _read_quota_of_version_1
        else:
            continue
        folder = mounted / path.strip("/")
        # a group is also limited by its ancestors; inside a container its own group is mounted as the root
        for group in (folder, *folder.parents):
            if group.is_relative_to(mounted):
                quota = min(quota, read(group))
    return quota


def _read_quota(group: Path) -> float:
    return _divide(*[*_read(group / "cpu.max").split(), "", ""][:2])


def _read_quota_of_version_1(group: Path) -> float:
    return _divide(_read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip())


def _divide(time: str, period: str) -> float:
    # "max", or -1, means no limit
    return int(time) / int(period) if time.isdigit() and period.isdigit() and int(period) else math.inf


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
