"""Which tokens a value's rows are of: logits of the last tokens alone, and values that are short for another reason."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.errors import CaptureError

LEFT = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
MASK = (LEFT != 0).long()
VECTOR = torch.linspace(-50.0, 50.0, 100)


@pytest.fixture
def decoder(make_bert: Any) -> Any:
    return make_bert("BertLMHeadModel", is_decoder=True)


@pytest.fixture
def chooser(decoder: Any) -> Any:
    """A decoder that makes logits of some tokens alone."""
    if "logits_to_keep" not in inspect.signature(type(decoder).forward).parameters:
        pytest.skip("this transformers makes the logits of all tokens")
    return decoder


def read_logits(model: Any, edit: Any = None, **given: Any) -> Tensor:
    nothing = lp.steer(VECTOR, 0.0)
    with torch.no_grad(), lp.edit(model, {"logits": edit or nothing}), lp.Probe(model, "logits") as probe:
        model(LEFT, **{"attention_mask": MASK, "use_cache": False, **given})
    return probe["logits"]  # type: ignore[return-value]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("where", "is_meant"),
    [
        (None, lambda place: place >= 0),
        (-1, lambda place: place >= 0),
        ([0, -2], lambda place: place < 0),
        ([2], lambda place: place == 2),
        (slice(4, None), lambda place: place >= 4),
    ],
)
def test_logits_of_the_newest_token_are_edited_by_its_place_in_the_text(
    decoder: Any, where: Any, is_meant: Callable[[Tensor], Tensor], use_cache: bool
) -> None:
    """`generate` makes them alone; held to all logits of the text so far, run anew at every step."""
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with lp.edit(decoder, {"logits": lp.steer(VECTOR, where=where)}), lp.Probe(decoder, "logits") as probe:
        made = decoder.generate(LEFT, attention_mask=MASK, use_cache=use_cache, **options)
    assert len(probe.calls) == 3
    for step, call in enumerate(probe.calls):
        mask = torch.cat([MASK, torch.ones(2, step, dtype=torch.long)], 1)
        numbers = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            bare = decoder(made[:, : 4 + step], attention_mask=mask, position_ids=numbers, use_cache=False).logits
        expected = bare[:, -1] + torch.where(is_meant(numbers[:, -1:]), VECTOR, 0)
        # a cache multiplies fewer rows at a time: the last bits of float32
        torch.testing.assert_close(call["logits"][:, -1], expected, rtol=0, atol=1e-4)  # type: ignore[index]


@pytest.mark.parametrize(
    "edit",
    [
        lp.steer(VECTOR),
        lp.scale(2.0, where=[1, -1]),
        lp.ablate(where=lp.token_ids(6, 7)),
        lp.clamp(-0.1, 0.1, where=torch.tensor([[True, False, True, False], [False, True, False, True]])),
        lp.patch(torch.randn(2, 4, 100, generator=torch.Generator().manual_seed(0))),
    ],
)
def test_last_logits_are_edited_like_the_last_of_all(chooser: Any, edit: Any) -> None:
    whole = read_logits(chooser, edit)
    assert not torch.equal(whole, read_logits(chooser))
    for count in (1, 3):
        # a product of fewer rows sums in another order
        found = read_logits(chooser, edit, logits_to_keep=count)
        torch.testing.assert_close(found, whole[:, -count:], rtol=0, atol=1e-4)


def test_rows_of_one_text_are_laid_on_the_last_logits(chooser: Any) -> None:
    rows = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    edit = lp.patch(rows, where=[0, 3])
    found = read_logits(chooser, edit, attention_mask=None, logits_to_keep=2)
    bare = read_logits(chooser, attention_mask=None, logits_to_keep=2)
    assert torch.equal(found, torch.stack([bare[:, 0], rows[3].expand(2, -1)], 1))


def test_noise_on_the_last_logits_is_one_with_a_cache_or_without(chooser: Any) -> None:
    made = []
    for use_cache in (True, False):
        with lp.edit(chooser, {"logits": lp.noise(100.0, seed=4)}):
            options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            made.append(chooser.generate(LEFT, attention_mask=MASK, use_cache=use_cache, **options))
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize("kept", [torch.tensor([1]), torch.tensor([3, 0, 2, 1]), MASK.bool()])
def test_logits_of_chosen_tokens_are_refused_where_it_matters_which_they_are(chooser: Any, kept: Tensor) -> None:
    message = "lp.steer at 'logits': logits_to_keep is a tensor"
    with pytest.raises(CaptureError, match=message):
        read_logits(chooser, lp.steer(VECTOR), logits_to_keep=kept)
    message = "lp.patch at 'logits': logits_to_keep is a tensor"
    with pytest.raises(CaptureError, match=message):
        read_logits(chooser, lp.patch(torch.zeros(2, 4, 100), where="all"), logits_to_keep=kept)
    with torch.no_grad():
        bare = chooser(LEFT, attention_mask=MASK, use_cache=False, logits_to_keep=kept).logits
    assert torch.equal(read_logits(chooser, lp.steer(VECTOR, where="all"), logits_to_keep=kept), bare + VECTOR)


@pytest.mark.parametrize("size", [0, 2])
def test_value_that_is_short_for_another_reason_is_refused(make_bert: Any, chooser: Any, size: int) -> None:
    """Nothing tells which tokens the rows of a module outside the layers are of, chunks in the layers or none."""
    model = make_bert("BertLMHeadModel", is_decoder=True, chunk_size_feed_forward=size)
    edits = {"module:cls": lp.steer(VECTOR)}
    with torch.no_grad(), lp.edit(model, edits):
        model(LEFT, attention_mask=MASK, use_cache=False)
        with pytest.raises(CaptureError, match=r"'module:cls': its value has shape \(2, 1, 100\), not a row for each"):
            model(LEFT, attention_mask=MASK, use_cache=False, logits_to_keep=1)
