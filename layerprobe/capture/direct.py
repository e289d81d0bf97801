"""Calls that go past the hooks of a model.

A SentenceTransformer runs `model.forward(...)` instead of `model(...)`, and torch calls hooks for the second only. For
such a wrapper the model's own `forward` is overridden: where no hook has opened the call, the override does.

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
    """Open and close a call around each run of a module's forward that its hooks do not see.

    Args:
        hooks: What takes the override off again.
        module: The model that the wrapper runs.
        number: Its number among the frames.
        frames: Tell whether its hooks have seen the call.
        enter, leave: What the hooks would have called: with the module, the arguments and, to leave, the output.
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
