"""The commands that measure a model, run as a user runs them."""

import json
from pathlib import Path

import pytest

from layerprobe.cli.main import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["layerprobe", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_profile_prints_writes_and_compares(
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [tmp_path / name for name in ("profile.json", "profile.png", "trace.json")]
    options = ["--batch", 2, "--length", 8, "--repeats", 1, "--by", "place", "--compare", "hidden_states"]
    status = run(
        monkeypatch, "profile", tiny_model_folder, *options,
        "--json", files[0], "-o", files[1], "--trace", files[2], "--device", "cpu",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0 and all(file.is_file() for file in files)
    assert printed.endswith("".join(f"wrote {file}\n" for file in files))
    assert "2 x 8 tokens" in printed and "layers.*.ffn.act" in printed and "watched by" in printed
    document = json.loads(files[0].read_text())
    assert document["batch"] == 2 and document["length"] == 8
    assert set(document["compare"]["ratios"]) == {"bare", "hooks", "hidden_states", "memory", "store"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--compare", "all"], "--compare 'all': use hidden_states"),
        (["--by", "head"], "--by 'head': use layer, site, place"),
        (["--length", "65"], "length is 65: the model takes at most 64 tokens"),
        (["--json", "none/profile.json"], "none/profile.json: there is no folder none. Make it, or"),
        (["--trace", "none/trace.json"], "none/trace.json: there is no folder none. Make it, or"),
        (["--json", "."], ".: is a folder. Choose the name of a file."),
        (["-o", "profile.gif"], "'.gif' is not"),
        (["--sites", "layers.9", "--length", "8"], "layers.9"),
    ],
)
def test_profile_refuses_before_it_measures(
    options: list[str],
    said: str,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "profile", tiny_model_folder, "--device", "cpu", *options) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out
