"""Every task head of every family: its sites, its logits, and that a probe changes nothing and can stop it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from families import FAMILIES, IS_V5, PLAIN, build, is_known, list_heads, make_batch
from oracles import build_head, compare_logits, make_head_batch, run_head

HEADS = [(name, head) for name in reversed(PLAIN.values()) if is_known(name) for head in list_heads(name)]

# What these make of their last module's output leaves no module that makes the logits.
WITHOUT_LOGITS = {"SplinterForQuestionAnswering", "SplinterForPreTraining", "EuroBertForSequenceClassification"}


def test_every_family_has_a_task_head_here() -> None:
    assert {name for name, _ in HEADS} == {name for name in PLAIN.values() if is_known(name)}


@pytest.mark.parametrize(("name", "head"), HEADS, ids=[head for _, head in HEADS])
def test_head_has_the_sites_of_its_base_and_its_logits(name: str, head: str) -> None:
    run = run_head(name, head)
    found = [site.name for site in lp.sites(run.model)]
    base = [site.name for site in lp.sites(run.model.base_model)]
    assert found == base + ([] if head in WITHOUT_LOGITS else ["logits"])
    assert list(run.made) == [site for site in found if not site.endswith(".weights")]
    for key, value in run.bare.items():
        if isinstance(value, Tensor):
            assert torch.equal(run.probed[key], value), key
    assert torch.equal(run.made["embeddings"], run.bare.hidden_states[0])
    assert torch.equal(run.made["layers.0"], run.bare.hidden_states[1])
    if "logits" in found:
        site, logits = lp.sites(run.model, "logits")[0], run.made["logits"]
        assert compare_logits(name, head) == 0.0
        assert logits.shape[-1] == site.width
        assert site.kind == ("token" if logits.ndim == 3 else "example")


@pytest.mark.parametrize(("name", "head"), HEADS, ids=[head for _, head in HEADS])
def test_head_is_stopped_after_the_last_asked_site(name: str, head: str) -> None:
    model, batch = build_head(name, head), make_head_batch(head)
    with torch.no_grad(), lp.Probe(model, "layers.*.mid") as probe:
        model(**batch)
    later: list[str] = []
    handle = model.base_model.get_submodule(lp.sites(model.base_model, "layers.-1")[0].module).register_forward_hook(
        lambda *_: later.append("layer")
    )
    with torch.no_grad(), lp.Probe(model, ["layers.0.mid", "layers.1.mid"], stop=True) as stopped:
        assert model(**batch) is None
    handle.remove()
    assert torch.equal(stopped["layers.1.mid"], probe["layers.1.mid"])
    if FAMILIES[name].model_type != "albert":  # its last layer is also its first
        assert not later
    assert "forward" not in vars(model) and "forward" not in vars(model.base_model)


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_logits_go_into_a_store_by_their_kind(head: str, tmp_path: Any) -> None:
    model, batch = build("bert", head, num_labels=5), make_batch()
    with lp.Probe(model, "logits", to=tmp_path / "acts"), torch.no_grad():
        logits = model(**batch).logits
    view: Any = lp.open(tmp_path / "acts")["logits"]
    expected = logits[1] if logits.ndim == 2 else logits[1, : batch["attention_mask"][1].sum()]
    assert torch.equal(view[1], expected)


def test_late_pooling_classifier_has_no_logits_and_another_pooling_has() -> None:
    if not is_known("eurobert"):
        pytest.skip("this transformers has no eurobert")
    late = build("eurobert", "EuroBertForSequenceClassification", classifier_pooling="late")
    early = build("eurobert", "EuroBertForSequenceClassification", classifier_pooling="bos")
    assert "logits" not in [site.name for site in lp.sites(late)]
    with torch.no_grad(), lp.Probe(early, "logits") as probe:
        output = early(**make_batch())
    assert torch.equal(probe["logits"], output.logits)


@pytest.mark.skipif(not IS_V5, reason="transformers 4 itself fails in this head")
@pytest.mark.parametrize("name", ["deberta", "deberta-v2"])
def test_newer_head_of_deberta_makes_its_logits(name: str) -> None:
    model = build(name, "DebertaForMaskedLM" if name == "deberta" else "DebertaV2ForMaskedLM", legacy=False)
    with torch.no_grad(), lp.Probe(model, "logits") as probe:
        output = model(**make_batch())
    assert torch.equal(probe["logits"], output.logits)


def test_bias_of_a_fused_projection_is_that_of_weights_loaded_within_the_probe() -> None:
    """`assign=True` puts new parameters in the place of those that were there as the probe opened."""
    model, batch = build("deberta"), make_batch()
    states = {key: value + 0.5 if key.endswith("q_bias") else value for key, value in model.state_dict().items()}
    with torch.no_grad(), lp.Probe(model, ["embeddings", "layers.0.attention.query"]) as probe:
        model.load_state_dict(states, assign=True)
        model(**batch)
    attention = model.encoder.layer[0].attention.self
    weight = attention.in_proj.weight.unflatten(0, (attention.num_attention_heads, 3, -1))[:, 0].flatten(0, 1)
    with torch.no_grad():
        expected = probe["embeddings"] @ weight.T + states["encoder.layer.0.attention.self.q_bias"]
    # one product of 32 terms in float32, summed in another order
    torch.testing.assert_close(probe["layers.0.attention.query"], expected, atol=1e-5, rtol=0)
