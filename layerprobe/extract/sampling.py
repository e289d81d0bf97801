"""Measure how fast the first texts of an input run, under the conditions of a longer run.

Chunks of texts become units of one plan in one engine, so the model is probed once, and compiled at most once. Shards
are removed from the disk as soon as their size is known.

Hides what is counted and what is not. Must never know what a longer run costs.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

from layerprobe.extract.ahead import prepare_ahead
from layerprobe.extract.cutting import Unit
from layerprobe.extract.engine import UnitEngine, ending_waits
from layerprobe.extract.folder import hold_store
from layerprobe.extract.forward import CUDA_GRAPHS, count_compiled
from layerprobe.extract.inputs import TextSource
from layerprobe.extract.plan import Plan
from layerprobe.extract.preparing import prepare_missing
from layerprobe.extract.records import InputDigest, Record
from layerprobe.extract.reports import RunReport
from layerprobe.extract.space import RoomKeeper
from layerprobe.extract.tokens import NO_TEXTS

__all__ = ["MOST_EXAMPLES", "SamplePace", "Sampler", "check_records", "grow_sample"]

# Texts of the first chunk, and of the largest chunk.
_FIRST_EXAMPLES, MOST_EXAMPLES = 8, 2048
_GROWTH = 8
_MUCH_LARGER = 4
# No chunk is started for less than this share of the time.
_LEAST_LEFT = 0.05


@dataclass(frozen=True)
class SamplePace:
    """Cost of a sample: examples, tokens, bytes on disk, seconds in all, and seconds stalled by the disk."""

    num_examples: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    stalled_s: float = 0.0

    def plus(self, other: "SamplePace") -> "SamplePace":
        """Return the sum of both samples."""
        return SamplePace(*(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True)))


class Sampler(AbstractContextManager["Sampler"]):
    """Run chunks of texts under a plan, and measure them.

    Args:
        plan: Its sites, batches and shards are used; its own texts are not read, and its store is never complete.

    `pace` is what was measured, final once the block has ended. The time to write the last shard is left out: a run
    waits for that only once, however long it is.
    """

    def __init__(self, plan: Plan) -> None:
        # a run tokenises all but its first texts, so the sample must not use the ids that the plan has of them
        self._plan = replace(plan, first_texts=(), first=NO_TEXTS)
        self._report = RunReport()
        self._engine: UnitEngine | None = None
        self._open = contextlib.ExitStack()
        self._num_units = 0
        self._sizes: dict[int, int] = {}
        self._counted: set[int] = set()
        self._pace = SamplePace()

    @property
    def pace(self) -> SamplePace:
        """What has been measured."""
        return replace(self._pace, num_bytes=sum(self._sizes.get(number, 0) for number in self._counted))

    def __enter__(self) -> "Sampler":
        stop = threading.Event()
        keeper = RoomKeeper(self._plan.place.folder, False, stop, self._report.count_wait)
        with self._open as entering:
            self._plan, _ = entering.enter_context(hold_store(self._plan, keeper))
            self._engine = UnitEngine(self._plan, keeper, self._report, lambda _: None)
            entering.enter_context(self._engine)
            entering.enter_context(ending_waits(stop))
            self._open = entering.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._open.__exit__(*raised)
        self._sweep()

    def run(self, records: Sequence[Record], first_example: int) -> float:
        """Run texts, measure them, and return the seconds that they took.

        Compilation and CUDA graph capture happen only once in a run, however long it is. If they happened during these
        texts, the texts are run again and only the second time counts.
        """
        backend = self._plan.options.compile
        num_compiled = count_compiled(backend)
        pace, numbers = self._run(records, first_example)
        if backend == CUDA_GRAPHS or count_compiled(backend) != num_compiled:
            pace, numbers = self._run(records, first_example)
        self._pace = self._pace.plus(pace)
        self._counted.update(numbers)
        return pace.seconds

    def forget(self) -> None:
        """Discard all measurements so far."""
        self._pace, self._counted = SamplePace(), set()

    def _run(self, records: Sequence[Record], first_example: int) -> tuple[SamplePace, range]:
        engine, before, first_unit = self._engine, replace(self._report), self._num_units
        assert engine is not None
        start = time.perf_counter()
        for prepared in prepare_ahead(self._cut(records, first_example), partial(prepare_missing, self._plan)):
            assert prepared is not None
            self._num_units += 1
            engine.run(prepared)
            self._sweep()
        seconds = max(time.perf_counter() - start, 1e-9)
        pace = SamplePace(
            num_examples=self._report.num_examples - before.num_examples,
            num_tokens=self._report.num_tokens - before.num_tokens,
            seconds=seconds,
            stalled_s=self._report.stalled_s - before.stalled_s,
        )
        return pace, range(first_unit, self._num_units)

    def _cut(self, records: Sequence[Record], first_example: int) -> Iterator[Unit]:
        first_unit = self._num_units
        for unit in self._plan.rule.cut(iter(records)):
            number, first = first_unit + unit.number, first_example + unit.first_example
            yield replace(unit, number=number, first_example=first)

    def _sweep(self) -> None:
        """Remove the committed shards, and keep their sizes."""
        assert self._engine is not None
        for header in self._engine.committed[len(self._sizes) :]:
            file = self._plan.folder / header.file
            self._sizes[header.unit] = file.stat().st_size
            file.unlink()


def check_records(source: TextSource) -> Iterator[Record]:
    """Iterate over an input.

    Raises:
        InputError: a run would not accept a record.
    """
    digest = InputDigest(source.name)
    for record in source:
        digest.add(record)
        yield record


def grow_sample(
    source: TextSource, seconds: float, run: Callable[[Sequence[Record], int], float], forget: Callable[[], None]
) -> None:
    """Run chunks of texts for about `seconds`.

    A small chunk gives the pace, and is discarded once a much larger one can start from the same first texts, because
    it mostly measures the first calls of the model and the creation of the store's files.

    Args:
        source: The texts.
        seconds: How long, in the seconds that `run` returns.
        run: Runs texts, given the ordinal of the first in the input, and returns the seconds that count.
        forget: Called when everything run so far no longer counts.
    """
    num_counted, spent_s, size, records = 0, 0.0, _FIRST_EXAMPLES, check_records(source)
    while chunk := list(itertools.islice(records, size)):
        run_s = run(chunk, num_counted)
        num_counted += len(chunk)
        spent_s += run_s
        left_s = seconds - spent_s
        if len(chunk) < size or left_s < _LEAST_LEFT * seconds:
            return
        size = max(1, int(min(left_s * len(chunk) / run_s, _GROWTH * len(chunk), MOST_EXAMPLES)))
        if size >= _MUCH_LARGER * num_counted:
            forget()
            num_counted, records = 0, check_records(source)
