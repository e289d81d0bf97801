"""Layers that gradient checkpointing runs again during backward.

With `use_reentrant=True` the values of the first run are in no graph; only those of the second get gradients. The
second run has no call of the model around it, so what transformers checkpoints with is told which call the first
belongs to. The values of the second run are given to the sink with the state of that call; no further call is
recorded. Without `use_reentrant` the first run is in the graph, and the second is of no interest, but to edits: both
runs have to be edited, and after their block the second would not be.

Hides how the two runs find each other. Must never know what becomes of the values.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from layerprobe.capture.calls import Call
from layerprobe.capture.frames import Frames
from layerprobe.capture.hooks import HookSet
from layerprobe.errors import CaptureError

__all__ = ["watch_second_runs"]

# What 4.x and 5.x checkpoint with: called with the forward of a layer and its arguments.
_CHECKPOINT = "_gradient_checkpointing_func"


def watch_second_runs(hooks: HookSet, model: nn.Module, frames: Frames, *, always: bool = False) -> None:
    """Open a frame around each layer that runs again in backward.

    Args:
        hooks: What takes it all off again.
        model: Its layers are watched where checkpointing is on.
        frames: Of the probe.
        always: Also where the first run was in the graph: what changes values has to change them again, and where it
            cannot any more, a second run of a layer in which it had a say raises CaptureError.
    """

    def watch(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def watched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = frames.current()
            if call is None:
                return checkpoint(function, *args, **kwargs)
            # a module that serves several layers goes on counting from here
            again = replace(call, expected=-1, seen=0, counts=dict(call.counts), chunks={}, twins={})
            return checkpoint(partial(_run, function, frames, again, {}, always), *args, **kwargs)

        return watched

    for module in model.modules():
        if _CHECKPOINT in vars(module):
            hooks.override(module, _CHECKPOINT, watch)


def _run(
    function: Callable[..., Any],
    frames: Frames,
    again: Call,
    first: dict[str, bool],
    always: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a layer; the second time within a frame, if the first was in no graph or that does not matter.

    Raises:
        CaptureError: values that were changed in the first run would not be in the second.
    """
    if not first:
        first["in_graph"], call = torch.is_grad_enabled(), frames.current()
        try:
            return function(*args, **kwargs)
        finally:
            # a hook that changes a value counts it
            first["is_changed"] = always and call is not None and call.counts != again.counts
    if first["is_changed"] and not frames.is_open:
        raise CaptureError(
            "a checkpointed layer runs again in backward, and the edits in it have ended: its gradients would be of "
            "another model. Call backward inside the with block of lp.edit."
        )
    if first["in_graph"] and not always:
        return function(*args, **kwargs)
    frames.open_again(replace(again, counts=dict(again.counts)))
    try:
        return function(*args, **kwargs)
    finally:
        frames.close_again()
