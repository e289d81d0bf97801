"""The table of architectures: its rows name modules that exist, and unknown ones are refused by name."""

from typing import Any

import pytest
import torch

import layerprobe as lp
from layerprobe.errors import ArchitectureError
from layerprobe.sites import anatomy
from layerprobe.sites.anatomy import find_anatomy, registered_architectures


@pytest.mark.parametrize("model_type", registered_architectures())
def test_rows_name_paths_and_thirds_of_fused_projections(model_type: str) -> None:
    row = find_anatomy(model_type)
    thirds = [place.part for place in (row.query, row.key, row.value) if isinstance(place, anatomy.Fused)]
    assert thirds in ([], [0, 1, 2])
    for path in (row.layers, row.attention, row.out, row.down):
        assert ":" not in path


@pytest.mark.parametrize("model_type", anatomy.REFUSED)
def test_architecture_that_would_be_read_wrongly_is_refused(model_type: str) -> None:
    with pytest.raises(ArchitectureError, match=f"architecture '{model_type}' is not supported: its layers"):
        find_anatomy(model_type)


def test_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ArchitectureError, match=r"no row for architecture 'gpt2': layerprobe knows albert, bert,"):
        find_anatomy("gpt2")


def test_registered_architecture_is_probed_like_any_other(restored_rows: None, tiny_bert: Any, batch: Any) -> None:
    tiny_bert.config.model_type = "my-bert"
    assert not any(".ffn." in site.name for site in lp.sites(tiny_bert))
    lp.register_architecture("my-bert", find_anatomy("bert"))
    assert "my-bert" in registered_architectures()
    assert any(".ffn." in site.name for site in lp.sites(tiny_bert))
    with lp.Probe(tiny_bert, "layers.-1") as probe:
        output = tiny_bert(**batch)
    assert torch.equal(probe["layers.2"], output.last_hidden_state)


def test_sites_of_a_layer_are_listed_in_the_order_in_which_it_runs_them(tiny_bert: Any, batch: Any) -> None:
    seen: list[str] = []
    patterns = ["layers.0", "layers.0.*", "layers.0.*.*"]
    with lp.Probe(tiny_bert, patterns, to=lambda site, _: seen.append(site)) as probe:
        tiny_bert(**batch)
    assert seen == [site.name for site in probe.sites]
