"""Epochs of rows: each row once, in an order that the seed alone fixes, whole again from any middle and any share."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import layerprobe
from layerprobe.errors import FormatError, OptionError, SiteError, StoreError
from layerprobe.store import order as order_module
from layerprobe.store.description import StoredSite, commit_description
from layerprobe.store.format import commit_shard, read_header
from layerprobe.store.headers import ShardHeader
from layerprobe.store.index import ShardInfo, commit_index
from layerprobe.store.order import EpochOrder, RowOptions

WriteStore = Callable[..., Any]
FINGERPRINT = "0" * 32
SITES = {
    "float32": ("token", torch.float32),
    "float16": ("token", torch.float16),
    "bfloat16": ("token", torch.bfloat16),
    "float8": ("token", torch.float8_e4m3fn),
    "int8": ("token", torch.int8),
    "vector": ("example", torch.float32),
}


def write_numbered(folder: Path, tokens: list[int], width: int = 4) -> None:
    """Write a store in which each row says who it is: column 0 its place, column 1 its shard."""
    folder.mkdir()
    sites = {
        name: {"kind": kind, "dtype": str(dtype).removeprefix("torch."), "width": width}
        for name, (kind, dtype) in SITES.items()
    }
    commit_description(folder, {"sites": sites, "fingerprint": FINGERPRINT, "pool": None})
    headers, first_row = [], 0
    for unit, count in enumerate(tokens):
        numbers = torch.arange(first_row, first_row + count)
        values = torch.stack([numbers, torch.full_like(numbers, unit)], 1).float()
        values = torch.cat([values, torch.ones(count, width - 2)], 1)
        tensors = [
            ("example", torch.tensor([unit])),
            ("offsets", torch.tensor([0, count])),
            ("input_ids", numbers),
            ("float32", values),
            ("vector", torch.full((1, width), float(unit))),
            ("int8:scale", torch.full((count,), 0.5)),
            ("float16", (values % 512).half()),
            ("bfloat16", (values % 256).bfloat16()),
            ("float8", (values % 16).to(torch.float8_e4m3fn)),
            ("int8", (values % 100).to(torch.int8)),
        ]
        header = ShardHeader(unit, 1, count, unit, FINGERPRINT)
        commit_shard(folder, header, sorted(tensors, key=lambda named: -named[1].dtype.itemsize))
        headers.append(header)
        first_row += count
    commit_index(folder, headers)


@pytest.fixture
def numbered(tmp_path: Path) -> Any:
    write_numbered(tmp_path / "store", [700, 0, 1300, 5, 900])
    return layerprobe.open(tmp_path / "store")


def places(batches: Any) -> list[int]:
    """Read from rows which they are."""
    tensors = [batch["float32"] if isinstance(batch, dict) else batch for batch in batches]
    return torch.cat([*tensors, torch.empty(0, 4)])[:, 0].long().tolist()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 1000, 10**6])
def test_an_epoch_is_every_row_of_every_site_once_and_side_by_side(
    numbered: Any, shuffle: bool, batch_size: int
) -> None:
    batches = list(numbered.rows(batch_size, shuffle=shuffle))
    assert [len(batch["int8"]) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert sorted(places(batches)) == list(range(2905))
    whole = {site: torch.cat([batch[site] for batch in batches]) for site in batches[0]}
    assert list(whole) == ["float32", "float16", "bfloat16", "float8", "int8"]
    assert [tensor.dtype for tensor in whole.values()] == [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float32,
    ]
    for site, modulus in (("float16", 512), ("bfloat16", 256), ("float8", 16)):
        expected = (whole["float32"] % modulus).to(whole[site].dtype)
        assert torch.equal(whole[site].float(), expected.float())
    assert torch.equal(whole["int8"], (whole["float32"] % 100) * 0.5)


@pytest.mark.parametrize("piece_rows", [1 << 17, 64])
@pytest.mark.parametrize("batch_size", [1, 64, 100, 3000])
def test_rows_unmixed_come_as_they_lie(
    numbered: Any, monkeypatch: pytest.MonkeyPatch, piece_rows: int, batch_size: int
) -> None:
    monkeypatch.setattr(order_module, "_PIECE_ROWS", piece_rows)
    monkeypatch.setattr(order_module, "_MOST_GROUP_PIECES", 3)
    assert places(numbered.rows(batch_size)) == list(range(2905))
    share = numbered.rows(batch_size, rank=1, world=3)
    wanted = [list(range(2905))[first : first + batch_size] for first in range(batch_size, 2905, 3 * batch_size)]
    assert [places([batch]) for batch in share] == wanted


def test_one_site_gives_tensors_in_the_order_of_all(numbered: Any) -> None:
    alone = list(numbered["float32"].rows(64, shuffle=True, seed=2))
    assert all(isinstance(batch, Tensor) for batch in alone)
    assert places(alone) == places(numbered.rows(64, shuffle=True, seed=2, sites="float32"))


def test_the_order_is_a_function_of_seed_and_epoch_and_not_of_batch_size(numbered: Any) -> None:
    def order(batch_size: int = 64, **options: Any) -> list[int]:
        return places(numbered.rows(batch_size, shuffle=True, **options))

    assert order(seed=3) == order(seed=3) == order(7, seed=3)
    orders = [order(seed=3), order(seed=4), order(seed=3, epoch=1), list(range(2905))]
    assert all(one != other for place, one in enumerate(orders) for other in orders[:place])


def test_a_batch_is_mixed_from_all_shards(numbered: Any) -> None:
    batch = next(numbered["float32"].rows(500, shuffle=True))
    shares = (batch[:, 1] == torch.tensor([[0.0], [2.0], [4.0]])).sum(1) / 500
    # 500 draws without return: the standard deviation of a share is about 0.02
    torch.testing.assert_close(shares, torch.tensor([700.0, 1300.0, 900.0]) / 2905, rtol=0, atol=0.1)
    neighbours = (batch[1:, 0] - batch[:-1, 0]).abs() == 1
    assert neighbours.sum() < 20


def test_a_store_of_many_groups_is_mixed_inside_each_and_whole_over_all(
    numbered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_module, "_PIECE_ROWS", 50)
    monkeypatch.setattr(order_module, "_GROUP_ROWS", 400)
    monkeypatch.setattr(order_module, "_LEAST_GROUP_PIECES", 2)
    iterator = numbered["float32"].rows(90, shuffle=True)
    assert len(iterator._order.groups) == 8
    found = places(iterator)
    assert sorted(found) == list(range(2905))
    assert max(found[:300]) - min(found[:300]) > 1000  # pieces from far apart make a group
    assert len(set(found[:300])) == 300


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    batch_size=st.integers(1, 70),
    world=st.integers(1, 4),
    shuffle=st.booleans(),
    done=st.integers(0, 30),
)
def test_any_share_goes_on_from_any_middle(
    tokens: list[int],
    batch_size: int,
    world: int,
    shuffle: bool,
    done: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("stores") / "store"
    write_numbered(folder, tokens)
    store = layerprobe.open(folder)
    whole = [places([batch]) for batch in store.rows(batch_size, shuffle)]
    assert sorted(place for batch in whole for place in batch) == list(range(sum(tokens)))
    for rank in range(world):
        share = store.rows(batch_size, shuffle, rank=rank, world=world)
        assert len(share) == len(whole[rank::world])
        begun = [places([batch]) for batch, _ in zip(share, range(done), strict=False)]
        later = layerprobe.open(folder).rows(batch_size, shuffle, rank=rank, world=world)
        state = json.loads(json.dumps(share.state_dict()))
        later.load_state_dict(state)
        taken = min(done + 1, len(whole[rank::world])) if len(begun) == done else len(begun)
        assert state["given"] == taken  # zip takes one more batch than it gives
        assert [places([batch]) for batch in later] == whole[rank::world][taken:]


def test_an_iterator_that_is_told_to_go_back_gives_the_same_again(numbered: Any) -> None:
    iterator = numbered.rows(100, shuffle=True)
    for _ in range(3):
        next(iterator)
    state = iterator.state_dict()
    rest = places(iterator)
    assert len(iterator) == 0 and next(iterator, None) is None
    iterator.load_state_dict(state)
    assert len(iterator) == 27 and places(iterator) == rest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed=1 cannot go on here, where seed is 0"),
        ({"batch_size": 9}, "batch_size=9"),
        ({"world": 2}, "world=2"),
        ({"fingerprint": "1" * 32}, "fingerprint="),
        ({"sites": ["float16"]}, "sites="),
        ({"num_rows": 1}, "num_rows=1"),
        ({"given": 1000}, "given=1000"),
        ({"given": -1}, "given=-1"),
        ({"given": True}, "given=True"),
    ],
)
def test_a_state_of_other_rows_is_refused(numbered: Any, change: dict[str, Any], message: str) -> None:
    iterator = numbered["float32"].rows(100)
    with pytest.raises(OptionError, match=message):
        iterator.load_state_dict({**iterator.state_dict(), **change})
    assert len(places(iterator)) == 2905


def test_a_state_of_another_order_is_refused_where_rows_are_mixed(numbered: Any) -> None:
    mixed, in_order = numbered.rows(100, shuffle=True), numbered.rows(100)
    for order in (None, 1):
        with pytest.raises(OptionError, match=rf"order={order} cannot go on here, .* is 2: .*begin the epoch anew"):
            mixed.load_state_dict({**mixed.state_dict(), "order": order})
    assert "order" not in in_order.state_dict()
    in_order.load_state_dict({**in_order.state_dict(), "order": 1})


def test_the_order_of_rows_has_a_number_of_its_own() -> None:
    # whoever changes this hash has changed the order, and gives it another number
    hashes = [
        hash_order(768, [54_000] * 60 + [700_000, 0, 1_300_000]),  # groups of a GiB
        hash_order(64, [54_000] * 60 + [700_000, 0, 1_300_000]),  # of a million rows
        hash_order(64, [1_000] * 1280),  # of so many pieces
    ]
    assert (order_module.ORDER, hashes) == (2, ["6bfa71142dd80704", "0b62edf9228b937e", "2741445b7d2466f0"])


def hash_order(width: int, counts: list[int]) -> str:
    """Hash which rows an epoch of one float16 site gives, one in a thousand, for a fixed seed."""
    infos = [ShardInfo(f"shard-{unit:06d}.safetensors", unit, 1, count) for unit, count in enumerate(counts)]
    catalog: Any = SimpleNamespace(shards=infos, check_claims=lambda: None)
    sites = [StoredSite("layers.0", "token", torch.float16, width)]
    order = EpochOrder(catalog, sites, RowOptions(shuffle=True, seed=3, epoch=1))
    assert len(order.groups) > 2
    hashed = hashlib.sha256()
    for group, _, _, places in order.locate(np.arange(0, order.num_rows, 1000)):
        at = np.searchsorted(order.bounds[group], places, side="right") - 1
        pieces = np.array(order.groups[group])[at]
        rows = pieces[:, 1] + places - order.bounds[group][at]
        hashed.update(np.stack([pieces[:, 0], rows], 1).astype("<i8").tobytes())
    return hashed.hexdigest()[:16]


def test_a_pickled_iterator_goes_on(numbered: Any) -> None:
    iterator = numbered.rows(100, shuffle=True)
    next(iterator)
    assert places(pickle.loads(pickle.dumps(iterator))) == places(iterator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": None}, "seed is None"),
        (
            {"seed": 4},
            r"seed is 4 and shuffle is False: without shuffle=True rows come as they lie\. Pass shuffle=True",
        ),
        ({"shuffle": "yes"}, "shuffle is 'yes': use True or False"),
        ({"shuffle": 1, "seed": 4}, "shuffle is 1: use True or False"),
        ({"world": 0}, "world is 0"),
        ({"rank": 2, "world": 2}, "rank is 2: of world=2 ranks it must be 0 to 1"),
        ({"rank": -1}, "rank is -1"),
    ],
)
def test_options_that_cannot_be_are_refused(numbered: Any, options: dict[str, Any], message: str) -> None:
    for make in (numbered.rows, numbered["float32"].rows):
        with pytest.raises(OptionError, match=message):
            make(**options)


def test_a_set_of_rows_that_ignores_its_seed_is_refused(numbered: Any) -> None:
    for make in (layerprobe.RowDataset, lambda store, **how: store.difference("float32", "float32").rows(**how)):
        with pytest.raises(OptionError, match="seed is 4 and shuffle is False"):
            make(numbered, seed=4)


def test_sites_that_have_no_rows_in_common_are_refused(numbered: Any) -> None:
    with pytest.raises(OptionError, match="'float32' and 'vector' have no rows in common"):
        numbered.rows(sites=["float32", "vector"])
    with pytest.raises(SiteError, match=r"no site 'layers\.9' in"):
        numbered.rows(sites="layers.9")
    with pytest.raises(SiteError, match="no site to take rows of"):
        numbered.rows(sites=[])
    assert [batch["vector"][:, 0].tolist() for batch in numbered.rows(sites="vector")] == [[0, 1, 2, 3, 4]]


def test_attention_weights_have_no_rows(numbered: Any) -> None:
    path = numbered.folder / "store.json"
    said = json.loads(path.read_text())
    said["sites"]["weights"] = {"kind": "attention", "dtype": "float32", "width": 2}
    path.write_text(json.dumps(said))
    store = layerprobe.open(numbered.folder)
    with pytest.raises(OptionError, match="'weights' is one matrix per head and cannot be gone through by rows"):
        store["weights"].rows()
    with pytest.raises(OptionError, match="read it by example"):
        store.rows(sites=["weights"])


def test_batches_share_no_memory_with_the_file_or_each_other(numbered: Any) -> None:
    before = numbered["float32"][0].clone()
    batches = [batch.fill_(number) for number, batch in enumerate(numbered["float32"].rows(10))]
    assert all(bool((batch == number).all()) for number, batch in enumerate(batches))
    assert torch.equal(numbered["float32"][0], before)


def test_a_damaged_shard_stops_an_epoch_and_loses_no_batch(numbered: Any) -> None:
    path = numbered.folder / "shard-000002.safetensors"
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[read_header(path).tensors["float32"].start] ^= 1
    path.write_bytes(damaged)
    iterator = layerprobe.open(numbered.folder)["float32"].rows(10)
    found: list[int] = []
    with pytest.raises(FormatError, match=r"shard-000002.*are not those that were written"):
        found.extend(place for batch in iterator for place in places([batch]))
    state = iterator.state_dict()
    path.write_bytes(sound)
    mended = layerprobe.open(numbered.folder)["float32"].rows(10)
    mended.load_state_dict(state)
    assert found + places(mended) == list(range(2905))


@pytest.mark.parametrize("damage", ["header", "values"])
def test_the_rows_before_a_damaged_shard_come_first(numbered: Any, damage: str) -> None:
    path = numbered.folder / "shard-000002.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[100 if damage == "header" else read_header(path).tensors["float32"].start] ^= 1
    before = sum(read_header(path.with_name(f"shard-00000{unit}.safetensors")).num_tokens for unit in range(2))
    assert before > 10
    path.write_bytes(damaged)
    found: list[int] = []
    iterator = layerprobe.open(numbered.folder)["float32"].rows(10)
    with pytest.raises(FormatError, match=r"shard-000002"):
        found.extend(place for batch in iterator for place in places([batch]))
    assert found == list(range(before - before % 10))


def test_a_closed_store_gives_no_more_rows(numbered: Any) -> None:
    iterator = numbered["float32"].rows(10**5)
    numbered.close()
    with pytest.raises(StoreError, match="this store was closed"):
        next(iterator)


@pytest.mark.parametrize(("num_rows", "width"), [(1 << 44, 8), (1 << 30, 1 << 24), (100, 1 << 24)])
def test_the_order_of_any_store_that_is_read_is_small(num_rows: int, width: int) -> None:
    info = ShardInfo("shard-000000.safetensors", 0, 1, num_rows)
    catalog: Any = SimpleNamespace(shards=[info], check_claims=lambda: None)
    sites = [StoredSite(f"layers.{layer}", "token", torch.float32, width) for layer in range(100)]
    order = EpochOrder(catalog, sites, RowOptions(shuffle=True))
    assert order.num_rows == order.starts[-1] == num_rows
    assert sum(map(len, order.groups)) <= min(num_rows, 1 << 20)
