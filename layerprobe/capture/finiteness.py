"""`lp.find_nonfinite`: find where a forward pass first produces a NaN or an infinity, and from what inputs.

Every site's range and its counts of NaNs and infinities are measured as the value is computed, without synchronising
before the forward pass is over. Must never change the model, nor the random numbers that it draws.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerprobe.capture.hooks import HookSet
from layerprobe.capture.readings import Readings, Taken, require_uncompiled
from layerprobe.models import LoadedModel
from layerprobe.sites.resolve import map_model
from layerprobe.sites.stacks import find_called, find_device, find_sum_device
from layerprobe.store.guard import need_batch
from layerprobe.tables import format_count

__all__ = ["Nonfinite", "ValueRange", "find_nonfinite"]


@dataclass(frozen=True)
class ValueRange:
    """Range of the values of a tensor.

    Args:
        low, high: Smallest and largest finite value; NaN if there is none.
        num_nan, num_inf: Number of NaNs and of infinities.
        num_values: Number of values.
    """

    low: float
    high: float
    num_nan: int
    num_inf: int
    num_values: int

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite."""
        return self.num_nan + self.num_inf == 0

    def __str__(self) -> str:
        if self.is_finite:
            return f"{self.low:.4g} to {self.high:.4g}"
        return f"{self.num_nan:,} NaN and {self.num_inf:,} infinite of {format_count(self.num_values, 'value')}"


@dataclass(frozen=True)
class Nonfinite:
    """The first site with a non-finite value; false, and printed as `none`, if all values are finite.

    Args:
        site: Name of the site; `output.NAME` for a loss, or for other outputs after the last site; None if there is
            none.
        module: The module that is read there.
        values: Range of the values there.
        inputs: By name, the ranges of its inputs: the module's input, or the sites just before.
        parameters: Names of parameters and buffers of the model that are themselves not finite.
        num_sites: Number of sites checked.
    """

    site: str | None
    module: str = ""
    values: ValueRange | None = None
    inputs: Mapping[str, ValueRange] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    num_sites: int = 0

    def __bool__(self) -> bool:
        return self.site is not None

    def __str__(self) -> str:
        if self.site is None:
            lines = [f"none: {format_count(self.num_sites, 'site')} and the output are finite"]
        else:
            place = f" ({self.module})" if self.module else ""
            lines = [f"{self.site}{place}: {self.values}"]
            lines += [f"  made of {name}: {found}" for name, found in self.inputs.items()]
        if self.parameters:
            more = f" and {len(self.parameters) - 3} more" if len(self.parameters) > 3 else ""
            lines.append(f"  weights that are not finite: {', '.join(self.parameters[:3])}{more}")
        return "\n".join(lines)


class _Record(NamedTuple):
    """The measurements of a site and, if known, of its input, both from `_measure`."""

    name: str
    module: str
    takes: str
    measured: Tensor
    given: Tensor | None


def find_nonfinite(model: nn.Module | LoadedModel, batch: Mapping[str, Any]) -> Nonfinite:
    """Find the first site, in the order in which the model runs, that produces a NaN or an infinity.

    The model runs once, in its current mode, without gradients and under the caller's autocast. Padding is checked too,
    since non-finite values there reach other tokens through sums and norms. Attention weights are not checked, but what
    is computed from them is.

    Args:
        model: A supported model, or the result of `load_model`; not compiled.
        batch: Keyword arguments of the model, on its device; with labels the loss is checked too.

    Raises:
        ArchitectureError: the model is not supported.
        OptionError: it is compiled, or not a model.

    Cost: a forward, and a few passes over each value.

    Example:
        >>> import torch, layerprobe as lp
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> model, batch = BertModel(tiny).eval(), {"input_ids": torch.tensor([[1, 2, 3]])}
        >>> print(lp.find_nonfinite(model, batch))
        none: 20 sites and the output are finite
        >>> model.encoder.layer[1].attention.self.key.weight.data[0, 0] = float("inf")
        >>> lp.find_nonfinite(model, batch).site
        'layers.1.attention.key'
    """
    network = find_called(model)
    need_batch("find_nonfinite", batch)
    require_uncompiled(network, "find_nonfinite")
    mapped = map_model(network)
    sites = [site for site in mapped.table if site.kind != "attention"]
    records: list[_Record] = []

    def take(taken: Taken) -> None:
        site, given = taken.site, None if taken.given is None else _measure(taken.given)
        records.append(_Record(site.name, site.module, site.takes, _measure(taken.value), given))

    readings, hooks = Readings(mapped, sites, take), HookSet()
    readings.begin(_find_length(batch))
    device = find_device(network)
    cuda = [device] if device.type == "cuda" else []
    try:
        readings.attach(hooks)
        with torch.random.fork_rng(cuda), torch.no_grad():
            output = network(**batch)
    finally:
        hooks.remove()
    parts = output.items() if isinstance(output, Mapping) else enumerate(output if isinstance(output, tuple) else ())
    made = [(f"output.{name}", part) for name, part in parts if isinstance(part, Tensor)]
    records += [_Record(name, "", "output", _measure(part), None) for name, part in made]
    return _judge(records, _list_bad_weights(network), len({site.name for site in sites}))


def _judge(records: list[_Record], parameters: tuple[str, ...], num_sites: int) -> Nonfinite:
    bad = torch.stack([record.measured[2:4].sum().cpu() for record in records]).nonzero().flatten().tolist()
    if not bad:
        return Nonfinite(None, parameters=parameters, num_sites=num_sites)
    first = records[bad[0]]
    if first.given is not None:
        inputs = {f"the input of {first.module}": _view(first.given)}
    else:
        before = records[: bad[0]]
        siblings = [record for record in before if record.name.rpartition(".")[0] == first.name.rpartition(".")[0]]
        inputs = {record.name: _view(record.measured) for record in siblings or before[-1:]}
    place = f"{first.module}:input" if first.takes == "input" else first.module
    return Nonfinite(first.name, place, _view(first.measured), inputs, parameters, num_sites)


def _measure(value: Tensor) -> Tensor:
    """Return low, high, NaNs, infinities and size as float64 `[5]`, without synchronising."""
    value = value.detach().to(find_sum_device(value.device))
    if not value.numel():
        return torch.tensor([float("nan"), float("nan"), 0.0, 0.0, 0.0], device=value.device, dtype=torch.float64)
    finite = value.isfinite()
    wide = value.double()
    low, high = torch.where(finite, wide, float("inf")).amin(), torch.where(finite, wide, float("-inf")).amax()
    counts = value.isnan().sum(), value.isinf().sum(), low.new_full((), value.numel())
    return torch.stack([low, high, *(count.double() for count in counts)])


def _view(measured: Tensor) -> ValueRange:
    low, high, num_nan, num_inf, num_values = measured.tolist()
    if low > high:
        low = high = float("nan")
    return ValueRange(low, high, int(num_nan), int(num_inf), int(num_values))


def _list_bad_weights(model: nn.Module) -> tuple[str, ...]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return tuple(name for name, weight in named if weight.is_floating_point() and not bool(weight.isfinite().all()))


def _find_length(batch: Mapping[str, Any]) -> int | None:
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(batch.get(name), Tensor):
            return batch[name].shape[-1 if name == "input_ids" else -2]
    return None
