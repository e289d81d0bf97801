"""Extract a site's tensor from a module's inputs or outputs, and put it back.

Reading and writing are side by side, so that an edit puts its value where a probe reads it: in a tuple, an output
object, or one third of a fused projection.

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
    """Find the hidden state in a module's output; return the output itself if it contains no tensor."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        items = [item for item in value if isinstance(item, Tensor)]
        # 4.x DistilBERT returns its four-dimensional weights before the hidden state
        for item in items:  # torch 2.6 cannot trace `next` with a default
            if item.ndim != 4:
                return item
        return items[0] if items else value
    return getattr(value, _STATE, value)


def put_tensor(value: Any, held: Tensor, tensor: Tensor) -> Any:
    """Return a module's output with `tensor` in place of `held`, which `find_tensor` found; `value` is not modified."""
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, (tuple, list)):
        items = [tensor if item is held else item for item in value]
        # a named tuple takes its fields as separate arguments
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    other = copy.copy(value)
    setattr(other, _STATE, tensor)
    return other


def take_part(root: nn.Module, part: Part | None, value: Tensor) -> Tensor:
    """Return query, key or value from a fused projection's output; the whole value if `part` is None."""
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
    """Return a new value with an edited part merged back, the inverse of `take_part`.

    The new third is written whole, minus a bias that the model adds afterwards. Adding the difference to the old third
    would round as coarsely as the old values, and could not replace non-finite ones.

    Args:
        root: The unwrapped model.
        part: Which third of a fused projection; None for the whole value.
        value: The module's output.
        held: The part that `take_part` returned.
        made: The edited part.
        kept: Mask, broadcast to the part, of the elements to replace; None for all. The others stay bit-identical.
    """
    if part is None:
        return made if kept is None else torch.where(kept, made, held)
    shape = (3,) if part.num_heads is None else (part.num_heads, 3)
    thirds = list(value.unflatten(-1, (*shape, -1)).unbind(-2))
    own = thirds[part.index] if part.num_heads is None else thirds[part.index].flatten(-2)
    if part.bias is not None:
        # unchanged elements are not rounded; adding `made - held`, which is zero there, keeps the edit's gradient
        is_same = (made == held) & made.isfinite()
        made = torch.where(is_same, own + (made - held), made - root.get_parameter(part.bias)).to(value.dtype)
    third = made if kept is None else torch.where(kept, made, own)
    thirds[part.index] = third if part.num_heads is None else third.unflatten(-1, (part.num_heads, -1))
    return torch.stack(thirds, dim=-2).flatten(-1 - len(shape))
