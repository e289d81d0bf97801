"""Handle layers that gradient checkpointing recomputes during backward.

With `use_reentrant=True` the values of the first run have no graph; only those of the second get gradients. The second
run happens outside any call of the model, so the checkpoint function is wrapped to remember the call of the first run.
The second run's values go to the sink with the state of that call; no new call is recorded. Otherwise the first run is
in the graph, and the second matters only to edits, which must be applied in both.

Hides how the two runs find each other. Must never know what happens to the values.
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

# The checkpoint function of transformers 4.x and 5.x, called with a layer's forward and its arguments.
_CHECKPOINT = "_gradient_checkpointing_func"


def watch_second_runs(hooks: HookSet, model: nn.Module, frames: Frames, *, always: bool = False) -> None:
    """Open a frame around each layer that is recomputed in backward.

    Args:
        hooks: Set that removes the overrides later.
        model: The model; only modules with checkpointing enabled are watched.
        frames: The probe's frames.
        always: Also follow the second run if the first was in the graph, because edits must be applied again. If the
            edits have ended by then, the second run of an edited layer raises CaptureError.
    """

    def watch(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def watched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = frames.current()
            if call is None:
                return checkpoint(function, *args, **kwargs)
            # a module shared by several layers continues counting from here
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
    """Run a layer; the second run gets a frame if the first was in no graph, or always if `always`.

    Raises:
        CaptureError: edits applied in the first run have ended before the second.
    """
    if not first:
        first["in_graph"], call = torch.is_grad_enabled(), frames.current()
        try:
            return function(*args, **kwargs)
        finally:
            # edits increment the counts
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
