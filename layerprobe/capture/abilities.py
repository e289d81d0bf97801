"""Optional abilities of a sink, declared by the sink and queried by the code that feeds it.

A user's sink with only the six methods of `calls.Sink` has none of these abilities and need not know of them: it
receives whole values, which it may keep.

Must never know of modules or of what happens to values.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from layerprobe.capture.calls import Call, Sink
from layerprobe.capture.compiled import Outlet, Reading

__all__ = ["History", "SinkAbilities", "abilities_of"]


class History(Protocol):
    """Where compiled graphs leave values with autograd history."""

    def attach_history(self) -> None:
        """Pass the values left by the last graph to the sink's `SinkAbilities.attach`."""

    def drop_history(self) -> None:
        """Drop them."""


class SinkAbilities:
    """The optional abilities of a sink, all off; a sink overrides those that it has."""

    # values are not exposed before their call is finished, so checks of them may be deferred until then
    forgets_abandoned: bool = False
    # values are kept with autograd history together with their gradients, and `attach` is called
    keeps_gradients: bool = False
    # set while a sink that keeps gradients is attached to a model
    history: History | None = None
    # dtype of the rows that a graph packs; None for that of the values
    packed_dtype: torch.dtype | None = None

    @property
    def copies_at_once(self) -> bool:
        """Whether a value may be overwritten once `receive` returns, as compiled graphs do when they reuse memory."""
        return False

    @property
    def packs_rows(self) -> bool:
        """Whether a compiled graph may gather and cast rows itself, to `packed_dtype`, and call `receive_rows`."""
        return False

    def receive_rows(self, call: Call, index: int, rows_TD: Tensor) -> None:
        """Receive rows that are already gathered and cast; called only if `packs_rows`."""
        raise NotImplementedError

    def attach(self, index: int, value: Tensor) -> None:
        """Receive a value of the last call again, with autograd history; called only if `keeps_gradients`."""
        raise NotImplementedError

    def make_outlet(self, root: nn.Module, device: torch.device, readings: Sequence[Reading]) -> Outlet | None:
        """Return an outlet that takes values directly from compiled graphs.

        Args:
            root: The model.
            device: Its device.
            readings: What is read, module by module.

        Returns:
            The outlet, or None to use operators that call `receive`.
        """
        return None

    def announce_examples(self, ordinals: Sequence[int]) -> None:
        """Record the input ordinals of the next call's examples."""


def abilities_of(sink: Sink) -> SinkAbilities:
    """Return a sink's abilities: the sink itself if it declares them, otherwise none."""
    return sink if isinstance(sink, SinkAbilities) else SinkAbilities()
