"""Memory that gives out on a CPU, for which torch has an error of its own: each failure here is a real one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe
from layerprobe.extract.memory import ran_out
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.extract.run import run_extraction
from layerprobe.extract.tokens import TokenizedUnit
from layerprobe.extract.warmup import find_batch_tokens
from layerprobe.models import LoadedModel
from layerprobe.store.description import StoredSite

SITE = StoredSite("layers.0", "token", torch.float32, 32)


def ask_for_too_much() -> torch.Tensor:
    return torch.empty(1 << 62, dtype=torch.uint8)


@contextmanager
def memory_for(loaded: LoadedModel, most_tokens: int) -> Iterator[list[int]]:
    """Let a model find no memory for more tokens at once than that; gives the sizes that it was asked for."""
    asked: list[int] = []

    def allocate(_: Any, args: Any, kwargs: Any) -> None:
        asked.append(kwargs["input_ids"].numel())
        if asked[-1] > most_tokens:
            ask_for_too_much()

    with loaded.model.register_forward_pre_hook(allocate, with_kwargs=True):
        yield asked


def test_what_the_allocator_of_a_cpu_says_is_known_and_no_other_error_is() -> None:
    with pytest.raises(RuntimeError) as caught:
        ask_for_too_much()
    assert ran_out(caught.value) and not isinstance(caught.value, torch.OutOfMemoryError)
    assert not ran_out(RuntimeError("expected scalar type Float"))
    assert not ran_out(ValueError("DefaultCPUAllocator"))


def test_a_batch_that_the_cpu_has_no_memory_for_is_run_in_halves(tiny: LoadedModel, tmp_path: Path) -> None:
    texts = [f"the quick brown fox {'jumps ' * number}" for number in range(12)]
    options: dict[str, Any] = {"padding_free": False}
    whole = layerprobe.extract(tiny, texts, tmp_path / "whole", **options)
    plan = plan_extraction(tiny, texts, tmp_path / "halved", ExtractOptions(**options))
    with memory_for(tiny, 80) as asked:
        report = run_extraction(plan)
    assert report.num_halved and max(asked) > 80
    halved = layerprobe.open(tmp_path / "halved")
    for number in range(len(texts)):
        for site in whole.sites:
            # a batch of another size reorders the sums of a forward
            torch.testing.assert_close(halved[site][number], whole[site][number])


def test_a_budget_that_the_cpu_has_no_memory_for_is_not_chosen(tiny: LoadedModel) -> None:
    unit = TokenizedUnit.of([[5] * 8] * 3)
    for most_tokens, found in ((100, 64), (40, 64)):
        with memory_for(tiny, most_tokens) as asked:
            assert find_batch_tokens(tiny.model, [SITE], unit, 64, precision=None, is_flat=False) == found
        assert max(asked) > most_tokens


def test_a_plan_that_finds_no_memory_on_a_cpu_says_so_as_torch_does(tiny: LoadedModel, tmp_path: Path) -> None:
    with memory_for(tiny, 0), pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        plan_extraction(tiny, ["a"], tmp_path / "acts")
