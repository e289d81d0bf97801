"""Time the parts of an extraction from outside, without any code for it in the library.

The clock of a part stops while another part runs within it in the same thread, so that the parts of the main thread add
up to the total. For the writer's thread CPU time is counted, without its waits for the disk; the time to prepare units,
and that of a tokenizer with threads of its own, runs in parallel with the forward pass.

A twin is a bare model that is called with every batch of the run, alternately before and after it, so that other load
on the machine, and the cores taken by other threads, affect both alike. Its time is not part of the run.

Calls on a GPU return before they are computed, so the clocks of the forward pass and of the twin wait for the model's
stream, while those of the parts within count host time only. Pending copies continue in parallel.
"""

import functools
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from subjects import wait_for_model

from layerprobe.capture.packing import StoreSink
from layerprobe.extract import preparing, run
from layerprobe.extract.batching import Batch, FlatBatch
from layerprobe.extract.calling import ModelCaller
from layerprobe.extract.flat import FlatForm
from layerprobe.extract.space import RoomKeeper
from layerprobe.store.writer import ShardWriter

__all__ = ["BESIDE", "MAIN", "TWIN", "Clocks"]

MAIN = ("forward", "hooks", "plan", "batches", "records", "room", "wait for a buffer", "last flush", "open", "rest")
BESIDE = ("tokenise", "prepare", "writer")
TWIN = "twin"
_COMPUTED = ("forward", TWIN)
_WATCHED: tuple[tuple[Any, str, str], ...] = (
    (run, "plan_extraction", "plan"),
    (run, "open_store", "open"),
    (ModelCaller, "call", "forward"),
    (StoreSink, "receive", "hooks"),
    (run, "prepare_missing", "prepare"),
    (FlatForm, "arguments", "batches"),
    (StoreSink, "announce", "records"),
    (RoomKeeper, "reserve", "room"),
    (StoreSink, "begin_unit", "wait for a buffer"),
    (ShardWriter, "close", "last flush"),
    (preparing, "tokenize", "tokenise"),
    (ShardWriter, "_write", "writer"),
)


class Clocks(AbstractContextManager[dict[str, float]]):
    """Install the clocks; yields the seconds of each part and of the twin, final once the block has ended.

    Args:
        twin: Calls a bare model with a batch.
    """

    def __init__(self, twin: Callable[[Batch | FlatBatch], object]) -> None:
        self._twin = twin
        self._num_calls = 0
        self._taken: dict[str, float] = dict.fromkeys((*MAIN, *BESIDE, TWIN), 0.0)
        self._originals: list[tuple[Any, str, Any]] = []
        self._stacks = threading.local()
        self._start = 0.0

    def __enter__(self) -> dict[str, float]:
        for owner, attribute, part in _WATCHED:
            original = getattr(owner, attribute)
            self._originals.append((owner, attribute, original))
            setattr(owner, attribute, self._watch(original, part))
        # wraps the timed call, so that the twin's time does not count as the run's
        ModelCaller.call = self._double(ModelCaller.call)
        self._start = time.perf_counter()
        return self._taken

    def __exit__(self, *raised: Any) -> None:
        whole = time.perf_counter() - self._start
        for owner, attribute, original in self._originals:
            setattr(owner, attribute, original)
        self._taken["rest"] = whole - sum(self._taken[part] for part in (*MAIN, TWIN))

    def _watch(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        clock = time.thread_time if part == "writer" else time.perf_counter
        wait = wait_for_model if part in _COMPUTED else _wait_for_nothing

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            wait()
            self._begin(clock)
            try:
                return function(*args, **kwargs)
            finally:
                wait()
                self._end(clock, part)

        return timed

    def _double(self, call: Callable[..., None]) -> Callable[..., None]:
        """Call the twin with every batch too."""
        twin = self._watch(self._twin, TWIN)

        @functools.wraps(call)
        def doubled(caller: ModelCaller, batch: Batch | FlatBatch, *args: Any) -> None:
            self._num_calls += 1
            steps = [lambda: call(caller, batch, *args), lambda: twin(batch)]
            for step in steps if self._num_calls % 2 else reversed(steps):
                step()

        return doubled

    def _begin(self, clock: Callable[[], float]) -> None:
        stack = self._stacks.__dict__.setdefault("within", [])
        stack.append([clock(), 0.0])

    def _end(self, clock: Callable[[], float], part: str) -> None:
        stack = self._stacks.within
        start, within = stack.pop()
        took = clock() - start
        self._taken[part] += took - within
        if stack:
            stack[-1][1] += took


def _wait_for_nothing() -> None:
    return None
