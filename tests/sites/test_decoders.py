"""Decoders: cross attention, key-value caches, generation, and models that have both an encoder and a decoder."""

from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from families import CACHE, FAMILIES, build, is_known, make_batch
from layerprobe.errors import CaptureError, OptionError
from layerprobe.sites import anatomy
from layerprobe.sites.anatomy import find_anatomy
from oracles import TOLERANCE, end_layer, mix_heads

CROSS = [
    name
    for name in FAMILIES
    if is_known(name) and find_anatomy(FAMILIES[name].model_type).cross and not name.endswith("-small")
]


# transformers itself fails in these where the two lengths differ
SAME_LENGTH = ("esm", "esm-rotary", "megatron-bert")


def source_states(size: int = 5) -> dict[str, Tensor]:
    """What a decoder looks at: two texts, the second padded by two tokens."""
    states = torch.randn(2, size, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, size, dtype=torch.long)
    mask[1, -2:] = 0
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def build_decoder(name: str, attention: str | None = None) -> Any:
    return build(name, attention=attention, is_decoder=True, add_cross_attention=True)


@pytest.mark.parametrize("name", CROSS)
def test_cross_attention_sites_hold_what_their_oracles_say(name: str) -> None:
    size = 11 if name in SAME_LENGTH else 5
    model, batch = build_decoder(name), make_batch() | source_states(size) | {"use_cache": False}
    with torch.no_grad():
        bare = model(**batch)
        expected = build_decoder(name, "eager")(**batch, output_attentions=True)
        with lp.Probe(model, [site.name for site in lp.sites(model)]) as probe:
            output = model(**batch, output_hidden_states=True)
    assert torch.equal(output[0], bare[0])
    made: Any = probe.calls[0]
    for index in range(3):
        cross = {part: made[f"layers.{index}.cross_attention.{part}"] for part in ("query", "key", "value", "weights")}
        kinds = {site.name.split(".")[-1]: site.kind for site in lp.sites(model, f"layers.{index}.cross_attention.*")}
        assert [kinds[part] for part in ("query", "key", "value", "out")] == ["token", "source", "source", "token"]
        assert cross["key"].shape == (2, size, 32) and cross["query"].shape == (2, 11, 32)
        attention = model.get_submodule(lp.sites(model, f"layers.{index}.cross_attention.weights")[0].module)
        assert torch.equal(cross["value"], attention.value(batch["encoder_hidden_states"]))
        # ESM of transformers 4 lists its cross attentions among the others
        own = expected.attentions[:: len(expected.attentions) // 3]
        for weights, eager in (
            (made[f"layers.{index}.attention.weights"], own),
            (cross["weights"], expected.cross_attentions),
        ):
            torch.testing.assert_close(weights, eager[index], atol=TOLERANCE, rtol=0)  # two kernels
        mixed = mix_heads(cross["weights"], cross["value"], 8)
        context = made[f"layers.{index}.cross_attention.context"]
        torch.testing.assert_close(context, mixed, atol=TOLERANCE, rtol=1e-5)  # two kernels
        layer = model.get_submodule(lp.sites(model, f"layers.{index}")[0].module)
        with torch.no_grad():
            mid, ffn_out = made[f"layers.{index}.mid"], made[f"layers.{index}.ffn.out"]
            assert torch.equal(made[f"layers.{index}"], end_layer(FAMILIES[name], layer, ffn_out, mid, mid))
        if index < 2:
            assert torch.equal(made[f"layers.{index}"], output.hidden_states[index + 1])


def test_decoder_without_cross_attention_has_no_such_site() -> None:
    names = [site.name for site in lp.sites(build("bert", is_decoder=True))]
    assert not any("cross" in name for name in names)
    with pytest.raises(LookupError, match=r"no site 'layers\.0\.cross_attention\.out'"):
        lp.sites(build("bert", is_decoder=True), "layers.0.cross_attention.out")


def test_decoder_called_without_a_source_says_which_sites_it_did_not_make() -> None:
    model = build_decoder("bert")
    probe = lp.Probe(model, ["layers.0.cross_attention.out", "layers.0"])
    with pytest.raises(CaptureError, match=r"ran without making 'layers\.0\.cross_attention\.out'"), probe:
        model(**make_batch(), use_cache=False)


# key-value caches


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", dict.fromkeys([CACHE, "past_key_values"]))
def test_cached_steps_give_the_rows_of_the_whole_text(name: str) -> None:
    model = build("bert", "BertLMHeadModel", is_decoder=True)
    ids = make_batch(num_padded=0)["input_ids"]
    with torch.no_grad(), lp.Probe(model, ["embeddings", "layers.*"]) as whole:
        model(input_ids=ids, use_cache=False)
    with torch.no_grad(), lp.Probe(model, ["embeddings", "layers.*"]) as steps:
        past = model(input_ids=ids[:, :7], use_cache=True)[CACHE]
        for position in range(7, 11):
            past = model(input_ids=ids[:, position : position + 1], **{name: past})[CACHE]
    assert [call.positions for call in steps.calls] == [range(7), *(range(i, i + 1) for i in range(7, 11))]
    for site in whole.calls[0]:
        joined = torch.cat([call[site] for call in steps.calls], dim=1)  # type: ignore[arg-type]
        # attention over a cache sums in another order; values are a few units
        torch.testing.assert_close(joined, whole[site], atol=1e-4, rtol=1e-5)


def test_generation_is_one_call_per_step() -> None:
    model = build("bert", "BertLMHeadModel", is_decoder=True, eos_token_id=None)
    ids = make_batch(num_padded=0)["input_ids"]
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    with lp.Probe(model, ["layers.-1", "logits"]) as probe:
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, plain)
    assert [call.positions for call in probe.calls] == [range(11), range(11, 12), range(12, 13), range(13, 14)]
    for step, call in enumerate(probe.calls):
        logits: Any = call["logits"]
        assert torch.equal(logits[:, -1].argmax(-1), generated[:, 11 + step])
        assert call.input_ids is not None
        assert torch.equal(call.input_ids, generated[:, call.positions.start : call.positions.stop])


@pytest.mark.parametrize("pattern", ["layers.0.attention.weights", "layers.*.attention.weights"])
def test_weights_of_a_cached_call_are_refused(pattern: str) -> None:
    model = build("bert", is_decoder=True)
    probe = lp.Probe(model, pattern)
    with pytest.raises(CaptureError, match=r"fills a key-value cache\. Call the model with use_cache=False\."), probe:
        model(**make_batch(), use_cache=True)
    assert not probe.calls


# an encoder and a decoder


@pytest.fixture
def pair() -> Any:
    from transformers import EncoderDecoderModel

    decoder = build("bert", "BertLMHeadModel", is_decoder=True, add_cross_attention=True, eos_token_id=None)
    model = EncoderDecoderModel(encoder=build("roberta", num_hidden_layers=2), decoder=decoder).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = 6, 1
    model.generation_config.decoder_start_token_id = 6
    model.generation_config.pad_token_id = 1
    return model


def make_pair_batch() -> dict[str, Tensor]:
    target = torch.randint(6, 100, (2, 4), generator=torch.Generator().manual_seed(5))
    return make_batch() | {"decoder_input_ids": target}


def test_pair_has_the_sites_of_both_halves(pair: Any) -> None:
    names = [site.name for site in lp.sites(pair)]
    encoder = [f"encoder.{site.name}" for site in lp.sites(pair.encoder)]
    decoder = [f"decoder.{site.name}" for site in lp.sites(pair.decoder.bert)]
    assert names == [*encoder, *decoder, "logits"]
    assert "encoder.layers.0.cross_attention.out" not in names
    assert "decoder.layers.0.cross_attention.out" in names
    assert [site.name for site in lp.sites(pair, "encoder.layers.-1")] == ["encoder.layers.1"]
    assert [site.name for site in lp.sites(pair, "*.layers.-1")] == ["encoder.layers.1", "decoder.layers.2"]
    with pytest.raises(LookupError, match=r"no site 'layers\.0'"):
        lp.sites(pair, "layers.0")


def test_pair_gives_the_hidden_states_of_both_halves(pair: Any) -> None:
    batch = make_pair_batch()
    asked = [site.name for site in lp.sites(pair) if not site.name.endswith("pooler")]
    with torch.no_grad():
        bare = pair(**batch, use_cache=False)
        with lp.Probe(pair, asked) as probe:
            output = pair(**batch, use_cache=False, output_hidden_states=True)
    assert torch.equal(bare.logits, output.logits)
    made: Any = probe.calls[0]
    for half, hidden in (("encoder", output.encoder_hidden_states), ("decoder", output.decoder_hidden_states)):
        assert torch.equal(made[f"{half}.embeddings"], hidden[0])
        for index, states in enumerate(hidden[1:]):
            assert torch.equal(made[f"{half}.layers.{index}"], states)
    assert torch.equal(made["logits"], output.logits)
    assert made["decoder.layers.0.cross_attention.weights"].shape == (2, 4, 4, 11)
    # padding of the encoder is not looked at
    assert not made["decoder.layers.0.cross_attention.weights"][1, :, :, 7:].any()


def test_pair_is_stopped_within_its_encoder(pair: Any) -> None:
    with torch.no_grad(), lp.Probe(pair.encoder, "layers.1") as expected:
        pair(**make_pair_batch())
    with torch.no_grad(), lp.Probe(pair, "encoder.layers.1", stop=True) as probe:
        assert pair(**make_pair_batch()) is None
    assert torch.equal(probe["encoder.layers.1"], expected["layers.1"])


def test_generation_of_a_pair_calls_its_encoder_once(pair: Any) -> None:
    batch = make_batch()
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    plain = pair.generate(**batch, **options)
    with lp.Probe(pair, ["encoder.layers.-1", "decoder.layers.-1", "logits"]) as probe:
        generated = pair.generate(**batch, **options)
    assert torch.equal(generated, plain)
    first, *steps = probe.calls
    assert list(first) == ["encoder.layers.1"] and first.positions == range(11)
    assert [list(call) for call in steps] == [["decoder.layers.2", "logits"]] * 3
    assert [call.positions for call in steps] == [range(0, 1), range(1, 2), range(2, 3)]


@pytest.fixture
def make_bart(monkeypatch: Any) -> Any:
    """BART with one base model for both halves, of which the row names the encoder."""
    import transformers

    row = {"layers": "encoder.layers", "attention": "self_attn", "mid": None, "out": "self_attn.out_proj"}
    row |= {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "down": "fc2"}
    heads = ("lm_head", "classification_head.out_proj", "qa_outputs")
    own: Any = {**row, "pooler": None, "heads": heads}
    monkeypatch.setitem(anatomy._ROWS, "bart", lp.Anatomy(**own))
    sizes: dict[str, Any] = {"d_model": 8, "vocab_size": 11, "max_position_embeddings": 16, "decoder_layers": 1}
    sizes |= {f"{half}_{name}": 2 for half in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")}
    config = transformers.BartConfig(**sizes, encoder_layers=2, bos_token_id=0, pad_token_id=1, eos_token_id=2)

    def make(head: str) -> Any:
        torch.manual_seed(0)
        return getattr(transformers, f"Bart{head}")(config).eval()

    return make


@pytest.mark.parametrize(
    ("head", "site"),
    [
        ("Model", "module:decoder.layers.0"),
        ("ForConditionalGeneration", "module:model.decoder.layers.0.fc2:input"),
        ("ForConditionalGeneration", "module:lm_head"),
        ("ForConditionalGeneration", "logits"),
        ("ForQuestionAnswering", "logits"),
    ],
)
def test_decoder_of_a_shared_base_never_takes_the_mask_of_the_encoder(
    make_bart: Any, head: str, site: str, tmp_path: Any
) -> None:
    """Both texts are of one length, so the mask would fit."""
    model = make_bart(head)
    ids = torch.randint(3, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1), "use_cache": False}
    assert lp.sites(model, site)[0].kind == "source" and lp.sites(model, "layers.0")[0].kind == "token"
    with torch.no_grad(), lp.Probe(model, site) as whole:
        model(**batch)
    refused: list[tuple[type[Exception], Any]] = [
        (CaptureError, lp.Probe(model, site, pool="mean")),
        (CaptureError, lp.edit(model, {site: lp.scale(0.0)})),
        (OptionError, lp.Probe(model, site, to=tmp_path / "acts")),
    ]
    for kind, block in refused:
        with pytest.raises(kind, match=r"the other half"), block:
            model(**batch)
    values: Any = whole[site]
    with torch.no_grad(), lp.edit(model, {site: lp.patch(values * 2, where="all")}), lp.Probe(model, site) as edited:
        model(**batch)
    assert torch.equal(edited[site], values * 2)


def test_decoder_under_another_name_never_takes_the_mask_of_the_encoder(tmp_path: Any) -> None:
    """Of SeamlessM4T the layers that are found are the text decoder's."""
    from transformers import SeamlessM4TConfig, SeamlessM4TForTextToText

    sizes: Any = {"encoder_layers": 1, "decoder_layers": 2, "num_hidden_layers": 2, "max_position_embeddings": 16}
    sizes |= {f"{half}_ffn_dim": 8 for half in ("encoder", "decoder")}
    sizes |= {f"{half}_attention_heads": 2 for half in ("encoder", "decoder")}
    model: Any = SeamlessM4TForTextToText(SeamlessM4TConfig(vocab_size=11, hidden_size=8, pad_token_id=0, **sizes))
    assert {site.kind for site in lp.sites(model, "layers.*")} == {"source"}
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(OptionError, match=r"the other half"), lp.Probe(model, "layers.*", to=tmp_path / "acts"):
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids.flip(0), use_cache=False)


def test_model_of_ones_own_may_wrap_both_halves(make_bart: Any) -> None:
    class Own(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.base_model, self.config = model, model.config

    own = Own(make_bart("Model"))
    kinds = [lp.sites(own, f"module:base_model.{half}.layers.0")[0].kind for half in ("encoder", "decoder")]
    assert kinds == ["unknown", "source"] and lp.sites(own)[0].kind == "token"


def test_classifier_of_a_shared_base_has_logits_of_a_text(make_bart: Any) -> None:
    assert lp.sites(make_bart("ForSequenceClassification"), "logits")[0].kind == "example"


def test_store_holds_one_half(pair: Any, tmp_path: Any) -> None:
    batch = make_pair_batch()
    with lp.Probe(pair, "encoder.layers.*", to=tmp_path / "acts"), torch.no_grad():
        hidden = pair(**batch, output_hidden_states=True).encoder_hidden_states
    view: Any = lp.open(tmp_path / "acts")["encoder.layers.1"]
    assert torch.equal(view[1], hidden[2][1, :7])
    with (
        pytest.raises(OptionError, match=r"one stack: ask for encoder sites or for decoder sites\."),
        lp.Probe(pair, ["encoder.layers.0", "decoder.layers.0"], to=tmp_path / "both"),
    ):
        pass
    with (
        pytest.raises(OptionError, match=r"a row per token of the other half: capture it into memory instead\."),
        lp.Probe(pair, "decoder.layers.0.cross_attention.key", to=tmp_path / "source"),
    ):
        pass
