"""What a staged lane asks of a device: that copies go beside the model's own work, and to know when they are over.

Hides CUDA's streams and events. Must never know what is copied.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CudaStreams", "PlainCopies", "Streams"]


class Streams(Protocol):
    """The few things a staged lane asks of a device; tests give it one that delays every copy."""

    def record(self) -> Any:
        """Mark the point that the model's stream has reached."""

    def hold(self, event: Any) -> None:
        """Let the model's stream wait for an event, without stopping the host."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy on the copy stream once `after` has passed; gives the event of its end."""

    def wait(self, event: Any) -> None:
        """Stop the host until an event has passed."""

    def has_passed(self, event: Any) -> bool:
        """Whether an event has passed, without waiting for it."""
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
            # a writer thread waits for it, asleep: one that spins takes a core from the thread that feeds the model
            event = torch.cuda.Event(blocking=True)
            event.record(self._copy_stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        # the first device is the current one of a new thread, and would get a context that nobody needs
        with torch.cuda.device(self._device):
            event.synchronize()

    def has_passed(self, event: torch.cuda.Event) -> bool:
        return event.query()


class PlainCopies:
    """For devices whose copies to the host are over when the call returns: nothing to wait for."""

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
