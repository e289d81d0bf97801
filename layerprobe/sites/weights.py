"""Recompute the attention probabilities of a model that runs a fused attention kernel.

A fused kernel (sdpa, flash, flex) never materialises the `[B, H, S, S]` probabilities. They are recomputed here, only
for the requested layers, with the eager code that transformers ships: a twin of the attention module runs that code,
and its children replay the outputs that the real children just gave. So no projection is computed twice, no hook fires
twice, no random number is drawn, and an edit of a query is visible. Position encodings, scale and grouped heads are the
model's own code; only the mask is translated, because each kernel takes a different form.

Never touches the model's configuration, buffers or outputs, and knows no model by name.
Letters: B sequences, H heads, S positions, D width.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from layerprobe.errors import CaptureError
from layerprobe.rounding import rounds_products
from layerprobe.sites.stacks import find_cache

__all__ = ["ContextComparison", "EagerTwin", "require_same_contexts"]

# Allowed rounding difference between two contexts, in eps of the dtype computed in. Largest difference measured, over
# the demo model and tiny models of every family on a CPU: 2.5 eps in float32, 1.2 in the half types. Scaling a query by
# 1.5 in bfloat16 moves the demo model by 24 to 57 eps.
_MOST_EPS = 8
# TF32 has a 10-bit mantissa
_TF32_EPS = 2.0**-10
# CUDA's float32 kernels split products and sum them in other orders; an estimate, not measured on a GPU
_CUDA_FLOAT32 = 4
_LOAD_EAGER = "Load the model with attn_implementation='eager'."


class EagerTwin:
    """Recompute the attention probabilities of one attention module's calls.

    One twin handles one call at a time: `note` after each call of a direct child, then `finish` after the module. The
    twin's context is compared with the kernel's to catch any kernel that does more than its arguments say. This costs a
    comparison of `[B, S, D]` and, on a GPU, a synchronisation when the result is read.

    Args:
        module: The module that mixes the heads (for BERT, `BertSelfAttention`).
        checks: Whether to compare contexts; not possible in a graph that is being compiled.
        later: List that receives the comparisons, for the caller to check; if None, `finish` checks them.
    """

    def __init__(self, module: nn.Module, checks: bool = True, later: "list[ContextComparison] | None" = None) -> None:
        self._module, self._name, self._checks, self._later = module, type(module).__name__, checks, later
        self._forward, self._parameters = _eager_forward(type(module))
        self._children = {name: _Replay() for name, _ in module.named_children()}
        self._dropouts = [name for name, child in module.named_children() if isinstance(child, nn.Dropout)]
        self._twin = object.__new__(type(module))
        self._twin.__dict__.update(module.__dict__, training=False, _modules=dict(self._children))
        if hasattr(module, "config"):
            self._twin.__dict__["config"] = _EagerConfig(module.config)

    def clear(self) -> None:
        """Forget the recorded call, so that the twin can handle another."""
        for child in self._children.values():
            child.calls, child.given, child.other = [], 0, []

    def note(self, name: str, first: Any, output: Any) -> None:
        """Record the first input and the output of a call of the direct child `name`."""
        self._children[name].calls.append((first, output))

    def finish(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
        """Return the probabilities of the call just recorded, before attention dropout.

        Fused kernels apply dropout internally and never expose the mask, so only the values before dropout are
        comparable across kernels. In eval mode they equal what `output_attentions=True` returns under eager attention.

        Args:
            args, kwargs: The arguments of the module's call.
            output: What the call returned.

        Returns:
            `[B, H, S, S]`, in the dtype that the eager code gives.

        Raises:
            CaptureError: the call cannot be repeated, or, with `later` None, repeating it gives a different context.

        Cost: nothing if the model itself ran eager code; otherwise one eager attention (scores, softmax, mix).
        """
        # Classes older than transformers' attention interface (DeBERTa, MPNet, all eager classes of 4.x) pass their
        # softmax through `self.dropout(probabilities)`, whether or not they return it; no other dropout child takes
        # four dimensions.
        handed = [first for name in self._dropouts for first, _ in self._children[name].calls if first.ndim == 4]
        if handed:
            return handed[0]
        eager = _kernel(self._module) == "eager"
        if eager and not self._module.training and (returned := self._find_weights(output)) is not None:
            return returned
        return self._again(args, kwargs, output)

    def _again(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
        asked = dict(zip(self._parameters, args, strict=False)) | dict(kwargs)
        if find_cache(asked) is not None:
            raise CaptureError(f"{self._name}: the call fills a key-value cache. Call the model with use_cache=False.")
        if any(name.startswith("cu_seq") and value is not None for name, value in kwargs.items()):
            raise CaptureError(f"{self._name}: the batch is packed, several sequences in a row. {_LOAD_EAGER}")
        states_BSD = next(value for value in asked.values() if isinstance(value, Tensor))
        if "attention_mask" in self._parameters:
            mask = _with_pattern(asked.get("attention_mask"), self._module, states_BSD, asked)
            asked["attention_mask"] = _additive(mask, states_BSD.dtype)
            if isinstance(seen := asked.get("encoder_attention_mask"), Tensor):  # ESM's cross attention reads this one
                asked["encoder_attention_mask"] = _additive(_spread(seen), states_BSD.dtype)
        elif "mask" in self._parameters and "query" in self._parameters:  # 4.x DistilBERT expects B,S with 1 for keep
            asked["mask"] = _kept_keys(asked.get("mask"), states_BSD)
        elif "mask" in self._parameters:  # T5
            mask = _with_pattern(asked.get("mask"), self._module, states_BSD, asked)
            asked["mask"] = _additive(mask, states_BSD.dtype)
        if "output_attentions" in self._parameters:
            asked["output_attentions"] = True
        with torch.no_grad():
            again = self._forward(self._twin, **asked)
        weights = self._find_weights(again)
        if weights is None:
            raise CaptureError(f"{self._name}: its eager code returns no weights. {_LOAD_EAGER}")
        # In training the kernel applied dropout to its weights, so its context rightly differs.
        if self._checks and not self._module.training:
            pairs = [pair for child in self._children.values() for pair in child.other]
            real_BS = _real_queries(asked, states_BSD)
            compared = [_compare(self._module, *pair, real_BS) for pair in (*pairs, (again[0], _first(output)))]
            if self._later is None:
                require_same_contexts(compared)
            else:
                self._later.extend(compared)
        return weights

    def _find_weights(self, output: Any) -> Tensor | None:
        """Find the weights in a module's output; a module with a position bias (T5) returns the bias before them."""
        items = output if isinstance(output, tuple) else ()
        found = [item for item in items if isinstance(item, Tensor) and item.ndim == 4]
        return next(iter(found["position_bias" in self._parameters :]), None)


class _Replay(nn.Module):
    """Replay the recorded outputs of a child in order; pass the input through once they are used up.

    The pass-through is for dropout: the eager code calls it, the fused kernel did not, and no dropout is wanted.
    `other` collects pairs of inputs that are not the same tensor: if the output projection is a child, its input is the
    context, once as computed by the twin and once by the kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []
        self.given = 0
        self.other: list[tuple[Tensor, Tensor]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = _first(args, kwargs)
        if self.given == len(self.calls):
            return first
        recorded, output = self.calls[self.given]
        self.given += 1
        # integer inputs are indices into a position table, not a context
        if isinstance(first, Tensor) and first is not recorded and first.is_floating_point():
            self.other.append((first, recorded))
        return output


class _EagerConfig:
    """Wrap the module's configuration and override only the attention implementation.

    Not a copy: assigning `_attn_implementation` on a copy would also change the original's sub-configurations.
    """

    _attn_implementation = "eager"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


@functools.cache
def _eager_forward(kind: type[nn.Module]) -> tuple[Callable[..., Any], list[str]]:
    """Return the eager `forward` of an attention class, from its most basic ancestor, and its parameter names.

    transformers 4.x has one class per kernel, derived from the eager one (`BertSdpaSelfAttention` from
    `BertSelfAttention`); 5.x has one class whose `forward` reads the configuration. Taking it from the class keeps
    hooks and a `forward` set on the instance (accelerate) from running again.
    """
    line = [c for c in kind.__mro__ if issubclass(c, nn.Module) and c is not nn.Module and "forward" in vars(c)]
    forward = vars(line[-1])["forward"]
    return forward, list(inspect.signature(forward).parameters)[1:]


def _kernel(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _first(args: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
    if not isinstance(args, tuple):
        return args
    return args[0] if args else next(iter((kwargs or {}).values()), None)


@dataclass(frozen=True, eq=False)
class ContextComparison:
    """The difference between a recomputed context and the kernel's, measured but not yet read.

    Args:
        module, kernel: Names for the error message.
        measured: Root mean squares of the difference and of the kernel's context, float32 `[2]`, on the model's device.
        eps: Machine epsilon of the computation.
    """

    module: str
    kernel: str
    measured: Tensor
    eps: float


def require_same_contexts(compared: Sequence[ContextComparison]) -> None:
    """Check that the recomputed weights reproduce the kernel's contexts.

    Raises:
        CaptureError: a context differs by more than rounding.

    Cost: one device synchronisation.
    """
    if not compared:
        return
    device = compared[0].measured.device
    measured = torch.stack([one.measured.to(device) for one in compared]).tolist()
    for one, (off, size) in zip(compared, measured, strict=True):
        rounding = _MOST_EPS * one.eps * size
        if not off <= rounding:
            raise CaptureError(
                f"{one.module}: eager attention gives another context than {one.kernel} did: "
                f"off by {off:.2g}, at most {rounding:.2g} is rounding. {_LOAD_EAGER}"
            )


def _compare(module: nn.Module, twin: Tensor, real: Tensor, real_BS: Tensor | None) -> ContextComparison:
    """Measure how far a recomputed context is from the kernel's.

    Padding queries are excluded, since under a window they may have no key to attend to: there sdpa and flash give
    zeros, eager attention the mean, or NaN if mask plus score overflows. So are rows of zeros, in case no mask
    identifies padding, and rows in which the model itself produced non-finite values.
    """
    if twin.shape != real.shape:
        raise CaptureError(f"{type(module).__name__}: its eager code takes another path. {_LOAD_EAGER}")
    seen = (real != 0).any(-1, keepdim=True) & real.isfinite().all(-1, keepdim=True)
    if real_BS is not None and real_BS.shape == seen.shape[:-1]:
        seen &= real_BS[..., None]
    # Root mean square over the whole context: rounding is spread over it, a different formula changes all of it.
    sizes = [_root_mean_square(value, seen) for value in (twin.float() - real.float(), real.float())]
    eps = _rounding_of(real.dtype, real.is_cuda, rounds_products())
    return ContextComparison(type(module).__name__, _kernel(module) or "sdpa", torch.stack(sizes), eps)


def _real_queries(asked: Mapping[str, Any], states_BSD: Tensor) -> Tensor | None:
    """Find the queries of real tokens from a mask of B,1,S,S or B,1,1,S: padding is never attended to as a key."""
    mask = asked.get("attention_mask", asked.get("mask"))
    if not isinstance(mask, Tensor) or mask.ndim != 4 or asked.get("encoder_hidden_states") is not None:
        return None
    keep = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    real = keep.flatten(1, 2).any(1)
    return real.expand(states_BSD.shape[:2]) if real.shape[1] == states_BSD.shape[1] else None


def _root_mean_square(value: Tensor, seen: Tensor) -> Tensor:
    return value.where(seen, 0).square().mean().sqrt()


def _rounding_of(dtype: torch.dtype, is_cuda: bool, is_rounded: bool) -> float:
    """Return the eps for comparing contexts; `is_rounded`: whether CUDA rounds the operands of matrix products."""
    # ModernBERT and others compute the softmax in float32, whatever the model's dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    if not is_cuda or dtype != torch.float32:
        return eps
    return _TF32_EPS if is_rounded else _CUDA_FLOAT32 * eps


def _with_pattern(mask: Any, module: nn.Module, states_BSD: Tensor, asked: Mapping[str, Any]) -> Tensor | None:
    """Convert a kernel's mask to one tensor that broadcasts to B,H,S,S: bool (true to keep) or additive.

    sdpa takes either of these, or None; flash takes B,S or None and applies causality and the window itself; flex takes
    a BlockMask.
    """
    size = states_BSD.shape[1]
    if isinstance(mask, BlockMask):
        return create_mask(mask.mask_mod, len(states_BSD), None, size, size, str(states_BSD.device))
    if mask is not None and mask.ndim == 4:
        return mask
    keep = None if mask is None else _spread(mask)
    if asked.get("encoder_hidden_states") is not None:
        return keep
    window = getattr(module, "sliding_window", None)
    causal = getattr(module, "is_causal", getattr(module, "is_decoder", False))  # 4.x BERT has only `is_decoder`
    position = torch.arange(size, device=states_BSD.device)
    ahead = position[None, :] - position[:, None]
    for within in ([ahead <= 0] if causal else []) + ([] if window is None else [ahead.abs() < window]):
        keep = within[None, None] if keep is None else keep & within
    return keep


def _spread(mask: Tensor) -> Tensor:
    """Expand a B,S keep mask to four dimensions; return any other mask unchanged."""
    return mask[:, None, None, :].bool() if mask.ndim == 2 else mask


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask.bool(), torch.finfo(dtype).min)


def _kept_keys(mask: Tensor | None, states_BSD: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(states_BSD.shape[:2], device=states_BSD.device)
    return mask if mask.ndim == 2 else (mask == 0)[:, 0, -1]
