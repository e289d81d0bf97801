"""Custom operators that carry values out of a `torch.compile` graph, so that hooks survive compilation.

Python code that appends to a list or reads the thread id causes a graph break, an error under `fullgraph=True`. A
custom operator is an opaque call that keeps its place among the others and runs for every batch of any length. So a
traced hook calls an operator, which finds the probe by its number. A graph that outlives its probe finds no receiver,
and nothing happens. Rows for a store are gathered and cast in the graph, where the compiler can fuse this work.

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

# A CUDA graph replays kernels but no Python, so these operators must stay outside it.
TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


class Reading(NamedTuple):
    """What is read at one module: the indices of its sites, and whether it outputs its value in chunks."""

    indices: tuple[int, ...]
    is_chunked: bool


class Outlet(Protocol):
    """The interface that hooks call while they are traced."""

    def enter(self, stack: int, ids: Any, mask: Any, embeds: Any, cached: bool) -> None:
        """Report a call of a base model; stack -1 is the task model around it."""

    def receive(self, point: int, value: Any, is_rows: bool = False) -> None:
        """Report the value of a hooked module."""

    def leave(self, stack: int, completed: bool) -> None:
        """Report that the model has returned or raised."""


class Follower(Protocol):
    """The interface for calls reported by a running graph."""

    def enter_compiled(
        self, stack: int, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None, cached: bool
    ) -> None:
        """Record a call of a base model, with or without a key-value cache; stack -1 is the task model around it."""

    def leave_compiled(self, stack: int, completed: bool) -> None:
        """Record that the model has returned or raised."""


class Receiver(Follower, Protocol):
    """The interface for calls and values reported by a running graph."""

    def receive_compiled(self, point: int, value: Tensor) -> None:
        """Receive the value of a hooked module."""

    def find_places(self, point: int, num_sequences: int, num_positions: int) -> Tensor | None:
        """Return the indices of the real tokens of this thread's call in `[B * S]`, or None if no call is running."""
        ...

    def receive_packed(self, point: int, rows_TD: Tensor) -> None:
        """Receive rows of a hooked module, gathered and cast by the graph."""


_RECEIVERS: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


# Every operator declares that it mutates `token`, so that the compiler neither drops nor reorders them.
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
    """Return the indices of the real tokens; not cached, since Python could pass on another thread's result."""
    receiver: Receiver | None = _RECEIVERS.get(probe)
    found = receiver.find_places(point, num_sequences, num_positions) if receiver is not None else None
    # a copy, because the graph reuses the memory of its inputs
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
    """Return whether the traced graph may contain an operator whose output has a data-dependent number of rows.

    It may under `fullgraph=True` or `capture_dynamic_output_shape_ops`. Otherwise the compiler would break the graph
    there and reuse the code of one layer for another without its hook.
    """
    context = TracingContext.try_get()
    shapes = getattr(getattr(context, "fake_mode", None), "shape_env", None)
    return bool(getattr(shapes, "allow_dynamic_output_shape_ops", False))


class Port:
    """One probe's outlet from compiled graphs.

    Args:
        receiver: The object to notify; held weakly.
        device: Device of the model.
        packs: Whether to gather rows without padding and cast them to `dtype` (None: no cast).
    """

    def __init__(
        self, receiver: Follower, device: torch.device, packs: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        # not as a decorator: this call imports the compiler, which takes a second
        torch.compiler.assume_constant_result(_takes_any_number)
        self.number = next(_NUMBERS)
        with torch.inference_mode(False):
            self.token = torch.zeros(1, device=device)
        self._packs = packs
        self._dtype = dtype
        # Values with autograd history, which operators cannot carry; the graph stores them here when it has run.
        self._attached: list[Tensor | None] | None = None
        self._receiver = weakref.ref(receiver)

    def open(self) -> None:
        """Start receiving from graphs."""
        receiver = self._receiver()
        if receiver is not None:
            _RECEIVERS[self.number] = receiver

    def close(self) -> None:
        """Stop receiving from graphs compiled with this port."""
        _RECEIVERS.pop(self.number, None)

    def keep_history(self, num_points: int) -> None:
        """Make graphs also store their values with autograd history."""
        attached: list[Tensor | None] = [None] * num_points
        self._attached = attached

    def take_attached(self) -> dict[int, Tensor]:
        """Return and clear the values with history from the last graph, by point."""
        attached: list[Tensor | None] = self._attached or []
        taken = {point: value for point, value in enumerate(attached) if value is not None}
        for point in taken:
            attached[point] = None
        return taken

    def enter(self, stack: int, ids: Any, mask: Any, embeds: Any, cached: bool) -> None:
        """Report a call from inside a graph."""
        tensors = [value if isinstance(value, Tensor) else None for value in (ids, mask, embeds)]
        torch.ops.layerprobe.enter(self.token, *tensors, cached, self.number, stack)

    def receive(self, point: int, value: Any, is_rows: bool = False) -> None:
        """Report a value from inside a graph; `is_rows`: it has one row per token."""
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
        """Report the end of a call from inside a graph."""
        torch.ops.layerprobe.leave(self.token, self.number, stack, completed)


def find_receiver(number: int) -> Any:
    """Return the receiver of the open port with this number, for operators elsewhere; None once it is closed."""
    return _RECEIVERS.get(number)


def has_compiled() -> bool:
    """Return whether anything in this process has been compiled, and so possibly the model.

    A compiled function that calls the model, or a module around it, cannot be found from the model.
    """
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    return bool(getattr(convert_frame, "FRAME_COUNTER", 0))


@dataclass(frozen=True, eq=False)
class _Guards:
    """The owner of the setting: the process, or a thread if torch keeps one per thread."""

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
    """Make compiled code guard on hooks inside the block, if the compiler is loaded.

    If a model breaks its graph, its layers share compiled code; without the guard, one layer's code would run for
    another. In torch versions with per-thread settings, this applies to calls of the current thread only.
    """
    config = getattr(sys.modules.get("torch._dynamo"), "config", None)
    if config is None or not hasattr(config, "skip_nnmodule_hook_guards"):
        yield
        return
    with _HOOK_GUARDS.held(_find_owner(config)):
        config.skip_nnmodule_hook_guards = False
        yield


def forget_compiled_graphs() -> None:
    """Force compiled models to recompile at their next call: torch does not notice that hooks were added or removed."""
    torch.compiler.reset()
