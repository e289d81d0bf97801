"""Pictures: what is drawn, what is written on it, and what is refused."""

import csv
import json
import pickle
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.transforms import Bbox
from torch import Tensor

import layerprobe as lp
from layerprobe.analysis import figures
from layerprobe.analysis.figures import GREY, PALETTE
from layerprobe.errors import (
    InputError,
    NonFiniteError,
    OptionError,
    SiteError,
    StoreError,
)
from layerprobe.models import LoadedModel
from planting import plant

LENGTHS = [3, 5, 1, 4, 7] * 6
FIELDS = [{"label": "red" if one % 3 else "blue", "year": 1900 + one} for one in range(30)]


def draw(seed: int = 0, count: int = sum(LENGTHS)) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store(tmp_path: Path) -> Any:
    layers = {"embeddings": draw(), "layers.0": draw(1), "layers.1": draw(2)}
    return lp.open(plant(tmp_path / "acts", layers, LENGTHS, fields=FIELDS))


def words(figure: Any) -> str:
    """Everything that is written on a figure."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def count_colours(axes: Any) -> Counter[str]:
    """Count the points of each colour."""
    found: Counter[str] = Counter()
    for points in axes.collections:
        colours = [to_hex(one[:3]).upper() for one in points.get_facecolor()]
        found.update(colours * (len(points.get_offsets()) if len(colours) == 1 else 1))
    return found


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_picture_is_written_by_its_suffix_the_same_each_time(
    store: Any, tmp_path: Path, suffix: str, start: bytes
) -> None:
    written = []
    for number in range(2):
        lp.plot(store, tmp_path / f"{number}{suffix}")
        written.append((tmp_path / f"{number}{suffix}").read_bytes())
    assert written[0].startswith(start) and written[0] == written[1]


def test_one_panel_a_layer_says_what_it_keeps_and_draws_every_point(store: Any) -> None:
    picture = lp.plot(store, site=["embeddings", "layers.*"])
    assert [panel.site for panel in picture.panels] == ["embeddings", "layers.0", "layers.1"]
    assert picture.color == "label" and picture.positions is None and picture.num_all == 30
    text = words(picture.figure)
    for panel in picture.panels:
        assert f"{panel.site}\n{panel.variance:.0%} of variance, trust {panel.trust:.2f}" in text
    assert "30 examples; PCA; each layer turned onto the one before" in text
    panels = picture.figure.axes[:3]
    for axes, panel in zip(panels, picture.panels, strict=True):
        drawn = np.concatenate([np.asarray(points.get_offsets()) for points in axes.collections])
        assert sorted(map(tuple, drawn)) == sorted(map(tuple, panel.points.numpy()))


def test_categories_have_their_own_colour_and_sign_and_stand_in_the_legend(store: Any) -> None:
    figure = lp.plot(store, site="layers.0").figure
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["red", "blue"]  # the more frequent first
    assert legend.get_title().get_text() == "label"
    handles = legend.legend_handles
    assert len({handle.get_color() for handle in handles}) == len({handle.get_marker() for handle in handles}) == 2
    assert count_colours(figure.axes[0]) == {PALETTE[0]: 20, PALETTE[1]: 10}


def test_no_category_is_drawn_over_all_others(tmp_path: Path) -> None:
    """In the order of a file, or category by category, the last would hide what lies below it."""
    fields = [{"label": "abc"[one // 1000]} for one in range(3000)]
    folder = plant(tmp_path / "acts", {"layers.0": draw(count=3000)}, [1] * 3000, fields=fields)
    (points,) = lp.plot(folder).figure.axes[0].collections
    last = [to_hex(one[:3]).upper() for one in points.get_facecolor()[-300:]]
    assert set(last) == set(PALETTE[:3]) and min(Counter(last).values()) > 50
    # each point has the sign of its category
    signs = zip(points.get_facecolor(), points.get_paths(), strict=True)
    assert len({(tuple(color), path.vertices.tobytes()) for color, path in signs}) == 3


LONG = "a label of so many letters that two of them differ at their end alone, "


@pytest.mark.parametrize(
    ("layers", "color", "labels"),
    [
        (1, "label", [f"{LONG}{one}" for one in range(9)]),
        (2, "norm", "a"),
        (2, "label", "ab"),
        (6, "label", [f"{one} {LONG}" for one in range(5)]),
        (40, "label", "abc"),
        (1, LONG * 3, "ab"),
        (1, LONG * 3, range(30)),
    ],
)
def test_whatever_is_written_lies_within_the_picture_and_over_nothing_else(
    tmp_path: Path, layers: int, color: str, labels: Sequence[Any]
) -> None:
    sites = {f"layers.{layer}": draw(layer, count=30) for layer in range(layers)}
    sites |= {f"layers.{layer}": torch.ones(30, 6) for layer in range(40, 60)}
    fields = [{"label" if color == "norm" else color: labels[one % len(labels)]} for one in range(30)]
    figure = lp.plot(plant(tmp_path / "acts", sites, [1] * 30, fields=fields), color=color).figure
    figure.draw_without_rendering()
    assert max(figure.get_size_inches()) < 17
    panels = [axes for axes in figure.axes if axes.get_title()]
    boxes = [part.get_window_extent() for axes in panels for part in (axes, axes.title)]
    boxes += [part.get_window_extent() for part in [*figure.legends, *figure.texts] if part.get_visible()]
    boxes += [axes.get_tightbbox() for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert len(panels) == layers and min(axes.get_window_extent().width for axes in panels) > 1.2 * figure.dpi
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
    assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert not [pair for pair in combinations(boxes, 2) if Bbox.intersection(*pair) is not None]
    assert "layers.44, ... (20 sites)" in " ".join(figure.get_supxlabel().split())


def test_labels_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    fields = [{"label": f"{LONG}{one % 3}" if one < 27 else "short"} for one in range(30)]
    figure = lp.plot(plant(tmp_path / "acts", {"layers.0": draw()}, LENGTHS, fields=fields)).figure
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [f"a label of s...end alone, {one}" for one in range(3)] + ["short"]


@pytest.mark.parametrize(("years", "extend"), [([*range(30)], "both"), ([*range(8), *[7] * 22], "min")])
def test_a_scale_says_that_points_lie_beyond_its_ends(tmp_path: Path, years: list[int], extend: str) -> None:
    folder = plant(tmp_path / "acts", {"layers.0": draw()}, LENGTHS, fields=[{"year": year} for year in years])
    assert lp.plot(folder, color="year").figure.axes[-1]._colorbar.extend == extend


def test_the_examples_drawn_are_pooled_as_asked(store: Any) -> None:
    for pool in ("mean", "max", "cls", "last"):
        (panel,) = lp.plot(store, site="layers.0", pool=pool).panels
        rows = store["layers.0"].pooled(pool).double().numpy()
        singular = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
        assert panel.variance == pytest.approx((singular[:2] ** 2).sum() / (singular**2).sum(), rel=1e-5)  # float32


@pytest.mark.parametrize("color", ["position", "norm"])
def test_rows_are_coloured_by_number(store: Any, color: str) -> None:
    picture = lp.plot(store, site="layers.0", color=color)
    assert picture.positions is not None and len(picture.examples) == picture.num_all == 120
    points = picture.figure.axes[0].collections[0]
    view = store["layers.0"]
    expected = [
        float(view[example][position].double().norm()) if color == "norm" else position
        for example, position in zip(picture.examples, picture.positions, strict=True)
    ]
    assert points.get_array().tolist() == pytest.approx(expected)
    assert color in words(picture.figure)


def test_a_field_of_many_numbers_is_a_scale(store: Any) -> None:
    picture = lp.plot(store, site="layers.0", color="year")
    found = picture.figure.axes[0].collections[0].get_array().tolist()
    assert found == [1900 + example for example in picture.examples] and not picture.figure.legends


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_a_value_that_is_missing_is_grey_and_leaves_the_scale_alone(tmp_path: Path, missing: Any) -> None:
    fields = [{"year": missing if one in (4, 9) else 1900.0 + one} for one in range(30)]
    picture = lp.plot(plant(tmp_path / "acts", {"layers.0": draw()}, LENGTHS, fields=fields), color="year")
    grey, scale = picture.figure.axes[0].collections
    known = [1900.0 + example for example in picture.examples if example not in (4, 9)]
    assert scale.get_array().tolist() == known and not picture.figure.legends
    assert [scale.norm.vmin, scale.norm.vmax] == np.percentile(known, [1, 99]).tolist()
    places = picture.panels[0].points.numpy()[[picture.examples.index(one) for one in (4, 9)]]
    assert sorted(map(tuple, np.asarray(grey.get_offsets()))) == sorted(map(tuple, places))
    assert np.allclose(grey.get_facecolor()[0][:3], int(GREY[1:3], 16) / 255)
    assert "year (grey: none)" in words(picture.figure)


def test_few_numbers_and_missing_ones_are_categories(tmp_path: Path) -> None:
    fields = [{"grade": float("nan") if one % 2 else one % 3} for one in range(30)]
    picture = lp.plot(plant(tmp_path / "acts", {"layers.0": draw()}, LENGTHS, fields=fields), color="grade")
    assert {text.get_text() for text in picture.figure.legends[0].get_texts()} == {"none", "0", "1", "2"}


def test_a_category_named_other_is_none_of_the_grey_rest(tmp_path: Path) -> None:
    fields = [{"kind": "other" if one < 9 else f"kind {max(0, one - 20)}"} for one in range(30)]
    figure = lp.plot(plant(tmp_path / "acts", {"layers.0": draw()}, LENGTHS, fields=fields), color="kind").figure
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:2] == ["kind 0", "other"] and texts[-1] == "the rest" and len(texts) == 8
    assert texts[:7] == ["kind 0", "other", *(f"kind {one}" for one in range(1, 6))]
    assert count_colours(figure.axes[0]) == {PALETTE[0]: 12, PALETTE[1]: 9, **dict.fromkeys(PALETTE[2:], 1), GREY: 4}


def test_more_than_seven_categories_share_a_grey_rest(tmp_path: Path) -> None:
    fields = [{"kind": f"kind {max(0, one - 20)}"} for one in range(30)]
    folder = plant(tmp_path / "acts", {"layers.0": draw()}, LENGTHS, fields=fields)
    texts = [text.get_text() for text in lp.plot(folder, color="kind").figure.legends[0].get_texts()]
    assert texts[0] == "kind 0" and texts[-1] == "other" and len(texts) == 8


def test_thinning_is_by_the_seed_and_said_in_the_figure(store: Any) -> None:
    one, same, other = (lp.plot(store, site="layers.0", color="norm", max_points=50, seed=seed) for seed in (1, 1, 2))
    assert one.examples == same.examples != other.examples and len(one.examples) == 50
    assert "50 rows drawn at random of 120" in words(one.figure)


def test_a_hundred_thousand_rows_are_thinned(tmp_path: Path) -> None:
    rows = torch.randn(100_000, 4, generator=torch.Generator().manual_seed(0))
    folder = plant(tmp_path / "acts", {"layers.0": rows}, [10] * 10_000)
    picture = lp.plot(folder, tmp_path / "layers.png", color="position")
    assert len(picture.examples) == 10_000
    assert "10,000 rows drawn at random of 100,000" in words(picture.figure)


def test_tokens_are_named_by_the_store(tiny: LoadedModel, tmp_path: Path) -> None:
    store = lp.extract(
        tiny.model, ["the quick fox", "the lazy dog", "the fox"], tmp_path / "acts", tokenizer=tiny.tokenizer
    )
    picture = lp.plot(store, color="token")
    assert "the" in [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert [panel.trust for panel in picture.panels] == [None] * 3  # too few points


def test_labels_from_the_data_are_text_and_no_mathematics(tmp_path: Path) -> None:
    fields = [{"label": "_hidden" if one % 2 else r"$\frac{1}$ <b>"} for one in range(30)]
    folder = plant(tmp_path / "acts", {"layers.0": draw()}, LENGTHS, fields=fields)
    figure = lp.plot(folder, tmp_path / "layers.svg").figure
    texts = [text.get_text().strip("\u200b") for text in figure.legends[0].get_texts()]
    assert sorted(texts) == [r"\$\frac{1}\$ <b>", "_hidden"]
    assert "&lt;b&gt;" in (tmp_path / "layers.svg").read_text(encoding="utf-8")


def test_letters_that_no_font_has_are_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields: list[dict[str, Any]] = [{"label": "\U00012000\U00012001"[number % 2]} for number in range(30)]
    folder = plant(tmp_path / "acts", {"layers.0": draw(count=30)}, [1] * 30, fields=fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lp.plot(folder, tmp_path / "boxes.png")
        said = capsys.readouterr().err
        lp.plot(folder, tmp_path / "letters.svg")
    assert said.count("\n") == 1 and "boxes.png: no installed font has 2 letters of it, drawn as boxes" in said
    # whoever shows it may have the font
    assert capsys.readouterr().err == ""


def test_other_fonts_give_letters_that_the_first_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = pytest.importorskip("matplotlib.font_manager")
    codes = [set(manager.get_font(manager.findfont(name)).get_charmap()) for name in ("STIXGeneral", "DejaVu Sans")]
    letter = next(chr(code) for code in sorted(codes[0] - codes[1]) if chr(code).isprintable())
    fields: list[dict[str, Any]] = [{"label": letter} for _ in range(30)]
    folder = plant(tmp_path / "acts", {"layers.0": draw(count=30)}, [1] * 30, fields=fields)
    monkeypatch.setattr(figures, "_MORE_FONTS", ())
    lp.plot(folder, tmp_path / "boxes.png")
    assert letter in capsys.readouterr().err
    monkeypatch.setattr(figures, "_MORE_FONTS", ("no such font", "STIXGeneral"))
    lp.plot(folder, tmp_path / "whole.png")
    assert capsys.readouterr().err == ""


def test_a_picture_is_written_as_numbers_too(store: Any, tmp_path: Path) -> None:
    picture = lp.plot(store, color="position", site="layers.*")
    assert "120 of 120 points, pca, coloured by position" in str(picture)
    rows = list(csv.DictReader(picture.to_csv(tmp_path / "points.csv").read_text().splitlines()))
    assert len(rows) == 240 and float(rows[121]["x"]) == float(picture.panels[1].points[1, 0])
    said = json.loads(picture.to_json(tmp_path / "points.json").read_text())
    assert said["panels"][0]["points"] == picture.panels[0].points.tolist() and said["method"] == "pca"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"color": "genre"}, OptionError, "color='genre': no record in"),
        ({"color": "token"}, OptionError, "has no tokenizer to name them"),
        ({"color": "token", "points": "examples"}, OptionError, "color='token' belongs to rows"),
        ({"points": "lines"}, OptionError, "points='lines': use rows or examples"),
        ({"points": "rows", "pool": "cls"}, OptionError, "pool='cls' makes examples of rows"),
        ({"pool": "sum"}, OptionError, "pool='sum': use mean, max, cls, last"),
        ({"method": "lda"}, OptionError, "method='lda': use pca, tsne, umap"),
        ({"max_points": 2}, OptionError, "max_points is 2: it must be a whole number of at least 3"),
        ({"site": "layers.9"}, SiteError, "layers.9"),
        ({"path": "layers.bmp"}, OptionError, "'.bmp' is not .png, .svg, .pdf"),
        ({"path": "none/layers.png"}, StoreError, "there is no folder none"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    store: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        lp.plot(store, **options)


@pytest.mark.parametrize(("method", "package"), [("umap", "umap"), ("tsne", "sklearn"), ("pca", "sklearn")])
def test_a_method_whose_package_is_missing_is_refused_before_the_store_is_read(
    method: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OptionError, match=f"^method='{method}' needs .*, which is not installed"):
        lp.plot(tmp_path / "none", method=method)


def test_pooled_stores_have_no_rows_to_draw(tmp_path: Path) -> None:
    folder = plant(tmp_path / "acts", {"layers.0": draw(count=30)}, [1] * 30, pool="mean")
    assert len(lp.plot(folder).examples) == 30
    refused: list[dict[str, Any]] = [{"color": "position"}, {"points": "rows"}]
    for options in refused:
        with pytest.raises(OptionError, match="has one vector per example, pooled by mean, and no row per token"):
            lp.plot(folder, **options)
    with pytest.raises(OptionError, match=r"pool='cls': in .* one vector per example, pooled by mean\. Leave"):
        lp.plot(folder, pool="cls")


def test_a_vector_that_the_model_makes_is_not_said_to_be_pooled(write_store: Callable[..., Any]) -> None:
    folder = write_store().folder
    with pytest.raises(OptionError, match="'pooler' has one vector per example, as the model makes it, and no row"):
        lp.plot(folder, site="pooler", color="position")
    for draw_or_classify in (
        lambda: lp.plot(folder, site="pooler", pool="cls"),
        lambda: lp.classify(folder, list("ababa"), sites="pooler", pool="cls"),
    ):
        with pytest.raises(
            OptionError, match=r"'pooler' has one vector per example, as the model makes it\. Leave pool"
        ):
            draw_or_classify()


def test_points_that_say_nothing_are_refused(tmp_path: Path) -> None:
    rows = draw()
    rows[torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)] = 1.0
    folder = plant(tmp_path / "acts", {"embeddings": rows}, LENGTHS)
    first = "all 30 points are the same: the first token's vector there does not depend on the text"
    with pytest.raises(OptionError, match=rf"{first}\. Leave the site out, or use another pool\.$"):
        lp.plot(folder, site="embeddings", pool="cls")
    pooled = plant(tmp_path / "pooled", {"embeddings": torch.ones(30, 4)}, LENGTHS, pool="cls")
    with pytest.raises(OptionError, match=rf"{first}\. Leave the site out\.$"):
        lp.plot(pooled, site="embeddings")
    with pytest.raises(OptionError, match=rf"{first}\. Leave the site out\.$"):
        lp.plot(pooled, site="*")
    even = plant(tmp_path / "even", {"layers.0": torch.ones_like(rows)}, LENGTHS)
    with pytest.raises(OptionError, match=r"all 30 points are the same\. Leave the site out\.$"):
        lp.plot(even, points="examples")
    rows[8] = float("nan")
    folder = plant(tmp_path / "nan", {"layers.0": rows}, LENGTHS)
    with pytest.raises(NonFiniteError, match=r"'layers.0' in .*: example 2 is not finite"):
        lp.plot(folder, points="examples")
    folder = plant(tmp_path / "few", {"layers.0": rows[:2]}, [1, 1], shards=1)
    with pytest.raises(InputError, match="it has 2 examples; three are the least"):
        lp.plot(folder, points="examples")


def test_a_site_without_a_picture_is_left_out_with_a_word_unless_it_is_named(tmp_path: Path) -> None:
    layers = {"embeddings": torch.ones(30, 4), "layers.0": draw(count=30), "layers.1": torch.ones(30, 4)}
    folder = plant(tmp_path / "acts", layers, LENGTHS, pool="cls")
    for site, constant in (("layers.*", ("layers.1",)), (["*", "layers.*"], ("embeddings", "layers.1"))):
        picture = lp.plot(folder, site=site)
        assert [panel.site for panel in picture.panels] == ["layers.0"] and picture.constant == constant
        assert f"left out, all points are the same: {', '.join(constant)}" in picture.table()
        assert f"left out, all points the same: {', '.join(constant)}" in " ".join(
            picture.figure.get_supxlabel().split()
        )
    with pytest.raises(OptionError, match="a picture of 'embeddings': all 30 points are the same"):
        lp.plot(folder, site=["embeddings", "layers.*"])


def test_a_notebook_shows_a_picture_that_was_made_without_pyplot(store: Any) -> None:
    """IPython asks a value for `_repr_png_`; a bare figure has none until pyplot has been used in the kernel."""
    picture = lp.plot(store)
    check = lp.check(store).plot()
    figures: list[tuple[Any, Any]] = [
        (picture, picture.figure),
        (check, check),
        (pickle.loads(pickle.dumps(check)), check),
    ]
    for shown, figure in figures:
        drawn = imread(BytesIO(shown._repr_png_()))
        # a size in inches is no whole number of pixels
        assert drawn.shape[:2] == pytest.approx(figure.get_size_inches()[::-1] * figure.dpi, abs=1)
        assert drawn[..., :3].min() < 0.5 < drawn[..., :3].max()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
