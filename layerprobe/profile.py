"""`lp.profile`: measure what each part of a model costs in one forward pass.

One pass counts operations, bytes, weights and memory and learns what each mark stands for. The passes after it only
measure times, alternating with passes without marks, which show the overhead of profiling. A last one, on demand, is a
trace.

Hides the passes. Must never change the model: it runs in eval mode and is left as it was.
"""

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.capture.hooks import HookSet
from layerprobe.capture.values import find_tensor
from layerprobe.cost.counting import Counter, counting
from layerprobe.cost.machine import check_device, make_clock, measure_peaks
from layerprobe.cost.marks import OTHER, Owners, Step, TimingPoint, find_points, marked
from layerprobe.cost.results import Cost, Profile, refuse_trace
from layerprobe.errors import CaptureError, OptionError
from layerprobe.models import LoadedModel, evaluating
from layerprobe.sites.resolve import map_model
from layerprobe.sites.stacks import find_called, find_device, find_weight_dtype, is_compiled
from layerprobe.store.format import need_parent
from layerprobe.store.guard import check_count, need_batch
from layerprobe.tables import format_dtype

__all__ = ["check_runs", "profile"]

_WARM_UP = 2


def profile(
    model: nn.Module | LoadedModel,
    batch: Mapping[str, Any],
    *,
    repeats: int = 10,
    sites: str | Sequence[str] | None = None,
) -> Profile:
    """Measure what each layer and each step inside it costs: time, operations, bytes, memory.

    A site includes everything since the site before it in its layer. So `attention.context` has the time of the
    attention kernel, and a layer's own name that of what follows its last site. `other` is what lies between the parts.

    Args:
        model: A supported model, or the result of `load_model`. It runs in eval mode, without gradients, and is left as
            it was.
        batch: Keyword arguments of the model, on its device.
        repeats: Number of measured forward passes, alternating with as many bare ones.
        sites: Patterns of the steps inside layers; None for all. Layers are measured as a whole in any case.

    Raises:
        SiteError: a pattern matches nothing.
        OptionError: the model is compiled, not a model, or on a device without a clock; attention weights are
            requested.
        CaptureError: two forward passes of the batch ran different modules.

    Cost: one forward slowed down by counting, then twice `repeats` and a few to warm up.

    Example:
        >>> import torch, layerprobe as lp
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> found = lp.profile(BertModel(tiny), {"input_ids": torch.tensor([[1, 2, 3]])}, repeats=2)
        >>> [cost.name for cost in found.layers]
        ['embeddings', 'other', 'layers.0', 'layers.1', 'pooler']
        >>> found.total.flops == sum(cost.flops for cost in found.layers) > 0
        True
    """
    network = find_called(model)
    need_batch("a profile", batch)
    device = check_runs(network, repeats)
    points = find_points(map_model(network), sites)
    shape = _find_shape(batch)
    with evaluating(network):
        account = _count(network, batch, points)
        seconds, bare_s = _time(network, batch, points, len(account.steps), repeats)
    dtype = find_weight_dtype(network)
    return Profile(
        model=model.name if isinstance(model, LoadedModel) else type(network).__name__,
        device=str(device),
        dtype=format_dtype(dtype),
        shape=shape,
        steps=account.make_costs(seconds),
        bare_s=tuple(bare_s),
        peaks=measure_peaks(device, dtype),
        _trace=partial(_write_trace, weakref.ref(network), dict(batch), points, account.steps),
    )


def check_runs(network: nn.Module, repeats: int) -> torch.device:
    """Check that a model can be timed, and return its device.

    Raises:
        OptionError: it cannot.
    """
    check_count("repeats", repeats)
    if is_compiled(network):
        raise OptionError(
            "a profile of a compiled model: its layers are fused into graphs and have no times of their own. Profile "
            "the model before it is compiled."
        )
    device = find_device(network)
    check_device(device)
    return device


class _Account:
    """Results of the counting pass: the steps in order, and what is charged to each."""

    def __init__(self, network: nn.Module, points: Sequence[TimingPoint], counter: Counter) -> None:
        self.steps: list[Step] = []
        self._owners = Owners(points)
        self._counter = counter
        self._unused = {id(parameter): parameter.numel() for parameter in network.parameters()}
        self._used = 0
        self._flops = 0
        self._moved = 0
        # by step: operations, bytes moved, bytes of values, parameters, the largest peak
        self._charged: dict[Step, list[int]] = {}

    def note_weights(self, module: nn.Module, args: Any, output: Any) -> None:
        """Count a module's weights when it finishes, each weight once."""
        for parameter in module._parameters.values():
            self._used += self._unused.pop(id(parameter), 0)

    def close_step(self, number: int, value: Any) -> None:
        """Charge everything since the previous mark to what this mark produces."""
        self._charge(self._owners.follow(number), find_tensor(value))

    def close(self) -> None:
        """Charge everything since the last mark, and the unused weights, to `other`."""
        self._used += sum(self._unused.values())
        self._charge(Step(OTHER, OTHER), None)

    def _charge(self, step: Step, value: Any) -> None:
        flops, moved = self._counter.flops, self._counter.moved_bytes
        num_bytes = value.numel() * value.element_size() if isinstance(value, Tensor) else 0
        sums = self._charged.setdefault(step, [0] * 5)
        for place, more in enumerate((flops - self._flops, moved - self._moved, num_bytes, self._used)):
            sums[place] += more
        sums[4] = max(sums[4], self._counter.take_peak())
        self._flops, self._moved, self._used = flops, moved, 0
        self.steps.append(step)

    def make_costs(self, seconds: Sequence[Sequence[float]]) -> tuple[Cost, ...]:
        """Sum the intervals of all repeats by step, and return each step's cost."""
        times = {step: [0.0] * len(seconds) for step in self._charged}
        for repeat, intervals in enumerate(seconds):
            for step, interval in zip(self.steps, intervals, strict=True):
                times[step][repeat] += interval
        return tuple(Cost(step.name, step.part, tuple(times[step]), *sums) for step, sums in self._charged.items())


def _count(network: nn.Module, batch: Mapping[str, Any], points: Sequence[TimingPoint]) -> _Account:
    """Run the model once and count."""
    given = [item for item in batch.values() if isinstance(item, Tensor)]
    hooks = HookSet()
    with counting(network, given) as counter:
        account = _Account(network, points, counter)
        try:
            for module in network.modules():
                if any(parameter is not None for parameter in module._parameters.values()):
                    hooks.keep(module, module.register_forward_hook(account.note_weights))
            with marked(points, account.close_step):
                network(**batch)
                account.close()
        finally:
            hooks.remove()
    return account


def _time(
    network: nn.Module, batch: Mapping[str, Any], points: Sequence[TimingPoint], num_steps: int, repeats: int
) -> tuple[list[list[float]], list[float]]:
    """Time every interval for each repeat, alternating with the bare model."""
    clock = make_clock(find_device(network))
    seconds: list[list[float]] = []
    bare_s: list[float] = []
    with torch.inference_mode():
        for repeat in range(-_WARM_UP, repeats):
            clock.mark()
            network(**batch)
            clock.mark()
            bare = sum(clock.take_intervals())
            with marked(points, lambda *_: clock.mark()):
                clock.mark()
                network(**batch)
                clock.mark()
            intervals = clock.take_intervals()
            if len(intervals) != num_steps:
                raise CaptureError(
                    f"a profile of {type(network).__name__}: one forward made {num_steps} steps, another "
                    f"{len(intervals)}. Only a model that takes the same path each time can be profiled."
                )
            if repeat >= 0:
                seconds.append(intervals)
                bare_s.append(bare)
    return seconds, bare_s


def _write_trace(
    network: "weakref.ref[nn.Module]",
    batch: Mapping[str, Any],
    points: Sequence[TimingPoint],
    steps: Sequence[Step],
    path: Path,
) -> None:
    """Run the model under torch's profiler, with ranges named by part and by step."""
    model = network()
    if model is None:
        refuse_trace(path)
    need_parent(path)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if find_device(model).type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with evaluating(model), torch.inference_mode():
        model(**batch)
        with torch.profiler.profile(activities=activities) as profiler:
            ranges = _Ranges(steps)
            with marked(points, ranges.close_step), ranges:
                model(**batch)
    profiler.export_chrome_trace(str(path))


class _Ranges:
    """Keep a torch profiler range open for the current step, inside one for its part."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._next = 0
        self._open: list[tuple[str, Any]] = []

    def __enter__(self) -> None:
        self._begin_step()

    def __exit__(self, *_: object) -> None:
        self._end()

    def close_step(self, number: int, value: Any) -> None:
        self._next += 1
        self._begin_step()

    def _begin_step(self) -> None:
        step = self._steps[self._next]
        wanted = [step.part] if step.name == step.part else [step.part, step.name]
        self._end(keep=1 if self._open and self._open[0][0] == step.part else 0)
        for name in wanted[len(self._open) :]:
            opened = torch.profiler.record_function(name)
            opened.__enter__()
            self._open.append((name, opened))

    def _end(self, keep: int = 0) -> None:
        while len(self._open) > keep:
            self._open.pop()[1].__exit__(None, None, None)


def _find_shape(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Read B and S from the ids or embeddings, or from the first tensor with at least two dimensions."""
    named = [batch.get(name) for name in ("input_ids", "inputs_embeds")]
    for item in [*named, *batch.values()]:
        if isinstance(item, Tensor) and item.ndim > 1:
            return item.shape[0], item.shape[1]
    raise OptionError(f"a profile of a batch with {', '.join(batch) or 'nothing'} in it: give input_ids.")
