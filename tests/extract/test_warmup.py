"""The budget of batches: found by trying on long runs, kept by a run that goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe
from layerprobe.errors import PlanError
from layerprobe.extract import plan as planning
from layerprobe.extract import trials, warmup
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.extract.run import run_extraction
from layerprobe.extract.tokens import TokenizedUnit
from layerprobe.extract.warmup import climb, find_batch_tokens
from layerprobe.models import LoadedModel


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
    found = find_batch_tokens(
        tiny.model, ["layers.0"], TokenizedUnit.of([[5] * 9, [5] * 4, [5] * 2]), 64, None, is_flat=False
    )
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
        found = find_batch_tokens(tiny.model, ["layers.0"], unit, 64, None, is_flat=True)
    finally:
        hook.remove()
    assert found >= 64 and ((1, 64), None) in shapes and all(shape[0] == 1 for shape, _ in shapes)


def test_a_long_run_tries_once_and_one_that_goes_on_keeps_what_was_found(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([96, 48, 24])
    monkeypatch.setattr(trials, "find_batch_tokens", lambda *_: next(found))
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
        assert (
            find_batch_tokens(tiny.model, ["layers.0"], TokenizedUnit.of([[1, 2, 3]]), 1024, None, is_flat=False)
            == 1024
        )
    finally:
        hook.remove()
