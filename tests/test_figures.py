"""The tables of docs/performance.md say what the benchmarks saved, and nothing where they saved nothing."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

figures = importlib.import_module("figures")

MARKERS = "".join(
    f"<!-- {name}: written by benchmarks/figures.py -->\nold\n<!-- end of the table -->\n" for name in figures.TABLES
)


def test_the_page_holds_what_the_benchmarks_saved() -> None:
    page = figures.PAGE.read_text(encoding="utf-8")
    assert figures.write_tables(page) == page, "run python benchmarks/figures.py"


def test_a_benchmark_that_was_not_saved_leaves_its_place_empty(tmp_path: Path) -> None:
    assert "old" not in figures.write_tables(MARKERS, tmp_path)


def test_a_page_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no place for storing\.json, floor\.json"):
        figures.write_tables("# What a run costs\n", tmp_path)
    with pytest.raises(ValueError, match=r"the place of storing\.json, floor\.json has no end"):
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


def test_columns_that_an_older_file_lacks_are_left_out() -> None:
    """A run without clocks stands beside the clocked one where it was timed; a GPU has a bus in place of copies."""
    document = json.loads((figures.RESULTS / "floor.json").read_text(encoding="utf-8"))
    regime = document["results"]["regimes"][0]
    old = {key: value for key, value in regime.items() if not key.startswith("plain_")}
    new = {**old, "plain_whole_s": 7.25, "plain_ratio": 1.375, "bus_s": 0.5, "busy_share": 0.75}
    del new["copy_s"]
    added = {"bus", "plain whole", "plain over the floor", "GPU busy"}
    for one, extra, lost in ((old, set(), added), (new, added, {"copy"})):
        document["results"]["regimes"] = [one]
        headers, _, row = figures.lay_out_floor(document)[2:5]
        found = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (headers, row)), strict=True))
        assert extra <= set(found) and not lost & set(found)
        assert not extra or (found["plain whole"], found["plain over the floor"]) == ("7.25", "1.375")


def test_a_pooled_point_says_so() -> None:
    document = json.loads((figures.RESULTS / "growth.json").read_text(encoding="utf-8"))
    point = {**document["results"]["examples"][0], "sites": "one"}
    document["results"] = {"pooled": [{**point, "pool": "mean"}, point]}
    pooled, rows = figures.lay_out_growth(document)[-2:]
    assert "| one, mean |" in pooled and "| one |" in rows


def test_the_costs_of_a_run_are_those_of_the_paces_that_were_measured() -> None:
    """Worked out once more, by hand."""
    storing, floor = (json.loads((figures.RESULTS / f"{name}.json").read_text()) for name in ("storing", "floor"))
    (case,) = (case for case in storing["results"] if case["model"] == "random bert-base, padded batches")
    bare = next(way["s"] for way in case["ways"] if way["pass"] == "second" and way["way"] == "bare")
    found = next(one for one in floor["results"]["regimes"] if one["regime"] == "all, rows, float16")
    token_s, byte_s = bare / case["tokens"], found["disk_s"] / found["bytes"]
    text = "\n".join(figures.lay_out_costs(storing, floor))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[4:]]
    assert len(rows) == 8 and {row[5] for row in rows} <= {"forward", "disk"}
    million, _, last, third, *_, trillion = rows
    assert million[2:5] == ["20.0 GB", f"{10**6 * token_s / 60:.1f} minutes", f"{10**6 * 19968 * byte_s:.1f} s"]
    assert last[2:4] == ["1.5 TB", f"{10**9 * token_s / 86400:.1f} days"]
    assert third[3] == f"{10**9 * token_s / 3 / 86400:.1f} days"
    assert trillion[2:4] == ["76.8 TB", f"{10**12 * token_s / 3 / 86400 / 365:.1f} years"]
    assert trillion[4] == f"{10**12 * 1536 / 20 * byte_s / 3600:.1f} hours"
    assert trillion[6] == str(math.ceil(10**12 * token_s / 3 / (30 * 86400)))
    assert million[7] == f"{1 / byte_s / 19968:,.0f} tokens/s"
    demo = floor["settings"]["tokens"] / found["forward_s"]
    assert f"{1 / token_s:,.0f} tokens/s, " in text and f"({demo:,.0f} of the demo)" in text
