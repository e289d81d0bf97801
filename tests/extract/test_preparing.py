"""What can be done without the device is done in the thread that works ahead, in each process of a run."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe
from layerprobe.extract import preparing
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import Plan, plan_extraction
from layerprobe.extract.preparing import check_units, prepare_missing
from layerprobe.models import LoadedModel
from layerprobe.store.kept import Kept

extract: Any = layerprobe.extract


@pytest.mark.parametrize("options", [{}, {"padding_free": False, "keep": 0.5}])
def test_a_run_makes_its_units_ready_in_the_thread_that_works_ahead(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    seen: dict[str, list[str]] = {"cut": [], "encode": [], "choose": [], "call": []}
    cut, encode, choose = Plan.cut, preparing.encode_record, Kept.choose

    def note(what: str) -> None:
        seen[what].append(threading.current_thread().name)

    def watch_cut(plan: Plan, tokenized: Any) -> Iterator[Any]:
        for batch in cut(plan, tokenized):
            note("cut")
            yield batch

    monkeypatch.setattr(Plan, "cut", watch_cut)
    monkeypatch.setattr(preparing, "encode_record", lambda record: [note("encode"), encode(record)][1])
    monkeypatch.setattr(Kept, "choose", lambda *given: [note("choose"), choose(*given)][1])
    with tiny.model.register_forward_pre_hook(lambda *_: note("call")):
        store = extract(tiny, texts, tmp_path / "acts", shard_size=20_000, batch_tokens=64, **options)
    assert store.num_shards > 2 and len(seen["encode"]) == len(texts)
    assert bool(seen["choose"]) == ("keep" in options)
    for what in ("cut", "encode", "choose"):
        assert all(name.startswith("layerprobe-ahead") for name in seen[what]), what
    assert not any(name.startswith("layerprobe-ahead") for name in seen["call"])


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_what_is_told_of_two_halves_is_what_is_told_of_the_whole(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, keep: float
) -> None:
    plan = plan_extraction(tiny, [*texts, *texts], tmp_path / "acts", ExtractOptions(keep=keep))
    (unit,) = check_units(plan)
    prepared = prepare_missing(plan, unit)
    assert prepared is not None and prepared.keeps_part == (keep < 1)
    assert prepared.room.examples == len(unit.records) == len(prepared.records)
    told = list(prepared.batches)
    assert sum(len(ready.announced.input_ids) for ready in told) == prepared.room.rows
    for batch, announced in told:
        if batch.num_sequences < 2:
            continue
        first, second = (prepared.announce(half) for half in batch.halves())
        for field in ("ordinals", "lengths", "records"):
            assert [*getattr(first, field), *getattr(second, field)] == list(getattr(announced, field))
        assert torch.equal(torch.cat([first.input_ids, second.input_ids]), announced.input_ids)
    assert sorted(ordinal for ready in told for ordinal in ready.announced.ordinals) == list(range(2 * len(texts)))


def test_a_unit_that_is_done_is_not_made_ready(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    extract(tiny, texts, tmp_path / "acts")
    plan = plan_extraction(tiny, texts, tmp_path / "acts")
    assert [prepare_missing(plan, unit) for unit in check_units(plan)] == [None]
