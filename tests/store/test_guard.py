"""Arguments of the wrong kind are refused in words by every public function, and numbers of numpy are taken."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import layerprobe
from layerprobe.errors import LayerProbeError, OptionError

# what is wrong on purpose is not for the types to find
lp: Any = layerprobe
TEXTS = ["The kettle whistled.", "Who left?", "So it goes.", "A dog barks at night."]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("guard") / "acts"
    records = [{"text": text, "label": "ab"[place % 2]} for place, text in enumerate(TEXTS)]
    return lp.extract("demo", records, folder, sites=["layers.0", "layers.0.attention.weights"])


WRONG: dict[str, tuple[Callable[[Any], object], str]] = {
    "a folder": (lambda _: lp.load_classifier(None), "folder is None: give a path"),
    "decoders": (lambda _: lp.load_decoder(None), "folder is None: give a path"),
    "bins": (lambda _: lp.Histogram(None), "from None to 10.0"),
    "labels": (lambda store: lp.classify(store, labels=3), "labels is 3: give the name of a field, or a value per"),
    "a span of one": (lambda store: lp.classify(store, span=("a",)), r"span is \('a',\): give two fields"),
    "a span of three": (lambda store: lp.classify(store, span=("a", "b", "c")), "give two fields"),
    "control": (lambda store: lp.classify(store, control="no"), "control is 'no': use True or False"),
    "mdl": (lambda store: lp.classify(store, mdl="no"), "mdl is 'no': use True or False"),
    "rows": (lambda store: store.rows(sites=3), "no site 3 .* sites are named by texts"),
    "examples": (lambda store: lp.ExampleDataset(store, 3), "no site 3 .* sites are named by texts"),
    "a picture": (lambda store: lp.plot(store, path=3), "path is 3: give a path"),
    "a colour": (lambda store: lp.plot(store, color=["label"]), r"color is \['label'\]: use token"),
    "heads": (lambda store: lp.plot_attention(store, 0, heads=3), "heads is 3: give a list of whole numbers"),
    "an example": (lambda store: lp.plot_attention(store, [0]), r"no example \[0\]"),
    "attention": (lambda store: lp.report(store, "a.html", attention=0), "attention is 0: give a list"),
    "a page": (lambda store: lp.report(store, 3), "path is 3: give a path"),
    "fields": (lambda store: lp.report(store, "a.html", labels=["a"]), "labels is .* give the name of a field"),
    "a lens": (lambda _: lp.lens("demo", TEXTS, sites=3), "int is no site pattern: give a text such as 'layers.3'"),
    "an export": (lambda store: lp.export(store, 3), "out is 3: give a path"),
    "an array": (lambda store: store.where(label=np.array([1, 2])), "a field equals one value"),
    "a tensor": (lambda store: store.where(label=torch.tensor([1, 2])), "a field equals one value"),
    "a list": (lambda store: store.where(label=["a", "b"]), "no record has a list there; a field equals one value"),
}
WRONG_OF_RUNS: dict[str, tuple[Any, str]] = {
    "dtype": ([], r"no dtype '\[\]'"),
    "writers": (None, "writers is None: it must be a whole number"),
    "sites": (torch.tensor(2), "Tensor is no site pattern: give a text"),
    "tokenizer": ([], "list is not a fast tokenizer"),
    "keep": (2.0**-65, re.escape("from 2**-64 to 1")),
}


@pytest.mark.parametrize("what", WRONG)
def test_arguments_of_a_wrong_kind_are_refused_in_words(store: Any, what: str) -> None:
    call, said = WRONG[what]
    with pytest.raises(LayerProbeError, match=said):
        call(store)


@pytest.mark.parametrize("name", WRONG_OF_RUNS)
def test_options_of_a_wrong_kind_are_refused_before_a_run(tmp_path: Path, name: str) -> None:
    value, said = WRONG_OF_RUNS[name]
    with pytest.raises(LayerProbeError, match=said):
        lp.extract("demo", TEXTS, tmp_path / "acts", **{name: value})
    assert not (tmp_path / "acts").exists()


@pytest.mark.parametrize("batch", [None, 3, {}])
@pytest.mark.parametrize("measure", [lp.profile, lp.find_nonfinite])
def test_a_batch_that_names_nothing_is_refused(measure: Any, batch: Any) -> None:
    with pytest.raises(OptionError, match=r"give what the model is called with, by name"):
        measure(lp.load_model("demo"), batch)


def test_a_module_in_place_of_a_pattern_is_named_in_one_short_line() -> None:
    bert = lp.load_model("demo").model
    with pytest.raises(LayerProbeError, match=r"^BertLayer is no site pattern: ") as caught:
        lp.Probe(bert, bert.encoder.layer[0])
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    share = np.float32(0.5)
    store = lp.extract("demo", TEXTS, tmp_path / "acts", sites="layers.0", keep=share)
    assert store.kept.keep == 0.5
    with pytest.raises(OptionError, match="without a head"):
        lp.lens("demo", TEXTS, mask=share)


def test_a_list_that_a_record_has_is_found(tmp_path: Path) -> None:
    records = [{"text": text, "tags": ["a", "b"] if place else ["c"]} for place, text in enumerate(TEXTS)]
    store = lp.extract("demo", records, tmp_path / "acts", sites="layers.0", pool="mean")
    assert list(store.where(tags=["a", "b"])) == [1, 2, 3]
    assert list(store.where(tags=["z"])) == []


@pytest.mark.parametrize("kind", [lp.RowDataset, lp.ExampleDataset])
def test_data_sets_take_a_path_as_every_function_does(store: Any, kind: Any) -> None:
    path = kind(store.place.folder, "layers.0")
    opened = kind(store, "layers.0")
    assert [item["layers.0"].shape for item in path] == [item["layers.0"].shape for item in opened]


@pytest.mark.parametrize("heads", [[True], [0.0], ["1"], []])
def test_only_whole_numbers_are_heads(heads: Any) -> None:
    with pytest.raises(OptionError, match=r"heads is .*: give a list of whole numbers"):
        lp.ablate(heads=heads)


def test_a_seed_of_numpy_draws_what_one_of_python_does(store: Any, tmp_path: Path) -> None:
    said = [lp.check(store, seed=seed).to_json(tmp_path / "check.json").read_text() for seed in (np.int64(3), 3)]
    assert said[0] == said[1]
    one, other = (lp.audit(store, num_examples=2, seed=seed) for seed in (np.int64(3), 3))
    assert str(one) == str(other)
