"""Compiled capture beyond BERT: other families, kinds of site, masks and ways to run, held to the eager model.

The backend is `eager`: it traces and guards as the others do and generates no code, so values are equal to the bit.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from families import build, is_known, make_batch

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def _compile(model: Any, fullgraph: bool = True) -> Any:
    return torch.compile(model, fullgraph=fullgraph, dynamic=True, backend="eager")


def _capture(run: Any, model: Any, sites: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    with torch.no_grad(), lp.Probe(model, sites, **options) as probe:
        run(**batch)
    return probe.calls[0]


def _left_padded() -> dict[str, Tensor]:
    batch = make_batch(size=10)
    return {name: value.flip(1) if name in ("input_ids", "attention_mask") else value for name, value in batch.items()}


@pytest.mark.slow
@pytest.mark.oldest
@pytest.mark.parametrize("name", ["albert", "modernbert", "distilbert", "deberta-v2"])
def test_every_site_of_a_family_is_captured_whole(name: str) -> None:
    """Attention weights and FFNs in chunks among them, and padding on the left."""
    if not is_known(name):
        pytest.skip("this transformers does not have it")
    depth: dict[str, Any] = {"n_layers" if name == "distilbert" else "num_hidden_layers": 2}
    model, batch = build(name, chunk_size_feed_forward=5, **depth), _left_padded()
    sites = [site.name for site in lp.sites(model)]
    expected = _capture(model, model, sites, batch)
    made = _capture(_compile(model, fullgraph=name != "deberta-v2"), model, sites, batch)
    assert list(made) == list(expected)
    for site in sites:
        assert torch.equal(made[site], expected[site]), site


@pytest.mark.parametrize(("site", "to"), [("layers.1.attention.query", "memory"), ("layers.1.ffn.act", "store")])
def test_a_model_that_breaks_its_graph_is_read_inside_its_last_layer(site: str, to: str, tmp_path: Path) -> None:
    model, batch = build("deberta", num_hidden_layers=2), _left_padded()
    expected, compiled = _capture(model, model, site, batch), _compile(model, fullgraph=False)
    if to == "memory":
        assert torch.equal(_capture(compiled, compiled, site, batch)[site], expected[site])
    else:
        with torch.no_grad(), lp.Probe(compiled, site, to=tmp_path / "acts"):
            compiled(**batch)
        for number, mask in enumerate(batch["attention_mask"].bool()):
            assert torch.equal(lp.open(tmp_path / "acts")[site][number], expected[site][number][mask])
    assert torch._dynamo.utils.counters["graph_break"] and torch._dynamo.config.skip_nnmodule_hook_guards


@pytest.mark.slow
@pytest.mark.oldest
def test_a_pair_of_encoder_and_decoder_is_captured_in_one_graph() -> None:
    from transformers import EncoderDecoderModel

    decoder = build("bert", "BertLMHeadModel", num_hidden_layers=1, is_decoder=True, add_cross_attention=True)
    pair = EncoderDecoderModel(encoder=build("bert", num_hidden_layers=1), decoder=decoder).eval()
    batch: Any = {**make_batch(), "decoder_input_ids": make_batch(size=5)["input_ids"], "use_cache": False}
    sites = [site.name for site in lp.sites(pair)]
    expected = _capture(pair, pair, sites, batch)
    made = _capture(_compile(pair), pair, sites, batch)
    assert list(made) == list(expected) and "decoder.layers.0.cross_attention.weights" in made
    assert all(torch.equal(made[site], expected[site]) for site in sites)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_pools_of_a_compiled_model_are_those_of_the_model() -> None:
    model, batch = build("bert", num_hidden_layers=1), _left_padded()
    compiled = _compile(model)
    for pool in ("cls", "mean", "max", "last", lambda rows: rows[0] - rows[-1]):
        expected = _capture(model, model, "layers.*", batch, pool=pool)
        made = _capture(compiled, model, "layers.*", batch, pool=pool)
        assert torch.equal(made["layers.0"], expected["layers.0"]) and made["layers.0"].shape == (2, 32)


def test_a_compiled_pool_goes_to_a_store(tmp_path: Path) -> None:
    model, batch = build("bert", num_hidden_layers=1), _left_padded()
    for run, place in ((model, "eager"), (_compile(model), "compiled")):
        with torch.no_grad(), lp.Probe(model, "layers.*", to=tmp_path / place, pool="mean", dtype="float16"):
            run(**batch)
    eager, graph = lp.open(tmp_path / "eager"), lp.open(tmp_path / "compiled")
    assert len(eager) == len(graph) == 2
    assert all(torch.equal(eager["layers.0"][i], graph["layers.0"][i]) for i in range(2))


@pytest.mark.slow
@pytest.mark.oldest
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # 4.57 has no other
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_of_a_compiled_model_are_recorded_once(reentrant: bool) -> None:
    # 4.57 reads the probability for sdpa from a number of the layer and not from its Dropout
    dropouts: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, batch = build("bert", num_hidden_layers=2, **dropouts).train(), make_batch(size=10)
    model(**batch).last_hidden_state.square().sum().backward()
    expected = [weight.grad for weight in model.encoder.parameters()]
    model.zero_grad()
    with torch.no_grad(), lp.Probe(model, "layers.*") as plain:
        model(**batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    with lp.Probe(model, "layers.*") as probe:
        compiled(**batch).last_hidden_state.square().sum().backward()
    assert len(probe.calls) == 1
    for site in plain.calls[0]:
        assert torch.equal(probe[site], plain[site])
    for weight, gradient in zip(model.encoder.parameters(), expected, strict=True):
        # sums in another order: rounding of float32 gradients
        torch.testing.assert_close(weight.grad, gradient, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_ctrl_c_within_a_compiled_call_comes_out_and_leaves_nothing(stopped: bool) -> None:
    model, batch = build("bert", num_hidden_layers=2), make_batch()
    compiled, seen, before = _compile(model), [], set(model.__dict__)

    def interrupt(site: str, value: Tensor) -> None:
        seen.append(site)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with torch.no_grad():
        with lp.Probe(compiled, ["embeddings", "layers.0"], to=interrupt, stop=stopped):
            with pytest.raises(KeyboardInterrupt):
                compiled(**batch)
            assert (compiled(**batch) is None) == stopped
        assert seen == ["embeddings", "layers.0"] * 2
        expected = model(**batch).last_hidden_state
        assert torch.equal(compiled(**batch).last_hidden_state, expected)
    assert set(model.__dict__) == before
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "__getstate__" not in module.__dict__
