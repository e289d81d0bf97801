"""Split examples into train, dev and test; no example is on two sides.

Three ways: by a field, by groups that stay whole, or at random with a seed, where examples with the same tokens stay
together. Sides are 0 for train, 1 for dev, 2 for test.

Must never know of values or classifiers.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from layerprobe.errors import InputError

__all__ = ["DEV", "SIDES", "TEST", "TRAIN", "split_by_field", "split_by_group"]

TRAIN, DEV, TEST = 0, 1, 2
SIDES = ("train", "dev", "test")
_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("dev", "val", "valid", "validation", "development"), DEV),
    **dict.fromkeys(("test", "testing"), TEST),
}
# Sides of five consecutive groups: three train, one dev, one test, ordered so that a class with few groups is on all.
_TURNS = (TRAIN, TEST, TRAIN, DEV, TRAIN)


def split_by_field(
    values: Sequence[object], labels: Sequence[Hashable], keys: Sequence[Hashable], seed: int
) -> np.ndarray:
    """Split by a field. Without a dev side, about a fifth of the keys in train becomes dev.

    Args:
        values: `train`, `dev` (or `val`, `valid`, `validation`) or `test` of each example.
        labels: The label of each example.
        keys: The key of each example; examples with equal keys stay together when dev is taken from train.
        seed: Seed of the choice of dev.

    Raises:
        InputError: another value, no train or test example, or only one key in train to take dev from.
    """
    unknown = sorted({str(value) for value in values if str(value).lower() not in _NAMES})
    if unknown:
        raise InputError(
            f"split by field: {', '.join(map(repr, unknown[:5]))} is none of {', '.join(_NAMES)}. Mend it."
        )
    sides = np.array([_NAMES[str(value).lower()] for value in values], dtype=np.int8)
    for side in (TRAIN, TEST):
        if not (sides == side).any():
            raise InputError(f"split by field: no example is {SIDES[side]!r}. Mark some, or leave split out.")
    if not (sides == DEV).any():
        train = np.flatnonzero(sides == TRAIN).tolist()
        order = _order_keys([keys[place] for place in train], [labels[place] for place in train], seed)
        if len(order) < 2:
            raise InputError("split by field: train has one text or group, and none is left to choose C by.")
        chosen = set(order[::5][: len(order) - 1])
        sides[[place for place in train if keys[place] in chosen]] = DEV
    return sides


def split_by_group(keys: Sequence[Hashable], labels: Sequence[Hashable], seed: int) -> np.ndarray:
    """Split at random into three fifths train, one dev and one test, with keys kept whole and classes in proportion.

    Raises:
        InputError: fewer than three keys.
    """
    order = _order_keys(keys, labels, seed)
    if len(order) < 3:
        raise InputError(
            f"a split into train, dev and test: it takes three different texts or groups, not {len(order)}."
        )
    # with few keys, the first three must cover all sides
    turns = (TRAIN, TEST, DEV) if len(order) < len(_TURNS) else _TURNS
    side_of = {key: turns[place % len(turns)] for place, key in enumerate(order)}
    return np.array([side_of[key] for key in keys], dtype=np.int8)


def _order_keys(keys: Sequence[Hashable], labels: Sequence[Hashable], seed: int) -> list[Hashable]:
    """Shuffle keys, then sort them by class, which is the most frequent label of a key's examples."""
    counts: dict[Hashable, dict[Hashable, int]] = {}
    for key, label in zip(keys, labels, strict=True):
        of_key = counts.setdefault(key, {})
        of_key[label] = of_key.get(label, 0) + 1
    known = list(counts)
    mixed = [known[place] for place in np.random.default_rng([seed, 1]).permutation(len(known))]
    main = {key: str(max(sorted(of_key, key=str), key=lambda one: of_key[one])) for key, of_key in counts.items()}
    return sorted(mixed, key=lambda key: main[key])
