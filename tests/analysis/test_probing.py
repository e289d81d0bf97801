"""The probe against scikit-learn's own pipeline, and the code length against bounds that must hold."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from layerprobe.analysis.baselines import draw_control, guess_majority, guess_words
from layerprobe.analysis.probing import code_length, fit_best, fit_probe, fitting


def make(seed: int, count: int = 300, num_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    maker = np.random.default_rng(seed)
    labels = maker.integers(num_classes, size=count)
    values = maker.normal(size=(count, 12)) * np.logspace(-3, 3, 12) + 50
    values[:, 4] += labels * 0.5
    return values.astype(np.float32), labels


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_probe_is_what_a_pipeline_of_sklearn_gives(num_classes: int) -> None:
    values, labels = make(0, num_classes=num_classes)
    probe, _ = fit_probe(values, labels, num_classes, 0.1)
    wide = values.astype(np.float64)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(wide, labels)
    scores = probe.scores(values)
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    assert np.abs(chances - pipeline.predict_proba(wide)).max() < 1e-3  # the solver's own tolerance
    assert (probe.predict(values) == pipeline.predict(wide)).mean() > 0.99  # the same, near the border


def test_a_dimension_that_does_not_vary_is_left_out() -> None:
    values, labels = make(1)
    values[:, 2], values[:, 7] = 0.0, 3.3333
    values[::2, 7] = np.nextafter(np.float32(3.3333), np.float32(4))
    fit = fit_best((values[:200], labels[:200]), (values[200:], labels[200:]), 3)
    assert fit.num_dead == 2
    assert not fit.probe.weights[:, [2, 7]].any() and np.isfinite(fit.probe.weights).all()


def test_dev_chooses_the_strength() -> None:
    values, labels = make(2)
    dev = make(3)
    fit = fit_best((values, labels), dev, 3)
    tried = {c: (fit_probe(values, labels, 3, c)[0].predict(dev[0]) == dev[1]).mean() for c in (1e-3, 1e-2, 1e-1)}
    assert fit.dev_accuracy == max(tried.values())
    assert fit.strength == min(c for c, accuracy in tried.items() if accuracy == fit.dev_accuracy)


def test_a_class_that_train_lacks_is_never_predicted() -> None:
    values, labels = make(4, num_classes=2)
    probe, _ = fit_probe(values, labels * 2, 3, 0.1)
    assert set(probe.predict(values).tolist()) <= {0, 2}


def test_the_code_of_noise_costs_the_uniform_code_and_that_of_signal_less() -> None:
    maker = np.random.default_rng(5)
    labels = maker.integers(4, size=1000)
    noise = maker.normal(size=(1000, 8))
    uniform = 1000 * 2.0
    assert 0.98 * uniform < code_length(noise, labels, 4, 0) < 1.2 * uniform
    signal = noise + 4 * np.eye(8)[labels]
    assert code_length(signal, labels, 4, 0) < 0.5 * uniform


def test_blas_has_few_threads_in_a_fit() -> None:
    import os

    from threadpoolctl import threadpool_info

    with fitting():
        counts = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    assert counts and max(counts) <= max(1, (os.cpu_count() or 1) // 2)


def test_control_labels_hang_on_the_type_alone() -> None:
    types = [place % 500 for place in range(2000)]
    labels = np.array([0] * 1500 + [1] * 500)
    drawn = draw_control(types, labels, 0)
    assert all((drawn[one::500] == drawn[one]).all() for one in range(500))
    assert abs(drawn.mean() - 0.25) < 0.08  # four standard deviations of 500 draws


def test_words_tell_what_words_tell() -> None:
    sides = np.array([0, 0, 0, 1, 2] * 20)
    labels = np.arange(100) % 2
    words = ["rain fell" if label else "sun shone" for label in labels]
    assert (guess_words(words, labels, sides, "").predicted == labels[sides == 2]).all()
    assert guess_words([""] * 100, labels, sides, "").predicted.shape == (20,)
    assert len(set(guess_majority(labels, sides).predicted.tolist())) == 1


def test_words_of_many_classes_are_the_most_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerprobe.analysis.baselines._MOST_WEIGHTS", 21)
    sides = np.array([0, 0, 0, 1, 2] * 24)
    for num_classes, most in ((2, 10), (3, 7)):
        labels = np.arange(120) % num_classes
        # of each class a word in every text, and one in each text alone
        words = [f"common{label} rare{place}" for place, label in enumerate(labels)]
        guess = guess_words(words, labels, sides, "words")
        assert guess.detail == f"words, the {most} most frequent" and (guess.predicted == labels[sides == 2]).all()
    monkeypatch.setattr("layerprobe.analysis.baselines._MOST_WEIGHTS", 1000)
    assert guess_words(words, labels, sides, "words").detail == "words"
