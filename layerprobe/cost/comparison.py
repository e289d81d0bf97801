"""Measure the overhead of capturing: time the same batch bare and captured in several ways, alternating.

Each way runs several forward passes, and its cleanup is timed too: a store is closed and on disk before the clock
stops. Ratios are taken between neighbours in time, because a machine's speed drifts.

Must never assert a time.
"""

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerprobe.analysis.results import give_json
from layerprobe.capture.probe import Probe
from layerprobe.cost.results import median_ratio
from layerprobe.errors import OptionError
from layerprobe.models import LoadedModel, evaluating
from layerprobe.profile import check_runs
from layerprobe.sites.resolve import DEFAULT_SITES, map_model
from layerprobe.sites.stacks import find_called
from layerprobe.tables import format_table

__all__ = ["COMPARISONS", "Comparison", "compare"]

COMPARISONS = ("hidden_states",)
# Duration of one round of one way: long enough that closing a store is a small part of it.
_ROUND_S = 0.25
_MOST_CALLS = 64


@dataclass(frozen=True)
class Comparison:
    """Seconds per forward pass of each way, round by round; prints as a table.

    Args:
        seconds: By way; `bare` is the model alone.
        num_calls: Forward passes per round.
        sites: Patterns that were captured.
    """

    seconds: Mapping[str, tuple[float, ...]]
    num_calls: int
    sites: tuple[str, ...] = DEFAULT_SITES

    def ratio(self, way: str) -> float:
        """Return a way's time divided by that of the bare model in the same round; the median over rounds."""
        return median_ratio(self.seconds[way], self.seconds["bare"])

    def __str__(self) -> str:
        rows = [
            (way, round(statistics.median(taken) * 1e3, 3), round(self.ratio(way), 3))
            for way, taken in self.seconds.items()
        ]
        rounds = len(self.seconds["bare"])
        table = format_table(("watched by", "ms per forward", "of bare"), rows)
        return f"{table}\n\nmedians of {rounds} rounds of {self.num_calls} forwards, in turns; {', '.join(self.sites)}"

    def describe(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {
            "calls": self.num_calls,
            "sites": list(self.sites),
            "seconds": {way: list(taken) for way, taken in self.seconds.items()},
            "ratios": {way: self.ratio(way) for way in self.seconds},
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """Return everything as JSON, and write it to a path if given.

        Raises:
            StoreError: the file cannot be written.
        """
        return give_json(self.describe(), path)


def compare(
    model: nn.Module | LoadedModel, batch: Mapping[str, Any], what: str = "hidden_states", *, repeats: int = 10
) -> Comparison:
    """Time a batch bare, with hooks that keep nothing, with `output_hidden_states`, into memory and into a store.

    Args:
        model, batch, repeats: As for `lp.profile`; a repeat is one round of all ways.
        what: `hidden_states`: the embeddings and every layer, as far as the model has them.

    Raises:
        OptionError: `what` is another word, or the model cannot be timed.

    Cost: disk space for the store of one round in the temporary folder, deleted afterwards.
    """
    if what not in COMPARISONS:
        raise OptionError(f"compare {what!r}: use {', '.join(COMPARISONS)}.")
    network = find_called(model)
    device = check_runs(network, repeats)
    # the sites of `output_hidden_states`, except for a final norm
    sites = map_model(network).leave_out_missing()
    taken: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, evaluating(network), torch.inference_mode():
        ways = _list_ways(network, sites, Path(folder))
        # the first forward pass of a process is the slowest, so take the second
        _, once = (_time_way(network, batch, *ways[0][1:], 1, 0, device) for _ in range(2))
        num_calls = max(1, min(_MOST_CALLS, math.ceil(_ROUND_S / once)))
        for number in range(-1, repeats):
            for way, enter, options in ways:
                seconds = _time_way(network, batch, enter, options, num_calls, number, device)
                if number >= 0:
                    taken.setdefault(way, []).append(seconds / num_calls)
            shutil.rmtree(Path(folder) / str(number))
    return Comparison({way: tuple(seconds) for way, seconds in taken.items()}, num_calls, tuple(sites))


Enter = Callable[[int], AbstractContextManager[Any]]


def _list_ways(
    network: nn.Module, sites: Sequence[str], folder: Path
) -> Sequence[tuple[str, Enter, Mapping[str, Any]]]:
    """List each way with its context manager and the extra arguments of its forward passes."""
    return (
        ("bare", lambda _: nullcontext(), {}),
        ("hooks", lambda _: Probe(network, sites, to=_keep_nothing), {}),
        ("hidden_states", lambda _: nullcontext(), {"output_hidden_states": True}),
        ("memory", lambda _: Probe(network, sites), {}),
        ("store", lambda number: Probe(network, sites, to=folder / str(number)), {}),
    )


def _keep_nothing(site: str, value: Any) -> None:
    return None


def _time_way(
    network: nn.Module,
    batch: Mapping[str, Any],
    enter: Enter,
    options: Mapping[str, Any],
    num_calls: int,
    number: int,
    device: torch.device,
) -> float:
    """Return the seconds from the first forward pass to the exit of the context manager."""
    with enter(number):
        _wait(device)
        start = time.perf_counter()
        for _ in range(num_calls):
            network(**batch, **options)
    _wait(device)
    return max(time.perf_counter() - start, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
