"""Find the stacks of layers in a model, however it is wrapped.

Unwraps DDP, FSDP, torch.compile, PEFT and SentenceTransformer, finds the base model of each stack and lists its
layers. Hides how wrappers and task models nest. Must never touch hooks or run the model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.errors import ArchitectureError, OptionError
from layerprobe.models import LoadedModel
from layerprobe.sites.anatomy import REFUSED, Anatomy, find_anatomy

__all__ = [
    "Stack",
    "calls_forward",
    "config_of",
    "fills_masks",
    "find_cache",
    "find_called",
    "find_device",
    "find_stacks",
    "find_sum_device",
    "find_weight_dtype",
    "guess_embeddings",
    "has_module",
    "is_compile_wrapper",
    "is_compiled",
    "is_compiled_in_place",
    "need_model",
    "need_one_device",
    "unwrap",
    "widen",
]


@dataclass(frozen=True)
class Stack:
    """A stack of layers; an EncoderDecoderModel has two, with the prefixes `encoder.` and `decoder.`.

    Args:
        prefix: Prefix of its site names; empty if the model has one stack.
        path: Path of its base model in the unwrapped model.
        base: The base model, which is called with ids and mask.
        anatomy: Its module paths; None if its layers were inferred from the model's structure.
        layers: For each layer, the module's path in the base model and the index of the call used, or None.
    """

    prefix: str
    path: str
    base: Any
    anatomy: Anatomy | None
    layers: tuple[tuple[str, int | None], ...]

    @property
    def has_decoder(self) -> bool:
        """Whether the base model also contains a decoder, whose tokens and padding a call of the base does not show."""
        is_pair = bool(getattr(self.base.config, "is_encoder_decoder", False))
        return is_pair and any(_is_decoder(name) for name, _ in self.base.named_children())

    def is_of_decoder(self, path: str, root: nn.Module) -> bool:
        """Return whether a module of the unwrapped model belongs to that decoder or is its output embedding."""
        if not self.has_decoder:
            return False
        prefix = f"{self.path}." if self.path else ""
        if path.startswith(prefix) and _is_decoder(path.removeprefix(prefix).partition(".")[0]):
            return True
        # a custom module around the base need not be a transformers model
        find_head = getattr(root, "get_output_embeddings", None)
        return find_head is not None and root.get_submodule(path) is find_head()


def _is_decoder(name: str) -> bool:
    """Return whether the name of a submodule marks it as a decoder; SeamlessM4T has a `text_decoder`."""
    return name.endswith("decoder")


def need_model(model: nn.Module | LoadedModel) -> nn.Module:
    """Return the model itself, or the model inside a result of `load_model`.

    Raises:
        OptionError: the argument is neither.
    """
    if isinstance(model, LoadedModel):
        return model.model
    if not isinstance(model, nn.Module):
        how = f"lp.load_model({model!r}) loads one by its name" if isinstance(model, str) else "lp.load_model loads one"
        raise OptionError(f"the model is of type {type(model).__name__}: pass a model of transformers; {how}.")
    return model


def unwrap(model: nn.Module | LoadedModel) -> nn.Module:
    """Unwrap DDP, FSDP, torch.compile, PEFT and SentenceTransformer.

    Raises:
        ArchitectureError: nn.DataParallel, which runs replicas of the model, so rows would arrive in no fixed order.
        OptionError: the argument is not a model.
    """
    model = need_model(model)
    while True:
        if isinstance(model, nn.DataParallel):
            raise ArchitectureError(
                "nn.DataParallel runs copies of the model at once, and their rows would come in no order. "
                "Use DistributedDataParallel, or pass model.module."
            )
        inner = model._modules.get("_orig_mod") or model._modules.get("_fsdp_wrapped_module")
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None and isinstance(model, nn.Sequential) and len(model):
            inner = getattr(model[0], "auto_model", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # type: ignore[operator]
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def calls_forward(model: nn.Module) -> bool:
    """Return whether a wrapper calls the model's `forward` directly, past its hooks, as SentenceTransformer does."""
    model = model._modules.get("_orig_mod") or model
    return isinstance(model, nn.Sequential) and len(model) > 0 and hasattr(model[0], "auto_model")


def find_called(model: nn.Module | LoadedModel) -> nn.Module:
    """Return the module to call with ids and mask: for a SentenceTransformer, the model inside it.

    Raises:
        OptionError: the argument is not a model.
    """
    model = need_model(model)
    return unwrap(model) if calls_forward(model) else model


def is_compile_wrapper(model: nn.Module) -> bool:
    """Return whether the model is a result of `torch.compile(model)`."""
    return "_orig_mod" in model._modules


def is_compiled_in_place(model: nn.Module) -> bool:
    """Return whether any module of the model was compiled in place with `module.compile()`."""
    return any(part._compiled_call_impl is not None for part in model.modules())


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model or any of its modules is compiled, wrapped or in place."""
    return is_compiled_in_place(model) or any(is_compile_wrapper(part) for part in model.modules())


def config_of(model: nn.Module) -> Any:
    """Return the configuration of a model, or None if it has none."""
    return getattr(model, "config", None)


def find_stacks(root: Any) -> Iterator[Stack]:
    """Find the stacks of an unwrapped model: one, or the encoder and the decoder of an EncoderDecoderModel.

    Raises:
        ArchitectureError: the architecture has no row and its layers cannot be inferred from its structure.
    """
    if config_of(root).model_type == "encoder-decoder":
        for prefix, half in (("encoder.", root.encoder), ("decoder.", root.decoder)):
            yield _make_stack(root, prefix, half.base_model)
    else:
        yield _make_stack(root, "", root.base_model)


def _make_stack(root: nn.Module, prefix: str, base: Any) -> Stack:
    path = next((name for name, module in root.named_modules() if module is base), "")
    config = base.config
    try:
        anatomy = find_anatomy(config.model_type)
    except ArchitectureError:
        layers = _guess_layers(base)
        if layers is None or config.model_type in REFUSED:
            raise
        return Stack(prefix, path, base, None, layers)
    if "{group}" in anatomy.layers:
        return Stack(prefix, path, base, anatomy, tuple(_shared_layers(config, anatomy.layers)))
    count = len(list(base.get_submodule(anatomy.layers).children()))
    return Stack(prefix, path, base, anatomy, tuple((f"{anatomy.layers}.{index}", None) for index in range(count)))


def _shared_layers(config: Any, template: str) -> Iterator[tuple[str, int]]:
    """List ALBERT's layers: a few shared modules that each run several times."""
    calls: dict[str, int] = {}
    for index in range(config.num_hidden_layers):
        group = int(index / (config.num_hidden_layers / config.num_hidden_groups))
        for inner in range(config.inner_group_num):
            path = template.format(group=group, inner=inner)
            yield path, calls.get(path, 0)
            calls[path] = calls.get(path, 0) + 1


def _guess_layers(base: Any) -> tuple[tuple[str, None], ...] | None:
    """Find the only ModuleList of `num_hidden_layers` modules of one type, for an architecture without a row."""
    if getattr(base.config, "hidden_size", None) is None:
        return None  # the stages of a convolutional model differ in width
    wanted = getattr(base.config, "num_hidden_layers", 0)
    lists = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted and len({type(m) for m in module}) == 1
    ]
    return tuple((f"{lists[0]}.{index}", None) for index in range(wanted)) if len(lists) == 1 else None


def guess_embeddings(stack: Stack) -> tuple[str, ...]:
    """Guess the embedding module for an architecture without a row; none if a projection or a norm follows it."""
    following, parent = [], stack.base
    for step in stack.layers[0][0].split("."):
        for name, child in parent.named_children():
            if name == step:
                break
            following = [] if name == "embeddings" else [*following, child]
        parent = parent.get_submodule(step)
    has_more = any(next(child.parameters(), None) is not None and not child._modules for child in following)
    return () if has_more else ("embeddings",)


def has_module(module: Any, path: str) -> bool:
    """Return whether a module has a submodule at this path."""
    try:
        return isinstance(module.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def fills_masks(model: nn.Module) -> bool:
    """Return whether a model predicts masked tokens, judging by the class name that transformers gives it.

    Other pre-training models, such as ELECTRA's discriminator, have no output embedding and do not count.
    """
    own: Any = model
    name = type(model).__name__
    return name.endswith("ForMaskedLM") or (name.endswith("ForPreTraining") and own.get_output_embeddings() is not None)


def find_cache(given: Mapping[str, Any]) -> Any:
    """Return the key-value cache from the keyword arguments of a call, or None. transformers renamed it in 5.24."""
    cache = given.get("cache")
    return given.get("past_key_values") if cache is None else cache


def find_device(model: nn.Module) -> torch.device:
    """Find the device on which the model computes; for weights offloaded by accelerate, ask its hooks."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        device = torch.device(next((place for place in places if place is not None), "cpu"))
    return device


def find_weight_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's floating-point weights; float32 if it has none."""
    return next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)


def find_sum_device(device: torch.device) -> torch.device:
    """Return the device on which float64 sums of values on `device` are kept: the CPU for mps, which lacks float64."""
    return torch.device("cpu") if device.type == "mps" else device


def widen(values: Tensor) -> Tensor:
    """Convert values to float64 on the device where their sums are kept."""
    return values.to(find_sum_device(values.device)).double()


def need_one_device(model: nn.Module) -> torch.device:
    """Return the one device on which the model computes.

    Raises:
        OptionError: accelerate has spread the model over several devices.
    """
    root = unwrap(model)
    placed = getattr(root, "hf_device_map", None) or {}
    # `0` and `cuda:0` are the same device; weights offloaded to CPU or disk are still computed on it
    devices = sorted({str(place).rpartition(":")[2] for place in placed.values()} - {"cpu", "disk"})
    if len(devices) > 1:
        raise OptionError(
            f"{type(root).__name__} is spread over the devices {', '.join(devices)}: a store takes values of one. "
            "Load it onto one, or capture into memory."
        )
    return find_device(model)
