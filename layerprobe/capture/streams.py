"""Streams for a staged lane: run copies beside the model's own work and signal their completion.

Hides CUDA's streams and events. Must never know what is copied.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CudaStreams", "PlainCopies", "Streams"]


class Streams(Protocol):
    """The device operations that a staged lane needs; tests substitute one that delays every copy."""

    def record(self) -> Any:
        """Record an event at the current point of the model's stream."""

    def hold(self, event: Any) -> None:
        """Make the model's stream wait for an event, without blocking the host."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy on the copy stream once `after` has passed; returns an event for the end of the copy."""

    def wait(self, event: Any) -> None:
        """Block the host until an event has passed."""

    def has_passed(self, event: Any) -> bool:
        """Return whether an event has passed, without blocking."""
        ...


class CudaStreams:
    """A copy stream beside the model's own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy_stream = torch.cuda.Stream(device)

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def hold(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            # blocking: the waiting writer thread sleeps instead of spinning on a core that the model's thread needs
            event = torch.cuda.Event(blocking=True)
            event.record(self._copy_stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        # otherwise a new thread would use the first device and create a context there that nobody needs
        with torch.cuda.device(self._device):
            event.synchronize()

    def has_passed(self, event: torch.cuda.Event) -> bool:
        return event.query()


class PlainCopies:
    """For devices whose copies to the host block, so that there is nothing to wait for."""

    def record(self) -> None:
        return None

    def hold(self, event: None) -> None:
        return None

    def copy(self, target: Tensor, source: Tensor, after: None) -> None:
        target.copy_(source)

    def wait(self, event: None) -> None:
        return None

    def has_passed(self, event: None) -> bool:
        return True
