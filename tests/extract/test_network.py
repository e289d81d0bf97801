"""The model of a run: what a random batch for it holds, and ids that it does not know."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM

import layerprobe as lp
from families import PADDING, VOCABULARY, build
from layerprobe.errors import ModelError, OptionError
from layerprobe.extract.classifier import Classifier
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


def test_a_lens_and_a_classifier_refuse_ids_beyond_the_vocabulary_too(
    tiny: LoadedModel, make_bert: Any, tmp_path: Path
) -> None:
    size = len(tiny.tokenizer) - 1
    bert = make_bert(vocab_size=size)
    texts, message = ["the dog", "the \u6587"], f"texts, text 1: the tokenizer gives id {size}, but ids of Bert"
    with pytest.raises(ModelError, match=message):
        lp.lens(LoadedModel("", BertForMaskedLM(bert.config).eval(), tiny.tokenizer), texts, mask=0)
    records = [{"text": f"the {name} {number}", "label": name} for number in range(10) for name in ("fox", "dog")]
    probe = lp.classify(lp.extract(tiny, records, tmp_path / "acts", sites="layers.0")).probe
    with pytest.raises(ModelError, match=message):
        Classifier(probe, LoadedModel("", bert, tiny.tokenizer)).predict(texts)
