"""How many tokens to send through a model at once, found by trying: twice as many as long as that is faster.

A budget decides which texts share a batch, and so the last digits of the rows and their order in a shard. It is
therefore a part of the plan, is looked for once and for long runs only, and a resumed run keeps the one it had.

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

# Shorter runs would not win back what looking takes.
LEAST_TOKENS = 1_000_000
# Measured on two cores with MiniLM and bert-base: 1,024 tokens a batch keep values in the caches and padding small;
# without padding a token gets cheaper up to about 2,048.
_CPU_BATCH_TOKENS, _CPU_FLAT_TOKENS = 1024, 2048
_GPU_BATCH_TOKENS = 16384
# A guess that no GPU has tried: some milliseconds of launches, in tokens of bert-base in float32.
_GPU_BATCH_COST = 1024
_MOST_DOUBLINGS = 6
_NUM_TRIES = 3
# Less is as likely chance as gain, and a smaller budget pads less.
_LEAST_GAIN = 0.05


def choose_batch_tokens(device: torch.device, is_flat: bool = False) -> int:
    """Choose the tokens of a batch, with padding or without, where nothing is asked for and nothing is tried."""
    if device.type != "cpu":
        return _GPU_BATCH_TOKENS
    return _CPU_FLAT_TOKENS if is_flat else _CPU_BATCH_TOKENS


def choose_batch_cost(device: torch.device) -> int:
    """Choose what one more padded batch counts, in tokens: what else could be computed in the time of its call."""
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
    """Find how many tokens a batch should have, padding included.

    Args:
        model: Run a few times, in eval mode, and left as it was.
        stored: The sites of the run, whose values, and on a GPU their stages, lie in the device's memory too.
        unit: Some texts of the run; the batches that are tried are of one of middle length.
        first: Where to begin: what a device of this kind takes well.
        precision: From `find_precision`.
        is_flat: Whether the batches of the run have no padding, and so those that are tried.
        kept: Which rows the run keeps; None for all.

    Cost: three batches of each size that is tried.
    """
    device = find_device(model)
    text = torch.tensor(
        unit[int(np.argsort(unit.lengths)[len(unit) // 2])].tolist() or [0], dtype=torch.int64, device="cpu"
    )
    form = FlatForm.of(model) if is_flat else None

    def measure(num_tokens: int) -> float:
        # no more than the run sends at once
        count = min(max(1, num_tokens // len(text)), MOST_SEQUENCES.get(device.type, num_tokens))
        batch, rows = _repeat(text, count, is_flat), len(text) if kept is None else kept.estimate(len(text))
        # as the run does from call to call
        held = hold_stages(device, stored, Room(math.ceil(count * rows), count, count * len(text) ** 2))
        least_s = min(_time(model, batch, form, device) for _ in range(_NUM_TRIES))
        del held
        return least_s / batch.input_ids.numel()

    # a callable that keeps nothing: values go through the hooks, and their memory is free again after each site
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
    """Double a budget as long as a token gets cheaper by it and it fits.

    Args:
        measure: Gives the seconds of a token at a budget, or raises what `ran_out` knows where it does not fit.
        first, most: Where to begin and where to end.
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
    """Wait for all that was queued on a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
