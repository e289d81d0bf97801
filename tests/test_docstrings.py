"""The labelled set of the tour: what makes a split by file honest."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "docstrings.py"


def test_no_file_and_no_text_is_on_two_sides_and_every_family_is_on_all(tmp_path: Path) -> None:
    out = tmp_path / "docstrings.jsonl"
    said = subprocess.run([sys.executable, SCRIPT, out, "--most", "40"], capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert f"{len(records)} texts of 6 families" in said.stdout
    sides_of_file, sides_of_family = defaultdict(set), defaultdict(set)
    for record in records:
        sides_of_file[record["file"]].add(record["split"])
        sides_of_family[record["label"]].add(record["split"])
    assert all(len(sides) == 1 for sides in sides_of_file.values())
    assert len({record["text"] for record in records}) == len(records)
    assert set(map(frozenset, sides_of_family.values())) == {frozenset({"train", "dev", "test"})}
    assert all(20 <= len(record["text"]) <= 300 for record in records)
