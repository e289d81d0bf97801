"""Attach forward hooks to a model, all or none, and always remove them.

The registry turns sites into forward hooks, follows each call from beginning to end, and hands each site's value to a
sink as soon as it is computed. A hook traced by `torch.compile` goes through a port instead of running Python.

Hides torch's hook machinery and the early end of a forward pass. Must never know what happens to the values.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.capture.abilities import abilities_of
from layerprobe.capture.attention import watch_attention
from layerprobe.capture.calls import Call, Sink, Source
from layerprobe.capture.compiled import Outlet, Port, Reading, forget_compiled_graphs, has_compiled, watching_hooks
from layerprobe.capture.early import end_early, require_an_end
from layerprobe.capture.entries import watch_calls
from layerprobe.capture.frames import Frames
from layerprobe.capture.hooks import HookSet, Stop
from layerprobe.capture.recompute import watch_second_runs
from layerprobe.capture.values import find_tensor, take_part
from layerprobe.errors import CaptureError, OptionError
from layerprobe.sites.resolve import ModelMap, Part, Site, map_model
from layerprobe.sites.stacks import find_device, is_compile_wrapper

__all__ = ["ProbeRegistry"]


@dataclass(frozen=True, eq=False)
class _Point:
    """A hooked module and the sites read from it: several if its output is fused or it runs several times."""

    key: int
    module: nn.Module
    takes: str
    indices: tuple[int, ...]
    is_chunked: bool


class ProbeRegistry:
    """Attach hooks for sites of a model and remove them again.

    A context manager: `__enter__` attaches all hooks or none, `__exit__` removes every one.

    Args:
        model: A supported model, wrapped or not.
        sites: One pattern or several.
        sink: Receives the values.
        stop: End the forward pass after the last requested site; the model's call then returns None.
        this_thread: Capture only calls of the thread that attaches the hooks.

    Raises:
        ArchitectureError: the model is not supported.
        SiteError: a pattern matches nothing.
        OptionError: `stop` where the forward pass cannot end early, or nothing could continue after it.

    Example:
        >>> import torch, layerprobe as lp
        >>> from layerprobe.capture.sinks import MemorySink
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> model, sink = BertModel(tiny).eval(), MemorySink()
        >>> sink.open(lp.ProbeRegistry(model, "layers.*", sink).sites)
        >>> with lp.ProbeRegistry(model, "layers.*", sink):
        ...     output = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> list(sink.calls[0])
        ['layers.0', 'layers.1']
    """

    def __init__(
        self,
        model: nn.Module,
        sites: str | Sequence[str],
        sink: Sink,
        *,
        stop: bool = False,
        this_thread: bool = False,
    ) -> None:
        mapped = map_model(model)
        self.sites: tuple[Site, ...] = mapped.select(sites)
        self._mapped: ModelMap = mapped
        self.num_layers = mapped.num_layers
        self._root = mapped.model
        self._given = model
        self._sink = sink
        self._abilities = abilities_of(sink)
        self._stops = stop
        self._this_thread = this_thread
        if stop:
            require_an_end(model, self._root)
        self._frames = Frames(self.sites, len(mapped.stacks), sink, mapped.owner, stops=stop)
        device = find_device(self._root)
        self._port = Port(self, device, self._abilities.packs_rows, self._abilities.packed_dtype)
        self._points = self._group_points()
        readings = [Reading(point.indices, point.is_chunked) for point in self._points]
        self._outlet: Outlet = self._abilities.make_outlet(self._root, device, readings) or self._port
        if self._abilities.keeps_gradients:
            self._port.keep_history(len(self._points))
            self._abilities.history = self
        self._hooks = HookSet()
        self._guarding = ExitStack()

    def __enter__(self) -> "ProbeRegistry":
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Attach all hooks, or none if one fails.

        Raises:
            CaptureError: the hooks are already attached.
        """
        if self._hooks:
            raise CaptureError(f"the probe is already attached to {self._mapped.owner}. Leave its with block first.")
        has_graphs = has_compiled()
        try:
            self._guarding.enter_context(watching_hooks())
            self._port.open()
            watch_calls(self._hooks, self._given, self._mapped, self._frames, self._outlet)
            for point in self._points:
                self._attach_point(point)
            if self._abilities.keeps_gradients:
                watch_second_runs(self._hooks, self._root, self._frames)
            self._hooks.join(self._mapped.base, self._frames)
            if self._stops:
                end_early(self._hooks, self._given, self._mapped, self._frames)
            self._frames.thread = threading.get_ident() if self._this_thread else None
            self._frames.is_open = True
            if has_graphs:  # slow, and Ctrl-C may interrupt it
                forget_compiled_graphs()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove every hook and abandon calls that were interrupted."""
        self._frames.is_open = False
        self._hooks.remove()
        self._port.close()
        self._guarding.close()
        self._frames.drain()

    def _group_points(self) -> list[_Point]:
        """Group the sites by module, so that each module is hooked once."""
        grouped: dict[tuple[str, str], list[int]] = {}
        for index, site in enumerate(self.sites):
            grouped.setdefault((site.module, site.takes), []).append(index)
        points = []
        for key, ((path, takes), indices) in enumerate(grouped.items()):
            is_chunked = self._mapped.is_chunked(self.sites[indices[0]])
            points.append(_Point(key, self._root.get_submodule(path), takes, tuple(indices), is_chunked))
        return points

    # calls from compiled graphs

    def enter_compiled(
        self, stack: int, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None, cached: bool
    ) -> None:
        """Record, from a running graph, that a module was called."""
        self._frames.enter_compiled(stack, ids, mask, embeds, cached)

    def find_places(self, point: int, num_sequences: int, num_positions: int) -> Tensor | None:
        """Return to a running graph the indices of the real tokens of its call in `[B * S]`."""
        call = self._frames.current()
        if call is None:
            return None
        stack, context = call.find_context(self._points[point].indices[0])
        shape = (num_sequences, num_positions)
        if context.shape is None:  # the model was called with neither ids nor embeddings
            call.contexts[stack] = context = replace(context, shape=shape)
        if stack not in call.places:
            mask = context.token_mask
            if mask is None or tuple(mask.shape) != shape:  # the sink refuses a mask of another shape
                call.places[stack] = torch.arange(num_sequences * num_positions, device=self._port.token.device)
            else:
                call.places[stack] = (mask != 0).flatten().nonzero()[:, 0]
        return call.places[stack]

    def receive_compiled(self, point: int, value: Tensor) -> None:
        """Receive a value from a running graph, which will reuse the value's memory."""
        if self._abilities.keeps_gradients and not self._is_whole(self._points[point]):
            name = self.sites[self._points[point].indices[0]].name
            raise OptionError(
                f"gradients=True of {name!r} in a compiled model: its module runs several times in one call. "
                "Probe the model without compiling it."
            )
        call = self._frames.current()
        if call is not None:
            value = value if self._abilities.copies_at_once else value.clone()
            with self._running_on():
                self._receive_at(call, self._points[point], value)

    def receive_packed(self, point: int, rows_TD: Tensor) -> None:
        """Receive rows that a running graph has already gathered and cast."""
        call = self._frames.current()
        if call is not None:
            rows_TD = rows_TD if self._abilities.copies_at_once else rows_TD.clone()
            with self._running_on():
                self._receive(call, self._points[point].indices[0], rows_TD, self._abilities.receive_rows)

    def _running_on(self) -> AbstractContextManager[None]:
        """Suppress an early end unless a torch.compile wrapper around the model can turn it into None."""
        return nullcontext() if is_compile_wrapper(self._given) else suppress(Stop)

    def drop_history(self) -> None:
        """Drop what a graph returned with autograd history for a call that was interrupted."""
        self._port.take_attached()

    def attach_history(self) -> None:
        """Replace the values received from the last graph's operators by its outputs with autograd history."""
        for point, value in self._port.take_attached().items():
            for index in self._points[point].indices:
                self._abilities.attach(index, take_part(self._root, self.sites[index].part, value))

    def leave_compiled(self, stack: int, completed: bool) -> None:
        """Record, from a running graph, that a module has returned or raised."""
        self._frames.leave(stack, completed)

    # values

    def _attach_point(self, point: _Point) -> None:
        if point.takes == "weights":
            deliver = functools.partial(self._receive_at, point=point)
            hooks, frames, outlet, later = self._hooks, self._frames, self._outlet, self._abilities.forgets_abandoned
            watch_attention(hooks, point.module, point.key, frames, outlet, deliver, checks_later=later)
            return
        # These run at every layer of every call: bind attributes to locals and inline `_receive` to keep them fast.
        frames, get_ident, port, key = self._frames.by_thread, threading.get_ident, self._outlet, point.key
        is_compiling, sink_receive = torch.compiler.is_compiling, self._sink.receive
        stop_if_done = self._hooks.stop_if_done
        receive: Callable[[Call, Any, Any], None] = self._receive_at
        which: Any = point
        bit, is_rows = 0, False
        if self._is_plain(point):
            receive, which = self._receive, point.indices[0]
            site = self.sites[which]
            # the model may modify the output of a `module:` site in place later, so the sink must inspect it
            bit, is_rows = 0 if site.is_by_name else 1 << which, site.kind == "token"
        if point.takes == "input":

            def read_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
                if kwargs is None:
                    return
                value = args[0] if args else next(iter(kwargs.values()))
                if is_compiling():
                    port.receive(key, value, is_rows)
                elif (stack := frames.get(get_ident())) and (call := stack[-1].call) is not None:
                    receive(call, which, value)
                elif stack:
                    stack[-1].is_asked = True

            self._hooks.keep(point.module, point.module.register_forward_pre_hook(read_input, with_kwargs=True))
        else:

            def read_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if is_compiling():
                    port.receive(key, find_tensor(output), is_rows)
                elif (stack := frames.get(get_ident())) and (call := stack[-1].call) is not None:
                    if bit and type(output) is Tensor and not call.seen & bit:  # inlines `_receive`
                        call.seen |= bit
                        if (values := call.values) is not None:
                            # detach creates a new tensor object, which costs as much as the rest of the hook
                            values[which] = output.detach() if output.requires_grad else output
                        else:
                            try:
                                sink_receive(call, which, output)
                            except Exception:
                                if not call.is_orphan:
                                    raise
                        if call.seen == call.expected:
                            stop_if_done()
                    else:
                        receive(call, which, output)
                elif stack:
                    stack[-1].is_asked = True

            self._hooks.keep(point.module, point.module.register_forward_hook(read_output))

    def _is_plain(self, point: _Point) -> bool:
        """Return whether the module gives one whole value for exactly one site."""
        return self._is_whole(point) and len(point.indices) == 1 and self.sites[point.indices[0]].part is None

    def _is_whole(self, point: _Point) -> bool:
        """Return whether the module runs once per call."""
        return not point.is_chunked and all(self.sites[index].call_index is None for index in point.indices)

    def _receive_at(self, call: Call, point: _Point, value: Any) -> None:
        """Receive a value that is a chunk, one of several calls, or shared by several sites."""
        value = value if type(value) is Tensor else self._take_tensor(point.indices[0], value)
        shape, sources = call.context(point.indices[0]).shape, [value]
        if point.is_chunked and shape is not None and _is_chunk(value, shape):
            chunks = call.chunks.setdefault(point.key, [])
            # the model may overwrite the output of a `module:` site before the next chunk
            is_safe = value.requires_grad or not any(self.sites[index].is_by_name for index in point.indices)
            chunks.append(value if is_safe else value.clone())
            if sum(chunk.shape[1] for chunk in chunks) < shape[1]:
                return
            sources = call.chunks.pop(point.key)
            value = torch.cat(sources, dim=1)
        count = call.counts.get(point.key, 0)
        call.counts[point.key] = count + 1
        for index in point.indices:
            site = self.sites[index]
            if site.call_index is None or site.call_index == count:
                if call.sources is not None:
                    call.sources[index] = Source(sources, functools.partial(self._join_gradients, site.part))
                self._receive(call, index, take_part(self._root, site.part, value))

    def _join_gradients(self, part: Part | None, gradients: Sequence[Tensor]) -> Tensor:
        """Assemble the gradient of a value from the gradients of the tensors it was made of."""
        gradient = gradients[0] if len(gradients) == 1 else torch.cat(list(gradients), dim=1)
        return gradient if part is None else take_part(self._root, replace(part, bias=None), gradient)

    def _receive(self, call: Call, index: int, value: Any, hand_over: Callable[..., None] | None = None) -> None:
        if type(value) is not Tensor:
            value = self._take_tensor(index, value)
        if call.seen >> index & 1:
            raise CaptureError(
                f"{self.sites[index].name!r} of {self._mapped.owner} was made twice in one call: its module runs "
                "several times, and one value would hide the others. Ask for the sites of single layers."
            )
        call.seen |= 1 << index
        try:
            (hand_over or self._sink.receive)(call, index, value)
        except Exception:
            # a probe closed by another thread no longer accepts values
            if not call.is_orphan:
                raise
        if call.seen == call.expected:
            self._hooks.stop_if_done()

    def _take_tensor(self, index: int, value: Any) -> Tensor:
        first = find_tensor(value)
        if not isinstance(first, Tensor):
            raise CaptureError(
                f"{self.sites[index].name!r} of {self._mapped.owner} gave {type(value).__name__}, not a tensor: "
                "only modules that pass tensors can be read."
            )
        return first


def _is_chunk(value: Tensor, shape: tuple[int, int]) -> bool:
    return value.ndim == 3 and value.shape[0] == shape[0] and value.shape[1] < shape[1]
