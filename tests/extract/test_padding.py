"""Models that see the padding behind a text get none: each text has the rows that it has alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from families import build, is_known
from layerprobe.errors import OptionError, PlanError
from layerprobe.extract.padding import sees_padding
from layerprobe.extract.tokens import TokenizedUnit
from layerprobe.models import LoadedModel


@pytest.fixture(scope="module")
def conv() -> Any:
    if not is_known("convbert"):
        pytest.skip("this transformers has no ConvBERT")
    return build("convbert")


def read_alone(model: Any, tokenizer: Any, text: str, site: str) -> torch.Tensor:
    ids = torch.tensor([tokenizer(text, truncation=True, max_length=64)["input_ids"]])
    with torch.no_grad(), lp.Probe(model, site) as probe:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return probe[site][0]


def test_a_convolution_over_positions_sees_padding_and_attention_does_not(conv: Any, make_bert: Any) -> None:
    unit = TokenizedUnit.of([[5, 6, 7, 8, 9, 10], [11, 12]])
    with torch.inference_mode():
        assert sees_padding(conv, unit, 0)
        assert not sees_padding(make_bert(), unit, 0)
        # the first texts of a run may have one length, and later ones others
        assert sees_padding(conv, TokenizedUnit.of([[5, 6, 7, 8], [7, 8, 9, 10]]), 0)


def test_rows_that_are_not_finite_say_nothing_of_padding(make_bert: Any) -> None:
    model, unit = make_bert(), TokenizedUnit.of([[5, 6, 7, 8, 9, 10], [11, 12]])
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[3] = torch.nan
        assert not sees_padding(model, unit, 0)


def test_rows_are_those_of_each_text_alone(conv: Any, tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    store = lp.extract(conv, texts, tmp_path / "acts", tokenizer=tiny.tokenizer, sites="layers.*")
    plan = json.loads((tmp_path / "acts" / "store.json").read_text())["plan"]
    assert plan["equal_lengths"] is True
    for ordinal, text in enumerate(texts):
        for site in store.sites:
            # sums in another order
            alone = read_alone(conv, tiny.tokenizer, text, site)
            torch.testing.assert_close(store[site][ordinal], alone, rtol=1e-4, atol=1e-5)
    assert lp.audit(tmp_path / "acts", conv).ok


def test_such_a_run_resumes_to_the_same_bytes(conv: Any, tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    options: Any = {"tokenizer": tiny.tokenizer, "sites": "layers.*", "shard_size": 20_000}
    lp.extract(conv, texts, tmp_path / "acts", **options)
    shards = {file.name: file.read_bytes() for file in (tmp_path / "acts").glob("shard-*")}
    assert len(shards) > 1
    (tmp_path / "acts" / "shard-000001.safetensors").unlink()
    (tmp_path / "acts" / "index.json").unlink()
    lp.extract(conv, texts, tmp_path / "acts", **options)
    assert {file.name: file.read_bytes() for file in (tmp_path / "acts").glob("shard-*")} == shards


def test_a_run_whose_batches_had_padding_is_another_one(
    conv: Any, tiny: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an older version began it: its rows are not those of each text alone, and do not go with these."""
    from layerprobe.extract import trials

    with monkeypatch.context() as older:
        older.setattr(trials, "sees_padding", lambda *_: False)
        lp.extract(conv, texts, tmp_path / "acts", tokenizer=tiny.tokenizer, sites="layers.*")
    with pytest.raises(PlanError, match="equal_lengths"):
        lp.extract(conv, texts, tmp_path / "acts", tokenizer=tiny.tokenizer, sites="layers.*")


def test_a_sink_gets_the_rows_of_each_text_alone(conv: Any, tiny: LoadedModel, texts: list[str]) -> None:
    found = lp.extract(conv, texts, lp.Moments(), tokenizer=tiny.tokenizer, sites="layers.2")
    rows = torch.cat([read_alone(conv, tiny.tokenizer, text, "layers.2") for text in texts]).double()
    torch.testing.assert_close(found["layers.2"].mean.double(), rows.mean(0), rtol=1e-4, atol=1e-5)  # float32 sums


def test_batches_that_are_filled_up_are_refused(conv: Any, tiny: LoadedModel, texts: list[str]) -> None:
    from layerprobe.extract.options import ExtractOptions
    from layerprobe.extract.trials import Trials

    unit = TokenizedUnit.of([[5, 6, 7, 8, 9, 10], [11, 12]])
    sites = [site for site in lp.sites(conv) if site.name == "layers.2"]
    options = ExtractOptions(sites=("layers.2",), compile="reduce-overhead")
    with pytest.raises(OptionError, match="gives a text other rows with padding behind it"):
        _ = Trials(conv, sites, [], None, options, unit, unit.num_tokens, 0).sees_padding


def test_of_a_model_that_takes_no_such_texts_nothing_is_known(make_bert: Any) -> None:
    model = make_bert()
    handle = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("no")))
    try:
        assert sees_padding(model, TokenizedUnit.of([[5, 6, 7, 8], [9]]), 0)
    finally:
        handle.remove()
