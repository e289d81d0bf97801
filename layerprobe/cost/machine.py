"""Time on a device, and what the device can do at most.

A clock takes marks while a model runs and turns them into seconds afterwards: the CPU's own counter, or events on the
stream of a CUDA device, so that nothing waits for the GPU while it works. The peaks are those of a short matrix product
and a short copy, taken where and in what dtype the model computes.

Hides torch's events. Must never know of models or sites.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from layerprobe.errors import OptionError

__all__ = ["Clock", "Peaks", "check_device", "make_clock", "measure_peaks"]

# Large enough to keep every core or multiprocessor busy, small enough to be over in a moment.
_PRODUCT_SIZE = {"cpu": 1024, "cuda": 4096}
_COPY_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
_ROUNDS = 5


class Clock(Protocol):
    """Takes marks; the time between two of them is an interval."""

    def mark(self) -> None:
        """Take the time now."""

    def take_intervals(self) -> list[float]:
        """Give the seconds between each mark and the next, and forget the marks."""
        ...


class _CpuClock:
    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def take_intervals(self) -> list[float]:
        marks, self._marks = self._marks, []
        return [later - sooner for sooner, later in itertools.pairwise(marks)]


class _CudaClock:
    """Marks lie on the stream, among the kernels of the model."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def take_intervals(self) -> list[float]:
        torch.cuda.synchronize(self._device)
        marks, self._marks = self._marks, []
        return [sooner.elapsed_time(later) / 1e3 for sooner, later in itertools.pairwise(marks)]


@dataclass(frozen=True)
class Peaks:
    """What the device reached: floating-point operations per second in a product, bytes per second in a copy."""

    flops_per_s: float
    bytes_per_s: float


def check_device(device: torch.device) -> None:
    """Make sure that times can be taken on a device.

    Raises:
        OptionError: they cannot.
    """
    if device.type not in _PRODUCT_SIZE:
        raise OptionError(f"a profile on {str(device)!r}: times are taken on 'cpu' and 'cuda'. Move the model there.")


def make_clock(device: torch.device) -> Clock:
    """Make the clock of a device."""
    return _CudaClock(device) if device.type == "cuda" else _CpuClock()


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Measure what a device does at most, by a square matrix product and by a copy, the best of a few.

    A copy reads and writes each byte, so both count.

    Cost: some tenths of a second; 3 matrices and twice the copy's bytes for as long.
    """
    check_device(device)
    size, num_bytes = _PRODUCT_SIZE[device.type], _COPY_BYTES[device.type]
    with torch.inference_mode():
        left = torch.randn(size, size, device=device).to(dtype)
        product = torch.empty_like(left)
        product_s = _time_best(device, lambda: torch.mm(left, left, out=product))
        source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        copy_s = _time_best(device, lambda: target.copy_(source))
    return Peaks(2 * size**3 / product_s, 2 * num_bytes / copy_s)


def _time_best(device: torch.device, run: Callable[[], object]) -> float:
    clock = make_clock(device)
    run()
    best = float("inf")
    for _ in range(_ROUNDS):
        clock.mark()
        run()
        clock.mark()
        best = min(best, *clock.take_intervals())
    # a clock that did not move would make a peak without bound
    return max(best, 1e-9)
