"""Sides: as the data says, by group, at random."""

from collections import Counter

import numpy as np
import pytest

from layerprobe.analysis.splits import DEV, TEST, TRAIN, split_by_field, split_by_group
from layerprobe.errors import InputError


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_whole_and_classes_in_proportion(seed: int) -> None:
    keys = [place // 2 for place in range(400)]
    labels = ["a" if key % 4 else "b" for key in keys]
    sides = split_by_group(keys, labels, seed)
    assert all(len({sides[place] for place in range(400) if keys[place] == key}) == 1 for key in set(keys))
    for side, share in ((TRAIN, 0.6), (DEV, 0.2), (TEST, 0.2)):
        own = Counter(labels[place] for place in np.flatnonzero(sides == side).tolist())
        assert own.total() == 400 * share
        assert abs(own["b"] / own.total() - 0.25) <= 0.05  # cut by groups of two
    assert (sides == split_by_group(keys, labels, seed)).all()
    assert (sides != split_by_group(keys, labels, seed + 1)).any()


@pytest.mark.parametrize("count", [3, 4, 5])
def test_few_groups_reach_every_side(count: int) -> None:
    keys = [place % count for place in range(20)]
    assert set(split_by_group(keys, ["a"] * 20, 0).tolist()) == {TRAIN, DEV, TEST}


def test_two_groups_are_too_few() -> None:
    with pytest.raises(InputError, match="takes three different texts or groups, not 2"):
        split_by_group([0, 0, 1, 1], ["a", "b", "a", "b"], 0)


def test_a_field_decides_under_its_usual_names() -> None:
    values = ["train", "validation", "Test", "training", "dev", "val"]
    assert split_by_field(values, "abcdef", range(6), 0).tolist() == [TRAIN, DEV, TEST, TRAIN, DEV, DEV]


def test_a_dev_side_is_cut_from_train_by_whole_keys() -> None:
    values, keys = ["train"] * 40 + ["test"] * 10, [place // 2 for place in range(50)]
    sides = split_by_field(values, ["a"] * 50, keys, 0)
    assert (sides[40:] == TEST).all() and (sides == DEV).sum() == 8
    assert (sides[0:40:2] == sides[1:40:2]).all()


def test_values_that_are_no_side_are_refused() -> None:
    with pytest.raises(InputError, match="'learn' is none of train"):
        split_by_field(["learn", "test"], "ab", [0, 1], 0)
    with pytest.raises(InputError, match="no example is 'test'"):
        split_by_field(["train", "dev"], "ab", [0, 1], 0)
    with pytest.raises(InputError, match="none is left to choose C by"):
        split_by_field(["train", "test"], "ab", [0, 1], 0)
