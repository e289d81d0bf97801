"""What a sink can do beyond taking values as the model makes them: the sink says it, whoever feeds it asks.

A sink of the six methods of `calls.Sink`, as users write them, can do none of this and need not know of it: what it is
given is whole, and its own to keep.

Must never know of modules or of what becomes of values.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from layerprobe.capture.calls import Call, Sink
from layerprobe.capture.compiled import Outlet, Reading

__all__ = ["History", "SinkAbilities", "abilities_of"]


class History(Protocol):
    """Where compiled graphs leave values with their history in autograd."""

    def attach_history(self) -> None:
        """Give the sink what the last graph has left, by `SinkAbilities.attach`."""

    def drop_history(self) -> None:
        """Forget it."""


class SinkAbilities:
    """What a sink can do beyond taking values, as one that can do nothing of it; a sink that can says otherwise."""

    # no value is seen before its call is finished, so what is to be checked may be looked at by then
    forgets_abandoned: bool = False
    # values are kept with their history in autograd, and what backward sends to them: `attach` is called
    keeps_gradients: bool = False
    # set for a sink that keeps gradients, while it is probed
    history: History | None = None
    # the dtype of rows that a graph packs; None for that of the values
    packed_dtype: torch.dtype | None = None

    @property
    def copies_at_once(self) -> bool:
        """Whether a value may be overwritten as soon as `receive` returns, as a compiled graph does with its memory."""
        return False

    @property
    def packs_rows(self) -> bool:
        """Whether a compiled graph may gather and cast rows itself, to `packed_dtype`, and call `receive_rows`."""
        return False

    def receive_rows(self, call: Call, index: int, rows_TD: Tensor) -> None:
        """Take rows that are gathered and cast already; only where `packs_rows`."""
        raise NotImplementedError

    def attach(self, index: int, value: Tensor) -> None:
        """Take a value of the last call once more, with its history; only where `keeps_gradients`."""
        raise NotImplementedError

    def make_outlet(self, root: nn.Module, device: torch.device, readings: Sequence[Reading]) -> Outlet | None:
        """Make what takes values straight from compiled graphs; None for operators that call `receive`.

        Args:
            root: The model.
            device: Where it is.
            readings: What is read, module by module.
        """
        return None

    def announce_examples(self, ordinals: Sequence[int]) -> None:
        """Take note which examples of the input the sequences of the next call are."""


def abilities_of(sink: Sink) -> SinkAbilities:
    """Give what a sink can do: the sink itself where it says so, else what can do nothing."""
    return sink if isinstance(sink, SinkAbilities) else SinkAbilities()
