"""The tables of docs/performance.md say what the benchmarks saved, and nothing where they saved nothing."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

figures = importlib.import_module("figures")

MARKERS = "".join(
    f"<!-- {name}.json: written by benchmarks/figures.py -->\nold\n<!-- end of the table -->\n"
    for name in figures.TABLES
)


def test_the_page_holds_what_the_benchmarks_saved() -> None:
    page = figures.PAGE.read_text(encoding="utf-8")
    assert figures.write_tables(page) == page, "run python benchmarks/figures.py"


def test_a_benchmark_that_was_not_saved_leaves_its_place_empty(tmp_path: Path) -> None:
    assert "old" not in figures.write_tables(MARKERS, tmp_path)


def test_a_page_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no place for floor\.json"):
        figures.write_tables("# What a run costs\n", tmp_path)
    with pytest.raises(ValueError, match=r"the place of floor\.json has no end"):
        figures.write_tables(MARKERS.replace(figures.END, ""), tmp_path)


def test_each_figure_of_a_saved_run_is_in_its_table(tmp_path: Path) -> None:
    ways = {"wall_s": 1.25, "wall_ratio": 3.5, "cpu_ratio": 2.75, "peak_bytes": 3 << 20, "bytes": 5 << 20}
    document = {
        "machine": {"cpu": "a processor", "cores": 2},
        "versions": {"torch": "2.0"},
        "settings": {"texts": 4000, "tokens": 81000, "rounds": 3, "versions": {"nnsight": "0.8"}},
        "results": {
            "ways": {"a loop": {**ways, "agree": 7, "compared": 9}},
            "missing": {"NeuroX": "PackageNotFoundError: neurox"},
        },
    }
    (tmp_path / "peers.json").write_text(json.dumps(document), encoding="utf-8")
    page = figures.write_tables(MARKERS, tmp_path)
    assert "4,000 docstrings, 81,000 tokens, medians of 3 rounds, a processor, 2 cores, torch 2.0; nnsight 0.8:" in page
    assert "| a loop | 1.25 | 3.5 | 2.75 | 3.1 MB | 5.2 MB | 7 of 9 |" in page
    assert "NeuroX is left out: `PackageNotFoundError: neurox`." in page
