"""A run under faults: whatever fails, and whenever, what is committed is whole and the same call goes on."""

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import layerprobe as lp
from faults import CALLS, FaultySystem, ForgetfulDisk, Step, check_shards, fail
from forks import run_each
from layerprobe.errors import FormatError, LayerProbeError, LockError, PlanError, StoreError
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import Plan, plan_extraction
from layerprobe.extract.run import run_extraction
from layerprobe.models import LoadedModel
from layerprobe.store import durable, lock
from layerprobe.store.lock import StoreLock

SHARD_BYTES = 16_000
OPTIONS = ExtractOptions(shard_bytes=SHARD_BYTES)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def plan(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> Plan:
    """A run of several shards, not begun."""
    plan = plan_extraction(tiny, texts, tmp_path / "acts", OPTIONS)
    assert plan.num_units >= 4
    return plan


@pytest.fixture
def expected(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed run leaves."""
    run_extraction(plan_extraction(tiny, texts, tmp_path / "whole", OPTIONS))
    return contents(tmp_path / "whole")


def put_under(monkeypatch: pytest.MonkeyPatch, system: FaultySystem) -> None:
    for module in (durable, lock):
        monkeypatch.setattr(module, "os", system)
    monkeypatch.setattr(durable, "_fallocate", system.fallocate)


def _run_and_catch(plan: Plan) -> str:
    """Run a plan; gives what its error says, if there is one."""
    try:
        run_extraction(plan)
    except StoreError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_a_run_may_fail_and_nothing_is_lost(
    plan: Plan, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    counted: Counter[str] = Counter()
    put_under(monkeypatch, FaultySystem(lambda step: counted.update([step.name])))
    run_extraction(plan)
    assert counted[call] >= plan.num_units
    for nth in range(counted[call]):
        shutil.rmtree(plan.folder)
        number = ERRORS[nth % len(ERRORS)]
        put_under(monkeypatch, FaultySystem(fail(call, number, nth)))
        said = _run_and_catch(plan)
        monkeypatch.undo()
        if said:
            assert f"cannot be written ({os.strerror(number)})" in said
            assert any(advice in said for advice in ("same command", "Choose another folder"))
        else:
            # only a lock is given back without a word
            assert call in ("close", "ftruncate", "write")
        check_shards(plan.folder)
        assert not list(plan.folder.glob("*.tmp"))
        run_extraction(plan)
        assert contents(plan.folder) == expected


def _lose_power_at_every_step(plan: Plan, disk: ForgetfulDisk, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Run a plan and write down what the disk may hold before each step; one folder for each that differs."""
    found: dict[str, Path] = {}
    place = plan.folder.parent / "survivors"
    place.mkdir()

    def before(step: Step) -> None:
        for seed, metadata in enumerate(("flushed", "all", "some", "some")):
            survivor = place / f"{len(list(place.iterdir()))}-{step.name}-{metadata}"
            disk.lose_power(survivor, metadata, seed)
            kept = {name: data for name, data in contents(survivor).items() if name != lock.LOCK_FILE}
            if found.setdefault(repr(sorted(kept.items())), survivor) is not survivor:
                shutil.rmtree(survivor)

    put_under(monkeypatch, FaultySystem(before, disk.watch))
    run_extraction(plan)
    monkeypatch.undo()
    return list(found.values())


def _go_on(plan: Plan, survivor: Path) -> dict[str, bytes]:
    shutil.rmtree(plan.folder)
    survivor.rename(plan.folder)
    run_extraction(plan)
    return contents(plan.folder)


def test_power_lost_at_any_step_costs_no_committed_shard(
    plan: Plan, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    survivors = _lose_power_at_every_step(plan, ForgetfulDisk(plan.folder), monkeypatch)
    numbers = [check_shards(survivor) for survivor in survivors]
    # every number of shards is among them, and more than one state of the disk for each
    assert set(numbers) == set(range(plan.num_units + 1)) and len(survivors) > 2 * plan.num_units
    for survivor in survivors:
        assert _go_on(plan, survivor) == expected


@pytest.mark.slow
def test_power_lost_while_a_run_is_replaced_leaves_no_store_that_lies(
    tiny: LoadedModel, texts: list[str], plan: Plan, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    older = lp.extract(tiny, texts[:7], plan.folder, dtype="float16", shard_size=SHARD_BYTES // 2)
    assert older.num_shards > 2
    disk = ForgetfulDisk(plan.folder)
    disk.remember()
    plan = plan_extraction(tiny, texts, plan.folder, OPTIONS, overwrite=True)
    for survivor in _lose_power_at_every_step(plan, disk, monkeypatch):
        if (survivor / "index.json").exists():
            assert lp.open(survivor).is_complete
            check_shards(survivor)
        assert _go_on(plan, survivor) == expected


def test_a_disk_that_forgets_would_show_a_missing_flush(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = ForgetfulDisk(plan.folder)

    def before(step: Step) -> None:
        if step.name == "replace":
            # as if the file had never been flushed
            disk._contents.pop(os.stat(step.arguments[0]).st_ino, None)

    put_under(monkeypatch, FaultySystem(before, disk.watch))
    run_extraction(plan)
    disk.lose_power(plan.folder.parent / "after", "flushed")
    with pytest.raises(LayerProbeError):
        check_shards(plan.folder.parent / "after")


def test_a_disk_that_forgets_takes_no_new_file_for_an_old_folder(tmp_path: Path) -> None:
    (tmp_path / "disk" / "old").mkdir(parents=True)
    disk = ForgetfulDisk(tmp_path / "disk")
    disk.remember()
    (tmp_path / "disk" / "old").rmdir()
    for number in range(20):
        (tmp_path / "disk" / str(number)).write_bytes(b"new")
    disk.lose_power(tmp_path / "after", "all")
    assert len(list((tmp_path / "after").iterdir())) == 20
    assert all(file.is_file() for file in (tmp_path / "after").iterdir())


HOLD = """
import sys
from pathlib import Path
import layerprobe
loaded = layerprobe.load_model(sys.argv[1], "cpu")
layer = type(loaded.model.encoder.layer[0])
forward = layer.forward

def wait(*arguments, **options):
    if Path(sys.argv[2], "store.json").exists():
        print("computing", flush=True)
        sys.stdin.read()
    return forward(*arguments, **options)

# for all models of the class: a change of this one would be a part of the run
layer.forward = wait
layerprobe.extract(loaded, ["the quick brown fox"] * 9, sys.argv[2], shard_size=10_000)
"""


@pytest.mark.slow
def test_a_second_run_is_refused_with_the_first_named_and_goes_on_after_its_death(
    tiny: LoadedModel, tiny_model_folder: Path, tmp_path: Path
) -> None:
    def run() -> None:
        lp.extract(tiny, ["the quick brown fox"] * 9, tmp_path / "acts", shard_size=10_000)

    command, pipe = [sys.executable, "-c", HOLD, str(tiny_model_folder), str(tmp_path / "acts")], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "computing\n"
        left = contents(tmp_path / "acts")
        assert any(name.endswith(".safetensors.tmp") for name in left)
        named = re.escape(f"{tmp_path / 'acts'}: another run is writing there (process {first.pid}")
        with pytest.raises(LockError, match=named):
            run()
        # what the first has under its hands is not taken away
        assert contents(tmp_path / "acts") == left
        first.send_signal(signal.SIGKILL)
        first.wait()
    run()
    assert lp.open(tmp_path / "acts").is_complete
    assert not list((tmp_path / "acts").glob("*.tmp")) and not (tmp_path / "acts" / lock.LOCK_FILE).exists()


def test_what_another_run_did_between_plan_and_start_is_not_done_again(plan: Plan, expected: dict[str, bytes]) -> None:
    first = run_extraction(plan)
    again = run_extraction(plan)
    assert first.num_examples == 12 and again.num_examples == 0
    assert contents(plan.folder) == expected


def test_another_run_begun_between_plan_and_start_is_refused(tiny: LoadedModel, texts: list[str], plan: Plan) -> None:
    lp.extract(tiny, texts, plan.folder, dtype="float16")
    before = contents(plan.folder)
    with pytest.raises(PlanError, match="dtype: 'float16' there, 'float32' here"):
        run_extraction(plan)
    assert contents(plan.folder) == before


def test_a_store_of_another_version_is_gone_on_with_and_of_another_format_refused(
    plan: Plan, expected: dict[str, bytes]
) -> None:
    run_extraction(plan)
    said = json.loads((plan.folder / "store.json").read_text())
    (plan.folder / "store.json").write_text(json.dumps({**said, "layerprobe": "0.0.1"}))
    (plan.folder / "shard-000001.safetensors").unlink()
    assert run_extraction(plan).num_examples > 0
    found = contents(plan.folder)
    there, here = (json.loads(files.pop("index.json")) for files in (found, expected))
    # each vouches for its own store.json
    assert there.pop("store_checksum") != here.pop("store_checksum") and there == here
    assert {**found, "store.json": b""} == {**expected, "store.json": b""}
    assert lp.open(plan.folder).is_complete
    (plan.folder / "store.json").write_text(json.dumps({**said, "format": 2}))
    with pytest.raises(FormatError, match="holds a store of format 2, this version writes format 1"):
        run_extraction(plan)


def test_a_run_and_a_probe_do_not_write_into_one_folder(
    tiny: LoadedModel, plan: Plan, tmp_path: Path, batch: Any
) -> None:
    with lp.Probe(tiny.model, "layers.0", to=tmp_path / "loop"):
        tiny.model(**batch)
        with (
            pytest.raises(LockError, match=f"process {os.getpid()} on"),
            lp.Probe(tiny.model, "layers.1", to=tmp_path / "loop"),
        ):
            pass
    assert lp.open(tmp_path / "loop").is_complete and not (tmp_path / "loop" / lock.LOCK_FILE).exists()
    plan.folder.mkdir()
    with StoreLock(plan.folder), pytest.raises(LockError):
        run_extraction(plan)
    run_extraction(plan)


def test_a_probe_lets_go_of_its_folder_whatever_is_raised(tiny: LoadedModel, tmp_path: Path, batch: Any) -> None:
    def fail_later() -> None:
        with lp.Probe(tiny.model, "layers.0", to=tmp_path / "loop"):
            tiny.model(**batch)
            raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own"):
        fail_later()
    assert not (tmp_path / "loop" / lock.LOCK_FILE).exists()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_every_file_of_a_store_honours_the_umask(plan: Plan, monkeypatch: pytest.MonkeyPatch, mask: int) -> None:
    modes: set[int] = set()

    def look(step: Step) -> None:
        # the lock and what is not finished too
        modes.update(stat.S_IMODE(file.stat().st_mode) for file in plan.folder.rglob("*") if file.is_file())

    put_under(monkeypatch, FaultySystem(after=look))
    before = os.umask(mask)
    try:
        run_extraction(plan)
    finally:
        os.umask(before)
    assert modes == {0o666 & ~mask}


def test_nothing_is_written_through_a_memory_map(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no list of mappings")
    found: list[str] = []

    def look(step: Step) -> None:
        shared = (line for line in maps.read_text().splitlines() if " rw-s " in line)
        found.extend(line for line in shared if str(plan.folder) in line)

    put_under(monkeypatch, FaultySystem(look, look))
    run_extraction(plan)
    assert not found


def _mount(*options: str) -> None:
    subprocess.run(["mount", *options], check=True, capture_output=True)


def test_a_folder_that_turns_read_only_keeps_what_it_has(
    tiny: LoadedModel, texts: list[str], small_disk: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_extraction(tiny, texts, small_disk / "acts", OPTIONS)

    def turn(step: Step) -> None:
        if step.name == "replace" and str(step.arguments[1]).endswith("000002.safetensors"):
            _mount("--bind", str(plan.folder), str(plan.folder))
            _mount("-o", "remount,ro,bind", str(plan.folder))

    put_under(monkeypatch, FaultySystem(turn))
    with pytest.raises(StoreError, match=r"cannot be written \(Read-only file system\).*run the same command again"):
        run_extraction(plan)
    monkeypatch.undo()
    assert check_shards(plan.folder) == 2
    with pytest.raises(StoreError, match=r"cannot be written \(Read-only file system\)"):
        run_extraction(plan)
    subprocess.run(["umount", str(plan.folder)], check=True)
    run_extraction(plan)
    assert contents(plan.folder) == expected


def test_a_path_that_is_not_utf_8_is_refused_before_there_is_a_folder(tiny: LoadedModel, tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"acts-\xfc")
    with pytest.raises(StoreError, match="the path is not UTF-8, and a tokenizer cannot be written there"):
        lp.extract(tiny, ["the dog"], place, progress=False)
    assert not place.exists()


def test_a_working_folder_that_is_not_utf_8_is_refused_before_there_is_a_folder(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / os.fsdecode(b"work-\xfc")
    place.mkdir()
    monkeypatch.chdir(place)
    with pytest.raises(StoreError, match=r"work-.*/acts: the path is not UTF-8"):
        lp.extract(tiny, ["the dog"], "acts", progress=False)
    assert not list(place.iterdir())


def test_a_process_that_a_hook_forks_leaves_the_folder_and_what_is_said_of_the_run_alone(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    setup = f"""
import os
import torch
import layerprobe as lp
torch.set_num_threads(1)
loaded = lp.load_model({str(tiny_model_folder)!r}, "cpu")
"""
    piece = """
folder, child, calls = {folder!r}, None, 0
def fork(*_):
    global child, calls
    calls += 1
    if calls != 6:
        return
    reserved = [name for name in os.listdir(folder) if name.endswith(".tmp")]
    if (child := os.fork()) == 0:
        exec({leave!r})
        return
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    # what a writer has under way may have been committed meanwhile; the unit that is computed cannot have been
    assert reserved and max(reserved) in os.listdir(folder), (reserved, os.listdir(folder))
    assert lp.status(folder).state == "running", lp.status(folder)
loaded.model.register_forward_hook(fork)
try:
    lp.extract(loaded, ["the quick brown fox " * 3] * 40, folder, shard_size=8_000, batch_tokens=64, progress=False)
finally:
    if child == 0:
        os._exit(7)
assert calls > 6 and lp.verify(folder).ok and len(lp.open(folder)) == 40
"""
    leaves = ["pass", "1 / 0", "raise SystemExit(3)"]
    pieces = [piece.format(folder=str(tmp_path / str(place)), leave=leave) for place, leave in enumerate(leaves)]
    for one in run_each(setup, pieces):
        assert one.status == 0, one.said


def test_a_run_whose_folder_was_moved_writes_nothing_into_the_next_one_of_its_name(
    tiny: LoadedModel, plan: Plan, expected: dict[str, bytes]
) -> None:
    folder, calls = plan.folder, 0

    def move(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            hook.remove()
            folder.rename(folder.with_name("moved"))
            run_extraction(plan_extraction(lp.load_model(tiny.name, "cpu"), list(plan.first_texts), folder, OPTIONS))

    hook = tiny.model.register_forward_hook(move)
    try:
        with pytest.raises(StoreError, match=r"acts: was moved, replaced or removed while the run was under way\. Put"):
            run_extraction(plan)
    finally:
        hook.remove()
    assert contents(folder) == expected and lp.status(folder).state == "complete"
