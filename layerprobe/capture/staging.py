"""Buffers that values pass through on their way from the model to the writer, each allocated once.

On the CPU a value goes straight into the shard-shaped host buffer: a stage would be a second copy. On CUDA it goes
into a stage on the device and from there, on a copy stream, into a pinned host buffer while the model computes on.
Host buffers take turns, two of them with one writer; when all are busy the forward waits, and the wait is counted.

The only file that knows of CUDA. Must never know what the values mean.
"""

import math
import mmap
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from layerprobe.capture.target import Target
from layerprobe.store.writer import StoredSite

__all__ = [
    "MOST_COPIES",
    "NO_ROOM",
    "BufferPool",
    "CudaStreams",
    "DirectLane",
    "HostBuffer",
    "Lane",
    "PlainCopies",
    "Room",
    "StagedLane",
    "Streams",
    "make_lane",
    "send",
]

Produce = Callable[[Target], None]

# From here on memory begins with a page, so that the disk takes it as it lies: `durable` bounces what is smaller.
_PAGED_BYTES = 1 << 20
_LOOK_AGAIN_S = 1.0
# Beyond so many pieces one gather through an index is quicker than a copy of each: measured on two cores; on CUDA,
# where each is a launch, a guess that no GPU has tried; elsewhere there is always an index.
MOST_COPIES = {"cpu": 64, "cuda": 4}


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device; to CUDA without waiting for what that has yet to do."""
    # from memory that is not pinned, CUDA copies when the model's stream is empty, and the host waits for that
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Room(NamedTuple):
    """Space in a buffer, or use of it: rows, examples, and pairs of a query and a key."""

    rows: int
    examples: int
    pairs: int = 0

    def of(self, kind: str) -> int:
        """Vectors (or pairs) of sites of one kind."""
        return self.rows if kind == "token" else self.examples if kind == "example" else self.pairs

    def plus(self, other: "Room") -> "Room":
        """Add two rooms, field by field."""
        return Room(self.rows + other.rows, self.examples + other.examples, self.pairs + other.pairs)

    def holds(self, wanted: "Room", kinds: Iterable[str]) -> bool:
        """Whether so much goes in of these kinds of sites."""
        return all(wanted.of(kind) <= self.of(kind) for kind in kinds)


NO_ROOM = Room(0, 0)


class HostBuffer:
    """Room for one shard in host memory: a tensor per site.

    Args:
        sites: What will be stored.
        room: How much of each kind at first; grows.
        pinned: Whether the memory is page-locked, so that CUDA can copy into it while it computes.

    Cost: address space at once; memory as it is filled.
    """

    def __init__(self, sites: Sequence[StoredSite], room: Room, pinned: bool) -> None:
        self._sites = sites
        self._pinned = pinned
        self.kinds = {site.kind for site in sites}
        # attention lies flat
        self._flat_widths = [site.width if site.kind == "attention" else 1 for site in sites]
        self.room = room
        self.values = [self._allocate(site, room.of(site.kind)) for site in sites]
        self._scales = [self._allocate_scale(site, room.of(site.kind)) for site in sites]

    def target(self, index: int, start: int, stop: int, overflow: Tensor | None = None) -> Target:
        """Give vectors `[start, stop)` of a site; of attention weights, flat, those of pairs `[start, stop)`."""
        width = self._flat_widths[index]
        return Target(self.values[index], self._scales[index], overflow, start * width, stop * width)

    def fits(self, wanted: Room) -> bool:
        """Whether there is room for so much."""
        return self.room.holds(wanted, self.kinds)

    def grow(self, wanted: Room, used: Room = NO_ROOM) -> None:
        """Make room for more, keeping what is used."""
        if self.fits(wanted):
            return
        old, room = self.room, Room(*map(max, wanted, self.room))
        for index, site in enumerate(self._sites):
            extent = room.of(site.kind)
            if extent == old.of(site.kind):
                continue
            # One site at a time, so that only one is ever held twice; not even that where nothing is used.
            kept = self.target(index, 0, used.of(site.kind))
            if not kept.count:
                kept = Target(torch.empty_like(kept.values))
                self.values[index], self._scales[index] = kept.whole, None
            self.values[index] = self._allocate(site, extent)
            self.values[index][: kept.count].copy_(kept.values)
            scale = self._scales[index] = self._allocate_scale(site, extent)
            if scale is not None and kept.scale is not None:
                scale[: kept.count].copy_(kept.scale)
        self.room = room

    def _allocate(self, site: StoredSite, extent: int) -> Tensor:
        shape = (extent * site.width,) if site.kind == "attention" else (extent, site.width)
        return _allocate(shape, site.dtype, self._pinned)

    def _allocate_scale(self, site: StoredSite, extent: int) -> Tensor | None:
        return _allocate((extent,), torch.float32, self._pinned) if site.dtype == torch.int8 else None


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
    """Make a tensor outside inference mode, where one could not be written from another mode."""
    with torch.inference_mode(False):
        num_bytes = math.prod(shape) * dtype.itemsize
        if pinned or num_bytes < _PAGED_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.zeros(shape, dtype=dtype, pin_memory=pinned)
        # No large pages are asked for: a virtual machine that gives free ones back to its host pays for each anew, at a
        # third of a gigabyte a second, where the small ones at hand cost a fifth of that.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=dtype).view(shape)


class BufferPool:
    """A few host buffers that take turns, each made when it is first needed.

    Args:
        make: Makes a buffer.
        count: How many there are at most.

    `stalled_s` is the time that callers have waited for one.
    """

    def __init__(self, make: Callable[[], HostBuffer], count: int) -> None:
        self._make = make
        self._left = count
        self._free: list[HostBuffer] = []
        self._changed = threading.Condition()
        self.stalled_s = 0.0

    def acquire(self, check: Callable[[], None]) -> HostBuffer:
        """Take a free buffer, waiting for one if need be.

        Args:
            check: Raises if no buffer will ever come free; called before waiting, at each change and now and then.
        """
        start = time.perf_counter()
        with self._changed:
            check()
            if not self._free and self._left:
                self._free.append(self._make())
                self._left -= 1
            while not self._free:
                # not for ever: a writer that dies gives no buffer back
                self._changed.wait(_LOOK_AGAIN_S)
                check()
            buffer = self._free.pop()
        self.stalled_s += time.perf_counter() - start
        return buffer

    def release(self, buffer: HostBuffer) -> None:
        """Give a buffer back."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()


class Lane(Protocol):
    """The way of values from the model's device into a host buffer."""

    pinned: bool
    # whether a value may as well be written to the host buffer by whoever has it
    is_direct: bool

    def put(self, key: int, target: Target, produce: Produce) -> None:
        """Let `produce` make the values of site `key` for a piece of a host buffer."""

    def fence(self) -> Callable[[], None]:
        """Give a function that waits until all that was put so far has arrived."""
        ...

    def shrink(self) -> None:
        """Give back the device's memory, where it has run out."""


def _nothing_to_wait_for() -> None:
    return None


class DirectLane:
    """On the CPU: values are made in the host buffer itself."""

    pinned = False
    is_direct = True

    def put(self, key: int, target: Target, produce: Produce) -> None:
        produce(target)

    def fence(self) -> Callable[[], None]:
        return _nothing_to_wait_for

    def shrink(self) -> None:
        return None


class Streams(Protocol):
    """The few things a staged lane asks of a device; tests give it one that delays every copy."""

    def record(self) -> Any:
        """Mark the point that the model's stream has reached."""

    def hold(self, event: Any) -> None:
        """Let the model's stream wait for an event, without stopping the host."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy on the copy stream once `after` has passed; gives the event of its end."""

    def wait(self, event: Any) -> None:
        """Stop the host until an event has passed."""


class CudaStreams:
    """A copy stream beside the model's own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy_stream = torch.cuda.Stream(device)

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def hold(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._copy_stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()


class PlainCopies:
    """For devices whose copies to the host are over when the call returns: nothing to wait for."""

    def record(self) -> None:
        return None

    def hold(self, event: None) -> None:
        return None

    def copy(self, target: Tensor, source: Tensor, after: None) -> None:
        target.copy_(source)

    def wait(self, event: None) -> None:
        return None


@dataclass(eq=False)
class _Stage:
    values: Tensor
    scale: Tensor | None
    copied: Any = None


class StagedLane:
    """On an accelerator: values are made in a stage on the device and copied to the host behind the model's back.

    Each site has two stages that take turns, so the model may make the next batch's values while the last ones are
    still on their way.
    """

    is_direct = False

    def __init__(self, device: torch.device, streams: Streams, pinned: bool = True) -> None:
        self.pinned = pinned
        self._device = device
        self._streams = streams
        self._stages: dict[int, list[_Stage]] = {}
        self._last: Any = None

    def put(self, key: int, target: Target, produce: Produce) -> None:
        stages = self._stages.setdefault(key, [])
        if len(stages) < 2:
            stages.append(self._make_stage(target))
        else:
            stages.append(stages.pop(0))
        stage = stages[-1]
        if stage.copied is not None:
            self._streams.hold(stage.copied)
        count = target.count
        if len(stage.values) < count:
            if stage.copied is not None:
                self._streams.wait(stage.copied)
            # the old one's memory is free before the new one is made
            del stage, stages[-1]
            stage = self._make_stage(target)
            stages.append(stage)
        staged = Target(stage.values, stage.scale, target.overflow, 0, count)
        produce(staged)
        made = self._streams.record()
        if target.scale is not None:
            assert staged.scale is not None
            self._streams.copy(target.scale, staged.scale, made)
        # copies run in the order given, so the last one's event stands for both
        stage.copied = self._last = self._streams.copy(target.values, staged.values, made)

    def fence(self) -> Callable[[], None]:
        return partial(self._streams.wait, self._last) if self._last is not None else _nothing_to_wait_for

    def shrink(self) -> None:
        self.fence()()
        self._stages.clear()

    def _make_stage(self, target: Target) -> _Stage:
        # a little larger than asked for: batches differ, and one that does not fit costs a wait
        count = target.count + target.count // 8
        with torch.inference_mode(False):
            values = torch.empty(count, *target.whole.shape[1:], dtype=target.whole.dtype, device=self._device)
            scale = None if target.scales is None else torch.empty(count, dtype=torch.float32, device=self._device)
        return _Stage(values, scale)


def make_lane(device: torch.device) -> Lane:
    """Choose the way from a device to the host."""
    if device.type == "cuda":
        return StagedLane(device, CudaStreams(device))
    if device.type == "cpu":
        return DirectLane()
    # Elsewhere (mps, xpu) there is one stream, and a copy to the host waits by itself.
    return StagedLane(device, PlainCopies(), pinned=False)
