"""The README and every page of docs/: their snippets run, their commands work, what they name is there."""

import doctest
import importlib
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import layerprobe
from layerprobe.cli.main import main

ROOT = Path(__file__).parent.parent
SCRIPT = "benchmarks/docstrings.py"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^```bash\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEST_NAME = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
RESULTS_FILE = re.compile(r"benchmarks/results/\w+\.json")
LINK = re.compile(r"\]\(([^)#]+)\)")
CODE = re.compile(r"`[^`]*`|\([^)]*\)")
QUOTED = re.compile(r"(?<![\w.])(\d+\.\d+)(?![\w.]*\d)|(?<![\w.])(\d+)(?= (?:times|%|percent|ms)\b)")


# a snippet may register an architecture
pytestmark = pytest.mark.usefixtures("restored_rows")


def list_blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def list_commands(page: Path) -> list[list[str]]:
    """Find the layerprobe commands among a page's shell snippets."""
    return split_commands("\n".join(list_blocks(page, "bash")))


def split_commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").replace("&&", "\n").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and Path(line[0]).name == "layerprobe"]


def list_printed() -> list[tuple[Path, str, str]]:
    """Find each `text` block that comes right after a `bash` block of one layerprobe command."""
    found = []
    for page in PAGES:
        for command, printed in PRINTED.findall(page.read_text(encoding="utf-8")):
            if len(split_commands(command)) == len(command.replace("\\\n", " ").splitlines()) == 1:
                found.append((page, command, printed))
    return found


def mask_numbers(line: str, command: list[str]) -> str:
    """Take out what differs from machine to machine: the free space that a plan prints."""
    line = re.sub(r"; [\d.,]+ \w+ free$", "; free", line)
    return re.sub(r" on (cpu|cuda\S*)$", " on a device", line) if command[1] == "extract" else line


def make_texts(page: Path) -> None:
    """Write the labelled set that a page asks for, in small, where it asks for one."""
    if SCRIPT in page.read_text(encoding="utf-8"):
        subprocess.run([sys.executable, ROOT / SCRIPT, "docstrings.jsonl", "--most", "15"], check=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds what a clone has beside the code."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "sample.txt", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if list_blocks(page, "python")], ids=lambda page: page.name)
def test_python_snippets_run(page: Path, folder: Path) -> None:
    make_texts(page)
    state: dict[str, Any] = {"__name__": "snippets"}
    for number, code in enumerate(list_blocks(page, "python")):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), state)


@pytest.mark.parametrize("page", [page for page in PAGES if list_commands(page)], ids=lambda page: page.name)
def test_commands_run(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_texts(page)
    for command in list_commands(page):
        monkeypatch.setattr("sys.argv", ["layerprobe", *command[1:]])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert not stopped.value.code, f"{command}: {captured.err}"
        assert captured.out.strip()


@pytest.mark.parametrize(
    ("page", "block", "printed"), list_printed(), ids=lambda value: value.name if isinstance(value, Path) else None
)
def test_printed_output_is_what_the_command_prints(
    page: Path, block: str, printed: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (command,) = split_commands(block)
    monkeypatch.setattr("sys.argv", ["layerprobe", *command[1:]])
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    found = captured.out if command[1] != "extract" else captured.err
    assert [mask_numbers(line, command) for line in printed.splitlines()] == [
        mask_numbers(line, command) for line in found.splitlines()[: len(printed.splitlines())]
    ]


def test_readme_begins_with_the_two_commands() -> None:
    """.ci/run takes them from their places."""
    first, second = list_blocks(ROOT / "README.md", "bash")[:2]
    for block in (first, second):
        assert block.startswith("python3 -m venv .venv && .venv/bin/pip install") and "torch==2.13.0" in block
    assert "layerprobe extract demo docs/sample.txt" in first and "layerprobe info acts/" in first
    assert '-e ".[dev]"' in second and ".venv/bin/pytest" in second


def test_sample_is_short_varied_texts() -> None:
    texts = (ROOT / "docs" / "sample.txt").read_text(encoding="utf-8").splitlines()
    assert 50 <= len(texts) <= 70 and len(set(texts)) == len(texts)
    assert max(map(len, texts)) <= 200


def test_every_guarantee_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    guarantees = re.split(r"^## \d+\. ", page, flags=re.MULTILINE)[1:]
    assert len(guarantees) == 6
    for guarantee in guarantees:
        named = TEST_NAME.findall(guarantee)
        assert named, f"no test for: {guarantee.splitlines()[0]}"
        for file, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name


def test_every_mode_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "modes.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| mode")]
    assert len(rows) > 20
    for row in rows:
        named = TEST_NAME.findall(row)
        assert named, f"no test for: {row}"
        for file, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def list_numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in list_numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in list_numbers(item)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_numbers_are_in_the_results(page: Path) -> None:
    """A paragraph that names a results file quotes only numbers of it, rounded as they are written."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for paragraph in text.split("\n\n"):
        files = sorted(set(RESULTS_FILE.findall(paragraph)))
        if not files:
            continue
        found = [
            number for file in files for number in list_numbers(json.loads((ROOT / file).read_text(encoding="utf-8")))
        ]
        for groups in QUOTED.findall(CODE.sub("", paragraph)):
            quoted = next(filter(None, groups))
            decimals = len(quoted.partition(".")[2])
            assert any(f"{number:.{decimals}f}" == quoted for number in found), f"{quoted} is in none of {files}"


EXAMPLES = {
    name: examples
    for name in layerprobe.__all__
    if not isinstance(getattr(layerprobe, name), str)
    for examples in [doctest.DocTestParser().get_examples(inspect.getdoc(getattr(layerprobe, name)) or "")]
}


def test_every_public_name_shows_an_example() -> None:
    assert [name for name, examples in EXAMPLES.items() if not examples] == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_public_name_runs(name: str, folder: Path) -> None:
    found = getattr(layerprobe, name)
    module = importlib.import_module(found.__module__)
    (test,) = [
        test
        for test in doctest.DocTestFinder(recurse=False).find(found, name, module=module, globs={})
        if test.examples
    ]
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert result.failed == 0, "".join(said)
