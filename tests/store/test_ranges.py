"""Stores elsewhere that are larger than the cache: every pass fetches the bytes of its sites once, and checks them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from elsewhere import CountedPlace
from layerprobe.errors import FormatError
from layerprobe.store import rows as rows_module
from layerprobe.store.format import ShardHeader, commit_shard
from layerprobe.store.ranges import TensorCache
from layerprobe.store.writer import commit_description, commit_index

FINGERPRINT = "0" * 32
WIDTH = 768
LENGTHS = (68,) * 10
NUM_SHARDS = 10
SITES = ("layers.0", "layers.1")
# a thousandth of what they are, and so are the shards: a mebibyte of a site in each
GROUP_BYTES, CACHE_BYTES, START_BYTES = 1 << 20, 2 << 20, 64 << 10
SITE_BYTES = NUM_SHARDS * sum(LENGTHS) * WIDTH * 2


def write_store(where: Any) -> None:
    sites = {site: {"kind": "token", "dtype": "float16", "width": WIDTH} for site in SITES}
    commit_description(where, {"sites": sites, "fingerprint": FINGERPRINT, "pool": None})
    headers, first = [], 0
    for unit in range(NUM_SHARDS):
        count, num_tokens = len(LENGTHS), sum(LENGTHS)
        numbers = torch.arange(num_tokens) + unit * num_tokens
        values = (numbers[:, None] % 2048).half().expand(num_tokens, WIDTH)
        tensors: list[tuple[str, Tensor]] = [
            ("example", torch.arange(first, first + count)),
            ("offsets", torch.tensor([0, *LENGTHS]).cumsum(0)),
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
    monkeypatch.setattr(rows_module, "_GROUP_BYTES", GROUP_BYTES)
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
