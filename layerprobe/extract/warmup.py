"""Find by trial how many tokens to send through a model at once: double the budget as long as that is faster.

The budget decides which texts share a batch, and so the last digits of the rows and their order in a shard. It is
therefore part of the plan: searched once, for long runs only, and kept by a resumed run.

Must never know of stores.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from layerprobe.capture.early import can_end_early
from layerprobe.capture.probe import Probe
from layerprobe.capture.staging import Room, hold_stages
from layerprobe.cores import using_cores
from layerprobe.extract.batching import BATCH_COST_TOKENS, Batch, FlatBatch
from layerprobe.extract.calling import MOST_SEQUENCES
from layerprobe.extract.flat import FlatForm, attending_flat, find_arguments, laying
from layerprobe.extract.forward import running
from layerprobe.extract.memory import ran_out
from layerprobe.extract.tokens import TokenizedUnit
from layerprobe.sites.stacks import find_device
from layerprobe.store.description import StoredSite
from layerprobe.store.kept import Kept

__all__ = ["LEAST_TOKENS", "choose_batch_cost", "choose_batch_tokens", "climb", "find_batch_tokens"]

# Shorter runs would not recover the time of the search.
LEAST_TOKENS = 1_000_000
# Measured on two cores with MiniLM and bert-base: with 1,024 tokens a batch, values stay in the caches and padding
# stays small; without padding, the time per token falls up to about 2,048.
_CPU_BATCH_TOKENS, _CPU_FLAT_TOKENS = 1024, 2048
_GPU_BATCH_TOKENS = 16384
# An estimate, not measured on a GPU: some milliseconds of kernel launches, in tokens of bert-base in float32.
_GPU_BATCH_COST = 1024
_MOST_DOUBLINGS = 6
_NUM_TRIES = 3
# A smaller gain may be chance, and a smaller budget pads less.
_LEAST_GAIN = 0.05


def choose_batch_tokens(device: torch.device, is_flat: bool = False) -> int:
    """Return the default tokens of a batch, with padding or without."""
    if device.type != "cpu":
        return _GPU_BATCH_TOKENS
    return _CPU_FLAT_TOKENS if is_flat else _CPU_BATCH_TOKENS


def choose_batch_cost(device: torch.device) -> int:
    """Return the cost of one more padded batch, in tokens that could be computed in the time of its call."""
    return BATCH_COST_TOKENS if device.type == "cpu" else _GPU_BATCH_COST


def find_batch_tokens(
    model: nn.Module,
    stored: Sequence[StoredSite],
    unit: TokenizedUnit,
    first: int,
    *,
    precision: str | None,
    is_flat: bool,
    kept: Kept | None = None,
) -> int:
    """Find the fastest number of tokens per batch, padding included.

    Args:
        model: Run a few times in eval mode, and left as it was.
        stored: The sites of the run, whose values, and on a GPU their staging buffers, take device memory too.
        unit: Some texts of the run; the trial batches repeat one of median length.
        first: Where to start: the default for the device.
        precision: From `find_precision`.
        is_flat: Whether the batches of the run, and so those of the trial, have no padding.
        kept: Which rows the run keeps; None for all.

    Cost: three batches of each size tried, six of the first.
    """
    device = find_device(model)
    text = torch.tensor(
        unit[int(np.argsort(unit.lengths)[len(unit) // 2])].tolist() or [0], dtype=torch.int64, device="cpu"
    )
    form = FlatForm.of(model) if is_flat else None

    def measure(num_tokens: int) -> float:
        # no more sequences than the run sends at once
        count = min(max(1, num_tokens // len(text)), MOST_SEQUENCES.get(device.type, num_tokens))
        batch, rows = _repeat(text, count, is_flat), len(text) if kept is None else kept.estimate(len(text))
        # the run holds these buffers from call to call
        held = hold_stages(device, stored, Room(math.ceil(count * rows), count, count * len(text) ** 2))
        least_s = min(_time(model, batch, form, device) for _ in range(_NUM_TRIES))
        del held
        return least_s / batch.input_ids.numel()

    # the callable keeps nothing, but values pass through the hooks and are freed after each site
    names = [site.name for site in stored]
    probe = Probe(model, names, to=lambda *_: None, stop=can_end_early(model), this_thread=True)
    flat = attending_flat(model) if is_flat else contextlib.nullcontext()
    with running(model, precision), using_cores(), flat, probe:
        try:
            measure(first)
            return climb(measure, first, first << _MOST_DOUBLINGS)
        except Exception as error:
            if not ran_out(error):
                raise
    torch.cuda.empty_cache()
    return first  # the run halves what does not fit


def climb(measure: Callable[[int], float], first: int, most: int) -> int:
    """Double a budget as long as it fits and lowers the time per token.

    Args:
        measure: Returns the seconds per token at a budget; raises an error known to `ran_out` if it does not fit.
        first, most: Smallest and largest budget.
    """
    best, least_s = first, measure(first)
    while best * 2 <= most:
        try:
            took_s = measure(best * 2)
        except Exception as error:
            if not ran_out(error):
                raise
            break
        if took_s > least_s * (1 - _LEAST_GAIN):
            break
        best, least_s = best * 2, took_s
    torch.cuda.empty_cache()
    return best


def _repeat(text: torch.Tensor, count: int, is_flat: bool) -> Batch | FlatBatch:
    numbers, lengths = list(range(count)), [len(text)] * count
    if is_flat:
        return FlatBatch(numbers, lengths, numbers, text.repeat(count)[None])
    input_ids = text.repeat(count, 1)
    return Batch(numbers, lengths, numbers, input_ids, torch.ones_like(input_ids))


def _time(model: nn.Module, batch: Batch | FlatBatch, form: FlatForm | None, device: torch.device) -> float:
    placed = {name: value.to(device) for name, value in find_arguments(batch, form).items()}
    _wait_for(device)
    start = time.perf_counter()
    with laying(batch):
        model(**placed)
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    """Wait for all work queued on a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
