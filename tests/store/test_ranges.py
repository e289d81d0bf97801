"""Stores elsewhere that are larger than the cache: every pass fetches the bytes of its sites once, and checks them."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from elsewhere import CountedPlace
from layerprobe.errors import FormatError
from layerprobe.store import order as order_module
from layerprobe.store import rows as rows_module
from layerprobe.store.description import commit_description
from layerprobe.store.format import commit_shard
from layerprobe.store.headers import ShardHeader
from layerprobe.store.index import commit_index
from layerprobe.store.ranges import TensorCache

FINGERPRINT = "0" * 32
WIDTH = 768
LENGTHS = (68,) * 10
NUM_SHARDS = 10
SITES = ("layers.0", "layers.1")
# a thousandth of what they are, and so are the shards: a mebibyte of a site in each
GROUP_BYTES, CACHE_BYTES, START_BYTES = 1 << 20, 2 << 20, 64 << 10
SITE_BYTES = NUM_SHARDS * sum(LENGTHS) * WIDTH * 2


def write_store(where: Any, num_shards: int = NUM_SHARDS, lengths: tuple[int, ...] = LENGTHS) -> None:
    sites = {site: {"kind": "token", "dtype": "float16", "width": WIDTH} for site in SITES}
    commit_description(where, {"sites": sites, "fingerprint": FINGERPRINT, "pool": None})
    headers, first = [], 0
    for unit in range(num_shards):
        count, num_tokens = len(lengths), sum(lengths)
        numbers = torch.arange(num_tokens) + unit * num_tokens
        values = (numbers[:, None] % 2048).half().expand(num_tokens, WIDTH)
        tensors: list[tuple[str, Tensor]] = [
            ("example", torch.arange(first, first + count)),
            ("offsets", torch.tensor([0, *lengths]).cumsum(0)),
            ("input_ids", numbers),
            *((site, (values + place).contiguous()) for place, site in enumerate(SITES)),
        ]
        header = ShardHeader(unit, count, num_tokens, first, FINGERPRINT)
        commit_shard(where, header, tensors)
        headers.append(header)
        first += count
    commit_index(where, headers)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A store of ten shards whose one site is five times the cache."""
    monkeypatch.setattr(order_module, "_GROUP_BYTES", GROUP_BYTES)
    monkeypatch.setattr(rows_module, "_WINDOW_BYTES", 64 << 10)
    url = f"memory://ranges-{request.node.name}/acts"
    write_store(url)
    store = lp.open(CountedPlace(url))
    store.catalog._cache = TensorCache(CACHE_BYTES)
    yield store
    store.close()


PASSES: dict[str, tuple[Callable[[Any], object], int]] = {
    "pooled": (lambda store: store["layers.0"].pooled(), 1),
    "iterated": (lambda store: [rows.sum() for rows in store["layers.0"]], 1),
    "examples": (lambda store: [example.input_ids for example in store], 2),
    "in order": (lambda store: [rows.sum() for rows in store["layers.0"].rows(16)], 1),
    "in order, all sites": (lambda store: [None for _ in store.rows(16)], 2),
    "shuffled": (lambda store: [rows.sum() for rows in store["layers.0"].rows(16, shuffle=True)], 1),
    "shuffled, all sites": (lambda store: [None for _ in store.rows(16, shuffle=True)], 2),
    "sites in step": (lambda store: [None for _ in zip(*(store[site] for site in SITES), strict=True)], 2),
    "pools in step": (lambda store: list(zip(*(store[site].iter_pooled() for site in SITES), strict=True)), 2),
    "side by side": (
        lambda store: list(zip(*(store[site].rows(16, shuffle=True) for site in SITES), strict=True)),
        2,
    ),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_over_a_store_larger_than_the_cache_fetches_its_sites_once(counted: Any, name: str) -> None:
    read, num_sites = PASSES[name]
    read(counted)
    counted.catalog._cache.close()  # what is on its way counts
    other_bytes = NUM_SHARDS * (START_BYTES + 8 * sum(LENGTHS))  # where examples lie, and ids
    assert counted.place.num_bytes <= num_sites * SITE_BYTES + other_bytes


def test_shuffled_rows_of_parts_of_shards_are_every_row_once(counted: Any, tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    folder.mkdir()
    write_store(folder)
    ours = list(counted.rows(50, shuffle=True, seed=3))
    theirs = list(lp.open(folder).rows(50, shuffle=True, seed=3))
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(one[site], other[site]) for site in SITES)
        assert torch.equal((one["layers.0"][:, 0].double() + 1).half(), one["layers.1"][:, 0])


IN_STEP: dict[str, tuple[Callable[[Any], object], int]] = {
    "sites": (lambda store: list(zip(*(store[site] for site in SITES), strict=True)), 2),
    "a site twice": (lambda store: list(zip(store["layers.1"], store["layers.1"], strict=True)), 1),
    "a difference": (lambda store: list(store.difference(*SITES)), 2),
    "examples and a site": (lambda store: list(zip(store, store["layers.1"], strict=True)), 3),
}


@pytest.mark.parametrize("name", IN_STEP)
def test_what_is_read_in_step_comes_by_whole_tensors(counted: Any, name: str) -> None:
    read, num_tensors = IN_STEP[name]
    read(counted)
    counted.catalog._cache.close()  # what is on its way counts
    assert len(counted.place.requests) <= NUM_SHARDS * (1 + num_tensors)  # the beginning of a shard is one


@pytest.mark.parametrize(
    "read", [*(read for read, _ in IN_STEP.values()), lambda store: list(store["layers.1"].rows(16))]
)
def test_a_damaged_tensor_is_found_in_step_and_in_order(counted: Any, read: Callable[[Any], object]) -> None:
    file = "shard-000004.safetensors"
    data = bytearray(counted.place.read(file, 0, counted.place.size(file)))
    data[-1000] ^= 1
    counted.place.commit(file, [bytes(data)])
    with pytest.raises(FormatError, match=r"shard-000004.*'layers.1' are not those that were written"):
        read(counted)


def test_rows_in_order_hold_no_more_ahead_than_there_is_room_for(counted: Any) -> None:
    iterators = [counted[SITES[place % 2]].rows(16) for place in range(4)]
    most = 0
    for place, iterator in enumerate(iterators):
        iterator.load_state_dict({**iterator.state_dict(), "given": 100 * place})
    for _ in range(100):
        for iterator in iterators:
            next(iterator)
            most = max(most, counted.catalog._cache._num_bytes)
    assert most <= CACHE_BYTES + len(iterators) * SITE_BYTES // NUM_SHARDS


def _watch_tensors(store: Any) -> list[Any]:
    return [ref(future.result()) for future, _ in store.catalog._cache._kept.values()]


@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_that_are_done_with_are_let_go_of(counted: Any, shuffle: bool) -> None:
    held, iterator = counted.catalog._cache._held, counted["layers.0"].rows(16, shuffle=shuffle)
    state = iterator.state_dict()
    next(iterator)
    assert len(held) > 0
    iterator.load_state_dict(state)
    assert len(held) == 0
    assert sum(len(rows) for rows in iterator) == NUM_SHARDS * sum(LENGTHS)
    assert len(held) == 0


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_closed_store_lets_go_of_what_its_iterators_held(counted: Any, shuffle: bool) -> None:
    readers = [counted["layers.0"].rows(16, shuffle=shuffle), iter(counted["layers.1"])]
    for reader in readers:
        next(reader)
    tensors = _watch_tensors(counted)
    assert len(tensors) >= 2 and None not in [tensor() for tensor in tensors]
    counted.close()
    gc.collect()
    assert [tensor() for tensor in tensors] == [None] * len(tensors)


def test_nothing_is_thrown_out_for_what_is_declined_then() -> None:
    cache = TensorCache(100)

    def begin(name: str, size: int, ahead: bool = False) -> Any:
        return (cache.begin_ahead if ahead else cache.begin)((name, "", 0, 1), size, lambda: torch.zeros(1))

    held = begin("a", 60)
    begin("b", 30)  # which nobody holds
    assert begin("c", 50, ahead=True) is None
    assert [file for file, *_ in cache._kept] == ["a", "b"]
    assert begin("d", 40, ahead=True) is not None  # in place of `b`
    assert [file for file, *_ in cache._kept] == ["a", "d"] and held is not None
    cache.close()


@pytest.fixture
def small_shards(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A store of 64 shards of a hundred rows."""
    url = f"memory://small-{request.node.name}/acts"
    write_store(url, 64, (50, 50))
    with lp.open(CountedPlace(url)) as store:
        yield store


def test_small_shards_are_opened_several_at_once_where_rows_come_in_order(small_shards: Any) -> None:
    place, num_waits, num_rows = small_shards.place, 0, 0
    iterator = small_shards["layers.0"].rows(20)
    iterator._window = 1
    before: set[str] = set()
    for rows in iterator:
        num_rows += len(rows)
        num_waits += set(place.requests) != before
        before = set(place.requests)
    assert num_rows == 6400 and len(before) == 64
    assert num_waits <= 64 // 4


@pytest.mark.parametrize("way", ["pooled", "iteration", "examples", "shards", "where"])
def test_small_shards_are_opened_several_at_once_where_they_come_in_turn(small_shards: Any, way: str) -> None:
    ways: dict[str, Any] = {
        "pooled": small_shards["layers.0"].iter_pooled(),
        "iteration": small_shards["layers.0"],
        "examples": small_shards,
        "shards": small_shards.iter_shards(),
        "where": iter([small_shards.where(token_id=1)]),
    }
    place, num_waits = small_shards.place, 0
    before: set[str] = set()
    for _ in ways[way]:
        num_waits += set(place.requests) != before
        before = set(place.requests)
    assert len([file for file in before if file.startswith("shard-")]) == 64
    assert num_waits <= 64 // 4


def test_a_share_asks_for_no_shard_that_it_has_no_batch_in(small_shards: Any) -> None:
    share = small_shards["layers.0"].rows(100, rank=3, world=8)
    assert sum(len(rows) for rows in share) == 800
    first_and_own = {f"shard-{number:06d}.safetensors" for number in (0, *range(3, 64, 8))}
    assert set(small_shards.place.requests) == first_and_own
