"""A plan says what a run will do and refuses what cannot be done, before anything is written."""

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CanineTokenizer

from layerprobe.errors import (
    ArchitectureError,
    InputError,
    ModelError,
    OptionError,
    PlanError,
    SiteError,
    SpaceError,
    StoreError,
)
from layerprobe.extract import cutting, resume
from layerprobe.extract.cutting import Unit, UnitRule, survey_input
from layerprobe.extract.engine import UnitEngine
from layerprobe.extract.inputs import TextSource
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import Plan, plan_extraction
from layerprobe.extract.records import Record
from layerprobe.extract.reports import RunReport
from layerprobe.extract.resume import size_units
from layerprobe.extract.run import run_extraction
from layerprobe.extract.space import RoomKeeper
from layerprobe.models import LoadedModel
from layerprobe.store.guard import MOST_SHARDS
from layerprobe.store.reader import open_store


def plan(tiny: LoadedModel, texts: Any, folder: Path, **options: Any) -> Plan:
    return plan_extraction(tiny, texts, folder, ExtractOptions(**options))


def test_the_plan_prints_what_it_will_do_and_writes_nothing(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    made = plan(tiny, texts, tmp_path / "acts", sites=["layers.*"], dtype="float16", shard_bytes=10_000)
    num_tokens = sum(len(tiny.tokenizer(text, truncation=True)["input_ids"]) for text in texts)
    said = str(made)
    assert f"the list of texts: 12 examples, {num_tokens} tokens" in said
    assert "3 (layers.0, layers.1, layers.2), a row per real token, stored as float16" in said
    assert f"{tmp_path / 'acts'}: {made.num_units} shards, " in said and said.rstrip().endswith("free")
    assert not list(tmp_path.iterdir())


def test_a_pool_is_said_to_count_special_tokens(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    said = str(plan(tiny, texts, tmp_path / "acts", pool="mean"))
    assert "pooled by mean over all real tokens, special ones included" in said


@pytest.mark.parametrize("options", [{}, {"pool": "mean"}, {"dtype": "int8"}, {"sites": ["layers.0", "pooler"]}])
def test_the_bytes_foretold_are_the_bytes_written(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, options: dict[str, Any]
) -> None:
    made = plan(tiny, texts * 20, tmp_path / "acts", **options)
    run_extraction(made)
    written = sum(file.stat().st_size for file in (tmp_path / "acts").glob("shard-*"))
    assert made.num_bytes == pytest.approx(written, rel=0.1)  # headers and the JSON of records are only estimated


RECORDS = st.lists(st.text(max_size=40), max_size=50)


@given(texts=RECORDS, shard_bytes=st.integers(1, 20_000))
def test_units_are_runs_of_the_input_that_fit_a_shard(texts: list[str], shard_bytes: int) -> None:
    rule = UnitRule(100, 10, 0, shard_bytes, 64, 3.0)

    def cut() -> Iterator[Unit]:
        return rule.cut(Record(text) for text in texts)

    units = list(cut())
    assert [record.text for unit in units for record in unit.records] == texts
    assert [unit.number for unit in units] == list(range(len(units)))
    first = 0
    for unit in units:
        assert unit.records and unit.first_example == first
        first += len(unit.records)
        # a vector per token and example, an id per token, 24 bytes of places, the text itself
        sizes = [len(record.text.encode()) for record in unit.records]
        size = sum(108 * rule.estimate_tokens(count) + 10 + 24 + count for count in sizes)
        assert size <= shard_bytes or len(unit.records) == 1
    assert [len(unit.records) for unit in cut()] == [len(unit.records) for unit in units]


@given(texts=RECORDS, shard_bytes=st.integers(1, 20_000), most=st.integers(1, 60))
def test_units_hold_no_more_tokens_than_a_bound_and_say_where_it_counts(
    texts: list[str], shard_bytes: int, most: int
) -> None:
    rule = UnitRule(100, 10, 0, shard_bytes, 64, 3.0)
    records = list(map(Record, texts))
    unbound = survey_input(TextSource("texts", lambda: iter(records)), rule)
    bound = replace(rule, unit_tokens=most)
    surveyed = survey_input(TextSource("texts", lambda: iter(records)), bound)
    units = list(bound.cut(iter(records)))
    assert [record for unit in units for record in unit.records] == records
    for unit in units:
        tokens = [rule.estimate_tokens(len(record.text.encode())) for record in unit.records]
        assert sum(tokens) <= most or len(tokens) == 1
    # a run that an older version began, which counted no tokens, is gone on with only where the units are the same
    assert surveyed.is_bound_by_tokens is (surveyed.digests != unbound.digests)
    assert not unbound.is_bound_by_tokens


def test_a_bound_of_tokens_doubles_so_that_any_input_fits_the_shards_that_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cutting, "_UNITS_PER_DOUBLING", 3)
    monkeypatch.setattr(cutting, "_MOST_UNIT_EXAMPLES", 4)
    records = [Record("a")] * 100
    by_texts, by_tokens = UnitRule(0, 1, 0, 10**9, 64, 1.0), UnitRule(0, 1, 0, 10**9, 64, 1.0, unit_tokens=6)
    assert [len(unit.records) for unit in by_texts.cut(iter(records))] == [4, 4, 4, 8, 8, 8, 16, 16, 16, 16]
    assert [len(unit.records) for unit in by_tokens.cut(iter(records))][:9] == [2, 2, 2, 4, 4, 4, 8, 8, 8]
    assert survey_input(TextSource("texts", lambda: iter(records)), by_texts).is_bound_by_tokens
    assert not survey_input(TextSource("texts", lambda: iter(records[:12])), by_texts).is_bound_by_tokens
    # the bounds as they are: the units that are read hold trillions of tokens, of the shortest texts too
    monkeypatch.undo()
    blocks, rest = divmod(MOST_SHARDS, cutting._UNITS_PER_DOUBLING)
    in_blocks = cutting._UNITS_PER_DOUBLING * (2**blocks - 1) + rest * 2**blocks
    assert in_blocks * min(cutting.MOST_UNIT_TOKENS, 20 * cutting._MOST_UNIT_EXAMPLES) > 8 * 10**12


def test_a_pooled_run_of_long_texts_is_cut_by_their_tokens_and_an_older_one_goes_on_as_it_was_begun(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = ["the quick brown fox jumps over the lazy dog " * 8] * 17_000
    made = plan(tiny, long, tmp_path / "new", pool="mean")
    assert made.description["plan"]["unit_tokens"] == 1 << 20
    assert made.num_units == 2 and made.num_tokens > 1 << 20
    acts = tmp_path / "acts"
    with monkeypatch.context() as older:
        older.setattr(resume, "MOST_UNIT_TOKENS", None)
        begun = plan(tiny, long, acts, pool="mean")
    assert begun.num_units == 1 and "unit_tokens" not in begun.description["plan"]
    acts.mkdir()
    (acts / "store.json").write_text(json.dumps({"format": 1, **begun.description}))
    for overwrite in (False, True):
        again = plan_extraction(tiny, long, acts, ExtractOptions(pool="mean"), overwrite=overwrite)
        assert again.num_units == 1 and not again.overwrite and again.is_resumed
        assert again.fingerprint == begun.fingerprint
    # what replaces it is cut as a new one
    other = plan_extraction(tiny, long, acts, ExtractOptions(pool="max"), overwrite=True)
    assert other.num_units == 2 and other.overwrite and not other.is_resumed
    # and one that was begun with a bound keeps that one
    (acts / "store.json").write_text(json.dumps({"format": 1, **made.description}))
    monkeypatch.setattr(resume, "MOST_UNIT_TOKENS", 1 << 22)
    assert plan(tiny, long, acts, pool="mean").num_units == 2


def test_a_plan_whose_units_no_tokens_bound_says_nothing_of_them(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    assert "unit_tokens" not in plan(tiny, texts, tmp_path, shard_bytes=10_000).description["plan"]


@pytest.mark.parametrize(
    ("texts", "num_kept"),
    [
        (["fox " * 15] * 9, 5),
        (["fox " * 75, "a"], 1),
        (["fox " * 99, "a"], 1),
        (["a", "ü" * 150, "a"], 1),
        (["a"] * 9, 9),
    ],
)
def test_a_plan_holds_no_more_of_the_first_texts_than_a_bound(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], num_kept: int
) -> None:
    """They stay for the whole run; texts may be of any length."""
    monkeypatch.setattr(sys.modules[plan_extraction.__module__], "_SAMPLE_BYTES", 300)
    made = plan(tiny, texts, tmp_path / "acts", sites="layers.1", shard_bytes=10_000)
    assert made.first_texts == tuple(texts[:num_kept]) and len(made.first) == num_kept
    assert made.is_exact is (num_kept == len(texts))
    run_extraction(made)
    store = open_store(tmp_path / "acts")
    assert [store.example(ordinal).text for ordinal in range(len(store))] == texts
    ids = [tiny.tokenizer(text, truncation=True)["input_ids"] for text in texts]
    assert [store.example(ordinal).input_ids.tolist() for ordinal in range(len(store))] == ids


def test_the_fingerprint_follows_what_changes_the_bytes_and_nothing_else(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    base = plan(tiny, texts, tmp_path / "acts").fingerprint
    assert plan(tiny, list(texts), tmp_path / "elsewhere", nonfinite="error").fingerprint == base
    others = [{"sites": ["layers.0"]}, {"dtype": "float16"}, {"pool": "cls"}, {"max_length": 9}, {"batch_tokens": 99}]
    found = {plan(tiny, texts, tmp_path / "acts", **options).fingerprint for options in others}
    found.add(plan(tiny, [*texts, "x"], tmp_path / "acts").fingerprint)
    found.add(plan(tiny, [{"text": text, "id": 1} for text in texts], tmp_path / "acts").fingerprint)
    assert len(found | {base}) == len(others) + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float12"}, "no dtype 'float12': use float32, float16"),
        ({"pool": "median"}, "no pool 'median': use mean, max, cls, last"),
        ({"nonfinite": "ignore"}, "no policy 'ignore'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"batch_tokens": -1}, "batch_tokens is -1"),
        ({"shard_bytes": 0}, "shard_size is 0"),
        ({"writers": 0}, "writers is 0"),
    ],
)
def test_an_option_that_does_not_exist_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ExtractOptions(**options)


@pytest.mark.parametrize(("asked", "message"), [(65, "takes at most 64 tokens"), (1, "2 special tokens go around")])
def test_a_length_that_the_model_or_tokenizer_cannot_keep_is_refused(
    tiny: LoadedModel, tmp_path: Path, asked: int, message: str
) -> None:
    with pytest.raises(OptionError, match=f"max_length is {asked}: .*{message}"):
        plan(tiny, ["a"], tmp_path / "acts", max_length=asked)


@pytest.mark.parametrize("texts", [[], [{"text": "a", "x": "\ud800"}], [{"text": "a", "x": {(1, 2): 3}}], ["\ud800"]])
def test_texts_that_cannot_be_kept_are_refused(tiny: LoadedModel, tmp_path: Path, texts: Any) -> None:
    with pytest.raises(InputError, match=r"holds no texts|text 0.*(cannot be kept as JSON|half a character)"):
        plan(tiny, texts, tmp_path / "acts")
    assert not list(tmp_path.iterdir())


def test_half_a_character_behind_the_first_texts_is_refused(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[plan_extraction.__module__], "_SAMPLE_EXAMPLES", 2)
    with pytest.raises(InputError, match="text 3: holds half a character"):
        plan(tiny, ["a", "b", "c", "\ud800", "d"], tmp_path / "acts")


def test_an_unknown_site_is_refused_with_those_there_are(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="layers are 0 to 2"):
        plan(tiny, ["a"], tmp_path / "acts", sites=["layers.3"])


def test_a_model_that_cannot_be_used_is_refused(tiny: LoadedModel, tmp_path: Path, tiny_bert: Any) -> None:
    with pytest.raises(ModelError, match=r"no model '\./nowhere': the folder does not exist"):
        plan_extraction("./nowhere", ["a"], tmp_path / "acts")
    with pytest.raises(ModelError, match=r"CanineTokenizer is not a fast tokenizer: it has no tokenizer\.json"):
        plan_extraction(tiny_bert, ["a"], tmp_path / "acts", tokenizer=CanineTokenizer())
    with pytest.raises(
        ModelError, match=r"does not say which tokenizer it was trained with\. Pass tokenizer=, or what"
    ):
        plan_extraction(tiny_bert, ["a"], tmp_path / "acts")
    with pytest.raises(ArchitectureError, match="Linear is not a Hugging Face model"):
        plan_extraction(torch.nn.Linear(2, 2), ["a"], tmp_path / "acts", tokenizer=tiny.tokenizer)
    with pytest.raises(OptionError, match="device goes with a model's name"):
        plan_extraction(tiny_bert, ["a"], tmp_path / "acts", device="cpu")
    with pytest.raises(OptionError, match="no device 'gpu' here: "):
        plan_extraction(tiny.name, ["a"], tmp_path / "acts", device="gpu")


def test_a_folder_that_cannot_hold_a_store_is_refused_before_the_input_is_read(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo").touch()
    for folder, message in [
        (tmp_path / "notes", "is not a store: it holds 'todo'"),
        (tmp_path / "notes" / "todo", "is a file, not a folder"),
        (tmp_path / "notes" / "todo" / "below" / "acts", "todo is not a folder"),
        (tmp_path / ("x" * 300), "cannot be written .*name too long"),
    ]:
        with pytest.raises(StoreError, match=message):
            plan_extraction("no model", "no input", folder)
    with pytest.raises(OptionError, match=r"ftp://bucket/acts: stores do not lie under ftp://\. Give a local path, or"):
        plan_extraction("no model", "no input", "ftp://bucket/acts")


def test_a_store_larger_than_the_disk_is_refused_with_both_sizes(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plan, "free_bytes", property(lambda _: 1000))
    with pytest.raises(
        SpaceError, match=r"needs .* more, the disk has 1\.0 kB free: [0-9,]+ bytes missing\. Ask for fewer"
    ):
        plan(tiny, ["the quick brown fox"] * 9, tmp_path / "acts")
    assert not list(tmp_path.iterdir())


def test_a_run_of_more_rows_than_are_read_is_refused_by_its_plan(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[plan_extraction.__module__], "MOST_ROWS", 10)
    with pytest.raises(OptionError, match=r"tokens and texts; at most 10 are read. Make several stores"):
        plan(tiny, texts, tmp_path / "acts", pool="mean")


def test_shards_of_pooled_long_texts_are_about_the_size_asked_for(tiny: LoadedModel, tmp_path: Path) -> None:
    made = plan(tiny, ["the quick brown fox " * 100] * 60, tmp_path / "acts", pool="mean", shard_bytes=20_000)
    run_extraction(made)
    sizes = [file.stat().st_size for file in (tmp_path / "acts").glob("shard-*")]
    assert len(sizes) == made.num_units > 1
    assert max(sizes) < 20_000 * 1.2 and sorted(sizes)[1] > 10_000  # a header is 2 kB


def test_a_run_of_more_shards_than_are_read_is_refused_before_any_work(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[plan_extraction.__module__], "MOST_SHARDS", 2)
    with pytest.raises(OptionError, match=r"\d+ shards; at most 2 are read\. Raise shard_size"):
        plan(tiny, texts * 9, tmp_path / "acts", shard_bytes=20_000)
    assert not (tmp_path / "acts").exists()


def test_overwrite_counts_the_space_that_it_frees(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "acts"
    run_extraction(plan(tiny, texts, folder))
    held = sum(file.stat().st_size for file in folder.glob("shard-*"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    other = ExtractOptions(dtype="float16")
    assert plan_extraction(tiny, texts, folder, other, overwrite=True).free_bytes == 1000 + held
    # the same run is not replaced
    assert plan_extraction(tiny, texts, folder, overwrite=True).free_bytes == 1000
    assert plan(tiny, texts, folder).free_bytes == 1000  # nothing is to be written
    with pytest.raises(SpaceError, match=r"needs .* more, the disk has 1\.0 kB free"):
        plan(tiny, texts, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": "8"}, "max_length is '8'"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"shard_bytes": 0}, "shard_size is 0"),
        ({"max_length": True}, "max_length is True"),
        ({"batch_tokens": 2.5}, "batch_tokens is 2.5"),
    ],
)
def test_a_size_that_is_none_is_refused_by_the_name_of_its_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"{message}: it must be a whole number of at least 1"):
        ExtractOptions(**options)


@pytest.fixture
def pads_left(tiny: LoadedModel) -> Iterator[LoadedModel]:
    """The tiny model, whose positions are absolute, with a tokenizer that pads on the left."""
    side = tiny.tokenizer.padding_side
    tiny.tokenizer.padding_side = "left"
    yield tiny
    tiny.tokenizer.padding_side = side


def test_rows_are_those_of_each_text_alone_whatever_side_the_tokenizer_pads(
    pads_left: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    made = plan(pads_left, texts, tmp_path / "acts", sites=["layers.*", "pooler"], padding_free=False)
    # an older version padded on the left, and would go on with the other rows that this gives
    assert made.description["plan"]["padding_side"] == "right"
    run_extraction(made)
    store = open_store(tmp_path / "acts")
    for ordinal in range(len(texts)):
        ids = store.example(ordinal).input_ids[None]
        with torch.inference_mode():
            alone = pads_left.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert torch.allclose(store["layers.2"][ordinal], alone.last_hidden_state[0], atol=1e-5)
        assert torch.allclose(store["pooler"][ordinal], alone.pooler_output[0], atol=1e-5)


def test_a_run_that_an_older_version_padded_on_the_left_is_refused(
    pads_left: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    run_extraction(plan(pads_left, texts, tmp_path / "acts", padding_free=False))
    said = json.loads((tmp_path / "acts" / "store.json").read_text())
    del said["plan"]["padding_side"]
    (tmp_path / "acts" / "store.json").write_text(json.dumps({**said, "fingerprint": "0" * 32}))
    with pytest.raises(PlanError, match=r"\(plan\.padding_side: None there, 'right' here\)"):
        plan(pads_left, texts, tmp_path / "acts", padding_free=False)


def test_a_plan_of_a_tokenizer_that_pads_on_the_right_says_no_side(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    for padding_free in (None, False):
        assert "padding_side" not in plan(tiny, texts, tmp_path, padding_free=padding_free).description["plan"]


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_a_model_that_does_not_run_is_named_with_what_it_said(
    tiny: LoadedModel, tmp_path: Path, precision: str | None
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("expected scalar type Float\nbut found BFloat16")

    advice = r"Leave precision='bfloat16' out" if precision else "Call it on such a text"
    layer: Any = tiny.model.get_submodule("encoder.layer.1")
    with layer.register_forward_pre_hook(fail):
        said = r"BertModel: does not run on a short text \(RuntimeError: expected scalar type Float\)\. "
        with pytest.raises(ModelError, match=said + advice) as caught:
            plan_extraction(tiny, ["a"], tmp_path / "acts", ExtractOptions(precision=precision))
    assert isinstance(caught.value.__cause__, RuntimeError) and not (tmp_path / "acts").exists()


def test_a_plan_that_finds_no_memory_says_so_as_torch_does(tiny: LoadedModel, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    layer: Any = tiny.model.get_submodule("encoder.layer.1")
    with layer.register_forward_pre_hook(fail), pytest.raises(torch.OutOfMemoryError):
        plan_extraction(tiny, ["a"], tmp_path / "acts")


def test_a_shard_holds_more_on_cuda_and_a_run_that_goes_on_keeps_what_it_was_begun_with(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    begun = plan(tiny, texts, tmp_path / "acts", shard_bytes=1 << 30)  # as on CUDA
    sizes = [size_units(begun.rule, None, None, device).shard_bytes for device in (cpu, cuda)]
    assert sizes == [128 << 20, 1 << 30] and size_units(begun.rule, 5, None, cuda).shard_bytes == 5
    run_extraction(begun)
    again = plan(tiny, texts, tmp_path / "acts")
    assert again.fingerprint == begun.fingerprint and len(again.done) == again.num_units
    assert again.description["plan"]["shard_bytes"] == 1 << 30
    # a job that is sent back to its queue has that option too, and loses nothing
    anew = plan_extraction(tiny, texts, tmp_path / "acts", ExtractOptions(), overwrite=True)
    assert anew.fingerprint == begun.fingerprint and not anew.overwrite and len(anew.done) == anew.num_units
    run_extraction(plan(tiny, texts, tmp_path / "asked", shard_bytes=10_000))
    with pytest.raises(PlanError, match=r"plan\.shard_bytes: 10000 there, 134217728 here"):
        plan(tiny, texts, tmp_path / "asked")


def test_a_run_that_replaces_another_has_the_size_of_its_own_device(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    run_extraction(plan(tiny, texts, tmp_path / "acts", shard_bytes=1 << 30))  # as on CUDA
    made = plan_extraction(tiny, texts, tmp_path / "acts", ExtractOptions(sites="layers.1"), overwrite=True)
    assert made.overwrite and made.rule.shard_bytes == 128 << 20
    assert made.fingerprint == plan(tiny, texts, tmp_path / "elsewhere", sites="layers.1").fingerprint
    run_extraction(made)
    assert open_store(tmp_path / "acts").fingerprint == made.fingerprint
    asked = ExtractOptions(sites="layers.2", shard_bytes=10_000)
    assert plan_extraction(tiny, texts, tmp_path / "acts", asked, overwrite=True).rule.shard_bytes == 10_000


def test_a_buffer_is_no_larger_than_what_a_short_run_will_write(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    """Pinned memory is taken whole, and at once."""
    made = plan(tiny, texts, tmp_path / "acts", shard_bytes=1 << 30)
    engine = UnitEngine(made, RoomKeeper(made.folder, False, threading.Event()), RunReport(), lambda _: None)
    assert engine._sink._shard_bytes <= made.num_bytes < 1 << 20
