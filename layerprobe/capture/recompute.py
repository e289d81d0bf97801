"""Layers that gradient checkpointing runs again during backward.

With `use_reentrant=True` the values of the first run are in no graph; only those of the second get gradients. The
second run has no call of the model around it, so what transformers checkpoints with is told which call the first
belongs to. The values of the second run are given to the sink with the state of that call; no further call is
recorded. Without `use_reentrant` the first run is in the graph, and the second is of no interest.

Hides how the two runs find each other. Must never know what becomes of the values.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from layerprobe.capture.calls import Call
from layerprobe.capture.hooks import HookSet

__all__ = ["watch_second_runs"]

# What 4.x and 5.x checkpoint with: called with the forward of a layer and its arguments.
_CHECKPOINT = "_gradient_checkpointing_func"


def watch_second_runs(
    hooks: HookSet, model: nn.Module, frames: dict[int, list[Any]], make_frame: Callable[[nn.Module, Call], Any]
) -> None:
    """Open a frame around each layer that runs again in backward.

    Args:
        hooks: What takes it all off again.
        model: Its layers are watched where checkpointing is on.
        frames: The frames of each thread; a frame has a `call`.
        make_frame: Called with the layer and its call.
    """

    def watch(module: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def watched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            stack = frames.get(threading.get_ident())
            call: Call | None = stack[-1].call if stack else None
            if call is None:
                return checkpoint(function, *args, **kwargs)
            # a module that serves several layers goes on counting from here
            again = replace(call, expected=-1, seen=0, counts=dict(call.counts), chunks={}, twins={})
            run = partial(_run, function, frames, partial(make_frame, module, again), {})
            return checkpoint(run, *args, **kwargs)

        return watched

    for module in model.modules():
        if _CHECKPOINT in vars(module):
            hooks.override(module, _CHECKPOINT, partial(watch, module))


def _run(
    function: Callable[..., Any],
    frames: dict[int, list[Any]],
    make_frame: Callable[[], Any],
    first: dict[str, bool],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a layer; the second time within a frame, if the first was in no graph."""
    if not first:
        first["in_graph"] = torch.is_grad_enabled()
        return function(*args, **kwargs)
    if first["in_graph"]:
        return function(*args, **kwargs)
    stack = frames.setdefault(threading.get_ident(), [])
    stack.append(make_frame())
    try:
        return function(*args, **kwargs)
    finally:
        stack.pop()
