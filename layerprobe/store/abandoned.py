"""Threads that Ctrl-C has left with a request of an object store under way, by the place that they write to.

Such a request may still arrive. Whoever begins to write to the place in this process waits for them first, so that
nothing of an ended run lands among what is written after it.

Must never know of shards.
"""

import threading
import time

__all__ = ["abandon", "wait_for_abandoned"]

_LOOK_AGAIN_S = 0.05
_left: dict[str, list[threading.Thread]] = {}


def abandon(place: str, thread: threading.Thread) -> None:
    """Leave a thread that writes to a place to itself."""
    _left.setdefault(place, []).append(thread)


def wait_for_abandoned(place: str) -> None:
    """Wait for the threads that still write to a place; Ctrl-C ends the wait."""
    # not by `join`: one that Ctrl-C cuts short may take a thread for ended
    while any(thread.is_alive() for thread in _left.get(place, ())):
        time.sleep(_LOOK_AGAIN_S)
    _left.pop(place, None)
