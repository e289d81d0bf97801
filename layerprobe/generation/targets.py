"""The target of a decoder for each example, and the split into train and test.

A target is a sequence of token ids without special tokens: the example's own text unless other texts are given. Among
examples with the same tokens only the first is used, so none is on both sides.

Must never know of models.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from layerprobe.errors import InputError, OptionError
from layerprobe.store.reader import Store
from layerprobe.tables import format_count

__all__ = ["Split", "Targets", "choose_types", "find_targets", "split_examples"]

_LEAST = 20
# Digest of an example without tokens.
_NO_TOKENS = np.uint64(xxh3_64_intdigest(b""))


@dataclass(frozen=True)
class Targets:
    """The targets of examples.

    Args:
        ids: Token ids of each example by ordinal, at most `max_length`.
        num_cut: Number of targets that were longer and were truncated.
    """

    ids: Mapping[int, tuple[int, ...]]
    num_cut: int


@dataclass(frozen=True)
class Split:
    """Ordinals of the training and test examples."""

    train: tuple[int, ...]
    test: tuple[int, ...]


def find_targets(
    store: Store, targets: str | Sequence[Any] | None, max_length: int, examples: Iterable[int]
) -> Targets:
    """Find the targets of examples.

    Args:
        store: The store.
        targets: A field of the records; or a text or a list of token ids per example; None for the example's own text.
        max_length: Maximum number of tokens of a target; longer ones are truncated.
        examples: Ordinals of the examples; each has tokens.

    Raises:
        InputError: an example lacks the field, a value is not a text, or a text cannot be tokenised.
        OptionError: the number of targets is not that of the store's examples.
    """
    ordinals = np.fromiter(store.ordinals(), np.int64, len(store))
    special = store.vocabulary.special_ids if store.vocabulary is not None else frozenset()
    if targets is not None and not isinstance(targets, str):
        # as a list, because a pandas column is indexed by its own labels, not by position
        targets = list(targets)
        if len(targets) != len(ordinals):
            what = f"{len(targets)} for {format_count(len(ordinals), 'example')} of {store.place}"
            raise OptionError(f"targets: {what}. Give one for each.")
    found: dict[int, tuple[int, ...]] = {}
    num_cut = 0
    for ordinal in examples:
        if targets is None:
            ids = [token for token in store.input_ids(ordinal).tolist() if token not in special]
        else:
            place = int(np.searchsorted(ordinals, ordinal))
            ids = _encode(store, ordinal, _value_of(store, ordinal, targets, place))
        num_cut += len(ids) > max_length
        found[ordinal] = tuple(ids[:max_length])
    return Targets(found, num_cut)


def _value_of(store: Store, ordinal: int, targets: str | Sequence[Any], number: int) -> Any:
    if not isinstance(targets, str):
        return targets[number]
    record = store.record(ordinal)
    fields = {"text": record.get("text"), **record.get("fields", {})}
    if isinstance(value := fields.get(targets), str):
        return value
    what = f"has {value!r}, which is no text" if targets in fields else f"has no such field but {', '.join(fields)}"
    raise InputError(
        f"targets={targets!r} of {store.place}: example {ordinal} {what}. "
        "Name a field of texts, or give a text per example."
    )


def _encode(store: Store, ordinal: int, value: Any) -> list[int]:
    if isinstance(value, str):
        if store.vocabulary is None:
            raise InputError(f"targets of {store.place}: it keeps no tokenizer to cut texts with. Give lists of ids.")
        return store.vocabulary.encode(value)
    try:
        return [int(token) for token in value]
    except (TypeError, ValueError) as error:
        raise InputError(f"targets: that of example {ordinal} is {value!r}. Give a text or a list of ids.") from error


def split_examples(store: Store, most: int | None, share: float, seed: int) -> Split:
    """Draw training and test examples; of examples with the same tokens only the first, and none without tokens.

    Raises:
        InputError: fewer than 20 different examples.

    Cost: about 50 bytes per example.
    """
    given = np.fromiter(store.ordinals(), np.int64, len(store))
    digests = np.fromiter(
        (xxh3_64_intdigest(store.input_ids(ordinal).numpy().tobytes()) for ordinal in given.tolist()),
        np.uint64,
        len(given),
    )
    given, digests = given[digests != _NO_TOKENS], digests[digests != _NO_TOKENS]
    # keep the first of several equal texts
    kept = given[np.sort(np.unique(digests, return_index=True)[1])]
    if len(kept) < _LEAST:
        raise InputError(
            f"fit_decoder: {store.place} has {format_count(len(kept), 'different example')}; {_LEAST} are the least."
        )
    drawn = kept[np.random.default_rng([seed, 11]).permutation(len(kept))[:most]].tolist()
    num_test = max(1, round(share * len(drawn)))
    return Split(tuple(drawn[num_test:]), tuple(drawn[:num_test]))


def choose_types(targets: Targets, train: Sequence[int], most: int) -> list[int]:
    """Choose a decoder's vocabulary: the most frequent tokens in train."""
    counts = Counter(token for ordinal in train for token in targets.ids[ordinal])
    return sorted(counts, key=lambda token: (-counts[token], token))[:most]
