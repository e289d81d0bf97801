"""Concatenate texts into one sequence, so that no position is padding.

In an encoder only attention mixes tokens. A model can therefore take the texts of a batch as one sequence, with each
token's own position, if attention is restricted to within texts. transformers lets a custom function replace a
model's attention; while `attending_flat` is open, the model's config names ours, and calls outside `laying` use the
model's usual attention, whoever makes them. Several runs may be open on one config.

Hides for which models this is correct, and checks it on two short texts before a run is planned so. Must never know
of stores.
"""

import contextlib
import importlib.util
import inspect
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.capture.hooks import list_hooks
from layerprobe.capture.probe import Probe
from layerprobe.capture.staging import send
from layerprobe.errors import ArchitectureError, CaptureError, first_line
from layerprobe.extract.batching import Batch, FlatBatch
from layerprobe.extract.forward import REORDERED, find_dtype, running
from layerprobe.extract.memory import ran_out
from layerprobe.extract.network import find_position_padding
from layerprobe.sharing import SharedSetting
from layerprobe.sites.resolve import ModelMap, Site, map_model
from layerprobe.sites.stacks import find_device, is_compiled_in_place
from layerprobe.tables import format_dtype

__all__ = ["FlatForm", "attending_flat", "find_arguments", "find_unusual_attention", "laying", "refuse_flat"]

_NAME = "layerprobe_flat"
# Keyword arguments of attention functions that ours does not support.
_NOT_TAKEN = ("position_bias", "sliding_window", "softcap", "s_aux")
# transformers leaves hooks on a model after a call with `output_hidden_states`; they do nothing in other calls.
_IDLE_HOOKS = "transformers.utils.output_capturing"


@dataclass(frozen=True, eq=False)
class _Layout:
    """The lengths of the texts in the sequence, in order."""

    lengths: Sequence[int]

    @cached_property
    def blocks(self) -> list[tuple[int, int, int]]:
        """Start, count and length of each group of adjacent texts of the same length."""
        groups = [(length, len(list(equal))) for length, equal in groupby(self.lengths) if length]
        starts = accumulate((length * count for length, count in groups), initial=0)
        return [(start, count, length) for start, (length, count) in zip(starts, groups, strict=False)]

    @cached_property
    def _bounds(self) -> Tensor:
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device="cpu")

    def bounds(self, device: torch.device) -> Tensor:
        """Return the cumulative lengths, int32, as variable-length attention kernels take them."""
        if self._bounds.device != device:
            vars(self)["_bounds"] = send(self._bounds, device)
        return self._bounds


# Holds a config's attention implementation and restores it.
_attention = SharedSetting[Any, str](
    lambda config: config._attn_implementation, lambda config, name: setattr(config, "_attn_implementation", name)
)


class _Laid(threading.local):
    """The layout of the flat batch that this thread's calls get; None outside of one."""

    layout: _Layout | None = None


_laid = _Laid()


@dataclass(frozen=True)
class FlatForm:
    """How a model takes a flat batch.

    Args:
        padding_id: For models like RoBERTa, whose positions start after it and skip tokens that have it; else None.
        takes_types: Whether to pass token types of 0, since the model's own buffer of zeros is only as long as a text.
        configs: The configs that name its attention.
    """

    padding_id: int | None
    takes_types: bool
    configs: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "FlatForm":
        """Find how a model takes a flat batch."""
        base = map_model(model).base
        takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        return cls(find_position_padding(base), takes_types, tuple(_configs_of(base)))

    def check(self) -> None:
        """Check that attention is still restricted to within texts.

        Raises:
            CaptureError: the model's attention was changed during the run.
        """
        changed = [config._attn_implementation for config in self.configs if config._attn_implementation != _NAME]
        if changed:
            raise CaptureError(
                f"the model's attention was set to {changed[0]!r} while a run was under way: its texts would see each "
                "other. Set it before, or run a copy of the model."
            )

    def arguments(self, batch: FlatBatch) -> dict[str, Tensor]:
        """Return the model's keyword arguments, on the CPU; `[1, T]` int64 each."""
        lengths = np.array(batch.own_lengths)
        starts = np.cumsum(lengths) - lengths
        ids = batch.input_ids[0].numpy()
        if self.padding_id is None:
            positions = np.arange(len(ids)) - np.repeat(starts, lengths)
        else:
            counted = ids != self.padding_id
            before = np.concatenate(([0], np.cumsum(counted)))
            positions = (before[1:] - np.repeat(before[starts], lengths)) * counted + self.padding_id
        arguments = {"input_ids": batch.input_ids, "position_ids": torch.from_numpy(positions)[None]}
        if self.takes_types:
            arguments["token_type_ids"] = torch.zeros_like(batch.input_ids)
        return arguments


def find_arguments(batch: Batch | FlatBatch, form: FlatForm | None) -> dict[str, Tensor]:
    """Return the model's keyword arguments for a batch, on the CPU; a flat batch needs a form."""
    if isinstance(batch, Batch):
        return batch.arguments
    assert form is not None
    return form.arguments(batch)


@contextlib.contextmanager
def laying(batch: object) -> Iterator[None]:
    """Treat this thread's calls as those of a flat batch while this is open; does nothing for other batches."""
    if not isinstance(batch, FlatBatch):
        yield
        return
    before, _laid.layout = _laid.layout, _Layout(batch.own_lengths)
    try:
        yield
    finally:
        _laid.layout = before


@contextlib.contextmanager
def attending_flat(model: nn.Module) -> Iterator[None]:
    """Restrict a model's attention to within the texts of flat batches while this is open."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _make_mask)
    with contextlib.ExitStack() as held:
        for config in _configs_of(map_model(model).base):
            held.enter_context(_attention.held(config))
            config._attn_implementation = _NAME
        yield


def refuse_flat(
    model: nn.Module, sites: Sequence[Site], ids: Sequence[int], precision: str | None, is_compiled: bool
) -> str | None:
    """Return why a run cannot go without padding; None if it can.

    Args:
        model: Run on two short texts, alone and as one batch, unless another reason is found first.
        sites: Sites of the run, whose rows are compared.
        ids: Some token ids to make the texts of; at least three make a meaningful test.
        precision: From `find_precision`.
        is_compiled: Whether the run compiles the model.

    Cost: three forward passes of a short text.
    """
    if is_compiled:
        return "a compiled model would be compiled again for every batch"
    mapped = map_model(model)
    if mapped.model is not model:
        return f"{type(model).__name__} around {type(mapped.model).__name__} may do more than pass texts on"
    reason = _refuse_model(mapped) or _refuse_kernel(mapped, precision) or _refuse_sites(sites)
    if reason is not None:
        return reason
    try:
        gives_same = _gives_same_rows(model, sites, list(ids) or [0], precision)
    except Exception as error:  # any exception here means that the model does not take such a call
        if ran_out(error):
            raise
        return f"{type(model).__name__} does not take such a batch ({first_line(error)})"
    return None if gives_same else f"{type(model).__name__} gives other rows then"


def find_unusual_attention(mapped: ModelMap) -> str | None:
    """Return the model's attention implementation; None if it is transformers' default."""
    attention = _find_attention(mapped)
    usual = "sdpa" if getattr(mapped.base, "_supports_sdpa", False) else "eager"
    return None if attention == usual else attention


def _find_attention(mapped: ModelMap) -> str:
    # the model's own, even while `attending_flat` is open
    config = mapped.base.config
    return (_attention.original(config) if hasattr(config, "_attn_implementation") else None) or "eager"


def _refuse_model(mapped: ModelMap) -> str | None:
    base, kinds = mapped.base, (type(mapped.model), type(mapped.base))
    anatomy = mapped.stacks[0].anatomy
    if len(mapped.stacks) > 1 or anatomy is None or not anatomy.flat or getattr(base.config, "is_decoder", False):
        return f"of {base.config.model_type!r} it is not known to give the same rows"
    if not all(kind.__module__.startswith("transformers.") for kind in kinds):
        return f"{kinds[0].__name__} is no class of transformers, and may do more than that"
    if any(map(_is_changed, mapped.model.modules())):
        return "hooks or edits on the model would see another batch"
    if is_compiled_in_place(mapped.model):
        return "a compiled model would be compiled again for every batch"
    if getattr(base.config, "chunk_size_feed_forward", 0):
        return "chunk_size_feed_forward would cut a batch into as many chunks as it has tokens"
    if (attention := _find_attention(mapped)) != "sdpa":
        return f"its attention is {attention!r}, not 'sdpa'"
    if "position_ids" not in inspect.signature(mapped.model.forward).parameters:
        return f"{kinds[0].__name__} takes no position_ids"
    return None


def _is_changed(module: nn.Module) -> bool:
    """Whether a module carries a hook or a replaced `forward` that may see or change values."""
    is_idle = (getattr(hook, "__module__", None) == _IDLE_HOOKS for _, hook in list_hooks(module))
    return "forward" in vars(module) or not all(is_idle)


def _refuse_kernel(mapped: ModelMap, precision: str | None) -> str | None:
    device = find_device(mapped.model)
    if device.type == "cpu":
        return None
    dtype = find_dtype(mapped.model, precision)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return f"no kernel for texts of many lengths on {device.type} in {format_dtype(dtype)}"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no attention for texts of many lengths"
    return None


def _refuse_sites(sites: Sequence[Site]) -> str | None:
    for site in sites:
        if site.kind != "token":
            return f"{site.name!r} is not of tokens alone"
    return None


def _gives_same_rows(model: nn.Module, sites: Sequence[Site], ids: list[int], precision: str | None) -> bool:
    """Whether two concatenated texts give the same rows as each gives alone, within `REORDERED`."""
    device = find_device(model)
    texts = [ids, ids[::-1][: max(1, len(ids) // 2)]]
    flat = FlatBatch(
        [0, 1],
        [len(text) for text in texts],
        [0, 1],
        torch.tensor([[one for text in texts for one in text]], device="cpu"),
    )
    names = [site.name for site in sites]
    with running(model, precision), Probe(model, names, this_thread=True) as probe:
        for text in texts:
            alone = torch.tensor([text], device=device)
            model(input_ids=alone, attention_mask=torch.ones_like(alone))
        with attending_flat(model), laying(flat):
            model(**{name: value.to(device) for name, value in FlatForm.of(model).arguments(flat).items()})
    allowed = REORDERED[find_dtype(model, precision)]
    for name in names:
        first, second, both = (cast(Tensor, call[name]) for call in probe.calls)
        apart = torch.cat([first, second], dim=1)
        if both.shape != apart.shape or not (both - apart).abs().max() <= allowed * apart.abs().max():
            return False
    return True


def _configs_of(base: nn.Module) -> list[Any]:
    found = {id(config): config for config in (getattr(module, "config", None) for module in base.modules())}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def _make_mask(*args: Any, **kwargs: Any) -> Any:
    """Make the attention mask: None for a flat batch, else transformers' own for `sdpa`."""
    from transformers.masking_utils import sdpa_mask

    return None if _laid.layout is not None else sdpa_mask(*args, **kwargs)


def _attend(
    module: nn.Module, query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention within the texts of a flat batch, and as `sdpa` otherwise.

    Returns:
        `[B, T, H, d]`, and None in place of weights.
    """
    layout = _laid.layout
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query_BHTd, key_BHTd, value_BHTd, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    if query_BHTd.shape[0] != 1 or query_BHTd.shape[2] != sum(layout.lengths):
        raise CaptureError(
            f"{type(module).__name__} attends over {tuple(query_BHTd.shape)}, which is no batch of the run: a sink "
            "or pool calls a model of the same config. Pass padding_free=False."
        )
    asked = [name for name in _NOT_TAKEN if others.get(name) is not None]
    if attention_mask is not None or asked or others.get("is_causal", getattr(module, "is_causal", False)):
        raise ArchitectureError(
            f"{type(module).__name__} attends by {asked[0] if asked else 'a mask'}: that goes with padding only. "
            "Pass padding_free=False."
        )
    if query_BHTd.is_cuda:
        return _attend_by_kernel(query_BHTd, key_BHTd, value_BHTd, scaling, layout), None
    return _attend_by_length(query_BHTd, key_BHTd, value_BHTd, scaling, dropout, layout), None


def _attend_by_length(
    query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, scaling: float | None, dropout: float, layout: _Layout
) -> Tensor:
    """Attend within texts, processing texts of the same length together."""
    num_heads, num_tokens = query_BHTd.shape[1:3]
    has_groups = key_BHTd.shape[1] != num_heads
    context = query_BHTd.new_empty(1, num_tokens, num_heads, value_BHTd.shape[3])
    for start, count, length in layout.blocks:
        # one as_strided instead of four view operators, since this runs for every block of every layer
        blocks = [
            one.as_strided(
                (count, one.shape[1], length, one.shape[3]),
                (length * one.stride(2), one.stride(1), one.stride(2), one.stride(3)),
                one.storage_offset() + start * one.stride(2),
            )
            for one in (query_BHTd, key_BHTd, value_BHTd)
        ]
        mixed = nn.functional.scaled_dot_product_attention(
            *blocks, dropout_p=dropout, scale=scaling, enable_gqa=has_groups
        )
        context[0, start : start + count * length].view(count, length, num_heads, -1).copy_(mixed.transpose(1, 2))
    return context


def _attend_by_kernel(
    query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, scaling: float | None, layout: _Layout
) -> Tensor:
    """Attend within texts of any lengths with a GPU's variable-length kernel."""
    from torch.nn.attention.varlen import varlen_attn

    # autocast does not cast for this kernel and leaves rotated queries and keys in float32
    packed = [one[0].transpose(0, 1).to(value_BHTd.dtype).contiguous() for one in (query_BHTd, key_BHTd, value_BHTd)]
    bounds, longest = layout.bounds(query_BHTd.device), max(layout.lengths)
    # passed only if they differ from the defaults: the first torch with this kernel has neither argument
    more: dict[str, Any] = {}
    if scaling is not None and scaling != query_BHTd.shape[3] ** -0.5:
        more["scale"] = scaling
    if key_BHTd.shape[1] != query_BHTd.shape[1]:
        more["enable_gqa"] = True
    query_THd, key_THd, value_THd = packed
    context = varlen_attn(query_THd, key_THd, value_THd, bounds, bounds, longest, longest, **more)
    assert isinstance(context, Tensor)
    return context[None]
