"""Disk space: reserved for a unit before it is computed, and waited for if the user asks for that.

A full disk stops or pauses a run between two units and loses nothing. Hides how long to wait, what to print meanwhile,
and that several threads may wait at once. Must never know of models.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from layerprobe.capture.units import list_shapes
from layerprobe.errors import SpaceError, StoreError
from layerprobe.store.description import StoredSite
from layerprobe.store.durable import reserve_file
from layerprobe.store.format import bound_shard
from layerprobe.store.headers import ShardHeader
from layerprobe.store.paths import NamedPath
from layerprobe.telling import say

__all__ = ["RoomKeeper"]

_FIRST_WAIT_S = 1.0
# A run seen from another machine counts as silent after a minute, so a waiting run reports twice in that time.
_LONGEST_WAIT_S = 30.0

_T = TypeVar("_T")


class RoomKeeper:
    """Reserve disk space, and stop or wait if there is none.

    Args:
        folder: The store's folder; None if it is not local, so that no space can be reserved.
        waits: Whether to wait for space instead of stopping.
        stop: Set by another thread, or a signal, to end a wait.
        tell: Called when a wait begins and ends, and during it, by one thread at a time: with the seconds waited since
            the last call, where overlapping waits count once, and whether any thread still waits.

    `check`, which does nothing until it is set, is called before each attempt, and after one that fails; it may raise.
    """

    def __init__(
        self,
        folder: Path | NamedPath | None,
        waits: bool,
        stop: threading.Event,
        tell: Callable[[float, bool], None] | None = None,
    ) -> None:
        self._folder = folder
        self.check: Callable[[], None] = lambda: None
        self._waits = waits
        self._stop = stop
        self._tell = tell
        self._turn = threading.Lock()
        self._num_waiting = 0
        self._told = 0.0

    def reserve(
        self,
        header: ShardHeader,
        stored: Sequence[StoredSite],
        num_pairs: int,
        record_bytes: int,
        has_positions: bool,
    ) -> None:
        """Reserve space for a shard that is about to be computed, and return once it is reserved.

        Args:
            header: Counts of the shard, as far as they are known.
            stored: Its sites.
            num_pairs: Number of its query-key pairs.
            record_bytes: Total bytes of its records.
            has_positions: Whether rows are stored with their positions.

        Raises:
            SpaceError: there is not enough space; the error says how many bytes are missing.
        """
        folder = self._folder
        if folder is not None:
            size = bound_shard(header, list_shapes(stored, header, num_pairs, record_bytes, has_positions))
            self.attempt(lambda: reserve_file(folder / header.file, size))

    def attempt(self, action: Callable[[], _T]) -> _T:
        """Run an action that needs disk space; with `waits`, retry it until there is enough.

        Raises:
            SpaceError: there is not enough, and the run does not wait or the wait was ended.
        """
        delay_s, has_said = _FIRST_WAIT_S, False
        try:
            while True:
                try:
                    self.check()
                    result = action()
                except SpaceError as error:
                    if not self._waits or self._stop.is_set():
                        raise SpaceError(
                            f"{error} With wait_for_space=True (--wait-for-space) it waits for room."
                        ) from error
                    if not has_said:
                        say(f"{error} Waiting for room.")
                        has_said = True
                        self._count(1)
                    self._stop.wait(delay_s)
                    self._count(0)
                    delay_s = min(2 * delay_s, _LONGEST_WAIT_S)
                except StoreError:
                    # that the folder was moved is the better reason
                    self.check()
                    raise
                else:
                    if has_said:
                        say("there is room again: going on.")
                    return result
        finally:
            if has_said:
                self._count(-1)

    def _count(self, change: int) -> None:
        """Change the number of waiting threads, and report the time waited since the last call."""
        with self._turn:
            now = time.monotonic()
            waited_s = now - self._told if self._num_waiting else 0.0
            self._num_waiting += change
            self._told = now
            if self._tell is not None:
                self._tell(waited_s, self._num_waiting > 0)
