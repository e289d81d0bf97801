"""How stores and examples are laid out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import layerprobe
from layerprobe.cli.views import describe_example, describe_status, describe_store
from layerprobe.models import load_model
from layerprobe.store.progress import StoreStatus, read_status

extract: Any = layerprobe.extract


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("views") / "acts"
    records = [{"text": "the quick fox", "source": "a\nb"}, {"text": "x " * 150}, {"text": "the\tdog\x1b[31m\n中"}]
    extract(load_model(str(tiny_model_folder), "cpu"), records, made, shard_size=20_000)
    return made


def test_a_store_is_told_by_state_model_counts_and_sites(folder: Path, tiny_model_folder: Path) -> None:
    said = describe_store(layerprobe.open(folder)).splitlines()
    size = sum(file.stat().st_size for file in folder.glob("shard-*"))
    assert said[0] == f"store     {folder}: complete"
    assert said[1] == f"model     {tiny_model_folder} (BertModel)"
    assert said[2] == f"holds     3 examples, 78 tokens, 3 shards, {size / 1000:.1f} kB"
    assert said[3] == "pool      none: a row per real token"
    assert said[4] == "cut       1 text longer than the maximum length"
    assert [line.split() for line in said[-4:]] == [
        [site, "token", "float32", "32"] for site in ("embeddings", "layers.0", "layers.1", "layers.2")
    ]


def test_an_unfinished_or_lossy_store_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("store.json", "index.json", "shard-000000.safetensors"):
        (copy / name).write_bytes((folder / name).read_bytes())
    lost = describe_store(layerprobe.open(copy))
    assert "2 shards lost, shard-000001.safetensors the first: run the same extraction again" in lost
    (copy / "index.json").unlink()
    assert "not complete: run the same extraction again to go on" in describe_store(layerprobe.open(copy))


def test_an_example_shows_tokens_and_the_norm_of_each_site(folder: Path) -> None:
    store: Any = layerprobe.open(folder)
    example = store.example(0)
    said = describe_example(example).splitlines()
    assert said[:3] == ["example 0: 5 tokens", "text    the quick fox", "source  a b"]
    rows = [line.split() for line in said[6:]]
    assert [row[2] for row in rows[:5]] == example.tokens == ["[CLS]", "the", "quick", "fox", "[SEP]"]
    for row in rows[:5]:
        norms = [round(store[site][0][int(row[0])].double().norm().item(), 2) for site in store.sites]
        assert [float(cell) for cell in row[3:]] == pytest.approx(norms, abs=0.011)  # two roundings to two digits
    assert rows[5][:2] == ["mean", "norm"]


def test_texts_are_shown_on_one_line_without_control_characters(folder: Path) -> None:
    store = layerprobe.open(folder)
    assert f"text    {'x ' * 100}...\n" in describe_example(store.example(1))
    shown = describe_example(store.example(2))
    assert "text    the dog [31m 中\n" in shown and "\x1b" not in shown


def test_a_thinned_store_says_what_it_keeps_and_shows_where_it_was(tiny_model_folder: Path, tmp_path: Path) -> None:
    made, texts = tmp_path / "acts", ["the quick brown fox over the lazy dog"] * 3
    store: Any = extract(load_model(str(tiny_model_folder), "cpu"), texts, made, tokens="nonspecial", keep=0.5)
    said = describe_store(store).splitlines()
    assert said[3:5] == [
        "pool      none: a row per token that was kept",
        "kept      nonspecial tokens, 0.5 of them; the rows of the others are not there",
    ]
    shown = describe_example(store.example(1)).splitlines()
    rows = [line.split() for line in shown[5:-1]]
    positions = store.positions(1).tolist()
    assert [int(row[0]) for row in rows] == positions != list(range(len(positions)))


def test_a_pooled_example_shows_one_norm_per_site(tiny_model_folder: Path, tmp_path: Path) -> None:
    store: Any = extract(load_model(str(tiny_model_folder), "cpu"), ["the dog"], tmp_path / "acts", pool="mean")
    said = describe_example(store.example(0))
    for site in store.sites:
        assert f"norm of {site}: {store[site][0].norm().item():.2f}" in said
    assert said.endswith("[CLS] the dog [SEP]")
    assert "pool      mean" in describe_store(store)


def test_a_wait_for_room_is_told_while_it_lasts_and_after() -> None:
    status = StoreStatus("acts", "running", 1, 2, 3, 4, waited_s=7300.0, is_waiting=True)
    assert "room      waiting for it on the disk, 2.0 hours so far" in describe_status(status)
    assert "room      waited 2.0 hours for it on the disk" in describe_status(replace(status, is_waiting=False))
    assert "room" not in describe_status(replace(status, is_waiting=False, waited_s=0.0))


def test_one_of_a_thing_is_not_told_as_several(tiny_model_folder: Path, tmp_path: Path) -> None:
    store: Any = extract(load_model(str(tiny_model_folder), "cpu"), ["the"], tmp_path / "acts", tokens="first")
    assert "holds     1 example, 1 token, 1 shard," in describe_store(store)
    assert describe_example(store.example(0)).startswith("example 0: 1 token\n")
    assert "done      1 of 1 shard, 1 of 1 example" in describe_status(read_status(tmp_path / "acts"))
