"""SIGTERM, as a job gets it that is to make room: end at the next unit, or when the grace is over.

Ending at once is safe at any instruction, since what is committed is whole and the lock is the kernel's: so it waits
for nothing, not even for a disk that hangs. Only the command line listens; the library leaves signals alone.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

__all__ = ["TERMINATED", "Terminator", "leaving_on_sigterm"]

TERMINATED = 128 + signal.SIGTERM
_STDERR = 2


class Terminator(AbstractContextManager["Terminator"]):
    """Listen for SIGTERM while a command runs, and leave its handling as it was.

    Args:
        what: What is running, for messages.
        grace_s: Seconds that the current unit has to come to its end.

    `stop` is set by the first SIGTERM once there is a unit to wait for, that is after `defer`. A second one, one before
    `defer`, and the end of the grace end the process at once, with exit code 143.
    """

    def __init__(self, what: str, grace_s: float) -> None:
        self.stop = threading.Event()
        self._what = what
        self._grace_s = grace_s
        self._defers = False
        self._timer: threading.Timer | None = None
        self._before: Any = None

    def __enter__(self) -> "Terminator":
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        signal.signal(signal.SIGTERM, self._before)

    def defer(self) -> None:
        """Let the current unit come to its end from now on."""
        self._defers = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._defers or self.stop.is_set():
            self._end_at_once()
        self.stop.set()
        _say(f"SIGTERM: {self._what} ends after the current shard, in {self._grace_s:g} s at the latest.")
        self._timer = threading.Timer(self._grace_s, self._end_at_once)
        self._timer.daemon = True
        self._timer.start()

    def _end_at_once(self) -> NoReturn:
        _say(f"terminated: {self._what} keeps its whole shards. Run the same command again to go on.")
        os._exit(TERMINATED)


@contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end what is running as Ctrl-C does, with exit code 143: it has files to take away, none to keep.

    A second one ends the process at once.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    # straight to the descriptor: a signal may come in the middle of a print, whose lock this would wait for
    with suppress(OSError):
        os.write(_STDERR, f"layerprobe: {text}\n".encode())
