"""The lenses, against the logits of the models themselves, the head taken by hand, and numpy in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import layerprobe as lp
from families import FAMILIES, build, make_batch
from layerprobe.errors import InputError, NonFiniteError, OptionError, SiteError
from layerprobe.generation.heads import MaskedHead, fit_ridge
from layerprobe.models import LoadedModel
from layerprobe.sites.stacks import fills_masks
from planting import plant


@pytest.fixture(scope="module")
def masked(tiny: LoadedModel) -> LoadedModel:
    import transformers

    torch.manual_seed(0)
    own: Any = tiny.model
    config = transformers.BertConfig(**(own.config.to_dict() | {"initializer_range": 0.3}))
    return LoadedModel("", transformers.BertForMaskedLM(config).eval(), tiny.tokenizer)


def rank_by_hand(logits: torch.Tensor, ids: torch.Tensor) -> list[int]:
    order = (-logits.double()).argsort(1)
    return [int((row == one).nonzero()[0, 0]) + 1 for row, one in zip(order, ids, strict=True)]


def test_the_last_layer_says_what_the_model_says(masked: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    for source in (texts[:9], lp.extract(masked, texts[:9], tmp_path / "acts", sites=["embeddings", "layers.*"])):
        found = lp.lens(masked, source, mask=0, max_tokens=10_000)
        assert [site.site for site in found.sites] == ["embeddings", "layers.0", "layers.1", "layers.2"]
        ranks, chances = [], []
        for text in texts[:9]:
            batch = masked.tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                logits = masked.model(**batch).logits[0, 1:-1]
            ids = batch["input_ids"][0, 1:-1]
            ranks += rank_by_hand(logits, ids)
            chances += logits.double().softmax(1).gather(1, ids[:, None])[:, 0].tolist()
        last = found.sites[-1]
        assert found.num_tokens == len(ranks) and found.method == "logit" and found.mask == 0
        assert last.top1 == pytest.approx(np.mean(np.array(ranks) == 1))
        assert last.top10 == pytest.approx(np.mean(np.array(ranks) <= 10))
        assert last.median_rank == np.median(ranks)
        assert last.reciprocal_rank == pytest.approx(np.mean(1 / np.array(ranks)))
        # other batches, so other orders of sums in float32
        assert last.probability == pytest.approx(np.mean(chances), rel=1e-4)
        assert last.loss == pytest.approx(-np.mean(np.log(chances)), rel=1e-4)


def test_an_inner_layer_goes_through_the_heads_own_transform(masked: LoadedModel, texts: list[str]) -> None:
    found = lp.lens(masked, texts[8:9], mask=0, sites="layers.0")
    batch = masked.tokenizer(texts[8], return_tensors="pt")
    model: Any = masked.model
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states[1]
        logits = model.cls.predictions.decoder(model.cls.predictions.transform(states))[0, 1:-1]
    ids = batch["input_ids"][0, 1:-1]
    assert [reading.ranks for reading in found.readings] == [(one,) for one in rank_by_hand(logits, ids)[:24]]
    guesses = masked.tokenizer.convert_ids_to_tokens(logits.argmax(1).tolist())
    assert [reading.guesses for reading in found.readings] == [(one,) for one in guesses[:24]]
    assert [reading.token for reading in found.readings] == masked.tokenizer.convert_ids_to_tokens(ids.tolist())[:24]


def test_only_what_was_masked_is_judged(masked: LoadedModel, texts: list[str]) -> None:
    found = lp.lens(masked, texts[1:5], seed=3)
    again = lp.lens(masked, texts[1:5], seed=3)
    assert found == again and found.mask == 0.15
    lengths = [len(masked.tokenizer(text)["input_ids"]) - 2 for text in texts[1:5]]
    assert 4 <= found.num_tokens < sum(lengths) / 2
    assert {reading.example for reading in found.readings} == {0, 1, 2, 3}
    for reading in found.readings[:3]:
        batch = masked.tokenizer(texts[1 + reading.example], return_tensors="pt")
        ids = batch["input_ids"]
        places = [one.position for one in found.readings if one.example == reading.example]
        true = int(ids[0, reading.position])
        assert masked.tokenizer.convert_ids_to_tokens(true) == reading.token
        ids[0, places] = masked.tokenizer.mask_token_id
        with torch.no_grad():
            logits = masked.model(**batch).logits[0, reading.position]
        assert int((logits > logits[true]).sum()) + 1 == reading.ranks[-1]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_head_of_every_family_gives_the_models_own_logits(name: str) -> None:
    import transformers

    family = FAMILIES[name]
    mapping: Any = transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    found = mapping.get(family.model_type)
    if found is None:
        pytest.skip("it has no head for masked language")
    model, batch = build(name, found), make_batch()
    with torch.no_grad():
        wanted = model(**batch).logits
        final = model.base_model(**batch).last_hidden_state
        flat = final.flatten(0, -2)
        given = MaskedHead(model)(flat, is_final=True)
    # one long row instead of several short ones
    torch.testing.assert_close(given, wanted.flatten(0, -2), atol=1e-4, rtol=1e-4)


def test_a_planted_map_is_found_by_the_embedding_lens(tiny: LoadedModel, tmp_path: Path) -> None:
    """A layer that is a rotation of the word embeddings is read; one of noise is not; without the map neither."""
    maker = torch.Generator().manual_seed(0)
    model: Any = tiny.model
    ids = torch.randint(5, 80, (1200,), generator=maker)
    words = model.get_input_embeddings().weight.detach()[ids]
    turn = torch.linalg.qr(torch.randn(32, 32, generator=maker))[0]
    sites = {"embeddings": words, "layers.0": words @ turn * 7 + 3, "layers.1": torch.randn(1200, 32, generator=maker)}
    store = lp.open(plant(tmp_path / "acts", sites, [6] * 200, ids=ids))
    found = lp.lens(model, store)
    same, turned, noise = found.sites
    assert found.method == "embedding" and 300 < found.num_tokens < 900
    assert same.unmapped_top1 == 1 and same.top1 == 1
    assert turned.top1 == 1 and turned.unmapped_top1 is not None and turned.unmapped_top1 < 0.2
    assert noise.top1 < 0.2 and noise.probability is None and noise.loss is None
    assert found.readings[0].guesses[1] == found.readings[0].token


def test_texts_of_the_same_tokens_are_fitted_or_judged_together(tiny: LoadedModel, tmp_path: Path) -> None:
    """Noise that is the same for the same text is read where a copy of the text was fitted on, and only there."""
    maker = torch.Generator().manual_seed(0)
    ids, rows = torch.randint(5, 80, (60, 6), generator=maker), torch.randn(60, 6, 512, generator=maker)
    copies = torch.arange(60).repeat(4)
    planted = plant(tmp_path / "acts", {"layers.0": rows[copies].flatten(0, 1)}, [6] * 240, ids=ids[copies].flatten())
    (site,) = lp.lens(tiny, lp.open(planted)).sites
    assert site.top1 < 0.2
    same = plant(tmp_path / "same", {"layers.0": torch.ones(24, 32)}, [6] * 4, ids=torch.arange(6).repeat(4) + 5)
    with pytest.raises(InputError, match="all tokens are of one text"):
        lp.lens(tiny, lp.open(same))


@pytest.mark.parametrize("mask", [0, 0.3])
def test_the_first_texts_are_judged_however_long_others_are(masked: LoadedModel, mask: float) -> None:
    short = [f"{word} fox." for word in ("the", "quick", "brown", "lazy", "the", "over")]
    long = ["the quick brown fox jumps over the lazy dog " * 3] * 3
    ids = [masked.tokenizer(text, add_special_tokens=False)["input_ids"] for text in short]
    most = sum(map(len, ids)) - 1 if not mask else 5
    found = lp.lens(masked, [*short, *long], mask=mask, max_tokens=most)
    assert found.num_tokens == most
    seen = {reading.example for reading in found.readings}
    assert seen <= set(range(6)) and min(seen) == 0 and (mask or seen == set(range(6)))
    # what comes later changes nothing
    assert found == lp.lens(masked, [*short, *long[:1]], mask=mask, max_tokens=most)


def test_texts_that_are_equal_are_masked_alike_and_all_judged(masked: LoadedModel) -> None:
    found = lp.lens(masked, ["the quick brown fox jumps over the lazy dog"] * 3, mask=0.4)
    places = [[one.position for one in found.readings if one.example == example] for example in range(3)]
    assert places[0] and places[0] == places[1] == places[2] and found.num_tokens == 3 * len(places[0])


@pytest.mark.parametrize("name", ["Electra", "Funnel"])
def test_a_discriminator_is_looked_at_through_word_embeddings(tiny: LoadedModel, texts: list[str], name: str) -> None:
    import transformers

    own: Any = tiny.model
    sizes: dict[str, Any] = {"vocab_size": own.config.vocab_size, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "embedding_size": 32}
    if name == "Funnel":
        sizes = {"vocab_size": own.config.vocab_size, "d_model": 32, "d_inner": 48, "n_head": 4, "block_sizes": [1, 1]}
    config = getattr(transformers, f"{name}Config")(**sizes)
    discriminator = getattr(transformers, f"{name}ForPreTraining")(config).eval()
    assert not fills_masks(discriminator) and fills_masks(getattr(transformers, f"{name}ForMaskedLM")(config))
    if name == "Electra":
        found = lp.lens(LoadedModel("", discriminator, tiny.tokenizer), texts[:9], sites="layers.*")
        assert found.method == "embedding" and len(found.sites) == 2


def test_the_ridge_map_is_that_of_numpy() -> None:
    maker = np.random.default_rng(0)
    rows, words = maker.normal(size=(50, 6)) + 2, maker.normal(size=(50, 4)) - 1
    weight, bias = fit_ridge(torch.from_numpy(rows), torch.from_numpy(words), 0.1)
    x, y = rows - rows.mean(0), words - words.mean(0)
    penalty = 0.1 * np.trace(x.T @ x) / 6
    # ridge as least squares on rows that ask for nothing
    stacked = np.vstack([x, np.sqrt(penalty) * np.eye(6)])
    wanted = np.linalg.lstsq(stacked, np.vstack([y, np.zeros((6, 4))]), rcond=None)[0]
    np.testing.assert_allclose(weight.numpy(), wanted, atol=1e-10)  # float64, another way to solve
    np.testing.assert_allclose(bias.numpy(), words.mean(0) - rows.mean(0) @ wanted, atol=1e-10)  # likewise


def test_a_model_is_left_as_it_was(masked: LoadedModel, texts: list[str]) -> None:
    model: Any = masked.model
    before, parts = {key: value.clone() for key, value in model.state_dict().items()}, dict(model._modules)
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    try:
        lp.lens(masked, texts[:3], mask=0)
        # two calls tell whether the model sees padding
        assert model.training and model._modules == parts and len(calls) == 3
    finally:
        handle.remove()
        model.eval()
    assert not model._forward_hooks and all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )


def test_what_cannot_be_is_one_clear_error(
    masked: LoadedModel, tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    store = lp.extract(masked, texts, tmp_path / "acts", sites=["layers.0", "layers.0.ffn.act"])
    with pytest.raises(OptionError, match=r"mask=0\.2 for a store: its states were made already"):
        lp.lens(masked, store, mask=0.2)
    with pytest.raises(OptionError, match=r"mask=0\.2: a model without a head"):
        lp.lens(tiny, texts, mask=0.2)
    with pytest.raises(OptionError, match=r"mask is 1\.5: it is a share"):
        lp.lens(masked, texts, mask=1.5)
    with pytest.raises(OptionError, match=r"'layers.0.ffn.act' is 64 wide, its head reads 32"):
        lp.lens(masked, store, sites="layers.0.ffn.act")
    with pytest.raises(OptionError, match="max_tokens is 1"):
        lp.lens(masked, texts, max_tokens=1)
    with pytest.raises(InputError, match="it has 0 tokens to judge; two are the least"):
        lp.lens(masked, ["", ""])
    # of its four words one is masked
    with pytest.raises(InputError, match="it has 1 token to judge; two are the least"):
        lp.lens(masked, ["the quick brown fox"])
    with pytest.raises(InputError, match="all tokens are of one text"):
        lp.lens(tiny, texts[3:4])
    with pytest.raises(SiteError, match="layers are 0 to 2"):
        lp.lens(masked, texts, sites="layers.7")
    pooled = lp.extract(masked, texts, tmp_path / "pooled", sites="layers.*", pool="mean")
    with pytest.raises(OptionError, match="its sites have one vector per example"):
        lp.lens(masked, pooled)
    rows = torch.ones(6, 32)
    rows[4] = torch.nan
    bad = plant(tmp_path / "bad", {"layers.0": rows}, [3, 3], ids=torch.arange(6) + 10, shards=1)
    with pytest.raises(NonFiniteError, match=r"'layers.0' of .*: example 1 is not finite"):
        lp.lens(masked, lp.open(bad))
    foreign = plant(tmp_path / "foreign", {"layers.0": torch.ones(6, 32)}, [3, 3], ids=torch.arange(6) + 500, shards=1)
    with pytest.raises(OptionError, match="token 505 is none of its 88"):
        lp.lens(masked, foreign)


def test_the_result_is_a_table_files_and_a_picture(masked: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    found = lp.lens(masked, texts)
    assert "  median rank  reciprocal rank  probability  " in found.table()
    assert "unmapped" not in found.table() and "15% of the tokens masked" in found.table()
    assert len(found.grid().splitlines()) == 2 + len(found.readings)
    written = json.loads(found.to_json(tmp_path / "lens.json").read_text())
    assert [site["top1"] for site in written["sites"]] == [site.top1 for site in found.sites]
    assert len(found.to_csv(tmp_path / "lens.csv").read_text().splitlines()) == 5
    found.plot(tmp_path / "lens.png")
    assert (tmp_path / "lens.png").stat().st_size > 5000


def test_a_model_that_fills_masks_is_known_by_its_class(masked: LoadedModel, tiny: LoadedModel) -> None:
    import transformers

    own: Any = tiny.model
    assert fills_masks(masked.model) and not fills_masks(tiny.model)
    assert fills_masks(transformers.BertForPreTraining(own.config))
