"""The table of architectures: its rows name modules that exist, and unknown ones are refused by name."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import layerprobe as lp
from layerprobe.errors import ArchitectureError
from layerprobe.sites import anatomy
from layerprobe.sites.anatomy import find_anatomy, registered_architectures


@pytest.fixture
def restored_rows() -> Iterator[None]:
    rows = dict(anatomy._ROWS)
    yield
    anatomy._ROWS.clear()
    anatomy._ROWS.update(rows)


def test_every_location_of_the_bert_row_is_a_module(tiny_bert: Any) -> None:
    row = find_anatomy("bert")
    layer = tiny_bert.get_submodule(row.layers)[0]
    for location in row.layer_sites().values():
        assert isinstance(layer.get_submodule(location.removesuffix(":input")), torch.nn.Module)
    assert row.pooler is not None
    for location in (row.embeddings, row.pooler):
        assert isinstance(tiny_bert.get_submodule(location), torch.nn.Module)


def test_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ArchitectureError, match=r"no row for architecture 'gpt2': layerprobe knows bert.*register_arch"
    ):
        find_anatomy("gpt2")


def test_registered_architecture_is_probed_like_any_other(restored_rows: None, tiny_bert: Any, batch: Any) -> None:
    tiny_bert.config.model_type = "my-bert"
    with pytest.raises(ArchitectureError, match="no row for architecture 'my-bert'"):
        lp.sites(tiny_bert)
    lp.register_architecture("my-bert", find_anatomy("bert"))
    assert registered_architectures() == ["bert", "my-bert"]
    with lp.Probe(tiny_bert, "layers.-1") as probe:
        output = tiny_bert(**batch)
    assert torch.equal(probe["layers.2"], output.last_hidden_state)


def test_layer_sites_run_in_the_order_of_the_row(tiny_bert: Any, batch: Any) -> None:
    seen: list[str] = []
    patterns = ["layers.0", "layers.0.*", "layers.0.*.*"]
    with lp.Probe(tiny_bert, patterns, to=lambda site, _: seen.append(site)):
        tiny_bert(**batch)
    assert seen == [f"layers.0.{tail}" for tail in find_anatomy("bert").layer_sites()] + ["layers.0"]
