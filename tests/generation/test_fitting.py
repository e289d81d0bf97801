"""Decoders that learn to read a layer, on stores of which it is known what each layer holds."""

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from layerprobe.errors import InputError, OptionError, SiteError
from layerprobe.generation.targets import choose_types, find_targets, split_examples
from layerprobe.models import LoadedModel
from planting import IndexedColumn, plant

TYPES, LENGTH = 6, 3
SMALL: dict[str, Any] = {"width": 64, "num_layers": 1, "max_length": 8, "batch_size": 16, "progress": False}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three random tokens an example: layer 0 says which and where, layer 1 is noise."""
    maker = torch.Generator().manual_seed(0)
    every = torch.cartesian_prod(*[torch.arange(TYPES)] * LENGTH)
    ids = every[torch.randperm(len(every), generator=maker)].flatten()
    place = torch.arange(len(ids)) % LENGTH
    told = torch.cat([torch.nn.functional.one_hot(ids, TYPES), torch.nn.functional.one_hot(place, LENGTH)], 1)
    sites = {"layers.0": told * 50.0 - 3, "layers.1": torch.randn(len(ids), 8, generator=maker)}
    fields = [{"other": f"field {one}"} for one in range(len(every))]
    folder = tmp_path_factory.mktemp("planted") / "acts"
    return lp.open(plant(folder, sites, [LENGTH] * len(every), ids=ids + 10, fields=fields))


@pytest.fixture(scope="module")
def found(store: Any) -> Any:
    return lp.fit_decoder(store, epochs=16, learning_rate=8e-3, **SMALL)


def test_a_layer_that_tells_is_read_and_noise_is_not(found: Any) -> None:
    told, noise = found.layers
    assert [told.site, noise.site, found.baseline.site] == ["layers.0", "layers.1", "none"]
    assert told.accuracy > 0.95 and told.exact > 0.9 and told.loss < 0.3
    # the end is certain, each token one of six
    chance = LENGTH * math.log(TYPES) / (LENGTH + 1)
    for blind in (noise, found.baseline):
        assert blind.accuracy < 0.6 and blind.exact < 0.2 and blind.loss > 0.9 * chance
    assert found.num_train + found.num_test == TYPES**LENGTH and found.num_types == TYPES


def test_what_is_read_is_what_was_written(found: Any, store: Any) -> None:
    examples = list(found.test)
    read = found.read(store, "layers.0", examples)
    right = [one.ids == tuple(store.input_ids(one.example).tolist()) for one in read]
    assert [one.example for one in read] == examples
    assert sum(right) / len(right) == found.layers[0].exact
    with pytest.raises(SiteError, match=r"no decoder for 'layers.7': there are those of layers.0, layers.1"):
        found.read(store, "layers.7", 0)


def test_numbers_are_those_of_the_seed_and_of_nothing_else(store: Any) -> None:
    torch.manual_seed(5)
    first = lp.fit_decoder(store, layer=0, epochs=1, **SMALL)
    torch.manual_seed(6)
    state = torch.random.get_rng_state()
    again = lp.fit_decoder(store, layer="layers.0", epochs=1, **SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.as_dict() == again.as_dict()
    other = lp.fit_decoder(store, layer=0, epochs=1, seed=1, **SMALL)
    assert other.test != first.test and other.layers[0].loss != first.layers[0].loss
    beside = lp.fit_decoder(store, layer=1, epochs=1, **SMALL)
    assert beside.baseline == first.baseline


def test_an_examples_tokens_are_never_on_both_sides(tmp_path: Path) -> None:
    ids = torch.arange(30).repeat_interleave(2).repeat(3)
    store = lp.open(plant(tmp_path / "acts", {"layers.0": torch.ones(180, 2)}, [2] * 90, ids=ids))
    split = split_examples(store, None, 0.3, 0)
    sides = [{tuple(store.input_ids(one).tolist()) for one in side} for side in (split.train, split.test)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == len(split.train) + len(split.test) == 30
    assert len(split_examples(store, 25, 0.2, 0).train) == 20


def test_only_the_targets_of_drawn_examples_are_looked_at(store: Any) -> None:
    split = split_examples(store, 40, 0.25, 0)
    drawn = [*split.train, *split.test]
    assert len(set(drawn)) == 40 and len(split.test) == 10
    # of the others anything may be said
    given: Any = [[7] if one in drawn else None for one in range(len(store))]
    found = lp.fit_decoder(store, layer=0, targets=given, max_examples=40, test_share=0.25, epochs=1, **SMALL)
    assert (found.num_train, found.num_test, found.num_types) == (30, 10, 1) and set(found.test) == set(split.test)


def test_examples_are_drawn_without_keeping_the_ids_of_all(tmp_path: Path) -> None:
    ids = torch.randint(300, 10_000, (100_000,), generator=torch.Generator().manual_seed(0))
    many = lp.open(plant(tmp_path / "many", {"layers.0": torch.ones(100_000, 1)}, [50] * 2000, ids=ids))
    list(map(many.input_ids, many.ordinals()))  # what a store keeps for itself
    tracemalloc.start()
    split = split_examples(many, 100, 0.1, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(split.train) + len(split.test) == 100
    assert peak < 200 * 2000  # bytes; 50 numbers as a tuple take 2,000 or so


def test_targets_are_own_texts_fields_or_whatever_is_given(tiny: LoadedModel, tmp_path: Path) -> None:
    records = [{"text": "the quick fox", "answer": "dog"}, {"text": "a lazy dog.", "answer": "the fox"}]
    store = lp.extract(tiny, records, tmp_path / "acts", sites="layers.0", progress=False)

    def said(targets: Any, length: int = 9) -> list[str]:
        return [tiny.tokenizer.decode(ids) for ids in find_targets(store, targets, length, range(2)).ids.values()]

    assert said(None) == ["the quick fox", "a lazy dog."]
    assert said("answer") == ["dog", "the fox"]
    assert said(["brown", "over"]) == ["brown", "over"]
    mixed: Any = IndexedColumn(["brown", "over"], [1, 0])
    assert said(mixed) == ["brown", "over"]
    assert find_targets(store, [[7, 8], [9]], 9, range(2)).ids == {0: (7, 8), 1: (9,)}
    assert said(None, 1) == ["the", "a"] and find_targets(store, None, 1, range(2)).num_cut == 2
    assert choose_types(find_targets(store, [[7, 8, 7], [9, 9, 9]], 9, range(2)), [0, 1], 2) == [9, 7]
    with pytest.raises(InputError, match=r"targets='genre' of .*: example 0 has no such field but text, .*\. Name"):
        said("genre")
    with pytest.raises(OptionError, match="targets: 1 for 2 examples"):
        said(["one"])
    with pytest.raises(InputError, match="that of example 0 is 5"):
        said([5, 6])


def test_a_token_that_no_decoder_can_write_counts_as_wrong(store: Any) -> None:
    few = lp.fit_decoder(store, layer=0, epochs=3, learning_rate=8e-3, max_types=1, **SMALL)
    assert few.num_types == 1
    real = [store.input_ids(one).tolist() for one in few.test]
    word = few.decoders["layers.0"].types[0]
    most = sum(row.count(word) + 1 for row in real) / sum(len(row) + 1 for row in real)
    assert few.layers[0].accuracy <= most


def test_what_cannot_be_is_one_clear_error(store: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="width is 50: heads are 32 wide"):
        lp.fit_decoder(store, width=50)
    with pytest.raises(OptionError, match="epochs is 0"):
        lp.fit_decoder(store, epochs=0)
    with pytest.raises(OptionError, match=r"test_share=1\.5"):
        lp.fit_decoder(store, test_share=1.5)
    with pytest.raises(OptionError, match=r"no device 'gpu' here: .* Use 'cpu', 'cuda' or 'cuda:1'\.$"):
        lp.fit_decoder(store, device="gpu")
    with pytest.raises(SiteError, match="layers are 0 to 1"):
        lp.fit_decoder(store, layer=4)
    with pytest.raises(InputError, match="has 3 different examples; 20 are the least"):
        lp.fit_decoder(plant(tmp_path / "small", {"layers.0": torch.ones(6, 2)}, [2] * 3, ids=torch.arange(6)))
    with pytest.raises(InputError, match=r"the targets of .* are empty"):
        lp.fit_decoder(store, targets=[[]] * len(store))
    pooled = plant(tmp_path / "pooled", {"layers.0": torch.ones(30, 2)}, [2] * 30, pool="mean")
    with pytest.raises(OptionError, match="its sites have one vector per example"):
        lp.fit_decoder(pooled)


def test_the_result_is_a_table_files_and_a_picture(found: Any, tmp_path: Path) -> None:
    assert found.table().splitlines()[-1].endswith("6 types") and "  train loss\n" in found.table()
    written = json.loads(found.to_json(tmp_path / "read.json").read_text())
    assert written["baseline"]["site"] == "none" and "decoders" not in written
    lines = found.to_csv(tmp_path / "read.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["site", "layers.0", "layers.1", "none"]
    found.plot(tmp_path / "read.png")
    assert (tmp_path / "read.png").stat().st_size > 5000
