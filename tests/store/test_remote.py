"""Stores on an S3 server: the same bytes as in a folder, by few requests."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from elsewhere import OPTIONS, PATIENCE, SECOND, SHARD_BYTES, contents, copy_store
from layerprobe.analysis.features import read_site
from layerprobe.analysis.tasks import make_task
from layerprobe.cli.main import main
from layerprobe.errors import FormatError, MissingExample, OptionError, PlanError, StoreError
from layerprobe.models import LoadedModel
from layerprobe.store.format import load_header
from layerprobe.store.remote import RemotePlace
from layerprobe.store.writer import ShardWriter
from servers import Spoiler

ROOT = Path(__file__).parent.parent.parent


def list_puts(server: Spoiler) -> list[str]:
    return [request.path.rsplit("/", 1)[-1] for request in server.requests if request.method == "PUT"]


def test_an_extraction_puts_the_bytes_of_a_local_one(
    tiny: LoadedModel, plain_texts: list[str], place: RemotePlace, server: Spoiler, local: Any
) -> None:
    server.clear()
    store = lp.extract(tiny, plain_texts, place, **OPTIONS)
    assert store.is_complete and len(store) == len(plain_texts) and str(store.place) == str(place)
    assert contents(place) == contents(local.place)
    puts = list_puts(server)
    assert puts[0] == "store.json" and puts[-1] == "index.json"
    # each shard by one PUT, in its own order
    assert [name for name in puts if name.startswith("shard-")] == sorted(
        name for name in contents(place) if name.startswith("shard-")
    )
    assert server.count("POST") == 0


def test_a_writer_takes_a_place_as_it_is_connected(place: RemotePlace) -> None:
    checked = ShardWriter(place).place
    assert isinstance(checked, RemotePlace) and checked is not place
    assert checked._connected is not None and checked._connected is place._connected
    assert str(checked) == str(place) and checked.patience is place.patience


def test_every_value_is_the_local_one(
    plain_texts: list[str], tiny: LoadedModel, place: RemotePlace, tmp_path: Path, server: Spoiler
) -> None:
    weights = ["layers.0.attention.weights", "layers.1"]
    for pool, dtype, sites in ((None, "int8", "layers.*"), ("mean", "int8", "layers.*"), (None, None, weights)):
        name = f"{pool}-{dtype}"
        local = lp.extract(
            tiny, plain_texts, tmp_path / name, sites=sites, pool=pool, dtype=dtype, shard_size=SHARD_BYTES
        )
        elsewhere = RemotePlace(f"{place.url}/{name}", PATIENCE)
        copy_store(local, elsewhere)
        store = lp.open(elsewhere)
        for site in local.sites:
            for ours, theirs in zip(local[site], store[site], strict=True):
                assert torch.equal(ours.float(), theirs.float()) and ours.shape == theirs.shape
            for ordinal in (3, -1):
                assert torch.equal(local[site][ordinal].float(), store[site][ordinal].float())
        ours, theirs = local.example(5), store.example(5)
        assert (ours.tokens, ours.text, ours.fields) == (theirs.tokens, theirs.text, theirs.fields)
        assert torch.equal(ours.input_ids, theirs.input_ids)


def test_pooled_and_rows_are_the_local_ones(local: Any, place: RemotePlace) -> None:
    copy_store(local, place)
    store = lp.open(place)
    assert torch.equal(store["layers.1"].pooled("max"), local["layers.1"].pooled("max"))
    for shuffle in (False, True):
        ours = list(local["layers.2"].rows(7, shuffle=shuffle, seed=3 if shuffle else 0))
        theirs = list(store["layers.2"].rows(7, shuffle=shuffle, seed=3 if shuffle else 0))
        assert all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs)


def test_one_example_of_one_layer_costs_kilobytes(
    tiny: LoadedModel, place: RemotePlace, server: Spoiler, tmp_path: Path
) -> None:
    many = [f"the quick brown fox {number}" for number in range(1500)]
    local = lp.extract(tiny, many, tmp_path / "large", sites="layers.*")
    copy_store(local, place)
    shard_bytes = place.size("shard-000000.safetensors")
    assert local.num_shards == 1 and shard_bytes > 5_000_000
    store = lp.open(place)
    server.clear()
    first = store["layers.2"][17]
    # the size, the first 64 KiB, and the rows; what of the ordinals and offsets is beyond those
    assert len(server.requests) <= 5
    assert sum(request.sent_bytes for request in server.requests) < 64 * 1024 + 16 * len(many) + first.nbytes
    server.clear()
    second = store["layers.1"][800]
    assert [request.sent_bytes for request in server.requests] == [second.nbytes]
    assert torch.equal(first, local["layers.2"][17]) and torch.equal(second, local["layers.1"][800])


def test_whole_tensors_are_fetched_once_for_an_epoch(local: Any, place: RemotePlace, server: Spoiler) -> None:
    copy_store(local, place)
    store = lp.open(place)
    server.clear()
    assert sum(map(len, store["layers.1"].rows(5, shuffle=True))) == store.num_tokens
    # per shard: its size, its beginning, and the one tensor
    assert len(server.requests) == 3 * store.num_shards


def test_many_examples_in_their_order_are_fetched_by_shard(local: Any, place: RemotePlace, server: Spoiler) -> None:
    copy_store(local, place)
    store = lp.open(place)
    server.clear()
    assert len(list(store["layers.1"])) == len(store)
    assert len(server.requests) == 3 * store.num_shards


def test_whole_examples_in_their_order_and_searches_are_fetched_by_shard(
    local: Any, place: RemotePlace, server: Spoiler
) -> None:
    copy_store(local, place)
    store = lp.open(place)
    server.clear()
    assert [example.text for example in store] == [example.text for example in local]
    # per shard: its size, its beginning, each site, ids, and where records begin and what they are
    assert len([request for request in server.requests if "shard-" in request.path]) == 8 * store.num_shards
    store = lp.open(place)
    assert list(store.where(token="fox")) == list(local.where(token="fox"))
    server.clear()
    assert list(store.where(word="lazy dog")) == list(local.where(word="lazy dog"))
    assert not server.requests  # the ids are here


def test_records_of_many_examples_are_fetched_by_shard(local: Any, place: RemotePlace, server: Spoiler) -> None:
    copy_store(local, place)
    store = lp.open(place)
    labels = [number % 2 for number in range(len(store))]
    server.clear()
    assert make_task(store, labels).words == make_task(local, labels).words
    # per shard: its size, its beginning, ids, and where records begin and what they are
    assert len([request for request in server.requests if "shard-" in request.path]) == 5 * store.num_shards
    tokens = make_task(store, [[row % 2 for row in range(len(store.input_ids(one)))] for one in store.ordinals()])
    server.clear()
    assert (read_site(store, "layers.1", tokens, None) == read_site(local, "layers.1", tokens, None)).all()
    assert len(server.requests) == store.num_shards


def test_opening_a_complete_store_reads_no_shard(local: Any, place: RemotePlace, server: Spoiler) -> None:
    copy_store(local, place)
    server.clear()
    assert len(lp.open(place)) == len(local)
    assert not [request for request in server.requests if "shard-" in request.path]


def test_a_run_goes_on_with_what_is_missing(
    tiny: LoadedModel, plain_texts: list[str], place: RemotePlace, server: Spoiler, local: Any
) -> None:
    copy_store(local, place)
    place.remove("index.json")
    place.remove(SECOND)
    part = lp.open(place)
    assert not part.is_complete and len(part) < len(local)
    with pytest.raises(MissingExample, match=r"no example \d+ in s3://.*/acts yet: the run is not complete"):
        part["layers.0"][local.catalog.shards[1].first_example]
    server.clear()
    lp.extract(tiny, plain_texts, place, **OPTIONS)
    assert list_puts(server) == [SECOND, "index.json"]
    assert contents(place) == contents(local.place)


def test_a_damaged_shard_is_named_and_made_again(
    tiny: LoadedModel, plain_texts: list[str], place: RemotePlace, local: Any
) -> None:
    copy_store(local, place)
    sound = contents(place)[SECOND]
    place.commit(SECOND, [sound[:-1]])
    with pytest.raises(FormatError, match=rf"s3://.*/acts/{SECOND}: holds [\d,]+ bytes, its header asks for"):
        lp.open(place)["layers.0"].pooled()
    place.remove("index.json")
    lp.extract(tiny, plain_texts, place, **OPTIONS)
    assert contents(place)[SECOND] == sound


def test_a_flipped_bit_is_found_where_a_whole_tensor_is_read(local: Any, place: RemotePlace) -> None:
    copy_store(local, place)
    damaged = bytearray(contents(place)[SECOND])
    damaged[load_header(local.place, SECOND).tensors["layers.1"].stop - 1] ^= 1
    place.commit(SECOND, [bytes(damaged)])
    store = lp.open(place)
    with pytest.raises(FormatError, match=rf"{SECOND}: the bytes of 'layers\.1' are not those that were written"):
        store["layers.1"].pooled()
    assert torch.equal(store["layers.2"].pooled(), local["layers.2"].pooled())
    # an example is a range, which no checksum covers; what is known to be damaged is not handed out
    shard = local.catalog.shards[1]
    examples = range(shard.first_example, shard.first_example + shard.num_examples)
    with pytest.raises(FormatError, match="are not those that were written"):
        store["layers.1"][examples[0]]
    store = lp.open(place)
    same = [torch.equal(store["layers.1"][ordinal], local["layers.1"][ordinal]) for ordinal in examples]
    assert same.count(False) == 1, same
    # and what opens a store without checks asked for none
    assert lp.open(place, check=False)["layers.1"].pooled().shape == local["layers.1"].pooled().shape


def test_another_run_and_other_files_are_refused(
    tiny: LoadedModel, plain_texts: list[str], place: RemotePlace, local: Any
) -> None:
    other = RemotePlace(f"{place.url}-other", PATIENCE)
    other.commit("notes.txt", [b"mine"])
    with pytest.raises(StoreError, match=r"-other: is not a store: it holds 'notes\.txt'"):
        lp.extract(tiny, plain_texts, other, **OPTIONS)
    copy_store(local, place)
    with pytest.raises(PlanError, match=r"s3://.*: holds another run \(dtype: 'float16' there, 'float32' here"):
        lp.extract(tiny, plain_texts, place, **{**OPTIONS, "dtype": "float32"})
    with pytest.raises(OptionError, match="wait_for_space goes with a local folder"):
        lp.extract(tiny, plain_texts, place, wait_for_space=True, **OPTIONS)
    with (
        pytest.raises(StoreError, match=r"s3://.*/acts: holds another run\. Choose an empty"),
        lp.Probe(tiny.model, "layers.0", to=place.url),
    ):
        pass


def test_overwrite_replaces_another_run(
    tiny: LoadedModel, plain_texts: list[str], place: RemotePlace, local: Any
) -> None:
    lp.extract(tiny, plain_texts, place, **{**OPTIONS, "dtype": "float32", "shard_size": SHARD_BYTES // 2})
    lp.extract(tiny, plain_texts, place, overwrite=True, **OPTIONS)
    assert contents(place) == contents(local.place)


def test_a_place_without_a_store_is_no_store(place: RemotePlace) -> None:
    with pytest.raises(StoreError, match=r"s3://bucket-\d+/deep/acts: does not exist"):
        lp.open(place)
    place.commit("notes.txt", [b"mine"])
    with pytest.raises(StoreError, match=r"is not a store: it has no store\.json"):
        lp.open(place)


def test_a_probe_fills_a_store(tiny: LoadedModel, place: RemotePlace) -> None:
    batch = tiny.tokenizer(["the fox", "over the lazy dog"], padding=True, return_tensors="pt")
    with torch.inference_mode(), lp.Probe(tiny.model, "layers.*", to=place.url) as probe:
        tiny.model(**batch)
    del probe
    with torch.inference_mode(), lp.Probe(tiny.model, "layers.1") as probe:
        tiny.model(**batch)
    store = lp.open(place)
    assert store.is_complete
    for ordinal, mask in enumerate(batch["attention_mask"].bool()):
        assert torch.equal(store["layers.1"][ordinal], probe["layers.1"][ordinal][mask])


def test_the_command_line_takes_urls(
    tiny_model_folder: Path,
    plain_texts: list[str],
    place: RemotePlace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["layerprobe", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert not stopped.value.code, captured.err
        return captured.out

    (tmp_path / "a.txt").write_text("\n".join(text for text in plain_texts if text), encoding="utf-8")
    said = run("extract", str(tiny_model_folder), str(tmp_path / "a.txt"), "-o", place.url, "--device", "cpu")
    assert f"store     {place}: 1 shard" in said and "space not checked there" in said
    said = run("info", place.url)
    assert f"store     {place}: complete" in said and "11 examples" in said
    assert "[CLS]" in run("show", place.url, "-1")


FORKED = """
import os, sys, torch
import layerprobe as lp

store = lp.open(sys.argv[1])
expected = [rows.clone() for rows in store["layers.1"].rows(7)]
one = store["layers.2"][3].clone()
child = os.fork()
if child == 0:
    same = all(map(torch.equal, expected, store["layers.1"].rows(7))) and torch.equal(one, store["layers.2"][3])
    os._exit(0 if same and torch.equal(lp.open(sys.argv[1])["layers.2"][3], one) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_forked_process_reads_on_with_connections_of_its_own(local: Any, place: RemotePlace) -> None:
    copy_store(local, place)
    command = [sys.executable, "-W", "ignore", "-c", FORKED, place.url]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_store_can_be_pickled(local: Any, place: RemotePlace) -> None:
    copy_store(local, place)
    store = lp.open(place)
    store["layers.1"].pooled()
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again["layers.1"].pooled(), local["layers.1"].pooled())
