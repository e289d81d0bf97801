"""Hooks on a model: all of them or none, and every one gone at the end.

The registry turns sites into forward hooks and tells a sink of three things: a call of the model begins (with its ids
and mask), a site's value was made, the call is over. State lives per thread and per call, so several threads may run
one model under one registry.

Hides torch's hook machinery and the early end of a forward. Must never know what becomes of the values.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.capture.calls import Call, Sink, Source, read_context
from layerprobe.capture.hooks import HookSet, Stop
from layerprobe.capture.recompute import watch_second_runs
from layerprobe.errors import CaptureError
from layerprobe.sites.resolve import ModelMap, Part, Site, Stack, map_model
from layerprobe.sites.weights import EagerTwin

__all__ = ["ProbeRegistry"]


@dataclass(eq=False)
class _Frame:
    """A running call of the probed model in one thread, opened by whichever module was called from outside.

    `inside` holds the stacks whose base is running. Ctrl-C leaves a frame behind, since torch tells hooks of an
    Exception only; the next call opens another on top of it, as a model called within a sink does.
    """

    owner: nn.Module
    call: Call | None = None
    inside: set[int] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class _Point:
    """A module that is read, and the sites that are read there: several where it is fused or runs several times."""

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
        sink: What takes the values.
        stop: End the forward after the last asked site; the model's call then returns None.

    Raises:
        ArchitectureError: the model is not supported.
        SiteError: a pattern matches nothing.
    """

    def __init__(self, model: nn.Module, sites: str | Sequence[str], sink: Sink, *, stop: bool = False) -> None:
        mapped = map_model(model)
        self.sites: tuple[Site, ...] = mapped.select(sites)
        self._mapped: ModelMap = mapped
        self.num_layers = mapped.num_layers
        self._root = mapped.model
        self._sink = sink
        self.wants_stop = stop
        self._stacks = [site.stack for site in self.sites]
        self._points = self._group_points()
        self._biases = {
            site.part.bias: mapped.model.get_parameter(site.part.bias)
            for site in self.sites
            if site.part is not None and site.part.bias is not None
        }
        self._frames: dict[int, list[_Frame]] = {}
        self._hooks = HookSet()

    def __enter__(self) -> "ProbeRegistry":
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put all hooks on, or none if one fails.

        Raises:
            CaptureError: the hooks are on already.
        """
        if self._hooks:
            raise CaptureError(f"the probe is already attached to {self._mapped.owner}. Leave its with block first.")
        try:
            self._attach_frames()
            for point in self._points:
                self._attach_point(point)
            if getattr(self._sink, "keeps_gradients", False):
                watch_second_runs(self._hooks, self._root, self._frames, _Frame)
            self._hooks.join(self._mapped.base, self)
            if self.wants_stop:
                for module in dict.fromkeys((self._root, *(stack.base for stack in self._mapped.stacks))):
                    self._hooks.override(module, "forward", functools.partial(self._end_early, module))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take every hook off, and abandon calls that were cut short."""
        self._hooks.remove()
        stale = [frame for frames in self._frames.values() for frame in frames]
        self._frames.clear()
        for frame in stale:
            if frame.call is not None:
                self._sink.abandon(frame.call)

    def _group_points(self) -> list[_Point]:
        """Gather the sites that are read at one module, so that each module is hooked once."""
        grouped: dict[tuple[str, str], list[int]] = {}
        for index, site in enumerate(self.sites):
            grouped.setdefault((site.module, site.takes), []).append(index)
        points = []
        for key, ((path, takes), indices) in enumerate(grouped.items()):
            site = self.sites[indices[0]]
            config = self._mapped.stacks[site.stack or 0].base.config
            # chunk_size_feed_forward runs the FFN several times in one call, on a few positions each
            in_ffn = ".ffn." in site.name or site.kind == "unknown"
            is_chunked = in_ffn and bool(getattr(config, "chunk_size_feed_forward", 0))
            points.append(_Point(key, self._root.get_submodule(path), takes, tuple(indices), is_chunked))
        return points

    # frames and calls

    def _attach_frames(self) -> None:
        """Hook the outermost model and the bases: a call begins at a base and ends where it came from."""
        keep = self._hooks.keep
        bases = [stack.base for stack in self._mapped.stacks]
        if all(self._root is not base for base in bases):
            keep(self._root, self._root.register_forward_pre_hook(self._enter_root))
            keep(self._root, self._root.register_forward_hook(self._leave, always_call=True))
        for number, stack in enumerate(self._mapped.stacks):
            keep(stack.base, stack.base.register_forward_pre_hook(self._make_entry(number, stack), with_kwargs=True))
            leave = functools.partial(self._leave, number=number)
            keep(stack.base, stack.base.register_forward_hook(leave, always_call=True))

    def _enter_root(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._frames.setdefault(threading.get_ident(), []).append(_Frame(module))

    def _make_entry(self, number: int, stack: Stack) -> Callable[..., None]:
        parameters = list(inspect.signature(type(stack.base).forward).parameters)[1:]
        several = len(self._mapped.stacks) > 1
        own = sum(1 << index for index, site in enumerate(self.sites) if site.stack == number)
        after = sum(1 << index for index, site in enumerate(self.sites) if site.stack is None)
        frames, sink, get_ident = self._frames, self._sink, threading.get_ident

        def enter_base(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stack = frames.setdefault(get_ident(), [])
            if not stack or stack[-1].owner is module or number in stack[-1].inside:
                stack.append(_Frame(module))
            frame = stack[-1]
            frame.inside.add(number)
            if frame.call is not None and number in frame.call.contexts:
                # a task model that runs its base twice in one call
                self._end_call(frame, completed=True)
            context = read_context(parameters, args, kwargs)
            if frame.call is not None:  # the other stack of the same call
                frame.call.contexts[number] = context
                frame.call.expected |= own
                return
            # A stack called by itself, as generate() calls an encoder, does not make what comes after all stacks.
            follows = 0 if several and frame.owner is module else after
            call = Call(self._stacks, {number: context}, expected=own | follows)
            sink.begin(call)
            frame.call = call

        return enter_base

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any, number: int = -1) -> None:
        stack = self._frames.get(threading.get_ident())
        if not stack:
            return
        stack[-1].inside.discard(number)
        if stack[-1].owner is module:
            # torch passes None for the output of a forward that raised
            self._end_call(stack.pop(), completed=output is not None)

    def _end_call(self, frame: _Frame, completed: bool) -> None:
        call, frame.call = frame.call, None
        if call is None:
            return
        if call.seen == call.expected:
            self._sink.finish(call)
            return
        self._sink.abandon(call)
        if completed:
            missing = [self.sites[index].name for index in call.made if not call.seen >> index & 1]
            raise CaptureError(
                f"{self._mapped.owner} ran without making {', '.join(map(repr, missing))}: the modules behind these "
                "sites were not called. Leave the sites out, or call the model so that it uses them."
            )

    # values

    def _attach_point(self, point: _Point) -> None:
        if point.takes == "weights":
            self._attach_weights(point)
            return
        frames, get_ident = self._frames, threading.get_ident
        site = self.sites[point.indices[0]]
        if len(point.indices) == 1 and site.call_index is None and site.part is None and not point.is_chunked:
            receive, which = self._receive, point.indices[0]
        else:
            receive, which = self._receive_several, point
        if point.takes == "input":

            def read_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                stack = frames.get(get_ident())
                if stack and (call := stack[-1].call) is not None:
                    receive(call, which, args[0] if args else next(iter(kwargs.values())))  # type: ignore[arg-type]

            self._hooks.keep(point.module, point.module.register_forward_pre_hook(read_input, with_kwargs=True))
        else:

            def read_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                stack = frames.get(get_ident())
                if stack and (call := stack[-1].call) is not None:
                    receive(call, which, output)  # type: ignore[arg-type]

            self._hooks.keep(point.module, point.module.register_forward_hook(read_output))

    def _attach_weights(self, point: _Point) -> None:
        """Watch an attention module and its children, and let its twin work the weights out."""
        frames, get_ident, key = self._frames, threading.get_ident, point.key

        def start(module: nn.Module, args: tuple[Any, ...]) -> None:
            stack = frames.get(get_ident())
            if stack and (call := stack[-1].call) is not None:
                call.twins[key] = EagerTwin(module)

        def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            stack = frames.get(get_ident())
            if stack and (call := stack[-1].call) is not None and key in call.twins:
                call.twins[key].note(name, args[0] if args else next(iter(kwargs.values()), None), output)

        def finish(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            stack = frames.get(get_ident())
            if stack and (call := stack[-1].call) is not None and key in call.twins:
                self._receive_several(call, point, call.twins.pop(key).finish(args, kwargs, output))

        self._hooks.keep(point.module, point.module.register_forward_pre_hook(start))
        for name, child in point.module.named_children():
            hook = functools.partial(_call_note, note, name)
            self._hooks.keep(child, child.register_forward_hook(hook, with_kwargs=True))
        self._hooks.keep(point.module, point.module.register_forward_hook(finish, with_kwargs=True))

    def _receive_several(self, call: Call, point: _Point, value: Any) -> None:
        """Take a value that is a chunk, or one of several calls, or several sites at once."""
        value = value if type(value) is Tensor else self._first_tensor(point.indices[0], value)
        shape, sources = call.context(point.indices[0]).shape, [value]
        if point.is_chunked and shape is not None and _is_chunk(value, shape):
            chunks = call.chunks.setdefault(point.key, [])
            chunks.append(value)
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
                self._receive(call, index, value if site.part is None else self._take_part(site.part, value))

    def _take_part(self, part: Part, value: Tensor) -> Tensor:
        """Take query, key or value out of a fused projection's output."""
        if part.num_heads is None:
            return value.chunk(3, dim=-1)[part.index]
        by_head = value.unflatten(-1, (part.num_heads, 3, -1))
        third = by_head[..., part.index, :].flatten(-2)
        return third if part.bias is None else third + self._biases[part.bias]

    def _join_gradients(self, part: Part | None, gradients: Sequence[Tensor]) -> Tensor:
        """Make the gradient of a value out of those of what it is made of."""
        gradient = gradients[0] if len(gradients) == 1 else torch.cat(list(gradients), dim=1)
        return gradient if part is None else self._take_part(replace(part, bias=None), gradient)

    def _receive(self, call: Call, index: int, value: Any) -> None:
        if type(value) is not Tensor:
            value = self._first_tensor(index, value)
        if call.seen >> index & 1:
            raise CaptureError(
                f"{self.sites[index].name!r} of {self._mapped.owner} was made twice in one call: its module runs "
                "several times, and one value would hide the others. Ask for the sites of single layers."
            )
        self._sink.receive(call, index, value)
        call.seen |= 1 << index
        if call.seen == call.expected and self._hooks.may_stop():
            raise Stop

    def _first_tensor(self, index: int, value: Any) -> Tensor:
        # 4.x DistilBERT puts its weights, of four dimensions, before the hidden state
        items = [item for item in value if isinstance(item, Tensor)] if isinstance(value, (tuple, list)) else [value]
        first = next(
            (item for item in items if isinstance(item, Tensor) and item.ndim != 4), items[0] if items else None
        )
        if not isinstance(first, Tensor):
            first = getattr(value, "last_hidden_state", None)
        if not isinstance(first, Tensor):
            raise CaptureError(
                f"{self.sites[index].name!r} of {self._mapped.owner} gave {type(value).__name__}, not a tensor: "
                "only modules that pass tensors can be read."
            )
        return first

    # early end

    def is_waiting(self) -> bool:
        """Whether the call of this thread has yet to make a site."""
        stack = self._frames.get(threading.get_ident())
        call = stack[-1].call if stack else None
        return call is not None and call.seen != call.expected

    def _end_early(self, module: nn.Module, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Let a stopped forward return None from the module that was called from outside."""
        frames = self._frames

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            except Stop:
                stack = frames.get(threading.get_ident())
                if stack and stack[-1].owner is not module:
                    raise
                return None

        return forward


def _is_chunk(value: Tensor, shape: tuple[int, int]) -> bool:
    return value.ndim == 3 and value.shape[0] == shape[0] and value.shape[1] < shape[1]


def _call_note(note: Callable[..., None], name: str, module: nn.Module, *given: Any) -> None:
    note(name, *given)
