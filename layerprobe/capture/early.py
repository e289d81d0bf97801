"""Forwards that end after the last requested site.

`Stop` runs up through the modules; where it comes out, the model's call returns None.

Hides where that is: at a wrapper of `torch.compile`, else at the model and its bases. Must never know of values.
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
    """Whether `stop` goes with a model as the user has it."""
    return not is_compiled_in_place(unwrap(given)) and not calls_forward(given)


def require_an_end(given: nn.Module, root: nn.Module) -> None:
    """Refuse `stop` where nothing of the model can be wrapped, or its wrapper could not do without the output.

    Args:
        given: What the user passed.
        root: The model in it.
    """
    if is_compiled_in_place(root):
        raise OptionError("stop=True does not go with model.compile(): use torch.compile(model), or leave it out.")
    if calls_forward(given):
        raise OptionError("stop=True leaves a SentenceTransformer nothing to pool: pass and call model[0].auto_model.")


def end_early(hooks: HookSet, given: nn.Module, mapped: ModelMap, frames: Frames) -> None:
    """Let a stopped forward come out of the module that was called from outside.

    Args:
        hooks: What takes the overrides off again.
        given: What the user passed.
        mapped: The model in it.
        frames: Of the probe.
    """
    require_an_end(given, mapped.model)
    if is_compile_wrapper(given):
        hooks.override(given, "forward", functools.partial(_wrap, frames, None))
        return
    bases = {stack.base: number for number, stack in enumerate(mapped.stacks)}
    for module, number in {mapped.model: ROOT, **bases}.items():
        hooks.override(module, "forward", functools.partial(_wrap, frames, number))


def _wrap(frames: Frames, number: int | None, inner: Callable[..., Any]) -> Callable[..., Any]:
    """Turn `Stop` into None. A wrapper of `torch.compile` has no number: it runs a graph, whose frames it closes."""

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a graph ends where it ends
            return inner(*args, **kwargs)
        frames.begin_catching(number)
        try:
            return inner(*args, **kwargs)
        except Stop as stop:
            if number is None:
                frames.close_top()
            elif not frames.is_outermost(number):
                raise
            if stop.reader is not frames:  # another probe's, which has put this around the model too
                raise
            return None
        finally:
            frames.end_catching()

    return forward
