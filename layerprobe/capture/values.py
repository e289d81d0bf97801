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
        return next((item for item in items if item.ndim != 4), items[0] if items else value)
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


def take_part(root: nn.Module, part: Part, value: Tensor) -> Tensor:
    """Take query, key or value out of a fused projection's output."""
    if part.num_heads is None:
        return value.chunk(3, dim=-1)[part.index]
    by_head = value.unflatten(-1, (part.num_heads, 3, -1))
    third = by_head[..., part.index, :].flatten(-2)
    return third if part.bias is None else third + root.get_parameter(part.bias)


def put_part(part: Part, value: Tensor, change: Tensor) -> Tensor:
    """Add `change` to query, key or value within a fused projection's output, and give a new one.

    A change and not the third itself: the model adds a bias to some thirds afterwards, which would have to be taken off
    again, and what is not changed would be rounded.
    """
    shape = (3,) if part.num_heads is None else (part.num_heads, 3)
    thirds = list(value.unflatten(-1, (*shape, -1)).unbind(-2))
    change = change if part.num_heads is None else change.unflatten(-1, (part.num_heads, -1))
    thirds[part.index] = thirds[part.index] + change
    return torch.stack(thirds, dim=-2).flatten(-1 - len(shape))
