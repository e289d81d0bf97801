"""What a classifier of activations must be better than: the most frequent class, and the words themselves.

Also the labels of a control task, which depend on the type of an item alone, and on nothing that a layer could know.

scikit-learn is imported in the functions that fit. Must never know of stores, sites or vectors.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerprobe.analysis.splits import DEV, TEST, TRAIN

__all__ = ["Guess", "draw_control", "guess_majority", "guess_words"]

# every run of signs is a word, so that ids and pieces of words count too
_WORD = r"\w+|[^\w\s]+"
_WORD_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
# One per word and class; the solver takes about 200 bytes for each.
_MOST_WEIGHTS = 5_000_000


@dataclass(frozen=True, eq=False)
class Guess:
    """What a baseline says.

    Args:
        predicted: int64, the class of each item of test.
        dev_accuracy: On dev.
        detail: How it was made.
    """

    predicted: np.ndarray
    dev_accuracy: float
    detail: str


def guess_majority(labels: np.ndarray, sides: np.ndarray) -> Guess:
    """Say the most frequent class of train, always."""
    most = int(np.bincount(labels[sides == TRAIN]).argmax())
    predicted = np.full(int((sides == TEST).sum()), most, dtype=np.int64)
    return Guess(predicted, float((labels[sides == DEV] == most).mean()), "the most frequent class of train")


def guess_words(words: Sequence[str], labels: np.ndarray, sides: np.ndarray, detail: str) -> Guess:
    """Fit logistic regression on TF-IDF of words and pairs of words, C by dev accuracy.

    Where a weight for each word and class is more than about 1 GiB to fit, the most frequent words are taken.

    Source: Sparck Jones 1972 for the weights; as a baseline of text classifiers, Wang and Manning 2012.
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
        # not one word in all of train
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
    """Give each type a label at random, as often as the labels come; all items of a type have the same.

    Source: Hewitt and Liang 2019, "Designing and Interpreting Probes with Control Tasks", section 2.
    """
    maker = np.random.default_rng([seed, 4])
    numbers = {one: place for place, one in enumerate(dict.fromkeys(types))}
    drawn = maker.choice(labels, size=len(numbers))
    return drawn[[numbers[one] for one in types]]
