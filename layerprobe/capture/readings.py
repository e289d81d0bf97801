"""Values of sites as they are made, with nothing kept: for what looks at each one and lets it go.

A reading is a value, or one chunk of it, in the order in which the model runs; no call has to be whole. Lighter than
the registry, and less: a graph of `torch.compile` takes no hooks that come and go, so compiled models are refused.

Hides which module makes which site, layers that share a module, fused projections and chunks. Must never know what
becomes of the values.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from layerprobe.capture.hooks import HookSet
from layerprobe.capture.values import find_tensor, take_part
from layerprobe.errors import OptionError
from layerprobe.sites.resolve import ModelMap, Site
from layerprobe.sites.stacks import is_compiled

__all__ = ["Readings", "Taken", "require_uncompiled"]


class Taken(NamedTuple):
    """A value as a hook sees it.

    Args:
        site: Where.
        value: What was made there; of some positions where an FFN runs in chunks.
        given: What the module was called with, its first tensor; None for a site that is read as an input.
        start: Position of the first token in `value`.
    """

    site: Site
    value: Tensor
    given: Any
    start: int


class Readings:
    """Hooks that give each value of some sites to a function.

    Args:
        mapped: The model.
        sites: What is read; no attention weights.
        deliver: Takes each value.
    """

    def __init__(self, mapped: ModelMap, sites: Sequence[Site], deliver: Callable[[Taken], None]) -> None:
        self._mapped = mapped
        self._deliver = deliver
        self._points: dict[tuple[str, str], list[Site]] = {}
        for site in sites:
            self._points.setdefault((site.module, site.takes), []).append(site)
        self._num_positions: int | None = None
        self._runs: dict[tuple[str, str], int] = {}
        self._starts: dict[tuple[str, str], int] = {}

    def attach(self, hooks: HookSet) -> None:
        """Put the hooks on, to be taken off with `hooks`."""
        for point in self._points:
            module = self._mapped.model.get_submodule(point[0])
            if point[1] == "input":
                handle = module.register_forward_pre_hook(partial(self._take_input, point), with_kwargs=True)
            else:
                handle = module.register_forward_hook(partial(self._take_output, point), with_kwargs=True)
            hooks.keep(module, handle)

    def begin(self, num_positions: int | None) -> None:
        """Start a call of so many positions."""
        self._num_positions = num_positions
        self._runs.clear()
        self._starts.clear()

    def _take_input(self, point: tuple[str, str], module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if kwargs is not None:  # None: torch calls hooks that came off while those of this module ran
            self._take(point, args[0] if args else next(iter(kwargs.values())), None)

    def _take_output(
        self, point: tuple[str, str], module: nn.Module, args: Any, kwargs: Any, output: Any = None
    ) -> None:
        if output is not None:
            given = next((item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)), None)
            self._take(point, output, given)

    def _take(self, point: tuple[str, str], value: Any, given: Any) -> None:
        value = find_tensor(value)
        if not isinstance(value, Tensor):
            return
        run, start = self._runs.get(point, 0), self._starts.get(point, 0)
        is_chunk = self._mapped.is_chunked(self._points[point][0]) and value.ndim == 3
        if is_chunk and start + value.shape[1] < (self._num_positions or 0):
            self._starts[point] = start + value.shape[1]
        else:
            self._starts[point], self._runs[point] = 0, run + 1
        for site in self._points[point]:
            if site.call_index is None or site.call_index == run:
                self._deliver(Taken(site, take_part(self._mapped.model, site.part, value), given, start))


def require_uncompiled(model: nn.Module, asked: str) -> None:
    """Refuse a model whose values only its graphs see.

    Raises:
        OptionError: it is compiled.
    """
    if is_compiled(model):
        raise OptionError(f"{asked} of a compiled model: its graphs take no hooks that come and go. Compile it later.")
