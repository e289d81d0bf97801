"""What was planted is found: the layer that tells classes apart, chance where there is nothing, ties as ties."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.analysis.features import average_of, joined_of, learn_mix, read_site
from layerprobe.analysis.tasks import make_task
from layerprobe.errors import InputError, NonFiniteError, OptionError
from planting import plant

COUNT, WIDTH = 400, 16


def make_rows(lengths: list[int], labels: Tensor, layer: int, num_layers: int = 5, signal: float = 2.5) -> Any:
    """Noise everywhere; at one layer each example's rows lie to one side by its label."""
    maker = torch.Generator().manual_seed(1)
    rows = {f"layers.{i}": torch.randn(sum(lengths), WIDTH, generator=maker) for i in range(num_layers)}
    of = torch.repeat_interleave(labels, torch.tensor(lengths))
    rows[f"layers.{layer}"][:, 3] += signal * of
    return rows


def plant_examples(folder: Path, layer: int = 2, signal: float = 2.5, **extra: Any) -> Path:
    lengths = [1 + place % 4 for place in range(COUNT)]
    labels = torch.randint(2, (COUNT,), generator=torch.Generator().manual_seed(2))
    fields = [{"label": "yes" if label else "no", "at": place} for place, label in enumerate(labels.tolist())]
    for name, values in extra.items():
        for place, value in enumerate(values):
            fields[place][name] = value
    ids = torch.randint(10_000, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    return plant(folder, make_rows(lengths, labels, layer, signal=signal), lengths, ids=ids, fields=fields)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant_examples(tmp_path_factory.mktemp("planted") / "store")


@pytest.fixture(scope="module")
def found(planted: Path) -> Any:
    return lp.classify(planted, control=True, mdl=True)


def test_the_layer_that_alone_separates_the_classes_is_found(found: Any) -> None:
    single = {site.site: site for site in found.sites if site.site.startswith("layers.")}
    assert max(single, key=lambda name: single[name].accuracy) == "layers.2"
    assert single["layers.2"].accuracy > 0.85
    for name, site in single.items():
        if name != "layers.2":
            assert site.ci[0] < 0.6 and not site.tied
    assert "layers.2" in found.verdict.tied and found.verdict.chosen in found.verdict.tied
    assert set(found.verdict.tied) <= {"layers.2", "mix", "last4:joined", "last4:averaged"}
    assert single["layers.2"].compression > 1.1
    assert all(site.compression < 1 for name, site in single.items() if name != "layers.2")


def test_the_mix_leans_on_that_layer(found: Any) -> None:
    weights = dict(zip(found.mix.sites, found.mix.weights, strict=True))
    assert max(weights, key=lambda site: weights[site]) == "layers.2"
    assert weights["layers.2"] > 2 * max(value for site, value in weights.items() if site != "layers.2")
    assert sum(found.mix.weights) == pytest.approx(1, abs=1e-6)  # a softmax in float32
    assert found.mix.centre == pytest.approx(sum(place * w for place, w in enumerate(found.mix.weights)))


def test_the_mix_brings_layers_that_hardly_vary_to_one_scale(tmp_path: Path) -> None:
    far = 1000.13 + 1e-3 * np.random.default_rng(0).normal(size=(4000, 4))
    near = np.random.default_rng(1).normal(size=(4000, 4))
    values = [far.astype(np.float32), near.astype(np.float32)]
    store = plant(tmp_path / "store", {"layers.0": torch.from_numpy(values[0])}, [1] * 4000, ids=torch.arange(4000))
    task = make_task(lp.open(store), [place % 2 for place in range(4000)])
    feature, shares = learn_mix(values, ["layers.0", "layers.1"], task, 0)
    assert feature.factors is not None
    for value, share, factor in zip(values, shares, feature.factors, strict=True):
        train = value[task.sides == 0].astype(np.float64)
        assert share / factor == pytest.approx(np.sqrt(np.square(train - train.mean(0)).mean()), rel=1e-3)


def test_random_labels_sit_at_chance(found: Any) -> None:
    for site in found.sites:
        # two classes as frequent as each other, 80 test items: five standard deviations
        assert abs(site.control - 0.5) < 0.28
        assert site.selectivity == pytest.approx(site.accuracy - site.control)
    assert np.mean([site.control for site in found.sites]) < 0.62


def test_the_baselines_know_nothing_where_words_are_noise(found: Any) -> None:
    assert set(found.baselines) == {"majority", "tfidf"}
    assert found.baselines["tfidf"].ci[0] < 0.6
    assert not any("majority" in sentence for sentence in found.verdict.sentences)


def test_layers_that_say_the_same_are_tied(tmp_path: Path) -> None:
    lengths = [2] * COUNT
    labels = torch.randint(2, (COUNT,), generator=torch.Generator().manual_seed(2))
    rows = make_rows(lengths, labels, 2)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4)))[0]
    rows["layers.4"] = rows["layers.2"] @ rotation
    store = plant(tmp_path / "store", rows, lengths, ids=torch.arange(800))
    result = lp.classify(store, labels.tolist())
    assert {"layers.2", "layers.4"} <= set(result.verdict.tied)
    assert not {"layers.0", "layers.1", "layers.3"} & set(result.verdict.tied)
    assert any("cannot be told from the best" in sentence for sentence in result.verdict.sentences)


def test_where_nothing_is_planted_the_verdict_says_so(tmp_path: Path) -> None:
    result = lp.classify(plant_examples(tmp_path / "store", signal=0.0))
    assert any("cannot be told from the baseline majority" in sentence for sentence in result.verdict.sentences)


def test_results_become_csv_json_and_a_picture(found: Any, tmp_path: Path) -> None:
    with open(found.to_csv(tmp_path / "a.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["site"] for row in rows] == [*(site.site for site in found.sites), "majority", "tfidf"]
    assert float(rows[2]["accuracy"]) == found.sites[2].accuracy
    said = json.loads(found.to_json(tmp_path / "a.json").read_text())
    assert said["sites"][2]["site"] == "layers.2" and said["sites"][2]["ci"] == list(found.sites[2].ci)
    assert said["baselines"]["majority"]["accuracy"] and said["verdict"]["tied"] == list(found.verdict.tied)
    assert "layers.2" in found.table() and found.verdict.sentences[0] in found.table()
    found.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_the_same_seed_gives_the_same_numbers(planted: Path) -> None:
    one, two = (lp.classify(planted, sites="layers.2:4", seed=3) for _ in range(2))
    assert one.as_dict() == two.as_dict()


@pytest.mark.parametrize("pool", ["mean", "max", "cls", "last"])
def test_vectors_are_the_pooled_rows_of_the_drawn_examples(planted: Path, pool: str) -> None:
    store = lp.open(planted)
    task = make_task(store, "label", max_examples=50)
    assert len(task.examples) == 50
    assert np.array_equal(
        read_site(store, "layers.1", task, pool), store["layers.1"].pooled(pool)[task.examples].numpy()
    )


def test_the_last_four_are_joined_and_averaged(planted: Path) -> None:
    values = [np.full((2, 3), float(number)) for number in range(4)]
    assert joined_of("abcd").combine(values).shape == (2, 12)
    assert (average_of("abcd").combine(values) == 1.5).all()
    result = lp.classify(planted, pool="last4")
    assert [site.site for site in result.sites] == ["last4:joined", "last4:averaged"]
    assert result.probe.feature.sites == ("layers.1", "layers.2", "layers.3", "layers.4")


def test_a_split_field_and_a_group_are_kept_to(tmp_path: Path) -> None:
    split = ["train" if place % 2 else "test" for place in range(COUNT)]
    store = lp.open(plant_examples(tmp_path / "store", split=split, author=[place // 40 for place in range(COUNT)]))
    task = make_task(store, "label", split="split")
    assert all((task.sides[place] == 2) == (split[place] == "test") for place in range(COUNT))
    task = make_task(store, "label", group="author")
    assert all(len(set(task.sides[first : first + 40].tolist())) == 1 for first in range(0, COUNT, 40))
    with pytest.raises(OptionError, match="split and group"):
        make_task(store, "label", split="split", group="author")


def test_texts_of_the_same_tokens_are_on_one_side(tmp_path: Path) -> None:
    labels = torch.arange(60) % 2
    store = lp.open(plant(tmp_path / "store", make_rows([2] * 60, labels, 0), [2] * 60, ids=torch.arange(120) // 8))
    sides = make_task(store, labels.tolist()).sides
    assert all(len(set(sides[first : first + 4].tolist())) == 1 for first in range(0, 60, 4))
    task = make_task(store, (torch.arange(60) // 2 % 2).tolist(), split=["train", "test"] * 30)
    shared = {place // 4 for place in range(60) if task.sides[place] == 0}
    count = sum(task.sides[place] == 2 and place // 4 in shared for place in range(60))
    assert task.notes == (f"{count} examples of test with the same tokens as one of train.",)


def test_tokens_are_classified_by_a_label_each(tmp_path: Path) -> None:
    lengths = [3 + place % 3 for place in range(120)]
    total = sum(lengths)
    marks = torch.randint(2, (total,), generator=torch.Generator().manual_seed(6))
    maker = torch.Generator().manual_seed(7)
    rows = {f"layers.{i}": torch.randn(total, WIDTH, generator=maker) for i in range(3)}
    rows["layers.1"][:, 0] += 5 * marks
    starts = np.cumsum([0, *lengths])
    labels = [[None, *marks[starts[k] + 1 : starts[k + 1]].tolist()] for k in range(120)]
    ids = torch.randint(40, (total,), generator=maker)
    store = plant(tmp_path / "store", rows, lengths, ids=ids)
    result = lp.classify(store, labels, control=True)
    assert result.task.kind == "tokens" and result.task.pool is None
    assert result.task.num_train + result.task.num_dev + result.task.num_test == total - 120
    assert {site.site: site.accuracy > 0.9 for site in result.sites}["layers.1"]
    few = make_task(lp.open(store), labels, max_examples=120)
    assert 110 < len(few.labels) <= 120 and few.notes[0].startswith(f"{len(few.labels)} of {total - 120} items")
    whole = {one: len(labels[one]) - 1 for one in few.examples.tolist()}
    assert sum(whole.values()) == len(few.labels)
    task = make_task(lp.open(store), labels)
    assert len({(one, side) for one, side in zip(task.examples.tolist(), task.sides.tolist(), strict=True)}) == 120
    with pytest.raises(InputError, match="has 2 labels for 3 tokens"):
        lp.classify(store, [[0, 1]] * 120)
    with pytest.raises(OptionError, match="belong to tokens, which are not pooled"):
        lp.classify(store, labels, pool="cls")


def test_labels_that_are_of_no_use_are_refused(planted: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no record in .* has such a field: they have at, label"):
        lp.classify(planted, "topic")
    with pytest.raises(InputError, match="400 classes, and 240 items"):
        lp.classify(planted, "at")
    with pytest.raises(InputError, match=r"every item is 1. A classifier needs two classes"):
        lp.classify(planted, [1] * COUNT)
    with pytest.raises(InputError, match="1 of 400 examples have none, the first is example 7"):
        lp.classify(planted, [None if place == 7 else place % 2 for place in range(COUNT)])
    with pytest.raises(OptionError, match="3 values for 400 examples"):
        lp.classify(planted, [0, 1, 0])
    with pytest.raises(InputError, match="is no label: use text"):
        lp.classify(planted, [{"a": 1}] * COUNT)
    with pytest.raises(OptionError, match="pool='median': use mean"):
        lp.classify(planted, pool="median")
    with pytest.raises(InputError, match="in train every item is 0"):
        lp.classify(planted, [0] * 200 + [1] * 200, split=["train"] * 200 + ["test"] * 200)


def test_classes_that_train_hardly_has_are_said_in_words_and_in_no_warning(planted: Path) -> None:
    labels = ["often"] * 280 + [f"name {place}" for place in range(120)]
    sides = ["train"] * 60 + ["dev"] * 100 + ["test"] * 120 + ["train"] * 100 + ["test"] * 20
    assert lp.classify(planted, labels, sites="layers.2", split=sides, mdl=True).notes[:2] == (
        "Train lacks 20 of 121 classes, which no probe can say.",
        "100 of 121 classes have one item in train: little is learned of them.",
    )


def test_rows_that_are_not_finite_are_named(tmp_path: Path) -> None:
    labels = torch.arange(40) % 2
    rows = make_rows([2] * 40, labels, 1)
    rows["layers.1"][2 * 17 + 1, 4] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"'layers.1' in .*example 17 is not finite or has no rows \(1 item in all"
    ):
        lp.classify(plant(tmp_path / "store", rows, [2] * 40, ids=torch.arange(80)), labels.tolist())


def test_pooled_stores_give_examples_and_no_tokens(tmp_path: Path) -> None:
    labels = torch.randint(2, (COUNT,), generator=torch.Generator().manual_seed(2))
    rows = make_rows([1] * COUNT, labels, 2)
    store = plant(tmp_path / "store", rows, [1] * COUNT, ids=torch.arange(COUNT), pool="mean")
    result = lp.classify(store, labels.tolist())
    assert result.task.pool == "mean" and "layers.2" in result.verdict.tied
    with pytest.raises(OptionError, match="pooled by mean, and no row per token"):
        lp.classify(store, [[int(label)] for label in labels])
    with pytest.raises(OptionError, match=r"pool=.* one vector per example, pooled by mean\. Leave"):
        lp.classify(store, labels.tolist(), pool="cls")


def test_a_constant_site_is_left_out_with_a_note_and_refused_by_name(tmp_path: Path) -> None:
    labels = torch.randint(2, (COUNT,), generator=torch.Generator().manual_seed(2))
    rows = {"embeddings": torch.ones(COUNT, WIDTH), **make_rows([1] * COUNT, labels, 2, 3)}
    store = plant(tmp_path / "store", rows, [1] * COUNT, ids=torch.arange(COUNT))
    result = lp.classify(store, labels.tolist(), pool="cls")
    assert "embeddings" not in [site.site for site in result.sites]
    assert any(note.startswith("embeddings is left out: every vector of train is the same") for note in result.notes)
    assert lp.classify(store, labels.tolist(), pool="cls", sites=["*", "layers.*"]).notes == result.notes
    with pytest.raises(OptionError, match="the first token's vector there does not depend on the text"):
        lp.classify(store, labels.tolist(), pool="cls", sites=["embeddings", "layers.*"])


def test_an_untrained_store_of_other_texts_is_refused(planted: Path, tmp_path: Path) -> None:
    other = plant(tmp_path / "other", make_rows([2] * 20, torch.arange(20) % 2, 0), [2] * 20)
    with pytest.raises(OptionError, match="does not hold the texts of"):
        lp.classify(planted, untrained=lp.open(other))
    sure: Any = True
    with pytest.raises(OptionError, match="untrained=True: give a store of the same texts, or what makes one"):
        lp.classify(planted, untrained=sure)
    result = lp.classify(planted, sites="layers.2", untrained=lp.open(planted))
    assert result.baselines["untrained"].accuracy == result.sites[0].accuracy
    assert any("cannot be told from the baseline untrained" in sentence for sentence in result.verdict.sentences)
