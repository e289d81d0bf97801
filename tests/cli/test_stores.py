"""Commands that look at a store: their exit codes, and what they print."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layerprobe
from layerprobe.cli.views import describe_status
from layerprobe.models import load_model
from layerprobe.store.format import commit_shard
from layerprobe.store.progress import Done, ProgressFile, StoreStatus, read_status

Run = Callable[..., tuple[int, str, str]]
extract: Any = layerprobe.extract


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    texts = ["the quick brown fox", "", "the lazy dog .", "fox"]
    extract(load_model(str(tiny_model_folder), "cpu"), texts, tmp_path / "acts", dtype="float16", shard_size=3000)
    return tmp_path / "acts"


def test_verify_says_that_all_is_well_and_exits_with_0(run: Run, folder: Path) -> None:
    code, printed, said = run("verify", folder)
    assert (code, said) == (0, "") and printed.endswith("every byte is as it was written.\n")


def test_verify_names_each_damaged_shard_in_a_line_and_exits_with_1(run: Run, folder: Path) -> None:
    for name in ("shard-000000.safetensors", "shard-000001.safetensors"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    code, printed, said = run("verify", folder, "--recompute", 3)
    lines = printed.splitlines()
    assert code == 1 and said.startswith("layerprobe: loading the model ") and said.count("\n") == 1
    assert "examples run again" not in printed
    assert lines[-1] == "no example was run again: the store is damaged, repair it first"
    assert [line.split(":")[0] for line in lines[:2]] == ["shard-000000.safetensors", "shard-000001.safetensors"]
    code, printed, _ = run("verify", folder, "--repair", "--recompute", 3)
    assert printed.endswith("is damaged, run the extraction first, then this again without --repair\n")
    assert code == 1 and "removed index.json, shard-000000.safetensors, shard-000001.safetensors" in printed
    code, printed, _ = run("verify", folder)
    assert code == 0 and "note: 2 of " in printed and "not complete" in printed


def test_verify_of_what_is_no_store_exits_with_2(run: Run, tmp_path: Path) -> None:
    code, _, said = run("verify", tmp_path)
    assert code == 2 and "is not a store: it has no store.json" in said and said.count("\n") == 1


def test_every_command_says_the_same_of_a_folder_that_is_not_there(run: Run, tmp_path: Path) -> None:
    none, out = tmp_path / "none", tmp_path / "out"
    commands = [("info", none), ("status", none), ("verify", none), ("show", none, 0), ("merge", out, none)]
    said = {run(*command)[::2] for command in [*commands, ("export", none, "-o", out)]}
    message = f"{none}: does not exist. Make one with 'layerprobe extract MODEL INPUT -o {none}'."
    assert said == {(2, f"layerprobe: {message}\n")}


def test_recompute_runs_examples_again(run: Run, folder: Path, tiny_model_folder: Path) -> None:
    code, printed, said = run("verify", folder, "--recompute", 3, "--device", "cpu")
    assert code == 0 and ": 3 examples run again, " in printed.splitlines()[-1]
    assert said == f"layerprobe: loading the model {str(tiny_model_folder)!r}, as {folder} says\n"
    first = run("verify", folder, "--recompute", 9, "--model", tiny_model_folder, "--seed", 4)
    assert first[0] == 0 and not first[2] and ": 4 examples run again, " in first[1]
    code, printed, said = run("verify", folder, "--recompute", 3, "--model", "demo")
    assert (code, printed) == (2, "") and "was made with another model (config_hash: " in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "none"], "no model 'none'"),
        (["--device", "gpu"], "no device 'gpu' here"),
        (["--seed", -1], "seed is -1"),
    ],
)
def test_what_recompute_cannot_do_is_said_before_every_byte_is_read(
    run: Run, folder: Path, options: list[Any], said: str
) -> None:
    code, printed, message = run("verify", folder, "--recompute", 3, *options)
    assert (code, printed) == (2, "") and said in message


def test_an_audit_that_fails_exits_with_1(run: Run, folder: Path) -> None:
    for shard in layerprobe.open(folder).iter_shards():
        tensors = {name: shard.tensor(name).clone() for name in shard.header.tensors}
        tensors["layers.2"].zero_()
        commit_shard(folder, shard.header, list(tensors.items()))
    assert run("verify", folder)[0] == 0
    code, printed, _ = run("verify", folder, "--recompute", 2)
    assert code == 1 and ": layers.2: differs by " in printed and "2 examples not as the model makes them" in printed


def test_options_of_an_audit_without_one_are_refused(run: Run, folder: Path) -> None:
    for option in (["--model", "demo"], ["--device", "cpu"], ["--seed", 0]):
        code, _, said = run("verify", folder, *option)
        assert code == 2 and "--model, --device and --seed say what --recompute N runs: pass that too" in said
    code, _, said = run("verify", folder, "--recompute", 0)
    assert code == 2 and "--recompute is 0: it must be at least 1" in said


def test_status_of_a_run_under_way(run: Run, folder: Path) -> None:
    assert run("status", folder)[1].startswith(f"store     {folder}: complete\ndone      ")
    (folder / "index.json").unlink()
    assert "nothing tells of a run" in run("status", folder)[1]
    with ProgressFile(folder) as told:
        told.begin(lambda: Done(1, 4, 2, 8, 50, 9000, 3000, 0.0))
        code, printed, said = run("status", folder)
        assert (code, said) == (0, "")
        words = [line.split()[0] for line in printed.splitlines()]
        assert words == ["store", "done", "process", "pace", "left", "disk"]
        assert ": running\n" in printed and "2 of 8 examples" in printed and f"process {os.getpid()} on " in printed
        assert re.search(r", alive; last heard of \d+\.\d s ago\n", printed)
    code, printed, _ = run("status", folder)
    assert code == 0 and ": stopped: it was asked to. Run the same extraction again to go on\n" in printed


def test_status_of_a_store_that_lost_a_shard_says_what_to_do(run: Run, folder: Path) -> None:
    (folder / "shard-000001.safetensors").unlink()
    code, printed, _ = run("status", folder)
    assert code == 0 and "complete" not in printed
    assert ": damaged: 1 shard of the index not there, shard-000001.safetensors the first. Run 'layer" in printed


def test_status_says_paces_and_times_in_fitting_units(folder: Path) -> None:
    running = StoreStatus(
        "acts", "running", 3, 12, 30, 120, None, 1234.5, 2.5e9, 0.125, 7300.0, 10**12, 10**11, 4 * 86400.0,
        "process 7 on here", True, 0.4,
    )  # fmt: skip
    assert describe_status(running).splitlines() == [
        "store     acts: running",
        "done      3 of 12 shards, 30 of 120 examples",
        "process   process 7 on here, alive; last heard of 0.4 s ago",
        "pace      1,234 tokens/s, 2.5 GB/s, stalled 12% of the time",
        "left      2.0 hours, 1.0 TB",
        "disk      100.0 GB free; full in 4.0 days at this pace",
    ]
    killed = StoreStatus("acts", "killed", 3, None, 30, None, process="process 7 on here", is_alive=False, heard_s=130)
    assert describe_status(killed).splitlines()[1:] == [
        "done      3 shards, 30 examples",
        "process   process 7 on here, gone; last heard of 2.2 minutes ago",
    ]
    assert read_status(folder).state == "complete"
