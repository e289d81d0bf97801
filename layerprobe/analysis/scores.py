"""How right predictions are, how sure that is, and whether two classifiers differ.

Everything is computed from predictions on the same test items: accuracy, macro F1, intervals that keep the items of an
example together, and exact paired tests.

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
# Of the normal distribution, at half of that on each side.
_QUANTILE = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """How right predictions are.

    Args:
        accuracy: Share that is right.
        f1: Mean over classes of the harmonic mean of precision and recall.
        ci: 95 % interval of the accuracy.
    """

    accuracy: float
    f1: float
    ci: tuple[float, float]


def score(predicted: np.ndarray, truth: np.ndarray, clusters: np.ndarray, seed: int) -> Score:
    """Score predictions; `clusters` are the examples that items belong to."""
    correct = predicted == truth
    return Score(float(correct.mean()), macro_f1(predicted, truth), bound_accuracy(correct, clusters, seed))


def macro_f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean F1 over the classes that are predicted or true, each alike."""
    found = []
    for label in np.union1d(predicted, truth):
        both = int(((predicted == label) & (truth == label)).sum())
        found.append(2 * both / int((predicted == label).sum() + (truth == label).sum()))
    return float(np.mean(found))


def bound_accuracy(correct: np.ndarray, clusters: np.ndarray, seed: int) -> tuple[float, float]:
    """Bound the accuracy at 95 %: Wilson's interval for items of one example each, else by drawing whole examples.

    Those are drawn with replacement, 1,000 times; the bounds are percentiles 2.5 and 97.5. Where all examples are
    equally right, as one alone is, no draw differs from another, and the interval is Wilson's with their number.

    Source: Wilson 1927, Journal of the American Statistical Association 22; Efron and Tibshirani 1993, "An Introduction
    to the Bootstrap", 13.3; whole clusters, since the items of one example are not independent.
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
    """Give Wilson's interval of a share of `count`."""
    extra = _QUANTILE**2 / count
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(extra * share * (1 - share) + extra * extra / 4) / (1 + extra)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(correct: np.ndarray, other: np.ndarray) -> float:
    """Test whether two classifiers are right equally often, on the items where just one of them is; two-sided, exact.

    Source: McNemar 1947, Psychometrika 12; the exact binomial form.
    """
    from scipy.special import bdtr

    only, only_other = int((correct & ~other).sum()), int((other & ~correct).sum())
    # twice the shorter tail, which at one half is as long as the other
    return min(1.0, 2 * float(bdtr(min(only, only_other), only + only_other, 0.5)))


def find_ties(correct: Mapping[str, np.ndarray], best: str) -> tuple[str, ...]:
    """List what cannot be told from the best at 5 %, itself included, by McNemar's tests under Holm's correction.

    The correction is over all pairs, not those with the best alone: the best is chosen on the same items.

    Source: Holm 1979, Scandinavian Journal of Statistics 6: the smallest of m p-values is held against 0.05 / m, the
    next against 0.05 / (m - 1), until one holds.
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
    """Tell whether two classifiers differ at 5 %."""
    return mcnemar(correct, other) <= _LEVEL
