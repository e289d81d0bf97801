"""Hooks on a model: all of them or none, and every one gone at the end.

The registry turns sites into forward hooks and tells a sink of three things: a call of the base model begins (with
its ids and mask), a site's value was made, the call is over. State lives per thread and per call, so several threads
may run one model under one registry.

Hides torch's hook machinery and the early end of a forward. Must never know what becomes of the values.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layerprobe.errors import CaptureError
from layerprobe.sites.resolve import Site, map_model

__all__ = ["Call", "ProbeRegistry", "Sink"]


@dataclass(eq=False)
class Call:
    """One call of the base model, as the sink sees it.

    Args:
        input_ids: `[B, S]`, or None when the model was called with embeddings.
        attention_mask: As it was passed, or None.
        shape: B and S, or None where neither ids nor embeddings were passed.
        state: Room for the sink to keep what it needs for this call.
    """

    input_ids: Tensor | None
    attention_mask: Tensor | None
    shape: tuple[int, int] | None
    state: Any = None
    seen: int = 0
    chunks: dict[int, list[Tensor]] = field(default_factory=dict)


class Sink(Protocol):
    """Where captured values go.

    Methods are called in the thread that runs the model. `index` counts the sites given to `open`.
    """

    def open(self, sites: Sequence[Site]) -> None:
        """Get ready for these sites; nothing is attached to the model yet."""

    def begin(self, call: Call) -> None:
        """Take note that the base model was called."""

    def receive(self, call: Call, index: int, value: Tensor) -> None:
        """Take the value of a site, exactly as the model made it."""

    def finish(self, call: Call) -> None:
        """Take note that every site of this call has been received."""

    def abandon(self, call: Call) -> None:
        """Forget a call that ended before all its sites were made."""

    def close(self, error: BaseException | None) -> None:
        """Release everything; `error` is what ended the probe, or None."""


class _Stop(BaseException):
    """Ends a forward after the last asked site; a BaseException so that no `except Exception` in a model stops it."""


@dataclass(eq=False)
class _Frame:
    """A running call of the probed model in one thread, opened by whichever module was called from outside.

    `runner` is the interpreter's frame that runs it: one that is on no stack any more was cut short.
    """

    owner: nn.Module
    runner: FrameType
    call: Call | None = None


class ProbeRegistry:
    """Attach hooks for sites of a model and remove them again.

    A context manager: `__enter__` attaches all hooks or none, `__exit__` removes every one.

    Args:
        model: A supported model.
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
        self._root = model
        self._base = mapped.base
        self._owner = mapped.owner
        self._sink = sink
        self._stop = stop
        self._all_seen = (1 << len(self.sites)) - 1
        self._modules = [model.get_submodule(site.module) for site in self.sites]
        self.num_layers = mapped.num_layers
        # chunk_size_feed_forward runs the FFN several times in one call, on a few positions each
        is_chunked = bool(getattr(self._base.config, "chunk_size_feed_forward", 0))
        in_ffn = (".ffn." in site.name or site.kind == "unknown" for site in self.sites)
        self._chunked = {index for index, is_part in enumerate(in_ffn) if is_chunked and is_part}
        self._parameters = list(inspect.signature(type(self._base).forward).parameters)[1:]
        self._frames: dict[int, list[_Frame]] = {}
        self._handles: list[Any] = []
        self._wrapped: list[tuple[nn.Module, Any]] = []

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
        if self._handles:
            raise CaptureError(f"the probe is already attached to {self._owner}. Leave its with block first.")
        try:
            self._attach_frames()
            for index, (site, module) in enumerate(zip(self.sites, self._modules, strict=True)):
                self._attach_site(index, site, module)
            if self._stop:
                for module in dict.fromkeys((self._root, self._base)):
                    self._wrap_forward(module)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take every hook off, and abandon calls that were cut short."""
        while self._wrapped:
            module, instance_forward = self._wrapped.pop()
            if instance_forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = instance_forward
        while self._handles:
            self._handles.pop().remove()
        stale = [frame for frames in self._frames.values() for frame in frames]
        self._frames.clear()
        for frame in stale:
            if frame.call is not None:
                self._sink.abandon(frame.call)

    def _attach_frames(self) -> None:
        """Hook the outermost model and the base: a call begins at the base and ends where it came from."""
        keep = self._handles.append
        if self._root is not self._base:
            keep(self._root.register_forward_pre_hook(self._enter_root))
            keep(self._root.register_forward_hook(self._leave, always_call=True))
        keep(self._base.register_forward_pre_hook(self._enter_base, with_kwargs=True))
        keep(self._base.register_forward_hook(self._leave, always_call=True))

    def _attach_site(self, index: int, site: Site, module: nn.Module) -> None:
        frames, get_ident, receive = self._frames, threading.get_ident, self._receive
        if site.takes == "input":

            def read_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                stack = frames.get(get_ident())
                if stack and (call := stack[-1].call) is not None:
                    receive(call, index, args[0] if args else next(iter(kwargs.values())))

            self._handles.append(module.register_forward_pre_hook(read_input, with_kwargs=True))
        else:

            def read_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                stack = frames.get(get_ident())
                if stack and (call := stack[-1].call) is not None:
                    receive(call, index, output)

            self._handles.append(module.register_forward_hook(read_output))

    def _enter_root(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        stack = self._frames.setdefault(threading.get_ident(), [])
        self._drop_interrupted(stack)
        stack.append(_Frame(module, sys._getframe(2)))

    def _enter_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = self._frames.setdefault(threading.get_ident(), [])
        self._drop_interrupted(stack)
        if not stack or stack[-1].owner is module:
            stack.append(_Frame(module, sys._getframe(2)))
        frame = stack[-1]
        if frame.call is not None:  # a task model that runs its base twice in one call
            self._end_call(frame, completed=True)
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        input_ids = given.get("input_ids")
        tokens = input_ids if input_ids is not None else given.get("inputs_embeds")
        shape = (tokens.shape[0], tokens.shape[1]) if isinstance(tokens, Tensor) else None
        call = Call(input_ids, given.get("attention_mask"), shape)
        self._sink.begin(call)
        frame.call = call

    def _drop_interrupted(self, stack: list[_Frame]) -> None:
        """Abandon calls that Ctrl-C ended: torch tells hooks of an Exception, of nothing else."""
        while stack and not _is_running(stack[-1].runner):
            self._end_call(stack.pop(), completed=False)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stack = self._frames.get(threading.get_ident())
        if stack and stack[-1].owner is module:
            # torch passes None for the output of a forward that raised
            self._end_call(stack.pop(), completed=output is not None)

    def _end_call(self, frame: _Frame, completed: bool) -> None:
        call, frame.call = frame.call, None
        if call is None:
            return
        if call.seen == self._all_seen:
            self._sink.finish(call)
            return
        self._sink.abandon(call)
        if completed:
            missing = [site.name for index, site in enumerate(self.sites) if not call.seen >> index & 1]
            raise CaptureError(
                f"{self._owner} ran without making {', '.join(map(repr, missing))}: the modules behind these sites "
                "were not called. Leave the sites out, or call the model so that it uses them."
            )

    def _receive(self, call: Call, index: int, value: Any) -> None:
        if type(value) is not Tensor:
            value = self._first_tensor(index, value)
        if index in self._chunked and call.shape is not None and _is_chunk(value, call.shape):
            chunks = call.chunks.setdefault(index, [])
            chunks.append(value)
            if sum(chunk.shape[1] for chunk in chunks) < call.shape[1]:
                return
            value = torch.cat(call.chunks.pop(index), dim=1)
        self._sink.receive(call, index, value)
        call.seen |= 1 << index
        if self._stop and call.seen == self._all_seen:
            raise _Stop

    def _first_tensor(self, index: int, value: Any) -> Tensor:
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if not isinstance(first, Tensor):
            first = getattr(value, "last_hidden_state", None)
        if not isinstance(first, Tensor):
            raise CaptureError(
                f"{self.sites[index].name!r} of {self._owner} gave {type(value).__name__}, not a tensor: "
                "only modules that pass tensors can be read."
            )
        return first

    def _wrap_forward(self, module: nn.Module) -> None:
        """Let a stopped forward return None from the module that was called from outside."""
        inner: Callable[..., Any] = module.forward
        frames = self._frames

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            except _Stop:
                stack = frames.get(threading.get_ident())
                if stack and stack[-1].owner is not module:
                    raise
                return None

        self._wrapped.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward


def _is_running(runner: FrameType) -> bool:
    frame = sys._getframe(1)
    while frame is not None and frame is not runner:
        frame = frame.f_back
    return frame is runner


def _is_chunk(value: Tensor, shape: tuple[int, int]) -> bool:
    return value.ndim == 3 and value.shape[0] == shape[0] and value.shape[1] < shape[1]
