"""The shards of a store: mapped when they are asked for, compared once, let go of when the store is closed."""

import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe
from elsewhere import copy_store
from layerprobe.errors import FormatError, MissingExample, StoreError
from layerprobe.models import LoadedModel
from layerprobe.store.format import read_header
from layerprobe.store.headers import checksum
from layerprobe.store.remote import RemotePlace

WriteStore = Callable[..., Any]
SECOND = "shard-000001.safetensors"
# what a site gives may be a tensor or ScaledRows; the tests know which
open_store: Callable[[Path], Any] = layerprobe.open


def test_a_closed_store_reads_no_more_but_what_was_read_stays(write_store: WriteStore) -> None:
    written = write_store()
    with layerprobe.open(written.folder) as store:
        rows = store["layers.0"][0]
        again = pickle.loads(pickle.dumps(store))
    assert torch.equal(rows, written.rows[0]) and torch.equal(again["layers.0"][0], rows)
    for read in (lambda: store["layers.0"][0], lambda: store.example(1), lambda: store["layers.0"].pooled()):
        with pytest.raises(StoreError, match=r"this store was closed\. Open it again"):
            read()
    assert len(store) == 5


def test_a_closed_store_elsewhere_reads_no_more_either(write_store: WriteStore, tmp_path: Path) -> None:
    written = write_store()
    place = RemotePlace(f"memory://{tmp_path.name}-closed/acts")
    copy_store(open_store(written.folder), place)
    opened: Any = layerprobe.open(place)
    opened.close()
    view = opened["layers.0"]
    for read in (view.pooled, lambda: list(view), lambda: list(opened), lambda: list(opened.iter_shards())):
        with pytest.raises(StoreError, match=r"this store was closed\. Open it again"):
            read()


def test_ten_thousand_shards_open_without_one_being_touched(write_store: WriteStore) -> None:
    written = write_store(((2, 3),))
    path = written.folder / "index.json"
    said = json.loads(path.read_text())
    shards = [
        {"file": f"shard-{unit:06d}.safetensors", "first_example": 2 * unit, "examples": 2, "tokens": 5}
        for unit in range(10_000)
    ]
    path.write_text(json.dumps({**said, "examples": 20_000, "tokens": 50_000, "shards": shards}))
    touched: list[str] = []
    sys.addaudithook(lambda event, given: touched.append(str(given[0])) if event == "open" and is_on[0] else None)
    is_on = [True]
    store = open_store(written.folder)
    assert len(store) == 20_000 and store.num_tokens == 50_000 and store.num_shards == 10_000
    assert torch.equal(store["layers.0"][1], written.rows[1])
    is_on[0] = False
    opened = [name for name in touched if "shard-" in name]
    assert opened and {Path(name).name for name in opened} == {"shard-000000.safetensors"}
    with pytest.raises(
        MissingExample, match=r"shard-009999\.safetensors: is gone, and with it examples 19998 to 19999"
    ):
        store["layers.0"][-1]


def test_a_shard_that_is_gone_elsewhere_too_is_named_with_its_examples(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    store = layerprobe.extract(tiny, texts, tmp_path / "acts", sites="layers.0", shard_size=4_000)
    place = RemotePlace(f"memory://{tmp_path.name}-lost/acts")
    copy_store(store, place)
    for where in (store.place, place):
        where.remove(SECOND)
        opened: Any = layerprobe.open(where)
        assert opened.is_complete and len(opened) == len(texts)
        first = opened.iter_shards().__next__().header.num_examples
        message = (
            rf"{SECOND}: is gone, and with it examples {first} to \d+ of .* run the same extraction again to make it"
        )
        for read in (lambda: opened["layers.0"][first], lambda: opened["layers.0"].pooled(), lambda: list(opened)):  # noqa: B023
            with pytest.raises(MissingExample, match=message):
                read()
    layerprobe.extract(tiny, texts, tmp_path / "acts", sites="layers.0", shard_size=4_000)
    assert len(list(layerprobe.open(tmp_path / "acts"))) == len(texts)


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_what_lies_before_a_damaged_shard_is_given(write_store: WriteStore, tmp_path: Path, is_elsewhere: bool) -> None:
    written = write_store(((1, 2),) * 6)
    path = written.folder / "shard-000003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    where: Any = written.folder
    if is_elsewhere:
        where = RemotePlace(f"memory://{tmp_path.name}-before/acts")
        copy_store(open_store(written.folder), where)
    found: list[int] = []
    for values in (open_store(where), open_store(where)["layers.0"], open_store(where)["layers.0"].iter_pooled()):
        given: list[Any] = []
        with pytest.raises(FormatError, match="shard-000003"):
            given.extend(iter(values))
        found.append(len(given))
    assert found == [6, 6, 3]


def test_a_tensor_is_compared_once_however_often_its_shard_is_mapped(
    write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerprobe.store.catalog.MOST_OPEN_SHARDS", 1)
    written = write_store()
    store = open_store(written.folder)
    compared: list[int] = []
    monkeypatch.setattr("layerprobe.store.shards.checksum", lambda data: compared.append(len(data)) or checksum(data))
    for ordinal in (0, 4, 0, 4):
        assert torch.equal(store["layers.0"][ordinal], written.rows[ordinal])
    assert len(compared) == 6  # ordinals, offsets and rows of two shards
    path = written.folder / SECOND
    damaged = bytearray(path.read_bytes())
    damaged[read_header(path).tensors["pooler"].start] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(FormatError, match="bytes of 'pooler'"):
        store["pooler"][4]


@pytest.mark.skipif(os.name == "nt", reason="its processes have another limit")
def test_views_of_more_shards_than_a_process_may_have_files(write_store: WriteStore) -> None:
    written = write_store(((1,),) * 100)
    code = """
        import resource, sys
        import layerprobe as lp
        store = lp.open(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
        print(len(list(store["layers.0"])))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(written.folder)], capture_output=True, text=True
    )
    if sys.version_info >= (3, 13):
        assert ended.stdout.split() == ["100"], ended.stderr
    else:
        assert re.search(
            r"safetensors: cannot be mapped \(Too many open files\)\. .*view\[i\]\.clone\(\)", ended.stderr
        )


@pytest.mark.skipif(os.name == "nt", reason="its processes have another limit")
def test_a_store_of_more_shards_than_a_process_may_have_files_is_read(write_store: WriteStore) -> None:
    written = write_store(((1,),) * 100)
    code = """
        import resource, sys
        import layerprobe as lp
        store = lp.open(sys.argv[1])
        view = store["layers.0"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
        print(len(view.pooled("mean")), sum(1 for ordinal in range(100) if view[ordinal] is not None))
        print(sum(map(len, view.rows(batch_size=7))), sum(map(len, view.rows(batch_size=7, shuffle=True, seed=0))))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(written.folder)], capture_output=True, text=True
    )
    assert ended.stdout.split() == ["100"] * 4, ended.stderr
