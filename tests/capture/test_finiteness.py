"""Where the first value that is not finite is made: planted at each place, in several architectures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.errors import OptionError

NAN, INF = float("nan"), float("inf")
# by site: the weight that, spoilt, makes it the first
PLANTED = {
    "embeddings": "embeddings.LayerNorm.bias",
    "layers.0.attention.query": "encoder.layer.0.attention.self.query.weight",
    "layers.1.attention.value": "encoder.layer.1.attention.self.value.bias",
    "layers.1.attention.out": "encoder.layer.1.attention.output.dense.weight",
    "layers.1.mid": "encoder.layer.1.attention.output.LayerNorm.weight",
    "layers.2.ffn.act": "encoder.layer.2.intermediate.dense.bias",
    "layers.0.ffn.out": "encoder.layer.0.output.dense.bias",
    "layers.2": "encoder.layer.2.output.LayerNorm.bias",
    "pooler": "pooler.dense.bias",
}


# an infinity becomes 1 in the tanh of the pooler
@pytest.mark.parametrize(
    ("site", "bad"), [(site, bad) for site in PLANTED for bad in (NAN, INF) if (site, bad) != ("pooler", INF)]
)
def test_the_site_behind_a_spoilt_weight_is_named(
    site: str, bad: float, tiny_bert: Any, batch: dict[str, Tensor]
) -> None:
    tiny_bert.get_parameter(PLANTED[site]).data.view(-1)[0] = bad
    found = lp.find_nonfinite(tiny_bert, batch)
    assert found and found.site == site and found.parameters == (PLANTED[site],)
    assert all(part.is_finite for part in found.inputs.values()) and str(found).startswith(site)
    assert PLANTED[site] in str(found)


def test_an_overflow_is_found_with_the_range_that_made_it(tiny_bert: Any, batch: dict[str, Tensor]) -> None:
    """No weight is spoilt: the product overflows float32."""
    tiny_bert.encoder.layer[1].attention.self.query.weight.data.mul_(1e38)
    with lp.Probe(tiny_bert, "layers.0") as probe:
        tiny_bert(**batch)
    tiny_bert.encoder.layer[1].attention.self.query.weight.data.mul_(1e4)
    found = lp.find_nonfinite(tiny_bert, batch)
    assert found.site == "layers.1.attention.query" and found.module == "encoder.layer.1.attention.self.query"
    (given,) = found.inputs.values()
    assert (given.low, given.high) == (probe["layers.0"].min().item(), probe["layers.0"].max().item())


def test_what_a_context_is_made_of_is_named(tiny_bert: Any, batch: dict[str, Tensor]) -> None:
    """Scores that overflow: queries and keys are finite, what follows is not."""
    for name in ("query", "key"):
        getattr(tiny_bert.encoder.layer[1].attention.self, name).weight.data.mul_(1e25)
    found = lp.find_nonfinite(tiny_bert, batch)
    assert found.site == "layers.1.attention.context" and not found.parameters
    assert list(found.inputs) == [f"layers.1.attention.{name}" for name in ("query", "key", "value")]
    with lp.Probe(tiny_bert, "layers.1.attention.key") as probe:
        tiny_bert(**batch)
    assert found.inputs["layers.1.attention.key"].high == probe["layers.1.attention.key"].max().item()
    assert found.values is not None and found.values.num_nan > 0


def test_none_is_false_and_leaves_everything_as_it_was(tiny_bert: Any, batch: dict[str, Tensor]) -> None:
    tiny_bert.train()
    state = torch.get_rng_state()
    found = lp.find_nonfinite(tiny_bert, batch)
    assert not found and found.site is None and str(found).startswith("none: 29 sites")
    assert torch.equal(torch.get_rng_state(), state) and tiny_bert.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_bert.modules())


def test_no_hook_is_left_by_a_forward_that_raises(tiny_bert: Any) -> None:
    with pytest.raises(IndexError):
        lp.find_nonfinite(tiny_bert, {"input_ids": torch.tensor([[500]])})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_bert.modules())


def test_a_loss_of_finite_logits_is_named(make_bert: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    """The mean over no label is a NaN."""
    model = make_bert("BertForTokenClassification")
    found = lp.find_nonfinite(model, {**batch, "labels": torch.full_like(batch["input_ids"], -100)})
    assert found.site == "output.loss" and not found.parameters
    labels = torch.full_like(batch["input_ids"], -100)
    found = lp.find_nonfinite(model, {**batch, "labels": labels, "return_dict": False})
    assert found.site == "output.0"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("AlbertModel", {"embedding_size": 16, "num_hidden_layers": 3}),
        ("DebertaModel", {"pos_att_type": ["c2p"], "relative_attention": True}),
        ("BertModel", {"chunk_size_feed_forward": 2}),
    ],
)
def test_shared_fused_and_chunked_modules(name: str, settings: dict[str, Any], batch: dict[str, Tensor]) -> None:
    """The oracle: the first captured value, in running order, that is not finite."""
    import transformers

    from sizes import TINY

    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**(TINY | settings))).eval()
    chunk = settings.get("chunk_size_feed_forward")
    ids = batch["input_ids"][:, :6] if chunk else batch["input_ids"]
    given = {"input_ids": ids, "attention_mask": batch["attention_mask"][:, : ids.shape[1]]}
    sites = [site.name for site in lp.sites(model) if site.kind != "attention"]
    # grows from layer to layer until it overflows: no weight is spoilt, and layers may share them
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1e9)
    with lp.Probe(model, sites) as probe:
        model(**given)
    made = {site: bool(probe[site].isfinite().all()) for site in sites}
    found = lp.find_nonfinite(model, given)
    assert (found.site is None) == all(made.values())
    if found:
        assert not made[str(found.site)]
        layer = str(found.site).split(".")[:2]
        assert all(ok for site, ok in made.items() if site.split(".")[0] == "layers" and site.split(".")[:2] < layer)


def test_a_compiled_model_is_refused(tiny_bert: Any, batch: dict[str, Tensor]) -> None:
    with pytest.raises(OptionError, match="find_nonfinite of a compiled model"):
        lp.find_nonfinite(torch.compile(tiny_bert), batch)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="an empty batch"):
        lp.find_nonfinite(tiny_bert, {})
