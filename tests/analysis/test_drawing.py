"""Rows mixed and drawn: of the whole store alike, each once, as they are stored, and each shard fetched once."""

import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import layerprobe as lp
from elsewhere import CountedPlace
from layerprobe.analysis import drawing
from layerprobe.analysis.drawing import draw_numbers, draw_rows
from layerprobe.analysis.moments import Scaling
from layerprobe.analysis.passes import ShapePass
from layerprobe.analysis.sweep import choose_depth
from layerprobe.store.ranges import TensorCache
from layerprobe.store.reader import Store
from planting import plant


@pytest.fixture
def numbered(tmp_path: Path) -> Store:
    """4,800 rows in 300 shards, more than an epoch mixes at once; each row is its number."""
    rows = torch.arange(4800.0).view(-1, 1)
    layers = {"layers.0": torch.cat([rows, -rows], 1), "layers.1": rows}
    return lp.open(plant(tmp_path / "numbered", layers, [16] * 300, shards=300))


def measure_evenness(rows: np.ndarray) -> float:
    """How likely even draws are to hit the 300 shards as unevenly as these."""
    from scipy.stats import chisquare

    return float(chisquare(np.bincount(rows.astype(int) // 16, minlength=300)).pvalue)


@pytest.mark.parametrize("block_rows", [None, 500])
def test_drawn_rows_are_of_the_whole_store_each_once(
    numbered: Store, block_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = choose_depth(numbered, None)
    if block_rows is not None:
        monkeypatch.setattr("layerprobe.analysis.drawing._BLOCK_BYTES", 12 * block_rows)
        monkeypatch.setattr("layerprobe.analysis.drawing._DRAWN_ROWS", block_rows // 2)

    def draw_numbered(seed: int) -> list[list[Tensor]]:
        return list(draw_rows(numbered, sites, max_rows=1200, seed=seed, progress=False))

    batches = draw_numbered(1)
    pairs, alone = (torch.cat(values) for values in zip(*batches, strict=True))
    rows = alone[:, 0].numpy()
    assert len(set(rows)) == 1200 and all(len(batch[0]) <= 1024 for batch in batches)
    assert torch.equal(pairs, torch.cat([alone, -alone], 1))
    assert measure_evenness(rows) > 0.001
    if block_rows is None:
        # mixed: rows that follow on each other lie as far apart as any two, by a third of all
        assert abs(np.abs(np.diff(rows)).mean() - 1600) < 150
    assert torch.equal(torch.cat([batch[1] for batch in draw_numbered(1)]), alone)
    assert set(torch.cat([batch[1] for batch in draw_numbered(2)])[:, 0].tolist()) != set(rows)


def test_drawing_rows_lets_go_of_the_shards_that_they_are_of(numbered: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog, sites = numbered.catalog, choose_depth(numbered, None)
    monkeypatch.setattr("layerprobe.analysis.sweep._MOST_MAPPED_BYTES", 0)
    drawn = draw_rows(numbered, sites, max_rows=1200, seed=0, progress=False)
    assert len(next(drawn)[0]) == 1024 and catalog.num_open == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "int8"])
def test_drawn_rows_are_those_that_are_stored(dtype: str, tmp_path: Path) -> None:
    texts = [f"{first} {second}" for first in ("rain", "snow") for second in ("falls", "stops", "comes on")]
    store = lp.extract("demo", texts, tmp_path / "acts", sites="layers.-2:", dtype=dtype, progress=False)
    sites = choose_depth(store, None)
    (drawn,) = draw_rows(store, sites, max_rows=9, seed=0, progress=False)
    every = torch.cat([torch.cat([batch[site.name].double() for site in sites], 1) for batch in store.rows()])
    rows = torch.cat(drawn, 1)
    assert len(rows) == 9 and (rows[:, None] == every).all(2).any(1).all()


@dataclass(frozen=True, eq=False)
class Seen(Scaling):
    """Remembers the rows whose neighbours are looked for."""

    rows: list[Tensor] = field(default_factory=list)

    def apply(self, rows_nD: Tensor) -> Tensor:
        self.rows.append(rows_nD)
        return super().apply(rows_nD)


@pytest.mark.parametrize("max_rows", [None, 2400])
def test_rows_kept_for_neighbours_are_of_the_whole_store(numbered: Store, max_rows: int | None) -> None:
    sites = choose_depth(numbered, None)
    shape = ShapePass(sites, 1200, max_rows or 4800, 0)
    for values in draw_rows(numbered, sites, max_rows=max_rows, seed=0, progress=False):
        shape.add(values)
    seen = Seen()
    shape.overlap([(0, 1)], [Scaling(), seen], 10)
    kept = seen.rows[0][:, 0].numpy()
    assert len(set(kept)) == shape.num_sampled == 1200
    assert measure_evenness(kept) > 0.001


def test_numbers_are_drawn_without_a_number_for_each_row() -> None:
    tracemalloc.start()
    numbers = draw_numbers(10**12, 2000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(numbers.tolist())) == 2000 and (np.diff(numbers) > 0).all() and peak < 1 << 20
    assert draw_numbers(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    assert sorted({int(one) for seed in range(99) for one in draw_numbers(7, 2, seed)}) == list(range(7))


def open_elsewhere(url: Any, shards: int, cache_share: float) -> tuple[Store, CountedPlace, int]:
    """Plant 16,000 rows of two sites elsewhere; gives the bytes of the sites too, many times what opening takes."""
    rows = (torch.arange(16_000) % 2048).half().view(-1, 1).expand(-1, 768).contiguous()
    plant(url, {"layers.0": rows, "layers.1": -rows}, [40] * 400, shards=shards)
    place, num_bytes = CountedPlace(url), 2 * rows.nbytes
    store = lp.open(place)
    store.catalog._cache = TensorCache(int(cache_share * num_bytes))
    return store, place, num_bytes


@pytest.mark.parametrize("num_blocks", [1, 30])
@pytest.mark.parametrize("shards", [1, 8, 100])
def test_a_draw_fetches_a_store_larger_than_the_cache_once(
    shards: int, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, place, num_bytes = open_elsewhere(f"memory://drawn-{shards}-{num_blocks}/acts", shards, 0.2)
    monkeypatch.setattr(drawing, "_DRAWN_ROWS", 64)
    monkeypatch.setattr(drawing, "_BLOCK_BYTES", 9000 * 2 * 768 * 2 // num_blocks)
    monkeypatch.setattr(drawing, "_PIECE_BYTES", num_bytes // 10)
    sites = choose_depth(store, None)
    rows = [rows for rows, _ in draw_rows(store, sites, max_rows=9000, seed=0, progress=False)]
    store.catalog._cache.close()  # what is on its way counts
    assert sum(map(len, rows)) == 9000
    # and where examples lie, which is little beside shards of a usual size
    assert place.num_bytes <= num_bytes + shards * (64 << 10) + 16 * 16_000
    store.close()


@pytest.mark.parametrize("folder", [True, False])
def test_each_shard_is_opened_once_for_a_draw(folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(4800.0).view(-1, 1)
    where: Any = tmp_path / "acts" if folder else "memory://opened/acts"
    store = lp.open(plant(where, {"layers.0": rows, "layers.1": rows}, [16] * 300, shards=300))
    monkeypatch.setattr("layerprobe.analysis.sweep._MOST_MAPPED_BYTES", 0)
    monkeypatch.setattr(drawing, "_DRAWN_ROWS", 128)
    monkeypatch.setattr(drawing, "_BLOCK_BYTES", 8 * 128)
    opened, make_shard = list[int](), store.catalog._make_shard

    def count(number: int) -> Any:
        opened.append(number)
        return make_shard(number)

    monkeypatch.setattr(store.catalog, "_make_shard", count)
    for _ in draw_rows(store, choose_depth(store, None), max_rows=1200, seed=0, progress=False):
        pass
    assert len(opened) > 280 and len(set(opened)) == len(opened)
    store.close()


@pytest.mark.parametrize("shards", [1, 3])
def test_blocks_of_few_shards_are_of_the_whole_store(
    shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.arange(4800.0).view(-1, 1)
    store = lp.open(plant(tmp_path / "acts", {"layers.0": rows, "layers.1": -rows}, [16] * 300, shards=shards))
    monkeypatch.setattr(drawing, "_DRAWN_ROWS", 300)
    monkeypatch.setattr(drawing, "_BLOCK_BYTES", 8 * 300)
    gathered, gather = list[int](), drawing._gather

    def count(*given: Any) -> dict[str, Tensor]:
        found = gather(*given)
        gathered.append(len(found["layers.0"]))
        return found

    monkeypatch.setattr(drawing, "_gather", count)
    batches = [
        rows[:, 0] for rows, _ in draw_rows(store, choose_depth(store, None), max_rows=1200, seed=0, progress=False)
    ]
    drawn = torch.cat(batches).numpy()
    assert len(set(drawn)) == 1200 and measure_evenness(drawn) > 0.001
    # a sixteenth of a block is one piece
    assert len(gathered) == 4 and max(gathered) < 300 * 1.2
    for block in np.split(drawn, np.cumsum(gathered)[:-1]):
        # of every third of the store
        assert np.bincount(block.astype(int) // 1600, minlength=3).min() > 20
        assert abs(np.diff(block)).mean() > 1000
