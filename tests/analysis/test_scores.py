"""Scores against scikit-learn, exact sums, and what intervals promise."""

from math import comb
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from layerprobe.analysis.scores import bound_accuracy, differs, find_ties, macro_f1, mcnemar, score
from layerprobe.analysis.verdict import judge


@pytest.mark.parametrize("seed", range(4))
def test_macro_f1_is_that_of_sklearn(seed: int) -> None:
    from sklearn.metrics import f1_score

    maker = np.random.default_rng(seed)
    truth, predicted = maker.integers(5, size=60), maker.integers(6, size=60)
    reference: Any = f1_score  # its stub takes no number for zero_division
    wanted = reference(truth, predicted, average="macro", zero_division=0.0)
    assert macro_f1(predicted, truth) == pytest.approx(wanted, abs=1e-12)  # sums in another order


def test_mcnemar_is_the_sum_of_binomials() -> None:
    correct = np.array([True] * 9 + [False] * 2 + [True] * 20)
    other = np.array([False] * 9 + [True] * 2 + [True] * 20)
    tail = sum(comb(11, k) for k in range(3)) / 2**11
    assert mcnemar(correct, other) == pytest.approx(2 * tail, rel=1e-9)  # rounding of the library's binomials
    assert mcnemar(correct, correct) == 1.0


def test_ties_are_what_holm_cannot_tell_apart() -> None:
    best = np.ones(100, dtype=bool)
    slightly, clearly = best.copy(), best.copy()
    slightly[:6] = False  # p = 1/32: below 5 %, but not below half of it
    clearly[:30] = False
    # as the largest of the two it is held against 5 %
    assert find_ties({"a": best, "b": slightly, "c": clearly}, "a") == ("a",)
    few = best.copy()
    few[:5] = False  # p = 1/16
    assert find_ties({"a": best, "b": few, "c": clearly}, "a") == ("a", "b")
    assert find_ties({"a": best, "b": slightly, "d": slightly}, "a") == ("a", "b", "d")
    assert differs(best, slightly) and not differs(best, few)


@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_sites_that_are_equally_right_are_told_apart_no_more_often_than_said(shared: float) -> None:
    """The best of ten is chosen on the items that it is then compared on."""
    maker, trials, wrong = np.random.default_rng(0), 200, 0
    for _ in range(trials):
        common, own = maker.standard_normal((1, 300)), maker.standard_normal((10, 300))
        right = np.sqrt(shared) * common + np.sqrt(1 - shared) * own < 0.5
        correct = {f"layers.{number}": row for number, row in enumerate(right)}
        wrong += len(find_ties(correct, max(correct, key=lambda name: correct[name].mean()))) < len(correct)
    assert wrong <= 19  # 10 at 5 %, and three standard deviations


def test_a_site_alone_is_compared_with_none() -> None:
    right = np.arange(40) % 4 > 0
    said = judge({"layers.0": (0.8, 0.75)}, {"layers.0": right}, {})
    assert said.tied == ("layers.0",) and said.best == said.chosen == "layers.0"
    assert said.sentences == ("Dev chooses layers.0; on test it is right 75.0% of the time.",)
    worse = right & (np.arange(40) % 8 > 2)
    both = judge({"a": (0.8, 0.75), "b": (0.4, worse.mean())}, {"a": right, "b": worse}, {})
    assert both.sentences[1] == "On test a is better than every other (McNemar, Holm, 5 %)."


@pytest.mark.parametrize(("count", "truth"), [(16, 0.9), (50, 0.95), (150, 0.7)])
def test_the_interval_covers_the_true_accuracy_about_as_often_as_it_says(count: int, truth: float) -> None:
    covered = 0.0
    for right in range(count + 1):
        low, high = bound_accuracy(np.arange(count) < right, np.arange(count), 0)
        covered += (low <= truth <= high) * comb(count, right) * truth**right * (1 - truth) ** (count - right)
    assert covered >= 0.93  # Wilson's is 0.95 on average over truths, not for each of them


@pytest.mark.parametrize(("right", "count"), [(3, 16), (0, 9), (9, 9), (1, 2)])
def test_the_interval_is_that_of_wilson(right: int, count: int) -> None:
    wanted = binomtest(right, count).proportion_ci(method="wilson")
    found = bound_accuracy(np.arange(count) < right, np.arange(count), 0)
    assert found == pytest.approx((wanted.low, wanted.high), abs=1e-12)  # sums in another order


@pytest.mark.parametrize("count", [1, 5])
def test_the_interval_has_a_width_where_examples_are_equally_right(count: int) -> None:
    # half of the four items of each: as much is known as of examples of one item, half of them right
    low, high = bound_accuracy(np.arange(4 * count) % 2 > 0, np.arange(4 * count) // 4, 0)
    centred = 1.959964**2 / count
    half = np.sqrt(centred + centred**2) / (2 * (1 + centred))
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))


def test_the_interval_has_a_width_where_every_item_is_right_or_wrong() -> None:
    # 1 / (1 + z^2 / n), Wilson 1927
    assert bound_accuracy(np.ones(12, dtype=bool), np.arange(12), 0) == pytest.approx((1 / (1 + 1.959964**2 / 12), 1))
    # the items of an example are not independent: as wide as that of 12 examples
    for right in (True, False):
        whole = bound_accuracy(np.full(60, right), np.repeat(np.arange(12), 5), 0)
        assert whole == bound_accuracy(np.full(12, right), np.arange(12), 0)


def test_items_of_one_example_are_drawn_together() -> None:
    correct = np.repeat(np.random.default_rng(1).random(30) < 0.6, 20)
    low, high = bound_accuracy(correct, np.repeat(np.arange(30), 20), 0)
    alone = bound_accuracy(correct, np.arange(600), 0)
    assert high - low > 2 * (alone[1] - alone[0])


def test_a_score_has_its_accuracy_inside_its_interval() -> None:
    truth = np.array([0, 1] * 20)
    found = score(np.array([0, 1] * 15 + [1, 0] * 5), truth, np.arange(40), 0)
    assert found.accuracy == 0.75 and found.ci[0] < 0.75 < found.ci[1]
