"""A call of the model as sinks see it, and what a sink is.

The registry makes calls and tells sinks of them. Hides how ids, mask and cached positions are found among the arguments
of a base model. Must never know of hooks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from layerprobe.errors import CaptureError
from layerprobe.sites.resolve import Site
from layerprobe.sites.stacks import find_cache
from layerprobe.sites.weights import ContextComparison, EagerTwin

__all__ = ["Call", "Context", "Sink", "Source", "is_sink", "read_context"]


@dataclass(frozen=True, eq=False, slots=True)
class Context:
    """What a stack of layers was called with.

    Args:
        input_ids: `[B, S]`, or None when it was called with embeddings.
        attention_mask: As it was passed, or None.
        shape: B and S, or None where neither ids nor embeddings were passed.
        first_position: Position of the first of the S tokens; above 0 where a key-value cache holds those before it,
            None where a compiled graph has a cache and cannot tell.
        is_named: Whether ids and mask would be seen: not if the model is of a class that calls them by other names.
    """

    input_ids: Tensor | None
    attention_mask: Tensor | None
    shape: tuple[int, int] | None
    first_position: int | None = 0
    is_named: bool = True

    @property
    def token_mask(self) -> Tensor | None:
        """The mask of the S tokens: with a cache in use, the last S columns of one that has those before them too.

        Raises:
            CaptureError: it may have been passed under another name.
        """
        if not self.is_named:
            raise CaptureError(
                "the model was called with neither input_ids nor inputs_embeds by name: padding is not known. Call the "
                "arguments of its forward input_ids and attention_mask, or capture into memory without pool."
            )
        mask, shape, first = self.attention_mask, self.shape, self.first_position
        if mask is None or shape is None or first == 0 or mask.ndim != 2:
            return mask
        is_whole = mask.shape[1] > shape[1] if first is None else mask.shape[1] == first + shape[1]
        return mask[:, -shape[1] :] if is_whole else mask


class Source(NamedTuple):
    """The tensors of the model that a value is made of, and how its gradient is made of theirs."""

    tensors: Sequence[Tensor]
    derive: Callable[[Sequence[Tensor]], Tensor]


@dataclass(eq=False, slots=True)
class Call:
    """One call of the model, as the sink sees it.

    Args:
        stacks: For each site the number of its stack, as in `Site.stack`.
        contexts: What each stack was called with, by number, in the order in which they were called.
        expected, ahead, seen: Sites as bits: of the stacks called so far, of those still to be called, already made.
        state: Room for the sink to keep what it needs for this call.
        values: Set by a sink that keeps values as they were made: a place for each site, where hooks put them without
            calling `receive`.
        places: By stack, what a compiled graph has asked: where the real tokens are in `[B * S]`.
        is_orphan: The probe was closed by another thread while this call was running.
        is_running: Asked from any thread whether it still runs; one that Ctrl-C cut short does not.
        unchecked: Of attention weights that have been given to the sink, what is to be looked at before the call ends.
        sources: Set by a sink that follows gradients: for sites whose value is cut or joined, what it is made of.
    """

    stacks: Sequence[int | None]
    contexts: dict[int, Context] = field(default_factory=dict)
    state: Any = None
    values: list[Any] | None = None
    expected: int = 0
    ahead: int = 0
    seen: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    chunks: dict[int, list[Tensor]] = field(default_factory=dict)
    twins: dict[int, EagerTwin] = field(default_factory=dict)
    places: dict[int, Tensor] = field(default_factory=dict)
    unchecked: list[ContextComparison] | None = None
    sources: dict[int, Source] | None = None
    is_orphan: bool = False
    is_running: Callable[[], bool] = lambda: True

    def context(self, index: int) -> Context:
        """Give what the stack of a site was called with; for what follows all stacks, the last one's."""
        return self.find_context(index)[1]

    def find_context(self, index: int) -> tuple[int, Context]:
        """Give the stack too."""
        stack = self.stacks[index]
        if stack is not None and stack in self.contexts:
            return stack, self.contexts[stack]
        return next(reversed(self.contexts.items()))

    def find_source(self, index: int) -> Context | None:
        """Give what the other stack was called with, which cross attention looks at; None where it did not run.

        What follows the one stack of a model, whose call its decoder is part of, has no other.
        """
        own = self.stacks[index]
        return next((context for stack, context in self.contexts.items() if own is not None and stack != own), None)

    @property
    def made(self) -> list[int]:
        """Indices of the sites that this call makes."""
        return [index for index in range(len(self.stacks)) if self.expected >> index & 1]


class Sink(Protocol):
    """Interface for a destination of captured values.

    Methods are called in the thread that runs the model. `index` is a site's index in the list given to `open`.

    Example:
        >>> import torch, layerprobe as lp
        >>> from transformers import BertConfig, BertModel
        >>> class Shapes:
        ...     def open(self, sites):
        ...         self.names, self.seen = [site.name for site in sites], {}
        ...     def receive(self, call, index, value):
        ...         self.seen[self.names[index]] = tuple(value.shape)
        ...     def begin(self, call): ...
        ...     def finish(self, call): ...
        ...     def abandon(self, call): ...
        ...     def close(self, error): ...
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> model, sink = BertModel(tiny).eval(), Shapes()
        >>> with lp.Probe(model, "layers.*", to=sink):
        ...     output = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> sink.seen
        {'layers.0': (1, 3, 32), 'layers.1': (1, 3, 32)}
    """

    def open(self, sites: Sequence[Site]) -> None:
        """Prepare for these sites; nothing is attached to the model yet."""

    def begin(self, call: Call) -> None:
        """Begin a call of the base model."""

    def receive(self, call: Call, index: int, value: Tensor) -> None:
        """Receive the value of a site, exactly as the model produced it."""

    def finish(self, call: Call) -> None:
        """Finish a call: every site of it has been received."""

    def abandon(self, call: Call) -> None:
        """Discard a call that ended before all its sites were received."""

    def close(self, error: BaseException | None) -> None:
        """Release everything; `error` is what ended the probe, or None."""


def is_sink(value: object) -> bool:
    """Whether a value has every method of a sink."""
    return all(hasattr(value, method) for method in ("open", "begin", "receive", "finish", "abandon", "close"))


def read_context(given: Mapping[str, Any]) -> Context:
    """Read ids, mask and position out of the arguments of a base model, by name."""
    input_ids = given.get("input_ids")
    tokens = input_ids if input_ids is not None else given.get("inputs_embeds")
    shape = (tokens.shape[0], tokens.shape[1]) if isinstance(tokens, Tensor) else None
    count: Any = getattr(find_cache(given), "get_seq_length", None)
    return Context(input_ids, given.get("attention_mask"), shape, int(count()) if count else 0)
