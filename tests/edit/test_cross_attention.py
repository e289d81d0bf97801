"""Edits of cross attention under `generate`, whose cache holds keys and values of the encoder's tokens."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import layerprobe as lp
from families import CACHE
from layerprobe.errors import CaptureError
from sizes import TINY

IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
MASK = (IDS != 0).long()
KEY, VALUE = "decoder.layers.0.cross_attention.key", "decoder.layers.1.cross_attention.value"


@pytest.fixture
def pair() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = TINY | {"initializer_range": 0.3}
    decoder = transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(transformers.BertConfig(**sizes), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config).eval()


def generate(model: Any, **given: Any) -> Tensor:
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True, "decoder_start_token_id": 1}
    return torch.stack(model.generate(IDS, attention_mask=MASK, **options, **given).logits, 1)


def test_keys_and_values_of_the_encoder_are_edited_with_a_cache_as_without(pair: Any) -> None:
    edits = {KEY: lp.scale(2.0, where="all"), VALUE: lp.steer(torch.ones(32), where="all")}
    bare = generate(pair)
    with lp.edit(pair, edits):
        without = generate(pair, use_cache=False)
    with lp.edit(pair, edits):
        made = [generate(pair), generate(pair)]
    assert not torch.allclose(made[0], bare)
    assert torch.equal(made[0], made[1])
    # a cache multiplies fewer rows at a time: the last bits of float32
    torch.testing.assert_close(made[0], without, rtol=0, atol=1e-4)


def test_cache_that_was_filled_before_the_block_holds_no_edited_key(pair: Any) -> None:
    with torch.no_grad():
        first = pair(input_ids=IDS, attention_mask=MASK, decoder_input_ids=torch.tensor([[1], [1]]), use_cache=True)
        kept = {CACHE: getattr(first, CACHE), "encoder_outputs": (first.encoder_last_hidden_state,)}
        with (
            lp.edit(pair, {KEY: lp.scale(2.0, where="all")}),
            pytest.raises(CaptureError, match=r"cross_attention.key': the key-value cache holds it.*use_cache=False"),
        ):
            pair(attention_mask=MASK, decoder_input_ids=torch.tensor([[7], [7]]), **kept)


def test_probe_of_a_key_that_the_cache_holds_says_so(pair: Any) -> None:
    with lp.Probe(pair, [KEY, "decoder.layers.0"]), pytest.raises(CaptureError, match=r"the key-value cache holds it"):
        generate(pair)
    with lp.Probe(pair, [KEY, "decoder.layers.0"]) as probe:
        generate(pair, use_cache=False)
    assert len(probe.calls) == 6


def test_missing_site_is_an_error_beside_one_that_the_cache_holds(pair: Any) -> None:
    edit = lp.edit(pair, {KEY: lp.scale(2.0, where="all"), "decoder.layers.2.ffn.out": lp.scale(2.0, where="all")})
    pair.decoder.bert.encoder.layer = pair.decoder.bert.encoder.layer[:2]
    with edit, pytest.raises(CaptureError, match=r"ran without making 'decoder.layers.2.ffn.out'"):
        generate(pair)
