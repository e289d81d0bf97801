"""Parts of a run, made on several machines, become the very store that one run would have made."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layerprobe as lp
from faults import FaultySystem, Step
from layerprobe.errors import FormatError, LockError, OptionError, PlanError, SpaceError, StoreError
from layerprobe.models import LoadedModel
from layerprobe.store import durable
from layerprobe.store.format import commit_shard
from layerprobe.store.lock import StoreLock
from layerprobe.store.verify import verify

extract: Any = lp.extract
SHARD_BYTES = 10_000


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def shard(unit: int) -> str:
    return f"shard-{unit:06d}.safetensors"


@pytest.fixture
def whole(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> Path:
    store = extract(tiny, texts, tmp_path / "whole", shard_size=SHARD_BYTES)
    assert store.num_shards >= 5
    return tmp_path / "whole"


@pytest.fixture
def part(whole: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a store that holds only some units, as a machine does that was given them."""

    def make(name: str, *units: int) -> Path:
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        (folder / "index.json").unlink()
        for path in folder.glob("shard-*"):
            if int(path.name[6:12]) not in units:
                path.unlink()
        return folder

    return make


def count(whole: Path) -> int:
    return len(list(whole.glob("shard-*")))


@pytest.mark.parametrize("link", [False, True])
def test_parts_become_the_store_that_one_run_makes(
    whole: Path, part: Callable[..., Path], tmp_path: Path, link: bool
) -> None:
    units = list(range(count(whole)))
    random.Random(3).shuffle(units)
    parts = [part("a", *units[:2]), part("b", *units[2:3]), part("c", *units[3:])]
    before = [contents(folder) for folder in parts]
    report = lp.merge(tmp_path / "out", parts, link=link)
    assert report.is_complete and (report.num_added, report.num_kept, report.num_alike) == (len(units), 0, 0)
    assert contents(tmp_path / "out") == contents(whole)
    assert [contents(folder) for folder in parts] == before
    assert verify(tmp_path / "out").ok
    linked = {os.stat(tmp_path / "out" / shard(unit)).st_nlink for unit in units}
    assert linked == ({2} if link else {1})


def test_what_is_missing_is_named_and_leaves_the_store_unfinished(
    whole: Path, part: Callable[..., Path], tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    total = count(whole)
    report = lp.merge(tmp_path / "out", [part("a", 0), part("b", 2, 3)])
    assert report.missing == [1, *range(4, total)]
    assert f"not complete: {total - 3} units missing (1, 4" in str(report)
    assert not lp.open(tmp_path / "out").is_complete and not (tmp_path / "out" / "index.json").exists()
    # more parts later
    report = lp.merge(tmp_path / "out", [part("c", 1, 2)])
    assert (report.num_added, report.num_kept, report.num_alike) == (1, 3, 1) and report.missing == [*range(4, total)]
    assert "1 shard came twice and alike" in str(report)
    # the run itself goes on with what was merged
    extract(tiny, texts, tmp_path / "out", shard_size=SHARD_BYTES)
    assert contents(tmp_path / "out") == contents(whole)


def test_merging_again_changes_nothing(whole: Path, part: Callable[..., Path], tmp_path: Path) -> None:
    parts = [part("a", 0, 1, 2), part("b", *range(2, count(whole)))]
    lp.merge(tmp_path / "out", parts)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    report = lp.merge(tmp_path / "out", [tmp_path / "out", *parts])
    assert report.is_complete and (report.num_added, report.num_kept) == (0, count(whole))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def test_another_plan_is_refused_with_the_fields_that_differ(
    whole: Path, tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    extract(tiny, texts, tmp_path / "half", shard_size=SHARD_BYTES, dtype="float16")
    with pytest.raises(PlanError, match=r"half: holds another run than .*whole.*dtype: 'float32' there, 'float16' h"):
        lp.merge(tmp_path / "out", [whole, tmp_path / "half"])
    assert not (tmp_path / "out").exists()
    before = contents(tmp_path / "half")
    with pytest.raises(PlanError, match=r"whole: holds another run than .*half"):
        lp.merge(tmp_path / "half", [whole])
    assert contents(tmp_path / "half") == before


def test_two_versions_of_a_unit_are_refused_before_anything_is_written(
    whole: Path, part: Callable[..., Path], tmp_path: Path
) -> None:
    other = part("other", 0, 1)
    store: Any = lp.open(other)
    mapped = list(store.iter_shards())[1]
    tensors = [(name, mapped.tensor(name).clone()) for name in mapped.header.tensors]
    dict(tensors)["layers.1"][0, 0] += 1e-6
    commit_shard(other, mapped.header, tensors)
    with pytest.raises(
        PlanError, match=r"whole.shard-000001\S+: differs from .*other.* in 'layers\.1', though the plan"
    ):
        lp.merge(tmp_path / "out", [other, whole])
    assert not (tmp_path / "out").exists()


def test_copies_that_differ_in_padding_alone_are_alike(
    whole: Path, part: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = part("other", 0, 1)
    store: Any = lp.open(other)
    mapped = list(store.iter_shards())[1]
    tensors = [(name, mapped.tensor(name).clone()) for name in mapped.header.tensors]
    monkeypatch.setattr("layerprobe.store.headers._ALIGNMENT", 64)
    commit_shard(other, mapped.header, tensors)
    assert (other / shard(1)).stat().st_size < (whole / shard(1)).stat().st_size
    report = lp.merge(tmp_path / "out", [whole, other])
    assert report.is_complete and report.num_alike == 2
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("damage", ["header", "data", "cut"])
def test_a_damaged_copy_is_left_out_and_a_whole_one_used(
    whole: Path, part: Callable[..., Path], tmp_path: Path, damage: str
) -> None:
    total = count(whole)
    bad = part("bad", *range(total))
    raw = bytearray((bad / shard(2)).read_bytes())
    raw[30 if damage == "header" else -5] ^= 1
    (bad / shard(2)).write_bytes(raw[:-9] if damage == "cut" else raw)
    report = lp.merge(tmp_path / "out", [bad])
    assert [path for path, _ in report.damaged] == [bad / shard(2)] and report.missing == [2]
    assert f"{bad / shard(2)}: left out: " in str(report)
    assert not (tmp_path / "out" / shard(2)).exists() and not (tmp_path / "out" / "index.json").exists()
    report = lp.merge(tmp_path / "both", [bad, part("good", 2)])
    assert report.is_complete and len(report.damaged) == 1
    assert contents(tmp_path / "both") == contents(whole)
    # a copy in the store itself goes bad and is made good
    (tmp_path / "both" / shard(2)).write_bytes(raw)
    assert lp.merge(tmp_path / "both", [whole]).is_complete
    assert contents(tmp_path / "both") == contents(whole)
    (tmp_path / "both" / shard(2)).write_bytes(raw)
    assert lp.merge(tmp_path / "both", [bad]).missing == [2]
    assert not lp.open(tmp_path / "both").is_complete if damage == "data" else True


def test_a_tokenizer_that_is_another_is_left_out(whole: Path, part: Callable[..., Path], tmp_path: Path) -> None:
    bad = part("bad", 0, 1)
    path = bad / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"fox"', '"axe"'))
    report = lp.merge(tmp_path / "out", [bad, whole])
    assert report.is_complete and [path for path, _ in report.damaged] == [bad / "tokenizer"]
    assert contents(tmp_path / "out") == contents(whole)


def test_a_merge_without_a_sound_tokenizer_is_not_complete(
    whole: Path, part: Callable[..., Path], tmp_path: Path, tiny: LoadedModel, texts: list[str]
) -> None:
    bad = part("bad", *range(count(whole)))
    path = bad / "tokenizer" / "tokenizer.json"
    sound = path.read_text()
    path.write_text(sound.replace('"fox"', '"axe"'))
    report = lp.merge(tmp_path / "out", [bad])
    assert not report.missing and not report.is_complete and "not complete: no sound tokenizer" in str(report)
    assert not lp.open(tmp_path / "out").is_complete
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    # as the report says, either way
    assert lp.merge(tmp_path / "out", [whole]).is_complete
    assert extract(tiny, texts, tmp_path / "again", shard_size=SHARD_BYTES).is_complete
    assert contents(tmp_path / "out") == contents(tmp_path / "again") == contents(whole)


def test_a_damaged_tokenizer_of_the_store_itself_takes_its_index_away(whole: Path, part: Callable[..., Path]) -> None:
    other = part("other", 0)
    path = whole / "tokenizer" / "tokenizer.json"
    sound = path.read_bytes()
    path.write_bytes(sound[:-9])
    (other / "tokenizer" / "tokenizer.json").write_bytes(sound[:-9])
    assert not lp.merge(whole, [other]).is_complete and not lp.open(whole).is_complete
    assert verify(whole, repair=True).removed == ("tokenizer",)


def test_links_in_a_store_are_not_followed(whole: Path, part: Callable[..., Path], tmp_path: Path) -> None:
    bad = part("bad", 0)
    (bad / shard(1)).symlink_to(whole / shard(1))
    report = lp.merge(tmp_path / "out", [bad])
    assert [path for path, _ in report.damaged] == [bad / shard(1)] and 1 in report.missing


def test_shards_that_no_plan_has_are_left_out(whole: Path, part: Callable[..., Path], tmp_path: Path) -> None:
    bad = part("bad", 0)
    said = json.loads((bad / "store.json").read_text())
    extra = bad / shard(count(whole))
    shutil.copy(whole / shard(1), extra)
    report = lp.merge(tmp_path / "out", [bad])
    assert [path for path, _ in report.damaged] == [extra] and said["plan"]["units"] == count(whole)


def test_what_cannot_be_merged_is_refused(
    whole: Path, part: Callable[..., Path], tiny: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="give a list of at least one store"):
        lp.merge(tmp_path / "out", [])
    with pytest.raises(OptionError, match="give a list of at least one store"):
        lp.merge(tmp_path / "out", str(whole))
    link: Any = "no"
    with pytest.raises(OptionError, match="link is 'no': use True or False"):
        lp.merge(tmp_path / "out", [whole], link=link)
    with pytest.raises(StoreError, match="none: does not exist"):
        lp.merge(tmp_path / "out", [tmp_path / "none"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="mine: is not a store: it has no store"):
        lp.merge(tmp_path / "out", [tmp_path / "mine"])
    with pytest.raises(StoreError, match=r"mine: is not a store: it holds 'notes\.txt'"):
        lp.merge(tmp_path / "mine", [whole])
    with pytest.raises(StoreError, match="is a file, not a folder"):
        lp.merge(tmp_path / "mine" / "notes.txt", [whole])
    with lp.Probe(tiny.model, "layers.0", to=tmp_path / "probed"):
        tiny.model(**tiny.tokenizer(["the fox"], return_tensors="pt"))
    with pytest.raises(PlanError, match="Only stores of extract are merged"):
        lp.merge(tmp_path / "out", [tmp_path / "probed"])
    damaged = part("damaged", 0)
    (damaged / "store.json").write_text((damaged / "store.json").read_text().replace('"pool": null', '"pool": "cls"'))
    with pytest.raises(FormatError, match="its fingerprint is"):
        lp.merge(tmp_path / "out", [damaged])
    assert not (tmp_path / "out").exists()
    with StoreLock(whole), pytest.raises(LockError, match="another run is writing"):
        lp.merge(whole, [part("a", 0)])


def test_a_disk_too_small_is_told_before_and_one_that_fills_leaves_what_is_whole(
    whole: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(left: int) -> None:
        free = shutil.disk_usage(small_disk).free
        (small_disk / "ballast").write_bytes(b"0" * (free - left))

    size = sum(path.stat().st_size for path in whole.glob("shard-*"))
    fill(size // 2)
    with pytest.raises(SpaceError, match=r"out: needs .* free. Make room"):
        lp.merge(small_disk / "out", [whole])
    assert not (small_disk / "out").exists()
    with pytest.raises(StoreError, match=r"cannot be linked into .*Copy instead"):
        lp.merge(small_disk / "out", [whole], link=True)
    shutil.rmtree(small_disk / "out")
    # as if others had taken the room meanwhile
    monkeypatch.setattr("layerprobe.store.merge._check_room", lambda *_: None)
    with pytest.raises(SpaceError, match="cannot be written"):
        lp.merge(small_disk / "out", [whole])
    assert not (small_disk / "out" / "index.json").exists()
    os.unlink(small_disk / "ballast")
    assert lp.merge(small_disk / "out", [whole]).is_complete
    assert contents(small_disk / "out") == contents(whole)


def test_the_bar_counts_bytes(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lp.merge(tmp_path / "a", [whole], progress=True)
    assert "B/s" in capsys.readouterr().err
    lp.merge(tmp_path / "b", [whole], progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("link", [False, True])
def test_a_stage_that_is_a_link_is_not_followed(
    whole: Path, part: Callable[..., Path], tmp_path: Path, link: bool
) -> None:
    mine, out = tmp_path / "mine", part("out", 0)
    mine.mkdir()
    (mine / shard(1)).write_text("mine")
    (out / "merge.tmp").symlink_to(mine)
    assert lp.merge(out, [whole], link=link).is_complete
    assert contents(mine) == {shard(1): b"mine"} and contents(out) == contents(whole)
    assert not os.path.lexists(out / "merge.tmp")


@pytest.mark.parametrize("link", [False, True])
def test_what_an_ended_run_left_is_removed_and_no_link_followed(whole: Path, tmp_path: Path, link: bool) -> None:
    out, mine, folder = tmp_path / "out", tmp_path / "mine", tmp_path / "folder"
    out.mkdir()
    folder.mkdir()
    mine.write_text("mine" * 9999)
    for name in ("store.json", "index.json", shard(0), shard(77)):
        (out / f"{name}.tmp").symlink_to(mine)
    (out / f"{shard(78)}.tmp").write_bytes(bytes(4096))
    (out / "tokenizer.tmp").symlink_to(folder)
    assert lp.merge(out, [whole], link=link).is_complete
    assert mine.read_text() == "mine" * 9999 and not list(folder.iterdir())
    assert contents(out) == contents(whole) and not list(out.glob("*.tmp")) and not (out / "index.json").is_symlink()


def test_every_shard_is_on_the_disk_before_the_index_is(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, flushed = tmp_path / "out", list[int]()
    out.mkdir()
    shutil.copy(whole / "store.json", out)
    shutil.copy(whole / shard(0), out)  # by hand, and maybe not on the disk yet
    before: list[set[int]] = []

    def note(step: Step) -> None:
        if step.name == "fsync":
            flushed.append(step.inode)
        if step.name == "replace" and Path(step.arguments[1]).name == "index.json":
            before.append(set(flushed))

    monkeypatch.setattr(durable, "os", FaultySystem(note))
    assert lp.merge(out, [whole], link=True).is_complete
    assert len(before) == 1 and before[0] >= {(out / shard(unit)).stat().st_ino for unit in range(count(whole))}


def test_a_stage_that_was_left_is_named_and_removed_by_the_next_run(
    part: Callable[..., Path], tiny: LoadedModel, texts: list[str]
) -> None:
    out = part("out", 0)
    (out / "merge.tmp").mkdir()
    (out / "merge.tmp" / shard(1)).write_text("half")
    assert "merge.tmp is left over; the next run removes it" in verify(out).notes
    extract(tiny, texts, out, shard_size=SHARD_BYTES)
    assert not (out / "merge.tmp").exists()


def test_a_store_that_is_written_to_is_not_even_read(whole: Path, part: Callable[..., Path]) -> None:
    out = part("out", 0)
    (out / "store.json").write_text("half")
    with StoreLock(out), pytest.raises(LockError, match="another run is writing"):
        lp.merge(out, [whole])
