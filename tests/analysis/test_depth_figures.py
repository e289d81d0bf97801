"""What every picture shares: names along an axis that can be read, curves of which none hides another."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from layerprobe.analysis.figures import Curve, draw_curves, draw_depth, escape_text, label_sites, mark_sites, styled

MODULES = [f"module:bert.encoder.layer.{layer}.attention.self.query:input" for layer in range(6)]
STACKS = [
    ["layers.0"],
    ["layers.0", "layers.1"],
    ["embeddings", *(f"layers.{layer}" for layer in range(12))],
    ["embeddings", *(f"layers.{layer}" for layer in range(22)), "norm"],
    ["embeddings", *(f"layers.{layer}" for layer in range(40))],
    [f"layers.{layer}.{part}" for layer in range(12) for part in ("mid", "ffn.act", "attention.context")],
    MODULES,
]


def draw(names: Sequence[str]) -> list[Any]:
    """Draw both pictures over depth."""
    curves = [Curve("anisotropy", names, [0.5] * len(names)), Curve("neighbours kept", names, [0.5] * len(names))]
    cka = [[1.0] * len(names) for _ in names]
    return [draw_depth(names, cka, curves, curves[0], None), draw_curves(names, curves, "cosine", None)]


def list_axes(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


@pytest.mark.parametrize("names", STACKS)
def test_no_name_runs_into_the_next_or_out_of_the_picture(names: Sequence[str]) -> None:
    for figure in draw(names):
        figure.draw_without_rendering()
        for axes in list_axes(figure):
            labels = axes.get_xticklabels()
            boxes = [label.get_window_extent() for label in labels]
            across = [label.get_window_extent() for label in axes.get_yticklabels()]
            assert labels and all(after.y0 >= before.y1 for before, after in pairwise(across))
            if labels[0].get_rotation():
                # slanted ones end at their ticks, a line or more apart
                line = labels[0].get_size() * figure.dpi / 72
                assert all(after.x1 - before.x1 >= line for before, after in pairwise(boxes))
            else:
                assert all(after.x0 > before.x1 for before, after in pairwise(boxes))
            box = axes.get_tightbbox()
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
            assert axes.get_position().height > 0.2


def test_every_named_layer_stands_at_its_place() -> None:
    names = STACKS[4]
    for figure in draw(names):
        for axes in list_axes(figure):
            found = {
                place: label.get_text() for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            }
            assert len(found) > 5 and all(text == label_sites(names)[int(place)] for place, text in found.items())


def test_long_names_are_cut_where_they_do_not_differ() -> None:
    assert label_sites(["embeddings", "layers.11", "layers.10.attention.context", "norm"]) == [
        "emb", "11", "layers.10.attention.context", "norm",
    ]  # fmt: skip
    assert label_sites(["embeddings", *MODULES])[:3] == [
        "emb", "...0.attention.self.query:i...", "...1.attention.self.query:i...",
    ]  # fmt: skip
    assert label_sites(MODULES[:1]) == ["...query:input"]
    assert label_sites(["a" * 40, "b" * 40]) == [f"{'a' * 27}...", f"{'b' * 27}..."]


def test_a_curve_shows_through_one_that_has_the_same_values() -> None:
    lines = draw(["layers.0", "layers.1"])[1].axes[0].lines
    assert lines[0].get_linestyle() == "-" and lines[1].get_linestyle() == "--"


@pytest.mark.parametrize(("text", "shown"), [("$x$", r"\$x\$"), ("_x", "\u200b_x"), ("", "(empty)"), ("x", "x")])
def test_a_text_from_the_data_is_no_mathematics(text: str, shown: str) -> None:
    assert escape_text(text) == shown


def test_more_names_that_are_always_shown_than_fit_are_thinned() -> None:
    names = [f"module:encoder.layer.{layer}.output.dense" for layer in range(60)]
    with styled() as make_figure:
        figure = make_figure(figsize=(5, 3), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xticks(range(60))
        mark_sites(figure, names, axes.xaxis, kept=60)
    assert 1 <= len(axes.get_xticks()) < 60
