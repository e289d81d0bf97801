"""How many tokens to send through a model at once, found by trying: twice as many as long as that is faster.

A budget decides which texts share a batch, and so the last digits of the rows and their order in a shard. It is
therefore a part of the plan, is looked for once and for long runs only, and a run that goes on takes the one it had.

Must never know of stores.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from layerprobe.capture.early import can_end_early
from layerprobe.capture.probe import Probe
from layerprobe.cores import using_cores
from layerprobe.extract.forward import running
from layerprobe.sites.stacks import find_device

__all__ = ["LEAST_TOKENS", "choose_batch_tokens", "climb", "find_batch_tokens"]

# Shorter runs would not win back what looking takes.
LEAST_TOKENS = 1_000_000
# Measured on two cores with MiniLM and bert-base: 1,024 tokens a batch keep values in the caches and padding small;
# without padding a token gets cheaper up to about 2,048.
_CPU_BATCH_TOKENS, _CPU_FLAT_TOKENS = 1024, 2048
_GPU_BATCH_TOKENS = 16384
_MOST_DOUBLINGS = 6
_NUM_TRIES = 3
# Less is as likely chance as gain, and a smaller budget pads less.
_LEAST_GAIN = 0.05


def choose_batch_tokens(device: torch.device, is_flat: bool = False) -> int:
    """Choose the tokens of a batch, with padding or without, where nothing is asked for and nothing is tried."""
    if device.type != "cpu":
        return _GPU_BATCH_TOKENS
    return _CPU_FLAT_TOKENS if is_flat else _CPU_BATCH_TOKENS


def find_batch_tokens(
    model: nn.Module, sites: Sequence[str], ids: Sequence[Sequence[int]], first: int, precision: str | None
) -> int:
    """Find how many tokens a batch should have, padding included.

    Args:
        model: Run a few times, in eval mode, and left as it was.
        sites: Those of the run, whose values lie in the device's memory too.
        ids: Tokens of some texts of the run; the batches that are tried are of one of middle length.
        first: Where to begin: what a device of this kind takes well.
        precision: From `find_precision`.

    Cost: three batches of each size that is tried.
    """
    device = find_device(model)
    text = torch.tensor(sorted(ids, key=len)[len(ids) // 2] or [0], dtype=torch.int64)

    def measure(num_tokens: int) -> float:
        batch = text.repeat(max(1, num_tokens // len(text)), 1).to(device)
        return min(_time(model, batch) for _ in range(_NUM_TRIES)) / batch.numel()

    # a callable that keeps nothing: values go through the hooks, and their memory is free again after each site
    probe = Probe(model, list(sites), to=lambda *_: None, stop=can_end_early(model), this_thread=True)
    with running(model, precision), using_cores(), probe:
        try:
            measure(first)
            return climb(measure, first, first << _MOST_DOUBLINGS)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return first  # the run halves what does not fit


def climb(measure: Callable[[int], float], first: int, most: int) -> int:
    """Double a budget as long as a token gets cheaper by it and it fits.

    Args:
        measure: Gives the seconds of a token at a budget, or raises `torch.OutOfMemoryError`.
        first, most: Where to begin and where to end.
    """
    best, least_s = first, measure(first)
    while best * 2 <= most:
        try:
            took_s = measure(best * 2)
        except torch.OutOfMemoryError:
            break
        if took_s > least_s * (1 - _LEAST_GAIN):
            break
        best, least_s = best * 2, took_s
    torch.cuda.empty_cache()
    return best


def _time(model: nn.Module, input_ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    _wait_for(input_ids.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    """Wait for all that was queued on a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
