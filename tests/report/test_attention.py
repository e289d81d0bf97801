"""Attention maps: which weights are drawn, what is written beside them, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import layerprobe as lp
from layerprobe.errors import MissingExample, OptionError, SiteError
from layerprobe.models import LoadedModel
from planting import plant


def words(figure: Any) -> str:
    """Everything that is written on a figure."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(Text))


@pytest.fixture
def attention(tiny: LoadedModel, tmp_path: Path) -> Any:
    sites = ["layers.0", "layers.*.attention.weights"]
    texts = ["the quick fox", "the " * 60]
    return lp.extract(tiny.model, texts, tmp_path / "attention", sites=sites, tokenizer=tiny.tokenizer)


def test_attention_maps_show_the_stored_weights_by_head(attention: Any, tmp_path: Path) -> None:
    figure = lp.plot_attention(attention, 0, tmp_path / "maps.png", site="layers.1.attention.weights")
    assert (tmp_path / "maps.png").exists()
    weights = attention["layers.1.attention.weights"][0]
    panels = [axes for axes in figure.axes if axes.get_title().startswith("head")]
    assert [axes.get_title() for axes in panels] == [f"head {head}" for head in range(4)]
    for head, axes in enumerate(panels):
        assert np.array_equal(axes.images[0].get_array(), weights[head].numpy())
    assert [mark.get_text() for mark in panels[0].get_yticklabels()] == attention.example(0).tokens


def test_a_long_examples_tokens_are_thinned_and_it_is_said(attention: Any) -> None:
    figure = lp.plot_attention(attention, 1, heads=[2])
    axes = next(axes for axes in figure.axes if axes.get_title() == "head 2")
    marks = axes.get_yticks()
    assert axes.images[0].get_array().shape == (62, 62) and len(marks) < 40
    assert f"one token in {marks[1] - marks[0]} is named" in " ".join(words(figure).split())


@pytest.mark.parametrize("site", ["layers.-1.attention.weights", "layers.2.*.weights"])
def test_a_pattern_that_means_one_site_draws_its_weights(attention: Any, site: str) -> None:
    figure = lp.plot_attention(attention, 0, site=site)
    shown = figure.axes[0].images[0].get_array()
    assert np.array_equal(shown, attention["layers.2.attention.weights"][0][0].numpy())


def test_a_pattern_that_means_the_weights_of_several_layers_is_refused(attention: Any) -> None:
    with pytest.raises(SiteError, match=r"'layers\.\*\.attention\.weights' means 3 sites: layers\.0\.att.*: name it"):
        lp.plot_attention(attention, 0, site="layers.*.attention.weights")


def test_attention_that_is_not_there_is_refused(attention: Any, tmp_path: Path) -> None:
    store = plant(tmp_path / "acts", {"layers.0": torch.zeros(3, 4)}, [1, 1, 1])
    with pytest.raises(
        SiteError, match=r"no attention weights in .*Extract with sites='layers\.\*\.attention\.weights'"
    ):
        lp.plot_attention(store, 0)
    with pytest.raises(
        OptionError, match=r"'layers.0' holds no attention weights, which are at layers.0.attention.weights, layers.1"
    ):
        lp.plot_attention(attention, 0, site="layers.0")
    with pytest.raises(OptionError, match=r"heads=\[4\]: .* has heads 0 to 3"):
        lp.plot_attention(attention, 0, heads=[4])
    with pytest.raises(MissingExample, match="no example 7"):
        lp.plot_attention(attention, 7)
