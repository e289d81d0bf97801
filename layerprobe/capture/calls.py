"""The sink interface, and a call of the model as sinks see it.

The registry creates calls and reports them to sinks. Hides how ids, mask and cached positions are found among the
arguments of a base model. Must never know of hooks.
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
    """The arguments with which a stack of layers was called.

    Args:
        input_ids: `[B, S]`, or None if it was called with embeddings.
        attention_mask: The mask as passed, or None.
        shape: B and S, or None if neither ids nor embeddings were passed.
        first_position: Position of the first of the S tokens; above 0 if a key-value cache holds the tokens before it,
            None in a compiled graph with a cache, where it is not known.
        is_named: False if the model's class renames the arguments for ids and mask, so that they cannot be found.
    """

    input_ids: Tensor | None
    attention_mask: Tensor | None
    shape: tuple[int, int] | None
    first_position: int | None = 0
    is_named: bool = True

    @property
    def token_mask(self) -> Tensor | None:
        """The mask of the S tokens: with a cache, the last S columns of a mask that also covers the cached tokens.

        Raises:
            CaptureError: the mask may have been passed under another name.
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
    """The tensors that a value is made of, and a function that derives its gradient from theirs."""

    tensors: Sequence[Tensor]
    derive: Callable[[Sequence[Tensor]], Tensor]


@dataclass(eq=False, slots=True)
class Call:
    """One call of the model, as the sink sees it.

    Args:
        stacks: For each site the number of its stack, as in `Site.stack`.
        contexts: Arguments of each stack's call, by stack number, in calling order.
        expected, ahead, seen: Bit masks of sites: those of the stacks called so far, those of stacks still to be
            called, and those already received.
        state: For the sink's own data about this call.
        values: Set by a sink that keeps values unchanged: one slot per site, which hooks fill without calling
            `receive`.
        places: By stack, the indices of the real tokens in `[B * S]`, once a compiled graph has requested them.
        is_orphan: The probe was closed by another thread while this call was running.
        is_running: Returns, in any thread, whether the call is still running; False if Ctrl-C interrupted it.
        unchecked: Comparisons of attention weights already given to the sink, to be checked before the call ends.
        sources: Set by a sink that follows gradients: for sites whose value is split or concatenated, its source
            tensors.
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
        """Return the context of a site's stack; for sites after the stacks, that of the last stack called."""
        return self.find_context(index)[1]

    def find_context(self, index: int) -> tuple[int, Context]:
        """Return the stack number and its context."""
        stack = self.stacks[index]
        if stack is not None and stack in self.contexts:
            return stack, self.contexts[stack]
        return next(reversed(self.contexts.items()))

    def find_source(self, index: int) -> Context | None:
        """Return the context of the other stack, which cross attention attends to, or None if it did not run.

        Sites after the only stack of a model, whose decoder runs in the same call, have no other stack.
        """
        own = self.stacks[index]
        return next((context for stack, context in self.contexts.items() if own is not None and stack != own), None)

    @property
    def made(self) -> list[int]:
        """Indices of the sites that this call is expected to produce."""
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
    """Return whether an object has every method of a sink."""
    return all(hasattr(value, method) for method in ("open", "begin", "receive", "finish", "abandon", "close"))


def read_context(given: Mapping[str, Any]) -> Context:
    """Read ids, mask and position from the arguments of a base model, by name."""
    input_ids = given.get("input_ids")
    tokens = input_ids if input_ids is not None else given.get("inputs_embeds")
    shape = (tokens.shape[0], tokens.shape[1]) if isinstance(tokens, Tensor) else None
    count: Any = getattr(find_cache(given), "get_seq_length", None)
    return Context(input_ids, given.get("attention_mask"), shape, int(count()) if count else 0)
