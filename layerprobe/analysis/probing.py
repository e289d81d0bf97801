"""The linear probe: logistic regression on standardised vectors, and how its strength is chosen.

Mean, deviation, which dimensions vary, and weights come from train only. A fitted probe is two arrays that take
raw vectors, so that it can be kept and used without scikit-learn. Also the online code length of labels.

scikit-learn is imported in the functions that fit. Must never know of stores or sites.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from layerprobe.cores import few_cores

__all__ = ["Fit", "LinearProbe", "code_length", "fit_best", "fit_probe", "fitting"]

_STRENGTHS = (1e-3, 1e-2, 1e-1)
# The code length is only comparable between sites at one strength.
_CODE_STRENGTH = 1e-2
_MAX_ITERATIONS = 1000
# A deviation below this part of the mean is rounding.
_STILL = 1e-6
_PIECE = 4096
# In percent of train; Voita and Titov 2020, section 2.3.
_PORTIONS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25.0, 50.0, 100.0)


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of raw vectors.

    Args:
        weights: float64 `[K, D]`; 0 in dimensions that did not vary.
        bias: float64 `[K]`; minus infinity for a class that was not seen.
    """

    weights: np.ndarray
    bias: np.ndarray

    def predict(self, values: np.ndarray) -> np.ndarray:
        """Give the class of each vector, int64 `[n]`."""
        return self.scores(values).argmax(1)

    def scores(self, values: np.ndarray) -> np.ndarray:
        """Give the logarithm of each class's probability up to a constant of the row, float64 `[n, K]`."""
        return values.astype(np.float64) @ self.weights.T + self.bias


@dataclass(frozen=True, eq=False)
class Fit:
    """A probe and how it was chosen.

    Args:
        probe: The probe.
        strength: The C that dev chose.
        dev_accuracy: On dev.
        num_dead: Dimensions that do not vary in train and were left out.
        is_converged: Whether the fit came to its end.
    """

    probe: LinearProbe
    strength: float
    dev_accuracy: float
    num_dead: int
    is_converged: bool


@contextmanager
def fitting() -> Iterator[None]:
    """Fit with half the cores, at most four: BLAS threads that wait for a busy core make a fit several times slower.

    scikit-learn's warnings of a fit are left out: the result says whether it converged, and of how few items.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(few_cores()), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%", UserWarning)
        yield


def _standardise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the mean and the inverse deviation of each dimension, float64 `[D]`; 0 for one that does not vary."""
    mean = values.mean(0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for part in _pieces(values):
        squares += np.square(part - mean).sum(0)
    deviation = np.sqrt(squares / len(values))
    varies = deviation > _STILL * np.abs(mean)
    return mean, np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies)


def _pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    """Go through rows a few thousand at a time, as views: what is computed of them in float64 stays small."""
    for first in range(0, len(values), _PIECE):
        yield values[first : first + _PIECE]


def fit_probe(
    values: np.ndarray, labels: np.ndarray, num_classes: int, strength: float, scaling: tuple[Any, Any] | None = None
) -> tuple[LinearProbe, bool]:
    """Fit logistic regression, L2, on z-scores; gives the probe and whether the fit converged."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = _standardise(values) if scaling is None else scaling
    used = scale > 0
    weights, bias = np.zeros((num_classes, len(mean))), np.full(num_classes, -np.inf)
    seen = np.unique(labels)
    if len(seen) == 1 or not used.any():
        # nothing to tell classes by: how often each comes
        bias[seen] = np.log([(labels == one).mean() for one in seen])
        return LinearProbe(weights, bias), True
    model: Any = LogisticRegression(C=strength, max_iter=_MAX_ITERATIONS)
    scaled = np.empty((len(values), int(used.sum())))
    for part, into in zip(_pieces(values), _pieces(scaled), strict=True):
        np.multiply(part[:, used] - mean[used], scale[used], out=into)
    model.fit(scaled, labels)
    if len(seen) == 2:
        rows, starts = np.concatenate([0 * model.coef_, model.coef_]), np.array([0.0, model.intercept_[0]])
    else:
        rows, starts = model.coef_, model.intercept_
    for place, one in enumerate(seen):
        weights[one, used] = rows[place] * scale[used]
        bias[one] = starts[place]
    bias -= weights @ mean
    return LinearProbe(weights, bias), int(np.max(model.n_iter_)) < _MAX_ITERATIONS


def fit_best(train: tuple[np.ndarray, np.ndarray], dev: tuple[np.ndarray, np.ndarray], num_classes: int) -> Fit:
    """Fit at each strength and keep the one with the best dev accuracy, the strongest penalty among equals."""
    scaling = _standardise(train[0])
    best: Fit | None = None
    for strength in _STRENGTHS:
        probe, is_converged = fit_probe(*train, num_classes, strength, scaling)
        accuracy = float((probe.predict(dev[0]) == dev[1]).mean())
        if best is None or accuracy > best.dev_accuracy:
            best = Fit(probe, strength, accuracy, int((scaling[1] == 0).sum()), is_converged)
    assert best is not None
    return best


def code_length(values: np.ndarray, labels: np.ndarray, num_classes: int, seed: int) -> float:
    """Count the bits that send the labels of train to who has the vectors: each portion by a probe of those before.

    The first portion costs log2 K a label. A probe of n labels gives a class the probability (n p + 1) / (n + K), so
    that none is impossible.

    Source: Voita and Titov 2020, "Information-Theoretic Probing with Minimum Description Length", section 2.3, the
    online code; C is fixed at 0.01.
    """
    order = np.random.default_rng([seed, 3]).permutation(len(labels))
    values, labels = values[order], labels[order]
    ends = sorted({max(1, round(len(labels) * portion / 100)) for portion in _PORTIONS})
    bits = ends[0] * math.log2(num_classes)
    for known, end in pairwise(ends):
        probe, _ = fit_probe(values[:known], labels[:known], num_classes, _CODE_STRENGTH)
        scores = probe.scores(values[known:end])
        chances = np.exp(scores - scores.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        told = chances[np.arange(end - known), labels[known:end]]
        bits -= float(np.log2((known * told + 1) / (known + num_classes)).sum())
    return bits
