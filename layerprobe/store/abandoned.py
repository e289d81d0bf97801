"""Threads that Ctrl-C left with a pending request to an object store, by the place that they write to.

Such a request may still succeed. The next writer to the same place in this process waits for them first, so that
nothing of the old run lands among its own files.

Must never know of shards.
"""

import threading
import time

__all__ = ["abandon", "wait_for_abandoned"]

_LOOK_AGAIN_S = 0.05
_left: dict[str, list[threading.Thread]] = {}


def abandon(place: str, thread: threading.Thread) -> None:
    """Register a thread that still writes to a place and is no longer waited for."""
    _left.setdefault(place, []).append(thread)


def wait_for_abandoned(place: str) -> None:
    """Wait for the threads that still write to a place; Ctrl-C ends the wait."""
    # not `join`: one interrupted by Ctrl-C may mark a thread as ended
    while any(thread.is_alive() for thread in _left.get(place, ())):
        time.sleep(_LOOK_AGAIN_S)
    _left.pop(place, None)
