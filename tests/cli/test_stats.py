"""`layerprobe stats`, run as a user runs it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import layerprobe as lp
from layerprobe.cli.main import main
from layerprobe.models import LoadedModel

SINKS = {
    "moments": lp.Moments(),
    "covariance": lp.Covariance(),
    "histogram": lp.Histogram(-4, 4, 20),
    "topk": lp.TopK(2, context=1),
    "cka": lp.CrossCovariance(),
}
OWN = {"histogram": ["--low", "-4", "--high", "4", "--bins", "20"], "topk": ["--top", "2", "--context", "1"]}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["layerprobe", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("name", SINKS)
def test_stats_prints_and_writes_what_the_sink_holds(
    name: str,
    tiny: LoadedModel,
    tiny_model_folder: Path,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, table, sums = tmp_path / "texts.txt", tmp_path / "x.json", tmp_path / "x.safetensors"
    file.write_text("\n".join(texts), encoding="utf-8")
    status = run(
        monkeypatch, "stats", tiny_model_folder, file, "-s", "layers.*", "--sink", name, *OWN.get(name, []),
        "--json", table, "-o", sums, "--device", "cpu",
    )  # fmt: skip
    printed = capsys.readouterr().out
    sink = SINKS[name]
    lp.extract(tiny, file, sink, sites="layers.*")
    assert status == 0 and printed.endswith(f"1 truncated\nwrote {table}\nwrote {sums}\n")
    saved, expected = load_file(sums), sink.state_dict()
    assert sorted(saved) == sorted(expected) and all(torch.equal(saved[key], expected[key]) for key in saved)
    document = json.loads(table.read_text())
    assert document["sink"] == name and document["examples"] == len(file.read_text().splitlines())
    if isinstance(sink, lp.TopK):
        assert document["sites"] == sink.list_tops(tiny.tokenizer)
        assert len(document["sites"]) == 3 * 3 * 2  # sites, units, tokens
        assert max(line["value"] for line in document["sites"]) == max(
            float(sink[site].values.max()) for site in sink.sites
        )
    else:
        assert document["sites"] == sink.summary() and str(sink) in printed


def test_asked_units_are_printed(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("the quick brown fox\nthe lazy dog", encoding="utf-8")
    options = ["-s", "layers.1", "--sink", "topk", "--top", 1, "--unit", 7, "--unit", 3, "-q", "--device", "cpu"]
    assert run(monkeypatch, "stats", tiny_model_folder, tmp_path / "texts.txt", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["layers.1", "7"], ["layers.1", "3"]]


def test_a_quantile_beyond_all_bins_is_null_in_json(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("the quick brown fox", encoding="utf-8")
    options = ["--sink", "histogram", "--low", "0", "--high", "0.001", "-q", "--json", tmp_path / "x.json"]
    assert run(monkeypatch, "stats", tiny_model_folder, tmp_path / "texts.txt", *options, "--device", "cpu") == 0
    (line, *_) = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))["sites"]
    assert line["99%"] is None and line["above"] > 0
    assert "inf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sink", "mean"], "--sink 'mean': use moments, covariance, histogram, topk, cka"),
        (["--bins", "3"], "--bins goes with --sink histogram, not with moments"),
        (["--sink", "cka", "--top", "3"], "--top goes with --sink topk, not with cka"),
        (["--sink", "topk", "--unit", "32"], "--unit 32: 'embeddings' has 32"),
        (["--sink", "histogram", "--bins", "0"], "of 0 bins"),
        (["-o", "x.npz"], "-o 'x.npz': '.npz' is not '.safetensors'"),
        (["-o", "none/x.safetensors"], "none/x.safetensors: there is no folder none. Make it, or"),
        (["--json", "none/x.json"], "none/x.json: there is no folder none. Make it, or"),
        (["--json", "."], r".: is a folder. Choose the name of a file."),
        (["--sites", "layers.7"], "layers.7"),
    ],
)
def test_stats_refuses_before_it_measures(
    options: list[str],
    said: str,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "texts.txt").write_text("the quick brown fox", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "stats", tiny_model_folder, "texts.txt", "--device", "cpu", *options) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out
