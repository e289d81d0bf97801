"""The results of a classification: scores by site, baselines and a verdict, as text and pictures.

The verdict names the site chosen on dev and every site that does not differ from the best on test, because the peak of
a curve over layers is often chance.

Must never know of stores or of how anything was fitted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerprobe.analysis.figures import GREY, PALETTE, check_picture, escape_text, mark_sites, save_figure, styled
from layerprobe.analysis.keeping import KeptProbe
from layerprobe.analysis.results import plain, shorten, table_cell, write_csv, write_json
from layerprobe.analysis.scores import differs, find_ties
from layerprobe.tables import format_count, format_headers, format_table

__all__ = ["BaselineScore", "Classification", "Mix", "SiteScore", "TaskSummary", "Verdict", "judge"]

_COLUMNS = ("site", "accuracy", "low", "high", "f1", "dev_accuracy", "c", "dead")
_EXTRAS = ("control", "control_train", "selectivity", "bits", "compression")


@dataclass(frozen=True)
class TaskSummary:
    """What was classified.

    Args:
        labels: Name of the labels.
        kind: `examples`, `tokens` or `spans`.
        pool: How an example became one vector; None for tokens and spans.
        classes: The labels.
        num_train, num_dev, num_test: Number of items on each side.
    """

    labels: str
    kind: str
    pool: str | None
    classes: tuple[Any, ...]
    num_train: int
    num_dev: int
    num_test: int


@dataclass(frozen=True)
class SiteScore:
    """How well a probe on a site's vectors classifies.

    Args:
        site: The site, `last4:joined`, `last4:averaged` or `mix`.
        accuracy, f1: On test.
        ci: 95 % interval of the accuracy.
        dev_accuracy: Accuracy on dev.
        c: Inverse strength of the penalty, chosen on dev.
        dead: Number of dimensions that do not vary in train and were left out.
        tied: Whether it does not differ significantly from the best on test.
        converged: Whether the fit converged.
        control, control_train: Accuracy on random labels per type, on test and on train; None if not requested.
        selectivity: Accuracy minus `control`.
        bits: Code length of the labels of train; None if not requested.
        compression: Bits of a uniform code divided by `bits`.
    """

    site: str
    accuracy: float
    f1: float
    ci: tuple[float, float]
    dev_accuracy: float
    c: float
    dead: int
    tied: bool
    converged: bool
    control: float | None = None
    control_train: float | None = None
    selectivity: float | None = None
    bits: float | None = None
    compression: float | None = None


@dataclass(frozen=True)
class BaselineScore:
    """How well a baseline classifies.

    Args:
        accuracy, f1, ci, dev_accuracy: As in `SiteScore`.
        detail: How the baseline was made.
        sites: Accuracy by site, for the untrained model.
    """

    accuracy: float
    f1: float
    ci: tuple[float, float]
    dev_accuracy: float
    detail: str
    sites: dict[str, float] | None = None


@dataclass(frozen=True)
class Mix:
    """A learned mix of layers.

    Args:
        sites: The layers.
        weights: The weight of each layer; they sum to 1.
        centre: Weighted mean of the layers' indices in `sites`.
    """

    sites: tuple[str, ...]
    weights: tuple[float, ...]
    centre: float


@dataclass(frozen=True)
class Verdict:
    """The conclusions from the scores.

    Args:
        chosen: The site with the best dev accuracy, whose probe is kept.
        best: The site with the best accuracy on test.
        tied: The sites that do not differ significantly from the best on test, itself included.
        sentences: The verdict in words.
    """

    chosen: str
    best: str
    tied: tuple[str, ...]
    sentences: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Classification:
    """What `layerprobe.classify` found.

    Args:
        task: What was classified.
        sites: Scores by site.
        baselines: `majority`, `tfidf` and, where it was run, `untrained`.
        verdict: The conclusions.
        mix: The learned mix of layers; None with fewer than two.
        notes: Remarks, in sentences.
        probe: The classifier chosen on dev; `probe.save(folder)` saves it.
    """

    task: TaskSummary
    sites: tuple[SiteScore, ...]
    baselines: dict[str, BaselineScore]
    verdict: Verdict
    mix: Mix | None
    notes: tuple[str, ...]
    probe: KeptProbe

    def table(self) -> str:
        """Format sites and baselines as a text table, with ties marked and the verdict below."""
        extras = [name for name in _EXTRAS if any(getattr(site, name) is not None for site in self.sites)]
        rows = [[table_cell(cell) for cell in self._row(site, extras)] for site in self.sites]
        for name, baseline in self.baselines.items():
            cells = [name, baseline.accuracy, *baseline.ci, baseline.f1, baseline.dev_accuracy, None, None]
            rows.append([table_cell(cell) for cell in [*cells, *(None for _ in extras)]])
        marks = ["*" if site.tied else "" for site in self.sites] + ["" for _ in self.baselines]
        headers = format_headers([*_COLUMNS, *extras, "tied"])
        laid = format_table(headers, [[*row, mark] for row, mark in zip(rows, marks, strict=True)])
        return "\n".join([laid, "", *self.verdict.sentences, *self.notes])

    __str__ = table
    __repr__ = table

    def _row(self, site: SiteScore, extras: Sequence[str]) -> list[Any]:
        own = [site.site, site.accuracy, *site.ci, site.f1, site.dev_accuracy, site.c, site.dead]
        return own + [getattr(site, name) for name in extras]

    def to_csv(self, path: str | Path) -> Path:
        """Write a CSV row per site and baseline."""
        headers = [*_COLUMNS, *_EXTRAS, "tied"]
        rows: list[list[Any]] = [[*self._row(site, _EXTRAS), site.tied] for site in self.sites]
        for name, line in self.baselines.items():
            cells = [name, line.accuracy, *line.ci, line.f1, line.dev_accuracy]
            rows.append(cells + [None] * (len(headers) - len(cells)))
        return write_csv(path, headers, rows)

    def to_json(self, path: str | Path) -> Path:
        """Write everything but the probe as one JSON object."""
        return write_json(path, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the probe as JSON values."""
        names = ("task", "sites", "baselines", "verdict", "mix", "notes")
        return {name: plain(getattr(self, name)) for name in names}

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw accuracy over depth with its interval, the tied sites filled, baselines as lines.

        Returns:
            The matplotlib figure.
        """
        if path is not None:
            check_picture(path)
        single = [site for site in self.sites if ":" not in site.site and site.site != "mix"]
        others = [site for site in self.sites if site not in single]
        shown = [*single, *others]
        places = np.arange(len(shown), dtype=float)
        # spaced so that their names do not overlap, however many layers there are
        places[len(single) :] += 0.5 + np.arange(len(others)) * max(0, len(shown) / 20 - 1)
        with styled() as make_figure:
            figure = make_figure(figsize=(5.2, 2.9), layout="constrained")
            axes = figure.add_subplot()
            values = np.array([site.accuracy for site in shown])
            bounds = np.abs(np.array([site.ci for site in shown]).T - values)
            axes.errorbar(places, values, yerr=bounds, fmt="none", ecolor=PALETTE[0], elinewidth=0.8, zorder=2)
            axes.plot(places[: len(single)], values[: len(single)], color=PALETTE[0], zorder=2)
            for is_tied, name in ((True, "tied with the best"), (False, "worse")):
                some = np.array([site.tied == is_tied for site in shown])
                if some.any():
                    face = PALETTE[0] if is_tied else "white"
                    axes.plot(
                        places[some], values[some], "o", color=PALETTE[0], markerfacecolor=face, label=name, zorder=3
                    )
            self._draw_baselines(axes, single, places)
            axes.set_xticks(places)
            axes.set_xlabel("layer")
            axes.set_ylabel("accuracy on test")
            said = f"{len(self.task.classes)} classes, {format_count(self.task.num_test, 'test item')}"
            axes.set_title(f"{escape_text(shorten(self.task.labels, 40))}: {said}")
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
            mark_sites(figure, [site.site.replace(":", " ") for site in shown], axes.xaxis, kept=len(others))
            return save_figure(figure, path)

    def _draw_baselines(self, axes: Any, single: Sequence[SiteScore], places: np.ndarray) -> None:
        styles = {"majority": (GREY, ":"), "tfidf": (PALETTE[5], "--"), "untrained": (PALETTE[2], "-.")}
        for name, baseline in self.baselines.items():
            color, line = styles[name]
            by_site = baseline.sites or {}
            found = [by_site.get(site.site) for site in single]
            if single and all(value is not None for value in found):
                axes.plot(places[: len(single)], found, color=color, linestyle=line, label=name, zorder=1)
            else:
                # dotted line above dashed, so that both stay visible where they coincide
                axes.axhline(baseline.accuracy, color=color, linestyle=line, label=name, zorder=1 + (line == ":") / 2)


def judge(
    scores: Mapping[str, tuple[float, float]], correct: Mapping[str, np.ndarray], baselines: Mapping[str, np.ndarray]
) -> Verdict:
    """Draw conclusions from the predictions on test.

    Args:
        scores: Accuracy on dev and on test, by site in order of depth.
        correct: bool `[n]` by site, whether each test item was classified correctly.
        baselines: The same for each baseline.
    """
    chosen = max(scores, key=lambda name: scores[name][0])
    best = max(scores, key=lambda name: scores[name][1])
    tied = find_ties(correct, best)
    said = [f"Dev chooses {chosen}; on test it is right {scores[chosen][1]:.1%} of the time."]
    if tied == (best,) and len(scores) > 1:
        said.append(f"On test {best} is better than every other (McNemar, Holm, 5 %).")
    elif len(tied) > 1:
        said.append(f"On test these cannot be told from the best, {best}: {', '.join(tied)} (McNemar, Holm, 5 %).")
    if chosen not in tied:
        said.append(f"What dev chose is worse on test than {best}: look at the split.")
    for name, right in baselines.items():
        if not differs(correct[chosen], right):
            said.append(f"{chosen} cannot be told from the baseline {name} ({right.mean():.1%}).")
        elif right.mean() > correct[chosen].mean():
            said.append(f"The baseline {name} is better than {chosen}: {right.mean():.1%}.")
    return Verdict(chosen, best, tied, tuple(said))
