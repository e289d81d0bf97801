"""Batches hold every text once, under the budget, longest first, with ids that are the tokenizer's own."""

import ast
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from layerprobe.extract import tokens
from layerprobe.extract.batching import BATCH_COST_TOKENS, SHAPE_STEPS, Shapes, cut_batches
from layerprobe.extract.tokens import TokenizedUnit, tokenize
from layerprobe.models import LoadedModel


def _lists(unit: TokenizedUnit) -> list[list[int]]:
    return [unit[place].tolist() for place in range(len(unit))]


def test_ids_are_those_of_the_tokenizer_one_text_at_a_time(tiny: LoadedModel, texts: list[str]) -> None:
    unit = tokenize(tiny.tokenizer, texts, 20)
    assert _lists(unit) == [tiny.tokenizer(text, truncation=True, max_length=20)["input_ids"] for text in texts]
    assert unit.truncated.tolist() == [len(tiny.tokenizer(text)["input_ids"]) > 20 for text in texts]
    assert unit.num_tokens == sum(map(len, _lists(unit)))


def _byte_level(texts: list[str], **options: Any) -> Any:
    """A byte-level BPE with special tokens around a text, as RoBERTa's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<mask>"]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>", **options
    )


@pytest.mark.parametrize("options", [{}, {"truncation_side": "left"}, {"split_special_tokens": True}])
@pytest.mark.parametrize("max_length", [4, 9, 64])
def test_ids_are_those_of_the_call_whatever_was_called_before(
    texts: list[str], options: dict[str, Any], max_length: int
) -> None:
    texts = [*texts, "", "été 😀 深い", "a <mask> b </s>", "word " * 40]
    tokenizer = _byte_level(texts, **options)
    # leaves its settings in the backend
    is_split = tokenizer.split_special_tokens
    tokenizer(texts, padding="max_length", max_length=30, truncation=True, split_special_tokens=not is_split)
    unit = tokenize(tokenizer, texts, max_length)
    assert _lists(unit) == [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    assert unit.truncated.tolist() == [len(tokenizer(text)["input_ids"]) > max_length for text in texts]


def test_a_tokenizer_that_does_more_than_its_backend_is_called(texts: list[str]) -> None:
    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            return super().__call__([one.upper() for one in text], *args, **kwargs)

    backend = _byte_level([*texts, *map(str.upper, texts)]).backend_tokenizer
    tokenizer = Shouting(tokenizer_object=backend, pad_token="<pad>")
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    assert _lists(tokenize(tokenizer, texts, 16)) == [
        plain(text.upper(), truncation=True, max_length=16)["input_ids"] for text in texts
    ]
    assert _lists(tokenize(tokenizer, texts, 16)) != _lists(tokenize(plain, texts, 16))


class _WithItsOwnBackend(PreTrainedTokenizerFast):
    def set_truncation_and_padding(self, *args: Any, **kwargs: Any) -> None:
        super().set_truncation_and_padding(*args, **kwargs)


class _WithItsOwnStrategies(PreTrainedTokenizerFast):
    def _get_padding_truncation_strategies(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_padding_truncation_strategies(*args, **kwargs)


class _WithItsOwnResults(PreTrainedTokenizerFast):
    def _convert_encoding(self, *args: Any, **kwargs: Any) -> Any:
        return super()._convert_encoding(*args, **kwargs)


class _WithASay(PreTrainedTokenizerFast):
    def greet(self) -> str:
        return "hello"


@pytest.mark.parametrize(
    ("kind", "is_plain"),
    [(_WithItsOwnBackend, False), (_WithItsOwnStrategies, False), (_WithItsOwnResults, False), (_WithASay, True)],
)
def test_whatever_a_class_changes_on_the_way_to_the_ids_is_not_gone_round(
    texts: list[str], kind: type[PreTrainedTokenizerFast], is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = kind(tokenizer_object=_byte_level(texts).backend_tokenizer, pad_token="<pad>")
    calls: list[Any] = []
    call = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "__call__", lambda *args, **kwargs: [calls.append(1), call(*args, **kwargs)][1]
    )
    tokenize(tokenizer, texts, 16)
    assert bool(calls) is not is_plain


@pytest.mark.parametrize("max_length", [2, 3, 11, 12, 13, 64])
def test_a_text_counts_as_cut_only_when_something_is_lost(tiny: LoadedModel, max_length: int) -> None:
    ten = "the quick brown fox , the lazy dog . ."
    assert len(tiny.tokenizer(ten)["input_ids"]) == 12
    unit = tokenize(tiny.tokenizer, [ten, ""], max_length)
    assert unit.lengths.tolist() == [min(12, max_length), 2]
    assert unit.truncated.tolist() == [max_length < 12, False]


def test_no_texts_are_no_ids(tiny: LoadedModel) -> None:
    assert len(tokenize(tiny.tokenizer, [], 8)) == 0


def test_many_texts_are_those_of_each_part(tiny: LoadedModel, texts: list[str]) -> None:
    many = [texts[number % len(texts)] + " fox" * (number % 7) for number in range(2500)]
    unit, single = tokenize(tiny.tokenizer, many, 9), [tokenize(tiny.tokenizer, [text], 9) for text in many]
    assert _lists(unit) == [one.ids.tolist() for one in single]
    assert unit.truncated.tolist() == [bool(one.truncated[0]) for one in single] and unit.num_truncated > 0
    part = unit.part(1020, 1030)
    assert _lists(part) == _lists(unit)[1020:1030] and part.truncated.tolist() == unit.truncated[1020:1030].tolist()
    assert part.gather([3, 0]).tolist() == _lists(part)[3] + _lists(part)[0] and part.gather([]).tolist() == []
    assert part.room == (part.num_tokens, 10, sum(len(ids) ** 2 for ids in _lists(part)))


def test_long_texts_are_given_to_the_tokenizer_few_at_a_time(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes of a text before that is cut takes many times the text."""
    monkeypatch.setattr(tokens, "_CHARACTERS_AT_ONCE", 1000)
    given: list[list[int]] = []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            given.append([len(one) // 20 for one in text])
            return super().__call__(text, *args, **kwargs)

    backend = _byte_level(texts).backend_tokenizer
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    long = ["the quick brown fox " * count for count in (1, 30, 0, 60, 2, 20, 20, 8, 20, 50, 1)]
    unit = tokenize(Counting(tokenizer_object=backend, pad_token="<pad>"), long, 16)
    assert _lists(unit) == [plain(text, truncation=True, max_length=16)["input_ids"] for text in long]
    assert unit.truncated.tolist() == [len(text) > 100 for text in long]
    assert given == [[1, 30, 0], [60], [2, 20, 20, 8], [20], [50], [1]]


def test_ids_of_many_texts_take_few_bytes_each(tiny: LoadedModel) -> None:
    """A pooled shard holds ids of tens of millions of tokens: nothing of Python's own may stay of each."""
    many = ["the quick brown fox jumps over the lazy dog " * 5] * 3000
    tokenize(tiny.tokenizer, many[:9], 64)
    tracemalloc.start()
    try:
        unit = tokenize(tiny.tokenizer, many, 64)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert unit.num_tokens > 100_000
    assert kept < 6 * unit.num_tokens and most < 20 * unit.num_tokens


LENGTHS = st.lists(st.integers(0, 30), max_size=40)


TEXTS = st.lists(st.lists(st.integers(1, 3), max_size=30), max_size=40)


@given(texts=TEXTS, budget=st.integers(1, 100))
def test_each_text_is_in_one_batch_under_the_budget_longest_first(texts: list[list[int]], budget: int) -> None:
    unit = TokenizedUnit.of(texts)
    batches = list(cut_batches(unit, budget, 0))
    members = [member for batch in batches for member in batch.members]
    assert sorted(members) == list(range(len(texts)))
    assert sum(len(batch.input_ids) for batch in batches) == len({tuple(ids) for ids in texts})
    first = [batch.members[batch.sequences.index(row)] for batch in batches for row in range(len(batch.input_ids))]
    assert first == sorted(first, key=lambda member: (-len(texts[member]), member))
    for batch in batches:
        assert batch.input_ids.numel() <= budget or len(batch.input_ids) == 1
        assert batch.input_ids.shape == batch.attention_mask.shape
        assert batch.input_ids.shape[1] == max(1, *batch.lengths, 0)
        for row, member, length in zip(batch.sequences, batch.members, batch.lengths, strict=True):
            kept = batch.attention_mask[row].bool()
            assert batch.input_ids[row][kept].tolist() == texts[member] and length == len(texts[member])
            assert not batch.input_ids[row][~kept].any()
            assert torch.equal(kept, torch.arange(len(kept)) < length)


@given(texts=TEXTS, budget=st.integers(1, 200))
def test_batches_of_given_shapes_hold_every_text_once_and_are_filled_up(texts: list[list[int]], budget: int) -> None:
    shapes = Shapes(budget, longest=30)
    batches = list(cut_batches(TokenizedUnit.of(texts), budget, 9, shapes=shapes))
    assert sorted(member for batch in batches for member in batch.members) == list(range(len(texts)))
    for batch in batches:
        longest, (height, width) = max(batch.lengths), batch.input_ids.shape
        assert width == shapes.width(longest) and height in shapes.heights(width)
        assert longest <= width <= 30 or longest == 0
        assert height * width <= max(budget, width)
        assert batch.num_filling == len(batch.input_ids) - len({tuple(texts[member]) for member in batch.members})
        for row, member in zip(batch.sequences, batch.members, strict=True):
            assert batch.input_ids[row][batch.attention_mask[row].bool()].tolist() == texts[member]
        filling = batch.attention_mask[len(batch.input_ids) - batch.num_filling :]
        assert (filling.sum(1) == 1).all()  # nothing attends to nothing
        parts = batch.halves() if len(batch.input_ids) > 1 else ()
        assert [member for part in parts for member in part.members] == (batch.members if parts else [])
        assert sum(part.num_filling for part in parts if part.members) <= batch.num_filling


def test_texts_of_all_lengths_take_few_shapes() -> None:
    shapes = Shapes(16384, 512)
    widths = {shapes.width(length) for length in range(513)}
    assert len(widths) == 20 and all(len(shapes.heights(width)) <= SHAPE_STEPS[2] for width in widths)
    wasted = [shapes.width(length) / length for length in range(65, 513)]
    assert max(wasted) < 1.25 and sum(wasted) / len(wasted) < 1.1
    assert Shapes(100, 70).width(69) == 70 and Shapes(100, 70).heights(70) == [1]
    assert Shapes(8, 512).heights(40) == [1] and Shapes(96, 512).heights(8) == [12, 6, 3, 1]


@given(lengths=st.lists(st.integers(0, 12), max_size=9), budget=st.integers(1, 60))
def test_the_cut_into_given_shapes_computes_least(lengths: list[int], budget: int) -> None:
    shapes = Shapes(budget, longest=12)

    def cost(members: Sequence[int]) -> int:
        width = shapes.width(max(members))
        return min(h for h in shapes.heights(width) if h >= len(members)) * width + BATCH_COST_TOKENS

    def least(rest: list[int]) -> int:
        most = max(shapes.heights(shapes.width(rest[0]))) if rest else 0
        return min((cost(rest[:n]) + least(rest[n:]) for n in range(1, min(most, len(rest)) + 1)), default=0)

    made = list(cut_batches(_unit_of(lengths), budget, 0, joins_equal=False, shapes=shapes))
    assert sum(batch.input_ids.numel() + BATCH_COST_TOKENS for batch in made) == least(sorted(lengths, reverse=True))


@pytest.mark.parametrize("num_texts", [300, 1000])
def test_given_shapes_compute_little_more_where_a_shard_holds_few_batches(demo: LoadedModel, num_texts: int) -> None:
    unit, shapes = tokenize(demo.tokenizer, _list_docstrings()[:num_texts], 256), Shapes(16384, 256)
    made = list(cut_batches(unit, shapes.batch_tokens, 0, shapes=shapes))
    assert unit.num_tokens < 4 * shapes.batch_tokens
    computed = sum(batch.input_ids.numel() for batch in made)
    assert computed < 1.2 * sum(map(len, set(map(tuple, _lists(unit)))))


def _unit_of(lengths: list[int]) -> TokenizedUnit:
    """Texts of these lengths, no two the same but the empty ones."""
    return TokenizedUnit.of([[number + 7] * length for number, length in enumerate(lengths)])


@given(lengths=LENGTHS)
def test_the_cut_is_a_function_of_the_unit(lengths: list[int]) -> None:
    def cut() -> list[Any]:
        unit = _unit_of(lengths)
        return [batch.members for batch in cut_batches(unit, 40, 0)]

    assert cut() == cut()


def _cost(batches: list[list[int]]) -> int:
    return sum(max(1, *batch, 0) * len(batch) + BATCH_COST_TOKENS for batch in batches)


def _least_cost(lengths: list[int], budget: int) -> int:
    """Of all cuts of the sorted lengths, the cheapest that keeps to the budget; tried one by one."""
    if not lengths:
        return 0
    costs = []
    for end in range(1, len(lengths) + 1):
        if end == 1 or max(1, lengths[0]) * end <= budget:
            costs.append(_cost([lengths[:end]]) + _least_cost(lengths[end:], budget))
    return min(costs)


@given(lengths=st.lists(st.integers(1, 60), max_size=9), budget=st.integers(1, 200))
def test_no_other_cut_computes_less(lengths: list[int], budget: int) -> None:
    unit = _unit_of(lengths)
    made = [batch.lengths for batch in cut_batches(unit, budget, 0)]
    assert _cost(made) == _least_cost(sorted(lengths, reverse=True), budget)


@given(lengths=LENGTHS, budget=st.integers(1, 60))
def test_batches_of_equal_lengths_have_no_padding(lengths: list[int], budget: int) -> None:
    made = list(cut_batches(_unit_of(lengths), budget, 0, joins_equal=False, equal_lengths=True))
    assert sorted(length for batch in made for length in batch.lengths) == sorted(lengths)
    for batch in made:
        assert len(set(batch.lengths)) == 1 and batch.input_ids.numel() <= max(budget, *batch.lengths, 1)
    # no more of them than the budget asks for
    counts = {length: lengths.count(length) for length in lengths}
    assert len(made) == sum(-(-count // max(1, budget // max(1, length))) for length, count in counts.items())


@given(lengths=st.lists(st.integers(1, 60), max_size=40))
def test_a_batch_that_costs_more_is_fuller(lengths: list[int]) -> None:
    few, many = (len(list(cut_batches(_unit_of(lengths), 400, 0, batch_cost=cost))) for cost in (1000, 0))
    assert few <= many


def test_the_cost_of_a_batch_is_counted() -> None:
    unit = _unit_of([60, 30, 5])
    assert [len(list(cut_batches(unit, 400, 0, batch_cost=cost))) for cost in (1000, 0)] == [1, 3]


def test_padding_of_texts_of_all_lengths_is_under_two_percent() -> None:
    lengths = [int(2 + 400 / (1 + number)) + number % 90 for number in range(1500)]
    unit = _unit_of(lengths)
    computed = sum(batch.input_ids.numel() for batch in cut_batches(unit, 1024, 0))
    assert computed <= sum(lengths) / 0.98


def _list_docstrings() -> list[str]:
    """Those of the standard library, as many as a shard of the default size holds."""
    folder = Path(ast.__file__).parent
    trees = [ast.parse(path.read_bytes()) for path in sorted(folder.glob("[a-m]*.py"))]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [text for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)
            if (text := ast.get_docstring(node))]  # fmt: skip


def test_padding_of_real_texts_is_under_two_percent(demo: LoadedModel) -> None:
    texts = _list_docstrings()
    assert len(texts) > 1000
    unit = tokenize(demo.tokenizer, texts, 256)
    batches = list(cut_batches(unit, 1024, 0))
    computed = sum(batch.input_ids.numel() for batch in batches)
    padding = sum(int((batch.attention_mask == 0).sum()) for batch in batches)
    assert padding == sum(batch.num_padding for batch in batches)
    assert padding <= 0.02 * computed
    assert computed - padding == sum(map(len, set(map(tuple, _lists(unit)))))
