"""Hooks that survive `torch.compile`: operators that carry values out of a compiled graph.

Python that appends to a list or asks for its thread cannot be part of a graph, and a graph break is an error under
`fullgraph=True`. An operator can: the compiler sees an opaque call with tensors and numbers, keeps its place among
the others, and runs it for every batch of any length. So a hook that is traced calls an operator, and the operator
finds the probe by its number. A graph that outlives its probe calls a number that nobody has, and nothing happens.
Rows for a store are gathered and cast before that, in the graph, where the compiler can join it to what it computes.

Hides torch's operator registry and its compiler. Must never know of sites or sinks.
"""

import contextlib
import itertools
import sys
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._guards import TracingContext

from layerprobe.errors import CaptureError
from layerprobe.sharing import SharedSetting

__all__ = [
    "TAGS",
    "Follower",
    "Outlet",
    "Port",
    "Reading",
    "Receiver",
    "find_receiver",
    "forget_compiled_graphs",
    "has_compiled",
    "watching_hooks",
]

# A CUDA graph replays kernels and not Python; the compiler has to leave these calls out of it.
TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


class Reading(NamedTuple):
    """What is read at one module: the sites, by index, and whether it gives its value in chunks."""

    indices: tuple[int, ...]
    is_chunked: bool


class Outlet(Protocol):
    """The way out of a graph, as hooks see it while they are traced."""

    def enter(self, stack: int, ids: Any, mask: Any, embeds: Any, cached: bool) -> None:
        """A base model is called; a stack of -1 is the task model around it."""

    def receive(self, point: int, value: Any, is_rows: bool = False) -> None:
        """A module that is read made a value."""

    def leave(self, stack: int, completed: bool) -> None:
        """The model that was entered is done, or has raised."""


class Follower(Protocol):
    """What a port tells of calls, as the graph runs."""

    def enter_compiled(
        self, stack: int, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None, cached: bool
    ) -> None:
        """A base model was called, with a key-value cache or without; a stack of -1 is the task model around it."""

    def leave_compiled(self, stack: int, completed: bool) -> None:
        """The model that was entered is done, or has raised."""


class Receiver(Follower, Protocol):
    """What a port tells of values too."""

    def receive_compiled(self, point: int, value: Tensor) -> None:
        """A module that is read made a value."""

    def find_places(self, point: int, num_sequences: int, num_positions: int) -> Tensor | None:
        """Where the real tokens of this thread's call are in `[B * S]`; None where no call is running."""
        ...

    def receive_packed(self, point: int, rows_TD: Tensor) -> None:
        """A module that is read made rows, gathered and cast by the graph."""


_RECEIVERS: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


# `token` is said to be changed by every operator, and so the compiler neither drops nor reorders them.
@torch.library.custom_op("layerprobe::enter", mutates_args=("token",), **TAGS)
def _enter(
    token: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    embeds: Tensor | None,
    cached: bool,
    probe: int,
    stack: int,
) -> None:
    receiver: Follower | None = _RECEIVERS.get(probe)
    if receiver is not None:
        receiver.enter_compiled(stack, ids, mask, embeds, cached)


@torch.library.custom_op("layerprobe::places", mutates_args=("token",), **TAGS)
def _places(token: Tensor, probe: int, point: int, num_sequences: int, num_positions: int) -> Tensor:
    """Ask where the real tokens are; asked for each value, since Python could hand on another thread's answer."""
    receiver: Receiver | None = _RECEIVERS.get(probe)
    found = receiver.find_places(point, num_sequences, num_positions) if receiver is not None else None
    # a graph uses the memory of what it is given again
    return token.new_empty(0, dtype=torch.int64) if found is None else found.clone()


@_places.register_fake
def _(token: Tensor, *_: Any) -> Tensor:
    return token.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@torch.library.custom_op("layerprobe::receive", mutates_args=("token",), **TAGS)
def _receive(token: Tensor, value: Tensor, probe: int, point: int) -> None:
    receiver: Receiver | None = _RECEIVERS.get(probe)
    if receiver is not None:
        receiver.receive_compiled(point, value)


@torch.library.custom_op("layerprobe::receive_packed", mutates_args=("token",), **TAGS)
def _receive_packed(token: Tensor, rows_TD: Tensor, probe: int, point: int) -> None:
    receiver: Receiver | None = _RECEIVERS.get(probe)
    if receiver is not None:
        receiver.receive_packed(point, rows_TD)


@torch.library.custom_op("layerprobe::leave", mutates_args=("token",), **TAGS)
def _leave(token: Tensor, probe: int, stack: int, completed: bool) -> None:
    receiver: Follower | None = _RECEIVERS.get(probe)
    if receiver is not None:
        receiver.leave_compiled(stack, completed)


def _takes_any_number() -> bool:
    """Whether the graph that is traced may hold an operator that gives a number of rows of its own choice.

    Under `fullgraph=True` or `capture_dynamic_output_shape_ops` it may. Elsewhere the compiler would break the graph
    there, and take what it made of one layer for another, without the hook.
    """
    context = TracingContext.try_get()
    shapes = getattr(getattr(context, "fake_mode", None), "shape_env", None)
    return bool(getattr(shapes, "allow_dynamic_output_shape_ops", False))


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
        # here and not above the function, since it imports the compiler, which takes a second
        torch.compiler.assume_constant_result(_takes_any_number)
        self.number = next(_NUMBERS)
        with torch.inference_mode(False):
            self.token = torch.zeros(1, device=device)
        self._packs = packs
        self._dtype = dtype
        # Values with their history, which operators do not carry: a graph gives them to Python once it has run.
        self._attached: list[Tensor | None] | None = None
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
        attached: list[Tensor | None] = [None] * num_points
        self._attached = attached

    def take_attached(self) -> dict[int, Tensor]:
        """Give what the last graph gave to Python, by point, and forget it."""
        attached: list[Tensor | None] = self._attached or []
        taken = {point: value for point, value in enumerate(attached) if value is not None}
        for point in taken:
            attached[point] = None
        return taken

    def enter(self, stack: int, ids: Any, mask: Any, embeds: Any, cached: bool) -> None:
        """Tell of a call, from within a graph."""
        tensors = [value if isinstance(value, Tensor) else None for value in (ids, mask, embeds)]
        torch.ops.layerprobe.enter(self.token, *tensors, cached, self.number, stack)

    def receive(self, point: int, value: Any, is_rows: bool = False) -> None:
        """Tell of a value, from within a graph; `is_rows`: it has a row per token."""
        if not isinstance(value, Tensor):
            raise CaptureError(f"a module that is read gave {type(value).__name__}, not a tensor.")
        if self._attached is not None and value.requires_grad:
            self._attached[point] = value
        value = value.detach()
        if not (self._packs and is_rows and value.ndim == 3 and _takes_any_number()):
            torch.ops.layerprobe.receive(self.token, value, self.number, point)
            return
        places = torch.ops.layerprobe.places(self.token, self.number, point, value.shape[0], value.shape[1])
        rows = value.flatten(0, 1).index_select(0, places)
        rows = rows if self._dtype is None else rows.to(self._dtype)
        torch.ops.layerprobe.receive_packed(self.token, rows, self.number, point)

    def leave(self, stack: int, completed: bool) -> None:
        """Tell of the end of a call, from within a graph."""
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


@dataclass(frozen=True, eq=False)
class _Guards:
    """Whose setting it is: the process's, or a thread's where torch keeps one for each."""

    config: Any


_here = threading.local()


def _find_owner(config: Any) -> _Guards:
    entry = getattr(config, "_config", {}).get("skip_nnmodule_hook_guards")
    own = vars(_here) if isinstance(getattr(entry, "user_override", None), ContextVar) else _of_process
    return own.setdefault("guards", _Guards(config))


def _write_guards(owner: _Guards, skips: bool) -> None:
    owner.config.skip_nnmodule_hook_guards = skips


_of_process: dict[str, _Guards] = {}
_HOOK_GUARDS: SharedSetting[_Guards, bool] = SharedSetting(
    lambda owner: owner.config.skip_nnmodule_hook_guards, _write_guards
)


@contextlib.contextmanager
def watching_hooks() -> Iterator[None]:
    """Let what is compiled look at hooks while this is open, where the compiler is loaded.

    A model that breaks its graph has code that its layers share: without a look, that of one is run for another. Of a
    torch whose settings are each thread's, it is this thread's calls that look.
    """
    config = getattr(sys.modules.get("torch._dynamo"), "config", None)
    if config is None or not hasattr(config, "skip_nnmodule_hook_guards"):
        yield
        return
    with _HOOK_GUARDS.held(_find_owner(config)):
        config.skip_nnmodule_hook_guards = False
        yield


def forget_compiled_graphs() -> None:
    """Let the next call of a compiled model be compiled again: torch does not notice that hooks have come or gone."""
    torch.compiler.reset()
