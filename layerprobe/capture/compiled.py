"""Hooks that survive `torch.compile`: operators that carry values out of a compiled graph.

Python that appends to a list or asks for its thread cannot be part of a graph, and a graph break is an error under
`fullgraph=True`. An operator can: the compiler sees an opaque call with tensors and numbers, keeps its place among
the others, and runs it for every batch of any length. So a hook that is traced calls an operator, and the operator
finds the probe by its number. A graph that outlives its probe calls a number that nobody has, and nothing happens.

Hides torch's operator registry and its compiler. Must never know of sites or sinks.
"""

import itertools
import sys
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Port", "Receiver", "forget_compiled_graphs", "has_compiled"]

# A CUDA graph replays kernels and not Python; the compiler has to leave these calls out of it.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


class Receiver(Protocol):
    """What a port talks to, as the graph runs."""

    def enter_compiled(
        self, stack: int, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None, cached: bool
    ) -> None:
        """A base model was called, with a key-value cache or without; a stack of -1 is the task model around it."""

    def receive_compiled(self, point: int, value: Tensor) -> None:
        """A module that is read made a value."""

    def leave_compiled(self, stack: int, completed: bool) -> None:
        """The model that was entered is done, or has raised."""


_RECEIVERS: "weakref.WeakValueDictionary[int, Receiver]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


# `token` is said to be changed by every operator, and so the compiler neither drops nor reorders them.
@torch.library.custom_op("layerprobe::enter", mutates_args=("token",), tags=_TAGS)
def _enter(
    token: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    embeds: Tensor | None,
    cached: bool,
    probe: int,
    stack: int,
) -> None:
    receiver = _RECEIVERS.get(probe)
    if receiver is not None:
        receiver.enter_compiled(stack, ids, mask, embeds, cached)


@torch.library.custom_op("layerprobe::receive", mutates_args=("token",), tags=_TAGS)
def _receive(token: Tensor, value: Tensor, probe: int, point: int) -> None:
    receiver = _RECEIVERS.get(probe)
    if receiver is not None:
        receiver.receive_compiled(point, value)


@torch.library.custom_op("layerprobe::leave", mutates_args=("token",), tags=_TAGS)
def _leave(token: Tensor, probe: int, stack: int, completed: bool) -> None:
    receiver = _RECEIVERS.get(probe)
    if receiver is not None:
        receiver.leave_compiled(stack, completed)


class Port:
    """The way out of compiled graphs for one probe.

    Args:
        receiver: What is told; held weakly.
        device: Where the model is.
    """

    def __init__(self, receiver: Receiver, device: torch.device) -> None:
        self.number = next(_NUMBERS)
        with torch.inference_mode(False):
            self.token = torch.zeros(1, device=device)
        self._receiver = weakref.ref(receiver)

    def open(self) -> None:
        """Hear of graphs from now on."""
        receiver = self._receiver()
        if receiver is not None:
            _RECEIVERS[self.number] = receiver

    def close(self) -> None:
        """Hear no more of graphs that were compiled with this port."""
        _RECEIVERS.pop(self.number, None)

    def enter(self, stack: int, ids: Any, mask: Any, embeds: Any, cached: bool) -> None:
        """Tell of a call, from within a graph."""
        tensors = [value if isinstance(value, Tensor) else None for value in (ids, mask, embeds)]
        torch.ops.layerprobe.enter(self.token, *tensors, cached, self.number, stack)

    def receive(self, point: int, value: Tensor) -> None:
        """Tell of a value, from within a graph."""
        torch.ops.layerprobe.receive(self.token, value.detach(), self.number, point)

    def leave(self, stack: int, completed: bool) -> None:
        """Tell of the end of a call, from within a graph."""
        torch.ops.layerprobe.leave(self.token, self.number, stack, completed)


def has_compiled() -> bool:
    """Tell whether anything in this process was compiled, and so perhaps the model.

    A compiled function that calls the model, or a module around it, cannot be found from the model.
    """
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    return bool(getattr(convert_frame, "FRAME_COUNTER", 0))


def forget_compiled_graphs() -> None:
    """Let the next call of a compiled model be compiled anew: torch does not notice that hooks have come or gone."""
    torch.compiler.reset()
