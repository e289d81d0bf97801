"""The README and every page of docs/: their snippets run, their commands work, what they name is there."""

import doctest
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import layerprobe
from layerprobe.cli.main import main
from pages import BLOCK, PAGES, PICTURES, ROOT, list_blocks, list_commands, list_shown, split_commands

SCRIPT = "benchmarks/docstrings.py"
PNG = b"\x89PNG"
SLOW_PAGES = {"classification.md", "compile.md", "generation.md", "pictures.md", "profile.md", "tour.md", "watch.md"}
PRINTED = re.compile(r"^```bash\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEST_NAME = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
RESULTS_FILE = re.compile(r"benchmarks/results/\w+\.json")
LINK = re.compile(r"\]\(([^)#]+)\)")
CODE_OR_TARGET = re.compile(r"`[^`]*`|(?<=\])\([^)]*\)")
QUOTED = re.compile(r"(?<![\w.])(\d+\.\d+)(?![\w.]*\d)|(?<![\w.])(\d+)(?= (?:times|%|percent|ms)\b)")


# a snippet may register an architecture
pytestmark = pytest.mark.usefixtures("restored_rows")


def as_case(page: Path) -> Any:
    """Name a page in the list of tests, and mark it where it takes long."""
    return pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW_PAGES else [])


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


@pytest.fixture(scope="session")
def docstrings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The labelled set that some pages ask for, in small."""
    made = tmp_path_factory.mktemp("set") / "docstrings.jsonl"
    subprocess.run([sys.executable, ROOT / SCRIPT, made, "--most", "15"], check=True)
    return made


def make_texts(page: Path, request: pytest.FixtureRequest) -> None:
    """Put the labelled set that a page asks for where it looks for it."""
    if SCRIPT in page.read_text(encoding="utf-8"):
        shutil.copy(request.getfixturevalue("docstrings"), "docstrings.jsonl")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds what a clone has beside the code."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "sample.txt", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [as_case(page) for page in PAGES if list_blocks(page, "python")])
def test_python_snippets_run(page: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    make_texts(page, request)
    state: dict[str, Any] = {"__name__": "snippets"}
    for number, code in enumerate(list_blocks(page, "python")):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), state)
    made = {name for name in PICTURES.get(page.name, {}) if name in "".join(list_blocks(page, "python"))}
    assert {name for name in made if (folder / name).read_bytes().startswith(PNG)} == made


@pytest.mark.parametrize("page", [as_case(page) for page in PAGES if list_commands(page)])
def test_commands_run(
    page: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    make_texts(page, request)
    for command in list_commands(page):
        monkeypatch.setattr("sys.argv", ["layerprobe", *command[1:]])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert not stopped.value.code, f"{command}: {captured.err}"
        assert captured.out.strip()
    made = {name for name in PICTURES.get(page.name, {}) if any(name in command for command in list_commands(page))}
    assert {name for name in made if (folder / name).read_bytes().startswith(PNG)} == made


def test_every_picture_is_shown_and_is_made_by_its_page_or_by_a_named_script() -> None:
    """Those of pages by `tests/docs_pictures.py`, those of measurements by the benchmark."""
    scripts = "".join(
        (ROOT / "benchmarks" / name).read_text(encoding="utf-8") for name in ("insight.py", "decoders.py")
    )
    shown = {name: page for page in PAGES for name in list_shown(page)}
    assert set(shown) == {path.name for path in (ROOT / "docs" / "img").iterdir()}
    made = {name for pictures in PICTURES.values() for name in pictures.values()}
    for name in set(shown) - made:
        assert f'"{name}"' in scripts or name == "report.png", name  # that one is a screenshot
    for page, pictures in PICTURES.items():
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert set(pictures.values()) == set(list_shown(ROOT / "docs" / page))
        assert all(text.count(name) for name in pictures)


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


def test_the_architecture_names_every_file_that_knows_of_cuda() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    gpu = page.partition("## The GPU")[2].partition("## ")[0]
    package = ROOT / "layerprobe"
    sources = {str(path.relative_to(package)): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    # not in a comment, and not `torch.cuda.Event` as a type alone
    knowing = {name for name, source in sources.items() if re.search(r"^[^#\n]*\btorch\.cuda\.\w+\(", source, re.M)}
    assert set(re.findall(r"`(\w[\w/]*\.py)`", gpu)) == knowing
    hidden = re.compile(r"cuda\.(?:Stream|stream|current_stream)\(|pin_memory|wait_event")
    assert {name for name, source in sources.items() if hidden.search(source)} - {"cost/machine.py"} == {
        "capture/staging.py",
        "capture/streams.py",
    }


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
        for groups in QUOTED.findall(CODE_OR_TARGET.sub("", paragraph)):
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
