"""What a module gives and takes, and which tensor of it is a site's value.

Reading and writing stand side by side, so that an edit puts its value where a probe reads it: out of a tuple or an
output object, out of the third of a fused projection.

Hides how modules pack their values. Must never know of calls, hooks or sinks.

Letters: H heads, d width of a head.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.sites.resolve import Part

__all__ = ["find_tensor", "put_part", "put_tensor", "take_part"]

_STATE = "last_hidden_state"


def find_tensor(value: Any) -> Any:
    """Find the hidden state in what a module gives; anything but a tensor is returned as it is."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        items = [item for item in value if isinstance(item, Tensor)]
        # 4.x DistilBERT puts its weights, of four dimensions, before the hidden state
        for item in items:  # torch 2.6 traces no `next` with a default
            if item.ndim != 4:
                return item
        return items[0] if items else value
    return getattr(value, _STATE, value)


def put_tensor(value: Any, held: Tensor, tensor: Tensor) -> Any:
    """Give what a module gave with `tensor` in place of `held`, which `find_tensor` found in it; `value` stays."""
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, (tuple, list)):
        items = [tensor if item is held else item for item in value]
        # a named tuple takes its fields one by one
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    other = copy.copy(value)
    setattr(other, _STATE, tensor)
    return other


def take_part(root: nn.Module, part: Part | None, value: Tensor) -> Tensor:
    """Take query, key or value out of a fused projection's output; all of it where no part is meant."""
    if part is None:
        return value
    if part.num_heads is None:
        third = value.chunk(3, dim=-1)[part.index]
    else:
        third = value.unflatten(-1, (part.num_heads, 3, -1))[..., part.index, :].flatten(-2)
    return third if part.bias is None else third + root.get_parameter(part.bias)


def put_part(
    root: nn.Module, part: Part | None, value: Tensor, held: Tensor, made: Tensor, kept: Tensor | None
) -> Tensor:
    """Put back what `take_part` has taken, changed, and give a new value.

    The new third stands there whole, less a bias that the model adds afterwards. Adding only the difference to the old
    one would round as coarsely as the old one does, and could not replace one that is not finite.

    Args:
        root: The unwrapped model.
        part: Which third of a fused projection; None for all of a value.
        value: What the module gave.
        held: What `take_part` found in it.
        made: What it is to be.
        kept: Where it is to be so, to be broadcast to it; None for everywhere. What is left stays to the bit.
    """
    if part is None:
        return made if kept is None else torch.where(kept, made, held)
    shape = (3,) if part.num_heads is None else (part.num_heads, 3)
    thirds = list(value.unflatten(-1, (*shape, -1)).unbind(-2))
    own = thirds[part.index] if part.num_heads is None else thirds[part.index].flatten(-2)
    if part.bias is not None:
        # what an edit has left as it was is not rounded either; its gradient is that of the edit
        is_same = (made == held) & made.isfinite()
        made = torch.where(is_same, own + (made - held), made - root.get_parameter(part.bias)).to(value.dtype)
    third = made if kept is None else torch.where(kept, made, own)
    thirds[part.index] = third if part.num_heads is None else third.unflatten(-1, (part.num_heads, -1))
    return torch.stack(thirds, dim=-2).flatten(-1 - len(shape))
