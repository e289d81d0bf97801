"""Custom operators that give an edit inside a `torch.compile` graph what only the running call knows.

Selected tokens, random numbers and rows laid out on the tokens are computed by the same Python code as without a graph,
behind operators that the compiler treats as opaque. The edit itself is plain arithmetic in the graph, so gradients flow
through it. A graph that outlives its edit finds no receiver and selects no token.

Hides torch's operator registry. Must never know of sites or of what an edit does.
"""

from typing import Any

import torch
from torch import Tensor

from layerprobe.capture.compiled import TAGS, find_receiver

__all__ = ["ask_for_extra", "ask_for_order", "ask_for_tokens"]


# Each operator declares that it mutates `token`, so that the compiler preserves their order.
@torch.library.custom_op("layerprobe::edit_tokens", mutates_args=("token",), **TAGS)
def _tokens(token: Tensor, value: Tensor, editor: int, point: int, count: int) -> Tensor:
    receiver = find_receiver(editor)
    if receiver is None:
        return torch.zeros((count, *value.shape[:-1]), dtype=torch.bool, device=value.device)
    return receiver.pick_compiled(point, value)


@_tokens.register_fake
def _(token: Tensor, value: Tensor, editor: int, point: int, count: int) -> Tensor:
    return value.new_empty((count, *value.shape[:-1]), dtype=torch.bool)


@torch.library.custom_op("layerprobe::edit_extra", mutates_args=("token",), **TAGS)
def _extra(token: Tensor, value: Tensor, editor: int, point: int, slot: int) -> Tensor:
    receiver = find_receiver(editor)
    return torch.zeros_like(value) if receiver is None else receiver.give_compiled(point, slot, value)


@_extra.register_fake
def _(token: Tensor, value: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(value)


@torch.library.custom_op("layerprobe::edit_order", mutates_args=("token",), **TAGS)
def _order(token: Tensor, value: Tensor, editor: int, point: int, slot: int) -> Tensor:
    receiver = find_receiver(editor)
    if receiver is None:
        return torch.arange(value.shape[:-1].numel(), device=value.device)
    return receiver.give_compiled(point, slot, value)


@_order.register_fake
def _(token: Tensor, value: Tensor, *_: Any) -> Tensor:
    return value.new_empty(value.shape[:-1].numel(), dtype=torch.int64)


def ask_for_tokens(token: Tensor, value: Tensor, editor: int, point: int, count: int) -> Tensor:
    """Return which tokens of a value each edit at a point applies to.

    Returns:
        bool `[count, B, S]`; `[count, B]` if the value has one vector per text.
    """
    return torch.ops.layerprobe.edit_tokens(token, value.detach(), editor, point, count)


def ask_for_extra(token: Tensor, value: Tensor, editor: int, point: int, slot: int) -> Tensor:
    """Return the noise or rows of an edit, shaped like the value."""
    return torch.ops.layerprobe.edit_extra(token, value.detach(), editor, point, slot)


def ask_for_order(token: Tensor, value: Tensor, editor: int, point: int, slot: int) -> Tensor:
    """Return the token permutation of an edit, int64 `[B * S]`."""
    return torch.ops.layerprobe.edit_order(token, value.detach(), editor, point, slot)
