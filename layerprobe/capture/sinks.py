"""Sinks that receive values as the model produced them: memory, or a callable.

Each implements `calls.Sink`, as do the sinks that pack rows for a store or accumulate sums. The questions that sinks
ask about a site or a value are answered here too.

Must never know of modules or hooks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from layerprobe.capture.abilities import SinkAbilities
from layerprobe.capture.calls import Call, Context, Source
from layerprobe.capture.casting import cast_into
from layerprobe.capture.pooling import Pool, pool_rows
from layerprobe.capture.select import BatchSelection, take_ids
from layerprobe.capture.staging import fetch
from layerprobe.capture.target import Target
from layerprobe.errors import CaptureError, OptionError, SiteError
from layerprobe.sites.grammar import expand_patterns
from layerprobe.sites.resolve import Site
from layerprobe.store.shards import ScaledRows
from layerprobe.tables import format_value

__all__ = [
    "CallableSink",
    "CapturedCall",
    "MemorySink",
    "check_pooled",
    "find_site",
    "is_per_token",
    "select_call",
    "select_tokens",
]

Value = Tensor | ScaledRows
Item = TypeVar("Item")


class _BySite(Mapping[str, Item]):
    """A mapping by site with descriptive errors; Mapping's own `in` and `get` handle only KeyError."""

    __slots__ = ()

    def __contains__(self, site: object) -> bool:
        return isinstance(site, str) and self.get(site) is not None

    def get(self, site: str, default: Any = None) -> Any:  # type: ignore[override]
        try:
            return self[site]
        except (SiteError, CaptureError):
            return default


class CapturedCall(_BySite[Value]):
    """The values of one call of the model, by site.

    `call["layers.-1"]` accepts any pattern that matches one site; negative numbers count from the model's last layer.

    Args:
        made: Values by canonical site name.
        context: Arguments of the call; those of the decoder, if the model has two stacks.
        num_layers: Number of layers of the model, as in `expand_patterns`.
        gradients: Gradients by site, or None if they are not kept.
    """

    __slots__ = ("_context", "_gradients", "_is_compiled", "_made", "_num_layers")

    def __init__(
        self,
        made: dict[str, Value],
        context: Context,
        num_layers: Mapping[str, int],
        gradients: "Gradients | None" = None,
    ) -> None:
        self._made = made
        self._gradients = gradients
        self._num_layers = num_layers
        self._context = context
        self._is_compiled = False

    def __repr__(self) -> str:
        return f"CapturedCall({format_value(self._made)})"

    @property
    def input_ids(self) -> Tensor | None:
        """`[B, S]`, or None if the model was called with embeddings."""
        return self._context.input_ids

    @property
    def attention_mask(self) -> Tensor | None:
        """The mask as passed, or None."""
        return self._context.attention_mask

    @property
    def positions(self) -> range:
        """Positions of the S tokens of this call; under `generate` with a cache, one new position per call."""
        first = self._context.first_position
        if first is None:
            raise CaptureError("positions are not known: the model was compiled and called with a key-value cache.")
        return range(first, first + (self._context.shape[1] if self._context.shape else 0))

    def attach(self, name: str, value: Tensor) -> bool:
        """Replace a value by the same value with autograd history; return False if the values differ."""
        held = self._made.get(name)
        if not isinstance(held, Tensor) or not _is_same(held, value.detach()):
            return False
        self._made[name] = value
        self._is_compiled = True
        return True

    @property
    def gradients(self) -> "Gradients":
        """Gradients of the last `backward` through this call, by site; requires `gradients=True`."""
        if self._is_compiled:
            raise CaptureError(
                "what backward sends to a site inside a compiled graph is not seen: the values themselves have their "
                "history (probe['layers.3'] in a loss). Probe the model without compiling it."
            )
        if self._gradients is None:
            raise CaptureError("no gradients were kept: pass gradients=True to the probe.")
        return self._gradients

    def __getitem__(self, site: str) -> Value:
        return self._made[find_site(site, list(self._made), self._num_layers)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal, NaN counting as equal to NaN."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


class Gradients(_BySite[Tensor]):
    """Gradients by site; asking for a site that received none raises an error."""

    def __init__(self, values: dict[str, Tensor], names: Sequence[str], num_layers: Mapping[str, int]) -> None:
        self._values = values
        self._names = names
        self._num_layers = num_layers

    def __getitem__(self, site: str) -> Tensor:
        name = find_site(site, self._names, self._num_layers)
        if name not in self._values:
            raise CaptureError(
                f"no gradient reached {name!r}: call backward on a loss that depends on it. With use_reentrant "
                "checkpointing call it inside the with block; attention weights have one under eager attention only."
            )
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def find_site(pattern: str, names: Sequence[str], num_layers: Mapping[str, int]) -> str:
    """Find the one captured site that matches a pattern.

    Raises:
        SiteError: no site or several sites match.
    """
    if pattern in names:
        return pattern
    matched = expand_patterns(pattern, names, num_layers, "what was captured")
    if len(matched) != 1:
        raise SiteError(f"{pattern!r} stands for {len(matched)} captured sites: ask for one, such as {matched[0]!r}.")
    return matched[0]


def select_call(context: Context, value: Tensor) -> BatchSelection:
    """Select the real tokens of a call by its mask; all tokens if there is none."""
    shape = context.shape or (value.shape[0], value.shape[1])
    return BatchSelection.from_mask(context.token_mask, shape, value.device)


def select_tokens(context: Context, value: Tensor) -> tuple[BatchSelection, Tensor]:
    """Select the real tokens of a call and copy their ids to the CPU, synchronising with the device once."""
    asked = {"input_ids": context.input_ids, "attention_mask": context.attention_mask}
    asked = {name: tensor for name, tensor in asked.items() if isinstance(tensor, Tensor)}
    here = replace(context, **dict(zip(asked, fetch(list(asked.values())), strict=True)))
    selection = select_call(here, value)
    return selection, take_ids(here.input_ids, selection)


def _find_texts(call: Call, index: int, site: Site) -> Context:
    """Return the context of the texts that a value has rows for; in cross attention, that of the encoder.

    Raises:
        CaptureError: the call does not include it, for example because the encoder did not run.
    """
    if site.kind != "source":
        return call.context(index)
    source = call.find_source(index)
    if source is None:
        raise CaptureError(
            f"{site.name!r} has a row per token of the other half, of whose padding this call does not tell. Leave out "
            "pool, or call the whole of an EncoderDecoderModel."
        )
    return source


def shape_value(value: Tensor, call: Call, index: int, site: Site, *, pool: Pool, dtype: torch.dtype | None) -> Value:
    """Pool and cast one value, outside any store."""
    if pool is not None and is_per_token(site, value):
        value = pool_rows(value, select_call(_find_texts(call, index, site), value), pool)
    if dtype is None or dtype == value.dtype:
        return value
    with torch.inference_mode(False):
        out = torch.empty(value.shape, dtype=dtype, device=value.device)
        scale = torch.empty(value.shape[:-1], dtype=torch.float32, device=value.device) if dtype == torch.int8 else None
    cast_into(Target(out, scale), value)
    return out if scale is None else ScaledRows(out, scale)


def check_pooled(sites: Sequence[Site], pool: Pool) -> None:
    """Check that a pool applies to all sites.

    Raises:
        OptionError: attention weights are requested together with a pool.
    """
    matrices = [site.name for site in sites if site.kind == "attention"]
    if pool is not None and matrices:
        raise OptionError(f"{matrices[0]!r} is one matrix per head: it takes no pool.")


def is_per_token(site: Site, value: Tensor) -> bool:
    """Return whether a value has a row per token rather than per example; a `module:` site is judged by its shape."""
    return value.ndim >= 3 if site.kind == "unknown" else site.kind in ("token", "source")


class MemorySink(SinkAbilities):
    """Keep values in memory, call by call, as the model produced them.

    Values of `module:` sites are copied, since the model may modify them in place; with gradients, only if it did.

    Args:
        pool: Reduce each example's rows first.
        dtype: Cast to this; None keeps the tensors themselves.
        gradients: Keep values with their autograd history, and record their gradients.
    """

    # values are not visible before their call is finished
    forgets_abandoned = True

    def __init__(self, pool: Pool = None, dtype: torch.dtype | None = None, gradients: bool = False) -> None:
        self.calls: list[CapturedCall] = []
        self._pool = pool
        self._dtype = dtype
        self.keeps_gradients = gradients
        self.num_layers: Mapping[str, int] = {}
        self._as_made = pool is None and dtype is None and not gradients
        self._sites: Sequence[Site] = ()
        self._names: list[str] = []
        self._every = 0

    def open(self, sites: Sequence[Site]) -> None:
        check_pooled(sites, self._pool)
        self._sites = sites
        self._names = [site.name for site in sites]
        self._every = (1 << len(sites)) - 1

    def begin(self, call: Call) -> None:
        if self._as_made:
            call.values = [None] * len(self._names)
            return
        call.state = [None] * len(self._names), {}, {}
        if self.keeps_gradients:
            call.sources = {}
            if self.history is not None:
                self.history.attach_history()

    def receive(self, call: Call, index: int, value: Tensor) -> None:
        if call.values is not None:
            value = value.detach() if value.requires_grad else value
            call.values[index] = value.clone() if self._sites[index].is_by_name else value
            return
        values, gradients, copies = call.state
        site = self._sites[index]
        if self.keeps_gradients:
            if value.requires_grad:
                assert call.sources is not None
                _follow_gradient(call.sources.pop(index, None) or Source([value], itemgetter(0)), site.name, gradients)
                if site.is_by_name:
                    copies[index] = value.clone(), value._version
            values[index] = value if value.requires_grad or not site.is_by_name else value.clone()
            return
        value = value.detach()
        shaped = shape_value(value, call, index, site, pool=self._pool, dtype=self._dtype)
        values[index] = value.clone() if shaped is value and site.is_by_name else shaped

    def finish(self, call: Call) -> None:
        values, gradients, copies = call.state if call.values is None else (call.values, {}, {})
        for index, (copy, version) in copies.items():
            if values[index]._version != version:
                values[index] = copy
        if call.expected == self._every:
            named = dict(zip(self._names, values, strict=True))
        else:
            named = {self._names[index]: values[index] for index in call.made}
        *_, context = call.contexts.values()
        followed = Gradients(gradients, list(named), self.num_layers) if self.keeps_gradients else None
        self.calls.append(CapturedCall(named, context, self.num_layers, followed))

    def attach(self, index: int, value: Tensor) -> None:
        """Replace the last call's copy of a value by the value with autograd history, from a compiled graph.

        Raises:
            CaptureError: the value belongs to another call.
        """
        name = self._sites[index].name
        if not self.calls or not self.calls[-1].attach(name, value):
            raise CaptureError(
                f"the value of {name!r} is of another call than the last: with gradients=True a compiled model is run "
                "from one thread."
            )

    def abandon(self, call: Call) -> None:
        call.state = call.values = None
        if self.history is not None:
            self.history.drop_history()

    def close(self, error: BaseException | None) -> None:
        self.history = None


def _follow_gradient(source: Source, name: str, gradients: dict[str, Tensor]) -> None:
    """Record the gradient of a value at each backward, from the gradients of the tensors it was made of."""
    arrived: dict[int, Tensor] = {}

    def keep(place: int, gradient: Tensor) -> None:
        arrived[place] = gradient
        if len(arrived) == len(source.tensors):
            gradients[name] = source.derive([arrived.pop(place) for place in range(len(source.tensors))])

    for place, tensor in enumerate(source.tensors):
        tensor.register_hook(partial(keep, place))


class CallableSink:
    """Pass each value to a function as soon as it is computed, and keep nothing.

    Args:
        function: Called as `function(site, value)`.
        pool, dtype: As for `MemorySink`.
    """

    def __init__(
        self, function: Callable[[str, Any], object], pool: Pool = None, dtype: torch.dtype | None = None
    ) -> None:
        self._function = function
        self._pool = pool
        self._dtype = dtype
        self._sites: Sequence[Site] = ()

    def open(self, sites: Sequence[Site]) -> None:
        check_pooled(sites, self._pool)
        self._sites = sites

    def begin(self, call: Call) -> None:
        return None

    def receive(self, call: Call, index: int, value: Tensor) -> None:
        site = self._sites[index]
        self._function(site.name, shape_value(value.detach(), call, index, site, pool=self._pool, dtype=self._dtype))

    def finish(self, call: Call) -> None:
        return None

    def abandon(self, call: Call) -> None:
        return None

    def close(self, error: BaseException | None) -> None:
        return None
