"""The commands that bring stores elsewhere: what they print, and their exit codes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import layerprobe as lp
from layerprobe.models import LoadedModel

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def acts(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> Path:
    lp.extract(tiny, texts, tmp_path / "acts", dtype="bfloat16", shard_size=10_000)
    return tmp_path / "acts"


def refused(result: tuple[int, str, str], message: str) -> None:
    code, _, said = result
    assert code == 2 and said.startswith("layerprobe: ") and message in said and said.count("\n") == 1


def test_export_writes_a_table_and_says_what_became_of_the_dtype(run: Run, acts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    code, printed, said = run("export", acts, "-o", out, "-s", "layers.0", "-s", "layers.-1", "--rows", "tokens")
    assert code == 0 and said == ""
    assert printed.startswith(f"{out}: 12 examples, ") and "2 sites, " in printed
    assert "2 sites of bfloat16 became float32" in printed
    assert pq.read_schema(out).names[-2:] == ["layers.0", "layers.2"]
    refused(run("export", acts, "-o", out), "out.parquet: exists already")
    refused(run("export", acts, "--to", "npz", "-o", out, "--overwrite"), "the name says parquet, to='npz' another")
    assert run("export", acts, "-o", tmp_path / "out.npz", "-q") == (0, "", "")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert "layers.1" in arrays
    refused(run("export", acts, "-o", tmp_path / "x", "--to", "csv"), "no format 'csv'")
    refused(run("export", acts, "-o", tmp_path / "x", "--sites", "layers.7"), "no site 'layers.7'")
    refused(run("export", acts), "Missing option '--out'")


def test_merge_ends_with_1_while_units_are_missing(run: Run, acts: Path, tmp_path: Path) -> None:
    shutil.copytree(acts, tmp_path / "part")
    (tmp_path / "part" / "index.json").unlink()
    (tmp_path / "part" / "shard-000001.safetensors").unlink()
    code, printed, said = run("merge", tmp_path / "out", tmp_path / "part")
    assert code == 1 and said == "" and "not complete: 1 unit missing (1)" in printed
    code, printed, said = run("merge", tmp_path / "out", tmp_path / "part", acts, "--link")
    assert code == 0 and said == "" and ", 1 of them new; " in printed
    assert lp.open(tmp_path / "out").is_complete
    assert (tmp_path / "out" / "shard-000001.safetensors").samefile(acts / "shard-000001.safetensors")
    refused(run("merge", tmp_path / "out"), "Missing argument 'DIR...'")
    refused(run("merge", tmp_path / "out", tmp_path / "none"), "none: does not exist")


def test_push_and_pull_name_what_is_wrong_in_one_line(run: Run, acts: Path, tmp_path: Path) -> None:
    refused(run("push", acts, "someone/acts"), "write hf://datasets/USER/NAME")
    refused(run("pull", "hf://someone/acts", tmp_path / "back"), "write hf://datasets/USER/NAME")
    # the tests run with HF_HUB_OFFLINE
    refused(run("push", acts, "hf://datasets/someone/acts", "--private"), "someone/acts: the hub refused (")
    refused(run("pull", "hf://datasets/someone/acts", tmp_path / "back"), "someone/acts: the hub refused (")
    assert not (tmp_path / "back").exists()
