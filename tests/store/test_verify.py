"""Whatever is changed in a store, verify names the file; what it removes, the same extraction makes again."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe
from layerprobe.errors import LockError, OptionError, StoreError
from layerprobe.models import LoadedModel
from layerprobe.store.format import commit_shard, read_header
from layerprobe.store.index import ShardInfo
from layerprobe.store.lock import StoreLock
from layerprobe.store.progress import read_status
from layerprobe.store.shards import MappedShard
from layerprobe.store.verify import verify

extract: Any = layerprobe.extract
SHARD_BYTES = 10_000


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def store(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> Path:
    """A complete store of several shards with int8 rows, scales and attention weights."""
    sites = ["layers.1", "layers.0.attention.weights"]
    extract(tiny, texts, tmp_path / "acts", sites=sites, shard_size=SHARD_BYTES)
    return tmp_path / "acts"


def rewrite(folder: Path, unit: int, change: Callable[[dict[str, torch.Tensor]], Any], **fields: Any) -> Path:
    """Write a shard anew with other tensors or counts, and with checksums that are right."""
    path = folder / f"shard-{unit:06d}.safetensors"
    header = read_header(path)
    info = ShardInfo(header.file, header.first_example, header.num_examples, header.num_tokens)
    shard = MappedShard(path, info, header.fingerprint, True)
    tensors = {name: shard.tensor(name).clone() for name in header.tensors}
    change(tensors)
    ordered = sorted(tensors.items(), key=lambda named: -named[1].dtype.itemsize)
    commit_shard(folder, replace(header, **fields), ordered)
    return path


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    said = json.loads(path.read_text(encoding="utf-8"))
    change(said)
    path.write_text(json.dumps(said), encoding="utf-8")


def test_whether_to_repair_is_true_or_false(store: Path) -> None:
    repair: Any = "no"
    (store / "shard-000000.safetensors").write_bytes(b"")
    with pytest.raises(OptionError, match="repair is 'no': use True or False"):
        verify(store, repair=repair)
    assert (store / "shard-000000.safetensors").exists()


def only_problem(folder: Path, file: str, what: str) -> None:
    report = verify(folder)
    assert [problem.file for problem in report.problems] == [file] and what in report.problems[0].what, report
    assert not report.ok and report.problems[0].what in str(report)


def test_a_sound_store_is_ok_and_says_what_was_read(store: Path) -> None:
    report = verify(store)
    shards = list(store.glob("shard-*"))
    size = sum(file.stat().st_size for file in shards)
    assert report.ok and report.is_complete and not report.notes and not report.removed
    assert (report.num_shards, report.num_bytes) == (len(shards), size) and len(shards) > 3
    assert str(report) == f"{store}: {len(shards)} shards, {size / 1000:.1f} kB: every byte is as it was written."


@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"pool": "mean", "dtype": "float8_e4m3fn"}, {"sites": "pooler"}]
)
def test_a_store_of_any_dtype_and_pool_is_ok(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, options: dict[str, Any]
) -> None:
    extract(tiny, texts, tmp_path / "acts", shard_size=SHARD_BYTES, **options)
    assert verify(tmp_path / "acts").ok


def test_a_store_filled_by_a_probe_is_ok(tiny_bert: Any, batch: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with layerprobe.Probe(tiny_bert, "layers.*", to=tmp_path / "acts"):
        tiny_bert(**batch)
        tiny_bert(inputs_embeds=torch.zeros(1, 3, 32))
    assert verify(tmp_path / "acts").ok
    edit_json(tmp_path / "acts" / "store.json", lambda said: said["model"].update(id="other"))
    only_problem(tmp_path / "acts", "store.json", "its fingerprint is ")


def test_every_flipped_bit_of_a_shard_is_named(write_store: Any) -> None:
    folder: Path = write_store(units=((2, 1),), width=4).folder
    path = folder / "shard-000000.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    rng = random.Random(0)
    # one bit of every byte of the header, every bit of its length and of some bytes, and every bit of the data
    flips = [(place, rng.randrange(8)) for place in range(8, 8 + length)]
    flips += [(place, bit) for place in (*range(8), *rng.sample(range(8, 8 + length), 40)) for bit in range(8)]
    flips += [(place, bit) for place in range(8 + length, len(raw)) for bit in range(8)]
    assert verify(folder).ok
    for place, bit in flips:
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :])
        report = verify(folder)
        named = [problem.file for problem in report.problems]
        assert named == ["shard-000000.safetensors"], f"bit {bit} of byte {place}: {report}"
    path.write_bytes(raw)
    assert verify(folder).ok


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda raw: raw[:-9], "The file is cut"),
        (lambda raw: raw + b"0", "its header asks for"),
        (lambda _: b"", "0 bytes cannot hold its header"),
        (lambda raw: raw[:40] + b"?" + raw[41:], "its header is damaged"),
        (lambda raw: raw[:-40] + b"?" + raw[-39:], "are not those that were written"),
    ],
)
def test_a_damaged_file_is_one_line(store: Path, damage: Callable[[bytes], bytes], what: str) -> None:
    path = store / "shard-000002.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    report = verify(store)
    assert [problem.file for problem in report.problems] == [path.name]
    (line,) = [line for line in str(report).splitlines() if line.startswith("shard-")]
    assert what.removeprefix("The file is cut") in line
    assert str(report).splitlines()[-1].startswith(f"Run 'layerprobe verify {store} --repair'")


def test_a_shard_that_cannot_be_read_is_not_called_damaged(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerprobe.store.places import LocalPlace

    real = LocalPlace.read

    def read(place: LocalPlace, file: str, start: int, stop: int) -> bytes:
        if file == "shard-000001.safetensors":
            raise StoreError(f"{place.label(file)}: cannot be read (Input/output error).")
        return real(place, file, start, stop)

    monkeypatch.setattr(LocalPlace, "read", read)
    report = verify(store, repair=True)
    assert report.problems == (("shard-000001.safetensors", "cannot be read (Input/output error)"),)
    assert not report.removed and (store / "index.json").exists()


@pytest.mark.parametrize(
    ("change", "fields", "what"),
    [
        (lambda t: t["example"].add_(1), {}, "its ordinals are not a run of"),
        (lambda t: t["offsets"][1].add_(1000), {}, "its offsets do not rise"),
        (lambda t: t["input_ids"][0].fill_(5000), {}, "has ids from 0 to 5000; the tokenizer has 0 to"),
        (lambda t: t["input_ids"][0].fill_(-1), {}, "has ids from -1"),
        (lambda t: t["record_offsets"][1].fill_(10**6), {}, "its record_offsets do not rise"),
        (lambda t: t.pop("records"), {}, "records"),
        (lambda t: t.pop("layers.1"), {}, "'layers.1' is nothing; store.json asks for torch.float32"),
        (lambda t: t.update({"layers.1": t["layers.1"].half()}), {}, "'layers.1' is torch.float16"),
        (lambda t: t.update({"layers.2": t["layers.1"]}), {}, "store.json does not know 'layers.2'"),
        (lambda _: None, {"nonfinite": {"layers.7": 3}}, "store.json does not know 'layers.7'"),
        (lambda _: None, {"fingerprint": "1" * 32}, "belongs to another run"),
    ],
)
def test_a_shard_with_right_checksums_and_wrong_contents_is_named(
    store: Path, change: Callable[[Any], Any], fields: dict[str, Any], what: str
) -> None:
    path = rewrite(store, 1, change, **fields)
    report = verify(store)
    assert [problem.file for problem in report.problems] == [path.name], report
    assert what in report.problems[0].what


def test_examples_that_are_there_twice_or_left_out_are_named(write_store: Any) -> None:
    for shift, what in ((-1, "begins at example 2, shard-000000"), (1, "begins at example 4, shard-000000")):
        folder: Path = write_store(name=f"store{shift}").folder
        header = read_header(folder / "shard-000001.safetensors")
        first = header.first_example + shift
        rewrite(folder, 1, lambda tensors, shift=shift: tensors["example"].add_(shift), first_example=first)
        (problem,) = [problem for problem in verify(folder).problems if problem.file.startswith("shard-")]
        assert problem.file == "shard-000001.safetensors" and what in problem.what


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda said: said.update(examples=said["examples"] + 1), "'examples' is 13, of the shards 12"),
        (lambda said: said.update(tokens=0), "'tokens' is 0, of the shards"),
        (lambda said: said.update(truncated=7), "'truncated' is 7, of the shards 1"),
        (lambda said: said.update(nonfinite={"layers.1": 1}), "'nonfinite' is {'layers.1': 1}, of the shards {}"),
        (lambda said: said["shards"].pop(), "does not name shard-"),
        (lambda said: said["shards"][1].update(tokens=1), "the shard says"),
        (lambda said: said["shards"].append(said["shards"][0]), "it names a shard twice"),
        (lambda said: said.pop("shards"), "is damaged (KeyError('shards'))"),
    ],
)
def test_an_index_that_is_not_that_of_the_shards_is_named(
    store: Path, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    edit_json(store / "index.json", change)
    only_problem(store, "index.json", what)
    assert verify(store, repair=True).removed == ("index.json",)


def test_a_lost_shard_is_named_first_and_status_does_not_say_complete(store: Path) -> None:
    (store / "shard-000001.safetensors").unlink()
    only_problem(store, "shard-000001.safetensors", "is not there; index.json names it")
    (store / "shard-000000.safetensors").write_bytes(b"cut")
    problems = verify(store).problems
    assert [problem.file for problem in problems] == ["shard-000001.safetensors", "shard-000000.safetensors"]
    found = read_status(store)
    assert found.state == "damaged" and found.num_units is not None and found.num_units_done == found.num_units - 1
    assert found.reason == "1 shard of the index not there, shard-000001.safetensors the first"
    assert found.num_examples == 12 and found.num_examples_done < 12


def test_files_of_a_run_under_way_are_not_called_leftovers(store: Path) -> None:
    (store / "index.json").unlink()
    (store / "shard-000003.safetensors").rename(store / "shard-000003.safetensors.tmp")
    assert any("left over" in note for note in verify(store).notes)
    with StoreLock(store):
        report = verify(store)
    assert report.ok and not any("left over" in note for note in report.notes) and not report.advice
    assert report.notes[0] == f"1 of {len(list(store.glob('shard-*')))} shards not there yet"
    assert report.notes[1].startswith(f"a run is writing (process {os.getpid()} on ")


def flip_every_bit(path: Path) -> Iterator[bytes]:
    """Write a file anew with each of its bits flipped, one at a time, and at last as it was."""
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        yield bytes(flipped)
    path.write_bytes(whole)


@pytest.mark.slow
def test_every_flipped_bit_of_store_json_is_named(tiny: LoadedModel, tmp_path: Path) -> None:
    with layerprobe.Probe(tiny.model, "pooler", to=tmp_path / "acts"):
        tiny.model(torch.tensor([[1, 2, 3]]))
    for _ in flip_every_bit(tmp_path / "acts" / "store.json"):
        # whatever else follows from what it says then
        assert "store.json" in [problem.file for problem in verify(tmp_path / "acts").problems]
    assert verify(tmp_path / "acts").ok


def test_every_flipped_bit_of_index_json_is_named_or_changes_nothing_that_is_read(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    with layerprobe.Probe(tiny.model, "pooler", to=tmp_path / "acts"):
        tiny.model(torch.tensor([[1, 2, 3]]))
    path = tmp_path / "acts" / "index.json"
    said = json.loads(path.read_text())
    del said["store_checksum"]
    unseen = 0
    for flipped in flip_every_bit(path):
        if verify(tmp_path / "acts").ok:
            unseen += 1
            assert said.items() <= json.loads(flipped).items()
    # only those of the name of the key that makes store.json sure, which is itself as it was
    assert unseen <= 8 * len("store_checksum") and verify(tmp_path / "acts").ok


def test_an_index_of_an_older_version_is_no_problem(store: Path) -> None:
    edit_json(store / "index.json", lambda said: said.pop("store_checksum"))
    assert verify(store).ok and len(layerprobe.open(store)) == 12


def test_a_changed_store_json_is_not_repaired_by_what_it_says(store: Path) -> None:
    edit_json(store / "store.json", lambda said: said["model"].update(id="another/model"))
    only_problem(store, "store.json", "one of the two has changed")
    (store / "shard-000000.safetensors").write_bytes(b"cut")
    report = verify(store, repair=True)
    assert not report.removed and (store / "index.json").exists()
    assert report.advice.startswith("store.json cannot be made again")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda said: said.update(pool="mean"), "its fingerprint is "),
        (lambda said: said["plan"].update(max_length=63), "that of what it says is "),
        (lambda said: said["sites"]["layers.1"].update(width=31), "its fingerprint is "),
        (lambda said: said["model"].update(weights_hash="0"), "its fingerprint is "),
        (lambda said: said.pop("sites"), "lacks 'sites'"),
        (lambda said: said.update(format=2), "format 2; this version reads format 1"),
        (lambda said: said.update(fingerprint=3), "its fingerprint is 3"),
        (lambda said: said.update(plan={}) or said.pop("model"), "lacks 'model'"),
    ],
)
def test_a_store_json_that_is_not_what_the_run_wrote_is_named(
    store: Path, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    edit_json(store / "store.json", change)
    only_problem(store, "store.json", what)
    report = verify(store, repair=True)
    assert not report.removed and report.advice.startswith("store.json cannot be made again: copy it from elsewhere")


def test_a_tokenizer_that_is_damaged_or_another_is_named_and_made_again(
    tiny: LoadedModel, texts: list[str], store: Path
) -> None:
    before = contents(store)
    path = store / "tokenizer" / "tokenizer.json"
    for damage, what in (
        (lambda: path.write_text("{"), "is not a tokenizer"),
        (lambda: path.unlink(), "is not there"),
        (lambda: shutil.rmtree(store / "tokenizer"), "is not there"),
        (lambda: path.write_text(path.read_text().replace('"fox"', '"cat"')), "store.json says"),
    ):
        damage()
        only_problem(store, "tokenizer/tokenizer.json", what)
        assert verify(store, repair=True).removed[0] == "index.json"
        extract(tiny, texts, store, sites=["layers.1", "layers.0.attention.weights"], shard_size=SHARD_BYTES)
        assert contents(store) == before


def test_repair_removes_what_is_damaged_and_the_run_makes_it_again_byte_for_byte(
    tiny: LoadedModel, texts: list[str], store: Path
) -> None:
    before = contents(store)
    cut, flipped = store / "shard-000001.safetensors", store / "shard-000003.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    raw = bytearray(flipped.read_bytes())
    raw[-1] ^= 4
    flipped.write_bytes(raw)
    (store / "shard-000005.safetensors.tmp").write_bytes(b"half")
    report = verify(store, repair=True)
    assert report.removed == ("index.json", cut.name, flipped.name)
    assert [problem.file for problem in report.problems] == [cut.name, flipped.name] and not report.ok
    assert report.notes == ("shard-000005.safetensors.tmp is left over; the next run removes it",)
    assert f"Run 'layerprobe extract {tiny.name} INPUT -o {store}'" in str(report)
    left = verify(store)
    assert left.ok and not left.is_complete and "2 of " in left.notes[0] and "not there yet" in left.notes[0]
    extract(tiny, texts, store, sites=["layers.1", "layers.0.attention.weights"], shard_size=SHARD_BYTES)
    assert contents(store) == before
    again = verify(store, repair=True)
    assert again.ok and not again.removed and contents(store) == before


def test_repair_removes_what_stands_in_the_place_of_a_shard(store: Path) -> None:
    (store / "shard-000900.safetensors").mkdir()
    (store / "shard-000901.safetensors").symlink_to("nowhere")
    report = verify(store, repair=True)
    assert report.removed == ("index.json", "shard-000900.safetensors", "shard-000901.safetensors")
    assert not (store / "shard-000900.safetensors").exists()
    assert not (store / "shard-000901.safetensors").is_symlink()


def test_a_shard_beyond_the_plan_is_named(store: Path) -> None:
    last = max(store.glob("shard-*"))
    header = read_header(last)
    (store / "index.json").unlink()
    info = ShardInfo(header.file, header.first_example, header.num_examples, header.num_tokens)
    shard = MappedShard(last, info, header.fingerprint, True)
    first = header.first_example + header.num_examples
    tensors = [(name, shard.tensor(name).clone()) for name in header.tensors]
    tensors[[name for name, _ in tensors].index("example")][1].add_(header.num_examples)
    commit_shard(store, replace(header, unit=header.unit + 1, first_example=first), tensors)
    only_problem(
        store, f"shard-{header.unit + 1:06d}.safetensors", f"is beyond the {header.unit + 1} shards of store.json"
    )


def test_repair_leaves_a_store_that_a_probe_has_filled(tiny_bert: Any, batch: Any, tmp_path: Path) -> None:
    with layerprobe.Probe(tiny_bert, "layers.0", to=tmp_path / "acts"):
        tiny_bert(**batch)
    (path,) = (tmp_path / "acts").glob("shard-*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        StoreError, match=r"shard-000000\.safetensors is damaged, and a Probe filled this store: .* Copy"
    ):
        verify(tmp_path / "acts", repair=True)
    assert path.exists() and (tmp_path / "acts" / "index.json").exists()
    assert verify(tmp_path / "acts").advice == "Copy what is damaged from elsewhere, or extract anew."


def test_repair_waits_for_no_run_but_refuses(store: Path) -> None:
    with StoreLock(store), pytest.raises(LockError, match="another run is writing there"):
        verify(store, repair=True)
    with StoreLock(store):
        assert verify(store).ok


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is not a store: it has no store\.json"):
        verify(tmp_path)


def test_a_bar_in_bytes_is_shown_when_asked(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(store)
    assert capsys.readouterr() == ("", "")
    verify(store, progress=True)
    assert "B/s" in capsys.readouterr().err


def test_memory_does_not_grow_with_a_shard(write_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerprobe.store import checks

    asked: list[int] = []
    written = write_store(units=((40, 40),), width=64)
    monkeypatch.setattr(checks, "_PIECE_BYTES", 1024)
    real = checks._read_pieces

    def read(*arguments: Any) -> Any:
        for piece in real(*arguments):
            asked.append(len(piece))
            yield piece

    monkeypatch.setattr(checks, "_read_pieces", read)
    assert verify(written.folder).ok
    path = written.folder / "shard-000000.safetensors"
    assert max(asked) == 1024 and sum(asked) == sum(
        entry.stop - entry.start for entry in read_header(path).tensors.values()
    )


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"keep": 0.5}, "says that it keeps all tokens, 0.5 of them"),
        ({"tokens": "first"}, "is of token 1 of example"),
        ({"tokens": "nonspecial"}, "says that it keeps nonspecial tokens"),
    ],
)
def test_a_row_that_was_not_to_be_kept_is_named(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, options: dict[str, Any], what: str
) -> None:
    folder = tmp_path / "acts"
    extract(tiny, texts, folder, sites="layers.1", **options)
    assert verify(folder).ok

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if options.get("tokens") == "nonspecial":
            tensors["input_ids"][0] = tiny.tokenizer.cls_token_id
        else:
            tensors["positions"] += 1

    path = rewrite(folder, 0, change)
    (folder / "index.json").unlink()
    only_problem(folder, path.name, what)


def test_a_thinned_shard_without_positions_is_named(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    extract(tiny, texts, folder, sites="layers.1", keep=0.5)
    path = rewrite(folder, 0, lambda tensors: tensors.pop("positions"))
    only_problem(folder, path.name, "has no positions; store.json says that it keeps all tokens, 0.5 of them")
