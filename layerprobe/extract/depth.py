"""`layerprobe.depth_profile`: what each layer encodes about unlabelled texts.

Labels are made from the texts themselves: how long a text is, whether it contains a frequent content word, and whether
two adjacent words were swapped. For the last task the texts, half of them changed, go through the model once more.

Must never know of how a probe is fitted.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from layerprobe.analysis.classify import classify
from layerprobe.analysis.figures import Curve, draw_curves
from layerprobe.analysis.results import table_cell, write_csv, write_json
from layerprobe.analysis.sweep import choose_depth
from layerprobe.analysis.verdict import Classification
from layerprobe.errors import InputError
from layerprobe.extract.run import extract
from layerprobe.extract.untrained import find_same_model, read_texts
from layerprobe.models import LoadedModel
from layerprobe.packages import need_package
from layerprobe.store.guard import check_count
from layerprobe.store.reader import Store, take_store
from layerprobe.tables import format_count, format_table

__all__ = ["DepthProfile", "depth_profile"]

_LEAST = 30
_WORD = re.compile(r"[^\W\d_]{4,}")
# Least share of the texts in a class: with fewer, always predicting the larger class is nearly always right.
_RAREST = 0.1


@dataclass(frozen=True, eq=False)
class DepthProfile:
    """What `layerprobe.depth_profile` found.

    Args:
        tasks: A classification for each: `length`, `word: ...`, `order`.
        notes: What was left out, and why.
    """

    tasks: Mapping[str, Classification]
    notes: tuple[str, ...]

    def _rows(self) -> list[list[Any]]:
        names = list(dict.fromkeys(site.site for found in self.tasks.values() for site in found.sites))
        found = [{site.site: site.accuracy for site in task.sites} for task in self.tasks.values()]
        rows: list[list[Any]] = [[name, *(task.get(name) for task in found)] for name in names]
        lines = list(dict.fromkeys(name for task in self.tasks.values() for name in task.baselines))
        for line in lines:
            scores = [task.baselines.get(line) for task in self.tasks.values()]
            rows.append([line, *(None if score is None else score.accuracy for score in scores)])
        return rows

    def table(self) -> str:
        """Format the accuracy of each task by site, baselines last, followed by the verdicts."""
        rows = [[table_cell(cell) for cell in row] for row in self._rows()]
        said = [f"{name}: {' '.join(found.verdict.sentences)}" for name, found in self.tasks.items()]
        return "\n".join([format_table(["site", *self.tasks], rows), "", *said, *self.notes])

    __str__ = table
    __repr__ = table

    def to_csv(self, path: str | Path) -> Path:
        """Write the accuracy of each task as CSV, one line per site."""
        return write_csv(path, ["site", *self.tasks], self._rows())

    def to_json(self, path: str | Path) -> Path:
        """Write every classification as one JSON object."""
        tasks = {name: found.as_dict() for name, found in self.tasks.items()}
        return write_json(path, {"tasks": tasks, "notes": self.notes})

    def plot(self, path: str | Path | None = None) -> Any:
        """Plot the accuracy of each task over depth."""
        first = next(iter(self.tasks.values()))
        every = [site.site for site in first.sites]
        # with pool="last4" there are no single sites
        names = [name for name in every if ":" not in name and name != "mix"] or every
        curves = []
        for name, found in self.tasks.items():
            values = {site.site: site.accuracy for site in found.sites}
            curves.append(Curve(name, names, [values.get(site) for site in names]))
        return draw_curves(names, curves, "accuracy on test", path)


def depth_profile(
    store: Store | str | Path,
    *,
    sites: str | Sequence[str] | None = None,
    pool: str = "mean",
    model: nn.Module | LoadedModel | str | None = None,
    max_examples: int = 5000,
    seed: int = 0,
    device: str | int | None = None,
    progress: bool | None = None,
) -> DepthProfile:
    """Measure what each layer encodes about texts without labels: length, a word, word order.

    Args:
        store: A complete store that keeps its texts.
        sites: As in `classify`.
        pool: As in `classify`.
        model: The store's model, for word order; None for the one that the store names.
        max_examples: Maximum number of texts, drawn at random.
        seed: Random seed.
        device: Device for a model loaded by name.
        progress: Show a progress bar; None: only on a terminal.

    Raises:
        InputError: the store keeps no texts, fewer than 30, or none that suit any task.
        ModelError: the model is not the store's.
        OptionError: `device` is given with a model object.

    Source: the tasks are those of Conneau et al. 2018, "What you can cram into a single vector", section 2: SentLen,
    WC (one word, present or not) and BShift.

    Example:
        >>> import layerprobe as lp
        >>> first = ("Quiet", "Large", "Early", "Late", "Small", "Grey", "Green", "Young")
        >>> ends = ("came home", "slept", "sang until morning", "ate slowly", "stood near water all day")
        >>> texts = [f"{one} {who} {end}." for one in first for who in ("birds", "foxes") for end in ends]
        >>> profile = lp.depth_profile(lp.extract("demo", texts, "memory://profiled", sites="layers.-2:"))
        >>> list(profile.tasks)
        ['length', 'word: birds', 'order']
    """
    need_package("sklearn", "a classifier", "analysis")
    check_count("max_examples", max_examples, _LEAST)
    store = take_store(store)
    texts = read_texts(store)
    if len(texts) < _LEAST:
        raise InputError(
            f"a profile of {store.place}: it has {format_count(len(texts), 'text')}; {_LEAST} are the least."
        )
    given: dict[str, list[Any]] = {}
    notes = []
    lengths = _label_lengths([len(store.input_ids(ordinal)) for ordinal in store.ordinals()])
    word = _choose_word(texts)
    if lengths is None:
        notes.append("length is left out: most texts have as many tokens.")
    else:
        given["length"] = lengths
    if word is None:
        notes.append("word is left out: no word of four letters or more is in a tenth of the texts and not in all.")
    else:
        given[f"word: {word}"] = [word in _words_of(text) for text in texts]
    swapped = _swap_some(texts, max_examples, seed)
    if len(swapped) < _LEAST:
        notes.append(
            f"order is left out: {format_count(len(swapped), 'text')} with two neighbours to swap; "
            f"{_LEAST} are the least."
        )
    if not given and len(swapped) < _LEAST:
        raise InputError(f"a profile of {store.place}: no task can be made of its texts. {' '.join(notes)}")
    found = None
    if len(swapped) >= _LEAST:  # checked before any work, since the model may be a different one
        found = find_same_model(store.description.get("model") or {}, str(store.place), model, device)
    tasks = {
        name: classify(store, labels, sites=sites, pool=pool, max_examples=max_examples, seed=seed, progress=progress)
        for name, labels in given.items()
    }
    if found is not None:
        tasks["order"] = _classify_order(store, found, swapped, sites, pool, seed, progress)
    return DepthProfile(tasks, tuple(notes))


def _classify_order(
    store: Store,
    model: LoadedModel,
    records: list[dict[str, Any]],
    sites: str | Sequence[str] | None,
    pool: str,
    seed: int,
    progress: bool | None,
) -> Classification:
    own_pool = store.pool or ("mean" if pool == "last4" else pool)
    plan = store.description.get("plan") or {}
    # only the sites to classify: attention weights, which a store may also hold, have no vectors to pool
    names = [site.name for site in choose_depth(store, sites)]
    with tempfile.TemporaryDirectory(prefix="layerprobe-") as folder:
        place = Path(folder) / "swapped"
        length = plan.get("max_length")
        with extract(model, records, place, sites=names, pool=own_pool, max_length=length, progress=False) as made:
            return classify(made, "order", sites=sites, pool=pool, seed=seed, max_examples=None, progress=progress)


def _label_lengths(lengths: list[int]) -> list[str] | None:
    """Label texts short, middle or long by thirds; None if the thirds cannot be separated."""
    low, high = np.quantile(lengths, (1 / 3, 2 / 3), method="lower")
    found = ["short" if length <= low else "middle" if length <= high else "long" for length in lengths]
    counts = Counter(found)
    return found if len(counts) > 1 and min(counts.values()) >= _RAREST * len(found) else None


def _words_of(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def _choose_word(texts: list[str]) -> str | None:
    """Choose the word of four letters or more, not a stop word, whose share of texts is closest to one half."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    counts = Counter(word for text in texts for word in _words_of(text) - ENGLISH_STOP_WORDS)
    bound = _RAREST * len(texts)
    fitting = [word for word, count in counts.items() if bound <= count <= len(texts) - bound]
    return min(fitting, key=lambda word: (abs(counts[word] - len(texts) / 2), word), default=None)


def _swap_some(texts: list[str], most: int, seed: int) -> list[dict[str, Any]]:
    """Swap two adjacent words in every second text that has at least two such pairs; each text is used once."""
    maker = np.random.default_rng([seed, 5])
    chosen = list(dict.fromkeys(texts))
    found: list[dict[str, Any]] = []
    for place in maker.permutation(len(chosen)).tolist():
        words = chosen[place].split()
        able = [at for at in range(len(words) - 1) if words[at].lower() != words[at + 1].lower()]
        if len(able) < 2 or len(found) == most:
            continue
        if len(found) % 2:
            at = able[int(maker.integers(len(able)))]
            words[at], words[at + 1] = words[at + 1], words[at]
        found.append({"text": " ".join(words), "order": "swapped" if len(found) % 2 else "as it was"})
    return found
