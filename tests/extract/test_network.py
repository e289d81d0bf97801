"""The model of a run: what a random batch for it holds, and ids that it does not know."""

from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from families import PADDING, VOCABULARY, build
from layerprobe.errors import ModelError, OptionError
from layerprobe.extract.network import make_random_batch
from layerprobe.models import LoadedModel


def test_a_random_batch_holds_no_padding_and_fits(tiny: LoadedModel) -> None:
    loaded = LoadedModel("roberta", build("roberta"), tiny.tokenizer)
    batch = make_random_batch(loaded, 40, 50)
    assert batch["input_ids"].shape == (40, 50) and bool(batch["attention_mask"].all())
    assert not (batch["input_ids"] == PADDING).any()
    assert int(batch["input_ids"].min()) >= 0 and int(batch["input_ids"].max()) < VOCABULARY
    assert torch.equal(batch["input_ids"], make_random_batch(loaded, 40, 50)["input_ids"])
    with torch.no_grad():
        assert loaded.model(**batch).last_hidden_state.isfinite().all()


def test_a_batch_that_is_too_long_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(OptionError, match="length is 65: the model takes at most 64 tokens"):
        make_random_batch(tiny, 1, 65)


@pytest.mark.parametrize("number", [3, 2_500])  # among the texts that the plan is made from, and behind them
def test_an_id_beyond_the_vocabulary_is_an_error_that_names_the_text(
    tiny: LoadedModel, make_bert: Any, tmp_path: Path, number: int
) -> None:
    size = len(tiny.tokenizer) - 1  # one word less than the tokenizer has
    model = make_bert(vocab_size=size, num_hidden_layers=1)
    texts = ["the dog"] * number + ["the \u6587", "dog"]
    for place in (tmp_path / "acts", lp.Moments()):
        with pytest.raises(
            ModelError, match=f"text {number}: the tokenizer gives id {size}, but ids of BertModel are 0 "
        ):
            lp.extract(model, texts, place, tokenizer=tiny.tokenizer, sites="layers.0")
    assert (tmp_path / "acts").exists() == (number > 2_000)
    assert (
        len(lp.extract(model, texts[:number], tmp_path / "other", tokenizer=tiny.tokenizer, sites="layers.0")) == number
    )
