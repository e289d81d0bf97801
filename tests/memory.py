"""How much memory a call holds at its most, for tests that it does not grow with what is gone through.

Counted are the pages of the process that are no file's: mapped pages of a store are the system's to take back. A
thread looks at them every few milliseconds. What the C library keeps for later would be counted too, and differs from
run to run by tens of megabytes: a script that measures runs where it gives large blocks back at once.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["measure_peak", "run_measured"]

_STATM = Path("/proc/self/statm")
# A threshold that is named is not raised by the first large block that is freed.
_KEEP_NOTHING = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_ARENA_MAX": "1"}


def run_measured(script: str, *arguments: object) -> str:
    """Run a script that calls `measure_peak` in a process of its own; gives what it prints."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env={**os.environ, **_KEEP_NOTHING},
    ).stdout


def measure_peak(run: Callable[[], object]) -> int:
    """Make a call; gives the most kilobytes that the process holds meanwhile."""
    most, is_over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_over.wait(0.002):
            most = max(most, _read_kilobytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        is_over.set()
        watcher.join()
    return most


def _read_kilobytes() -> int:
    _, resident, shared, *_ = map(int, _STATM.read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") // 1024
