"""Several processes, one store: of the bytes that one process makes, whatever ends whichever of them."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import layerprobe as lp
from layerprobe.errors import CaptureError, NonFiniteError, OptionError, StoreError
from layerprobe.extract import crew
from layerprobe.extract.devices import gather_crew
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.extract.run import run_extraction
from layerprobe.models import LoadedModel

extract: Any = lp.extract
OPTIONS: dict[str, Any] = {"shard_size": 80_000, "dtype": "float16"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # as in this process: another number of threads sums in another order
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def many() -> list[str]:
    return [f"the quick brown fox {number} jumps over " * (1 + number % 4) for number in range(60)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def whole(tiny_model_folder: Path, many: list[str], tmp_path: Path) -> dict[str, bytes]:
    """What one process makes."""
    store = extract(str(tiny_model_folder), many, tmp_path / "whole", device="cpu", **OPTIONS)
    assert store.num_shards >= 6
    return contents(tmp_path / "whole")


@pytest.fixture
def source(many: list[str], tmp_path: Path) -> Path:
    (tmp_path / "texts.txt").write_text("\n".join(many))
    return tmp_path / "texts.txt"


def plan_on(devices: Any, model: Path, source: Any, folder: Path, **more: Any) -> Any:
    options = ExtractOptions(shard_bytes=80_000, dtype="float16", **more)
    return plan_extraction(str(model), source, folder, options, devices=devices or "cpu")


def test_no_process_is_started_where_there_is_nothing_to_do(
    tiny_model_folder: Path, source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(str(tiny_model_folder), source, tmp_path / "acts", device="cpu", **OPTIONS)
    before = contents(tmp_path / "acts")
    assert len(before) == len(whole)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    report = run_extraction(plan_on(["cpu", "cpu"], tiny_model_folder, source, tmp_path / "acts"))
    assert report.is_complete and not report.num_examples
    assert contents(tmp_path / "acts").keys() == before.keys()


def test_a_plan_says_which_devices_have_nothing_to_do(
    tiny_model_folder: Path, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    num_units = sum(name.startswith("shard-") for name in whole)
    said = str(plan_on(["cpu"] * (num_units + 2), tiny_model_folder, source, tmp_path / "acts"))
    assert f"\nidle      2 of {num_units + 2} devices: {num_units} shards to do; a smaller shard_size" in said
    assert "idle" not in str(plan_on(["cpu"] * num_units, tiny_model_folder, source, tmp_path / "acts"))
    # what is done keeps its size
    extract(str(tiny_model_folder), source, tmp_path / "acts", device="cpu", **OPTIONS)
    assert "idle" not in str(plan_on("cpu,cpu", tiny_model_folder, source, tmp_path / "acts"))
    (tmp_path / "acts" / "shard-000001.safetensors").unlink()
    said = str(plan_on("cpu,cpu", tiny_model_folder, source, tmp_path / "acts"))
    assert "\nidle      1 of 2 devices: 1 shard to do\n" in said
    # nor can it change where nothing is done yet, nor be smaller than a text
    for shard in (tmp_path / "acts").glob("shard-*"):
        shard.unlink()
    assert "shards to do\n" in str(plan_on(["cpu"] * 200, tiny_model_folder, source, tmp_path / "acts")) + "\n"
    one = plan_on(["cpu", "cpu"], tiny_model_folder, ["the quick brown fox"], tmp_path / "one")
    assert str(one).endswith("1 of 2 devices: 1 shard to do")


@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one(
    tiny_model_folder: Path, many: list[str], tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """Of texts that are in no file, which is the longer way."""
    plan = plan_on(["cpu", "cpu"], tiny_model_folder, many, tmp_path / "acts")
    assert "on cpu, cpu" in str(plan)
    report = run_extraction(plan)
    assert contents(tmp_path / "acts") == whole
    single = run_extraction(plan_on(None, tiny_model_folder, many, tmp_path / "single"))
    for name in ("num_examples", "num_tokens", "num_bytes", "num_units", "num_computed", "num_padding", "is_complete"):
        assert getattr(report, name) == getattr(single, name), name
    spool = Path(plan.crew.texts)
    assert spool.is_file()
    del plan
    gc.collect()
    assert not spool.parent.exists()


@pytest.mark.slow
def test_a_killed_process_is_named_and_two_go_on_with_what_is_missing(
    tiny_model_folder: Path, source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hear, join = crew._hear, crew._join
    processes: list[Any] = []
    workers: list[Any] = []

    def kill_one(worker: Any) -> Any:
        processes.append(worker.process)
        if "counts" in (said := hear(worker)):
            os.kill(worker.process.pid, signal.SIGKILL)
        return said

    def look(report: Any, them: list[Any]) -> None:
        workers[:] = them
        join(report, them)

    with monkeypatch.context() as patch:
        patch.setattr(crew, "_hear", kill_one)
        with pytest.raises(CaptureError, match=r"cpu: its process \(\d+\) was ended by SIGKILL.*the same command"):
            run_extraction(plan_on("cpu,cpu", tiny_model_folder, source, tmp_path / "acts"))
    assert all(process.poll() is not None for process in processes)
    left = contents(tmp_path / "acts")
    assert "index.json" not in left and not any(name.endswith((".tmp", "run.lock")) for name in left)
    (tmp_path / "acts" / "shard-000003.safetensors").write_bytes(whole["shard-000003.safetensors"])
    written_at = (tmp_path / "acts" / "shard-000003.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(crew, "_join", look)
    plan = plan_on("cpu,cpu", tiny_model_folder, source, tmp_path / "acts")
    report = run_extraction(plan)
    assert contents(tmp_path / "acts") == whole
    assert (tmp_path / "acts" / "shard-000003.safetensors").stat().st_mtime_ns == written_at
    assert report.num_units == plan.num_units - len(plan.done)
    assert len(workers) == 2 and sum(worker.counts["num_units"] for worker in workers) == report.num_units


@pytest.mark.slow
def test_what_goes_wrong_in_a_process_is_the_error_of_one_process(
    tiny: LoadedModel, source: Path, tmp_path: Path, make_bert: Any
) -> None:
    model = make_bert(vocab_size=len(tiny.tokenizer))
    model.encoder.layer[1].output.LayerNorm.bias.data[3] = 1e5
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(NonFiniteError, match=r"cpu: shard-0.*do not fit the dtype: \d+ at 'layers\.1'"):
        run_extraction(plan_on("cpu,cpu", tmp_path / "model", source, tmp_path / "acts", nonfinite="error"))
    # what is no error of layerprobe
    worker: Any = SimpleNamespace(device="cuda:1")
    made = crew._make_error(worker, None, "RuntimeError: CUDA error:\nillegal access")
    assert isinstance(made, CaptureError)
    assert str(made).startswith("cuda:1: its process failed (RuntimeError: CUDA error: illegal access). Whole shards")


def test_what_cannot_be_shared_is_refused_before_anything_starts(
    tiny: LoadedModel, tiny_model_folder: Path, tmp_path: Path
) -> None:
    name, folder = str(tiny_model_folder), tmp_path / "acts"
    cases: list[tuple[str, Any]] = [
        ("no device 'cuda:7' here", lambda: extract(name, ["a"], folder, devices=[7, 8])),
        ("no device 'gpu' here", lambda: extract(name, ["a"], folder, devices="cpu,gpu")),
        (r"devices=\[\]: names no device", lambda: extract(name, ["a"], folder, devices=[])),
        ("devices=2: names no device", lambda: extract(name, ["a"], folder, devices=2)),
        ("of different kinds", lambda: extract(name, ["a"], folder, devices="cpu,mps")),
        ("with device='cpu': give one", lambda: extract(name, ["a"], folder, devices="cpu,cpu", device="cpu")),
        ("with a LoadedModel: each process loads", lambda: extract(tiny, ["a"], folder, devices="cpu,cpu")),
        ("into memory://", lambda: extract(name, ["a"], "memory://crew", devices="cpu,cpu")),
        ("with this pool", lambda: extract(name, ["a"], folder, devices="cpu,cpu", pool=lambda rows: rows[0])),
        ("with this tokenizer", lambda: extract(name, ["a"], folder, devices="cpu,cpu", tokenizer=tiny.tokenizer)),
        ("devices concerns stores", lambda: extract(name, ["a"], lp.Moments(), devices="cpu,cpu")),
        ("devices concerns stores", lambda: extract(name, ["a"], lp.Moments(), devices=[])),
    ]
    for message, call in cases:
        with pytest.raises(OptionError, match=message):
            call()
    assert not folder.exists()
    assert extract(name, ["a"], folder, devices="cpu").is_complete


def test_texts_that_are_in_no_file_are_told_to_others_with_their_fields(tmp_path: Path) -> None:
    records = [{"text": "a", "o": np.int64(3), "tags": ("x", None)}]
    _, source = gather_crew(("cpu", "cpu"), "demo", records, tmp_path / "acts", "text", {})
    assert [record.fields for record in source] == [{"o": 3, "tags": ["x", None]}]


@contextlib.contextmanager
def command(model: Path, source: Path, folder: Path) -> "Iterator[subprocess.Popen[str]]":
    """The command line, in a session of its own, so that a signal to the group reaches no test."""
    options = ["-o", str(folder), "--shard-size", "80kB", "--dtype", "float16", "--devices", "cpu,cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "extract", str(model), str(source), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


# The command line itself, but it says when the first counts have come, and then hears nothing until a signal has.
COMMAND = """
import signal
from layerprobe.cli.main import main
from layerprobe.extract import crew

hear = crew._hear

def wait(worker):
    said = hear(worker)
    if "counts" in said and not waited:
        waited.append(print("computing", flush=True))
        signal.pause()
    return said

waited, crew._hear = [], wait
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_group", "code"),
    [
        (signal.SIGINT, True, 130),
        pytest.param(signal.SIGTERM, True, 143, marks=pytest.mark.slow),
        (signal.SIGKILL, False, -9),
    ],
)
def test_a_signal_ends_all_processes_and_the_same_command_goes_on(
    tiny_model_folder: Path,
    source: Path,
    tmp_path: Path,
    whole: dict[str, bytes],
    number: signal.Signals,
    to_group: bool,
    code: int,
) -> None:
    folder = tmp_path / "acts"
    with command(tiny_model_folder, source, folder) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() and any(line.startswith("computing") for line in process.stdout)
        (os.killpg if to_group else os.kill)(process.pid, number)
        assert process.wait() == code
        said = process.stderr.read()  # ends when nobody holds it any more: no process is left
        assert ("Run the same command again" in said) == (number != signal.SIGKILL), said
    left = contents(folder)
    assert "index.json" not in left
    assert all(whole[name] == data for name, data in left.items() if name in whole and name.startswith("shard"))
    # one process goes on with what several began
    run_extraction(plan_on(None, tiny_model_folder, source, folder))
    assert contents(folder) == whole


def test_a_process_ends_with_the_one_that_started_it_while_it_still_imports(tmp_path: Path) -> None:
    # a package that is never imported to its end
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport threading\nthreading.Event().wait()\n")
    ours, theirs = Pipe()
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-c", crew._CODE, str(theirs.fileno())]
    with subprocess.Popen(
        command, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    ) as process:
        theirs.close()
        try:
            # what was said before is no reason to stay
            ours.send_bytes(b"{}")
            assert process.stdout is not None and process.stdout.readline() == "importing\n"
            ours.close()
            assert process.wait(timeout=120) == 1
        finally:
            process.kill()


def test_processes_whose_folder_was_moved_write_no_more_into_the_next_one_of_its_name(
    tiny_model_folder: Path, source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "acts"
    plan = plan_on("cpu,cpu", tiny_model_folder, source, folder)

    def move() -> None:
        while not (folder / "shard-000000.safetensors").exists():
            pass
        folder.rename(tmp_path / "moved")
        folder.mkdir()

    mover = threading.Thread(target=move, daemon=True)
    mover.start()
    with pytest.raises(StoreError, match="acts: was moved, replaced or removed while the run was under way"):
        run_extraction(plan)
    mover.join()
    # what was on its way to the disk at that very moment
    assert len(list(folder.glob("shard-*.safetensors"))) <= 2 and not (folder / "index.json").exists()
