"""Pass each value of some sites to a function as it is computed, keeping nothing.

Values, or chunks of them, arrive in execution order; calls need not be complete. Lighter than the registry but with
fewer features: compiled graphs do not pick up hooks that come and go, so compiled models are refused.

Hides which module produces which site, shared layers, fused projections and chunks. Must never know what happens to
the values.
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
        site: Its site.
        value: The value; only some positions if the FFN runs in chunks.
        given: The first tensor argument of the module; None for a site that is read as an input.
        start: Position of the first token in `value`.
    """

    site: Site
    value: Tensor
    given: Any
    start: int


class Readings:
    """Hooks that pass each value of some sites to a function.

    Args:
        mapped: The model.
        sites: The sites to read; attention weights are not supported.
        deliver: Receives each value.
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
        """Attach the hooks; `hooks` removes them later."""
        for point in self._points:
            module = self._mapped.model.get_submodule(point[0])
            if point[1] == "input":
                handle = module.register_forward_pre_hook(partial(self._take_input, point), with_kwargs=True)
            else:
                handle = module.register_forward_hook(partial(self._take_output, point), with_kwargs=True)
            hooks.keep(module, handle)

    def begin(self, num_positions: int | None) -> None:
        """Begin a call with this number of positions."""
        self._num_positions = num_positions
        self._runs.clear()
        self._starts.clear()

    def _take_input(self, point: tuple[str, str], module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if kwargs is not None:  # torch passes no kwargs if the hook was removed while the module's hooks were running
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
    """Refuse a compiled model, whose values only its graphs see.

    Raises:
        OptionError: the model is compiled.
    """
    if is_compiled(model):
        raise OptionError(f"{asked} of a compiled model: its graphs take no hooks that come and go. Compile it later.")
