"""Handle SIGTERM, as sent to a preempted job: end after the current unit, or when the grace period is over.

Ending at once is safe at any instruction, because committed files are whole and the kernel releases the lock; so it
waits for nothing, not even for a disk that hangs. Only the command line handles signals; the library does not.
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
    """Handle SIGTERM while a command runs, and restore the previous handler afterwards.

    Args:
        what: Name of what is running, for messages.
        grace_s: Seconds that the current unit has to finish.

    After `defer`, that is once there is a unit to wait for, the first SIGTERM sets `stop`. A second one, one before
    `defer`, and the end of the grace period end the process at once, with exit code 143.
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
        """From now on, let the current unit finish after SIGTERM."""
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
    """Make SIGTERM raise SystemExit with code 143, so that temporary files are removed; a second one kills the process.

    For commands that have files to clean up and none to keep.
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
    # writes to the descriptor, because a signal may interrupt a print that holds the stream's lock
    with suppress(OSError):
        os.write(_STDERR, f"layerprobe: {text}\n".encode())
