"""The linear probe: logistic regression on standardised vectors, with its penalty chosen on dev.

Means, deviations, the choice of varying dimensions, and weights come from train only. A fitted probe is two arrays that
apply to raw vectors, so that it can be saved and used without scikit-learn. Also the online code length of labels.

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
# Fixed, because code lengths of sites are comparable only with the same C.
_CODE_STRENGTH = 1e-2
_MAX_ITERATIONS = 1000
# A deviation below this fraction of the mean is rounding error.
_STILL = 1e-6
_PIECE = 4096
# In percent of train; Voita and Titov 2020, section 2.3.
_PORTIONS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25.0, 50.0, 100.0)


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of raw vectors.

    Args:
        weights: float64 `[K, D]`; 0 in dimensions that did not vary.
        bias: float64 `[K]`; minus infinity for a class that train lacks.
    """

    weights: np.ndarray
    bias: np.ndarray

    def predict(self, values: np.ndarray) -> np.ndarray:
        """Predict the class of each vector, int64 `[n]`."""
        return self.scores(values).argmax(1)

    def scores(self, values: np.ndarray) -> np.ndarray:
        """Compute the log probability of each class up to a constant per row, float64 `[n, K]`."""
        return values.astype(np.float64) @ self.weights.T + self.bias


@dataclass(frozen=True, eq=False)
class Fit:
    """A probe and how it was chosen.

    Args:
        probe: The probe.
        strength: The C with the best dev accuracy.
        dev_accuracy: Accuracy on dev.
        num_dead: Number of dimensions that do not vary in train and were left out.
        is_converged: Whether the fit converged.
    """

    probe: LinearProbe
    strength: float
    dev_accuracy: float
    num_dead: int
    is_converged: bool


@contextmanager
def fitting() -> Iterator[None]:
    """Limit BLAS to half the cores, at most four: threads that wait for a busy core make a fit several times slower.

    scikit-learn's warnings are suppressed, because the result says whether the fit converged and from how few items.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(few_cores()), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%", UserWarning)
        yield


def _standardise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute each dimension's mean and inverse deviation, float64 `[D]`; the inverse is 0 if it does not vary."""
    mean = values.mean(0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for part in _pieces(values):
        squares += np.square(part - mean).sum(0)
    deviation = np.sqrt(squares / len(values))
    varies = deviation > _STILL * np.abs(mean)
    return mean, np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies)


def _pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield views of a few thousand rows, so that float64 temporaries stay small."""
    for first in range(0, len(values), _PIECE):
        yield values[first : first + _PIECE]


def fit_probe(
    values: np.ndarray, labels: np.ndarray, num_classes: int, strength: float, scaling: tuple[Any, Any] | None = None
) -> tuple[LinearProbe, bool]:
    """Fit L2-penalised logistic regression on z-scores; return the probe and whether the fit converged."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = _standardise(values) if scaling is None else scaling
    used = scale > 0
    weights, bias = np.zeros((num_classes, len(mean))), np.full(num_classes, -np.inf)
    seen = np.unique(labels)
    if len(seen) == 1 or not used.any():
        # nothing distinguishes classes, so predict by their frequencies
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
    """Fit with each C and keep the fit with the best dev accuracy; ties go to the strongest penalty."""
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
    """Compute the online code length of labels given vectors, in bits: a probe of earlier portions encodes the next.

    The first portion costs log2 K bits per label. A probe fitted on n labels gives a class the probability
    (n p + 1) / (n + K), so that no class is impossible.

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
