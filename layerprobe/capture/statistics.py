"""The common base of sinks that keep sums instead of rows.

Each value is reduced to the rows of its real tokens, in float64 on its device, and measured on its own; the result is
merged into the sums once the call is complete. So a call that raises does not count, memory does not grow, and the
sums of several processes are merged by the same function.

Which sums, and how they are merged and read, are functions passed in. Must never know of modules or hooks.
Letters: B sequences, T rows, D width.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from layerprobe.capture.abilities import SinkAbilities
from layerprobe.capture.calls import Call
from layerprobe.capture.select import BatchSelection, write_rows
from layerprobe.capture.sinks import is_per_token, select_call
from layerprobe.capture.target import Target
from layerprobe.errors import CaptureError, OptionError, SiteError
from layerprobe.sites.resolve import Site
from layerprobe.sites.stacks import find_sum_device
from layerprobe.tables import format_table

__all__ = ["RowSink", "Rows", "Said", "Sums", "Tokens", "format_said"]

Sums = dict[str, Tensor]
# A summary of a site in a few words and numbers.
Said = dict[str, str | int | float | None]
View = TypeVar("View")
_COUNTER = "num_examples"
_ORDER = "order"
_REFUSED = {
    "attention": "is one matrix per head and has no rows. Ask for attention.context",
    "source": "has rows of the other half's tokens, whose mask the call does not tell. Ask for encoder.layers",
}


@dataclass(frozen=True, eq=False)
class Tokens:
    """What the rows of a call stand for: real tokens, or examples if there is one row per example.

    Args:
        ids: `[T]` token ids, -1 if not known.
        lengths: Number of rows per sequence.
    """

    ids: Tensor
    lengths: tuple[int, ...]

    @cached_property
    def examples(self) -> Tensor:
        """Index in the batch of each row's sequence."""
        lengths = torch.tensor(self.lengths, device="cpu")
        return torch.arange(len(lengths), device="cpu").repeat_interleave(lengths).to(self.ids.device)

    @cached_property
    def positions(self) -> Tensor:
        """Position of each row among its sequence's real tokens."""
        starts = torch.tensor([0, *self.lengths], device="cpu").cumsum(0)[:-1].to(self.ids.device)
        return torch.arange(len(self.ids), device=self.ids.device) - starts[self.examples]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one site in one call, float64.

    Args:
        values: `[T, D]`, on the device of the site. May include rows that are not finite.
        tokens: What the rows stand for.
    """

    values: Tensor
    tokens: Tokens

    @cached_property
    def finite(self) -> Tensor:
        """Mask of the finite rows; the others are counted and left out."""
        return self.values.isfinite().all(dim=1)

    @cached_property
    def counts(self) -> Sums:
        """Number of finite and of non-finite rows, int64; on the device, so that nothing synchronises."""
        count = self.finite.sum()
        return {"count": count, "nonfinite": len(self.values) - count}

    def fill(self, value: float, other: Tensor | None = None) -> Tensor:
        """Return the rows, or another `[T, D]`, with `value` in place of the non-finite rows."""
        return torch.where(self.finite[:, None], self.values if other is None else other, value)


@dataclass
class _CallState:
    """Intermediate results of a call: tokens by stack, sums by site, and the number of sequences."""

    tokens: dict[int, tuple[BatchSelection, Tokens]] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)
    num_examples: int = 0


class RowSink(SinkAbilities, Generic[View]):
    """Measure the rows of each site call by call, and merge the results.

    A sink may be passed to several probes, one after the other, and keeps accumulating.

    Args:
        fields: Names of the sums.
        measure: Computes sums from a site's rows in one call, at least one row.
        join: Merges two sums of one site into the sums of all their rows.
        view: Converts sums on the host to the result of `sink[site]`.
        describe: Reduces that result to a few numbers, for a table.
        combine: Converts the measurements of a call, by site, to the sums that are kept, if these differ.
        options: Named settings that must be equal in sums that are merged.
        check: Refuses sites that cannot be measured together.
    """

    def __init__(
        self,
        fields: Sequence[str],
        measure: Callable[[Rows], Sums],
        join: Callable[[Sums, Sums], Sums],
        view: Callable[[Sums], View],
        describe: Callable[[View], Said],
        combine: Callable[[dict[str, Sums]], dict[str, Sums]] | None = None,
        options: Mapping[str, Tensor] | None = None,
        check: Callable[[Sequence[Site]], None] | None = None,
    ) -> None:
        self._fields = tuple(fields)
        self._measure = measure
        self._join = join
        self._view = view
        self._describe = describe
        self._combine = combine
        self._options = dict(options or {})
        self._check = check
        self._sums: dict[str, Sums] = {}
        # ordinal of the next text, and of the first text since the sink was opened
        self._num_examples = self._first_example = 0
        self._announced: Sequence[int] | None = None
        self._open: Sequence[Site] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # a copy is not open in any probe, and gets its own lock
        return {**self.__dict__, "_announced": None, "_open": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _sums=dict(state["_sums"]), _lock=threading.Lock())

    # called by a probe

    @property
    def copies_at_once(self) -> bool:
        """Whether a compiled graph may reuse a value's memory: yes, because only sums are kept."""
        return True

    def open(self, sites: Sequence[Site]) -> None:
        if self._open is not None:
            raise CaptureError(f"this {type(self).__name__} is open in another probe. Take one for each, and merge.")
        for site in sites:
            if site.kind in _REFUSED:
                raise OptionError(f"statistics of {site.name!r}: it {_REFUSED[site.kind]}.")
        if self._check is not None:
            self._check(sites)
        self._first_example = self._num_examples
        self._open = sites

    def begin(self, call: Call) -> None:
        call.state = _CallState()

    def receive(self, call: Call, index: int, value: Tensor) -> None:
        assert self._open is not None
        # tensors created in inference mode could not be updated outside it
        with torch.inference_mode(False), torch.no_grad():
            rows = _take_rows(call, index, self._open[index], value)
            if len(rows.values):
                call.state.sums[self._open[index].name] = self._measure(rows)

    def finish(self, call: Call) -> None:
        state: _CallState = call.state
        call.state = None
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._announced is None:
                ordinals = range(self._num_examples, self._num_examples + state.num_examples)
            else:
                ordinals = [self._first_example + ordinal for ordinal in self._announced]
            self._announced = None
            made = self._combine(state.sums) if self._combine else state.sums
            self._add({key: _number_examples(sums, ordinals) for key, sums in made.items()})
            self._num_examples = max(self._num_examples, *(ordinal + 1 for ordinal in ordinals), 0)

    def abandon(self, call: Call) -> None:
        call.state = None
        self._announced = None

    def close(self, error: BaseException | None) -> None:
        self._open = None

    def announce_examples(self, ordinals: Sequence[int]) -> None:
        """Set the input ordinals of the next call's sequences; otherwise they are numbered consecutively.

        Numbering continues after what the sink has seen before it was opened.
        """
        self._announced = ordinals

    # called by a user

    @property
    def sites(self) -> list[str]:
        """Sites with measured values."""
        return list(self._sums)

    def __contains__(self, site: str) -> bool:
        return site in self._sums

    def __getitem__(self, site: str) -> View:
        return self._view({name: tensor.cpu() for name, tensor in self._find(site).items()})

    def summary(self) -> list[Said]:
        """Return a few numbers for each site; `print(sink)` shows them as a table."""
        return [{"site": site, **self._describe(self[site])} for site in self.sites]

    def __str__(self) -> str:
        return format_said(self.summary())

    __repr__ = __str__

    def merge(self, other: "RowSink[View]") -> None:
        """Merge the sums of another sink of the same kind and options, from other texts or another process.

        Its texts are numbered after those of this sink.

        Raises:
            OptionError: it has another kind, other options, or a site of another width.
        """
        if type(other) is not type(self):
            raise OptionError(f"a {type(other).__name__} cannot be merged into a {type(self).__name__}.")
        self._check_options(other._options)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._add({key: _shift_examples(sums, self._num_examples) for key, sums in other._sums.items()})
            self._num_examples += other._num_examples

    def state_dict(self) -> dict[str, Tensor]:
        """Return all sums by name, such as `layers.3/mean`, as tensors on the CPU that safetensors can save."""
        state = {_COUNTER: torch.tensor(self._num_examples, device="cpu"), **self._options}
        for order, (key, sums) in enumerate(self._sums.items()):
            state[f"{key}/{_ORDER}"] = torch.tensor(order, device="cpu")
            state.update({f"{key}/{name}": sums[name].cpu().clone() for name in self._fields})
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all sums by those of a `state_dict`.

        Raises:
            OptionError: they come from another kind of sink, or from other options.
        """
        found: dict[str, Sums] = {}
        options: Sums = {}
        for name, tensor in state.items():
            key, separator, leaf = name.rpartition("/")
            target = found.setdefault(key, {}) if separator else options
            target[leaf] = tensor.clone()
        count = int(options.pop(_COUNTER, torch.tensor(0, device="cpu")))
        self._check_options(options)
        for key, sums in found.items():
            if set(sums) != {*self._fields, _ORDER}:
                raise OptionError(
                    f"the state of {key!r} has {', '.join(sorted(sums))}: a {type(self).__name__} has "
                    f"{', '.join(sorted(self._fields))}. Load it into a sink of the kind that it was saved from."
                )
        ordered = sorted(found, key=lambda key: int(found[key].pop(_ORDER)))
        with self._lock:
            self._sums = {key: found[key] for key in ordered}
            self._num_examples = count

    def _check_options(self, others: Mapping[str, Tensor]) -> None:
        same = set(others) == set(self._options)
        if not same or not all(torch.equal(value, others[name]) for name, value in self._options.items()):
            raise OptionError(
                f"a {type(self).__name__} with other options ({', '.join(self._options) or 'none'} here, "
                f"{', '.join(others) or 'none'} there): make both with the same."
            )

    def _find(self, site: str) -> Sums:
        if site not in self._sums:
            known = ", ".join(self._sums) or "none yet"
            raise SiteError(f"no {site!r} in this {type(self).__name__}: it has {known}.")
        return self._sums[site]

    def _add(self, made: Mapping[str, Sums]) -> None:
        """Merge sums into the existing ones; if one does not fit, none is merged."""
        joined = dict(self._sums)
        for key, sums in made.items():
            held = self._sums.get(key)
            if held is None:
                joined[key] = sums
                continue
            device = next(iter(sums.values())).device
            held = {name: tensor.to(device) for name, tensor in held.items()}
            for name, tensor in held.items():
                if tensor.shape != sums[name].shape:
                    raise OptionError(
                        f"{name} of {key!r} is {tuple(tensor.shape)} here and {tuple(sums[name].shape)} there: only "
                        "sums of the same width and options can be joined."
                    )
            joined[key] = self._join(held, sums)
        self._sums = joined


def format_said(said: Sequence[Said]) -> str:
    """Format summaries of sites as a table, with four significant digits."""
    if not said:
        return "nothing was measured yet"

    def shorten(cell: str | int | float | None) -> str | int | float | None:
        return float(f"{cell:.4g}") if isinstance(cell, float) else cell

    return format_table(list(said[0]), [[shorten(cell) for cell in line.values()] for line in said])


def _number_examples(sums: Sums, ordinals: Sequence[int]) -> Sums:
    """Replace indices in the batch by the examples' ordinals."""
    if "example" not in sums:
        return sums
    places = sums["example"]
    # index -1, for empty places, selects the appended -1
    names = torch.tensor([*ordinals, -1], device=places.device)
    return {**sums, "example": names[places]}


def _shift_examples(sums: Sums, count: int) -> Sums:
    """Shift example ordinals by `count`; empty places stay empty."""
    if "example" not in sums:
        return sums
    numbers = sums["example"]
    return {**sums, "example": torch.where(numbers < 0, numbers, numbers + count)}


def _take_rows(call: Call, index: int, site: Site, value: Tensor) -> Rows:
    """Reduce a value to the rows of its real tokens."""
    stack, context = call.find_context(index)
    state: _CallState = call.state
    value = value.detach()
    value = value.to(find_sum_device(value.device))
    is_token = is_per_token(site, value)
    if value.ndim != (3 if is_token else 2):
        raise CaptureError(
            f"a value of {site.name!r} has shape {tuple(value.shape)}: statistics take a row per token or per text."
        )
    if not is_token:
        state.num_examples = max(state.num_examples, len(value))
        unknown = torch.full((len(value),), -1, device=value.device)
        return Rows(value.double(), Tokens(unknown, (1,) * len(value)))
    if stack not in state.tokens:
        selection = select_call(context, value)
        ids = torch.full((selection.num_rows,), -1, device=value.device)
        if context.input_ids is not None:
            write_rows(Target(ids), context.input_ids.to(value.device), selection)
        state.tokens[stack] = selection, Tokens(ids, selection.lengths)
        state.num_examples = max(state.num_examples, selection.num_sequences)
    selection, tokens = state.tokens[stack]
    rows_TD = torch.empty(selection.num_rows, value.shape[2], dtype=torch.float64, device=value.device)
    write_rows(Target(rows_TD), value, selection)
    return Rows(rows_TD, tokens)
