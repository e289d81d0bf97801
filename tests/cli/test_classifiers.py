"""`layerprobe classify`: options reach the library, errors are one line."""

import json
from pathlib import Path

import pytest

import layerprobe as lp
from layerprobe.cli.main import main
from layerprobe.models import LoadedModel

WORDS = ("fox", "dog", "quick fox", "lazy dog", "brown fox", "brown dog", "quick brown fox", "lazy brown dog")


@pytest.fixture
def store(tiny: LoadedModel, tiny_model_folder: Path, tmp_path: Path) -> Path:
    records = [
        {"text": f"{first} {words}{end}", "label": words[-3:], "start": len(first) + 1, "end": len(first) + 4}
        for first in ("the", "over the", "a")
        for words in WORDS
        for end in ("", " jumps")
    ]
    lp.extract(str(tiny_model_folder), records, tmp_path / "acts", device="cpu")
    return tmp_path / "acts"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["layerprobe", "classify", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_everything_asked_for_is_written(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said, picture, kept = tmp_path / "a.json", tmp_path / "a.png", tmp_path / "kept"
    code = run(monkeypatch, store, "--control", "--mdl", "--json", said, "-o", picture, "--save", kept)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    found = json.loads(said.read_text())
    assert {"site", "accuracy", "f1", "ci"} <= set(found["sites"][0])
    assert set(found["baselines"]) == {"majority", "tfidf", "untrained"}
    assert found["verdict"]["chosen"] in printed.out
    assert all(site["bits"] and site["selectivity"] is not None for site in found["sites"])
    assert picture.stat().st_size and lp.load_classifier(kept).classes == ("dog", "fox")


def test_spans_pools_and_splits_reach_the_task(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "a.json"
    assert run(monkeypatch, store, "--span", "start,end", "--no-untrained", "-q", "--json", said) == 0
    found = json.loads(said.read_text())
    assert found["task"]["kind"] == "spans" and "untrained" not in found["baselines"]
    assert run(monkeypatch, store, "--pool", "cls", "-s", "layers.*", "--no-untrained", "-q", "--json", said) == 0
    assert json.loads(said.read_text())["task"]["pool"] == "cls"


def test_a_profile_needs_no_labels(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, store, "--profile") == 0
    assert capsys.readouterr().out.splitlines()[0].split()[0] == "site"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--labels", "topic"), "no record in"),
        (("--span", "start"), "--span 'start': name two fields"),
        (("--profile", "--control"), "--control with --profile: it makes its own tasks"),
        (("--max-examples", "0"), "max_examples is 0: it must be a whole number of at least 3"),
        (("--json", "none/a.json"), "none/a.json: there is no folder none"),
        (("-o", "a.doc"), "--out a.doc: '.doc' is not .csv, .json"),
        (("--split", "label"), "'dog', 'fox' is none of train"),
    ],
)
def test_mistakes_are_one_line(
    store: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, store, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_what_cannot_be_kept_is_refused_before_the_work(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    held = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    for options, message in (
        (("--save", tmp_path / "file"), "file is a file. Choose another folder"),
        (("--save", tmp_path / "file" / "below"), "file is a file. Choose another folder"),
        (("--save", store), f"{store}: lies in the store {store}"),
        (("--save", store / "kept"), f"lies in the store {store}"),
        (("--json", tmp_path), "is a folder. Choose the name of a file"),
    ):
        # labels that are not there would be what is told, once the work has begun
        assert run(monkeypatch, store, "--labels", "topic", *options) == 2
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == held
