"""The benchmarks: each runs in small and ends in its JSON line; what they cannot do is refused in one line.

They look into the library from outside, by names that are private to it: where one is renamed, this is what notices.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
# by how they use what the benchmarks share: the others are parts of these
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "emit(" in path.read_text(encoding="utf-8"))
# what some need beside the tests' own packages
NEEDED = {"page": "PyQt6.QtWebEngineWidgets"}
SUBJECTS = ("floor", "growth", "peers")

sys.path.insert(0, str(FOLDER))


def run_script(name: str, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    # as an installed package would be found; the tests' own folder for the browser
    found = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": found}, capture_output=True, text=True, check=False
    )


def is_missing(package: str) -> bool:
    top = package.partition(".")[0]
    return find_spec(top) is None or find_spec(package) is None


def assert_refused(done: subprocess.CompletedProcess[str], reason: str) -> None:
    assert done.returncode == 2 and done.stdout == ""
    assert reason in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_clocks_find_what_they_watch_and_leave_it_as_it_was() -> None:
    """By names that are private to the library: where one is renamed, this is what notices."""
    clocks: Any = importlib.import_module("clocks")
    before = [getattr(owner, attribute) for owner, attribute, _ in clocks._WATCHED]
    with clocks.Clocks(lambda _: None):
        during = [getattr(owner, attribute) for owner, attribute, _ in clocks._WATCHED]
    assert all(one is not other for one, other in zip(before, during, strict=True))
    assert [getattr(owner, attribute) for owner, attribute, _ in clocks._WATCHED] == before


@pytest.mark.bench
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "harness"])
def test_each_runs_in_small_and_ends_in_its_json_line(name: str, tmp_path: Path) -> None:
    if name in NEEDED and is_missing(NEEDED[name]):
        pytest.skip(f"{NEEDED[name]} is not installed")
    saved = {path: path.read_bytes() for path in (FOLDER / "results").iterdir()}
    done = run_script(name, "--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout.splitlines()[-1])
    assert list(document) == ["benchmark", "machine", "allocator", "versions", "settings", "results"]
    assert document["benchmark"] == name and document["settings"] and document["results"]
    assert document["machine"].keys() == {"cpu", "cores", "threads"}
    assert document["versions"].keys() == {"python", "torch", "transformers", "safetensors", "numpy"}
    assert {path: path.read_bytes() for path in (FOLDER / "results").iterdir()} == saved
    if name == "floor":
        check_floor(document)
    if name == "growth":
        assert document["settings"]["rounds"] == 1
        assert {point["pool"] for point in document["results"]["pooled"]} == {"mean"}
        points = [point for axis in document["results"].values() for point in axis]
        assert all(point["peak_bytes"] > 0 and point["forward_us_per_token"] > 0 for point in points)
    if name == "peers":
        ways, missing = document["results"]["ways"], document["results"]["missing"]
        # a way may be left out for want of its package, and for nothing else
        assert all(reason.startswith("PackageNotFoundError") for reason in missing.values()), missing
        assert ways["layerprobe"]["wall_ratio"] == 1 and "arrival-order loop" in ways
        assert {way: one["agree"] for way, one in ways.items()} == {way: one["compared"] for way, one in ways.items()}


@pytest.mark.bench
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SUBJECTS)
def test_each_that_takes_a_device_runs_on_a_gpu_in_small(name: str, tmp_path: Path) -> None:
    done = run_script(name, "--quick", "--device", "cuda", "--precision", "bf16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["benchmark"].startswith(f"{name}-cuda-") and document["results"]
    assert document["settings"]["gpu"] == torch.cuda.get_device_name("cuda")


def check_floor(document: Any) -> None:
    """Hold every regime to its parts: they add up to the whole, and the ratios are over the floor that is named."""
    assert document["settings"]["rounds"] == 1 and len(document["results"]["regimes"]) == 3
    # of one regime a part may be less than the millisecond that is shown
    for part in ("forward", "hooks", "plan", "writer"):
        assert sum(found["parts_s"][part] for found in document["results"]["regimes"]) > 0, part
    for found in document["results"]["regimes"]:
        parts, floor_s = found["parts_s"], found[f"{found['floor']}_s"]
        whole_s = sum(seconds for part, seconds in parts.items() if part not in ("tokenise", "prepare", "writer"))
        # each is rounded to a millisecond
        assert whole_s == pytest.approx(found["whole_s"], abs=0.01)
        if floor_s > 0.02:
            assert found["ratio"] == pytest.approx(found["whole_s"] / floor_s, rel=0.05)
            assert found["plain_ratio"] == pytest.approx(found["plain_whole_s"] / floor_s, rel=0.05)


def test_what_is_quick_is_not_saved(tmp_path: Path) -> None:
    assert_refused(run_script("decode", "--quick", "--save", cwd=tmp_path), "--save: not allowed with argument --quick")


def test_a_part_of_the_regimes_does_not_replace_the_results_of_all(tmp_path: Path) -> None:
    done = run_script("floor", "--regime", "all, rows", "--save", cwd=tmp_path)
    assert_refused(done, "--regime 'all, rows' with --save: the results are of every regime")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--device", "tpu"], "no device 'tpu'"),
        (["--device", "meta"], "no device 'meta'"),
        (["--device", "cuda:7"], "CUDA devices"),
        (["--precision", "tf32"], "tf32 on cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.device_count() > 7:
        pytest.skip("all are there")
    subjects = importlib.import_module("subjects")
    parser = argparse.ArgumentParser()
    subjects.add_subject_options(parser)
    with pytest.raises(SystemExit) as ended:
        subjects.read_subject(parser.parse_args(options))
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert reason in printed.err and len(printed.err.splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_device_of_cuda_is_the_current_one_with_or_without_a_number(name: str) -> None:
    subjects = importlib.import_module("subjects")
    parser = argparse.ArgumentParser()
    subjects.add_subject_options(parser)
    assert subjects.read_subject(parser.parse_args(["--device", name])).is_on_cuda
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", SUBJECTS)
def test_without_a_gpu_cuda_is_refused_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    script: Any = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert "this machine has 0 CUDA devices" in printed.err and len(printed.err.splitlines()) == 1


def test_results_of_another_device_model_or_precision_have_a_file_of_their_own() -> None:
    subjects = importlib.import_module("subjects")
    assert subjects.Subject().name_results("floor") == "floor" and subjects.Subject().settings == {}
    narrow = subjects.Subject(subjects.NARROW, usual=subjects.NARROW)
    assert narrow.name_results("growth") == "growth"
    assert subjects.Subject(precision="bf16").name_results("floor") == "floor-cpu-demo-bf16"
    assert subjects.Subject("bert-base").name_results("peers") == "peers-cpu-bert-base-fp32"
    assert subjects.Subject("bert-base").settings == {"model": "bert-base", "device": "cpu", "precision": "fp32"}


def test_kernels_that_run_side_by_side_are_busy_once() -> None:
    """Held against every microsecond looked at."""
    find_busy_s = importlib.import_module("subjects").find_busy_s
    spans = [(5, 9), (0, 2), (6, 7), (8, 12), (12, 13), (20, 21)]
    assert find_busy_s(spans) == pytest.approx(sum(any(a <= t < b for a, b in spans) for t in range(30)) / 1e6)
    assert find_busy_s([]) == 0
