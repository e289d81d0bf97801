"""Track calls that bypass a model's hooks.

A SentenceTransformer runs `model.forward(...)` instead of `model(...)`, for which torch runs no hooks. For such a
wrapper the model's own `forward` is overridden: if no hook has opened the call, the override does.

Hides which of the two ways a model was called. Must never know of sites or values.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from layerprobe.capture.frames import Frames
from layerprobe.capture.hooks import HookSet

__all__ = ["watch_direct_calls"]


def watch_direct_calls(
    hooks: HookSet,
    module: nn.Module,
    number: int,
    frames: Frames,
    enter: Callable[..., None],
    leave: Callable[..., None],
) -> None:
    """Open and close a call around each run of a module's forward that bypasses its hooks.

    Args:
        hooks: Set that removes the override later.
        module: The model that the wrapper runs.
        number: Its number among the frames.
        frames: Tell whether the hooks have opened the call.
        enter, leave: The hooks' functions; called with the module, the arguments and, for `leave`, the output.
    """

    def watch(inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if frames.is_inside(number):
                return inner(*args, **kwargs)
            enter(module, args, kwargs)
            output = None
            try:
                output = inner(*args, **kwargs)
            finally:
                leave(module, args, output)
            return output

        return forward

    hooks.override(module, "forward", watch)
