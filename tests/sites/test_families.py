"""Every family and variant: each site holds what its oracle says, and the model computes what it computed before."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import layerprobe as lp
from families import FAMILIES, IS_V5, REFUSED, build, is_known, make_batch
from layerprobe.errors import ArchitectureError, CaptureError, SiteError
from layerprobe.sites import anatomy
from layerprobe.sites.anatomy import find_anatomy, registered_architectures
from oracles import TOLERANCE, compare_sites, run_family

LAYER_SITES = {
    "layers.i",
    "layers.i.mid",
    *(f"layers.i.attention.{part}" for part in ("query", "key", "value", "weights", "context", "out")),
    "layers.i.ffn.act",
    "layers.i.ffn.out",
}
WITH_POOLER = {
    *("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "ernie", "esm", "megatron-bert"),
    *("roberta-prelayernorm", "layoutlm", "mpnet", "albert", "jina_embeddings_v3", "mobilebert", "data2vec-text"),
    "xmod",
}
_PROJECTION = re.compile("(query|key|value)$")
WITH_NORM = {"xlm-roberta-xl", "esm", "megatron-bert", "roberta-prelayernorm", "modernbert", "eurobert"}


def skip_unknown(name: str) -> None:
    if not is_known(name):
        pytest.skip(f"this transformers has no {(FAMILIES | REFUSED)[name].model_type}")


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    skip_unknown(request.param)
    return request.param


def test_every_row_has_a_family_here() -> None:
    assert {family.model_type for family in FAMILIES.values()} == set(registered_architectures())
    assert {family.model_type for family in REFUSED.values()} == set(anatomy.REFUSED)


def test_probing_every_site_leaves_the_output_bit_equal(name: str) -> None:
    run = run_family(name)
    assert run.bare.keys() == run.probed.keys()
    for bare, probed in zip(run.bare.to_tuple(), run.probed.to_tuple(), strict=True):
        pairs = [(bare, probed)] if isinstance(bare, torch.Tensor) else zip(bare, probed, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_every_site_holds_what_its_oracle_says(name: str) -> None:
    worst = compare_sites(name)
    family = FAMILIES[name].model_type
    has_norm = family in WITH_NORM or name == "xmod-prenorm"
    assert set(worst) == {
        "embeddings",
        *LAYER_SITES,
        *(["norm"] if has_norm else []),
        *(["pooler"] if family in WITH_POOLER else []),
    }
    for site in ("weights", "context"):
        assert worst.pop(f"layers.i.attention.{site}") <= TOLERANCE
    assert set(worst.values()) == {0.0}


def test_sites_are_made_in_the_order_in_which_they_are_listed(name: str) -> None:
    model, seen = build(name), []
    asked = [site.name for site in lp.sites(model) if ".weights" not in site.name]
    with lp.Probe(model, asked, to=lambda site, _: seen.append(site)) as probe, torch.no_grad():
        model(**make_batch())
    listed = [site.name for site in probe.sites]
    assert sorted(seen) == sorted(listed)
    # of the three projections ConvBERT calls query last
    assert [_PROJECTION.sub("projection", site) for site in seen] == [
        _PROJECTION.sub("projection", site) for site in listed
    ]


def test_widths_and_kinds_are_those_of_the_values(name: str) -> None:
    run = run_family(name)
    for site in lp.sites(run.model):
        value = run.made[site.name]
        assert site.width == value.shape[1 if site.kind == "attention" else -1], site.name
        assert value.ndim == {"token": 3, "example": 2, "attention": 4}[site.kind]


class _Adapter(nn.Module):
    """What tutorials put around a projection: it has no `in_features` to read."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.down = inner, nn.Linear(inner.in_features, 2, bias=False)
        self.up = nn.Linear(2, inner.out_features, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) + self.up(self.down(states))


@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "deberta", "modernbert", "eurobert-gqa"])
def test_widths_of_adapted_projections_are_right_or_not_told(name: str) -> None:
    skip_unknown(name)
    model = build(name)
    for site in lp.sites(model):
        module = model.get_submodule(site.module)
        if isinstance(module, nn.Linear):
            model.set_submodule(site.module, _Adapter(module))
    table = lp.sites(model)
    with torch.no_grad(), lp.Probe(model, [site.name for site in table]) as probe:
        model(**make_batch())
    widths = {site.name: probe[site.name].shape[1 if site.kind == "attention" else -1] for site in table}
    assert (
        {site.name for site in table if site.width != widths[site.name]}
        == {site.name for site in table if site.width is None}
        == {name for name in widths if name.endswith("ffn.act")}
    )
    asked: Any = {name: lp.steer(torch.zeros(width)) for name, width in widths.items() if name.endswith("act")}
    with torch.no_grad(), lp.edit(model, asked), lp.Probe(model, "layers.-1") as edited:
        model(**make_batch())
    assert torch.equal(edited["layers.-1"], probe["layers.-1"])


def test_one_site_alone_is_the_same_as_among_all(name: str) -> None:
    model, expected = build(name), run_family(name).made
    for pattern in ("layers.1.attention.value", "layers.-1.ffn.act", "layers.1"):
        with lp.Probe(model, pattern, stop=True) as probe, torch.no_grad():
            assert model(**make_batch()) is None
        assert torch.equal(probe[pattern], expected[pattern])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_chunks_of_the_ffn_are_joined(name: str) -> None:
    batch, asked = make_batch(size=10), ["layers.*", "layers.*.mid", "layers.*.ffn.*"]
    made: list[Any] = []
    for size in (0, 5):
        model = build(name, chunk_size_feed_forward=size)
        with torch.no_grad(), lp.Probe(model, asked) as probe:
            model(**batch)
        made.append(probe.calls[0])
    assert list(made[0]) == list(made[1])
    for site in made[0]:
        # a product of fewer rows sums in another order; values are a few units
        torch.testing.assert_close(made[1][site], made[0][site], atol=1e-4, rtol=1e-5)


def test_last_layer_lies_before_the_final_norm() -> None:
    """The trap: `hidden_states[-1]` is after the norm, but for two families in transformers 4."""
    for name in ("esm", "megatron-bert", "roberta-prelayernorm", "xlm-roberta-xl", "modernbert", "eurobert"):
        if not is_known(name):
            continue
        run = run_family(name)
        after = IS_V5 or name not in ("modernbert", "roberta-prelayernorm")
        assert torch.equal(run.bare.hidden_states[-1], run.made["norm" if after else "layers.-1"])
        assert not torch.allclose(run.made["norm"], run.made["layers.-1"])


def test_first_layer_of_convolutional_deberta_is_not_the_hidden_state() -> None:
    """The other trap: the convolution's output is `hidden_states[1]`, and a `module:` site reads it."""
    model, batch = build("deberta-v2-conv"), make_batch()
    with torch.no_grad(), lp.Probe(model, ["layers.0", "module:encoder.conv"]) as probe:
        hidden = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(probe["module:encoder.conv"], hidden[1])
    assert not torch.allclose(probe["layers.0"], hidden[1])


def test_albert_layers_are_calls_of_few_modules() -> None:
    table = lp.sites(build("albert-groups"), "layers.*")
    group = "encoder.albert_layer_groups.{}.albert_layers.0"
    assert [(site.module, site.call_index) for site in table] == [
        *((group.format(0), call) for call in (0, 1)),
        *((group.format(1), call) for call in (0, 1)),
    ]
    assert "(call 1)" in str(table).splitlines()[3]
    inner = lp.sites(build("albert-inner"), "layers.*")
    assert len(inner) == 8 and len({site.module for site in inner}) == 4


def test_module_that_serves_several_layers_is_no_single_value() -> None:
    model = build("albert")
    probe = lp.Probe(model, "module:encoder.albert_layer_groups.0.albert_layers.0.ffn")
    with (
        pytest.raises(CaptureError, match=r"was made twice in one call: .* Ask for the sites of single layers\."),
        probe,
    ):
        model(**make_batch())


def test_mobilebert_is_narrow_inside() -> None:
    widths = {site.name: site.width for site in lp.sites(build("mobilebert"), ["embeddings", "layers.0", "layers.0.*"])}
    assert widths == {"embeddings": 32, "layers.0.mid": 16, "layers.0": 32}


def test_fused_projections_are_shown_as_thirds() -> None:
    table = lp.sites(build("modernbert"), "layers.0.attention.*")
    assert [str(table).splitlines()[line].split()[2:5] for line in (2, 3, 4)] == [
        ["(1", "of", "3)"],
        ["(2", "of", "3)"],
        ["(3", "of", "3)"],
    ]
    deberta = lp.sites(build("deberta"), "layers.0.attention.*")
    assert [site.part.bias for site in deberta if site.part] == [
        "encoder.layer.0.attention.self.q_bias",
        None,
        "encoder.layer.0.attention.self.v_bias",
    ]


# what is refused, guessed or registered


@pytest.mark.parametrize("refused", REFUSED)
def test_family_that_would_be_read_wrongly_is_refused_by_name(refused: str) -> None:
    skip_unknown(refused)
    with pytest.raises(ArchitectureError, match=f"architecture '{refused}' is not supported: its layers"):
        lp.sites(build(refused))


def _without_row(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    rows = {key: row for key, row in anatomy._ROWS.items() if key != FAMILIES[name].model_type}
    monkeypatch.setattr(anatomy, "_ROWS", rows)
    return build(name)


def test_structure_alone_gives_embeddings_and_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if FAMILIES[name].model_type == "albert":
        pytest.skip("one module serves several layers")
    expected = run_family(name).made
    model = _without_row(monkeypatch, name)
    found = [site.name for site in lp.sites(model)]
    layers = [f"layers.{index}" for index in range(len(found) - ("embeddings" in found))]
    assert found == (["embeddings"] if "embeddings" in found else []) + layers
    with lp.Probe(model, "layers.*") as probe, torch.no_grad():
        model(**make_batch())
    for site in layers:
        assert torch.equal(probe[site], expected[site])
    with pytest.raises(SiteError, match=r"no site 'layers\.0\.mid'"):
        lp.sites(model, "layers.0.mid")


def test_structure_that_shows_no_layers_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _without_row(monkeypatch, "albert")
    known = (
        r"(?s)no row for architecture 'albert': layerprobe knows bert,.*lp\.register_architecture\('albert', anatomy\)"
    )
    with pytest.raises(ArchitectureError, match=known):
        lp.sites(model)


def test_the_three_lines_of_the_refusal_run(restored_rows: None) -> None:
    with pytest.raises(ArchitectureError) as refused:
        find_anatomy("my-bert")
    lines = [line.strip() for line in str(refused.value).splitlines()[1:]]
    assert len(lines) == 3
    exec("\n".join(lines), {})
    assert find_anatomy("my-bert") == anatomy.Anatomy()


def test_registered_row_replaces_what_was_known(restored_rows: None) -> None:
    lp.register_architecture("bert", replace(find_anatomy("bert"), pooler=None, norm="embeddings.LayerNorm"))
    assert [site.name for site in lp.sites(build("bert"))][-2:] == ["layers.2", "norm"]


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("layers.0.attention.wieghts", r"Did you mean 'layers\.0\.attention\.weights'\?"),
        ("layers.*.ffn.output", r"Did you mean 'layers\.\*\.ffn\.out'\?"),
        ("layer.1", r"Indices, slices and lists stand after 'layers\.'"),
        ("layers.1.attention", r"no site 'layers\.1\.attention'"),
        ("layers.1.att", r"no site 'layers\.1\.att'"),
        ("nrom", r"Did you mean 'norm'\?"),
        ("module:layers.1.att", r"no module 'layers\.1\.att' in"),
    ],
)
def test_misspelt_or_shortened_site_is_an_error_with_a_hint(asked: str, hint: str) -> None:
    model = build("modernbert")
    for patterns in (asked, ["layers.*", asked]):
        with pytest.raises(SiteError, match=hint):
            lp.Probe(model, patterns)
    assert not any(module._forward_hooks for module in model.modules())


def test_prefix_of_a_number_is_no_match() -> None:
    model = build("bert", num_hidden_layers=12)
    assert [site.name for site in lp.sites(model, "layers.1")] == ["layers.1"]
    assert [site.name for site in lp.sites(model, "module:encoder.layer.1")] == ["module:encoder.layer.1"]
