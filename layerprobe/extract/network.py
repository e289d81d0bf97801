"""Find the model of a run, its tokenizer, its sites, and its maximum text length.

Also makes batches of random tokens for measuring speed. Hides where models keep their limits. Must never know of
stores.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.errors import ModelError, OptionError
from layerprobe.extract.tokens import TokenizedUnit
from layerprobe.models import LoadedModel, check_tokenizer, load_model, load_tokenizer
from layerprobe.sites.resolve import ModelMap, Site, map_model
from layerprobe.sites.stacks import calls_forward, config_of, find_device, need_model, unwrap

__all__ = [
    "check_ids",
    "choose_max_length",
    "choose_sites",
    "find_max_length",
    "find_model",
    "find_position_padding",
    "load_named",
    "make_random_batch",
]


def find_model(model: nn.Module | LoadedModel | str, tokenizer: Any, device: str | int | None) -> tuple[nn.Module, Any]:
    """Find a model and its tokenizer, from a name or from the objects themselves.

    Raises:
        ModelError: there is no such model, its tokenizer is not known, or the tokenizer is a slow one.
        OptionError: it is neither a model nor a name, or a device is given for a model that has one already.
    """
    if not isinstance(model, (str, LoadedModel, nn.Module)):
        what = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise OptionError(
            f"model is {what}: give a model, what load_model gave, or a name: a hub id, a folder or 'demo'."
        )
    given: Any = load_named(model, device)
    network = given.model if isinstance(given, LoadedModel) else unwrap(given) if calls_forward(given) else given
    if tokenizer is None:
        tokenizer = _find_tokenizer(network) if network is given else given.tokenizer
    check_tokenizer(tokenizer)
    return network, tokenizer


def load_named(model: nn.Module | LoadedModel | str, device: str | int | None) -> nn.Module | LoadedModel:
    """Load a model given by name; return any other as it is.

    Raises:
        ModelError: there is no such model.
        OptionError: it is not a model, or a device is given for a model that has one already.
    """
    if isinstance(model, str):
        return load_model(model, device)
    if device is not None:
        raise OptionError("device goes with a model's name: move a model of your own with model.to(device) first.")
    need_model(model)
    return model


def _find_tokenizer(model: nn.Module) -> Any:
    checkpoint = getattr(config_of(model), "_name_or_path", "")
    if not checkpoint:
        raise ModelError(
            f"{type(model).__name__} does not say which tokenizer it was trained with. Pass tokenizer=, or "
            "what load_model gave."
        )
    return load_tokenizer(checkpoint)


def find_max_length(model: nn.Module, tokenizer: Any) -> int:
    """Return the maximum length of a text in tokens."""
    base: Any = map_model(model).base
    limit = min(getattr(tokenizer, "model_max_length", None) or 1 << 30, 1 << 30)
    positions = getattr(base.config, "max_position_embeddings", None)
    if positions:
        padding_id = find_position_padding(base)
        limit = min(limit, positions - (0 if padding_id is None else padding_id + 1))
    return limit


def find_position_padding(base: nn.Module) -> int | None:
    """Return the padding id after which position ids start, as in models like RoBERTa; None for other models."""
    table = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
    return table.padding_idx if isinstance(table, nn.Embedding) else None


def choose_sites(mapped: ModelMap, asked: str | Sequence[str] | None) -> tuple[Site, ...]:
    """Return the sites of a run: those given, or the embeddings and every layer, as far as the model has them.

    Raises:
        SiteError: a pattern is malformed or matches nothing.
    """
    return mapped.select(mapped.leave_out_missing() if asked is None else asked)


def choose_max_length(model: nn.Module, tokenizer: Any, asked: int | None) -> int:
    """Return the maximum length of a text in tokens: the one given, or the model's limit.

    Raises:
        OptionError: it exceeds the model's limit, or is less than the number of special tokens.
    """
    limit = find_max_length(model, tokenizer)
    if asked is not None and asked > limit:
        raise OptionError(f"max_length is {asked}: the model takes at most {limit} tokens.")
    special = tokenizer.num_special_tokens_to_add()
    if asked is not None and asked < special:
        # below this, a tokenizer silently does not truncate at all
        raise OptionError(f"max_length is {asked}: {special} special tokens go around each text. Ask for more.")
    return asked or limit


def check_ids(model: nn.Module, texts: TokenizedUnit, source: str, first_example: int = 0) -> None:
    """Refuse ids outside the model's vocabulary: on a GPU they would break the CUDA context of this process.

    Raises:
        ModelError: a text has one.
    """
    table: Any = None
    with contextlib.suppress(AttributeError, NotImplementedError):
        table = model.get_input_embeddings()  # type: ignore[operator]
    size = getattr(table, "num_embeddings", None)
    if size is None or not len(texts.ids) or texts.ids.max() < size:
        return
    place = int(np.argmax(texts.ids >= size))
    text = first_example + int(np.searchsorted(texts.offsets, place, side="right")) - 1
    raise ModelError(
        f"{source}, text {text}: the tokenizer gives id {texts.ids[place]}, but ids of {type(unwrap(model)).__name__} "
        f"are 0 to {size - 1}. Use the tokenizer that the model was trained with, or resize its embeddings."
    )


def make_random_batch(loaded: LoadedModel, size: int, length: int) -> dict[str, Tensor]:
    """Make `size` texts of `length` random tokens, without padding, on the model's device.

    Raises:
        OptionError: `length` exceeds the model's limit.
    """
    limit = find_max_length(loaded.model, loaded.tokenizer)
    if length > limit:
        raise OptionError(f"length is {length}: the model takes at most {limit} tokens.")
    config = map_model(loaded.model).base.config
    drawn = torch.randint(config.vocab_size, (size, length), generator=torch.Generator().manual_seed(0), device="cpu")
    # in models like RoBERTa a padding id within a text would shift the positions
    unwanted = config.pad_token_id
    ids = drawn if unwanted is None else torch.where(drawn == unwanted, (unwanted + 1) % config.vocab_size, drawn)
    ids = ids.to(find_device(loaded.model))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(loaded.model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch
