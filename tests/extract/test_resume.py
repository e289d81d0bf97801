"""Any part of a run may be lost; the same command makes exactly that part again."""

import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import layerprobe
from layerprobe.errors import FormatError, InputError, NonFiniteError, PlanError, StoreError
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.extract.resume import check_folder
from layerprobe.extract.run import run_extraction
from layerprobe.models import LoadedModel
from layerprobe.store import writer as writing
from layerprobe.store.headers import ShardHeader
from layerprobe.store.paths import NamedPath
from layerprobe.store.writer import commit_shard

extract: Any = layerprobe.extract
SHARD_BYTES = 10_000


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def whole(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> Path:
    """An undisturbed run of several shards."""
    store = extract(tiny, texts, tmp_path / "whole", shard_size=SHARD_BYTES)
    assert store.num_shards >= 5
    return tmp_path / "whole"


def resume(tiny: LoadedModel, texts: list[str], folder: Path) -> dict[str, bytes]:
    extract(tiny, texts, folder, shard_size=SHARD_BYTES)
    return contents(folder)


def test_running_again_changes_no_byte(tiny: LoadedModel, texts: list[str], whole: Path) -> None:
    before = contents(whole)
    shards = {path: path.stat().st_mtime_ns for path in whole.glob("shard-*")}
    assert resume(tiny, texts, whole) == before
    assert {path: path.stat().st_mtime_ns for path in whole.glob("shard-*")} == shards


def test_any_lost_shard_is_made_again_byte_for_byte(tiny: LoadedModel, texts: list[str], whole: Path) -> None:
    before = contents(whole)
    for path in sorted(whole.glob("shard-*")):
        path.unlink()
        assert resume(tiny, texts, whole) == before
    for path in sorted(whole.glob("shard-*"))[::2]:
        path.unlink()
    (whole / "index.json").unlink()
    (whole / "shard-000001.safetensors.tmp").write_bytes(b"half")
    shutil.rmtree(whole / "tokenizer")
    plan = plan_extraction(tiny, texts, whole, ExtractOptions(shard_bytes=SHARD_BYTES))
    assert f"of {plan.num_units} already there" in str(plan)
    assert resume(tiny, texts, whole) == before


def test_several_writers_make_the_same_bytes_and_go_on_where_one_was(
    tiny: LoadedModel, texts: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(whole)
    meeting = threading.Barrier(3, timeout=60)

    def meet(place: Any, header: ShardHeader, *given: Any) -> int:
        if header.unit < 3:
            meeting.wait()  # three are under way at once, or none ends
        return commit_shard(place, header, *given)

    with monkeypatch.context() as patched:
        patched.setattr(writing, "commit_shard", meet)
        extract(tiny, texts, tmp_path / "several", shard_size=SHARD_BYTES, writers=3)
    assert contents(tmp_path / "several") == before
    for path in sorted(whole.glob("shard-*"))[1:]:
        path.unlink()
    (whole / "index.json").unlink()
    extract(tiny, texts, whole, shard_size=SHARD_BYTES, writers=3)
    assert contents(whole) == before


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lost=st.sets(st.integers(0, 40)), loses_index=st.booleans())
def test_any_subset_of_shards_is_made_again_byte_for_byte(
    tiny: LoadedModel, texts: list[str], whole: Path, lost: set[int], loses_index: bool
) -> None:
    # what one example leaves is what the next one begins with
    before = contents(whole)
    paths = sorted(whole.glob("shard-*"))
    for number in lost:
        paths[number % len(paths)].unlink(missing_ok=True)
    if loses_index:
        (whole / "index.json").unlink()
    assert resume(tiny, texts, whole) == before


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "longer"])
def test_a_damaged_shard_is_made_again_byte_for_byte(
    tiny: LoadedModel, texts: list[str], whole: Path, damage: str
) -> None:
    before = contents(whole)
    path = whole / "shard-000002.safetensors"
    raw = path.read_bytes()
    path.write_bytes(
        {"cut": raw[:-9], "header": raw[:30] + b"?" + raw[31:], "empty": b"", "longer": raw + b"0"}[damage]
    )
    plan = plan_extraction(tiny, texts, whole, ExtractOptions(shard_bytes=SHARD_BYTES))
    assert "damaged   1 shard to be made again" in str(plan)
    assert resume(tiny, texts, whole) == before


def test_a_run_stopped_before_its_first_shard_is_gone_on_with(
    tiny: LoadedModel, texts: list[str], whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / "store.json.tmp").write_text('{"form')
    before = contents(whole)
    assert resume(tiny, texts, folder) == before
    shutil.rmtree(folder)
    folder.mkdir()
    shutil.copy(whole / "store.json", folder)
    (folder / "tokenizer.tmp").mkdir()
    assert resume(tiny, texts, folder) == before


def test_a_run_stopped_by_its_policy_is_gone_on_with_under_another(
    tiny: LoadedModel, texts: list[str], make_bert: Any, tmp_path: Path
) -> None:
    model = make_bert(vocab_size=len(tiny.tokenizer))
    with torch.no_grad():
        # only texts with this token overflow
        model.embeddings.word_embeddings.weight[tiny.tokenizer.convert_tokens_to_ids("lazy")] = float("nan")
    options: dict[str, Any] = {"tokenizer": tiny.tokenizer, "shard_size": SHARD_BYTES}
    with pytest.raises(NonFiniteError, match="nonfinite='warn'"):
        extract(model, texts, tmp_path / "acts", nonfinite="error", **options)
    assert not (tmp_path / "acts" / "index.json").exists()
    assert extract(model, texts, tmp_path / "acts", **options).index["nonfinite"]
    extract(model, texts, tmp_path / "at-once", **options)
    assert contents(tmp_path / "acts") == contents(tmp_path / "at-once")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype: 'float32' there, 'float16' here"),
        ({"pool": "mean"}, "pool: None there, 'mean' here"),
        ({"sites": ["layers.0"]}, "sites: 'embeddings layers.0 layers.1 layers.2' there, 'layers.0' here"),
        ({"max_length": 20}, r"plan\.max_length: 64 there, 20 here"),
        ({"shard_size": 99_000}, r"\(plan\.shard_bytes: 10000 there, 99000 here\)\."),
    ],
)
def test_another_plan_is_refused_with_the_fields_that_differ(
    tiny: LoadedModel, texts: list[str], whole: Path, change: dict[str, Any], message: str
) -> None:
    before = contents(whole)
    with pytest.raises(PlanError, match=rf"whole: holds another run .*{message}.* pass overwrite=True \(--overwrite\)"):
        extract(tiny, texts, whole, **{"shard_size": SHARD_BYTES, **change})
    assert contents(whole) == before


def test_another_input_or_model_is_refused(tiny: LoadedModel, texts: list[str], whole: Path, make_bert: Any) -> None:
    with pytest.raises(PlanError, match=r"input\.examples: 12 there, 11 here; input\.hash"):
        extract(tiny, texts[1:], whole, shard_size=SHARD_BYTES)
    other = make_bert(vocab_size=len(tiny.tokenizer), num_hidden_layers=2)
    with pytest.raises(PlanError, match=r"model\.config_hash: .*model\.weights_hash: .*sites: "):
        extract(other, texts, whole, tokenizer=tiny.tokenizer, shard_size=SHARD_BYTES)


def test_what_was_put_on_the_model_makes_another_run(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    """Edits and hooks change rows, and so does the way it attends."""
    folder = tmp_path / "acts"

    def run(scale: float, **options: Any) -> Any:
        with layerprobe.edit(tiny.model, {"layers.0": layerprobe.scale(scale)}):
            return extract(tiny, texts, folder, **options)

    plain = extract(tiny, texts, folder, padding_free=False)
    with pytest.raises(PlanError, match=r"plan\.changes: None there, \['encoder\.layer\.0: lp\.edit#"):
        run(0.5)
    row = plain["layers.1"][0].clone()
    edited = run(0.5, overwrite=True)
    before = contents(folder)
    assert not torch.equal(row, edited["layers.1"][0])
    assert run(0.5).fingerprint == edited.fingerprint and contents(folder) == before
    with pytest.raises(PlanError, match=r"plan\.changes"):
        run(0.25)
    with pytest.raises(
        PlanError, match=r"was made with other edits, hooks or modules on the model \(.*lp\.edit#.*\[\] here"
    ):
        layerprobe.audit(folder, tiny)
    with layerprobe.edit(tiny.model, {"layers.0": layerprobe.scale(0.5)}):
        assert layerprobe.audit(folder, tiny).ok
    model: Any = copy.deepcopy(tiny.model)
    model.set_attn_implementation("eager")
    with pytest.raises(PlanError, match=r"plan\.attention: None there, 'eager' here; plan\.changes"):
        extract(model, texts, folder, tokenizer=tiny.tokenizer)


def test_a_model_in_training_is_planned_in_eval_mode(make_bert: Any, tiny: LoadedModel, tmp_path: Path) -> None:
    model = make_bert().train()
    state = torch.random.get_rng_state()
    store = extract(model, ["the fox"], tmp_path / "acts", tokenizer=tiny.tokenizer)
    assert torch.equal(torch.random.get_rng_state(), state) and model.training and store.is_complete


def test_overwrite_replaces_a_run_with_nothing_of_it_left(
    tiny: LoadedModel, texts: list[str], whole: Path, tmp_path: Path
) -> None:
    extract(tiny, texts[:4], whole, overwrite=True, dtype="float16")
    extract(tiny, texts[:4], tmp_path / "new", dtype="float16")
    assert contents(whole) == contents(tmp_path / "new")
    (whole / "store.json").write_text("damaged")
    with pytest.raises(FormatError, match=r"store\.json: is not the JSON of a store"):
        extract(tiny, texts[:4], whole, dtype="float16")
    extract(tiny, texts[:4], whole, overwrite=True, dtype="float16")
    assert contents(whole) == contents(tmp_path / "new")


def test_overwrite_goes_on_with_the_very_same_run(tiny: LoadedModel, texts: list[str], whole: Path) -> None:
    before = contents(whole)
    kept = whole / "shard-000000.safetensors"
    (whole / "shard-000001.safetensors").unlink()
    written_at = kept.stat().st_mtime_ns
    extract(tiny, texts, whole, shard_size=SHARD_BYTES, overwrite=True)
    assert contents(whole) == before and kept.stat().st_mtime_ns == written_at
    # what says something else of the run is replaced with it
    said = json.loads((whole / "store.json").read_text())
    said["model"]["id"] = "another/model"
    (whole / "store.json").write_text(json.dumps(said))
    extract(tiny, texts, whole, shard_size=SHARD_BYTES, overwrite=True)
    assert contents(whole) == before and kept.stat().st_mtime_ns != written_at


@pytest.mark.parametrize("changed", [{"layerprobe": "0.0.1"}, {"revision": "0" * 40}])
def test_overwrite_goes_on_with_a_run_of_another_version_or_revision(
    tiny: LoadedModel, texts: list[str], whole: Path, changed: dict[str, str]
) -> None:
    """Neither changes a byte of the shards: the weights are compared themselves."""
    said = json.loads((whole / "store.json").read_text())
    (said["model"] if "revision" in changed else said).update(changed)
    (whole / "store.json").write_text(json.dumps(said))
    (whole / "index.json").unlink()
    (whole / "shard-000001.safetensors").unlink()
    shards = {path: path.stat().st_mtime_ns for path in whole.glob("shard-*")}
    extract(tiny, texts, whole, shard_size=SHARD_BYTES, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in shards} == shards and layerprobe.open(whole).is_complete
    assert json.loads((whole / "store.json").read_text()) == said


def test_another_function_as_pool_is_refused_and_the_same_is_gone_on_with(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    def pool_first(rows: torch.Tensor) -> torch.Tensor:
        return rows[0]

    first, last = (lambda rows: rows[0]), (lambda rows: rows[-1])
    extract(tiny, texts, tmp_path / "acts", pool=first)
    before = contents(tmp_path / "acts")
    for other in (last, pool_first):
        with pytest.raises(PlanError, match=r"pool: '.*' there, '.*' here"):
            extract(tiny, texts, tmp_path / "acts", pool=other)
    assert contents(tmp_path / "acts") == before
    extract(tiny, texts, tmp_path / "acts", pool=first)
    assert contents(tmp_path / "acts") == before


def test_shards_written_under_another_policy_are_refused_if_they_count_an_overflow(
    tiny: LoadedModel, texts: list[str], make_bert: Any, tmp_path: Path
) -> None:
    model = make_bert(vocab_size=len(tiny.tokenizer))
    with torch.no_grad():
        model.encoder.layer[1].output.LayerNorm.weight.fill_(1e6)
    options: dict[str, Any] = {"tokenizer": tiny.tokenizer, "sites": "layers.1", "dtype": "float16"}
    assert extract(model, texts, tmp_path / "acts", **options).index["nonfinite"]["layers.1"] > 0
    before = contents(tmp_path / "acts")
    with pytest.raises(NonFiniteError, match=r"shard-000000.*: was written with values that .*: \d+ at 'layers\.1'\."):
        extract(model, texts, tmp_path / "acts", nonfinite="error", **options)
    assert contents(tmp_path / "acts") == before
    extract(model, texts, tmp_path / "acts", nonfinite="error", overwrite=True, **(options | {"dtype": "float32"}))


@pytest.mark.parametrize("change", ["other words", "more", "fewer", "gone"])
def test_an_input_that_changes_under_way_makes_no_whole_store(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, change: str
) -> None:
    source, folder = tmp_path / "a.txt", tmp_path / "acts"
    source.write_text("\n".join(texts))
    plan = plan_extraction(tiny, source, folder, ExtractOptions(shard_bytes=SHARD_BYTES))
    changed = {"other words": [*texts[:-1], "dog"], "more": [*texts, "dog"], "fewer": texts[:-1]}
    if change == "gone":
        source.unlink()
    else:
        source.write_text("\n".join(changed[change]))
    with pytest.raises(InputError, match=r"a\.txt: (changed while the run was under way|is gone\. Put it back)"):
        run_extraction(plan)
    assert not (folder / "index.json").exists()
    # what was written before the change shows is of the input as it was, so a run killed here could leave nothing else
    held = layerprobe.open(folder) if (folder / "store.json").exists() else []
    assert [example.text for example in held] == texts[: len(held)] and (len(held) > 0) == (change != "gone")
    # once it is as it was, the run goes on with that
    source.write_text("\n".join(texts))
    plan = plan_extraction(tiny, source, folder, ExtractOptions(shard_bytes=SHARD_BYTES))
    assert sum(header.num_examples for header in plan.done.values()) == len(held)
    run_extraction(plan)
    assert [example.text for example in layerprobe.open(folder)] == texts


def test_an_input_of_other_words_is_noticed_before_they_are_written(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    source, folder = tmp_path / "a.txt", tmp_path / "acts"
    source.write_text("\n".join(texts))
    plan = plan_extraction(tiny, source, folder, ExtractOptions(shard_bytes=SHARD_BYTES))
    source.write_text("\n".join(["dog", *texts[1:]]))
    with pytest.raises(InputError, match="changed while the run was under way"):
        run_extraction(plan)
    assert not list(folder.glob("shard-*"))


def test_a_file_of_the_user_in_a_store_survives(tiny: LoadedModel, texts: list[str], whole: Path) -> None:
    (whole / "notes.tmp").write_text("mine")
    (whole / "drafts.tmp").mkdir()
    for leftover in ("shard-000001.safetensors.tmp", "store.json.tmp", "index.json.tmp"):
        (whole / leftover).write_bytes(b"half")
    for overwrite in (False, True):
        extract(tiny, texts, whole, shard_size=SHARD_BYTES, overwrite=overwrite)
        assert (whole / "notes.tmp").read_text() == "mine" and (whole / "drafts.tmp").is_dir()
        assert sorted(file.name for file in whole.glob("*.tmp")) == ["drafts.tmp", "notes.tmp"]


def test_overwrite_spares_a_folder_that_is_no_store(tiny: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"is not a store: it holds 'thesis\.tex'"):
        extract(tiny, ["a"], tmp_path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root may write anywhere")
    with pytest.raises(StoreError, match="cannot be written"):
        check_folder(NamedPath.of(tmp_path / "acts"))


def start_extraction(model: Path, source: Path, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "layerprobe", "extract", str(model), str(source), "-o", str(folder)]
    return subprocess.Popen(
        [*command, "--shard-size", "60kB"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_for_shards(folder: Path, count: int, process: "subprocess.Popen[str]") -> None:
    while len(list(folder.glob("shard-*.safetensors"))) < count:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
            raise AssertionError(process.communicate())


@pytest.mark.slow
def test_an_interrupted_command_leaves_nothing_half_and_completes_when_run_again(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    """By Ctrl-C; `tests/test_kills.py` kills one."""
    lines = ["the quick brown fox jumps over the lazy dog . " * (1 + line % 5) for line in range(250)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    folder = tmp_path / "acts"
    process = start_extraction(tiny_model_folder, tmp_path / "a.txt", folder)
    wait_for_shards(folder, 4, process)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate()
    assert process.returncode == 130, said
    assert not (folder / "index.json").exists()
    part = layerprobe.open(folder)
    assert not part.is_complete and part.num_shards >= 4
    assert said.strip().splitlines()[-1].startswith(f"stopped: whole shards are kept in {folder}. Run the same")
    assert "Traceback" not in said
    assert not list(folder.glob("*.tmp"))
    process = start_extraction(tiny_model_folder, tmp_path / "a.txt", folder)
    printed, said = process.communicate()
    assert process.returncode == 0, said
    assert "already there" in printed
    assert layerprobe.open(folder).is_complete
    extract(str(tiny_model_folder), tmp_path / "a.txt", tmp_path / "undisturbed", shard_size=60_000, device="cpu")
    assert contents(folder) == contents(tmp_path / "undisturbed")


def test_store_json_says_what_was_run(tiny: LoadedModel, whole: Path) -> None:
    said = json.loads((whole / "store.json").read_text())
    assert said["format"] == 1 and said["layerprobe"] == layerprobe.__version__
    assert said["model"]["id"] == tiny.name and said["model"]["class"] == "BertModel"
    assert list(said["sites"]) == ["embeddings", "layers.0", "layers.1", "layers.2"]
    assert said["plan"]["max_length"] == 64 and said["pool"] is None


def test_a_complete_store_stays_complete_while_nothing_is_done_to_it(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    layerprobe.extract(tiny, texts, tmp_path / "acts", shard_size=10_000)
    stop = threading.Event()
    stop.set()
    run_extraction(plan_extraction(tiny, texts, tmp_path / "acts", ExtractOptions(shard_bytes=10_000)), stop=stop)
    assert layerprobe.open(tmp_path / "acts").is_complete


def test_a_run_whose_store_json_was_lost_is_taken_up_by_its_shards(
    tiny: LoadedModel, texts: list[str], whole: Path
) -> None:
    before = contents(whole)
    shards = {path: path.stat().st_mtime_ns for path in whole.glob("shard-*")}
    (whole / "store.json").unlink()
    for overwrite in (False, True):
        plan = plan_extraction(tiny, texts, whole, ExtractOptions(shard_bytes=SHARD_BYTES), overwrite=overwrite)
        assert len(plan.done) == plan.num_units == len(shards) and not plan.overwrite
    assert resume(tiny, texts, whole) == before
    assert {path: path.stat().st_mtime_ns for path in whole.glob("shard-*")} == shards
    for name in ("store.json", "index.json", "shard-000001.safetensors"):
        (whole / name).unlink()
    assert resume(tiny, texts, whole) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_shards_without_a_store_json_that_may_be_of_another_run_are_not_touched(
    tiny: LoadedModel, texts: list[str], whole: Path, overwrite: bool
) -> None:
    (whole / "store.json").unlink()
    before = contents(whole)
    message = r"has no store\.json, and shard-00000\d\.safetensors is of another run .* Copy store\.json back, "
    with pytest.raises(PlanError, match=message):
        extract(tiny, texts[1:], whole, shard_size=SHARD_BYTES, overwrite=overwrite)
    assert contents(whole) == before
    (whole / "shard-000002.safetensors").write_bytes(b"mine")
    with pytest.raises(PlanError, match=r"and shard-000002\.safetensors is damaged or no shard"):
        extract(tiny, texts, whole, shard_size=SHARD_BYTES, overwrite=overwrite)
    assert (whole / "shard-000002.safetensors").read_bytes() == b"mine"


def test_a_folder_of_the_user_beside_shards_is_not_taken_for_a_store(
    tiny: LoadedModel, texts: list[str], whole: Path
) -> None:
    (whole / "store.json").unlink()
    (whole / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"is not a store: it holds 'thesis\.tex'"):
        extract(tiny, texts, whole, shard_size=SHARD_BYTES)
