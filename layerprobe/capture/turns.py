"""Serialise the calls of several threads: one fills the open unit while the others wait.

Hides how they wait. Not with a `Condition` or anything built on it: Ctrl-C inside one may leave its lock held or a
waiter registered, so that a thread waits forever. A bare lock and a `SimpleQueue` have no such intermediate state.

Must never know what a turn is used for.
"""

import contextlib
import queue
import threading
from typing import Any, Protocol

from layerprobe.capture.calls import Call

__all__ = ["Turns"]

_LOOK_AGAIN_S = 1.0


class Holder(Protocol):
    """The holder of a turn, or a thread that waits for one."""

    thread: int
    call: Call
    is_displaced: bool  # whether another call took the turn before this one ended


class Turns:
    """The holder of the turn, read and changed under `lock`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # reentrant, because a pool may call the model during a turn
        self.holder: Any = None  # the object given to `take`
        self._waiting: list[queue.SimpleQueue[None]] = []

    def take(self, wanted: Holder) -> None:
        """Wait until no other thread has a running call, then take the turn."""
        seen, num_misses = None, 0
        while True:
            with self.lock:
                other = self.holder
                num_misses = num_misses if other is seen else 0
                if other is not None and other.thread != wanted.thread:
                    # require two misses: the stack of a running thread may change while it is inspected
                    num_misses = 0 if other.call.is_running() else num_misses + 1
                if other is None or other.thread == wanted.thread or num_misses == 2:
                    # The earlier holder was interrupted, for example by Ctrl-C, and its rows are overwritten; or this
                    # call is nested in it, which it finds out when it ends.
                    if other is not None:
                        other.is_displaced = True
                    self.holder = wanted.call.state = wanted
                    return
                seen = other
                bell: queue.SimpleQueue[None] = queue.SimpleQueue()
                self._waiting.append(bell)
            # with a timeout, because Ctrl-C may keep the bell from being rung
            with contextlib.suppress(queue.Empty):
                bell.get(timeout=_LOOK_AGAIN_S)

    def end(self, held: Holder) -> None:
        """Release the turn."""
        with self.lock:
            if self.holder is held:
                self.holder = None
            waiting, self._waiting = self._waiting, []
            for bell in waiting:
                bell.put(None)
