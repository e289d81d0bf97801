"""Layers that gradient checkpointing runs again during backward.

With `use_reentrant=True` the values of the first run are in no graph; only those of the second get gradients. The
second run has no call of the model around it, so it is matched with the first by what the layer is called with, which
checkpointing keeps. Its values are given to the sink once more, with the state of the call that they belong to; no
further call is recorded. Without `use_reentrant` the first run is in the graph, and the second is of no interest.

Hides how the two runs find each other. Must never know what becomes of the values.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layerprobe.capture.calls import Call
from layerprobe.capture.hooks import HookSet

__all__ = ["watch_second_runs"]


class Frame(Protocol):
    """A running call of the model in one thread."""

    owner: nn.Module
    call: Call | None


def watch_second_runs(
    hooks: HookSet, layers: Sequence[nn.Module], frames: dict[int, list[Any]], make_frame: Callable[..., Frame]
) -> None:
    """Open a frame around each layer that runs again in backward. Attach it after what reads the layers' outputs.

    Args:
        hooks: Where the hooks are kept.
        layers: What checkpointing may run again.
        frames: The frames of each thread.
        make_frame: Called with the layer and its call.
    """
    first_runs: dict[tuple[int, int], Call] = {}

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        run = id(module), args[0].data_ptr()
        stack = frames.setdefault(threading.get_ident(), [])
        if not stack:
            if (call := first_runs.pop(run, None)) is not None:
                stack.append(make_frame(module, call))
        elif (call := stack[-1].call) is not None and not torch.is_grad_enabled():
            # a module that serves several layers goes on counting from here; the values are those of this call
            first_runs[run] = replace(call, expected=-1, seen=0, counts=dict(call.counts), chunks={}, twins={})

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stack = frames.get(threading.get_ident())
        if stack and stack[-1].owner is module:
            stack.pop()

    for layer in layers:
        hooks.keep(layer, layer.register_forward_pre_hook(enter))
        hooks.keep(layer, layer.register_forward_hook(leave, always_call=True))
