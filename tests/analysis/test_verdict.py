"""The picture of a classification: names that can be read under forty layers, baselines that hide no other."""

from itertools import pairwise
from typing import Any, cast

from layerprobe.analysis.verdict import BaselineScore, Classification, SiteScore, TaskSummary, Verdict


def make_result(num_layers: int, labels: str = "label") -> Classification:
    names = [*(f"layers.{layer}" for layer in range(num_layers)), "last4:joined", "last4:averaged", "mix"]
    sites = [SiteScore(name, 0.5, 0.5, (0.4, 0.6), 0.5, 1.0, 0, True, True) for name in names]
    baselines = {name: BaselineScore(0.5, 0.5, (0.4, 0.6), 0.5, "") for name in ("majority", "tfidf")}
    task = TaskSummary(labels, "examples", "mean", ("a", "b"), 60, 20, 20)
    verdict = Verdict(names[0], names[0], tuple(names), ())
    return Classification(task, tuple(sites), baselines, verdict, None, (), cast(Any, None))


def test_names_of_forty_layers_and_of_what_is_made_of_them_can_be_read() -> None:
    for num_layers in (2, 12, 40):
        figure = make_result(num_layers).plot()
        figure.draw_without_rendering()
        labels = figure.axes[0].get_xticklabels()
        assert [label.get_text() for label in labels][-3:] == ["last4 joined", "last4 averaged", "mix"]
        line = labels[0].get_size() * figure.dpi / 72
        assert all(
            after.x1 - before.x1 >= line for before, after in pairwise(one.get_window_extent() for one in labels)
        )


def test_a_field_of_many_letters_stays_within_the_picture() -> None:
    figure = make_result(3, labels="$a$ " * 30).plot()
    figure.draw_without_rendering()
    box = figure.axes[0].title.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and r"\$a\$" in figure.axes[0].get_title()


def test_baselines_that_are_as_good_as_each_other_are_both_seen() -> None:
    lines = {line.get_label(): line for line in make_result(3).plot().axes[0].lines}
    assert lines["majority"].get_zorder() > lines["tfidf"].get_zorder() and lines["majority"].get_linestyle() == ":"
