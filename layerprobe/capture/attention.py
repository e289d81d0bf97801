"""Hook an attention module and its children, and recompute its weights with a twin.

The children's outputs are recorded so that nothing is computed twice; the weights are available when the module
returns. Hides the hooks involved. Must never know what happens to the weights.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.capture.calls import Call
from layerprobe.capture.compiled import Outlet
from layerprobe.capture.frames import Frames
from layerprobe.capture.hooks import HookSet
from layerprobe.sites.weights import EagerTwin

__all__ = ["watch_attention"]

# Default for the argument that torch omits when a hook was removed while its module's hooks were running.
_GONE: Any = object()


def watch_attention(
    hooks: HookSet,
    module: nn.Module,
    key: int,
    frames: Frames,
    port: Outlet,
    deliver: Callable[..., None],
    *,
    checks_later: bool,
) -> None:
    """Hook one attention module.

    Args:
        hooks: Set that removes the hooks later.
        module: The module that mixes the heads.
        key: Its number among the probe's points.
        frames: Give the running call.
        port: Outlet from a compiled graph.
        deliver: Called with the call and `value=`, the `[B, H, S, S]` weights.
        checks_later: Whether weights may be delivered before they are checked, with all checks of a call at its end.
    """
    current = frames.current
    # A traced graph uses one twin created beforehand; Python calls get one twin each.
    traced = EagerTwin(module, checks=False)

    def twin_of() -> EagerTwin | None:
        if torch.compiler.is_compiling():
            return traced
        call = current()
        return call.twins.get(key) if call is not None else None

    def start(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            traced.clear()
        elif (call := current()) is not None:
            if checks_later and call.unchecked is None:
                call.unchecked = []
            call.twins[key] = EagerTwin(module, later=call.unchecked)

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any = _GONE, *, name: str) -> None:
        if output is not _GONE and (twin := twin_of()) is not None:
            twin.note(name, args[0] if args else next(iter(kwargs.values()), None), output)

    def finish(module: nn.Module, args: Any, kwargs: Any, output: Any = _GONE) -> None:
        if output is _GONE or (twin := twin_of()) is None:
            return
        weights_BHSS: Tensor = twin.finish(args, kwargs, output)
        call: Call | None
        if torch.compiler.is_compiling():
            port.receive(key, weights_BHSS)
            traced.clear()
        elif (call := current()) is not None:
            call.twins.pop(key)
            deliver(call, value=weights_BHSS)

    hooks.keep(module, module.register_forward_pre_hook(start))
    for name, child in module.named_children():
        hooks.keep(child, child.register_forward_hook(functools.partial(note, name=name), with_kwargs=True))
    hooks.keep(module, module.register_forward_hook(finish, with_kwargs=True))
