"""What a probe might leave behind on a model."""

from typing import Any

import torch
from torch import nn

__all__ = ["list_hooks", "look_at"]


def look_at(model: nn.Module) -> dict[str, Any]:
    """Everything a probe might leave behind: attributes and hooks of every module, bytes and flags of every tensor."""
    look: dict[str, Any] = {"state": list(model.state_dict()), "random": torch.get_rng_state().numpy().tobytes()}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key not in ("_parameters", "_buffers", "_modules"):
                look[f"{name}/{key}"] = list(value.items()) if isinstance(value, dict) else value
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # what is offloaded is another tensor after each call, whoever makes it
        identity = None if tensor.is_meta else (id(tensor), tensor._version)
        look[name] = (identity, tensor.requires_grad, tensor.dtype, tensor.device)
    return look


def list_hooks(model: nn.Module) -> list[Any]:
    """The hooks of every kind on every module, and what stands in front of a class's own methods."""
    found: list[Any] = []
    for module in model.modules():
        found += [
            hook
            for kind in vars(module)
            if kind.endswith(("_hooks", "_called", "_kwargs"))
            for hook in vars(module)[kind]
        ]
        found += [name for name in ("forward", "__getstate__") if name in vars(module)]
    return found
