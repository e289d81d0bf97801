"""Place time marks in a forward pass: one where each layer begins, and one where each site is produced.

The time between two marks is charged to the site that the second one produces, or, if the second only begins a layer,
to the enclosing part or `other`. So every moment of a call is charged once, and the parts add up to the whole by
construction. One pass learns which mark belongs to which site; the timing passes only count marks.

Hides hooks and modules that run several times. Must never know of clocks or counters.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from layerprobe.capture.hooks import HookSet
from layerprobe.errors import OptionError
from layerprobe.sites.resolve import ModelMap, Site

__all__ = ["OTHER", "Owners", "Step", "TimingPoint", "find_points", "marked"]

OTHER = "other"
# Sites that are whole parts of a model, and so rows of the table by layer.
_PART = re.compile(r"(encoder\.|decoder\.)?(embeddings|norm|pooler|logits|layers\.\d+)\Z")

OnMark = Callable[[int, Any], None]


@dataclass(frozen=True, eq=False)
class TimingPoint:
    """A module where a mark is taken: on entry, at its input, or at its output.

    Args:
        module: The module.
        takes: `enter` begins a part; the others produce the sites.
        sites: The sites produced, or the parts begun; several if the module runs several times or its output is fused.
    """

    module: nn.Module
    takes: Literal["enter", "input", "output"]
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Step:
    """What an interval is charged to: a site's name and the part of the model that contains it."""

    name: str
    part: str


def find_points(mapped: ModelMap, patterns: str | Sequence[str] | None) -> list[TimingPoint]:
    """Find the timing points for sites, and for each whole part of the model.

    Raises:
        SiteError: a pattern matches nothing.
        OptionError: attention weights are requested, which the model may never compute.
    """
    asked = mapped.table.rows if patterns is None else mapped.select(patterns)
    weights = [site.name for site in asked if site.takes == "weights"]
    if patterns is not None and weights:
        raise OptionError(
            f"a profile of {weights[0]!r}: most attention kernels never make the weights, so they have no time of "
            f"their own. Ask for {weights[0].removesuffix('weights') + 'context'!r}, which has that of the kernel."
        )
    parts = [site for site in mapped.table if _PART.match(site.name)]
    made: dict[tuple[str, str], list[Site]] = {}
    for site in dict.fromkeys([*asked, *parts]):
        if site.takes != "weights":
            made.setdefault((site.module, site.takes), []).append(site)
    entered: dict[str, list[Site]] = {}
    for site in parts:
        # everything before the embeddings' output is charged to them, whichever module it runs in
        if site.takes == "output" and not site.name.endswith("embeddings"):
            entered.setdefault(site.module, []).append(site)
    find = mapped.model.get_submodule
    return [
        *(TimingPoint(find(path), "enter", tuple(sites)) for path, sites in entered.items()),
        *(TimingPoint(find(path), takes, tuple(sites)) for (path, takes), sites in made.items()),  # type: ignore[arg-type]
    ]


@contextmanager
def marked(points: Sequence[TimingPoint], on_mark: OnMark) -> Iterator[None]:
    """Call `on_mark(point, value)` at each point while the block runs; on entry the value is None."""
    hooks = HookSet()
    try:
        for number, point in enumerate(points):
            handle = (
                point.module.register_forward_hook(_make_output_hook(number, on_mark))
                if point.takes == "output"
                else point.module.register_forward_pre_hook(
                    _make_input_hook(number, on_mark, point.takes == "input"), with_kwargs=True
                )
            )
            hooks.keep(point.module, handle)
        yield
    finally:
        hooks.remove()


def _make_output_hook(number: int, on_mark: OnMark) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        on_mark(number, output)

    return hook


def _make_input_hook(number: int, on_mark: OnMark, has_value: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        on_mark(number, (args[0] if args else next(iter(kwargs.values()), None)) if has_value else None)

    return hook


@dataclass
class Owners:
    """Follow the marks of one call, and determine what each interval is charged to.

    Args:
        points: As given to `marked`.
    """

    points: Sequence[TimingPoint]
    _parts: list[str] = field(default_factory=list)
    _entered: dict[int, int] = field(default_factory=dict)

    def follow(self, number: int) -> Step:
        """Process the next mark and return what the interval before it is charged to."""
        point = self.points[number]
        within = self._parts[-1] if self._parts else None
        outside = Step(within or OTHER, within or OTHER)
        if point.takes == "enter":
            count = self._entered.get(number, 0)
            self._entered[number] = count + 1
            names = [site.name for site in point.sites if site.call_index in (None, count)]
            self._parts.append(names[0] if names else outside.part)
            return outside
        names = [site.name for site in point.sites]
        if within in names:
            self._parts.pop()
            return outside
        if within is not None and all(_PART.match(name) for name in names):
            # a module shared by several layers, at the end of a run that belongs to none of them
            return outside
        inside = [name for name in names if within is not None and name.startswith(f"{within}.")] or names
        return Step(_join_names(inside), within or _find_part(inside[0]))


def _find_part(name: str) -> str:
    return name if _PART.match(name) else OTHER


def _join_names(names: Sequence[str]) -> str:
    """Join the names of sites that one module produces together: `layers.0.attention.query+key+value`."""
    return "+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
