"""The options of commands that run a model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from layerprobe.cli import runs
from layerprobe.errors import OptionError

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12", 12),
        ("300KB", 300_000),
        ("1gib", 1 << 30),
        ("64MB", 64_000_000),
        ("1GiB", 1 << 30),
        ("1.5 k", 1500),
        ("2kiB", 2048),
        ("3T", 3 * 10**12),
    ],
)
def test_sizes_are_decimal_unless_they_say_otherwise(text: str, size: int) -> None:
    assert runs._parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "count"),
    [("7", 7), ("1_000_000_000", 10**9), ("1e9", 10**9), ("1.5E+3", 1500), (" 2e12", 2 * 10**12), ("10.0", 10)],
)
def test_counts_may_be_written_short(text: str, count: int) -> None:
    assert runs._parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "many", "1.5", "1e", "-3", "1__0", "1e-3", "15e-1", "1,000", "nan", "inf", "1e999"]
)
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"it is a number of texts: write 1000000000, 1_000_000_000 or 1e9\."):
        runs._parse_count(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan-seconds", "5"], "--plan-seconds 5 without --plan: nothing is measured. Add --plan N."),
        (["--plan", "9", "--dry-run"], "--dry-run with --plan: it prints a cost and writes no store. Leave it out."),
        (["--plan", "9", "--overwrite", "--wait-for-space"], "--overwrite, --wait-for-space with --plan: "),
        (["--plan", "9", "--grace", "30"], "--grace with --plan: "),
        (["--plan", "9", "-q"], "--quiet with --plan: "),
        (["--plan", "9", "--devices", "cpu,cpu"], "--plan with --devices cpu,cpu: one device is measured"),
        (["--plan", "few"], "--plan 'few': it is a number of texts"),
        (["--plan", "0"], "a plan of 0 texts from 60 s: both must be above 0."),
    ],
)
def test_what_means_nothing_with_or_without_a_plan_is_refused(
    run: Run, tiny_model_folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "a.txt").write_text("the dog")
    code, printed, said = run("extract", tiny_model_folder, tmp_path / "a.txt", "-o", tmp_path / "acts", *options)
    assert code == 2 and printed == "" and message in said and said.count("\n") == 1


def test_a_store_in_memory_that_would_be_gone_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the dog")
    code, _, said = run("extract", "./nowhere", tmp_path / "a.txt", "-o", "memory://acts")
    assert code == 2 and "that is this process's memory, gone when the command ends. Give a folder." in said


def test_the_precisions_are_listed(run: Run) -> None:
    _, printed, _ = run("extract", "--help")
    listed = " ".join(printed.partition("--precision")[2].partition("--compile")[0].split())
    assert "float32, bfloat16, float16, or on CUDA tf32; or fp32, bf16, fp16" in listed
