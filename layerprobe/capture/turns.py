"""Calls of several threads take turns: one fills the open unit, the others wait.

Hides how they wait. Not by a `Condition`, nor by what is made of one: Ctrl-C within it may leave its lock held or its
waiter listed, and then a thread waits for ever. A bare lock is taken or not, and a `SimpleQueue` is filled or not.

Must never know what is done with a turn.
"""

import contextlib
import queue
import threading
from typing import Any, Protocol

from layerprobe.capture.calls import Call

__all__ = ["Turns"]

_LOOK_AGAIN_S = 1.0


class Holder(Protocol):
    """Who has a turn, or wants one."""

    thread: int
    call: Call
    is_displaced: bool  # whether another call has taken its turn before it ended


class Turns:
    """Who has the turn: read and changed under `lock`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a pool may call the model from within a turn
        self.holder: Any = None  # what `take` was given
        self._waiting: list[queue.SimpleQueue[None]] = []

    def take(self, wanted: Holder) -> None:
        """Wait until no other thread has a running call, and have the turn."""
        seen, num_misses = None, 0
        while True:
            with self.lock:
                other = self.holder
                num_misses = num_misses if other is seen else 0
                if other is not None and other.thread != wanted.thread:
                    # asked twice: the stack of a thread that runs may change while it is looked at
                    num_misses = 0 if other.call.is_running() else num_misses + 1
                if other is None or other.thread == wanted.thread or num_misses == 2:
                    # One left over was cut short, by Ctrl-C say, and its rows are overwritten; or this call is within
                    # it, and it hears of that when it ends.
                    if other is not None:
                        other.is_displaced = True
                    self.holder = wanted.call.state = wanted
                    return
                seen = other
                bell: queue.SimpleQueue[None] = queue.SimpleQueue()
                self._waiting.append(bell)
            # not for ever: Ctrl-C may keep the bell from being rung
            with contextlib.suppress(queue.Empty):
                bell.get(timeout=_LOOK_AGAIN_S)

    def end(self, held: Holder) -> None:
        """Let others have the turn."""
        with self.lock:
            if self.holder is held:
                self.holder = None
            waiting, self._waiting = self._waiting, []
            for bell in waiting:
                bell.put(None)
