"""Find the model of a store again, as it was or with random weights.

What a probe reads from an untrained model comes from the words and the architecture alone, so it is the baseline for
probes of the trained model.

Hides how a store names its model. Must never know of classifiers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerprobe.errors import InputError, ModelError
from layerprobe.extract.network import find_model, load_named
from layerprobe.extract.run import extract
from layerprobe.models import LoadedModel, describe_model
from layerprobe.store.mismatch import list_model_differences
from layerprobe.store.reader import Store, take_store
from layerprobe.store.records import iter_records

__all__ = ["extract_untrained", "find_same_model", "read_texts"]


def find_same_model(
    said: Mapping[str, Any], where: str, model: nn.Module | LoadedModel | str | None, device: str | int | None = None
) -> LoadedModel:
    """Find the model that something was made with, and check that it is the same.

    Args:
        said: Description of the model in `store.json`.
        where: What was made with it, for messages.
        model: The model; None for the one that `said` names.
        device: Device for a model given by name.

    Raises:
        ModelError: it is a different model, none is named, or its tokenizer is not known.
        OptionError: it is not a model, or a device is given for a model that has one already.
    """
    name = model if model is not None else said.get("id") or ""
    if not name:
        raise ModelError(f"{where}: does not name its model. Pass model=.")
    given = load_named(name, device)
    network, tokenizer = find_model(given, None, None)
    described = describe_model(network)
    differing = list_model_differences(said, described)
    if differing:
        raise ModelError(f"{where}: was made with another model ({'; '.join(differing)}). Pass the very model.")
    return given if isinstance(given, LoadedModel) else LoadedModel(described["id"], network, tokenizer)


def read_texts(store: Store) -> list[str]:
    """Read every text of a store.

    Raises:
        InputError: the store is not complete, or keeps no texts.
    """
    if not store.is_complete:
        raise InputError(f"texts of {store.place}: it is not complete. Let the run go to its end.")
    texts = []
    for ordinal, record in iter_records(store.catalog, list(store.ordinals())):
        text = record.get("text")
        if not isinstance(text, str):
            raise InputError(
                f"texts of {store.place}: example {ordinal} has none. Stores of extract keep them; "
                "a classification with untrained=None (--no-untrained) needs none."
            )
        texts.append(text)
    return texts


def extract_untrained(
    store: Store | str | Path,
    to: str | Path,
    *,
    sites: str | Sequence[str] | None = None,
    pool: str | None = None,
    model: nn.Module | LoadedModel | str | None = None,
    seed: int = 0,
    device: str | int | None = None,
) -> Store:
    """Extract the texts of a store with the same architecture and random weights.

    Args:
        store: A complete store that keeps its texts.
        to: Folder or URL of the new store.
        sites: Patterns; None for the sites of the store.
        pool: As in `extract`; None for the pool of the store.
        model: The store's model; None for the one that it names.
        seed: Seed of the weights, which are initialised as the architecture does before training.
        device: Device for a model loaded by name.

    Raises:
        InputError: the store keeps no texts.
        ModelError: the model is not the store's.
        OptionError: `device` is given with a model object.

    Source: as a baseline of probes, Zhang and Bowman 2018, "Language Modeling Teaches You More than Translation Does".

    Example:
        >>> import layerprobe as lp
        >>> store = lp.extract("demo", ["The kettle whistled.", "Who left?"], "memory://trained", sites="layers.5")
        >>> untrained = lp.extract_untrained(store, "memory://untrained")
        >>> untrained.sites, untrained["layers.5"][0].shape == store["layers.5"][0].shape
        (['layers.5'], True)
    """
    store = take_store(store)
    texts = read_texts(store)
    trained = find_same_model(store.description.get("model") or {}, str(store.place), model, device)
    network: Any = trained.model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(network)(network.config)
    place = next(network.parameters()).device
    plan = store.description.get("plan") or {}
    return extract(
        LoadedModel("", fresh.to(place).eval(), trained.tokenizer),
        texts,
        to,
        sites=store.sites if sites is None else sites,
        pool=store.pool if pool is None else pool,
        max_length=plan.get("max_length"),
        progress=False,
    )
