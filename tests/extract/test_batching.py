"""Batches hold every text once, under the budget, longest first, with ids that are the tokenizer's own."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerprobe.extract.batching import TokenizedUnit, cut_batches, tokenize
from layerprobe.models import LoadedModel


def test_ids_are_those_of_the_tokenizer_one_text_at_a_time(tiny: LoadedModel, texts: list[str]) -> None:
    unit = tokenize(tiny.tokenizer, texts, 20)
    assert unit.ids == [tiny.tokenizer(text, truncation=True, max_length=20)["input_ids"] for text in texts]
    assert unit.truncated == [len(tiny.tokenizer(text)["input_ids"]) > 20 for text in texts]
    assert unit.num_tokens == sum(map(len, unit.ids))


@pytest.mark.parametrize("max_length", [2, 3, 11, 12, 13, 64])
def test_a_text_counts_as_cut_only_when_something_is_lost(tiny: LoadedModel, max_length: int) -> None:
    ten = "the quick brown fox , the lazy dog . ."
    assert len(tiny.tokenizer(ten)["input_ids"]) == 12
    unit = tokenize(tiny.tokenizer, [ten, ""], max_length)
    assert len(unit.ids[0]) == min(12, max_length) and len(unit.ids[1]) == 2
    assert unit.truncated == [max_length < 12, False]


def test_no_texts_are_no_ids(tiny: LoadedModel) -> None:
    assert tokenize(tiny.tokenizer, [], 8).ids == []


LENGTHS = st.lists(st.integers(0, 30), max_size=40)


@given(lengths=LENGTHS, budget=st.integers(1, 100), side=st.sampled_from(["left", "right"]))
def test_each_text_is_in_one_batch_under_the_budget_longest_first(lengths: list[int], budget: int, side: str) -> None:
    unit = TokenizedUnit([list(range(1, length + 1)) for length in lengths], [False] * len(lengths))
    batches = list(cut_batches(unit, budget, 0, side))
    members = [member for batch in batches for member in batch.members]
    assert sorted(members) == list(range(len(lengths)))
    assert members == sorted(members, key=lambda member: (-lengths[member], member))
    for batch in batches:
        assert batch.input_ids.numel() <= budget or len(batch.members) == 1
        assert batch.input_ids.shape == batch.attention_mask.shape == (len(batch.members), max(1, *batch.lengths, 0))
        for row, member in enumerate(batch.members):
            kept = batch.attention_mask[row].bool()
            assert batch.input_ids[row][kept].tolist() == unit.ids[member]
            assert not batch.input_ids[row][~kept].any()
            edge = kept if side == "right" else kept.flip(0)
            assert torch.equal(edge, torch.arange(len(edge)) < len(unit.ids[member]))


@given(lengths=LENGTHS)
def test_the_cut_is_a_function_of_the_unit(lengths: list[int]) -> None:
    def cut() -> list[Any]:
        unit = TokenizedUnit([[7] * length for length in lengths], [False] * len(lengths))
        return [batch.members for batch in cut_batches(unit, 40, 0, "right")]

    assert cut() == cut()


def test_much_shorter_texts_begin_a_new_batch_once_a_quarter_is_full() -> None:
    unit = TokenizedUnit([[7] * length for length in (30, 30, 29, 10, 10, 3)], [False] * 6)
    assert [batch.lengths for batch in cut_batches(unit, 120, 0, "right")] == [[30, 30, 29], [10, 10, 3]]
    assert [batch.lengths for batch in cut_batches(unit, 1000, 0, "right")] == [[30, 30, 29, 10, 10, 3]]
