"""Baselines that a classifier of activations must beat: the most frequent class, and the words themselves.

Also the random labels of a control task, which depend only on an item's type, so no layer can encode them.

scikit-learn is imported in the functions that fit. Must never know of stores, sites or vectors.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerprobe.analysis.splits import DEV, TEST, TRAIN

__all__ = ["Guess", "draw_control", "guess_majority", "guess_words"]

# A run of punctuation counts as a word too, so that token ids and word pieces are not dropped.
_WORD = r"\w+|[^\w\s]+"
_WORD_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
# One weight per word and class; the solver takes about 200 bytes for each.
_MOST_WEIGHTS = 5_000_000


@dataclass(frozen=True, eq=False)
class Guess:
    """The predictions of a baseline.

    Args:
        predicted: int64, the class of each test item.
        dev_accuracy: Accuracy on dev.
        detail: How the baseline was made.
    """

    predicted: np.ndarray
    dev_accuracy: float
    detail: str


def guess_majority(labels: np.ndarray, sides: np.ndarray) -> Guess:
    """Predict the most frequent class of train for every item."""
    most = int(np.bincount(labels[sides == TRAIN]).argmax())
    predicted = np.full(int((sides == TEST).sum()), most, dtype=np.int64)
    return Guess(predicted, float((labels[sides == DEV] == most).mean()), "the most frequent class of train")


def guess_words(words: Sequence[str], labels: np.ndarray, sides: np.ndarray, detail: str) -> Guess:
    """Fit logistic regression on TF-IDF of words and word pairs, with C chosen by dev accuracy.

    If fitting a weight per word and class would take more than about 1 GiB, only the most frequent words are used.

    Source: Sparck Jones 1972 for the weights; Wang and Manning 2012 for the baseline.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    parts = [[words[place] for place in np.flatnonzero(sides == side).tolist()] for side in (TRAIN, DEV, TEST)]
    known = labels[sides == TRAIN]
    most = max(1, _MOST_WEIGHTS // len(np.unique(known)))
    vectorizer: Any = TfidfVectorizer(ngram_range=(1, 2), token_pattern=_WORD, sublinear_tf=True, max_features=most)
    try:
        train = vectorizer.fit_transform(parts[0])
    except ValueError:
        # train contains no word at all
        return guess_majority(labels, sides)
    if train.shape[1] == most:
        detail += f", the {most:,} most frequent"
    dev, test = vectorizer.transform(parts[1]), vectorizer.transform(parts[2])
    best: tuple[float, Any] = (-1.0, None)
    for strength in _WORD_STRENGTHS:
        model: Any = LogisticRegression(C=strength, max_iter=1000)
        model.fit(train, known)
        accuracy = float((model.predict(dev) == labels[sides == DEV]).mean())
        if accuracy > best[0]:
            best = (accuracy, model)
    return Guess(best[1].predict(test).astype(np.int64), best[0], detail)


def draw_control(types: Sequence[Hashable], labels: np.ndarray, seed: int) -> np.ndarray:
    """Draw a random label for each type from the distribution of `labels`; all items of a type share it.

    Source: Hewitt and Liang 2019, "Designing and Interpreting Probes with Control Tasks", section 2.
    """
    maker = np.random.default_rng([seed, 4])
    numbers = {one: place for place, one in enumerate(dict.fromkeys(types))}
    drawn = maker.choice(labels, size=len(numbers))
    return drawn[[numbers[one] for one in types]]
