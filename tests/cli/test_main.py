"""The command line: what it prints, and one line on stderr with exit code 2 for each mistake."""

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe
from layerprobe.errors import StoreError
from layerprobe.extract.plan import plan_extraction
from layerprobe.store.lock import StoreLock
from layerprobe.store.places import find_place

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("the quick brown fox\n\nthe lazy dog .\n中文\n", encoding="utf-8")
    return path


def refused(result: tuple[int, str, str], message: str) -> None:
    code, _, said = result
    assert code == 2
    assert said.startswith("layerprobe: ") and message in said
    assert said.count("\n") == 1 and said.endswith("\n") and "Traceback" not in said


def test_the_main_job_prints_its_plan_and_its_report(
    run: Run, tiny_model_folder: Path, source: Path, tmp_path: Path
) -> None:
    code, printed, said = run("extract", tiny_model_folder, source, "-o", tmp_path / "acts")
    assert code == 0 and said == ""
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["input", "model", "sites", "store"]
    assert lines[0].endswith("4 examples, 18 tokens")
    assert lines[4].startswith("4 examples, 18 tokens in ") and len(lines) == 5
    assert layerprobe.open(tmp_path / "acts").example(3).text == "中文"
    code, printed, said = run("extract", tiny_model_folder, source, "-o", tmp_path / "acts")
    assert code == 0 and "resuming  1 shard of 1 already there" in printed
    assert printed.endswith("nothing to do: every shard is there already\n")


def test_info_and_show_read_the_store(run: Run, tiny_model_folder: Path, source: Path, tmp_path: Path) -> None:
    assert run("extract", tiny_model_folder, source, "-o", tmp_path / "acts", "-q") == (0, "", "")
    code, printed, said = run("info", tmp_path / "acts")
    assert code == 0 and said == "" and "holds     4 examples, 18 tokens, 1 shard" in printed
    code, printed, _ = run("show", tmp_path / "acts", "0")
    assert code == 0 and "text    the quick brown fox" in printed and "[CLS]" in printed
    assert run("show", tmp_path / "acts", "-1")[1].startswith("example 3: 4 tokens\ntext    中文")
    refused(run("show", tmp_path / "acts", "4"), "no example 4 in")
    refused(run("show", tmp_path / "acts", "--sites", "0"), "'--sites' is neither an option nor a whole number. Try")
    refused(run("show", tmp_path / "acts", "1.5"), "'1.5' is no whole number. Try 'layerprobe show --help'.")
    refused(run("info", tmp_path / "none"), "does not exist. Make one with 'layerprobe extract")
    refused(run("show", tmp_path, "1"), "is not a store")


def test_sites_lists_the_sites_of_a_model(run: Run, tiny_model_folder: Path) -> None:
    code, printed, said = run("sites", tiny_model_folder, "--sites", "layers.-1.ffn.*", "-s", "embeddings")
    assert code == 0 and said == ""
    assert [line.split()[0] for line in printed.splitlines()[2:]] == [
        "embeddings",
        "layers.2.ffn.act",
        "layers.2.ffn.out",
    ]
    assert printed.splitlines()[3].split()[-1] == "64"


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    run: Run, tiny_model_folder: Path, source: Path, tmp_path: Path
) -> None:
    code, printed, said = run("extract", tiny_model_folder, source, "-o", tmp_path / "acts", "--dry-run")
    assert code == 0 and said == "" and "4 examples" in printed and "free" in printed
    assert sorted(tmp_path.iterdir()) == [source]


def test_standard_input_is_an_input(
    run: Run, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("the fox\n\n中文".encode())))
    code, printed, _ = run("extract", tiny_model_folder, "-", "-o", tmp_path / "acts", "--pool", "mean")
    assert code == 0 and "input     standard input: 3 examples" in printed
    assert [example.text for example in layerprobe.open(tmp_path / "acts")] == ["the fox", "", "中文"]


def test_options_reach_the_run(run: Run, tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": "the dog " * n, "n": n}) for n in range(20)))
    options = ["--field", "body", "--dtype", "float16", "--max-length", "9", "--shard-size", "3kB", "-s", "layers.0"]
    code, printed, _ = run("extract", tiny_model_folder, tmp_path / "a.jsonl", "-o", tmp_path / "acts", *options)
    assert code == 0 and "16 truncated" in printed
    store: Any = layerprobe.open(tmp_path / "acts")
    assert store.sites == ["layers.0"] and store["layers.0"].dtype == torch.float16 and store.num_shards > 3
    assert store.example(19).fields == {"n": 19} and len(store["layers.0"][19]) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sites", "layers.9"], "no site 'layers.9' in BertModel"),
        (["--sites", "layer.1"], "'layer.1' is not a site pattern"),
        (["--dtype", "float12"], "no dtype 'float12': use float32"),
        (["--pool", "median"], "no pool 'median': use mean, max, cls"),
        (["--nonfinite", "ignore"], "no policy 'ignore'"),
        (["--max-length", "65"], "max_length is 65: the model takes at most 64 tokens"),
        (["--max-length", "1"], "2 special tokens go around each text"),
        (["--max-length", "many"], "Invalid value for '--max-length'"),
        (["--shard-size", "big"], "no size 'big': write a number and a unit, such as 64MB or 1GiB"),
        (["--shard-size", "0"], "shard_size is 0"),
        (["--writers", "0"], "writers is 0"),
        (["--cuda-graphs", "--device", "cpu"], "(--cuda-graphs) on cpu: CUDA devices replay graphs"),
        (["--device", "gpu"], "no device 'gpu' here"),
        (["--colour"], "No such option: --colour"),
        (["--field", "body"], "texts.jsonl, line 1: no field 'body'; it holds 'text'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    run: Run, tiny_model_folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "the dog"}')
    refused(run("extract", tiny_model_folder, tmp_path / "texts.jsonl", "-o", tmp_path / "acts", *options), message)
    assert not (tmp_path / "acts").exists()


def test_a_bad_input_model_or_folder_is_one_line(
    run: Run, tiny_model_folder: Path, source: Path, tmp_path: Path
) -> None:
    out = ["-o", tmp_path / "acts"]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    refused(run("extract", "./nowhere", source, *out), "no model './nowhere': the folder does not exist")
    refused(run("extract", "no-such-model", source, *out), "no model 'no-such-model'")
    refused(run("extract", tmp_path, source, *out), "is no model folder: it has no config.json")
    refused(run("extract", tiny_model_folder, tmp_path / "none.txt", *out), "there is no such file or folder")
    refused(run("extract", tiny_model_folder, tmp_path / "empty.txt", *out), "holds no texts. Give at least one")
    refused(run("extract", tiny_model_folder, tmp_path / "latin.txt", *out), "latin.txt, line 2: not UTF-8 (byte 0xe9")
    refused(run("extract", tiny_model_folder, source, "-o", tmp_path), "is not a store: it holds ")
    refused(run("extract", tiny_model_folder, source, "-o", source), "is a file, not a folder")
    refused(run("extract", tiny_model_folder, source, "-o", source / "below"), "texts.txt is not a folder")
    refused(run("extract", tiny_model_folder, source), "Missing option '--out'")
    refused(run("extract"), "Missing argument 'MODEL'")
    refused(run("explode"), "No such command 'explode'")


def test_another_run_in_the_folder_is_one_line_and_overwrite_replaces_it(
    run: Run, tiny_model_folder: Path, source: Path, tmp_path: Path
) -> None:
    command = ["extract", tiny_model_folder, source, "-o", tmp_path / "acts", "-q"]
    assert run(*command)[0] == 0
    refused(run(*command, "--dtype", "int8"), "holds another run (dtype: 'float32' there, 'int8' here)")
    assert run(*command, "--dtype", "int8", "--overwrite") == (0, "", "")
    store: Any = layerprobe.open(tmp_path / "acts")
    assert store["layers.0"].dtype == torch.int8


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_looked_for(
    run: Run, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "acts").mkdir()
    with StoreLock(tmp_path / "acts"):
        command = ["extract", "./nowhere", source, "-o"]
        refused(run(*command, tmp_path / "acts"), f"another run is writing there (process {os.getpid()} on ")
    place = find_place("memory://taken")
    place.commit("notes.txt", [b"mine"])
    with pytest.raises(StoreError, match=r"memory://taken: is not a store: it holds 'notes\.txt'"):
        plan_extraction("./nowhere", str(source), "memory://taken")


def test_debug_shows_the_traceback_wherever_it_stands_and_keeps_the_exit_code(run: Run, tmp_path: Path) -> None:
    for arguments in (["--debug", "info", tmp_path], ["info", tmp_path, "--debug"]):
        code, _, said = run(*arguments)
        assert code == 2 and said.startswith("Traceback (most recent call last):") and "StoreError: " in said
        assert said.splitlines()[-1].startswith(f"layerprobe: {tmp_path}: is not a store")


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["extract", "demo", "a.txt", "-o", "b", "--keep", "much"], "layerprobe extract"),
        (["info"], "layerprobe info"),
        (["fit-decoder", "--depth", "3"], "layerprobe fit-decoder"),
        (["explode"], "layerprobe"),
        (["--loud", "info"], "layerprobe"),
    ],
)
def test_a_mistake_in_a_command_points_to_the_help_of_that_command(
    run: Run, arguments: list[str], command: str
) -> None:
    code, _, said = run(*arguments)
    assert code == 2 and said.endswith(f". Try '{command} --help'.\n") and said.count("\n") == 1


@pytest.mark.parametrize("command", ["check", "classify", "diff", "plot", "report"])
def test_sites_of_a_store_have_either_spelling(run: Run, command: str, tmp_path: Path) -> None:
    for option in ("--site", "--sites", "-s"):
        code, _, said = run(command, tmp_path / "none", option, "layers.0", "-o", tmp_path / "out.html")
        assert code == 2 and "No such option" not in said


@pytest.mark.parametrize("command", ["sites", "extract", "info", "show", "status", "verify"])
def test_help_shows_an_example_in_plain_text(run: Run, command: str) -> None:
    code, printed, said = run(command, "--help")
    assert code == 0 and said == ""
    assert f"Example: layerprobe {command} " in printed
    assert printed.isascii() and "\x1b" not in printed


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    code, printed, said = run()
    assert code == 0 and said == "" and "extract" in printed
    assert run("--version") == (0, f"layerprobe {layerprobe.__version__}\n", "")


@pytest.mark.slow
def test_the_module_runs_as_a_program(tiny_model_folder: Path, source: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "layerprobe",
        "extract",
        tiny_model_folder,
        "-",
        "-o",
        tmp_path / "acts",
    ]
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(layerprobe.__file__).parents[1])}
    with open(source, "rb") as given:
        done = subprocess.run(command, stdin=given, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[-1].startswith("4 examples, 18 tokens")
    assert "\x1b" not in done.stdout


@pytest.mark.slow
def test_a_terminal_gets_a_bar_that_leaves_nothing_behind(
    tiny_model_folder: Path, source: Path, tmp_path: Path
) -> None:
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    (tmp_path / "long.txt").write_text("the quick brown fox\n" * 1500)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    command = [sys.executable, "-m", "layerprobe", "extract", tiny_model_folder, tmp_path / "long.txt"]
    command += ["-o", tmp_path / "acts", "--shard-size", "100kB"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = ""
    with contextlib.suppress(OSError):  # how a terminal says that its last writer is gone
        while piece := os.read(ours, 1 << 16):
            shown += piece.decode(errors="replace")
    os.close(ours)
    assert process.wait() == 0, shown
    for part in ("/1500 [", "<", "tokens/s", "B written"):  # [elapsed<remaining
        assert part in shown
    assert shown.endswith("\r") and not shown.rstrip("\r").rsplit("\r", 1)[-1].strip()


@pytest.mark.skipif(sys.platform == "win32", reason="a shell that closes descriptors")
@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"])
def test_no_file_of_a_command_gets_the_number_of_a_closed_stream(closed: str) -> None:
    code = (
        "import os, sys\nfrom layerprobe.cli.main import main\nsys.argv[1:] = ['--version']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit(not all(os.path.exists(f'/dev/fd/{number}') for number in range(3)))"
    )
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stdout_that_takes_nothing_is_an_error_in_one_line(unbuffered: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "layerprobe", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "layerprobe: standard output: cannot be written (No space left on device).\n"


@pytest.mark.parametrize("what", ["python", "torch"])
def test_memory_that_runs_out_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str) -> None:
    def need_much(*_: Any) -> Any:
        return bytearray(1 << 62) if what == "python" else torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("layerprobe.store.reader.open_store", need_much)
    refused(run("info", tmp_path), "Allow the process more, or ask it for fewer sites")
    assert "need_much" in run("info", tmp_path, "--debug")[2]
