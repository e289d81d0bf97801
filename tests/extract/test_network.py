"""The model of a run: what a random batch for it holds."""

import pytest
import torch

from families import PADDING, VOCABULARY, build
from layerprobe.errors import OptionError
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
