"""Shared parts of the benchmarks: interleaved timing, peak memory, tables, and the JSON line at the end.

Rivals take turns within one process, in an order that rotates from round to round, so that a slow second of the
machine affects all of them alike. A ratio is the median of the ratios within a round. CPU time covers every thread of
the process, the writer included, and is the more stable of the two on a shared machine.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from layerprobe.cli.allocator import keep_freed_memory

__all__ = ["Rival", "Timings", "emit", "interleave", "make_parser", "peak_bytes", "read_peak", "read_results"]

_RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, eq=False)
class Rival:
    """One way to do the job.

    Args:
        run: Does it `calls` times.
        calls: How often `run` calls the model; times are given per call.
        prepare: Called before each run, outside the timing; its result is passed to `run`.
        finish: Called with that result after each run, outside the timing.
    """

    run: Callable[[Any], object]
    calls: int = 1
    prepare: Callable[[], Any] = lambda: None
    finish: Callable[[Any], object] = lambda _: None


@dataclass
class Timings:
    """Seconds per call of one rival, round by round."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def summary(self, base: "Timings") -> dict[str, float]:
        """Medians in milliseconds per call, and ratios to another rival."""
        return {
            "wall_ms": round(1e3 * statistics.median(self.wall_s), 3),
            "cpu_ms": round(1e3 * statistics.median(self.cpu_s), 3),
            "wall_ratio": round(_median_ratio(self.wall_s, base.wall_s), 3),
            "cpu_ratio": round(_median_ratio(self.cpu_s, base.cpu_s), 3),
        }


def _median_ratio(times: list[float], base: list[float]) -> float:
    return statistics.median(mine / theirs for mine, theirs in zip(times, base, strict=True))


def interleave(
    rivals: Mapping[str, Rival], *, seconds: float, least_rounds: int = 2, most_rounds: int = 40, warm_rounds: int = 1
) -> dict[str, Timings]:
    """Time rivals in turns for `seconds`, after warm-up rounds that do not count.

    Returns:
        Timings by name, one entry per round.
    """
    names = list(rivals)
    timings = {name: Timings() for name in names}
    for _round in range(warm_rounds):
        for name in names:
            _time(rivals[name], Timings())
    start = time.perf_counter()
    for number in range(most_rounds):
        if number >= least_rounds and time.perf_counter() - start >= seconds:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            _time(rivals[name], timings[name])
    return timings


def _time(rival: Rival, timings: Timings) -> None:
    prepared = rival.prepare()
    gc.collect()  # so that no rival's time includes collecting another's garbage
    _wait_for_gpu()
    wall, cpu = time.perf_counter(), time.process_time()
    kept = rival.run(prepared)
    _wait_for_gpu()
    timings.cpu_s.append((time.process_time() - cpu) / rival.calls)
    timings.wall_s.append((time.perf_counter() - wall) / rival.calls)
    rival.finish(prepared)
    del kept  # captured values are kept until the clock stops, and no longer


def _wait_for_gpu() -> None:
    """Wait until a GPU in use has finished all its work, since calls return before that."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes(work: Callable[[], object]) -> int:
    """Measure the peak of torch's own allocations while `work` runs, above what was allocated before.

    The profiler records every allocation and release of torch's CPU allocator; summing them in order of time is exact
    and repeatable, while the resident size of a process depends on what malloc returns to the system.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: list[Any] = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def read_peak(resets: bool = False) -> int:
    """Return the peak resident memory of this process in bytes.

    Args:
        resets: Whether to reset the peak to what is resident now.
    """
    if resets:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    # not getrusage, whose peak is inherited from the parent process
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(peak)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make the parser with the options of all benchmarks.

    From here on the process keeps freed memory, whichever rival runs, as the command `layerprobe extract` does: whether
    the C library returns it to the system in between is chance, and would outweigh what is measured.
    """
    keep_freed_memory()
    # without the usage, an error is one line
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="small sizes, few rounds: to see that it runs")
    sizes.add_argument("--save", action="store_true", help="write the JSON line to benchmarks/results too")
    return parser


def emit(name: str, settings: Mapping[str, Any], results: Any, *, save: bool) -> None:
    """Print the JSON line, and save it if requested."""
    document = {
        "benchmark": name,
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "allocator": "freed memory is kept",
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "safetensors", "numpy")},
        },
        "settings": dict(settings),
        "results": results,
    }
    print(json.dumps(document))
    if save:
        _RESULTS.mkdir(exist_ok=True)
        (_RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_results(name: str) -> Any:
    """Return the results saved last."""
    return json.loads((_RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
