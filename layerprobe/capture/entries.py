"""Hooks that mark the beginning and end of a call, on the outermost model and the base models inside it.

Probes and edits follow calls in the same way. In Python the hooks notify the frames; in a `torch.compile` graph they
call a port, which notifies the frames when the graph runs.

Hides calls that bypass hooks. Must never know of sites or values.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from layerprobe.capture.calls import read_context
from layerprobe.capture.compiled import Outlet
from layerprobe.capture.direct import watch_direct_calls
from layerprobe.capture.frames import ROOT, Frames
from layerprobe.capture.hooks import HookSet
from layerprobe.errors import CaptureError
from layerprobe.sites.resolve import ModelMap
from layerprobe.sites.stacks import calls_forward, find_cache

__all__ = ["watch_calls"]


def watch_calls(hooks: HookSet, given: nn.Module, mapped: ModelMap, frames: Frames, port: Outlet) -> None:
    """Follow the calls of a model.

    Args:
        hooks: Set that removes the hooks later.
        given: The model as the user passed it.
        mapped: The unwrapped model.
        frames: Notified of each call.
        port: Notified of each call from a compiled graph.
    """
    root, bases = mapped.model, [stack.base for stack in mapped.stacks]
    enter_root = _make_root_entry(frames, port)
    if all(root is not base for base in bases):
        hooks.keep(root, root.register_forward_pre_hook(enter_root))
        hooks.keep(root, root.register_forward_hook(_make_exit(ROOT, frames, port), always_call=True))
    for number, base in enumerate(bases):
        if _renames_ids(type(base)):
            frames.renaming.add(number)
        enter = _make_base_entry(number, base, mapped.owner, frames, port)
        hooks.keep(base, base.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.keep(base, base.register_forward_hook(_make_exit(number, frames, port), always_call=True))
    if calls_forward(given):
        number = 0 if root is mapped.base else ROOT
        enter = enter_root if number == ROOT else _make_base_entry(0, root, mapped.owner, frames, port)
        watch_direct_calls(hooks, root, number, frames, enter, _make_exit(number, frames, port))


def _renames_ids(kind: type[nn.Module]) -> bool:
    """Return whether a class has no `input_ids` argument although one of its base classes has."""
    line = [inspect.signature(one.forward).parameters for one in kind.__mro__ if "forward" in vars(one)]
    return "input_ids" not in line[0] and any("input_ids" in parameters for parameters in line)


def _make_root_entry(frames: Frames, port: Outlet) -> Callable[..., None]:
    def enter_root(module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        if torch.compiler.is_compiling():
            port.enter(ROOT, None, None, None, False)
        else:
            frames.enter_root(sys._getframe(1))

    return enter_root


def _make_base_entry(number: int, base: nn.Module, owner: str, frames: Frames, port: Outlet) -> Callable[..., None]:
    parameters = list(inspect.signature(type(base).forward).parameters)[1:]

    def enter_base(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None:  # torch passes no kwargs if the hook was removed while the module's hooks were running
            return
        given = {**dict(zip(parameters, args, strict=False)), **kwargs} if args else kwargs
        if torch.compiler.is_compiling():
            cached = find_cache(given) is not None
            ids, mask, embeds = (given.get(name) for name in ("input_ids", "attention_mask", "inputs_embeds"))
            port.enter(number, ids, mask, embeds, cached)
        elif module is not base:
            raise CaptureError(
                f"a copy of {owner} runs with the hooks of this probe: nn.DataParallel makes such "
                "copies. Call the model itself, or use DistributedDataParallel."
            )
        else:
            frames.enter_base(number, read_context(given), sys._getframe(1))

    return enter_base


def _make_exit(number: int, frames: Frames, port: Outlet) -> Callable[..., None]:
    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # torch passes None as the output of a forward that raised
        if torch.compiler.is_compiling():
            port.leave(number, output is not None)
        else:
            frames.leave(number, output is not None, sys._getframe(1))

    return leave
