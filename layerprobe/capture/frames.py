"""Track the running calls of a model in each thread.

A frame opens when the model, or a base model inside it, is called from outside, and closes when that module returns. A
call begins in the frame when a base model is entered. Nested calls (a model run inside a sink) stack up; a frame left
behind by Ctrl-C is detected and abandoned when the next one opens.

Hides threads, nesting and interruption. Must never know of hooks or values.
"""

import functools
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType

from torch import Tensor

from layerprobe.capture.calls import Call, Context, Sink, read_context
from layerprobe.errors import CaptureError
from layerprobe.sites.resolve import Site
from layerprobe.sites.weights import ContextComparison, require_same_contexts

__all__ = ["ROOT", "Frames"]

ROOT = -1
_AGAIN = -2


class _Frame:
    """A running call of the model in one thread.

    `runner` is the Python stack frame that runs the call: if it is on no stack any more, the call was interrupted. It
    is None if a compiled graph runs the call. `caller` is the stack frame that called it. `inside` holds the stacks of
    layers whose base model is running. `is_stopped` means that the call ends early with every requested value,
    `has_begun` that a call began in this frame, and `is_asked` that a hooked module ran in it while there was no call.
    """

    __slots__ = ("call", "caller", "has_begun", "inside", "is_asked", "is_stopped", "owner", "runner")

    def __init__(self, owner: int, runner: FrameType | None, call: Call | None = None) -> None:
        self.owner = owner
        self.runner = runner
        self.caller = runner.f_back if runner is not None else None
        self.call = call
        self.is_stopped = self.has_begun = self.is_asked = False
        self.inside: set[int] = set()


class Frames:
    """The frames of one probe.

    Modules are identified by number: the index of the stack for its base model, or `ROOT` for the task model around
    them.

    Args:
        sites: The captured sites.
        num_stacks: Number of stacks in the model.
        sink: Notified when a call begins and ends.
        owner: Name of the model in error messages.
        stops: Whether calls should end after the last requested site.
    """

    def __init__(self, sites: Sequence[Site], num_stacks: int, sink: Sink, owner: str, *, stops: bool = False) -> None:
        self._sites = sites
        self._stacks = [site.stack for site in sites]
        self._of_stack = [self._bits(number) for number in range(num_stacks)]
        self._later = [sum(self._of_stack[number + 1 :]) for number in range(num_stacks)]
        self._after = self._bits(None)
        self._sink = sink
        self._owner = owner
        self._stops = stops
        self.by_thread: dict[int, list[_Frame]] = {}
        # by thread, the modules that catch an early end; None is a torch.compile wrapper
        self._catching: dict[int, list[int | None]] = {}
        # Hooks are attached and removed one by one; calls by other threads meanwhile are not captured.
        self.is_open = False
        # the only thread whose calls are followed; None for all threads
        self.thread: int | None = None
        # whether a call may omit a site that an earlier call produced and a key-value cache still holds
        self.spares_cached = False
        # stacks whose base model names its ids differently from transformers
        self.renaming: set[int] = set()
        self._made = 0

    @property
    def has_made(self) -> bool:
        """Whether any call has produced one of the sites."""
        return self._made != 0

    def _bits(self, stack: int | None) -> int:
        return sum(1 << index for index, site in enumerate(self._sites) if site.stack == stack)

    def is_of_thread(self) -> bool:
        """Return whether calls of this thread are followed."""
        return self.thread is None or self.thread == threading.get_ident()

    def enter_root(self, runner: FrameType | None) -> None:
        """Record that the task model was called."""
        if not self.is_open or not self.is_of_thread():
            return
        frames = self.by_thread.setdefault(threading.get_ident(), [])
        self._drop_interrupted(frames)
        frames.append(_Frame(ROOT, runner))

    def enter_base(self, number: int, context: Context, runner: FrameType | None) -> None:
        """Record that the base model of a stack was called."""
        if not self.is_open or not self.is_of_thread():
            return
        ident = threading.get_ident()
        frames = self.by_thread.get(ident)
        if frames is None:
            frames = self.by_thread[ident] = []
        if frames:
            self._drop_interrupted(frames)
        if not frames or frames[-1].owner == number or number in frames[-1].inside or self._is_past(frames[-1], number):
            frames.append(_Frame(number, runner))
        frame = frames[-1]
        frame.inside.add(number)
        if number in self.renaming and context.shape is None:
            context = replace(context, is_named=False)
        if frame.call is not None and number in frame.call.contexts:
            # a task model that runs its base model twice in one call
            self._end_call(frame, completed=True)
        if frame.call is not None:  # the other stack of the same call
            frame.call.contexts[number] = context
            frame.call.expected |= self._of_stack[number]
            frame.call.ahead = self._later[number]
            return
        # A stack called on its own, as generate() calls an encoder, does not run what follows the stacks; nor does a
        # base model that a sink calls within a call.
        is_alone = frame.owner == number and (len(self._of_stack) > 1 or len(frames) > 1)
        follows = 0 if is_alone else self._after
        ahead = 0 if frame.owner == number else self._later[number]
        call = Call(self._stacks, {number: context}, expected=self._of_stack[number] | follows, ahead=ahead)
        call.is_running = functools.partial(_is_running_in, ident, frame.runner)
        self._sink.begin(call)
        frame.call, frame.has_begun = call, True

    def enter_compiled(
        self, number: int, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None, is_cached: bool
    ) -> None:
        """Record that a running graph has called a module, without a Python stack frame.

        Args:
            number: Number of the module.
            ids, mask, embeds: Arguments of the base model.
            is_cached: Whether a key-value cache was passed too.
        """
        if number == ROOT:
            self.enter_root(None)
            return
        context = read_context({"input_ids": ids, "attention_mask": mask, "inputs_embeds": embeds})
        # a graph compiled for all lengths cannot report the length of a cache
        self.enter_base(number, replace(context, first_position=None) if is_cached else context, None)

    def _is_past(self, frame: _Frame, number: int) -> bool:
        """Return whether the modules after the stacks have begun to run; a base model called then is called by a sink.

        Modules between two stacks belong to no stack either, but then the second stack is still to come.
        """
        call = frame.call
        return call is not None and bool(call.seen & self._after) and max(call.contexts) >= number

    # early end

    def begin_catching(self, number: int | None) -> None:
        """Record that a module which catches an early end starts running."""
        self._catching.setdefault(threading.get_ident(), []).append(number)

    def end_catching(self) -> None:
        """Record that this module has finished."""
        ident = threading.get_ident()
        self._catching[ident].pop()
        if not self._catching[ident]:
            del self._catching[ident]

    def wants_stop(self) -> bool:
        """Return whether this thread's call should end early once no reader is waiting for a value."""
        # checked first: a compiler that traces a layer with its hooks cannot trace thread functions
        if not self._stops or not self.is_of_thread():
            return False
        top, catching = self._top(), self._catching.get(threading.get_ident(), ())
        return top is not None and (top.owner in catching or None in catching)

    def is_within(self, other: "Frames") -> bool:
        """Return whether this thread's call is nested in a call that `other` follows and that continues afterwards."""
        mine, theirs = self._top(), other._top()
        inner, outer = (top.runner if top is not None else None for top in (mine, theirs))
        return inner is not None and outer is not None and inner is not outer and _is_on_stack(outer, inner)

    def is_waiting(self) -> bool:
        """Return whether this thread's call has yet to produce a site."""
        call = self.current()
        return call is not None and (call.seen != call.expected or bool(call.ahead))

    def mark_stopped(self) -> None:
        """End this thread's innermost call as one that has produced every requested site.

        This cannot wait until the frame closes: torch does not report an early end to hooks, so a probe without `stop`
        on the base of a task model would never learn of it.
        """
        top = self._top()
        if top is not None:
            top.is_stopped = True
            self._end_call(top, completed=False)

    def leave(self, number: int, completed: bool, runner: FrameType | None = None) -> None:
        """Record that a module has finished; `completed` is False if it raised or was stopped.

        Args:
            runner: The Python stack frame that reports this, one of those that ran the module. torch also reports calls
                that never began because an earlier hook raised; their stack frame is a different one.
        """
        frames = self.by_thread.get(threading.get_ident())
        if not frames:
            return
        top = frames[-1]
        if not completed and top.owner == number:
            is_known = runner is None or top.runner is None or runner in (top.runner, top.caller)
            if not is_known:
                return
        top.inside.discard(number)
        if top.owner == number:
            self._end_call(frames.pop(), completed)
            if completed and self.is_open and top.is_asked and not top.has_begun:
                raise CaptureError(
                    f"{self._owner} ran without calling its base model, whose calls are followed: it calls a part of "
                    "that. Pass the part that has the layers in place of the model, as model.model.decoder."
                )

    def is_inside(self, number: int) -> bool:
        """Return whether this thread's innermost call is inside this module."""
        top = self._top()
        return top is not None and (top.owner == number or number in top.inside)

    def current(self) -> Call | None:
        """Return the call running in this thread; called when a hooked module runs."""
        top = self._top()
        if top is None:
            return None
        top.is_asked |= top.call is None
        return top.call

    def _top(self) -> _Frame | None:
        frames = self.by_thread.get(threading.get_ident())
        return frames[-1] if frames else None

    def close_top(self) -> None:
        """End this thread's innermost call and close its frame, as one that has produced every requested site."""
        frames = self.by_thread.get(threading.get_ident())
        if frames:
            frames[-1].is_stopped = True
            self._end_call(frames.pop(), completed=False)

    def is_outermost(self, number: int) -> bool:
        """Return whether this thread's innermost frame was opened by this module, or there is none."""
        top = self._top()
        return top is None or top.owner == number

    def open_again(self, call: Call) -> None:
        """Open a frame for a layer recomputed in backward, outside any call of the model."""
        frames = self.by_thread.setdefault(threading.get_ident(), [])
        frames.append(_Frame(_AGAIN, None, call))

    def close_again(self) -> None:
        """Close the frame of a recomputed layer; its call was recorded when it first ran."""
        self.by_thread[threading.get_ident()].pop()

    def drain(self) -> None:
        """Abandon all open calls, in every thread."""
        mine, left = threading.get_ident(), list(self.by_thread.items())
        self.by_thread.clear()
        for ident, frames in left:
            for call in [frame.call for frame in frames if frame.call is not None]:
                call.is_orphan = ident != mine
                self._sink.abandon(call)

    def _drop_interrupted(self, frames: list[_Frame]) -> None:
        # torch notifies hooks of an Exception only, so Ctrl-C leaves its frames behind
        while frames and not _is_running(frames[-1].runner):
            self._end_call(frames.pop(), completed=False)

    def _end_call(self, frame: _Frame, completed: bool) -> None:
        call, frame.call = frame.call, None
        if call is None:
            return
        self._made |= call.seen
        if call.expected and call.seen == call.expected and (completed or frame.is_stopped):
            if call.unchecked:
                self._check_weights(call, call.unchecked)
            self._sink.finish(call)
            return
        # a call with no requested site, such as an encoder run alone for a decoder site, is abandoned, not finished
        self._sink.abandon(call)
        if completed and self.is_open and call.seen != call.expected:
            self._refuse_missing(call, [index for index in call.made if not call.seen >> index & 1])

    def _refuse_missing(self, call: Call, missing: Sequence[int]) -> None:
        """Raise an error for sites that a call did not produce, unless a cache may supply them."""
        is_cached = all(self._sites[index].kind == "source" and _has_cache(call, index) for index in missing)
        if is_cached and self.spares_cached and all(self._made >> index & 1 for index in missing):
            return
        named = f"{self._owner} ran without making {', '.join(repr(self._sites[index].name) for index in missing)}"
        if is_cached:
            raise CaptureError(
                f"{named}: the key-value cache holds it, since an earlier call. Pass use_cache=False, or leave it out."
            )
        raise CaptureError(
            f"{named}: the modules behind these sites were not called. Leave the sites out, or call the model so that "
            "it uses them."
        )

    def _check_weights(self, call: Call, unchecked: Sequence[ContextComparison]) -> None:
        try:
            require_same_contexts(unchecked)
        except BaseException:
            self._sink.abandon(call)
            raise


def _has_cache(call: Call, index: int) -> bool:
    """Return whether a cache holds, or in a compiled graph may hold, tokens that precede the call's."""
    return call.context(index).first_position != 0


def _is_running(runner: FrameType | None) -> bool:
    return _is_on_stack(runner, sys._getframe(1))


def _is_running_in(ident: int, runner: FrameType | None) -> bool:
    """Return whether a thread, usually another one, is still running a stack frame."""
    return _is_on_stack(runner, sys._current_frames().get(ident))


def _is_on_stack(runner: FrameType | None, top: FrameType | None) -> bool:
    while runner is not None and top is not None and top is not runner:
        top = top.f_back
    return top is not None
