"""Data sets of torch over a store: in this process, under workers forked or spawned, over epochs and ranks."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import layerprobe as lp
from layerprobe.errors import MissingExample, OptionError, SiteError

WriteStore = Callable[..., Any]
SHARDS = ((30, 0, 50), (10, 40), (25, 35))


def first(items: list[Any]) -> Any:
    return items[0]


def as_rows(batches: Any) -> list[list[float]]:
    return [row for batch in batches for row in batch["layers.0"].tolist()]


def test_an_item_is_an_example_with_its_ids(write_store: WriteStore) -> None:
    written = write_store(SHARDS)
    data = lp.ExampleDataset(lp.open(written.folder))
    assert len(data) == 7 and [item["index"] for item in data] == list(range(7))
    for ordinal in (0, 3, -1):
        item = data[ordinal]
        assert list(item) == ["layers.0", "pooler", "input_ids", "index"]
        assert torch.equal(item["layers.0"], written.rows[ordinal])
        assert torch.equal(item["pooler"], written.pooled[ordinal])
        assert torch.equal(item["input_ids"], written.ids[ordinal])
    assert list(lp.ExampleDataset(lp.open(written.folder), "pooler")[2]) == ["pooler", "input_ids", "index"]


def test_an_item_holds_no_more_memory_than_it_shows(write_store: WriteStore) -> None:
    item = lp.ExampleDataset(lp.open(write_store(SHARDS).folder))[4]
    for name in ("layers.0", "pooler", "input_ids"):
        assert item[name].untyped_storage().nbytes() == item[name].nbytes


def test_items_of_a_store_with_gaps_are_those_that_are_there(write_store: WriteStore) -> None:
    written = write_store(SHARDS, complete=False)
    (written.folder / "shard-000001.safetensors").unlink()
    data = lp.ExampleDataset(lp.open(written.folder))
    assert [item["index"] for item in data] == [0, 1, 2, 5, 6]
    assert data[-1]["index"] == 6 and torch.equal(data[3]["layers.0"], written.rows[5])
    for place in (5, -6):
        with pytest.raises(MissingExample, match=f"no example at place {place} of .*: 5 are there"):
            data[place]


def test_an_item_that_is_gone_is_not_the_end(write_store: WriteStore) -> None:
    written = write_store(SHARDS)
    (written.folder / "shard-000001.safetensors").unlink()
    with pytest.raises(MissingExample, match=r"shard-000001\.safetensors: is gone"):
        list(lp.ExampleDataset(lp.open(written.folder)))


def test_sites_that_are_not_stored_are_refused(write_store: WriteStore) -> None:
    store = lp.open(write_store().folder)
    for make in (lp.ExampleDataset, lp.RowDataset):
        with pytest.raises(SiteError, match=r"no site 'layers\.9' in"):
            make(store, ["layers.9"])
    with pytest.raises(SiteError, match="no site asked of"):
        lp.ExampleDataset(store, [])
    with pytest.raises(OptionError, match="batch_size is 0"):
        lp.RowDataset(store, batch_size=0)
    with pytest.raises(OptionError, match="epoch is -1"):
        lp.RowDataset(store).set_epoch(-1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_each_row_once_in_the_order_of_one_process(write_store: WriteStore, method: str) -> None:
    store = lp.open(write_store(SHARDS).folder)
    expected = [as_rows(store.rows(16, shuffle=True, epoch=epoch)) for epoch in (0, 1)]
    store["layers.0"][0]  # mapped before the workers start
    data = lp.RowDataset(store, batch_size=16, shuffle=True)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=method, persistent_workers=True)
    assert len(loader) == 12
    assert as_rows(loader) == expected[0]
    assert as_rows(loader) == expected[0]  # the same workers again
    data.set_epoch(1)
    assert as_rows(loader) == expected[1] != expected[0]
    assert sorted(expected[1]) == sorted(expected[0])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_each_example_once(write_store: WriteStore, method: str) -> None:
    written = write_store(SHARDS)
    store = lp.open(written.folder)
    store["layers.0"][0]
    loader = DataLoader(
        lp.ExampleDataset(store), batch_size=1, collate_fn=first, num_workers=2, multiprocessing_context=method
    )
    items = list(loader)
    assert [item["index"] for item in items] == list(range(7))
    assert all(torch.equal(item["layers.0"], rows) for item, rows in zip(items, written.rows, strict=True))


def test_ranks_and_workers_share_the_rows_among_them(write_store: WriteStore) -> None:
    store = lp.open(write_store(SHARDS).folder)
    batches: list[list[list[float]]] = []
    for rank in range(3):
        data = lp.RowDataset(store, batch_size=10, shuffle=True, seed=5, rank=rank, world=3)
        found = list(DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork"))
        assert len(found) == len(data)
        batches += [as_rows([batch]) for batch in found]
    expected = [as_rows([batch]) for batch in store.rows(10, shuffle=True, seed=5)]
    assert sorted(batches) == sorted(expected) and len(expected) == 19


def test_a_pooled_store_is_batched_by_the_loader_itself(write_store: WriteStore) -> None:
    written = write_store(SHARDS)
    loader = DataLoader(lp.ExampleDataset(lp.open(written.folder), "pooler"), batch_size=4, collate_fn=stack)
    assert torch.equal(torch.cat(list(loader)), written.pooled)


def stack(items: list[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([item["pooler"] for item in items])


def test_stores_and_data_sets_travel_by_their_path(write_store: WriteStore, tmp_path: Path) -> None:
    written = write_store(((4000, 3000), (2000, 2)), width=64)
    store = lp.open(written.folder)
    for shard in store.iter_shards():
        shard.tensor("layers.0")
    for thing in (store, store["layers.0"], lp.ExampleDataset(store), lp.RowDataset(store)):
        assert len(pickle.dumps(thing)) < 10_000
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again["layers.0"][1], written.rows[1]) and len(again) == 4
    data = pickle.loads(pickle.dumps(lp.RowDataset(store, shuffle=True)))
    assert as_rows(data) == as_rows(store.rows(shuffle=True))


def test_a_pickled_store_keeps_what_it_saw(write_store: WriteStore) -> None:
    """Workers that open at other times must agree on what there is."""
    written = write_store(SHARDS, complete=False)
    late = written.folder / "shard-000001.safetensors"
    kept = late.read_bytes()
    late.unlink()
    packed = pickle.dumps(lp.open(written.folder))
    late.write_bytes(kept)
    assert len(pickle.loads(packed)) == 5 and len(lp.open(written.folder)) == 7
