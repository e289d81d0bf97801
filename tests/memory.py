"""How much memory a call holds at its most, for tests that it does not grow with what is gone through.

Counted are the pages of the process that are no file's: mapped pages of a store are the system's to take back. A
thread looks at them every few milliseconds.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["measure_peak"]

_STATM = Path("/proc/self/statm")


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
