"""Accuracy of predictions, its confidence interval, and tests of whether two classifiers differ.

Everything is computed from predictions on the same test items: accuracy, macro F1, intervals clustered by example, and
exact paired tests.

Must never know of stores or of how predictions were made.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

__all__ = ["Score", "bound_accuracy", "differs", "find_ties", "macro_f1", "mcnemar", "score"]

_RESAMPLES = 1000
_LEVEL = 0.05
# Quantile of the normal distribution for a two-sided test at that level.
_QUANTILE = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """Accuracy and F1 of predictions.

    Args:
        accuracy: Share of correct predictions.
        f1: Mean over classes of the harmonic mean of precision and recall.
        ci: 95 % interval of the accuracy.
    """

    accuracy: float
    f1: float
    ci: tuple[float, float]


def score(predicted: np.ndarray, truth: np.ndarray, clusters: np.ndarray, seed: int) -> Score:
    """Score predictions; `clusters` holds the example of each item."""
    correct = predicted == truth
    return Score(float(correct.mean()), macro_f1(predicted, truth), bound_accuracy(correct, clusters, seed))


def macro_f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Compute the unweighted mean F1 over the classes that are predicted or true."""
    found = []
    for label in np.union1d(predicted, truth):
        both = int(((predicted == label) & (truth == label)).sum())
        found.append(2 * both / int((predicted == label).sum() + (truth == label).sum()))
    return float(np.mean(found))


def bound_accuracy(correct: np.ndarray, clusters: np.ndarray, seed: int) -> tuple[float, float]:
    """Compute a 95 % interval of the accuracy: Wilson's if every example has one item, else a cluster bootstrap.

    The bootstrap resamples whole examples 1,000 times, because the items of one example are not independent; the bounds
    are percentiles 2.5 and 97.5. If all examples have the same accuracy, resampling changes nothing, and Wilson's
    interval for their number is used.

    Source: Wilson 1927, Journal of the American Statistical Association 22; Efron and Tibshirani 1993, "An Introduction
    to the Bootstrap", 13.3.
    """
    _, of = np.unique(clusters, return_inverse=True)
    right, count = np.bincount(of, weights=correct), np.bincount(of)
    shares = right / count
    if len(count) == len(correct) or (shares == shares[0]).all():
        return _bound_share(float(shares.mean()), len(count))
    maker = np.random.default_rng([seed, 2])
    drawn_accuracy = np.empty(_RESAMPLES)
    for place in range(_RESAMPLES):
        drawn = maker.integers(len(count), size=len(count))
        drawn_accuracy[place] = right[drawn].sum() / count[drawn].sum()
    low, high = np.percentile(drawn_accuracy, (2.5, 97.5))
    return float(low), float(high)


def _bound_share(share: float, count: int) -> tuple[float, float]:
    """Compute Wilson's interval for a proportion of `count` items."""
    extra = _QUANTILE**2 / count
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(extra * share * (1 - share) + extra * extra / 4) / (1 + extra)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(correct: np.ndarray, other: np.ndarray) -> float:
    """Test whether two classifiers are right equally often, on the items where exactly one is right; two-sided, exact.

    Source: McNemar 1947, Psychometrika 12; the exact binomial form.
    """
    from scipy.special import bdtr

    only, only_other = int((correct & ~other).sum()), int((other & ~correct).sum())
    # twice one tail, because a binomial with p = 1/2 is symmetric
    return min(1.0, 2 * float(bdtr(min(only, only_other), only + only_other, 0.5)))


def find_ties(correct: Mapping[str, np.ndarray], best: str) -> tuple[str, ...]:
    """List the classifiers that do not differ from the best at 5 %, itself included.

    McNemar's tests with Holm's correction over all pairs, not only those with the best, because the best is chosen on
    the same items.

    Source: Holm 1979, Scandinavian Journal of Statistics 6: the smallest of m p-values is compared with 0.05 / m, the
    next with 0.05 / (m - 1), until one is not rejected.
    """
    pairs = list(combinations(correct, 2))
    values = sorted((mcnemar(correct[one], correct[other]), one, other) for one, other in pairs)
    differ: set[str] = set()
    for place, (value, *pair) in enumerate(values):
        if value > _LEVEL / (len(values) - place):
            break
        if best in pair:
            differ.update(pair)
    return tuple(name for name in correct if name == best or name not in differ)


def differs(correct: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two classifiers differ at 5 % by McNemar's test."""
    return mcnemar(correct, other) <= _LEVEL
