"""Measure time on a device, and the device's peak throughput.

A clock records marks while a model runs and converts them to seconds afterwards: the CPU's counter, or events on the
stream of a CUDA device, so that nothing waits for the GPU meanwhile. The peaks are measured with a short matrix product
in the model's dtype and a short copy, on the model's device.

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

# Large enough to keep every core or multiprocessor busy, small enough to finish quickly.
_PRODUCT_SIZE = {"cpu": 1024, "cuda": 4096}
_COPY_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
_ROUNDS = 5


class Clock(Protocol):
    """Records marks; the time between two marks is an interval."""

    def mark(self) -> None:
        """Record the current time."""

    def take_intervals(self) -> list[float]:
        """Return the seconds between consecutive marks, and clear the marks."""
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
    """Records events on the stream, between the model's kernels."""

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
    """Measured peaks: floating-point operations per second in a product, bytes per second in a copy."""

    flops_per_s: float
    bytes_per_s: float


def check_device(device: torch.device) -> None:
    """Check that times can be measured on a device.

    Raises:
        OptionError: they cannot.
    """
    if device.type not in _PRODUCT_SIZE:
        raise OptionError(f"a profile on {str(device)!r}: times are taken on 'cpu' and 'cuda'. Move the model there.")


def make_clock(device: torch.device) -> Clock:
    """Return a clock for a device."""
    return _CudaClock(device) if device.type == "cuda" else _CpuClock()


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Measure a device's peak throughput with a square matrix product and a copy, taking the best of a few runs.

    A copy counts each byte twice, as read and as written.

    Cost: some tenths of a second; meanwhile the memory of 3 matrices and twice the copy's bytes.
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
    # a clock that did not advance would give an infinite peak
    return max(best, 1e-9)
