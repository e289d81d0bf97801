"""End a forward pass after the last requested site.

`Stop` propagates up through the modules; where it is caught, the model's call returns None.

Hides where that is: at a `torch.compile` wrapper, otherwise at the model and its base models. Must never know of
values.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from layerprobe.capture.frames import ROOT, Frames
from layerprobe.capture.hooks import HookSet, Stop
from layerprobe.errors import OptionError
from layerprobe.sites.resolve import ModelMap
from layerprobe.sites.stacks import calls_forward, is_compile_wrapper, is_compiled_in_place, unwrap

__all__ = ["can_end_early", "end_early", "require_an_end"]


def can_end_early(given: nn.Module) -> bool:
    """Return whether `stop` is supported for a model as the user passed it."""
    return not is_compiled_in_place(unwrap(given)) and not calls_forward(given)


def require_an_end(given: nn.Module, root: nn.Module) -> None:
    """Refuse `stop` if the model's forward cannot be wrapped or its wrapper needs the output.

    Args:
        given: The model as the user passed it.
        root: The unwrapped model.
    """
    if is_compiled_in_place(root):
        raise OptionError("stop=True does not go with model.compile(): use torch.compile(model), or leave it out.")
    if calls_forward(given):
        raise OptionError("stop=True leaves a SentenceTransformer nothing to pool: pass and call model[0].auto_model.")


def end_early(hooks: HookSet, given: nn.Module, mapped: ModelMap, frames: Frames) -> None:
    """Override the forwards at which a stopped call may return None.

    Args:
        hooks: Set that removes the overrides later.
        given: The model as the user passed it.
        mapped: The unwrapped model.
        frames: The probe's frames.
    """
    require_an_end(given, mapped.model)
    if is_compile_wrapper(given):
        hooks.override(given, "forward", functools.partial(_wrap, frames, None))
        return
    bases = {stack.base: number for number, stack in enumerate(mapped.stacks)}
    for module, number in {mapped.model: ROOT, **bases}.items():
        hooks.override(module, "forward", functools.partial(_wrap, frames, number))


def _wrap(frames: Frames, number: int | None, inner: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a forward to turn `Stop` into None; for a `torch.compile` wrapper `number` is None."""

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a graph cannot end early
            return inner(*args, **kwargs)
        frames.begin_catching(number)
        try:
            return inner(*args, **kwargs)
        except Stop as stop:
            if number is None:
                frames.close_top()
            elif not frames.is_outermost(number):
                raise
            if stop.reader is not frames:  # raised for another probe on the same model
                raise
            return None
        finally:
            frames.end_catching()

    return forward
