"""A tokenizer that may be untrusted: the native parser's own names, and no file that ends the process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import layerprobe as lp
from forks import Ended, run_each
from layerprobe.errors import FormatError
from layerprobe.models import LoadedModel
from layerprobe.store.checks import check_tokenizer
from layerprobe.store.places import find_place
from layerprobe.store.tokenizer import TokenNames, load_tokenizer
from layerprobe.store.vocabulary import Vocabulary

PARTS = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
BARE: dict[str, Any] = {"version": "1.0", "added_tokens": [], **dict.fromkeys(PARTS)}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
# from the parser's own crash: the second half of a character is no text, and its message of that ends the process
CUT_CHARACTER = {
    "type": "BPE",
    "vocab": {"a": 0, "b": 1, "é": 2, "aé": 3},
    "merges": [["a", "é"]],
    "continuing_subword_prefix": "x",
}
BAD_MERGES = [
    CUT_CHARACTER,
    {**CUT_CHARACTER, "merges": ["a é"]},
    {**CUT_CHARACTER, "merges": [["a", "b"]], "continuing_subword_prefix": "####"},
    {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},
    {"vocab": {"a": 0, "b": 1}, "merges": [["a", "c"]]},
    {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]},
    {"type": "BPE", "vocab": {"a": 0}, "merges": [3]},
]


def encode(model: Any, **parts: Any) -> bytes:
    return json.dumps({**BARE, "model": model, **parts}).encode()


@pytest.fixture(scope="module")
def refusals() -> list[Ended]:
    """How each ends in a process of its own, which is what it would end."""
    pieces = [f"load_tokenizer('tokenizer.json', {encode(model)!r})" for model in BAD_MERGES]
    return run_each("from layerprobe.store.tokenizer import load_tokenizer", pieces)


@pytest.mark.parametrize("number", range(len(BAD_MERGES)))
def test_merges_that_are_not_of_the_vocabulary_are_refused(refusals: list[Ended], number: int) -> None:
    ended = refusals[number]
    assert ended.status == 1 and "FormatError: tokenizer.json: is not a tokenizer" in ended.said
    # which token an id is takes no merges
    found = Vocabulary("tokenizer.json", encode(BAD_MERGES[number]))
    assert found.tokens(torch.tensor([0, 9])) == ["a", ""]


def test_merges_of_the_vocabulary_are_taken() -> None:
    tokens = {"a": 0, "##b": 1, "ab": 2, "##é": 3, "aé": 4}
    pairs = ["#version: 0.2", "a ##b", "a ##é"]
    for merges in (pairs, [pair.split(" ") for pair in pairs[1:]]):
        model = {"type": "BPE", "vocab": tokens, "merges": merges, "continuing_subword_prefix": "##"}
        assert load_tokenizer("tokenizer.json", encode(model)).encode("ab").tokens == ["ab"]


names = st.sampled_from(["", "a", "b", "c", "dd", "[SEP]", "é"])


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(names, max_size=6),
    added=st.lists(st.tuples(st.integers(0, 12), names), max_size=5),
    is_list=st.booleans(),
)
def test_names_are_those_of_the_native_parser(tokens: list[str], added: list[tuple[int, str]], is_list: bool) -> None:
    vocab = {token: token_id for token_id, token in enumerate(dict.fromkeys(tokens))}
    model: dict[str, Any] = {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}
    if is_list:
        model = {"type": "Unigram", "vocab": [[token, -1.0] for token in tokens], "unk_id": 0 if tokens else None}
    rules = {
        **BARE,
        "model": model,
        "added_tokens": [{"id": token_id, "content": token, **FLAGS} for token_id, token in added],
    }
    ours, theirs = TokenNames("tokenizer.json", rules), Tokenizer.from_buffer(json.dumps(rules).encode())
    for token_id in range(30):
        assert ours.token_of(token_id) == theirs.id_to_token(token_id)
    for token in ["", "a", "b", "c", "dd", "[SEP]", "é", "none"]:
        assert ours.id_of(token) == theirs.token_to_id(token)


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"model": None},
        {"model": {"vocab": 3}},
        {"model": {"vocab": {"a": -1}}},
        {"model": {"vocab": {"a": 2**32}}},
        {"model": {"vocab": {"a": 1.0}}},
        {"model": {"vocab": ["abc"]}},
        {"model": {"vocab": [[1, 2]]}},
        {"model": {"vocab": {}}, "added_tokens": [{"id": 1}]},
        {"model": {"vocab": {}}, "added_tokens": [{"content": 1}]},
    ],
)
def test_a_file_without_a_vocabulary_is_no_tokenizer(rules: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json: is not a tokenizer"):
        TokenNames("tokenizer.json", rules)


def test_verify_tells_of_a_tokenizer_that_the_native_parser_panics_at(tiny: LoadedModel, tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    lp.extract(tiny, ["the quick brown fox"], folder, sites="layers.0")
    path = folder / "tokenizer" / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AA=="}
    path.write_text(json.dumps(rules))
    assert "tokenizer/tokenizer.json: its hash is" in str(lp.verify(folder))
    # as of a store that says no hash, or one that was forged
    with pytest.raises(FormatError, match=r"tokenizer\.json: is not a tokenizer"):
        check_tokenizer(find_place(folder), {})
