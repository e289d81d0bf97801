"""Selections: the tokens and examples that a plain search through the examples finds, and their rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import layerprobe as lp
from layerprobe.errors import FormatError, MissingExample, OptionError, SiteError
from layerprobe.store.vocabulary import Vocabulary

RECORDS: list[dict[str, Any]] = [
    {"text": "the quick brown fox.", "label": "x", "n": 0},
    {"text": "fox the foxy fox", "label": "y", "n": 1},
    {"text": "", "label": "x", "n": 2},
    {"text": "lazy dog, thefox fox.fox", "n": 3},
    {"text": "the dog dogs the dog", "label": "x", "n": [4]},
]


@pytest.fixture(scope="module")
def store(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("selection")
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    sites = ["layers.0", "layers.0.attention.weights"]
    lp.extract(tiny.model, folder / "in.jsonl", folder / "acts", tokenizer=tiny.tokenizer, sites=sites, shard_size=4000)
    found = lp.open(folder / "acts")
    assert found.num_shards > 1
    return found


def search(store: Any, *run: str) -> list[tuple[int, int]]:
    """Find runs of tokens the slow way; a piece that goes on with the word ends none."""
    found = []
    for example in store:
        tokens = example.tokens
        for place in range(len(tokens) - len(run) + 1):
            after = [*tokens, ""][place + len(run)]
            if tuple(tokens[place : place + len(run)]) == run and not after.startswith("##"):
                found.append((example.index, place))
    return found


def test_a_token_is_found_wherever_it_stands(store: Any) -> None:
    for token in ("the", "fox", ".", "[SEP]", "##s"):
        expected = [(e.index, k) for e in store for k, found in enumerate(e.tokens) if found == token]
        selection = store.where(token=token)
        assert expected and list(selection) == expected and len(selection) == len(expected)
        token_id = int(store.input_ids(expected[0][0])[expected[0][1]])
        assert list(store.where(token_id=token_id)) == expected
    assert list(store.where(token_id=10**6)) == []


def test_rows_of_tokens_are_theirs(store: Any) -> None:
    selection = store.where(token="fox")
    expected = torch.stack([store["layers.0"][example][place] for example, place in selection])
    assert torch.equal(selection.rows("layers.0"), expected)


def test_a_word_is_the_run_of_its_pieces_and_no_part_of_a_longer_one(store: Any) -> None:
    assert list(store.where(word="fox")) == search(store, "fox")
    assert list(store.where(word="the fox")) == search(store, "the", "fox")
    pieces = tuple(store.example(4).tokens[3:-3])
    assert len(pieces) > 1
    selection = store.where(word="dogs")
    assert list(selection) == search(store, *pieces) == [(4, 3)]
    rows = store["layers.0"][4][3 : 3 + len(pieces)]
    assert torch.equal(selection.rows("layers.0")[0], rows[0])
    assert torch.equal(selection.rows("layers.0", pieces="last")[0], rows[-1])
    # sums in another order
    torch.testing.assert_close(selection.rows("layers.0", pieces="mean")[0], rows.float().mean(0), rtol=1e-5, atol=1e-6)


def test_examples_are_found_by_their_fields(store: Any) -> None:
    assert list(store.where(label="x")) == [0, 2, 4]
    assert list(store.where(label="x", text="")) == [2]
    assert list(store.where(n=[4])) == [4] and list(store.where(label="z")) == []
    assert list(store.where(lambda record: record.get("label") is None)) == [3]
    assert list(store.where(lambda record: "fox" in record["text"], label="x")) == [0]


def test_a_field_named_text_is_seen_by_a_function_beside_the_text(tiny: Any, tmp_path: Path) -> None:
    records = [{"body": "the fox", "text": "about foxes"}, {"body": "a dog", "text": "about dogs"}, {"body": "the dog"}]
    made = lp.extract(tiny.model, records, tmp_path, tokenizer=tiny.tokenizer, sites="layers.0", field="body")
    assert list(made.where(text="the fox")) == [0] and list(made.where(text="about dogs")) == []
    assert list(made.where(lambda record: record["text"] == "about dogs")) == [1]
    assert list(made.where(lambda record: record["text"] == "the dog")) == [2]


def test_examples_are_found_by_their_ordinals_in_the_order_of_the_input(store: Any) -> None:
    assert list(store.where(id=3)) == [3]
    assert list(store.where(id=[4, 1, -1, 1])) == [1, 4]
    assert list(store.where(id=torch.tensor([2, 0]))) == [0, 2]
    assert list(store.where(id=[])) == []


def test_conditions_hold_together(store: Any) -> None:
    assert list(store.where(token="fox", id=[0, 2])) == [(0, 4)]
    last = len(store.example(4).tokens) - 2
    assert list(store.where(word="dog", label="x")) == [(4, 2), (4, last)]


def test_rows_of_examples_are_all_of_theirs(store: Any) -> None:
    selection = store.where(label="x")
    expected = torch.cat([store["layers.0"][ordinal] for ordinal in selection])
    assert torch.equal(selection.rows("layers.0"), expected)
    nothing = store.where(label="z").rows("layers.0")
    assert nothing.shape == (0, store["layers.0"].width) and nothing.dtype == expected.dtype


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "bfloat16"])
def test_rows_of_every_dtype_are_gathered(tiny: Any, tmp_path: Path, dtype: str) -> None:
    texts = ["the fox", "fox the lazy fox", "dog"]
    lp.extract(tiny.model, texts, tmp_path / "a", tokenizer=tiny.tokenizer, sites="layers.1", dtype=dtype)
    store: Any = lp.open(tmp_path / "a")
    selection = store.where(token="fox")
    expected = torch.stack([store["layers.1"][example].float()[place] for example, place in selection])
    assert len(selection) == 3 and torch.equal(selection.rows("layers.1").float(), expected)
    everything = torch.cat([rows.float() for rows in store["layers.1"]])
    assert torch.equal(store.where(id=[0, 1, 2]).rows("layers.1").float(), everything)


def test_examples_of_a_pooled_store_give_their_vectors(tiny: Any, tmp_path: Path) -> None:
    lp.extract(
        tiny.model, ["the", "fox", "dog fox"], tmp_path / "a", tokenizer=tiny.tokenizer, sites="layers.1", pool="cls"
    )
    store: Any = lp.open(tmp_path / "a")
    assert torch.equal(store.where(id=[2, 0]).rows("layers.1"), store["layers.1"].pooled()[[0, 2]])
    with pytest.raises(OptionError, match=r"'layers\.1' has a vector per example and no row per token"):
        store.where(token="fox").rows("layers.1")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, r"where\(\): asks for nothing"),
        ({"token": "a", "word": "b"}, "a token has one name"),
        ({"token": 7}, "must be of type str"),
        ({"token_id": "7"}, "must be of type int"),
        ({"token_id": True}, "must be of type int"),
        ({"token_id": 2**70}, "no token has it: an id has 64 bits"),
        ({"token_id": -(2**63) - 1}, "no token has it"),
        ({"token": "dogs"}, r"no token 'dogs' in .*: it is cut into 'dog', '##s'\. Use word='dogs'"),
        ({"word": "☃"}, "no word '☃' for .*: it has no tokens"),
        ({"word": " "}, "no word ' '"),
        ({"colour": 1}, "no record in .* has a field 'colour': they have label, n, text"),
        ({"id": "a"}, "an id is the ordinal of an example"),
        ({"id": [[1]]}, "an id is the ordinal of an example"),
        ({"id": 1.5}, "an id is the ordinal of an example"),
    ],
)
def test_what_cannot_be_found_says_what_can(store: Any, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        store.where(**asked)


def test_other_things_that_are_no_question_are_refused(store: Any) -> None:
    with pytest.raises(OptionError, match="is no function of a record"):
        store.where("the")
    with pytest.raises(MissingExample, match="no example 9"):
        store.where(id=9)
    with pytest.raises(OptionError, match="pieces='middle': use first, last or mean"):
        store.where(word="fox").rows("layers.0", pieces="middle")
    with pytest.raises(SiteError, match=r"no site 'layers\.9'"):
        store.where(word="fox").rows("layers.9")
    with pytest.raises(OptionError, match="is one matrix per head and has no rows"):
        store.where(word="fox").rows("layers.0.attention.weights")


def test_a_store_without_tokenizer_or_records_says_so(write_store: Callable[..., Any]) -> None:
    store: Any = lp.open(write_store().folder)
    with pytest.raises(OptionError, match=r"has no tokenizer\. Use token_id="):
        store.where(token="the")
    with pytest.raises(OptionError, match="keeps no records"):
        store.where(lambda _: True)
    with pytest.raises(OptionError, match=r"has a field 'text': no records were kept"):
        store.where(text="a")
    wanted = int(store.input_ids(2)[1])
    assert (2, 1) in list(store.where(token_id=wanted))


def byte_level() -> Tokenizer:
    vocabulary = ["<unk>", "bank", "Ġbank", "er", "Ġriver", ".", "Ċ", "Ġ", "(", "river"]
    tokenizer = Tokenizer(models.WordLevel({token: place for place, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        (["bank", "Ġbank", "."], [0, 1]),
        (["Ġriver", "bank"], []),
        (["Ġbank", "er"], []),
        (["(", "bank", "Ċ", "Ġbank"], [1, 3]),
        (["Ġ", "bank"], [1]),
    ],
)
def test_words_of_a_tokenizer_that_marks_spaces_end_where_text_does(tokens: list[str], starts: list[int]) -> None:
    tokenizer = byte_level()
    vocabulary = Vocabulary("tokenizer.json", tokenizer.to_str().encode())
    ids = torch.tensor([tokenizer.token_to_id(token) for token in tokens])
    rows, lengths = vocabulary.runs_of("bank").find(ids, torch.tensor([0, len(ids)]))
    assert sorted(rows.tolist()) == starts and set(lengths.tolist()) <= {1}


def test_a_run_does_not_reach_into_the_next_example() -> None:
    tokenizer = byte_level()
    vocabulary = Vocabulary("tokenizer.json", tokenizer.to_str().encode())
    ids = torch.tensor([tokenizer.token_to_id(token) for token in ["Ġriver", "Ġbank", "Ġriver", "Ġbank"]])
    found = vocabulary.runs_of("river bank").find(ids, torch.tensor([0, 1, 4]))
    assert [part.tolist() for part in found] == [[2], [2]]


def test_a_file_that_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json: is not a tokenizer"):
        Vocabulary("tokenizer.json", b"{}")
