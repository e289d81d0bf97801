"""Modules that run outside a call of the model, where an edit cannot know the tokens: it is not left out in silence."""

import threading
from typing import Any

import pytest
import torch

import layerprobe as lp
from layerprobe.errors import CaptureError
from sizes import TINY
from traces import list_hooks

IDS = torch.tensor([[5, 6, 7, 8]])
EDITS = {"layers.1": lp.scale(0.0, where="all")}


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_block_in_which_the_model_ran_past_its_hooks_alone_is_an_error(tiny_bert: Any, is_compiled: bool) -> None:
    layer = tiny_bert.encoder.layer[1]
    layer = torch.compile(layer, backend="eager") if is_compiled else layer
    runs = [lambda: layer(torch.ones(1, 4, 32))]
    if not is_compiled:
        runs.append(lambda: tiny_bert.forward(input_ids=IDS))
    for run in runs:
        edit = lp.edit(tiny_bert, EDITS)
        with (
            torch.no_grad(),
            pytest.raises(CaptureError, match=r"'layers.1' of BertModel ran and was not edited.*call model\(...\)"),
            edit,
        ):
            run()
        assert not list_hooks(tiny_bert)


def test_call_of_a_part_in_which_nothing_was_edited_is_an_error_too() -> None:
    import transformers

    half: Any = transformers.BertConfig(**TINY)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(half, half)
    pair: Any = transformers.EncoderDecoderModel(config).eval()
    with (
        torch.no_grad(),
        pytest.raises(CaptureError, match=r"'logits' of EncoderDecoderModel ran and was not edited.*call model\(...\)"),
        lp.edit(pair, {"logits": lp.scale(0.0)}),
    ):
        pair.decoder(IDS)


def test_module_that_also_ran_by_itself_is_warned_of(make_bert: Any) -> None:
    model = make_bert("BertForMaskedLM")

    def run_head() -> None:
        with torch.no_grad(), lp.edit(model, {"logits": lp.scale(0.0)}):
            assert not model(IDS).logits.any()
            assert model.cls(torch.ones(1, 4, 32)).any()

    def run_forward() -> None:
        with torch.no_grad(), lp.edit(model, EDITS):
            assert not torch.equal(model.bert(IDS).last_hidden_state, model.bert.forward(IDS).last_hidden_state)

    with pytest.warns(UserWarning, match=r"'logits' of BertForMaskedLM ran outside a call of the model"):
        run_head()
    with pytest.warns(UserWarning, match=r"'layers.1' of BertForMaskedLM ran outside a call of the model"):
        run_forward()


def test_error_in_a_block_says_more_than_its_end(tiny_bert: Any) -> None:
    def fail() -> None:
        with torch.no_grad(), lp.edit(tiny_bert, EDITS):
            tiny_bert.forward(input_ids=IDS)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()


def test_block_without_a_run_and_calls_of_other_threads_end_in_peace(tiny_bert: Any) -> None:
    """A call that another thread began before the block goes on without edits, and is none of it."""
    began, ended = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        began.set()
        assert ended.wait(60)

    handle = tiny_bert.encoder.layer[0].register_forward_hook(wait)
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(tiny_bert(input_ids=IDS).last_hidden_state))
    thread.start()
    assert began.wait(60)
    with lp.edit(tiny_bert, EDITS):
        ended.set()
        thread.join()
    handle.remove()
    assert torch.equal(made[0], tiny_bert(input_ids=IDS).last_hidden_state)
