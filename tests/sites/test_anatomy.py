"""The table of architectures: its rows name modules that exist, and unknown ones are refused by name."""

from typing import Any

import pytest
import torch
import transformers

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


def test_projections_of_gpt2_are_as_wide_as_their_values(restored_rows: None) -> None:
    """They are transformers' Conv1D, which has other attributes than a Linear; heads lie by these widths."""
    fused: Any = {name: anatomy.Fused("attn.c_attn", part) for part, name in enumerate(("query", "key", "value"))}
    places: Any = {"layers": "h", "attention": "attn", "out": "attn.c_proj", "down": "mlp.c_proj", "norm": "ln_f"}
    row = lp.Anatomy(embeddings=("drop",), mid="ln_2:input", pooler=None, **places, **fused)
    lp.register_architecture("gpt2", row)
    torch.manual_seed(0)
    sizes: Any = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 16}
    model = transformers.GPT2Model(transformers.GPT2Config(**sizes)).eval()
    ids, site = torch.tensor([[5, 6, 7]]), "layers.1.attention.context"
    names = [found.name for found in lp.sites(model) if found.kind == "token"]
    with torch.no_grad(), lp.Probe(model, names) as probe:
        model(ids)
    assert {found.name: found.width for found in lp.sites(model, names)} == {
        name: probe[name].shape[-1] for name in names
    }
    with torch.no_grad(), lp.edit(model, {site: lp.ablate(heads=[2])}), lp.Probe(model, site) as after:
        model(ids)
    expected = probe[site].clone()
    expected[..., 16:24] = 0
    assert torch.equal(after[site], expected)
