"""Call a model with batches that may exceed the device's memory.

A batch that does not fit is run in halves, which keep the order of rows, and the token budget is halved from then on,
so later batches are split before they fail. Batches with more sequences than the device's kernels support are split
too. The plan's cut into batches stays the same, so the same texts stay in the same places.

Hides how much fits. Must never know of stores.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from layerprobe.capture.staging import send
from layerprobe.extract.batching import Batch, FlatBatch
from layerprobe.extract.flat import FlatForm, find_arguments, laying
from layerprobe.extract.memory import ran_out
from layerprobe.telling import say

__all__ = ["MOST_SEQUENCES", "ModelCaller"]

# Maximum sequences of a call, by kind of device; no entry means no limit. CUDA attention puts sequences into the second
# or third grid dimension and fails beyond it, not with an out-of-memory error (pytorch/pytorch#146704,
# flash-attention#1786).
MOST_SEQUENCES = {"cuda": (1 << 16) - 1}


class ModelCaller:
    """Call a model with batches, splitting those that do not fit into its device's memory.

    Args:
        model: Called with the arguments of a batch.
        device: Device of the model.
        form: How the model takes flat batches, if there are any.
        shrink: Called after an out-of-memory error to free device memory held elsewhere.

    `num_halved` counts the batches that did not fit; `most_tokens` is the current limit per call, None for no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        form: FlatForm | None = None,
        shrink: Callable[[], None] = lambda: None,
    ) -> None:
        self._shrink = shrink
        self._model = model
        self._device = device
        self._form = form
        self.num_halved = 0
        self.most_tokens: int | None = None
        self._most_sequences = MOST_SEQUENCES.get(device.type)

    def call(self, batch: Batch | FlatBatch, announce: Callable[[Any], None]) -> None:
        """Send a batch through the model.

        Args:
            batch: What to send.
            announce: Called before each call of the model, with the batch or the part of it that is sent.

        Raises:
            torch.OutOfMemoryError: a single text does not fit even after all other memory was freed; on a CPU this
                is a RuntimeError, and it may also be an error that followed from it.
        """
        num_tokens = batch.input_ids.numel()
        is_one = batch.num_sequences < 2
        if is_one or (
            _is_within(num_tokens, self.most_tokens) and _is_within(batch.num_sequences, self._most_sequences)
        ):
            if self._try(batch, announce, may_fail=True):
                return
            # outside of `_try`, whose frames would keep the failed forward pass's tensors alive
            self._shrink()
            torch.cuda.empty_cache()
            if is_one:
                self._try(batch, announce, may_fail=False)
                return
            self.num_halved += 1
            self.most_tokens = max(1, num_tokens // 2)
            say(f"{self._device}: no memory for {num_tokens:,} tokens at once, going on with {self.most_tokens:,}.")
        for half in batch.halves():
            if half.members:
                self.call(half, announce)

    def _try(self, batch: Batch | FlatBatch, announce: Callable[[Any], None], may_fail: bool) -> bool:
        announce(batch)
        arguments = find_arguments(batch, self._form)
        check = self._form.check if self._form is not None and isinstance(batch, FlatBatch) else _nothing_to_check
        check()
        try:
            placed = {name: send(value, self._device) for name, value in arguments.items()}
            with laying(batch):
                self._model(**placed)
        except Exception as error:
            if may_fail and ran_out(error):
                return False
            raise
        check()
        return True


def _is_within(count: int, most: int | None) -> bool:
    return most is None or count <= most


def _nothing_to_check() -> None:
    return None
