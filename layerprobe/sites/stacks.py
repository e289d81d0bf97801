"""The stacks of layers inside a model, whatever it is wrapped in.

Looks under DDP, FSDP, torch.compile, PEFT and SentenceTransformer, finds the base model of each stack and lays out its
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
    """A stack of layers: `""`, or `encoder.` and `decoder.` of a model that has both.

    Args:
        prefix: What its sites' names begin with.
        path: Name of its base model in the unwrapped model.
        base: The base model: what is called with ids and mask.
        anatomy: Where it keeps its parts; None where only its structure is known.
        layers: For each layer the module's path from the base, and which of its calls is used.
    """

    prefix: str
    path: str
    base: Any
    anatomy: Anatomy | None
    layers: tuple[tuple[str, int | None], ...]

    @property
    def has_decoder(self) -> bool:
        """Whether its base model has a decoder too, whose tokens and padding a call of the base does not show."""
        is_pair = bool(getattr(self.base.config, "is_encoder_decoder", False))
        return is_pair and any(_is_decoder(name) for name, _ in self.base.named_children())

    def is_of_decoder(self, path: str, root: nn.Module) -> bool:
        """Whether a module, by its name in the unwrapped model, is part of that decoder or makes words of its rows."""
        if not self.has_decoder:
            return False
        prefix = f"{self.path}." if self.path else ""
        if path.startswith(prefix) and _is_decoder(path.removeprefix(prefix).partition(".")[0]):
            return True
        # a module of a user's own around the base need not be a model of transformers
        find_head = getattr(root, "get_output_embeddings", None)
        return find_head is not None and root.get_submodule(path) is find_head()


def _is_decoder(name: str) -> bool:
    """Whether a part of a base model is its decoder, by its name: SeamlessM4T has a `text_decoder`."""
    return name.endswith("decoder")


def need_model(model: nn.Module | LoadedModel) -> nn.Module:
    """Take a model, or that of what `load_model` gave.

    Raises:
        OptionError: it is neither.
    """
    if isinstance(model, LoadedModel):
        return model.model
    if not isinstance(model, nn.Module):
        how = f"lp.load_model({model!r}) loads one by its name" if isinstance(model, str) else "lp.load_model loads one"
        raise OptionError(f"the model is of type {type(model).__name__}: pass a model of transformers; {how}.")
    return model


def unwrap(model: nn.Module | LoadedModel) -> nn.Module:
    """Look under DDP, FSDP, torch.compile, PEFT and SentenceTransformer.

    Raises:
        ArchitectureError: a wrapper that runs copies of the model, whose rows would come in no order.
        OptionError: it is no model.
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
    """Whether a wrapper runs `forward` of the model, past the hooks on it: a SentenceTransformer does."""
    model = model._modules.get("_orig_mod") or model
    return isinstance(model, nn.Sequential) and len(model) > 0 and hasattr(model[0], "auto_model")


def find_called(model: nn.Module | LoadedModel) -> nn.Module:
    """Give what is called with ids and mask: of a SentenceTransformer the model in it.

    Raises:
        OptionError: it is no model.
    """
    model = need_model(model)
    return unwrap(model) if calls_forward(model) else model


def is_compile_wrapper(model: nn.Module) -> bool:
    """Whether it is what `torch.compile(model)` gave."""
    return "_orig_mod" in model._modules


def is_compiled_in_place(model: nn.Module) -> bool:
    """Whether a part of a model was compiled where it stands, as `module.compile()` does."""
    return any(part._compiled_call_impl is not None for part in model.modules())


def is_compiled(model: nn.Module) -> bool:
    """Whether a model or a part of it is compiled, either way."""
    return is_compiled_in_place(model) or any(is_compile_wrapper(part) for part in model.modules())


def config_of(model: nn.Module) -> Any:
    """Give the configuration of a model; None for a module without one."""
    return getattr(model, "config", None)


def find_stacks(root: Any) -> Iterator[Stack]:
    """Find the stacks of an unwrapped model: one, or the encoder and the decoder of an EncoderDecoderModel.

    Raises:
        ArchitectureError: there is no row for its architecture, and no telling by its structure.
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
    """Lay out ALBERT's layers: a few modules that run again and again."""
    calls: dict[str, int] = {}
    for index in range(config.num_hidden_layers):
        group = int(index / (config.num_hidden_layers / config.num_hidden_groups))
        for inner in range(config.inner_group_num):
            path = template.format(group=group, inner=inner)
            yield path, calls.get(path, 0)
            calls[path] = calls.get(path, 0) + 1


def _guess_layers(base: Any) -> tuple[tuple[str, None], ...] | None:
    """Find the one list of `num_hidden_layers` equal blocks of one width in a model without a row."""
    if getattr(base.config, "hidden_size", None) is None:
        return None  # stages of a convolutional model, each of its own width
    wanted = getattr(base.config, "num_hidden_layers", 0)
    lists = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted and len({type(m) for m in module}) == 1
    ]
    return tuple((f"{lists[0]}.{index}", None) for index in range(wanted)) if len(lists) == 1 else None


def guess_embeddings(stack: Stack) -> tuple[str, ...]:
    """Find the embedding block in a model without a row; none where a projection or a norm follows it."""
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
    """Whether a module has one of this name in it."""
    try:
        return isinstance(module.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def fills_masks(model: nn.Module) -> bool:
    """Whether a model puts in words for masks, by the name of its class, as transformers names them.

    What is pretrained otherwise, as a discriminator of words that were replaced, has no output for each word.
    """
    own: Any = model
    name = type(model).__name__
    return name.endswith("ForMaskedLM") or (name.endswith("ForPreTraining") and own.get_output_embeddings() is not None)


def find_cache(given: Mapping[str, Any]) -> Any:
    """Find the key-value cache among the named arguments of a call, or None. transformers renamed it in 5.24."""
    cache = given.get("cache")
    return given.get("past_key_values") if cache is None else cache


def find_device(model: nn.Module) -> torch.device:
    """Find where the model makes its values; weights that accelerate keeps elsewhere tell by their hooks."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        device = torch.device(next((place for place in places if place is not None), "cpu"))
    return device


def find_weight_dtype(model: nn.Module) -> torch.dtype:
    """Find the dtype of a model's weights; float32 where it has none."""
    return next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)


def find_sum_device(device: torch.device) -> torch.device:
    """Find where sums of values on a device are kept in float64: there, or on the host if it has none, as mps."""
    return torch.device("cpu") if device.type == "mps" else device


def widen(values: Tensor) -> Tensor:
    """Give values in float64, where sums of them are kept."""
    return values.to(find_sum_device(values.device)).double()


def need_one_device(model: nn.Module) -> torch.device:
    """Find where the model makes its values, for those who collect them in one place.

    Raises:
        OptionError: accelerate has spread it over several.
    """
    root = unwrap(model)
    placed = getattr(root, "hf_device_map", None) or {}
    # `0` and `cuda:0` are one device; what lies on the CPU or on disk is computed on it all the same
    devices = sorted({str(place).rpartition(":")[2] for place in placed.values()} - {"cpu", "disk"})
    if len(devices) > 1:
        raise OptionError(
            f"{type(root).__name__} is spread over the devices {', '.join(devices)}: a store takes values of one. "
            "Load it onto one, or capture into memory."
        )
    return find_device(model)
