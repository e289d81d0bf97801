"""The budget of batches: found by trying on long runs, kept by a run that goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe
from layerprobe.errors import PlanError
from layerprobe.extract import calling, trials, warmup
from layerprobe.extract import plan as planning
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.extract.run import run_extraction
from layerprobe.extract.tokens import TokenizedUnit
from layerprobe.extract.warmup import climb, find_batch_tokens
from layerprobe.models import LoadedModel
from layerprobe.store.description import StoredSite
from layerprobe.store.kept import Kept

SITE = StoredSite("layers.0", "token", torch.float32, 32)


def test_a_budget_is_doubled_as_long_as_a_token_gets_cheaper() -> None:
    cheapest = {1024: 8.0, 2048: 6.0, 4096: 5.0, 8192: 4.9, 16384: 1.0}
    tried: list[int] = []

    def measure(num_tokens: int) -> float:
        tried.append(num_tokens)
        return cheapest[num_tokens]

    # 8,192 wins less than chance might
    assert climb(measure, 1024, 65536) == 4096 and tried == [1024, 2048, 4096, 8192]
    assert climb(measure, 1024, 2048) == 2048
    assert climb(lambda tokens: float(tokens), 1024, 65536) == 1024


def test_what_does_not_fit_is_not_chosen() -> None:
    def measure(num_tokens: int) -> float:
        if num_tokens > 5000:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 1 / num_tokens

    assert climb(measure, 1024, 65536) == 4096


def test_trying_runs_batches_of_the_texts_up_to_the_asked_sites_and_leaves_the_model(tiny: LoadedModel) -> None:
    shapes: list[tuple[int, ...]] = []
    last: list[int] = []
    encoder: Any = tiny.model.encoder
    handles = [
        tiny.model.register_forward_pre_hook(
            lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        ),
        encoder.layer[2].register_forward_pre_hook(lambda *_: last.append(1)),
    ]
    tiny.model.train()
    unit = TokenizedUnit.of([[5] * 9, [5] * 4, [5] * 2])
    found = find_batch_tokens(tiny.model, [SITE], unit, 64, precision=None, is_flat=False)
    assert tiny.model.training
    tiny.model.eval()
    for handle in handles:
        handle.remove()
    assert found >= 64 and (16, 4) in shapes and all(length == 4 for _, length in shapes) and not last


def test_a_run_without_padding_is_tried_without(tiny: LoadedModel) -> None:
    shapes: list[Any] = []
    hook = tiny.model.register_forward_pre_hook(
        lambda *given: shapes.append((given[2]["input_ids"].shape, given[2].get("attention_mask"))),
        with_kwargs=True,
    )
    unit = TokenizedUnit.of([[5] * 9, [5] * 4, [5] * 2])
    try:
        found = find_batch_tokens(tiny.model, [SITE], unit, 64, precision=None, is_flat=True)
    finally:
        hook.remove()
    assert found >= 64 and ((1, 64), None) in shapes and all(shape[0] == 1 for shape, _ in shapes)


def test_a_long_run_tries_once_and_one_that_goes_on_keeps_what_was_found(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([96, 48, 24])
    monkeypatch.setattr(trials, "find_batch_tokens", lambda *_, **__: next(found))
    options: Any = ExtractOptions(shard_bytes=10_000)

    def plan(**changes: Any) -> Any:
        return plan_extraction(tiny, texts, tmp_path / "acts", options, **changes)

    assert plan().batch_tokens == 2048
    monkeypatch.setattr(trials, "LEAST_TOKENS", 1)
    first = plan()
    assert first.batch_tokens == 96
    run_extraction(first)
    (tmp_path / "acts" / "shard-000001.safetensors").unlink()
    (tmp_path / "acts" / "index.json").unlink()
    again = plan()
    assert again.batch_tokens == 96 and len(again.done) == again.num_units - 1
    # the very same run goes on with it, another one tries anew
    assert plan(overwrite=True).batch_tokens == 96
    options = ExtractOptions(shard_bytes=10_000, dtype="float16")
    assert plan(overwrite=True).batch_tokens == 48
    monkeypatch.setattr(planning, "check_device", lambda *_: None)
    options = ExtractOptions(compile="reduce-overhead")  # tries would not see what is filled up
    assert plan(overwrite=True).batch_tokens == 1024
    options = ExtractOptions(shard_bytes=10_000, dtype="bfloat16")
    with pytest.raises(PlanError, match="dtype") as raised:
        plan()
    assert "batch_tokens" not in str(raised.value) and next(found) == 24  # nothing is tried for what is refused
    assert run_extraction(again).is_complete
    assert len(layerprobe.open(tmp_path / "acts")) == len(texts)


@pytest.mark.parametrize("is_flat", [False, True])
def test_no_more_sequences_are_tried_than_the_kernels_of_a_device_take(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, is_flat: bool
) -> None:
    """Of short texts, budgets that memory has room for would be more sequences than attention on CUDA takes."""
    monkeypatch.setitem(calling.MOST_SEQUENCES, "cpu", 9)
    asked: list[int] = []
    monkeypatch.setattr(warmup, "hold_stages", lambda *given: asked.append(given[2].examples))
    unit = TokenizedUnit.of([[5] * 3, [5] * 2, [5]])
    found = find_batch_tokens(tiny.model, [SITE], unit, 8, precision=None, is_flat=is_flat)
    assert found >= 8 and asked[:3] == [4, 4, 8] and max(asked) <= 9


@pytest.mark.parametrize(("kept", "rows"), [(None, 4), (Kept(keep=0.5), 2), (Kept(tokens="first"), 1)])
def test_a_budget_that_fits_only_without_the_stages_of_the_run_is_not_chosen(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, kept: Kept | None, rows: int
) -> None:
    """On a CPU there are none: here each text more than 16 takes memory that is not there."""
    asked: list[Any] = []

    def hold(device: torch.device, sites: Any, room: Any) -> torch.Tensor:
        asked.append((device.type, sites, room))
        return torch.empty((1 << 62) * (room.examples > 16), dtype=torch.uint8)

    monkeypatch.setattr(warmup, "hold_stages", hold)
    unit = TokenizedUnit.of([[5] * 9, [5] * 4, [5] * 2])
    assert find_batch_tokens(tiny.model, [SITE], unit, 64, precision=None, is_flat=False, kept=kept) == 64
    assert asked[0] == ("cpu", [SITE], (16 * rows, 16, 16 * 4 * 4)) and asked[-1][2].examples == 32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_budget_leaves_a_gpu_room_for_stages(make_bert: Any) -> None:
    model, device = make_bert().cuda(), torch.device("cuda", torch.cuda.current_device())
    unit = TokenizedUnit.of([[5] * 8] * 3)
    # two stages of 4 MiB a token, and an eighth more: 576 MiB of 64 tokens, twice that of 128
    wide = StoredSite("layers.0", "token", torch.float32, 1 << 20)

    def find(site: StoredSite) -> int:
        return find_batch_tokens(model, [site], unit, 64, precision=None, is_flat=False)

    find(SITE)  # what libraries take once is there now
    torch.cuda.empty_cache()
    held, total = torch.cuda.memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((held + (900 << 20)) / total, device)
    try:
        assert find(SITE) > find(wide) == 64
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_try_waits_for_the_device_that_it_ran_on() -> None:
    """Not for the current one, which is the first."""
    device = torch.device("cuda:1")
    large, done = torch.ones(8192, 8192, device=device), torch.cuda.Event()
    for _ in range(20):
        large = large @ large
    done.record(torch.cuda.current_stream(device))
    assert not done.query()
    warmup._wait_for(device)
    assert done.query()


def test_a_first_budget_that_does_not_fit_is_left_to_the_run(tiny: LoadedModel) -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    hook = tiny.model.register_forward_pre_hook(refuse)
    try:
        unit = TokenizedUnit.of([[1, 2, 3]])
        assert find_batch_tokens(tiny.model, [SITE], unit, 1024, precision=None, is_flat=False) == 1024
    finally:
        hook.remove()
