"""The report as a file: what is in its data, what its policy forbids, what is refused."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.errors import MissingExample, NonFiniteError, OptionError, SiteError, StoreError
from layerprobe.models import LoadedModel
from layerprobe.report import content
from planting import plant

LENGTHS = [3, 5, 1, 4, 7] * 6
FIELDS: list[dict[str, Any]] = [
    {"label": "red" if one % 3 else "blue", "year": 1900 + one, "id": f"n{one}", "spans": [one]} for one in range(30)
]
HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> &amp; \u2028 @POLICY@ @DATA@ \ud800"


def draw(seed: int = 0, count: int = sum(LENGTHS)) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


LAYERS = {"embeddings": draw(), "layers.0": draw(1), "layers.1": draw(2)}


@pytest.fixture
def store(tmp_path: Path) -> Any:
    return lp.open(plant(tmp_path / "acts", LAYERS, LENGTHS, fields=FIELDS))


class Blocks(HTMLParser):
    """A stock parser's view of a page: each element with its attributes, and the text of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_bytes().decode("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.texts.append((self.tags[-1][0], data))


def data_of(path: Path) -> dict[str, Any]:
    return json.loads(next(text for tag, text in Blocks(path).texts if tag == "script"))


def test_places_are_those_of_a_picture(store: Any, tmp_path: Path) -> None:
    lp.report(store, tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    picture = lp.plot(store, site=["embeddings", "layers.*"], points="examples")
    places = np.frombuffer(base64.b64decode(data["points"]["places"]), "<i2").reshape(3, 30, 2)
    assert data["sites"] == ["embeddings", "layers.0", "layers.1"]
    ordinals = [data["points"]["ordinals"][of] for of in data["points"]["of"]]
    assert tuple(ordinals) == picture.examples
    for found, panel in zip(places, picture.panels, strict=True):
        points = panel.points.numpy()
        middle, half = (points.min(0) + points.max(0)) / 2, np.ptp(points, axis=0).max() / 2
        assert np.abs(found / 32767 - (points - middle) / half).max() < 2e-5  # half a step of int16


def test_fields_become_colours_with_the_value_of_each_point(store: Any, tmp_path: Path) -> None:
    page = lp.report(store, tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    fields = {field["name"]: field for field in data["fields"]}
    # a list has no one colour; a name for each point tells nothing apart
    assert page.fields == ("label", "year", "norm") and list(fields) == ["id", "label", "year", "norm"]
    ordinals = [data["points"]["ordinals"][of] for of in data["points"]["of"]]
    label = fields["label"]
    assert [label["values"][code] for code in label["codes"]] == [FIELDS[one]["label"] for one in ordinals]
    assert fields["year"]["numbers"] == [1900 + one for one in ordinals]
    norms = np.frombuffer(base64.b64decode(fields["norm"]["packed"]), "<f4").reshape(3, 30)
    expected = store["layers.1"].pooled("mean").norm(dim=1)[ordinals].numpy()
    assert norms[2] == pytest.approx(expected, rel=1e-5)  # float32


@pytest.mark.parametrize("labels", ["topic", None])
def test_labels_always_colour_the_page_and_fields_left_out_are_named(tmp_path: Path, labels: str | None) -> None:
    many = {f"f{number:02}": number for number in range(23)}
    own = labels or "label"
    fields = [{**many, "a list": [one], own: "xy"[one % 2]} for one in range(30)]
    folder = plant(tmp_path / "acts", {"layers.0": draw()}, LENGTHS, fields=fields)
    page = lp.report(folder, tmp_path / "page.html", labels=labels)
    data = data_of(tmp_path / "page.html")
    assert page.fields == (*sorted(many)[:19], own, "norm") and data["first"] == own
    assert page.left_out == ("f19", "f20", "f21", "f22")
    assert "left out  f19, f20, f21, f22" in page.table()
    assert ["fields left out", "f19, f20, f21, f22"] in data["about"]["facts"]


def test_values_that_are_no_number_are_none(tmp_path: Path) -> None:
    fields = [{"grade": float("nan") if one % 2 else one % 3, "year": one if one % 5 else None} for one in range(30)]
    lp.report(plant(tmp_path / "acts", {"layers.0": draw()}, LENGTHS, fields=fields), tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    grade, year, _ = data["fields"]
    ordinals = [data["points"]["ordinals"][of] for of in data["points"]["of"]]
    assert [grade["values"][code] for code in grade["codes"]] == [
        "none" if one % 2 else str(one % 3) for one in ordinals
    ]
    assert year["numbers"] == [one if one % 5 else None for one in ordinals]


def test_long_values_that_begin_alike_are_as_many_colours(tmp_path: Path) -> None:
    fields = [{"kind": f"{'a path of many letters/' * 5}{one % 3}"} for one in range(30)]
    page = lp.report(plant(tmp_path / "acts", {"layers.0": draw()}, LENGTHS, fields=fields), tmp_path / "page.html")
    data = data_of(page.path)
    (field,) = [field for field in data["fields"] if field["name"] == "kind"]
    assert [value[-10:] for value in field["values"]] == [f" letters/{one}" for one in range(3)]
    assert all(len(value) == 83 for value in field["values"])
    ordinals = [data["points"]["ordinals"][of] for of in data["points"]["of"]]
    assert field["codes"] == [ordinal % 3 for ordinal in ordinals]


def test_few_fields_leave_none_out(store: Any, tmp_path: Path) -> None:
    page = lp.report(store, tmp_path / "page.html")
    assert page.left_out == () and "left out" not in page.table()
    assert not [name for name, _ in data_of(tmp_path / "page.html")["about"]["facts"] if name == "fields left out"]


def test_curves_and_maps_are_those_of_differences(store: Any, tmp_path: Path) -> None:
    lp.report(store, tmp_path / "page.html")
    depth = data_of(tmp_path / "page.html")["depth"]
    found = lp.differences(store, pairs="all")
    curves = {curve["name"]: curve["values"] for curve in depth["curves"]}
    assert curves["Mean norm"] == pytest.approx([site.mean_norm for site in found.sites], rel=1e-3)  # four digits
    pairs = {(pair.before, pair.after): pair for pair in found.pairs}
    step = pairs["layers.0", "layers.1"]
    assert curves["Turned from layer before"][0] is None
    assert curves["Turned from layer before"][2] == pytest.approx(step.cosine_distance, rel=1e-3)  # four digits
    maps = {one["name"]: np.array(one["values"]) for one in depth["heat"]}
    assert maps["Linear CKA"] == pytest.approx(np.array(found.cka), abs=1e-3)  # four digits
    assert (
        maps["Neighbours shared"][1, 2]
        == maps["Neighbours shared"][2, 1]
        == pytest.approx(step.neighbour_overlap, rel=1e-3)
    )  # four digits


def test_a_site_alone_has_points_and_no_depth(store: Any, tmp_path: Path) -> None:
    page = lp.report(store, tmp_path / "page.html", site="layers.0")
    assert page.sites == ("layers.0",) and page.parts == ()


def test_rows_have_a_token_and_a_position_each(tiny: LoadedModel, tmp_path: Path) -> None:
    texts = ["the quick fox", "the lazy dog", "the fox"]
    store = lp.extract(tiny.model, texts, tmp_path / "acts", tokenizer=tiny.tokenizer)
    page = lp.report(store, tmp_path / "page.html", points="rows")
    assert (
        page.kind == "rows"
        and page.num_points == store.num_tokens
        and page.fields[-3:]
        == (
            "position",
            "token",
            "norm",
        )
    )
    data = data_of(tmp_path / "page.html")
    fields = {field["name"]: field for field in data["fields"]}
    for number, of in enumerate(data["points"]["of"]):
        example = store.example(data["points"]["ordinals"][of])
        assert example.tokens is not None
        token = fields["token"]["values"][fields["token"]["codes"][number]]
        assert token == example.tokens[fields["position"]["numbers"][number]]
        assert data["points"]["texts"][of] == example.text


def test_classes_are_those_of_classify(store: Any, tmp_path: Path) -> None:
    page = lp.report(store, tmp_path / "page.html", labels="label")
    assert "classes" in page.parts
    classes = data_of(tmp_path / "page.html")["classes"]
    found = lp.classify(store, "label", sites=["embeddings", "layers.*"])
    expected = {one.site: one.accuracy for one in found.sites}
    expected |= {name: one.accuracy for name, one in found.baselines.items()}
    shown = {row["name"]: row["accuracy"] for row in classes["rows"]}
    assert shown == pytest.approx(expected, rel=1e-3)  # four digits
    assert classes["verdict"][: len(found.verdict.sentences)] == list(found.verdict.sentences)


def test_attention_is_within_a_step_of_what_is_stored(tiny: LoadedModel, tmp_path: Path) -> None:
    texts = ["the quick fox", "the lazy dog", "the fox", "the " * 60]
    sites = ["layers.*", "layers.1.attention.weights"]
    store = lp.extract(tiny.model, texts, tmp_path / "acts", tokenizer=tiny.tokenizer, sites=sites)
    lp.report(store, tmp_path / "page.html")
    attention = data_of(tmp_path / "page.html")["attention"]
    assert [one["ordinal"] for one in attention["examples"]] == [0, 1, 2]  # the fourth is long
    lp.report(store, tmp_path / "asked.html", attention=[-1, 1])
    for one in data_of(tmp_path / "asked.html")["attention"]["examples"]:
        weights = store["layers.1.attention.weights"][one["ordinal"]].float().numpy()
        (packed,) = one["maps"]
        found = np.frombuffer(base64.b64decode(packed["packed"]), np.uint8).reshape(weights.shape)
        assert np.abs(found / 255 * packed["top"] - weights).max() < packed["top"] / 255
        assert one["tokens"] == store.example(one["ordinal"]).tokens
    with pytest.raises(MissingExample):
        lp.report(store, tmp_path / "page.html", attention=[4])


def test_hostile_texts_neither_end_the_data_nor_become_elements(tmp_path: Path) -> None:
    calm, wild = tmp_path / "calm.html", tmp_path / "wild.html"
    for path, word in ((calm, "word"), (wild, HOSTILE)):
        fields = [{"label": word, word: one} for one in range(30)]
        lp.report(plant(tmp_path / path.stem, LAYERS, LENGTHS, fields=fields), path)
    assert Blocks(wild).tags[1:] == Blocks(calm).tags[1:] and len(Blocks(wild).texts) == 3
    policies = [dict(attrs).get("content") for _, attrs in Blocks(wild).tags if "http-equiv" in attrs]
    assert policies == [dict(attrs).get("content") for _, attrs in Blocks(calm).tags if "http-equiv" in attrs]
    names = [field["name"] for field in data_of(wild)["fields"]]
    assert any(name.startswith("</script><script>alert(1)") for name in names)


def test_the_policy_allows_the_pages_own_script_and_nothing_else(store: Any, tmp_path: Path) -> None:
    lp.report(store, tmp_path / "page.html")
    blocks = Blocks(tmp_path / "page.html")
    (policy,) = [attrs["content"] for tag, attrs in blocks.tags if "http-equiv" in attrs]
    assert policy is not None
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    texts = [text for tag, text in blocks.texts if tag == "script"]
    hashed = {
        "script-src": hashlib.sha256(texts[1].encode()).digest(),
        "style-src": hashlib.sha256(next(text for tag, text in blocks.texts if tag == "style").encode()).digest(),
    }
    assert rules["default-src"] == ["'none'"]
    for name, digest in hashed.items():
        assert rules[name] == [f"'sha256-{base64.b64encode(digest).decode()}'"]
    assert set(rules) == {
        "default-src",
        "script-src",
        "style-src",
        "base-uri",
        "form-action",
        "require-trusted-types-for",
        "trusted-types",
    }
    # nothing names another address, and nothing turns text into markup or code
    assert not [attrs for _, attrs in blocks.tags if {"src", "href", "style"} & set(attrs)]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|fetch\(|import\(", texts[1]
    )


def test_the_same_store_gives_the_same_page_and_no_path_of_the_machine(store: Any, tmp_path: Path) -> None:
    pages = []
    for name in ("one.html", "two.html"):
        lp.report(store, tmp_path / name, max_points=20)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1] and str(tmp_path).encode() not in pages[0]
    data = data_of(tmp_path / "one.html")
    assert len(data["points"]["of"]) == 20 and data["points"]["all"] == 30


def test_what_cannot_be_reported_is_refused_and_nothing_written(store: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(OptionError, match=r"'\.pdf' is not \.html or \.htm"):
        lp.report(store, tmp_path / "page.pdf")
    with pytest.raises(StoreError, match="there is no folder"):
        lp.report(store, tmp_path / "none" / "page.html")
    with pytest.raises(SiteError, match="holds no attention weights"):
        lp.report(store, page, attention=[0])
    with pytest.raises(SiteError, match=r"layers\.7"):
        lp.report(store, page, site="layers.7")
    with pytest.raises(OptionError, match="points='tokens'"):
        lp.report(store, page, points="tokens")
    with pytest.raises(OptionError, match=r"no record in .* has such a field"):
        lp.report(store, page, labels="colour")
    broken = {**LAYERS, "layers.0": draw(1).index_fill(0, torch.tensor([4]), float("nan"))}
    with pytest.raises(NonFiniteError, match=r"layers\.0"):
        lp.report(plant(tmp_path / "broken", broken, LENGTHS), page)
    assert not page.exists()
    page.mkdir()
    with pytest.raises(StoreError, match="cannot be written"):
        lp.report(store, page)


def test_weights_that_are_too_many_are_refused(tiny: LoadedModel, tmp_path: Path, monkeypatch: Any) -> None:
    sites = ["layers.*", "layers.*.attention.weights"]
    texts = ["the " * 60] * 3
    store = lp.extract(tiny.model, texts, tmp_path / "acts", tokenizer=tiny.tokenizer, sites=sites)
    monkeypatch.setattr(content, "_MOST_MAP_BYTES", 100_000)
    with pytest.raises(OptionError, match="take more than 0 MiB"):
        lp.report(store, tmp_path / "page.html", attention=[0, 1, 2])


def test_pooled_stores_are_reported(tmp_path: Path) -> None:
    layers = {name: draw(seed, 30) for seed, name in enumerate(("layers.0", "layers.1"))}
    folder = plant(tmp_path / "acts", layers, LENGTHS, pool="mean", fields=FIELDS)
    page = lp.report(folder, tmp_path / "page.html")
    assert page.num_points == 30 and page.parts == ("depth",)
    curves = [curve["name"] for curve in data_of(tmp_path / "page.html")["depth"]["curves"]]
    assert "Self-similarity" not in curves and "Mean norm" in curves


def test_a_site_where_all_points_are_the_same_is_left_out_with_a_word_unless_it_is_named(tmp_path: Path) -> None:
    layers = {name: draw(seed, 30) for seed, name in enumerate(("layers.0", "layers.1"))}
    layers = {"embeddings": torch.ones_like(layers["layers.0"]), **layers}
    folder = plant(tmp_path / "acts", layers, LENGTHS, pool="cls", fields=FIELDS)
    page = lp.report(folder, tmp_path / "page.html", labels="label")
    assert page.sites == ("layers.0", "layers.1") and page.constant == ("embeddings",)
    assert "left out  embeddings: all points are the same there" in str(page)
    data = data_of(tmp_path / "page.html")
    assert ["sites left out", "embeddings: all points are the same there"] in data["about"]["facts"]
    assert len(data["depth"]["curves"][0]["values"]) == 2
    assert [row["name"] for row in data["classes"]["rows"]][:2] == ["layers.0", "layers.1"]
    with pytest.raises(OptionError, match="a picture of 'embeddings': all 30 points are the same"):
        lp.report(folder, tmp_path / "page.html", site=["embeddings", "layers.*"])
