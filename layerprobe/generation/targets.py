"""What a fitted decoder is to write for each example, and which examples it is fitted on.

A target is a run of token ids without special ones: the example's own text unless other texts are given. Examples of
the same tokens are never on both sides.

Must never know of models.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerprobe.errors import InputError, OptionError
from layerprobe.store.reader import Store

__all__ = ["Split", "Targets", "choose_types", "find_targets", "split_examples"]

_LEAST = 20


@dataclass(frozen=True)
class Targets:
    """What is to be written.

    Args:
        ids: Token ids of each example by its ordinal, at most `max_length`.
        num_cut: How many were longer.
    """

    ids: Mapping[int, tuple[int, ...]]
    num_cut: int


@dataclass(frozen=True)
class Split:
    """Ordinals of the examples that a decoder is fitted on, and of those that judge it."""

    train: tuple[int, ...]
    test: tuple[int, ...]


def find_targets(store: Store, targets: str | Sequence[Any] | None, max_length: int) -> Targets:
    """Find what is to be written for each example that has tokens.

    Args:
        store: The store.
        targets: A field of the records; or a text or a list of token ids per example; None for the example's own text.
        max_length: The most tokens of a target; longer ones are cut.

    Raises:
        InputError: an example has no such field, or its value is not a text, or a text cannot be cut into tokens.
        OptionError: not as many targets as examples.
    """
    ordinals = list(store.ordinals())
    special = store.vocabulary.special_ids if store.vocabulary is not None else frozenset()
    if targets is not None and not isinstance(targets, str):
        # in its order: a column of a table is indexed by labels of its own
        targets = list(targets)
        if len(targets) != len(ordinals):
            what = f"{len(targets)} for {len(ordinals)} examples of {store.place}"
            raise OptionError(f"targets: {what}. Give one for each.")
    found: dict[int, tuple[int, ...]] = {}
    num_cut = 0
    for number, ordinal in enumerate(ordinals):
        own = store.input_ids(ordinal).tolist()
        if not own:
            continue
        if targets is None:
            ids = [token for token in own if token not in special]
        else:
            ids = _encode(store, ordinal, _value_of(store, ordinal, targets, number))
        num_cut += len(ids) > max_length
        found[ordinal] = tuple(ids[:max_length])
    return Targets(found, num_cut)


def _value_of(store: Store, ordinal: int, targets: str | Sequence[Any], number: int) -> Any:
    if not isinstance(targets, str):
        return targets[number]
    record = store.record(ordinal)
    fields = {"text": record.get("text"), **record.get("fields", {})}
    if not isinstance(fields.get(targets), str):
        raise InputError(
            f"targets={targets!r} of {store.place}: example {ordinal} has {fields.get(targets)!r}, which is no text. "
            "Name a field of texts, or give a text per example."
        )
    return fields[targets]


def _encode(store: Store, ordinal: int, value: Any) -> list[int]:
    if isinstance(value, str):
        if store.vocabulary is None:
            raise InputError(f"targets of {store.place}: it keeps no tokenizer to cut texts with. Give lists of ids.")
        return store.vocabulary.encode(value)
    try:
        return [int(token) for token in value]
    except (TypeError, ValueError) as error:
        raise InputError(f"targets: that of example {ordinal} is {value!r}. Give a text or a list of ids.") from error


def split_examples(store: Store, ordinals: Sequence[int], most: int | None, share: float, seed: int) -> Split:
    """Draw the examples that train and those that judge, all of the same tokens on one side.

    Raises:
        InputError: fewer than 20 different ones.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for ordinal in ordinals:
        groups.setdefault(tuple(store.input_ids(ordinal).tolist()), []).append(ordinal)
    # of equal texts one is enough
    kept = [group[0] for group in groups.values()]
    if len(kept) < _LEAST:
        raise InputError(f"fit_decoder: {store.place} has {len(kept)} different examples; {_LEAST} are the least.")
    order = np.random.default_rng([seed, 11]).permutation(len(kept))[:most].tolist()
    num_test = max(1, round(share * len(order)))
    return Split(tuple(kept[one] for one in order[num_test:]), tuple(kept[one] for one in order[:num_test]))


def choose_types(targets: Targets, train: Sequence[int], most: int) -> list[int]:
    """Choose the tokens that a decoder can write: the most frequent of train."""
    counts = Counter(token for ordinal in train for token in targets.ids[ordinal])
    return sorted(counts, key=lambda token: (-counts[token], token))[:most]
