"""`layerprobe.classify`: how well a linear probe separates classes at each layer, with baselines and a verdict.

Only the vectors of the selected items are held in memory, for all sites at once, because the learned mix needs every
layer. `probing` fits a single probe; this module combines the parts.

Must never know of models, hooks or shards.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from layerprobe.analysis.baselines import Guess, draw_control, guess_majority, guess_words
from layerprobe.analysis.features import Feature, average_of, joined_of, learn_mix, read_site, single_of
from layerprobe.analysis.keeping import KeptProbe
from layerprobe.analysis.probing import Fit, code_length, fit_best, fitting
from layerprobe.analysis.scores import score
from layerprobe.analysis.splits import DEV, TEST, TRAIN
from layerprobe.analysis.sweep import choose_depth
from layerprobe.analysis.tasks import Task, make_task
from layerprobe.analysis.verdict import BaselineScore, Classification, Mix, SiteScore, TaskSummary, judge
from layerprobe.cores import using_few_cores
from layerprobe.errors import InputError, OptionError
from layerprobe.packages import need_package
from layerprobe.store.guard import check_count, check_flag
from layerprobe.store.naming import list_named
from layerprobe.store.reader import Store, take_store
from layerprobe.store.shards import POOLS
from layerprobe.tables import format_count
from layerprobe.telling import make_bar

__all__ = ["MakeUntrained", "classify"]

_LAST = 4
_MOST_EXAMPLES = 50_000


class MakeUntrained(Protocol):
    """A function that extracts the same texts with a randomly initialised model, as `layerprobe.extract_untrained`."""

    def __call__(self, store: Store, to: str | Path, *, sites: Sequence[str], pool: str | None, seed: int) -> Store:
        """Make the store."""
        ...


@dataclass(frozen=True)
class _Options:
    control: bool
    mdl: bool
    seed: int


@dataclass(eq=False)
class _Found:
    """The results of one feature."""

    feature: Feature
    fit: Fit
    correct: np.ndarray
    score: SiteScore


def classify(
    store: Store | str | Path,
    labels: str | Sequence[Any] = "label",
    *,
    sites: str | Sequence[str] | None = None,
    pool: str = "mean",
    span: tuple[str, str] | None = None,
    split: str | Sequence[Any] | None = None,
    group: str | Sequence[Any] | None = None,
    control: bool = False,
    mdl: bool = False,
    untrained: Store | MakeUntrained | None = None,
    max_examples: int | None = _MOST_EXAMPLES,
    seed: int = 0,
    progress: bool | None = None,
) -> Classification:
    """Measure how well a linear probe separates classes at each layer, compared with baselines.

    Args:
        store: A store, or its path or URL.
        labels: A record field, or one value per example. Lists with one label per token (None for no label) classify
            tokens.
        sites: Patterns over the stored sites; None for the embeddings and every layer's output.
        pool: How an example becomes one vector: `mean`, `cls`, `max` or `last`; `last4` for the last four layers alone,
            joined and averaged, by the mean. A pooled store is used as it is.
        span: Two record fields, the first character and the one after the last. The pieces of the span are averaged and
            classified.
        split: A record field, or values per example: train, dev or test. By default three fifths are for training, one
            for choosing (dev) and one for testing, at random; texts with the same tokens stay together.
        group: A record field, or values per example; equal values stay on one side.
        control: Also fit random labels per type, to measure selectivity.
        mdl: Also measure the description length (online code).
        untrained: A store of the same texts from the same architecture with random weights, or a function that makes
            one, such as `layerprobe.extract_untrained`.
        max_examples: Maximum number of examples, and of tokens or spans, drawn at random; None for all.
        seed: Random seed.
        progress: Show a progress bar; None: only on a terminal.

    Raises:
        InputError: labels are missing, all of one class, or of more classes than there are examples.
        OptionError: an option has an invalid value, or two options conflict.
        NonFiniteError: a vector is not finite, by name.
        SiteError: a pattern matches nothing that is stored.

    Cost: one pass over each site; memory 24 D bytes for each item, and 8 D L for the mix of L layers; about 1 GiB at
        most for the weights of words. A fit takes time with the number of classes.

    Source: Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes".

    Example:
        >>> import layerprobe as lp
        >>> rain = [{"text": f"{word} rain fell", "label": "wet"} for word in ("Cold", "Warm", "Soft", "Hard", "More")]
        >>> sun = [{"text": f"{word} sun shone", "label": "dry"} for word in ("Cold", "Warm", "Soft", "Hard", "More")]
        >>> store = lp.extract("demo", rain + sun, "memory://weather", sites="layers.-2:")
        >>> found = lp.classify(store, "label")
        >>> [site.site for site in found.sites], sorted(found.baselines)
        (['layers.4', 'layers.5', 'mix'], ['majority', 'tfidf'])
    """
    need_package("sklearn", "a classifier", "analysis")
    seed = check_count("seed", seed, 0)
    for name, value in (("control", control), ("mdl", mdl)):
        check_flag(name, value)
    if max_examples is not None:
        check_count("max_examples", max_examples, 3)
    if untrained is not None and not isinstance(untrained, Store) and not callable(untrained):
        raise OptionError(
            f"untrained={untrained!r}: give a store of the same texts, or what makes one: lp.extract_untrained."
        )
    store = take_store(store)
    if not len(store):
        raise InputError(f"labels for {store.place}: it has no examples. Extract some first.")
    names, own_pool = _choose(store, sites, pool)
    task = make_task(store, labels, span=span, split=split, group=group, max_examples=max_examples, seed=seed)
    used_pool = own_pool if task.kind == "examples" else None
    if task.kind != "examples" and pool not in ("mean", "last4"):
        raise OptionError(f"pool={pool!r}: labels {task.name!r} belong to {task.kind}, which are not pooled. Leave it.")
    options = _Options(control, mdl, seed)
    notes = list(task.notes)

    with fitting(), using_few_cores(), make_bar(len(names), "probes", progress, "fits") as bar:
        found, mix = _probe_sites(store, task, names, used_pool, options, notes, bar, pool == "last4", sites)
        guesses = {"majority": guess_majority(task.labels, task.sides), "tfidf": _guess_words(task)}
        baselines = {name: _score_guess(task, guess, seed) for name, guess in guesses.items()}
        right = {name: guess.predicted == task.labels[task.sides == TEST] for name, guess in guesses.items()}
        if untrained is not None:
            baselines["untrained"], right["untrained"] = _try_untrained(store, task, names, used_pool, untrained, seed)
    verdict = judge(
        {one.feature.name: (one.score.dev_accuracy, one.score.accuracy) for one in found},
        {one.feature.name: one.correct for one in found},
        right,
    )
    if any(not one.fit.is_converged for one in found):
        notes.append("Some fits stopped before their end; see `converged`.")
    kept = next(one for one in found if one.feature.name == verdict.chosen)
    summary = TaskSummary(task.name, task.kind, used_pool, task.classes, *(task.count(side) for side in range(3)))
    return Classification(
        summary,
        tuple(replace(one.score, tied=one.feature.name in verdict.tied) for one in found),
        baselines,
        verdict,
        mix,
        tuple(notes),
        _keep(store, task, kept, used_pool),
    )


def _choose(store: Store, patterns: str | Sequence[str] | None, pool: str) -> tuple[list[str], str | None]:
    """Choose the sites, and the pool that turns their rows into vectors."""
    if pool not in (*POOLS, "last4"):
        raise OptionError(f"pool={pool!r}: use {', '.join(POOLS)} or last4.")
    chosen = choose_depth(store, patterns)
    if any(site.kind == "attention" for site in chosen):
        raise OptionError(f"{chosen[0].name!r} is one matrix per head and has no rows. Classify by another site.")
    names = [site.name for site in chosen]
    if pool == "last4" and len(_layers(names)) < _LAST:
        raise OptionError(
            f"pool='last4': {store.place} has {format_count(len(_layers(names)), 'layer')} among {', '.join(names)}."
        )
    if chosen[0].kind != "token":
        if pool not in ("mean", "last4", store.pool):
            raise OptionError(f"pool={pool!r}: in {store.place} {chosen[0].tell_vector(store.pool)}. Leave pool out.")
        return names, store.pool
    return names, "mean" if pool == "last4" else pool


def _layers(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.split(".")[-1].isdigit()]


def _probe_sites(
    store: Store,
    task: Task,
    names: list[str],
    pool: str | None,
    options: _Options,
    notes: list[str],
    bar: Any,
    only_last: bool,
    patterns: str | Sequence[str] | None,
) -> tuple[list[_Found], Mix | None]:
    """Fit each site, the last four layers together, and a mix of all; skip constant sites, or refuse them if named."""
    named = list_named(patterns, store.sites)
    found: list[_Found] = []
    kept: dict[str, np.ndarray] = {}
    for name in _layers(names)[-_LAST:] if only_last else names:
        values = read_site(store, name, task, pool)
        train = values[task.sides == TRAIN]
        if bool((train == train[0]).all()):
            _leave_out(store, name, pool, name in named, notes)
            continue
        if not only_last:
            found.append(_probe(single_of(name), [values], task, options))
        kept[name] = values
        bar.update()
    if not kept:
        raise OptionError(
            f"labels {task.name!r}: no site of {store.place} varies in train. Choose others, or another pool."
        )
    last = [name for name in _layers(names)[-_LAST:] if name in kept]
    features = [joined_of(last), average_of(last)] if len(last) == _LAST else []
    mix = None
    if not only_last and len(kept) > 1 and len({values.shape[1] for values in kept.values()}) == 1:
        mixed, shares = learn_mix(list(kept.values()), list(kept), task, options.seed)
        centre = float((np.arange(len(shares)) * shares).sum())
        mix = Mix(tuple(kept), tuple(shares.tolist()), centre)
        features.append(mixed)
    bar.total += len(features)
    for feature in features:
        found.append(_probe(feature, [kept[site] for site in feature.sites], task, options))
        bar.update()
    return found, mix


def _leave_out(store: Store, name: str, pool: str | None, is_named: bool, notes: list[str]) -> None:
    why = "the first token's vector there does not depend on the text" if pool == "cls" else "no dimension varies"
    if is_named:
        raise OptionError(f"{name!r} in {store.place}: every vector of train is the same; {why}. Leave the site out.")
    notes.append(f"{name} is left out: every vector of train is the same; {why}.")


def _parts(values: np.ndarray, labels: np.ndarray, sides: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for side in (TRAIN, DEV, TEST):
        yield values[sides == side], labels[sides == side]


def _probe(feature: Feature, values: Sequence[np.ndarray], task: Task, options: _Options) -> _Found:
    """Fit a probe on one feature, and measure the control task and code length if requested."""
    vectors, num_classes = feature.combine(values), len(task.classes)
    train, dev, test = _parts(vectors, task.labels, task.sides)
    # joined sites take as much memory as four sites
    del vectors
    fit = fit_best(train, dev, num_classes)
    predicted = fit.probe.predict(test[0])
    own = score(predicted, test[1], task.examples[task.sides == TEST], options.seed)
    result = SiteScore(
        feature.name,
        own.accuracy,
        own.f1,
        own.ci,
        fit.dev_accuracy,
        fit.strength,
        fit.num_dead,
        False,
        fit.is_converged,
    )
    if options.control:
        drawn = draw_control(task.types, task.labels, options.seed)
        of_train, of_dev, of_test = (
            (values, drawn[task.sides == side])
            for side, (values, _) in zip((TRAIN, DEV, TEST), (train, dev, test), strict=True)
        )
        control = fit_best(of_train, of_dev, num_classes).probe
        on_test, on_train = (float((control.predict(x) == y).mean()) for x, y in (of_test, of_train))
        result = replace(result, control=on_test, control_train=on_train, selectivity=own.accuracy - on_test)
    if options.mdl:
        bits = code_length(*train, num_classes, options.seed)
        uniform = len(train[1]) * float(np.log2(num_classes))
        result = replace(result, bits=bits, compression=uniform / bits)
    return _Found(feature, fit, predicted == test[1], result)


def _guess_words(task: Task) -> Guess:
    of = "the words of the text" if task.kind == "examples" else f"the tokens of {task.kind}"
    return guess_words(task.words, task.labels, task.sides, f"TF-IDF of {of}, and of pairs of them")


def _score_guess(task: Task, guess: Guess, seed: int, sites: dict[str, float] | None = None) -> BaselineScore:
    is_test = task.sides == TEST
    own = score(guess.predicted, task.labels[is_test], task.examples[is_test], seed)
    return BaselineScore(own.accuracy, own.f1, own.ci, guess.dev_accuracy, guess.detail, sites)


def _try_untrained(
    store: Store, task: Task, names: list[str], pool: str | None, untrained: Store | MakeUntrained, seed: int
) -> tuple[BaselineScore, np.ndarray]:
    """Fit every site of the untrained model; the site with the best dev accuracy becomes the baseline."""
    if not isinstance(untrained, Store):
        with tempfile.TemporaryDirectory(prefix="layerprobe-") as folder:
            place = Path(folder) / "untrained"
            with untrained(store, place, sites=names, pool=pool, seed=seed) as made:
                return _try_untrained(store, task, names, pool, made, seed)
    for ordinal in {int(task.examples[0]), int(task.examples[-1])}:
        if len(untrained) != len(store) or untrained.input_ids(ordinal).tolist() != store.input_ids(ordinal).tolist():
            raise OptionError(
                f"untrained: {untrained.place} does not hold the texts of {store.place}. Extract the same."
            )
    best: tuple[float, str, np.ndarray] | None = None
    accuracies: dict[str, float] = {}
    for name in [name for name in names if name in untrained.sites]:
        values = read_site(untrained, name, task, pool)
        train, dev, test = _parts(values, task.labels, task.sides)
        fit = fit_best(train, dev, len(task.classes))
        predicted = fit.probe.predict(test[0])
        accuracies[name] = float((predicted == test[1]).mean())
        if best is None or fit.dev_accuracy > best[0]:
            best = (fit.dev_accuracy, name, predicted)
    if best is None:
        raise OptionError(f"untrained: {untrained.place} has none of {', '.join(names)}. Extract the same sites.")
    guess = Guess(best[2], best[0], f"{best[1]} of the same architecture with random weights")
    return _score_guess(task, guess, seed, accuracies), best[2] == task.labels[task.sides == TEST]


def _keep(store: Store, task: Task, found: _Found, pool: str | None) -> KeptProbe:
    plan = store.description.get("plan") or {}
    model = store.description.get("model") or {}
    return KeptProbe(found.fit.probe, found.feature, task.classes, task.kind, pool, plan.get("max_length"), dict(model))
