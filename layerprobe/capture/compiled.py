"""Hooks that survive `torch.compile`: operators that carry values out of a compiled graph.

Python that appends to a list or asks for its thread cannot be part of a graph, and a graph break is an error under
`fullgraph=True`. An operator can: the compiler sees an opaque call with tensors and numbers, keeps its place among
the others, and runs it for every batch of any length. So a hook that is traced calls an operator, and the operator
finds the probe by its number. A graph that outlives its probe calls a number that nobody has, and nothing happens.
Rows for a store are gathered and cast before that, in the graph, where the compiler can join it to what it computes.

Hides torch's operator registry and its compiler. Must never know of sites or sinks.
"""

import itertools
import sys
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["TAGS", "Follower", "Port", "Receiver", "find_receiver", "forget_compiled_graphs", "has_compiled"]

# A CUDA graph replays kernels and not Python; the compiler has to leave these calls out of it.
TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


class Follower(Protocol):
    """What a port tells of calls, as the graph runs."""

    def enter_compiled(
        self, stack: int, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None, cached: bool, number: int
    ) -> None:
        """A base model was called, with a key-value cache or without; a stack of -1 is the task model around it."""

    def leave_compiled(self, stack: int, completed: bool) -> None:
        """The model that was entered is done, or has raised."""


class Receiver(Follower, Protocol):
    """What a port tells of values too."""

    def receive_compiled(self, point: int, value: Tensor) -> None:
        """A module that is read made a value."""

    def receive_packed(self, point: int, rows_TD: Tensor, number: int) -> None:
        """A module that is read made rows, gathered and cast by the graph, in the call that was entered by `number`."""


_RECEIVERS: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


# `token` is said to be changed by every operator, and so the compiler neither drops nor reorders them.
@torch.library.custom_op("layerprobe::enter", mutates_args=("token",), tags=TAGS)
def _enter(
    token: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    embeds: Tensor | None,
    cached: bool,
    probe: int,
    stack: int,
    packs: bool,
) -> tuple[Tensor, Tensor]:
    """Tell of a call; gives the places of its real tokens in `[B * S]`, and a number that no other call has.

    Places are for rows that the graph gathers, so there are none where it does not. The number goes with those rows: a
    graph that is broken in two hands it on as Python does, and two threads could hand on each other's.
    """
    number = next(_NUMBERS)
    receiver = _RECEIVERS.get(probe)
    if receiver is not None:
        receiver.enter_compiled(stack, ids, mask, embeds, cached, number)
    tokens = ids if ids is not None else embeds
    if receiver is None or tokens is None or not packs:
        kept = token.new_empty(0, dtype=torch.int64)
    elif mask is None or mask.shape != tokens.shape[:2]:  # a mask of another shape is refused by the sink
        kept = torch.arange(tokens.shape[0] * tokens.shape[1], device=tokens.device)
    else:
        kept = (mask != 0).flatten().nonzero()[:, 0]
    return kept, torch.tensor([number])


@_enter.register_fake
def _(token: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return token.new_empty(count, dtype=torch.int64), torch.empty(1, dtype=torch.int64)


@torch.library.custom_op("layerprobe::receive", mutates_args=("token",), tags=TAGS)
def _receive(token: Tensor, value: Tensor, probe: int, point: int) -> None:
    receiver = _RECEIVERS.get(probe)
    if receiver is not None:
        receiver.receive_compiled(point, value)


@torch.library.custom_op("layerprobe::receive_packed", mutates_args=("token",), tags=TAGS)
def _receive_packed(token: Tensor, rows_TD: Tensor, number: Tensor, probe: int, point: int) -> None:
    receiver = _RECEIVERS.get(probe)
    if receiver is not None:
        receiver.receive_packed(point, rows_TD, int(number))


@torch.library.custom_op("layerprobe::leave", mutates_args=("token",), tags=TAGS)
def _leave(token: Tensor, probe: int, stack: int, completed: bool) -> None:
    receiver = _RECEIVERS.get(probe)
    if receiver is not None:
        receiver.leave_compiled(stack, completed)


class Port:
    """The way out of compiled graphs for one probe.

    Args:
        receiver: What is told; held weakly.
        device: Where the model is.
        packs: Whether rows are wanted without padding, and cast to `dtype` (None: as they are).
    """

    def __init__(
        self, receiver: Follower, device: torch.device, packs: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        self.number = next(_NUMBERS)
        with torch.inference_mode(False):
            self.token = torch.zeros(1, device=device)
        self._packs = packs
        self._dtype = dtype
        # Values with their history, which operators do not carry: a graph gives them to Python once it has run.
        self._attached: list[Tensor | None] | None = None
        # Of the call that is being traced; None where the base itself is not in the graph.
        self._entered: tuple[Tensor, Tensor] | None = None
        self._receiver = weakref.ref(receiver)

    def open(self) -> None:
        """Hear of graphs from now on."""
        receiver = self._receiver()
        if receiver is not None:
            _RECEIVERS[self.number] = receiver

    def close(self) -> None:
        """Hear no more of graphs that were compiled with this port."""
        _RECEIVERS.pop(self.number, None)

    def keep_history(self, num_points: int) -> None:
        """Let graphs give their values to Python too, for autograd."""
        self._attached = [None] * num_points

    def take_attached(self) -> dict[int, Tensor]:
        """Give what the last graph gave to Python, by point, and forget it."""
        attached = self._attached or []
        taken = {point: value for point, value in enumerate(attached) if value is not None}
        for point in taken:
            attached[point] = None
        return taken

    def enter(self, stack: int, ids: Any, mask: Any, embeds: Any, cached: bool) -> None:
        """Tell of a call, from within a graph."""
        tensors = [value if isinstance(value, Tensor) else None for value in (ids, mask, embeds)]
        entered = torch.ops.layerprobe.enter(self.token, *tensors, cached, self.number, stack, self._packs)
        if self._packs and stack >= 0:
            self._entered = entered

    def receive(self, point: int, value: Tensor, is_rows: bool = False) -> None:
        """Tell of a value, from within a graph; `is_rows`: it has a row per token."""
        if self._attached is not None and value.requires_grad:
            self._attached[point] = value
        value = value.detach()
        if not (is_rows and self._entered is not None and value.ndim == 3):
            torch.ops.layerprobe.receive(self.token, value, self.number, point)
            return
        kept, number = self._entered
        rows = value.flatten(0, 1).index_select(0, kept)
        rows = rows if self._dtype is None else rows.to(self._dtype)
        torch.ops.layerprobe.receive_packed(self.token, rows, number, self.number, point)

    def leave(self, stack: int, completed: bool) -> None:
        """Tell of the end of a call, from within a graph."""
        self._entered = None
        torch.ops.layerprobe.leave(self.token, self.number, stack, completed)


def find_receiver(number: int) -> Any:
    """Find whom the open port of this number tells, for operators of others; None once it is closed."""
    return _RECEIVERS.get(number)


def has_compiled() -> bool:
    """Tell whether anything in this process was compiled, and so perhaps the model.

    A compiled function that calls the model, or a module around it, cannot be found from the model.
    """
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    return bool(getattr(convert_frame, "FRAME_COUNTER", 0))


def forget_compiled_graphs() -> None:
    """Let the next call of a compiled model be compiled anew: torch does not notice that hooks have come or gone."""
    torch.compiler.reset()
