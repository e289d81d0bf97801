"""Memory and callables: what each call made, pooled and cast on the way, and how it is asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from families import build, make_batch
from layerprobe.capture.calls import Context
from layerprobe.capture.sinks import CallableSink, CapturedCall, MemorySink, select_call
from layerprobe.errors import CaptureError, SiteError
from layerprobe.store.shards import ScaledRows
from sizes import TINY


def _captured(*names: str) -> CapturedCall:
    return CapturedCall(
        {name: torch.tensor(float(i)) for i, name in enumerate(names)}, Context(None, None, None), {"layers": 12}
    )


def test_captured_call_is_a_mapping_by_site() -> None:
    call = _captured("embeddings", "layers.3", "layers.11", "layers.11.ffn.act")
    assert list(call) == ["embeddings", "layers.3", "layers.11", "layers.11.ffn.act"]
    assert len(call) == 4
    assert call["layers.-1"] is call["layers.11"]
    assert call["layers.-9"] is call["layers.3"]
    assert call["layers.*.ffn.act"] is call["layers.11.ffn.act"]


def test_captured_call_is_asked_for_one_site() -> None:
    with pytest.raises(
        SiteError, match=r"'layers\.\*' stands for 2 captured sites: ask for one, such as 'layers\.3'\."
    ):
        _ = _captured("layers.3", "layers.11")["layers.*"]


def test_site_that_was_not_captured_is_in_no_mapping_and_gets_the_default(tiny_bert: Any, batch: Any) -> None:
    """No gradient reaches attention weights but under eager attention."""
    asked = ["layers.0", "layers.0.attention.weights"]
    with lp.Probe(tiny_bert, asked, gradients=True) as probe:
        tiny_bert(**batch).last_hidden_state.sum().backward()
    for mapping, missing in [(probe.calls[0], "pooler"), (probe.gradients, asked[1]), (probe.gradients, "pooler")]:
        assert missing not in mapping
        assert mapping.get(missing) is None
        assert mapping.get(missing, "nothing") == "nothing"
        assert "layers.-3" in mapping
        assert mapping.get("layers.-3") is mapping["layers.0"]


@pytest.mark.parametrize("site", ["layers.5", "pooler", "module:pooler"])
def test_site_that_was_not_captured_is_refused(site: str) -> None:
    with pytest.raises(SiteError, match=rf"no (site|module) '.*{site[-5:]}' in what was captured\."):
        _ = _captured("layers.3")[site]


@pytest.mark.parametrize("site", ["layers.5", "layers.-1"])
def test_layer_that_was_not_captured_is_answered_with_those_that_were(site: str) -> None:
    with pytest.raises(SiteError, match=rf"no site '{site}' in what was captured\. It holds layers\.3, layers\.4\.$"):
        _ = _captured("layers.3", "layers.4", "layers.11.ffn.act")[site]


@pytest.mark.parametrize("name", ["deberta", "convbert"])
@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"gradients": True}], ids=str)
def test_what_a_model_changes_in_place_afterwards_is_kept_as_its_module_made_it(name: str, options: Any) -> None:
    """DeBERTa scales its projection of positions, ConvBERT adds a bias to a convolution."""
    model, batch = build(name), make_batch()
    path = {"deberta": "pos_q_proj", "convbert": "key_conv_attn_layer.pointwise"}[name]
    path = f"encoder.layer.0.attention.self.{path}"
    if name == "convbert":
        torch.nn.init.ones_(model.encoder.layer[0].attention.self.key_conv_attn_layer.bias)
    made: list[Tensor] = []
    model.get_submodule(path).register_forward_hook(lambda *given: made.append(given[2].detach().clone()))
    with lp.Probe(model, [f"module:{path}"], **options) as probe:
        model(**batch).last_hidden_state.sum().backward()
    assert torch.equal(probe[f"module:{path}"], made[0])


def test_chunks_that_a_model_changes_in_place_afterwards_are_kept_as_its_module_made_them(make_bert: Any) -> None:
    model, made = make_bert(chunk_size_feed_forward=3), list[Tensor]()
    layer = model.encoder.layer[0]
    layer.intermediate.register_forward_hook(lambda *given: made.append(given[2].clone()))
    layer.output.register_forward_pre_hook(lambda _, given: (given[0].mul_(2), given[1]))
    with torch.no_grad(), lp.Probe(model, "module:encoder.layer.0.intermediate") as probe:
        model(torch.arange(5, 17).view(2, 6))
    assert len(made) == 2
    assert torch.equal(probe["module:encoder.layer.0.intermediate"], torch.cat(made, 1))


def test_what_a_model_changes_in_place_afterwards_is_stored_as_its_module_made_it(
    tiny_bert: Any, batch: Any, tmp_path: Any
) -> None:
    """Also of the first call, whose values a store holds until it knows how wide they are."""
    site = "module:encoder.layer.0.intermediate"
    made: list[Tensor] = []
    layer = tiny_bert.encoder.layer[0]
    layer.intermediate.register_forward_hook(lambda *given: made.append(given[2].clone()))
    layer.output.register_forward_pre_hook(lambda _, given: (given[0].mul_(2), given[1]))
    with torch.no_grad(), lp.Probe(tiny_bert, site, to=tmp_path / "acts"):
        tiny_bert(**batch)
        tiny_bert(**batch)
    rows = [value[number, kept.bool()] for value in made for number, kept in enumerate(batch["attention_mask"])]
    stored: Any = lp.open(tmp_path / "acts")[site]
    assert len(stored) == len(rows) == 6
    assert all(torch.equal(one, other) for one, other in zip(stored, rows, strict=True))


def test_callable_is_given_each_value_as_it_is_made(tiny_bert: Any, batch: Any) -> None:
    given: list[tuple[str, Tensor]] = []
    with lp.Probe(tiny_bert, ["embeddings", "layers.*"], to=lambda site, value: given.append((site, value))):
        hidden = tiny_bert(**batch, output_hidden_states=True).hidden_states
    assert [site for site, _ in given] == ["embeddings", "layers.0", "layers.1", "layers.2"]
    for (_, value), expected in zip(given, hidden, strict=True):
        assert torch.equal(value, expected)
        assert not value.requires_grad


def test_callable_that_raises_is_heard(tiny_bert: Any, batch: Any) -> None:
    with pytest.raises(ZeroDivisionError), lp.Probe(tiny_bert, "layers.0", to=lambda *_: 1 / 0):
        tiny_bert(**batch)


@pytest.mark.parametrize("pool", ["cls", "mean", "max", "last", lambda rows: rows.sum(0)])
@pytest.mark.parametrize("to_callable", [False, True])
def test_pool_reads_the_mask_of_the_call(tiny_bert: Any, batch: Any, pool: Any, to_callable: bool) -> None:
    flipped = {name: value.flip(1) for name, value in batch.items()}
    given: dict[str, Tensor] = {}
    to = given.__setitem__ if to_callable else None
    with torch.no_grad(), lp.Probe(tiny_bert, ["layers.2", "pooler"], to=to, pool=pool) as probe:
        output = tiny_bert(**flipped)
    if not to_callable:
        given = dict(probe.calls[0])  # type: ignore[arg-type]
    for vector, sequence, kept in zip(
        given["layers.2"], output.last_hidden_state, flipped["attention_mask"], strict=True
    ):
        rows = sequence[kept.bool()].double()
        named: Any = {"cls": rows[0], "last": rows[-1], "mean": rows.mean(0), "max": rows.amax(0)}
        wanted = rows.sum(0) if callable(pool) else named[pool]
        torch.testing.assert_close(vector.double(), wanted, rtol=0, atol=2e-6)  # a float32 sum of up to 7 values near 3
    assert torch.equal(given["pooler"], output.pooler_output)


@pytest.fixture
def pair() -> Any:
    """An encoder and a decoder that looks at it."""
    import transformers

    torch.manual_seed(0)
    sides = transformers.BertConfig(**TINY), transformers.BertConfig(**TINY, is_decoder=True, add_cross_attention=True)
    model = transformers.EncoderDecoderModel(
        encoder=transformers.BertModel(sides[0]), decoder=transformers.BertLMHeadModel(sides[1])
    )
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 1, 0
    return model.eval()


@pytest.mark.parametrize("to_callable", [False, True])
@pytest.mark.parametrize(
    "name", ["cross_attention.value", "module:decoder.bert.encoder.layer.0.crossattention.self.key"]
)
def test_pool_of_what_cross_attention_looks_at_reads_the_mask_of_the_encoder(
    pair: Any, name: str, to_callable: bool
) -> None:
    """Both texts of the decoder are whole and as long as those of the encoder, whose second one is padded."""
    site = name if name.startswith("module:") else f"decoder.layers.0.{name}"
    given: Any = {"input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]), "decoder_input_ids": torch.ones(2, 4).long()}
    given |= {"attention_mask": given["input_ids"].ne(0).long(), "use_cache": False}
    pooled: Any = {}
    to = pooled.__setitem__ if to_callable else None
    with torch.no_grad(), lp.Probe(pair, site) as whole, lp.Probe(pair, site, to=to, pool="last") as probe:
        pair(**given)
    vectors = pooled[site] if to_callable else probe[site]
    assert torch.equal(vectors, torch.stack([whole[site][0, 3], whole[site][1, 1]]))


def test_pool_of_what_cross_attention_looks_at_is_refused_where_the_encoder_runs_apart(pair: Any) -> None:
    site = "decoder.layers.0.cross_attention.key"
    with (
        lp.Probe(pair, site, pool="mean"),
        pytest.raises(
            CaptureError, match=rf"'{site}' has a row per token of the other half, of whose padding this call"
        ),
    ):
        pair.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


def test_pool_of_a_call_without_a_mask_takes_every_token(tiny_bert: Any) -> None:
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.2", pool="last") as probe:
        output = tiny_bert(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert torch.equal(probe["layers.2"], output.last_hidden_state[:, -1])


def test_pooled_int8_has_a_scale_per_example(tiny_bert: Any, batch: Any) -> None:
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.2", pool="cls", dtype="int8") as probe:
        output = tiny_bert(**batch)
    pooled = probe["layers.2"]
    assert isinstance(pooled, ScaledRows)
    assert pooled.values.shape == (3, 32)
    assert pooled.scale.shape == (3,)
    vectors = output.last_hidden_state[:, 0]
    step = vectors.abs().amax(-1, keepdim=True) / 127
    assert ((pooled.float() - vectors).abs() <= step * 0.5001).all()  # half a step, and float32 rounding


def test_cast_values_can_be_used_in_any_mode(tiny_bert: Any, batch: Any) -> None:
    with torch.inference_mode(), lp.Probe(tiny_bert, "layers.2", dtype="float16") as probe:
        tiny_bert(**batch)
    assert not probe["layers.2"].is_inference()


def test_same_dtype_is_no_copy(tiny_bert: Any, batch: Any) -> None:
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.2", dtype="float32") as probe:
        output = tiny_bert(**batch)
    assert probe["layers.2"].data_ptr() == output.last_hidden_state.data_ptr()


def test_mask_that_is_not_per_token_is_refused_only_where_rows_are_needed(tiny_bert: Any) -> None:
    given: Any = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, 3)}
    with lp.Probe(tiny_bert, "layers.2") as probe:
        tiny_bert(**given)
    assert probe.calls[0].attention_mask is given["attention_mask"]
    with (
        lp.Probe(tiny_bert, "layers.2", pool="mean"),
        pytest.raises(CaptureError, match=r"attention_mask has shape \(1, 3, 3\): rows need one of shape \(1, 3\)"),
    ):
        tiny_bert(**given)


def test_custom_sink_gets_values_as_the_model_made_them(tiny_bert: Any, batch: Any) -> None:
    kept = MemorySink()
    with lp.Probe(tiny_bert, "layers.2", to=kept):
        output = tiny_bert(**batch)
    assert torch.equal(kept.calls[0]["layers.2"], output.last_hidden_state)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"pool": "mean"}, {"dtype": "float16"}])
def test_custom_sink_goes_with_neither_pool_nor_dtype(tiny_bert: Any, option: Any) -> None:
    from layerprobe.errors import OptionError

    with pytest.raises(OptionError, match=r"a Sink is given values as the model made them: leave out pool and dtype\."):
        lp.Probe(tiny_bert, "layers.2", to=CallableSink(lambda *_: None), **option)


def test_call_of_unknown_shape_takes_that_of_the_value() -> None:
    selection = select_call(Context(None, None, None), torch.zeros(2, 3, 4))
    assert selection.lengths == (3, 3)
