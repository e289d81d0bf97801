"""The results of a profile: the cost of each part of a model, as text, JSON, a picture and a trace.

Rows are steps between two sites, summed by layer, or by place over all layers. Every repeat is kept, so medians and
spreads of sums are computed from the sums.

Must never know how times are taken.
"""

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from layerprobe.analysis.figures import GREY, PALETTE, check_picture, label_sites, save_figure, styled
from layerprobe.analysis.results import give_json
from layerprobe.cost.machine import Peaks
from layerprobe.errors import OptionError
from layerprobe.tables import format_bytes, format_table

__all__ = ["BY", "Cost", "Profile", "median_ratio", "refuse_trace"]

_INSIDE = re.compile(r"(?P<stack>encoder\.|decoder\.)?layers\.\d+(?P<rest>\..+)?\Z")
BY = ("layer", "site", "place")
_COLUMNS = (
    "ms", "spread", "share", "GFLOP", "GFLOP/s", "of peak", "GB/s", "of peak", "output", "parameters", "peak",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The cost of a step, a layer or a whole model in one forward pass.

    Args:
        name: Its site, its layer, `other` or `model`.
        part: The layer, or other whole part, that contains it.
        seconds: Time of each repeat.
        flops: Floating-point operations, by torch's counter.
        moved_bytes: Bytes that its operators read and write, counted per operator: the memory traffic without any
            cache.
        output_bytes: Size of the values that it produces at sites.
        parameters: Number of weights first used here; a shared weight counts once.
        peak_bytes: Peak of bytes alive while it ran, counting only tensors that the forward pass created.
    """

    name: str
    part: str
    seconds: tuple[float, ...]
    flops: int
    moved_bytes: int
    output_bytes: int
    parameters: int
    peak_bytes: int

    @property
    def median_s(self) -> float:
        """The median over repeats, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread_s(self) -> float:
        """The interquartile range over repeats, in seconds."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return third - first

    @property
    def flops_per_s(self) -> float:
        """Floating-point operations per second, in the median."""
        return self.flops / self.median_s if self.median_s > 0 else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bytes moved per second, in the median."""
        return self.moved_bytes / self.median_s if self.median_s > 0 else 0.0

    def describe(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {**asdict(self), "median_s": self.median_s, "spread_s": self.spread_s}

    @classmethod
    def add_up(cls, name: str, part: str, costs: Sequence["Cost"]) -> "Cost":
        """Combine several costs: times are added repeat by repeat, counts and bytes are added, peaks are maximised."""
        return cls(
            name,
            part,
            tuple(map(sum, zip(*(cost.seconds for cost in costs), strict=True))),
            sum(cost.flops for cost in costs),
            sum(cost.moved_bytes for cost in costs),
            sum(cost.output_bytes for cost in costs),
            sum(cost.parameters for cost in costs),
            max(cost.peak_bytes for cost in costs),
        )


@dataclass(frozen=True, eq=False)
class Profile:
    """The cost of each part of a model; prints as a table. Made by `layerprobe.profile`.

    Args:
        model: Name of the model.
        device, dtype: Device and dtype of the model.
        shape: B and S of the batch.
        steps: Costs from one site to the next, in execution order; `other` belongs to no part.
        bare_s: The model's time without any mark, repeat by repeat, alternating with the measured ones.
        peaks: Throughput of the device in a product and in a copy.
    """

    model: str
    device: str
    dtype: str
    shape: tuple[int, int]
    steps: tuple[Cost, ...]
    bare_s: tuple[float, ...]
    peaks: Peaks
    _trace: Callable[[Path], None] = field(repr=False)

    @property
    def layers(self) -> tuple[Cost, ...]:
        """Costs by whole part: embeddings, each layer, what follows them, `other`."""
        return _group(self.steps, lambda step: step.part)

    @property
    def places(self) -> tuple[Cost, ...]:
        """Costs by place, summed over layers: `layers.*.attention.query`."""
        return _group(self.steps, lambda step: _generalise(step.name))

    @property
    def total(self) -> Cost:
        """The whole forward pass, as measured."""
        return Cost.add_up("model", "model", self.steps)

    @property
    def overhead(self) -> float:
        """Time added by the measurement, as a fraction of the model's own; the median over repeats."""
        return median_ratio(self.total.seconds, self.bare_s) - 1

    def table(self, by: str = "layer") -> str:
        """Return the costs as a text table.

        Args:
            by: `layer`, `site` (every step) or `place` (each site summed over layers).

        Raises:
            OptionError: `by` is another word.
        """
        if by not in BY:
            raise OptionError(f"by={by!r}: use {', '.join(BY)}.")
        costs = {"layer": self.layers, "site": self.steps, "place": self.places}[by]
        total = self.total
        rows = [self._row(cost, total.median_s) for cost in [*costs, total]]
        size, length = self.shape
        parts = sum(cost.median_s for cost in costs)
        lines = [
            f"{self.model}, {size} x {length} tokens, {self.dtype} on {self.device}, median of {len(self.bare_s)}",
            "",
            format_table((by, *_COLUMNS), rows),
            "",
            f"peaks: {self.peaks.flops_per_s / 1e9:,.0f} GFLOP/s in a product, "
            f"{self.peaks.bytes_per_s / 1e9:,.1f} GB/s in a copy",
            f"the parts add up to {parts / total.median_s:.1%} of the model; taking the times made it "
            f"{self.overhead:+.1%} ({statistics.median(self.bare_s) * 1e3:.2f} ms without)",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__

    def __getstate__(self) -> dict[str, Any]:
        # an unpickled profile has no model to run again
        return {**self.__dict__, "_trace": refuse_trace}

    def _row(self, cost: Cost, total_s: float) -> list[object]:
        return [
            cost.name,
            _Number(f"{cost.median_s * 1e3:.3f}"),
            _Number(f"{cost.spread_s * 1e3:.3f}"),
            _Number(f"{cost.median_s / total_s:.1%}"),
            _Number(f"{cost.flops / 1e9:.3f}"),
            _Number(f"{cost.flops_per_s / 1e9:,.1f}"),
            _Number(f"{cost.flops_per_s / self.peaks.flops_per_s:.0%}"),
            _Number(f"{cost.bytes_per_s / 1e9:,.1f}"),
            _Number(f"{cost.bytes_per_s / self.peaks.bytes_per_s:.0%}"),
            _Number(format_bytes(cost.output_bytes)),
            _Number(f"{cost.parameters:,}"),
            _Number(format_bytes(cost.peak_bytes)),
        ]

    def describe(self) -> dict[str, Any]:
        """Return everything as plain values, including every repeat, for JSON."""
        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "batch": self.shape[0],
            "length": self.shape[1],
            "repeats": len(self.bare_s),
            "peaks": asdict(self.peaks),
            "overhead": self.overhead,
            "bare_s": list(self.bare_s),
            "total": self.total.describe(),
            "layers": [cost.describe() for cost in self.layers],
            "steps": [cost.describe() for cost in self.steps],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """Return everything as JSON, and write it to a path if given.

        Raises:
            StoreError: the file cannot be written.
        """
        return give_json(self.describe(), path)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw a bar per layer, divided by step.

        Args:
            path: Picture to write; its suffix selects the format.

        Returns:
            The matplotlib figure.

        Raises:
            OptionError: matplotlib is not installed, or the suffix is not a picture format.
        """
        if path is not None:
            check_picture(path)
        layers = self.layers
        places = sorted({_inside(step) for step in self.steps} - {""}, key=lambda name: -self._place_s(name))
        shown = [*places[: len(PALETTE)], ""]
        with styled() as make_figure:
            figure = make_figure(figsize=(5.2, 1.0 + 0.2 * len(layers)), layout="constrained")
            axes = figure.add_subplot()
            starts = [0.0] * len(layers)
            for number, place in enumerate(shown):
                widths = [1e3 * self._part_s(layer.name, place, shown) for layer in layers]
                colour = PALETTE[number] if place else GREY
                axes.barh(range(len(layers)), widths, left=starts, color=colour, label=place or "the rest", height=0.8)
                starts = [start + width for start, width in zip(starts, widths, strict=True)]
            axes.set_yticks(range(len(layers)), label_sites([layer.name for layer in layers]))
            axes.set_ylim(len(layers) - 0.4, -0.6)
            axes.set_xlabel(f"ms of {self.total.median_s * 1e3:.2f}, {self.shape[0]} x {self.shape[1]} tokens")
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
            return save_figure(figure, path)

    def to_chrome_trace(self, path: str | Path) -> None:
        """Run the model again under torch's profiler, with a range per layer and per site, and write the trace.

        The file opens in `chrome://tracing` and in Perfetto.

        Raises:
            OptionError: the profiled model no longer exists.
            StoreError: the folder of the file does not exist.
        """
        self._trace(Path(path))

    def _place_s(self, place: str) -> float:
        return sum(step.median_s for step in self.steps if _inside(step) == place)

    def _part_s(self, part: str, place: str, shown: Sequence[str]) -> float:
        """Return the seconds that a part spends in a place; if `place` is empty, in all places that are not shown."""
        inside = ((_inside(step), step.median_s) for step in self.steps if step.part == part)
        return sum(seconds for name, seconds in inside if (name if name in shown else "") == place)


class _Number(float):
    """A number with a fixed text form; being a float, it is right-aligned in tables."""

    def __new__(cls, text: str) -> "_Number":
        made = super().__new__(cls, 0.0)
        made.text = text
        return made

    text: str

    def __str__(self) -> str:
        return self.text


def median_ratio(values: Iterable[float], bases: Iterable[float]) -> float:
    """Return the median of the ratios of paired times."""
    return statistics.median(value / base for value, base in zip(values, bases, strict=True))


def _group(steps: Sequence[Cost], key: Callable[[Cost], str]) -> tuple[Cost, ...]:
    groups: dict[str, list[Cost]] = {}
    for step in steps:
        groups.setdefault(key(step), []).append(step)
    return tuple(Cost.add_up(name, members[0].part, members) for name, members in groups.items())


def _generalise(name: str) -> str:
    """Replace the layer number in a site's name by `*`."""
    match = _INSIDE.match(name)
    return name if match is None else f"{match['stack'] or ''}layers.*{match['rest'] or ''}"


def refuse_trace(path: Path) -> NoReturn:
    """Raise an error: the model to trace no longer exists."""
    raise OptionError(f"no trace to {str(path)!r}: the model of this profile is gone. Profile it again.")


def _inside(step: Cost) -> str:
    """Return a step's name within its layer; empty after a layer's last site and for other parts."""
    match = _INSIDE.match(step.name)
    return (match["rest"] or "")[1:] if match else ""
