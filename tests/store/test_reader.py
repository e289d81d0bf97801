"""Reading a store back, against the tensors that were written and float64 numpy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import layerprobe
from layerprobe.errors import FormatError, MissingExample, OptionError, SiteError, StoreError
from layerprobe.store.format import read_header

WriteStore = Callable[..., Any]
SECOND = "shard-000001.safetensors"
# what a site gives may be a tensor or ScaledRows; the tests know which
open_store: Callable[[Path], Any] = layerprobe.open


def test_each_example_comes_back_by_index_and_by_iteration(write_store: WriteStore) -> None:
    written = write_store()
    store = open_store(written.folder)
    view = store["layers.0"]
    assert len(store) == len(view) == 5 and store.num_tokens == 13 and store.num_shards == 2
    assert store.is_complete and store.sites == ["layers.0", "pooler"]
    for ordinal, rows in enumerate(written.rows):
        assert torch.equal(view[ordinal], rows)
        assert torch.equal(view[ordinal - 5], rows)
        assert torch.equal(store["pooler"][ordinal], written.pooled[ordinal])
    assert all(torch.equal(a, b) for a, b in zip(view, written.rows, strict=True))
    assert [example.index for example in store] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "index", [slice(None), slice(1, 4), slice(None, None, -2), slice(9, 12), [4, 0, 0, -1], (2,), [], range(2)]
)
def test_slices_and_lists_give_lists(write_store: WriteStore, index: Any) -> None:
    written = write_store()
    expected = written.rows[index] if isinstance(index, slice) else [written.rows[place] for place in index]
    found = open_store(written.folder)["layers.0"][index]
    assert isinstance(found, list)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_arrays_and_tensors_of_ordinals_index_like_lists(write_store: WriteStore) -> None:
    written = write_store()
    view = open_store(written.folder)["layers.0"]
    for index in (np.array([3, 1]), torch.tensor([3, 1])):
        found = view[index]
        assert len(found) == 2 and torch.equal(found[0], written.rows[3]) and torch.equal(found[1], written.rows[1])
    for index in (3, np.int64(3), torch.tensor(3)):
        assert torch.equal(view[index], written.rows[3])


@pytest.mark.parametrize("index", [[True, False], np.array([True] * 5), True, [0.0, 1.0]])
def test_a_mask_is_no_index(write_store: WriteStore, index: Any) -> None:
    view = open_store(write_store().folder)["layers.0"]
    with pytest.raises(OptionError, match="indexed by ordinals"):
        view[index]


@pytest.mark.parametrize("index", [1.7, 1.0, "1", None, torch.tensor(1.7)], ids=repr)
def test_what_is_no_whole_number_is_no_index(write_store: WriteStore, index: Any) -> None:
    view = open_store(write_store().folder)["layers.0"]
    with pytest.raises(OptionError, match="examples are known by whole numbers"):
        view[index]


def test_what_is_read_is_a_view_and_writing_to_it_leaves_the_file(write_store: WriteStore) -> None:
    written = write_store()
    store = open_store(written.folder)
    first, again = store["layers.0"][0], store["layers.0"][0]
    assert first.data_ptr() == again.data_ptr()
    whole = next(store.iter_shards()).tensor("layers.0")
    assert whole.data_ptr() <= first.data_ptr() < whole.data_ptr() + whole.nbytes
    before = (written.folder / "shard-000000.safetensors").read_bytes()
    first.fill_(9)
    assert (written.folder / "shard-000000.safetensors").read_bytes() == before
    assert torch.equal(open_store(written.folder)["layers.0"][0], written.rows[0])


def numpy_pool(rows: Any, pool: str) -> Any:
    if len(rows) == 0:
        return np.full(rows.shape[1], np.nan)
    return {"mean": rows.mean(0), "max": rows.max(0), "cls": rows[0], "last": rows[-1]}[pool]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pool", ["mean", "max", "cls", "last"])
def test_pooled_agrees_with_numpy_in_float64(write_store: WriteStore, pool: str, dtype: torch.dtype) -> None:
    written = write_store(((3, 0, 5), (1, 40)), dtype)
    found = open_store(written.folder)["layers.0"].pooled(pool)
    expected = np.stack([numpy_pool(rows.double().numpy(), pool) for rows in written.rows])
    assert found.dtype == torch.float32 and found.shape == (5, 8)
    np.testing.assert_allclose(
        found.numpy(), expected, rtol=1e-6, atol=1e-6
    )  # a float32 sum of at most 40 values near 1


def test_pooled_of_a_pooled_site_is_what_was_stored(write_store: WriteStore) -> None:
    written = write_store(pool="mean")
    view = open_store(written.folder)["pooler"]
    assert torch.equal(view.pooled("mean"), written.pooled)
    with pytest.raises(OptionError, match=r"'pooler' has one vector per example.*mean.* not .*'max'"):
        view.pooled("max")
    with pytest.raises(OptionError, match="no pool 'median': use mean, max, cls, last"):
        view.pooled("median")


def test_pooled_of_a_site_pooled_by_a_callable_needs_no_name(write_store: WriteStore) -> None:
    written = write_store(pool="mine.first_two#0123456789abcdef")
    view = open_store(written.folder)["pooler"]
    assert torch.equal(view.pooled(), written.pooled)
    assert torch.equal(view.pooled("mine.first_two#0123456789abcdef"), written.pooled)
    with pytest.raises(OptionError, match=r"'pooler' has one vector per example.*first_two.* not .*'mean'"):
        view.pooled("mean")


def test_pooled_of_a_vector_per_example_in_an_unpooled_store_takes_no_pool(write_store: WriteStore) -> None:
    written = write_store()
    view = open_store(written.folder)["pooler"]
    assert torch.equal(view.pooled(), written.pooled)
    with pytest.raises(
        OptionError, match=r"'pooler' has one vector per example, as the model makes it, and not by 'cls'"
    ):
        view.pooled("cls")


def test_pooled_without_a_name_is_the_mean(write_store: WriteStore) -> None:
    view = open_store(write_store().folder)["layers.0"]
    torch.testing.assert_close(view.pooled(), view.pooled("mean"), rtol=0, atol=0, equal_nan=True)  # the same sums


def sorted_rows(rows: torch.Tensor) -> list[list[float]]:
    return sorted(rows.tolist())


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 4096, 10**6])
def test_rows_gives_every_row_exactly_once(write_store: WriteStore, shuffle: bool, batch_size: int) -> None:
    written = write_store(((3, 0, 5), (1, 2000), (1500, 64)))
    batches = list(open_store(written.folder)["layers.0"].rows(batch_size, shuffle=shuffle))
    expected = torch.cat(written.rows)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 0 < len(batches[-1]) <= batch_size
    assert sorted_rows(torch.cat(batches)) == sorted_rows(expected)


def test_the_order_of_rows_is_a_function_of_the_seed(write_store: WriteStore) -> None:
    view = open_store(write_store(((900, 800), (700, 900))).folder)["layers.0"]

    def order(**options: Any) -> torch.Tensor:
        return torch.cat(list(view.rows(100, **options)))

    assert torch.equal(order(shuffle=True, seed=3), order(shuffle=True, seed=3))
    assert not torch.equal(order(shuffle=True, seed=3), order(shuffle=True, seed=4))
    # rows of the second shard come among the first batches
    stored = torch.cat([shard.tensor("layers.0") for shard in view.catalog.iter_shards()])
    assert torch.equal(order(), stored)
    assert not torch.equal(order(shuffle=True)[:100], stored[:100])


def test_rows_of_a_pooled_site_are_its_vectors(write_store: WriteStore) -> None:
    written = write_store()
    assert sorted_rows(torch.cat(list(open_store(written.folder)["pooler"].rows(2)))) == sorted_rows(written.pooled)


def test_rows_are_copies(write_store: WriteStore) -> None:
    store = open_store(write_store().folder)
    before = store["layers.0"][0].clone()
    for batch in store["layers.0"].rows(2):
        batch.fill_(5)
    assert torch.equal(store["layers.0"][0], before)


def test_a_batch_size_below_one_is_refused(write_store: WriteStore) -> None:
    with pytest.raises(OptionError, match="batch_size is 0"):
        open_store(write_store().folder)["layers.0"].rows(0)


def test_an_unfinished_store_reads_what_is_there(write_store: WriteStore) -> None:
    written = write_store(((3, 0, 5), (1, 4), (2, 2)), complete=False)
    (written.folder / SECOND).unlink()
    store = open_store(written.folder)
    assert not store.is_complete and "incomplete" in repr(store)
    assert list(store.ordinals()) == [0, 1, 2, 5, 6] and len(store) == 5
    assert torch.equal(store["layers.0"][6], written.rows[6])
    with pytest.raises(
        MissingExample, match=r"no example 3 in .* yet: the run is not complete and has 5 examples so far"
    ):
        store["layers.0"][3]
    with pytest.raises(LookupError, match="yet"):
        store.example(7)


def test_a_store_without_shards_is_empty_not_broken(write_store: WriteStore) -> None:
    written = write_store(complete=False)
    for file in written.folder.glob("shard-*"):
        file.unlink()
    store = open_store(written.folder)
    assert len(store) == 0 and list(store["layers.0"].rows()) == [] and store["layers.0"].pooled().shape == (0, 8)
    with pytest.raises(MissingExample, match="no example 0"):
        store.example(0)


@pytest.mark.parametrize("ordinal", [5, -6, 10**12])
def test_an_example_beyond_a_complete_store_is_missing(write_store: WriteStore, ordinal: int) -> None:
    with pytest.raises(MissingExample, match=f"no example {ordinal} in .*: it holds 0 to 4"):
        open_store(write_store().folder).example(ordinal)


@pytest.mark.parametrize("ordinal", ["0", 1.0, None, [0]])
def test_an_ordinal_that_is_no_whole_number_is_refused(write_store: WriteStore, ordinal: Any) -> None:
    store = open_store(write_store().folder)
    for read in (store.example, store.input_ids, store.positions, store.record):
        with pytest.raises(OptionError, match=r"no example .* in .*: examples are known by whole numbers"):
            read(ordinal)


def test_a_site_that_is_not_stored_is_named_with_those_that_are(write_store: WriteStore) -> None:
    with pytest.raises(SiteError, match=r"no site 'layers\.1' in .*: it holds layers\.0, pooler"):
        open_store(write_store().folder)["layers.1"]


@pytest.mark.parametrize(
    ("site", "why"),
    [
        ("layers.-2", r"negatives count from the last layer that is stored"),
        ("layers.-1.ffn.act", r"negatives count from the last layer that is stored"),
        ("encoder.layers.-1", r"negatives count from the last layer that is stored"),
        ("layers.-1:", "it"),
        (3, r"sites are named by texts\. Examples are read by store\.example\(3\)"),
        (["layers.0"], r"sites are named by texts, one at a time"),
        (None, r"sites are named by texts, one at a time"),
    ],
)
def test_what_cannot_name_a_site_of_a_store_is_refused_with_those_that_are(
    write_store: WriteStore, site: Any, why: str
) -> None:
    store = open_store(write_store().folder)
    calls: list[Callable[[], Any]] = [lambda: store[site], lambda: store.where(id=0).rows(site)]
    if isinstance(site, str):
        calls += [lambda: store.rows(sites=site), lambda: store.difference("layers.0", site)]
    for call in calls:
        with pytest.raises(SiteError, match=rf"no site .* in .*: {why}.* holds layers\.0, pooler\."):
            call()


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is not a store: it has no store\.json"):
        open_store(tmp_path)
    with pytest.raises(StoreError, match="does not exist"):
        open_store(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to("loop")
    for name, why in {"n" * 300: "File name too long", "loop": "Too many levels of symbolic links"}.items():
        with pytest.raises(StoreError, match=rf"{name}: cannot be read \({why}\)\.$"):
            open_store(tmp_path / name)
    (tmp_path / "file").touch()
    for place, what in {"file": "is a file, not the folder of a store", "file/below": "does not exist"}.items():
        with pytest.raises(StoreError, match=what):
            open_store(tmp_path / place)


def test_whether_to_check_is_true_or_false(write_store: WriteStore) -> None:
    folder, check = write_store().folder, "no"
    with pytest.raises(OptionError, match="check is 'no': use True or False"):
        layerprobe.open(folder, check=check)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2; this version reads format 1"),
        ({"sites": None}, "is damaged"),
        ({"sites": {"layers.0": {"kind": "token", "dtype": "load", "width": 8}}}, "dtype 'load'"),
        ({"sites": {"layers.0": {"kind": "row", "dtype": "float32", "width": 8}}}, "kind 'row'"),
        ({"sites": {"layers.0": {"kind": "token", "dtype": "float32", "width": "8"}}}, "width '8'"),
        ({"sites": {"layers.0": {"kind": "token"}}}, "lacks 'dtype'"),
        ({"sites": {"layers.0": 3}}, "is damaged"),
    ],
)
def test_a_damaged_description_is_refused_when_opened(
    write_store: WriteStore, change: dict[str, Any], message: str
) -> None:
    path = write_store().folder / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match=rf"store\.json: .*{message}"):
        open_store(path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": [{"file": "../x"}]}, "is damaged"),
        ({"shards": [{"file": "../x", "first_example": 0, "examples": 1, "tokens": 1}]}, "'../x' is not the name"),
        ({"shards": 3}, "is damaged"),
    ],
)
def test_a_damaged_index_is_refused_when_opened(write_store: WriteStore, change: dict[str, Any], message: str) -> None:
    path = write_store().folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match=rf"index\.json: .*{message}"):
        open_store(path.parent)


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_an_index_that_lost_a_shard_is_refused_when_opened(write_store: WriteStore, dropped: int) -> None:
    path = write_store(((3, 0, 5), (1, 4), (2, 2))).folder / "index.json"
    said = json.loads(path.read_text())
    del said["shards"][dropped]
    path.write_text(json.dumps(said))
    with pytest.raises(FormatError, match=r"index\.json: is damaged: (no shard has example|its shards do not add up)"):
        open_store(path.parent)


def test_an_index_with_a_wrong_count_of_tokens_is_refused(write_store: WriteStore) -> None:
    folder = write_store().folder
    sound = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**sound, "tokens": sound["tokens"] + 1}))
    with pytest.raises(FormatError, match=r"index\.json: is damaged: its shards do not add up"):
        open_store(folder)
    shards = [dict(shard) for shard in sound["shards"]]
    shards[0]["tokens"] += 1
    shards[1]["tokens"] -= 1
    (folder / "index.json").write_text(json.dumps({**sound, "shards": shards}))
    with pytest.raises(FormatError, match=r"shard-000000.*: does not hold the examples that index\.json says"):
        open_store(folder)["layers.0"][0]


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "empty"])
def test_a_damaged_shard_is_an_error_that_names_it(write_store: WriteStore, damage: str) -> None:
    written = write_store()
    path = written.folder / SECOND
    raw = path.read_bytes()
    damaged = {"cut": raw[:-1], "longer": raw + b"x", "header": raw[:40] + b"~" + raw[41:], "empty": b""}
    path.write_bytes(damaged[damage])
    store = open_store(written.folder)
    assert torch.equal(store["layers.0"][0], written.rows[0])
    with pytest.raises(FormatError, match=SECOND):
        store["layers.0"][4]
    with pytest.raises(FormatError, match=SECOND):
        store["layers.0"].pooled()


def test_a_shard_that_is_gone_is_an_error_that_names_it(write_store: WriteStore) -> None:
    written = write_store()
    (written.folder / SECOND).unlink()
    store = open_store(written.folder)
    assert torch.equal(store["layers.0"][2], written.rows[2])
    message = (
        f"{SECOND}: is gone, and with it examples 3 to 4 of .*store"
        r"\. Copy it back\."
    )
    for read in (
        lambda: store.example(4),
        lambda: store["layers.0"][3],
        lambda: store["layers.0"][2:],
        lambda: store["layers.0"].pooled(),
        lambda: list(store["layers.0"].rows(4)),
        lambda: list(store),
        lambda: store.where(token_id=1),
    ):
        with pytest.raises(MissingExample, match=message) as caught:
            read()
        assert isinstance(caught.value.__cause__, OSError)


def test_a_shard_that_holds_a_site_otherwise_than_described_is_refused(write_store: WriteStore) -> None:
    written = write_store()
    path = written.folder / "store.json"
    said = json.loads(path.read_text())
    for change, message in (
        ({"width": 9}, r"\(8, 9\)"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "int8"}, "int8"),
    ):
        sites = {**said["sites"], "layers.0": {**said["sites"]["layers.0"], **change}}
        path.write_text(json.dumps({**said, "sites": sites}))
        with pytest.raises(FormatError, match=rf"shard-000000.safetensors: 'layers\.0' is .*asks for .*{message}"):
            open_store(written.folder)["layers.0"][0]


def test_more_shards_than_a_process_may_hold_open_are_read(write_store: WriteStore) -> None:
    written = write_store(tuple((1,) for _ in range(300)))
    store = open_store(written.folder)
    for ordinal in (*range(300), 0):
        assert torch.equal(store["layers.0"][ordinal], written.rows[ordinal])
    assert store["layers.0"].catalog.num_open == 256


def test_examples_without_tokenizer_or_records_have_neither_tokens_nor_text(write_store: WriteStore) -> None:
    written = write_store()
    example = open_store(written.folder).example(2)
    assert example.tokens is None and example.text is None and example.fields == {}
    assert torch.equal(example.input_ids, written.ids[2]) and torch.equal(example["layers.0"], written.rows[2])


def test_a_damaged_tokenizer_is_an_error_that_names_it(write_store: WriteStore) -> None:
    folder = write_store().folder
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match=r"tokenizer\.json: is not a tokenizer"):
        open_store(folder).example(0)


def test_a_store_of_one_example_says_so(write_store: WriteStore) -> None:
    assert "1 example, 2 sites, complete" in repr(open_store(write_store(((3,),)).folder))


def test_views_and_stores_say_what_they_are(write_store: WriteStore) -> None:
    store = open_store(write_store(dtype=torch.float16).folder)
    assert "5 examples, 2 sites, complete" in repr(store)
    assert repr(store["layers.0"]) == "SiteView('layers.0', 5 examples, token, 8 x torch.float16)"


def test_a_flipped_bit_in_any_tensor_is_refused_when_first_read(write_store: WriteStore) -> None:
    path = write_store().folder / SECOND
    sound = path.read_bytes()
    header = read_header(path)
    for name, entry in header.tensors.items():
        for place in {entry.start, entry.stop - 1}:
            damaged = bytearray(sound)
            damaged[place] ^= 4
            path.write_bytes(damaged)
            with pytest.raises(FormatError, match=rf"{SECOND}: the bytes of '{name}' are not those that were written"):
                open_store(path.parent).example(4)
    path.write_bytes(sound)
    assert open_store(path.parent).example(4).index == 4


def test_a_store_opened_without_checks_reads_what_is_there(write_store: WriteStore) -> None:
    path = write_store().folder / SECOND
    damaged = bytearray(path.read_bytes())
    damaged[read_header(path).tensors["pooler"].start] ^= 4
    path.write_bytes(damaged)
    assert len(layerprobe.open(path.parent, check=False)["pooler"][4]) > 0
