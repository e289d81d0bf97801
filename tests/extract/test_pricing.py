"""What a run would cost: the arithmetic against numbers worked out by hand, and the sample against a real run."""

import os
from pathlib import Path
from typing import Any

import pytest

import layerprobe
from layerprobe.errors import InputError, OptionError, SpaceError, StoreError
from layerprobe.extract import trials
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.pricing import DiskPace, Price, SamplePace, price_extraction
from layerprobe.models import LoadedModel
from layerprobe.store.format import is_leftover

extract: Any = layerprobe.extract


def test_the_arithmetic_is_that_of_the_page() -> None:
    sample = SamplePace(num_examples=1000, num_tokens=20_000, num_bytes=40_000_000, seconds=12.0, stalled_s=2.0)
    slow = Price(10**9, sample, DiskPace(10**8, 1.0, 10**12), "cpu")
    assert (slow.num_tokens, slow.num_bytes) == (20 * 10**9, 40 * 10**12)
    assert slow.forward_s == pytest.approx(10**7) and slow.disk_s == pytest.approx(400_000)  # sums of floats
    assert slow.bound == "forward" and slow.seconds == slow.forward_s
    text = str(slow)
    assert "1,000,000,000" in text and "40.0 TB" in text and "115.7 days" in text and "does not fit" in text
    assert "bound by the forward" in text and "1,000 texts in 12.0 s, stalled 2.00 s" in text
    quick = Price(10**9, sample, DiskPace(10**6, 1.0, 10**15), "cpu")
    assert quick.bound == "disk" and quick.seconds == pytest.approx(4 * 10**7) and "fits: " in str(quick)


@pytest.mark.parametrize("options", [{}, {"tokens": "first", "dtype": "float16"}, {"pool": "mean"}])
def test_a_sample_that_is_the_whole_input_counts_what_the_run_counts(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, options: dict[str, Any]
) -> None:
    store = extract(tiny, texts, tmp_path / "acts", **options)
    size = sum(path.stat().st_size for path in (tmp_path / "acts").glob("shard-*"))
    whole = extract(tiny, texts, tmp_path / "whole")
    price = price_extraction(tiny, texts, tmp_path / "new" / "acts", ExtractOptions(**options), 10 * len(texts))
    assert price.sample.num_examples == len(texts) and price.num_tokens == 10 * whole.num_tokens
    assert price.num_bytes == 10 * size and price.seconds > 0 and store.is_complete
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts", "whole"]


def test_a_sample_inside_a_store_has_a_name_that_the_next_run_removes(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "acts"
    extract(tiny, texts, folder)
    before, seen = set(os.listdir(folder)), set[str]()
    with tiny.model.register_forward_pre_hook(lambda *_: seen.update(os.listdir(folder))):
        price_extraction(tiny, texts, folder, ExtractOptions(), 100)
    assert len(seen - before) == 1 and all(map(is_leftover, seen - before)) and set(os.listdir(folder)) == before
    # as after a kill
    (folder / (seen - before).pop() / "acts").mkdir(parents=True)
    extract(tiny, texts, folder)
    assert set(os.listdir(folder)) == before


def test_one_text_is_one(tiny: LoadedModel, tmp_path: Path) -> None:
    assert "from a sample of 1 text in " in str(price_extraction(tiny, ["a"], tmp_path / "a", ExtractOptions(), 10))


def test_a_sample_ends_where_its_time_does(tiny: LoadedModel, tmp_path: Path) -> None:
    price = price_extraction(tiny, ["the fox"] * 5000, tmp_path / "acts", ExtractOptions(pool="cls"), 10**12, 1e-6)
    assert price.sample.num_examples == 8 and price.num_tokens == 10**12 * price.sample.num_tokens // 8


def test_batches_are_those_of_a_run_that_is_as_long(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long run tries how many tokens they should have, and so does its sample, which is short."""
    tried: list[int] = []
    monkeypatch.setattr(trials, "find_batch_tokens", lambda *_, **__: tried.append(1) or 64)
    shapes: list[int] = []
    with tiny.model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["input_ids"].numel()), with_kwargs=True
    ):
        price_extraction(tiny, texts, tmp_path / "acts", ExtractOptions(), 10**9)
        assert tried == [1] and max(shapes) <= 64
        price_extraction(tiny, texts, tmp_path / "acts", ExtractOptions(), len(texts))
        assert tried == [1] and max(shapes) > 64


def test_a_place_that_a_run_would_refuse_is_refused(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file.txt").write_text("mine")
    for place, message in (("file.txt/x", "file.txt is not a folder"), ("file.txt", "is a file, not a folder")):
        with pytest.raises(StoreError, match=message):
            price_extraction(tiny, ["a"], tmp_path / place, ExtractOptions(), 10)
    with pytest.raises(StoreError, match=r"is not a store: it holds 'file\.txt'"):
        price_extraction(tiny, ["a"], tmp_path, ExtractOptions(), 10)
    if not Path("/proc/self").exists():
        return
    # where nobody makes files, not even root
    with pytest.raises(StoreError, match=r"/proc/acts: cannot be written"):
        price_extraction(tiny, ["a"], "/proc/acts", ExtractOptions(), 10)


def test_a_disk_too_full_for_a_sample_is_named_as_it_was_given(
    tiny: LoadedModel, texts: list[str], small_disk: Path
) -> None:
    with pytest.raises(SpaceError) as caught:
        price_extraction(tiny, texts * 200, small_disk / "acts", ExtractOptions(), 10)
    said = str(caught.value)
    assert said.startswith(f"{small_disk / 'acts'}: the disk has ") and "another disk with -o" in said
    assert "layerprobe-plan" not in said and "--wait-for-space" not in said
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize(("count", "seconds"), [(0, 1.0), (10, 0.0), (10, float("nan"))])
def test_numbers_that_cannot_be_are_refused(tiny: LoadedModel, tmp_path: Path, count: int, seconds: float) -> None:
    with pytest.raises(OptionError, match="both must be above 0"):
        price_extraction(tiny, ["a"], tmp_path / "acts", ExtractOptions(), count, seconds)


def test_what_cannot_be_measured_is_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="only what a local disk costs can be measured"):
        price_extraction(tiny, ["a"], "memory://acts", ExtractOptions(), 10)
    with pytest.raises(InputError, match="holds no texts"):
        price_extraction(tiny, [], tmp_path / "acts", ExtractOptions(), 10)


def test_the_command_prints_the_table_and_leaves_nothing(
    tiny_model_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from layerprobe.cli.main import app

    file = tmp_path / "texts.txt"
    file.write_text("\n".join(text for text in texts if text))
    arguments = ["extract", str(tiny_model_folder), str(file), "-o", str(tmp_path / "acts"), "--keep", "0.5"]
    done = CliRunner().invoke(app, [*arguments, "--precision", "bfloat16", "--plan", "1000000000", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "1,000,000,000" in done.output and "bound by the" in done.output
    assert list(tmp_path.iterdir()) == [file]
