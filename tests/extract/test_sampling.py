"""A sample of a run: which chunks of texts, and what of them counts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from layerprobe.errors import InputError, SpaceError
from layerprobe.extract import engine, preparing, sampling
from layerprobe.extract import plan as planning
from layerprobe.extract.engine import UnitEngine
from layerprobe.extract.forward import count_compiled
from layerprobe.extract.inputs import open_source
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import Plan, plan_extraction
from layerprobe.extract.preparing import PreparedUnit
from layerprobe.extract.records import Record
from layerprobe.extract.sampling import Sampler, grow_sample
from layerprobe.models import LoadedModel


@pytest.mark.parametrize(
    ("num_texts", "seconds", "sizes", "counted"),
    [(5000, 20.0, [8, 64, 512, 1416], [512, 1416]), (100, 0.7, [8, 62], [62]), (20, 20.0, [8, 20], [20])],
)
def test_chunks_grow_to_fill_the_time_and_the_small_ones_are_forgotten(
    num_texts: int, seconds: float, sizes: list[int], counted: list[int]
) -> None:
    ran: list[int] = []
    kept: list[int] = []

    def run(records: Sequence[Record], first: int) -> float:
        assert records[0].text == f"text {first}"
        ran.append(len(records))
        kept.append(len(records))
        return len(records) / 100  # a hundred texts a second

    grow_sample(open_source([f"text {number}" for number in range(num_texts)]), seconds, run, kept.clear)
    assert ran == sizes and kept == counted


def test_a_record_that_no_run_takes_is_named_by_its_place_in_the_input() -> None:
    texts: list[Any] = [*(["fine"] * 30), "half \ud83d"]
    with pytest.raises(InputError, match="text 30: holds half a character"):
        grow_sample(open_source(texts), 100.0, lambda *_: 0.01, lambda: None)


@pytest.fixture
def records(texts: list[str]) -> list[Record]:
    return [Record(text) for text in texts]


def _plan(tiny: LoadedModel, texts: list[str], folder: Path, **options: Any) -> Plan:
    return plan_extraction(tiny, texts, folder, ExtractOptions(**options), wait_for_space=True, stands_for=10**9)


def _list_shards(folder: Path) -> list[Path]:
    return list(folder.glob("shard-*"))


def test_chunks_are_units_of_one_engine_whose_shards_are_counted_and_removed(
    tiny: LoadedModel, texts: list[str], records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[PreparedUnit] = []
    sizes: dict[str, int] = {}
    run = UnitEngine.run
    monkeypatch.setattr(UnitEngine, "run", lambda engine, unit: [ran.append(unit), run(engine, unit)][1])
    unlink = Path.unlink

    def unlink_measured(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            sizes[path.name] = path.stat().st_size
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_measured)
    with Sampler(_plan(tiny, texts, tmp_path / "acts", shard_bytes=20_000, batch_tokens=64)) as sampler:
        assert sampler.run(records[:4], 0) > 0
        sampler.forget()
        sampler.run(records, 0)
        sampler.run(records[:2], len(records))
    shards = {name: size for name, size in sizes.items() if name.startswith("shard-")}
    assert not _list_shards(tmp_path / "acts")
    assert [unit.unit.number for unit in ran] == list(range(len(shards))) and len(shards) > 3
    first = next(number for number, unit in enumerate(ran) if number and unit.unit.first_example == 0)
    counted = ran[first:]
    assert [ordinal for unit in counted for ordinal in _ordinals(unit)] == list(range(len(records) + 2))
    assert sampler.pace.num_examples == len(records) + 2 and sampler.pace.seconds > 0
    assert sampler.pace.num_bytes == sum(shards[f"shard-{unit.unit.number:06d}.safetensors"] for unit in counted)


def _ordinals(unit: PreparedUnit) -> Iterator[int]:
    return iter(range(unit.unit.first_example, unit.unit.first_example + len(unit.records)))


def test_texts_of_which_something_was_compiled_are_run_again_and_counted_then(
    tiny: LoadedModel, texts: list[str], records: list[Record], tmp_path: Path
) -> None:
    torch.compiler.reset()
    try:
        with Sampler(_plan(tiny, texts, tmp_path / "acts", compile="eager", sites=["layers.0"])) as sampler:
            before = count_compiled("eager")
            sampler.run(records[:6], 0)
            compiled = count_compiled("eager")
            assert compiled > before and sampler._report.num_examples == 12
            # texts of other lengths, by what is compiled: one engine, one compiled model
            sampler.run(records[:7], 0)
            assert count_compiled("eager") == compiled and sampler._report.num_examples == 19
        assert sampler.pace.num_examples == 13
    finally:
        torch.compiler.reset()
    assert count_compiled(False) == 0


def test_texts_for_cuda_graphs_are_run_once_to_record_them(
    tiny: LoadedModel, texts: list[str], records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "check_device", lambda *_: None)
    monkeypatch.setattr(engine, "compile_network", lambda model, _: model)
    with Sampler(_plan(tiny, texts, tmp_path / "acts", compile="reduce-overhead", pool="mean")) as sampler:
        sampler.run(records, 0)
        assert sampler._report.num_examples == 2 * len(records)
    assert sampler.pace.num_examples == len(records)


def test_a_sample_of_a_long_run_tokenises_every_text(
    tiny: LoadedModel, texts: list[str], records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan has the ids of the first texts already, which of a long run is nothing."""
    tokenised: list[str] = []
    tokenize = preparing.tokenize
    plan = _plan(tiny, texts, tmp_path / "acts")
    monkeypatch.setattr(preparing, "tokenize", lambda *given: [tokenised.extend(given[1]), tokenize(*given)][1])
    with Sampler(plan) as sampler:
        sampler.run(records, 0)
    assert tokenised == texts


def test_a_sample_that_fails_leaves_the_model_as_it_was(
    tiny: LoadedModel, texts: list[str], records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise SpaceError("no room")

    plan = _plan(tiny, texts, tmp_path / "acts")
    monkeypatch.setattr(sampling.RoomKeeper, "reserve", refuse)
    with pytest.raises(SpaceError, match="no room"), Sampler(plan) as sampler:
        sampler.run(records, 0)
    assert not any(module._forward_hooks for module in tiny.model.modules())
