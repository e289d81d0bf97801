"""What a store says of the tokenizer that cut its texts."""

import copy
from typing import Any

import pytest

from layerprobe.extract.description import describe_tokenizer


def test_tokenizer_is_described_by_its_rules_alone(demo: Any) -> None:
    tokenizer = copy.deepcopy(demo.tokenizer)
    described = describe_tokenizer(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert describe_tokenizer(tokenizer) == described
    tokenizer.add_tokens(["layerprobe"])
    assert describe_tokenizer(tokenizer)["hash"] != described["hash"]


@pytest.mark.parametrize(("option", "value"), [("truncation_side", "left"), ("split_special_tokens", True)])
def test_what_changes_ids_beside_the_rules_is_described(demo: Any, option: str, value: Any) -> None:
    tokenizer = copy.deepcopy(demo.tokenizer)
    described = describe_tokenizer(tokenizer)
    text = "[SEP] a text of many tokens"
    ids = tokenizer(text, truncation=True, max_length=5)["input_ids"]
    setattr(tokenizer, option, value)
    assert tokenizer(text, truncation=True, max_length=5)["input_ids"] != ids
    assert describe_tokenizer(tokenizer) == {**described, option: value}
