"""Going through a store: every row once with what it belongs to, the draw, the choice of sites, bounded memory."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import layerprobe as lp
import memory
from layerprobe.analysis.features import read_site
from layerprobe.analysis.points import draw_points
from layerprobe.analysis.sweep import choose_depth, count_types, sweep
from layerprobe.analysis.tasks import make_task
from layerprobe.errors import OptionError, SiteError
from layerprobe.store.reader import Store
from planting import plant

LENGTHS = [3, 0, 5, 1, 4, 7, 2, 6] * 300


def draw(width: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sum(LENGTHS), width, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    layers = {"layers.0": draw(), "layers.1": draw(6, torch.float16), "layers.1.ffn.out": draw()}
    return lp.open(plant(tmp_path / "acts", layers, LENGTHS))


def test_every_row_comes_once_with_what_it_belongs_to(store: Store) -> None:
    chunks = list(sweep(store, choose_depth(store, None)))
    assert len(chunks) > 2 and all(len(chunk.examples) <= 4096 for chunk in chunks)
    assert sum(len(chunk.examples) for chunk in chunks) == sum(LENGTHS)
    seen: set[tuple[int, int]] = set()
    for chunk in chunks:
        assert chunk.positions is not None and chunk.input_ids is not None
        assert set(chunk.values) == {"layers.0", "layers.1"}
        places = list(zip(chunk.examples.tolist(), chunk.positions.tolist(), strict=True))
        seen.update(places)
        for row, (example, position) in list(enumerate(places))[::50]:
            assert int(store.input_ids(example)[position]) == int(chunk.input_ids[row])
            for site, values in chunk.values.items():
                stored = store[site][example]
                assert isinstance(stored, Tensor) and torch.equal(values[row], stored[position].double())
    assert len(seen) == sum(LENGTHS)


def test_a_draw_takes_whole_examples_by_the_seed(store: Store) -> None:
    sites = choose_depth(store, None)
    drawn = [
        torch.cat([chunk.examples for chunk in sweep(store, sites, max_rows=900, seed=seed)]) for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    # the last example that is taken may go beyond
    assert all(900 <= len(examples) < 900 + max(LENGTHS) for examples in drawn)
    found, counts = torch.unique(drawn[0], return_counts=True)
    assert counts.tolist() == [LENGTHS[example] for example in found.tolist()]


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize("max_rows", [1, 2, 9, 27, 28, 29])
def test_a_draw_of_a_small_store_is_of_as_many_rows_as_were_asked_for(
    tmp_path: Path, shards: int, max_rows: int
) -> None:
    lengths = LENGTHS[:8]
    small = lp.open(plant(tmp_path / "small", {"layers.0": draw()[: sum(lengths)]}, lengths, shards=shards))
    sites = choose_depth(small, None)
    seen: set[int] = set()
    for seed in range(60):
        chunks = list(sweep(small, sites, max_rows=max_rows, seed=seed))
        examples = torch.cat([chunk.examples for chunk in chunks])
        # without the longest that was taken there are too few
        longest = max(lengths[example] for example in set(examples.tolist()))
        assert min(max_rows, sum(lengths)) <= len(examples) < max_rows + longest
        seen |= set(examples.tolist())
    # every example that has rows is drawn by some seed
    assert seen == {example for example, length in enumerate(lengths) if length}


def test_vectors_of_examples_are_drawn_to_the_number(tmp_path: Path) -> None:
    pooled = lp.open(plant(tmp_path / "pooled", {"pooler": draw()[:8]}, [1] * 8, pool="mean", shards=2))
    sites = choose_depth(pooled, None)
    assert [sum(len(chunk.examples) for chunk in sweep(pooled, sites, max_rows=most)) for most in (1, 5, 8, 9)] == [
        *(1, 5, 8, 8)
    ]


def test_types_are_counted_from_the_ids(store: Store) -> None:
    types, counts = count_types(store)
    expected = torch.unique(torch.arange(sum(LENGTHS)) % 7, return_counts=True)
    assert torch.equal(types, expected[0]) and torch.equal(counts, expected[1])


def test_sites_are_the_layers_unless_patterns_say_otherwise(store: Store, tmp_path: Path) -> None:
    assert [site.name for site in choose_depth(store, None)] == ["layers.0", "layers.1"]
    assert [site.name for site in choose_depth(store, "layers.*.ffn.out")] == ["layers.1.ffn.out"]
    with pytest.raises(SiteError, match=r"layers\.7"):
        choose_depth(store, "layers.7")
    other = lp.open(plant(tmp_path / "other", {"pooler": draw()[:8]}, [1] * 8, pool="mean"))
    assert [site.name for site in choose_depth(other, None)] == ["pooler"]


def test_attention_weights_have_no_rows(tmp_path: Path) -> None:
    store = lp.extract("demo", ["So it goes."], tmp_path / "acts", sites="layers.0.attention.weights", progress=False)
    with pytest.raises(SiteError, match="no site with rows in"):
        lp.differences(store)
    with pytest.raises(OptionError, match="one matrix per head and cannot be gone through by rows"):
        lp.differences(store, sites="layers.0.attention.weights")


def test_weights_that_were_named_are_refused_and_those_of_a_wildcard_left_out() -> None:
    sites = ["layers.0", "layers.0.attention.weights", "layers.1"]
    store = lp.extract("demo", ["So it goes.", "Who left?"], "memory://named", sites=sites, progress=False)
    for patterns in (["layers.*", "layers.0.attention.weights"], ["layers.1", "layers.-2.attention.weights"]):
        with pytest.raises(OptionError, match=r"'layers\.0\.attention.weights' is one matrix per head"):
            choose_depth(store, patterns)
    for patterns in (["layers.*", "layers.*.attention.weights"], ["layers.0", "layers.0.*.weights", "layers.1"]):
        assert [site.name for site in choose_depth(store, patterns)] == ["layers.0", "layers.1"]


PEAKS = """
import sys, torch
import layerprobe as lp
from layerprobe.analysis import sweep
from memory import measure_peak

torch.set_num_threads(1)
read, kept = sweep._read, []

def measure(folder):
    def run():
        lp.differences(folder, sample=500, progress=False)
        lp.check(folder, progress=False)
    return measure_peak(run)

def leak(*given):
    chunk = read(*given)
    is_first = chunk.examples.diff(prepend=torch.tensor([-1])) != 0
    kept.extend(row.clone() for row in chunk.values["layers.0"][is_first])
    return chunk

# what a first run leaves is there before the runs that count
measure(sys.argv[1])
measure(sys.argv[1])
print(*map(measure, sys.argv[1:]))
sweep._read = leak
print(measure(sys.argv[2]))
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    """And a row of one site that were kept of each text would show."""

    def write(count: int) -> str:
        rows = torch.randn(count, 64, generator=torch.Generator().manual_seed(0)).half()
        layers = {"embeddings": rows, "layers.0": rows, "layers.1": rows}
        return str(plant(tmp_path / str(count), layers, [3] * (count // 3), shards=count // 6000))

    small, large, leaky = map(int, memory.run_measured(PEAKS, write(36_000), write(180_000)).split())
    # kilobytes; a chunk is of 6 MB, the larger store holds 55 more, the leak some 160
    assert large - small < 25_000 < leaky - small, (small, large, leaky)


@pytest.mark.parametrize("analysis", ["differences", "check", "plot", "classify", "report"])
def test_every_analysis_shows_how_far_it_is(analysis: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = [{"label": "ab"[one % 2]} for one in range(40)]
    rows = torch.randn(160, 5, generator=torch.Generator().manual_seed(0))
    store = lp.open(plant(tmp_path / "acts", {"layers.0": rows, "layers.1": rows.square()}, [4] * 40, fields=fields))
    run: dict[str, Callable[[bool], object]] = {
        "differences": lambda shown: lp.differences(store, progress=shown),
        "check": lambda shown: lp.check(store, progress=shown),
        "plot": lambda shown: lp.plot(store, progress=shown),
        "classify": lambda shown: lp.classify(store, progress=shown),
        "report": lambda shown: lp.report(store, tmp_path / "page.html", progress=shown),
    }
    run[analysis](False)
    assert capsys.readouterr().err == ""
    run[analysis](True)
    bars = {
        "differences": {"moments", "moves"},
        "check": {"moments", "cosines"},
        "plot": {"points", "pca"},
        "classify": {"probes"},
        "report": {"points", "pca", "moments", "moves"},
    }
    seen = {part.split(":")[0].strip() for part in capsys.readouterr().err.split("\r") if "%|" in part}
    assert seen == bars[analysis]


def test_mappings_are_let_go_after_so_many_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = store["layers.0"].catalog
    for _ in sweep(store, choose_depth(store, None)):
        pass
    assert catalog.num_open == store.num_shards
    kept = store["layers.0"][2]
    before = kept.float().clone()
    monkeypatch.setattr("layerprobe.analysis.sweep._MOST_MAPPED_BYTES", 0)
    for _ in sweep(store, choose_depth(store, None)):
        pass
    assert catalog.num_open == 0 and torch.equal(kept.float(), before)
    assert torch.equal(store["layers.0"][2].float(), before)


@pytest.mark.parametrize("what", ["points", "examples", "spans"])
def test_what_is_drawn_or_classified_lets_go_of_mappings_too(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randn(160, 5, generator=torch.Generator().manual_seed(0))
    store = lp.open(plant(tmp_path / "acts", {"layers.0": rows}, [4] * 40))
    catalog, sites = store["layers.0"].catalog, choose_depth(store, None)
    labels = ["ab"[one % 2] for one in range(40)]
    task = make_task(store, [[one] * 4 for one in labels] if what == "spans" else labels)

    def read() -> object:
        if what == "points":
            return (
                draw_points(store, sites, "rows", pool=None, max_points=99, seed=0, named=()).values["layers.0"].numpy()
            )
        return read_site(store, "layers.0", task, None if what == "spans" else "mean")

    catalog.release()
    before = read()
    assert catalog.num_open == store.num_shards
    monkeypatch.setattr("layerprobe.analysis.sweep._MOST_MAPPED_BYTES", 0)
    assert np.array_equal(read(), before)  # type: ignore[arg-type]
    assert catalog.num_open == 0
