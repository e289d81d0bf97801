"""Which tokens are meant, against a slow count by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import layerprobe as lp
from families import IS_V5, build
from layerprobe.capture.calls import Context
from layerprobe.edit.where import check_where, pick_tokens, place_in_text, resolve_where
from layerprobe.errors import CaptureError, OptionError

CPU = torch.device("cpu")


def pick(
    where: Any, mask: Tensor | None, ids: Tensor | None = None, first: int | None = 0, size: int | None = None
) -> Any:
    tokens = ids if ids is not None else mask
    assert tokens is not None
    shape = (tokens.shape[0], size or tokens.shape[1])
    return pick_tokens(resolve_where(where, None), Context(ids, mask, shape, first), CPU)


def count_by_hand(where: Any, row: list[int]) -> list[bool]:
    """Number the real tokens of one text and ask Python's own lists what the positions stand for."""
    columns = [column for column, real in enumerate(row) if real]
    if isinstance(where, slice):
        meant = columns[where]
    else:
        meant = [columns[place] for place in where if -len(columns) <= place < len(columns)]
    return [column in meant for column in range(len(row))]


places = st.integers(-9, 9) | st.integers(-9, 9).map(np.int64)
bounds = st.none() | places


@given(
    rows=st.lists(st.lists(st.integers(0, 1), min_size=8, max_size=8), min_size=1, max_size=4),
    where=st.lists(places, min_size=1, max_size=4) | st.builds(slice, bounds, bounds, st.none() | st.integers(1, 4)),
    kept=st.integers(1, 8),
)
def test_positions_are_those_of_python_lists_within_each_text(rows: list[list[int]], where: Any, kept: int) -> None:
    mask = torch.tensor(rows)
    expected = torch.tensor([count_by_hand(where, row) for row in rows])
    assert torch.equal(pick(where, mask), expected)
    # the same text with all but its last tokens in a cache
    assert torch.equal(pick(where, mask, first=8 - kept, size=kept), expected[:, -kept:])


def test_real_tokens_are_the_default_and_padding_is_never_meant() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert torch.equal(pick(None, mask), mask.bool())
    assert torch.equal(pick("real", mask), mask.bool())
    assert pick("all", mask) is None
    ids = torch.tensor([[5, 7, 5], [5, 5, 7]])
    assert torch.equal(pick(lp.token_ids(5), mask, ids), torch.tensor([[True, False, False], [False, True, False]]))
    assert pick(None, None, ids) is None


def test_places_without_a_mask_count_from_the_cache() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    place, length = place_in_text(Context(ids, None, (2, 3), 4))
    assert place.tolist() == [[4, 5, 6]] * 2 and length.tolist() == [[7]] * 2
    with pytest.raises(CaptureError, match="compiled and called with a key-value cache"):
        place_in_text(Context(ids, None, (2, 3), None))


def test_tokens_and_special_ones_are_found_by_the_tokenizer(tiny: Any) -> None:
    batch = tiny.tokenizer(["the quick fox", "the dog ."], padding=True, return_tensors="pt")
    context = Context(batch["input_ids"], batch["attention_mask"], tuple(batch["input_ids"].shape), 0)
    for where, wanted in (
        ("special", {"[CLS]", "[SEP]"}),
        ("the", {"the"}),
        (["fox", "dog"], {"fox", "dog"}),
    ):
        found = pick_tokens(resolve_where(where, tiny.tokenizer), context, CPU)
        assert found is not None
        rows = [tiny.tokenizer.convert_ids_to_tokens(row.tolist()) for row in batch["input_ids"]]
        assert found.tolist() == [[token in wanted for token in row] for row in rows]
    with pytest.raises(OptionError, match=r"the tokenizer has no token 'jump'; it writes it as \['j', '##u'"):
        resolve_where("jump", tiny.tokenizer)


@pytest.mark.parametrize(
    "where",
    [torch.tensor([1, 2]), torch.ones(3, dtype=torch.bool), 1.5, [], [True], ["a", 1], slice(0, 4, -1), slice("a"), {}],
)
def test_what_picks_nothing_is_refused_as_the_edit_is_made(where: Any) -> None:
    with pytest.raises(OptionError, match="where"):
        check_where(where)
    with pytest.raises(OptionError, match="where"):
        lp.scale(2.0, where=where)


@pytest.mark.parametrize("ids", [(), (-1,), (1.5,), (True,)])
def test_token_ids_are_numbers(ids: Any) -> None:
    with pytest.raises(OptionError, match="token ids"):
        lp.token_ids(*ids)
    of_numpy: Any = np.arange(3)
    assert lp.token_ids(*of_numpy) == lp.token_ids(0, 1, 2)


def test_calls_that_do_not_tell_are_errors(tiny_bert: Any, batch: Any) -> None:
    if not IS_V5:
        pytest.skip("transformers 4 takes no mask of four dimensions")
    embeds = torch.randn(3, 7, 32)
    mask = torch.ones(1, 5, dtype=torch.bool)
    for where, given_, message in (
        (lp.token_ids(4), {"inputs_embeds": embeds}, "where asks for tokens: the model was called with embeddings"),
        (mask, batch, r"where is a mask of shape \(1, 5\): the model was called with \(3, 7\)"),
        (None, {**batch, "attention_mask": torch.ones(3, 1, 7, 7)}, r"attention_mask has shape \(3, 1, 7, 7\)"),
        (torch.ones(3, 7, 31, dtype=torch.bool), batch, "where is a mask of 31 columns, the value has 32"),
    ):
        edit = lp.edit(tiny_bert, {"layers.1": lp.ablate(where=where)})
        with edit, torch.no_grad(), pytest.raises(CaptureError, match=message):
            tiny_bert(**given_)
    with lp.edit(tiny_bert, {"layers.1": lp.ablate(where="all")}), torch.no_grad():
        tiny_bert(**{**batch, "attention_mask": torch.ones(3, 1, 7, 7)})


@pytest.mark.parametrize("name", ["modernbert", "deberta"])
@pytest.mark.parametrize("third", ["query", "key", "value"])
def test_mask_of_single_values_is_as_wide_as_a_site_that_is_a_third_of_its_module(name: str, third: str) -> None:
    model, site = build(name), f"layers.1.attention.{third}"
    ids = torch.tensor([[0, 10, 11, 12, 2], [0, 13, 14, 15, 2]])
    mask = torch.zeros(2, 5, 32, dtype=torch.bool)
    mask[0, 2, 8:16] = mask[1, 4, 31] = True
    with torch.no_grad(), lp.Probe(model, site) as before:
        model(ids)
    with torch.no_grad(), lp.edit(model, {site: lp.ablate(where=mask)}), lp.Probe(model, site) as after:
        model(ids)
    # DeBERTa adds a bias to what is put in: zero to the rounding of that sum
    torch.testing.assert_close(after[site], before[site].masked_fill(mask, 0), rtol=0, atol=1e-6)
    assert torch.equal(after[site][~mask], before[site][~mask])
    wide = lp.ablate(where=mask.repeat(1, 1, 3))
    with (
        torch.no_grad(),
        lp.edit(model, {site: wide}),
        pytest.raises(CaptureError, match="96 columns, the value has 32"),
    ):
        model(ids)
