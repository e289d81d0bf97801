"""diff, plot and check on the command line: what they print and write, and one line for each mistake."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from planting import plant

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def acts(tmp_path: Path) -> Path:
    maker = torch.Generator().manual_seed(0)
    layers = {f"layers.{layer}": torch.randn(60, 8, generator=maker) for layer in range(3)}
    return plant(tmp_path / "acts", layers, [6] * 10, fields=[{"label": one % 2} for one in range(10)])


def refused(result: tuple[int, str, str], message: str) -> None:
    code, _, said = result
    assert code == 2 and said.startswith("layerprobe: ") and message in said and said.count("\n") == 1


def test_diff_prints_a_table_and_writes_by_the_suffix(run: Run, acts: Path, tmp_path: Path) -> None:
    code, printed, said = run("diff", acts, "-o", tmp_path / "diff.csv")
    assert code == 0 and said == "" and "layers.0  layers.1" in printed
    assert printed.endswith(f"\nwrote {tmp_path / 'diff.csv'}\n")
    assert len((tmp_path / "diff.csv").read_text().splitlines()) == 3
    options = ("--all-pairs", "--cosine", "zscored", "--max-rows", 40, "--seed", 3, "-q", "-s", "layers.*")
    assert run("diff", acts, "-o", tmp_path / "diff.json", *options) == (0, "", "")
    found = json.loads((tmp_path / "diff.json").read_text())
    assert len(found["pairs"]) == 3 and found["cosine"] == "zscored" and found["seed"] == 3
    assert run("diff", acts, "-o", tmp_path / "diff.pdf", "-q")[0] == 0
    assert (tmp_path / "diff.pdf").read_bytes().startswith(b"%PDF")


def test_report_writes_a_page_by_the_options(run: Run, acts: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    code, printed, said = run("report", acts, "-o", page)
    assert code == 0 and said == "" and "10 of 10 examples at 3 sites" in printed
    options = ("--points", "rows", "--max-points", 30, "--max-rows", 40, "--seed", 3, "-s", "layers.1:", "-q")
    assert run("report", acts, "-o", page, *options) == (0, "", "")
    # the data are the first block of the page that is a script
    block = page.read_text(encoding="utf-8").partition('type="application/json">')[2]
    data = json.loads(block.partition("</script>")[0])
    assert data["sites"] == ["layers.1", "layers.2"] and data["points"]["kind"] == "rows"
    assert len(data["points"]["of"]) == 30 and data["points"]["all"] == 60
    assert run("report", acts, "-o", page, "--labels", "label", "--pool", "max", "-q")[0] == 0
    assert '"classes":{"labels":"label"' in page.read_text(encoding="utf-8")


def test_report_refuses_what_it_cannot_show(run: Run, acts: Path, tmp_path: Path) -> None:
    refused(run("report", acts, "-o", tmp_path / "report.png"), "'.png' is not .html or .htm")
    refused(run("report", acts, "-o", tmp_path / "a.html", "--attention", 0), "holds no attention weights")


@pytest.mark.parametrize(
    "command",
    [
        ("diff", "none"),
        ("check", "none"),
        ("plot", "none"),
        ("classify", "none"),
        ("fit-decoder", "none"),
        ("lens", "none", "none.txt"),
        ("profile", "none"),
        ("patch", "none", "--clean", "a", "--corrupt", "b", "--answer", "c"),
    ],
    ids=lambda command: command[0],
)
def test_a_picture_that_cannot_be_made_is_refused_before_anything_is_looked_at(
    run: Run, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    refused(run(*command, "-o", "a.png"), "a picture needs matplotlib, which is not installed. Run pip install")


def test_check_prints_the_verdict_and_fails_on_rows_that_are_not_finite(run: Run, acts: Path, tmp_path: Path) -> None:
    code, printed, said = run("check", acts, "--json", tmp_path / "check.json")
    assert code == 0 and said == "" and "Nothing stands in the way of cosines.\nwrote " in printed
    assert len(json.loads((tmp_path / "check.json").read_text())["sites"]) == 3
    rows = torch.full((20, 4), 1.0)
    rows[3] = float("nan")
    code, printed, _ = run("check", plant(tmp_path / "bad", {"layers.0": rows}, [5] * 4))
    assert code == 1 and "1 row of 20 not finite" in printed


def test_plot_draws_points_and_attention(run: Run, acts: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    code, printed, said = run("plot", acts, "-o", tmp_path / "layers.png", "--max-points", 9, "--shared")
    assert code == 0 and said == "" and "9 of 10 points, pca, coloured by label" in printed
    assert printed.endswith(f"wrote {tmp_path / 'layers.png'}\n") and (tmp_path / "layers.png").exists()
    source = tmp_path / "texts.txt"
    source.write_text("the quick fox\n", encoding="utf-8")
    weights = ("-s", "layers.0.attention.weights")
    run("extract", tiny_model_folder, source, "-o", tmp_path / "maps", *weights, "-q")
    code, printed, _ = run("plot", tmp_path / "maps", "-o", tmp_path / "maps.svg", "--attention", 0, *weights)
    assert code == 0 and (tmp_path / "maps.svg").exists()
    assert "head 3" in (tmp_path / "maps.svg").read_text(encoding="utf-8")


def test_mistakes_are_one_line_and_write_nothing(run: Run, acts: Path, tmp_path: Path) -> None:
    refused(run("diff", acts, "-o", tmp_path / "diff.xlsx"), "'.xlsx' is not .csv, .json, .png, .svg, .pdf")
    refused(run("diff", acts, "--cosine", "soft"), "cosine='soft': use raw, centred, zscored")
    refused(run("plot", acts, "-o", tmp_path / "a.png", "--color", "genre"), "no record in")
    refused(run("plot", acts, "-o", tmp_path / "a.png", "--attention", 0), "no attention weights in")
    refused(
        run("plot", acts, "-o", tmp_path / "a.png", "--attention", 0, "--method", "tsne", "--color", "norm"),
        "--color, --method with --attention: a map of weights has no points",
    )
    refused(
        run("plot", acts, "-o", tmp_path / "a.png", "--attention", 0, "--seed", 0),
        "--seed with --attention: a map of weights has no points",
    )
    refused(run("check", acts, "--json", tmp_path / "none" / "a.json"), "there is no folder")
    refused(run("check", acts, "--json", acts / "index.json"), f"index.json: lies in the store {acts}. Choose another")
    refused(run("diff", acts, "-o", acts / "a.csv"), f"a.csv: lies in the store {acts}")
    refused(run("plot", acts, "-o", acts / "a.png"), f"a.png: lies in the store {acts}")
    refused(run("report", acts, "-o", acts / "a.html"), f"a.html: lies in the store {acts}")
    refused(
        run("plot", acts, "-o", tmp_path / "a.png", "--attention", 0, "-s", "layers.0", "-s", "layers.1"),
        "--attention with 2 sites: one picture holds the heads of one",
    )
    refused(run("check", tmp_path / "none"), "does not exist")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts"]
