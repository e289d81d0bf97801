"""Exports, read back by the formats' own readers and compared with what the store gives example by example."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import layerprobe as lp
import memory
from forks import run_each
from layerprobe.errors import FormatError, OptionError, SiteError, SpaceError, StoreError
from layerprobe.models import LoadedModel
from layerprobe.store import columns, lock, naming, packed
from layerprobe.store.export import _committed

extract: Any = lp.extract
open_store: Any = lp.open
WriteStore = Callable[..., Any]
ZARR = pytest.param("zarr", marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="zarr 3 takes Python 3.11"))


@pytest.fixture
def store(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> Any:
    """Several shards with rows, matrices of heads, texts and fields."""
    records = [{"text": text, "n": n, "of": {"zh": "中"}} if n % 2 else {"text": text} for n, text in enumerate(texts)]
    sites = ["layers.*", "layers.1.attention.weights"]
    made = extract(tiny, records, tmp_path / "acts", sites=sites, dtype="float16", shard_size=20_000)
    assert made.num_shards >= 4
    return made


def read_table(path: Path) -> Any:
    if path.suffix == ".parquet":
        return pq.read_table(path)
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


@pytest.mark.parametrize("to", ["parquet", "arrow"])
def test_a_row_per_example_holds_what_the_store_gives(store: Any, tmp_path: Path, to: str) -> None:
    report = lp.export(store, tmp_path / f"out.{to}", to)
    table = read_table(tmp_path / f"out.{to}")
    assert table.num_rows == len(store) == report.num_examples
    assert table.column_names == ["index", "input_ids", "tokens", "text", "fields", *store.sites]
    assert table.schema.field("layers.0").type == pa.list_(pa.list_(pa.float16(), 32))
    for row, example in zip(table.to_pylist(), store, strict=True):
        assert row["index"] == example.index and row["text"] == example.text
        assert row["input_ids"] == example.input_ids.tolist() and row["tokens"] == example.tokens
        assert (json.loads(row["fields"]) if row["fields"] is not None else {}) == example.fields
        for site in store.sites:
            expected = example[site].numpy()
            assert np.array_equal(np.array(row[site], dtype=np.float16).reshape(expected.shape), expected)


@pytest.mark.parametrize("to", ["parquet", "arrow"])
def test_a_row_per_token_holds_what_the_store_gives(store: Any, tmp_path: Path, to: str) -> None:
    lp.export(store, tmp_path / f"out.{to}", to, rows="tokens")
    table = read_table(tmp_path / f"out.{to}")
    assert table.num_rows == store.num_tokens
    assert table.column_names == ["index", "position", "input_id", "token", "layers.0", "layers.1", "layers.2"]
    assert table.schema.field("layers.0").type == pa.list_(pa.float16(), 32)
    rows = iter(table.to_pylist())
    for example in store:
        for position, token in enumerate(example.tokens):
            row = next(rows)
            assert (row["index"], row["position"], row["token"]) == (example.index, position, token)
            assert row["input_id"] == int(example.input_ids[position])
            for site in ("layers.0", "layers.2"):
                assert np.array_equal(np.array(row[site], dtype=np.float16), example[site][position].numpy())


def read_packed(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as found:
            return dict(found)
    import zarr

    group = zarr.open_group(str(path), mode="r")
    return {name: np.asarray(array[:]) for name, array in group.arrays()}  # type: ignore[index]


@pytest.mark.parametrize("to", ["npz", ZARR])
def test_packed_arrays_hold_what_the_store_gives(
    store: Any, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # so small that batches, pieces and chunks end in the middle of shards and examples
    monkeypatch.setattr(columns, "_BATCH_BYTES", 5_000)
    monkeypatch.setattr(packed, "_PIECE_BYTES", 700)
    lp.export(store, tmp_path / f"out.{to}", to)
    found = read_packed(tmp_path / f"out.{to}")
    heads, pairs = "layers.1.attention.weights", "layers.1.attention.weights:offsets"
    assert sorted(found) == sorted(
        ["example", "offsets", "input_ids", "record_offsets", "records", pairs, *store.sites]
    )
    assert found["layers.0"].dtype == np.float16 and found["layers.0"].shape == (store.num_tokens, 32)
    assert found["offsets"][0] == 0 and found["offsets"][-1] == store.num_tokens
    for k, example in enumerate(store):
        assert found["example"][k] == example.index
        rows = slice(*found["offsets"][k : k + 2])
        assert found["input_ids"][rows].tolist() == example.input_ids.tolist()
        for site in ("layers.0", "layers.1", "layers.2"):
            assert np.array_equal(found[site][rows], example[site].numpy())
        matrices = found[heads][slice(*found[pairs][k : k + 2])]
        assert np.array_equal(matrices.reshape(example[heads].shape), example[heads].numpy())
        record = json.loads(found["records"][slice(*found["record_offsets"][k : k + 2])].tobytes())
        assert record["text"] == example.text and record.get("fields", {}) == example.fields


@pytest.mark.parametrize("to", ["parquet", "arrow", "npz", ZARR])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_a_dtype_is_kept_or_widened_and_the_report_says_so(
    write_store: WriteStore, tmp_path: Path, dtype: torch.dtype, to: str
) -> None:
    written = write_store(((3, 0, 5), (1, 4)), dtype)
    report = lp.export(written.folder, tmp_path / f"out.{to}", to)
    is_kept = dtype == torch.float64
    name = str(dtype).removeprefix("torch.")
    assert report.widened == ({} if is_kept else {"layers.0": name})
    assert (f"1 site of {name} became float32" in str(report)) is not is_kept
    assert f" as {to}" in str(report)
    rows = [rows.double() for rows in written.rows]
    if to in ("npz", "zarr"):
        found = read_packed(tmp_path / f"out.{to}")
        assert found["layers.0"].dtype == (np.float64 if is_kept else np.float32)
        assert np.array_equal(found["layers.0"].astype(np.float64), torch.cat(rows).numpy())
        assert np.array_equal(found["pooler"], written.pooled.numpy())
        assert "records" not in found
    else:
        table = read_table(tmp_path / f"out.{to}")
        assert "tokens" not in table.column_names and table["text"].null_count == 5
        assert table.schema.field("pooler").type == pa.list_(pa.float32(), 8)
        for found, expected in zip(table["layers.0"].to_pylist(), rows, strict=True):
            assert np.array_equal(np.array(found).reshape(-1, 8), expected.numpy())
        assert np.array_equal(np.array(table["pooler"].to_pylist(), dtype=np.float32), written.pooled.numpy())


@pytest.mark.parametrize("to", ["parquet", "npz"])
def test_scaled_int8_is_decoded(tiny: LoadedModel, texts: list[str], tmp_path: Path, to: str) -> None:
    store = extract(tiny, texts, tmp_path / "acts", sites="layers.0", dtype="int8", shard_size=4_000)
    assert lp.export(store, tmp_path / f"out.{to}", to).widened == {"layers.0": "int8"}
    expected = torch.cat([rows.float() for rows in store["layers.0"]]).numpy()
    if to == "npz":
        found = read_packed(tmp_path / "out.npz")["layers.0"]
    else:
        rows = read_table(tmp_path / "out.parquet")["layers.0"].to_pylist()
        found = np.concatenate([np.array(row, dtype=np.float32).reshape(-1, 32) for row in rows])
    assert np.array_equal(found, expected)


def test_sites_are_chosen_by_patterns_of_what_is_stored(store: Any, tmp_path: Path) -> None:
    assert lp.export(store, tmp_path / "a", sites="layers.-2:").sites == ("layers.1", "layers.2")
    assert lp.export(store, tmp_path / "b", sites=["layers.2", "layers.0"]).sites == ("layers.0", "layers.2")
    for sites, message in (
        ("layers.3", r"no site 'layers\.3' in .*acts: layers are 0 to 2"),
        ("layers.0.ffn.act", r"no site 'layers\.0\.ffn\.act' in .*acts\."),
        ([], "no site asked"),
    ):
        with pytest.raises(SiteError, match=message):
            lp.export(store, tmp_path / "c", sites=sites)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "to", "format_"),
    [("a.npz", None, "npz"), ("a.NPZ", "npz", "npz"), ("a.feather", None, "arrow"), ("a.arrow", None, "arrow"),
     ("a.parquet", None, "parquet"), ("a", None, "parquet"), ("a.b", "npz", "npz"), ("arrow", "npz", "npz")],
)  # fmt: skip
def test_the_format_is_what_the_name_says(
    tiny: LoadedModel, tmp_path: Path, name: str, to: str | None, format_: str
) -> None:
    store = lp.extract(tiny, ["the fox"], tmp_path / "acts", sites="layers.0")
    assert lp.export(store, tmp_path / name, to).format == format_
    other = "npz" if format_ != "npz" else "parquet"
    if to is None and "." in name:
        with pytest.raises(OptionError, match=rf"the name says {format_}, to='{other}' another format"):
            lp.export(store, tmp_path / name, other, overwrite=True)


def test_sites_of_modules_are_chosen_by_their_names() -> None:
    names = ["layers.0", "module:encoder.layer.0", "module:encoder.layer.1", "module:encoder.layer.1:input"]
    assert naming.match_sites("module:encoder.layer.1:input", names, "acts") == names[3:]
    assert naming.match_sites("module:encoder.layer.*:input", names, "acts") == names[3:]
    assert naming.match_sites("module:encoder.layer.*", names, "acts") == names[1:3]
    assert naming.match_sites(None, names, "acts") == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "csv"}, "no format 'csv': use parquet, arrow, npz, zarr"),
        ({"overwrite": "no"}, "overwrite is 'no': use True or False"),
        ({"rows": "words"}, "rows is 'words': use 'examples' or 'tokens'"),
        ({"to": "npz", "rows": "tokens"}, "rows='tokens' goes with a table: npz holds packed rows"),
        ({"rows": "tokens", "sites": "layers.1.attention.weights"}, "has no value per token.*kind 'attention'"),
    ],
)
def test_an_option_that_cannot_be_is_refused(store: Any, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        lp.export(store, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts"]


def test_a_pooled_store_has_no_rows_of_tokens(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    store = extract(tiny, texts, tmp_path / "acts", pool="mean")
    with pytest.raises(OptionError, match="holds no site with a row per token"):
        lp.export(store, tmp_path / "out", rows="tokens")


@pytest.mark.parametrize("sites", [None, ["layers.*", "layers.*.attention.weights"]])
def test_a_table_of_tokens_says_which_sites_it_leaves_out(store: Any, tmp_path: Path, sites: list[str] | None) -> None:
    report = lp.export(store, tmp_path / "out.parquet", rows="tokens", sites=sites)
    assert report.sites == ("layers.0", "layers.1", "layers.2") and report.left_out == ("layers.1.attention.weights",)
    assert "left out, without a row per token: layers.1.attention.weights" in str(report)
    assert read_table(tmp_path / "out.parquet").column_names[-3:] == ["layers.0", "layers.1", "layers.2"]
    assert not lp.export(store, tmp_path / "all.parquet", sites=sites).left_out


@pytest.mark.parametrize("sites", ["layers.*.attention.weights", ["layers.*", "layers.1.attention.weights"]])
def test_a_table_of_tokens_refuses_sites_without_rows(store: Any, tmp_path: Path, sites: str | list[str]) -> None:
    with pytest.raises(OptionError, match=r"'layers\.1\.attention\.weights' has no value per token"):
        lp.export(store, tmp_path / "out.parquet", rows="tokens", sites=sites)


def test_an_old_zarr_is_refused(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", types.SimpleNamespace(__version__="2.18.3"))
    with pytest.raises(OptionError, match=r"to='zarr' needs zarr 3, 2\.18\.3 is installed"):
        lp.export(store, tmp_path / "out", "zarr")


@pytest.mark.parametrize(("to", "package"), [("parquet", "pyarrow"), ("arrow", "pyarrow"), ("zarr", "zarr")])
def test_a_missing_extra_is_named(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, package: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OptionError, match=rf"to='{to}'.* needs {package}.*pip install 'layerprobe\[data\]'"):
        lp.export(store, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_a_missing_zarr_is_not_promised_to_a_python_that_has_none(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(OptionError, match=r"^to='zarr', which is for Python 3\.11 or newer, needs zarr"):
        lp.export(store, tmp_path / "out", "zarr")


@pytest.mark.parametrize("to", ["parquet", "arrow", "npz", ZARR])
def test_what_is_there_is_replaced_only_when_asked(store: Any, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    lp.export(store, out, to, sites="layers.0")
    before = {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()}
    with pytest.raises(StoreError, match=r"out: exists already.*--overwrite"):
        lp.export(store, out, to)
    assert before == {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()}
    assert lp.export(store, out, to, sites="layers.1", overwrite=True).sites == ("layers.1",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts", "out"]
    fresh = tmp_path / "fresh"
    lp.export(store, fresh, to, sites="layers.1")
    made = [{p.relative_to(top): p.read_bytes() for p in top.rglob("*") if p.is_file()} for top in (out, fresh)]
    assert made[0] == made[1]
    assert out.is_dir() or out.read_bytes() == fresh.read_bytes()


def test_overwriting_spares_what_is_no_export(store: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "link").symlink_to(tmp_path / "mine" / "thesis.txt")
    for out, to, message in (
        *([(tmp_path / "mine", "zarr", "is not a Zarr group")] if sys.version_info >= (3, 11) else []),
        (tmp_path / "mine", "parquet", "is not a file"),
        (tmp_path / "link", "parquet", "is not a file"),
    ):
        with pytest.raises(StoreError, match=message):
            lp.export(store, out, to, overwrite=True)
    for out in (tmp_path / "acts", tmp_path / "acts" / "out", tmp_path):
        with pytest.raises(OptionError, match="lies in or around the store"):
            lp.export(store, out, "npz", overwrite=True)
    with pytest.raises(StoreError, match=r"there is no folder .*none\. Make it, or choose"):
        lp.export(store, tmp_path / "none" / "out")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years" and open_store(tmp_path / "acts").is_complete


@pytest.mark.parametrize("to", ["parquet", "arrow", "npz", ZARR])
def test_a_damaged_shard_is_an_error_and_leaves_nothing(store: Any, tmp_path: Path, to: str) -> None:
    store.close()
    path = tmp_path / "acts" / "shard-000002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"shard-000002\.safetensors: the bytes of"):
        lp.export(tmp_path / "acts", tmp_path / "out", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts"]


@pytest.mark.parametrize("to", ["parquet", "arrow", "npz", ZARR])
def test_a_full_disk_is_an_error_and_leaves_nothing(write_store: WriteStore, small_disk: Path, to: str) -> None:
    store = write_store(((2000, 2000), (2000,)), width=512).folder
    with pytest.raises(SpaceError, match=r"out: cannot be written \(.*Make room"):
        lp.export(store, small_disk / "out", to)
    assert not any(small_disk.iterdir())


def test_an_unfinished_store_gives_what_is_there_and_the_report_says_so(
    write_store: WriteStore, tmp_path: Path
) -> None:
    written = write_store(((3, 1), (2, 2), (4,)), complete=False)
    (written.folder / "shard-000001.safetensors").unlink()
    report = lp.export(written.folder, tmp_path / "out.parquet")
    assert not report.is_complete and "the store is not complete" in str(report)
    table = read_table(tmp_path / "out.parquet")
    assert table["index"].to_pylist() == [0, 1, 4]
    lp.export(written.folder, tmp_path / "out.npz", "npz")
    found = read_packed(tmp_path / "out.npz")
    assert found["example"].tolist() == [0, 1, 4] and found["offsets"].tolist() == [0, 3, 4, 8]
    assert np.array_equal(found["layers.0"], torch.cat([written.rows[k] for k in (0, 1, 4)]).numpy())


def test_a_site_named_like_a_column_or_a_path_is_refused() -> None:
    def site(name: str) -> Any:
        return columns.StoredSite(name, "token", torch.float32, 4)

    with pytest.raises(FormatError, match="a site is named 'text'"):
        columns.Columns((site("text"),))
    for name in ("../layers.0", "a/b", ".hidden", "zarr.json", ""):
        with pytest.raises(FormatError, match="cannot be the name of an array"):
            packed.list_arrays(lambda: iter(()), (site(name),))


def test_the_bar_counts_shards(store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lp.export(store, tmp_path / "a", "npz", progress=True)
    assert " shards" in capsys.readouterr().err
    lp.export(store, tmp_path / "b", "npz", progress=False)
    assert capsys.readouterr().err == ""


PEAKS = """
import sys, torch
from pathlib import Path
import layerprobe as lp
from memory import measure_peak
from planting import plant

torch.set_num_threads(1)
place, kept = Path(sys.argv[1]), []

def write(units):
    rows = torch.ones(8192 * units, 512)
    return plant(place / str(units), {"layers.0": rows}, [2] * (4096 * units), shards=units)

def measure(folder, to, leaks=False):
    store = lp.open(folder)
    def list_shards(list_shards=store.iter_shards):
        for shard in list_shards():
            yield shard
            if leaks:
                kept.extend(row.clone() for row in shard.tensor("layers.0")[::2])
    store.iter_shards = list_shards
    return measure_peak(lambda: lp.export(store, place / f"out.{to}", to, overwrite=True))

small, large = write(4), write(12)
for to in sys.argv[2:]:
    measure(small, to)
    print(measure(small, to), measure(large, to))
print(measure(small, "parquet"), measure(large, "parquet", leaks=True))
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    """Of 64 MB and of 192 MB; and a row that were kept of each text would show."""
    formats = ("parquet", "arrow", "npz", *(["zarr"] if sys.version_info >= (3, 11) else []))
    printed = memory.run_measured(PEAKS, tmp_path, *formats)
    found = [tuple(map(int, line.split())) for line in printed.splitlines()]
    growth = [large - small for small, large in found]
    assert max(growth[:-1]) < 40_000 < growth[-1], f"kB, of {formats}, and of parquet with a leak: {found}"


def test_a_store_becomes_a_dataset(store: Any, tmp_path: Path) -> None:
    dataset = store.to_datasets(sites="layers.-1", cache=tmp_path / "cache")
    assert dataset.num_rows == len(store)
    assert dataset.column_names == ["index", "input_ids", "tokens", "text", "fields", "layers.2"]
    for row, example in zip(dataset.with_format("numpy"), store, strict=True):
        assert row["index"] == example.index and row["text"] == example.text
        found = np.array(list(row["layers.2"]), dtype=np.float16)
        assert np.array_equal(found.reshape(-1, 32), example["layers.2"].numpy())
    (file,) = (tmp_path / "cache").iterdir()
    written = file.stat().st_mtime_ns
    assert store.to_datasets(sites="layers.-1", cache=tmp_path / "cache").num_rows == len(store)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()] == [written]
    assert store.to_datasets(sites="layers.0", cache=tmp_path / "cache").column_names[-1] == "layers.0"
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_dataset_follows_shards_that_were_added(write_store: WriteStore, tmp_path: Path) -> None:
    written = write_store(((3, 1), (2, 2)))
    (written.folder / "index.json").unlink()
    moved = (written.folder / "shard-000001.safetensors").rename(tmp_path / "away")
    assert open_store(written.folder).to_datasets(cache=tmp_path / "cache").num_rows == 2
    moved.rename(written.folder / "shard-000001.safetensors")
    assert open_store(written.folder).to_datasets(cache=tmp_path / "cache")["index"][:] == [0, 1, 2, 3]


def test_a_dataset_without_its_extra_or_its_cache_says_so(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Choose a folder with cache="):
        store.to_datasets(cache=tmp_path / "file")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OptionError, match="to_datasets needs datasets"):
        store.to_datasets(cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_folders_of_the_users_beside_the_export_are_spared(store: Any, tmp_path: Path) -> None:
    mine = [tmp_path / "out.npz.tmp", tmp_path / "out.npz.old.tmp"]
    for folder in mine:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    lp.export(store, tmp_path / "out.npz", "npz", sites="layers.0")
    lp.export(store, tmp_path / "out.npz", "npz", sites="layers.0", overwrite=True)
    assert [(folder / "notes.txt").read_text() for folder in mine] == ["mine", "mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out.npz"])


def test_a_folder_moved_aside_comes_back_when_the_new_one_cannot_be_named(tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    out.mkdir()
    (out / "zarr.json").write_text("old")
    # nothing was written, so there is nothing to give the name to
    with pytest.raises(StoreError, match="cannot be written"), _committed(out, overwrite=True):
        pass
    assert (out / "zarr.json").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


def test_an_only_copy_that_cannot_come_back_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    out.mkdir()
    (out / "zarr.json").write_text("old")

    def replace() -> None:
        with _committed(out, overwrite=True) as partial:
            partial.mkdir()
            os.replace(out, partial.parent / "old")
            # takes neither the new folder nor the old one
            out.write_text("mine")

    with pytest.raises(StoreError, match="cannot be written"):
        replace()
    (kept,) = tmp_path.glob(".layerprobe-out.zarr-*/old/zarr.json")
    assert kept.read_text() == "old" and out.read_text() == "mine"


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="Make room"), _committed(tmp_path / "out", overwrite=False):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal
from pathlib import Path
from layerprobe.store.export import _committed
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two exports were killed, to `out.npz` and to `other.npz`."""
    folder = tmp_path_factory.mktemp("killed")
    pieces = [
        f"""
with _committed(Path({str(folder / name)!r}), overwrite=False) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
        for name in ("out.npz", "other.npz")
    ]
    assert [ended.status for ended in run_each(KILLED, pieces)] == [-signal.SIGKILL] * 2
    return folder


def test_what_a_killed_export_left_is_removed_by_the_next_to_that_name_and_nothing_else(
    killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 2 and all(name.startswith(".layerprobe-o") and name.endswith(".tmp") for name in left)
    mine = tmp_path / ".layerprobe-out.npz-mine.tmp"
    mine.mkdir()
    with _committed(tmp_path / "out.npz", overwrite=False) as running:
        # one under way is nobody's leftover
        with _committed(tmp_path / "out.npz", overwrite=False) as partial:
            partial.write_text("whole")
        assert running.parent.is_dir()
        running.write_text("whole too")
    (other,) = (name for name in left if "other" in name)
    assert {path.name for path in tmp_path.iterdir()} == {"out.npz", mine.name, other}


@pytest.mark.parametrize("cause", ["no locks in Python", "none on the file system", "not locked yet"])
def test_an_export_that_may_be_under_way_is_nobodys_leftover(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    (name,) = (path.name for path in killed.iterdir() if "out.npz" in path.name)
    left = tmp_path / name
    shutil.copytree(killed / name, left)
    if cause == "not locked yet":
        (left / lock.LOCK_FILE).write_bytes(b"")
    else:
        refusing = types.SimpleNamespace(LOCK_SH=1, LOCK_EX=2, LOCK_NB=4, LOCK_UN=8, flock=refuse_locks)
        monkeypatch.setattr(lock, "fcntl", None if cause == "no locks in Python" else refusing)
    with _committed(tmp_path / "out.npz", overwrite=False) as partial:
        partial.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out.npz", left.name}


def test_what_cannot_be_removed_is_left_to_the_next_export_to_that_name(tmp_path: Path) -> None:
    code = f"""
import errno, resource
from pathlib import Path
from layerprobe.errors import StoreError
from layerprobe.store.export import _committed
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for number in range(3):
    try:
        with _committed(Path({str(tmp_path / "out")!r}), overwrite=False) as partial:
            (partial / "part").mkdir(parents=True) if number == 1 else partial.write_text("half")
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, most))
            raise OSError(errno.EMFILE, "Too many open files")
    except StoreError:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(len(list(Path({str(tmp_path)!r}).iterdir())))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    # a file goes without another one being opened; of a folder the lock's file stays, by which the next finds it
    assert ended.stdout.split() == ["0", "1", "0"], ended.stderr


def test_what_was_replaced_goes_with_the_leftovers_once_the_new_one_has_its_name(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from layerprobe.store import export
export._remove_work = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
out = Path({str(tmp_path / "out")!r})
out.mkdir()
with export._committed(out, overwrite=True) as partial:
    partial.mkdir()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".layerprobe-out-*/old"))) == 1
    with _committed(tmp_path / "out", overwrite=True) as partial:
        partial.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refuse_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_folder_of_work_that_cannot_be_locked_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(lock, "fcntl", types.SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=refuse))
    with pytest.raises(StoreError, match="Input/output error"), _committed(tmp_path / "out.npz", overwrite=False):
        pass
    assert not list(tmp_path.iterdir())


def test_a_name_may_be_as_long_as_the_file_system_takes(store: Any, tmp_path: Path) -> None:
    out = tmp_path / ("n" * 251 + ".npz")
    lp.export(store, out, "npz", sites="layers.0")
    assert [path.name for path in tmp_path.glob("n*")] == [out.name] and not list(tmp_path.glob(".layerprobe*"))
