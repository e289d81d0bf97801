"""Buffers that values pass through on their way from the model to the writer, each allocated once.

On the CPU a value goes straight into the shard-shaped host buffer: a stage would be a second copy. On CUDA it goes
into a stage on the device and from there, on a copy stream, into a pinned host buffer while the model computes on.
Host buffers take turns, two of them with one writer; when all are busy the forward waits, and the wait is counted.

With `streams`, the only file of capture that owns streams, stages and pinned memory. Must never know what the values
mean.
"""

import contextlib
import math
import mmap
import queue
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from layerprobe.capture.streams import CudaStreams, PlainCopies, Streams
from layerprobe.capture.target import Target
from layerprobe.store.description import StoredSite

__all__ = [
    "MOST_COPIES",
    "NO_ROOM",
    "BufferPool",
    "DirectLane",
    "HostBuffer",
    "Lane",
    "Room",
    "StagedLane",
    "fetch",
    "hold_stages",
    "make_lane",
    "send",
]

Produce = Callable[[Target], None]

# From here on memory begins with a page, so that the disk takes it as it lies: `durable` bounces what is smaller.
_PAGED_BYTES = 1 << 20
_LOOK_AGAIN_S = 1.0
# So often is a device asked whether it still computes, while the host has nothing to give it.
_LOOK_AT_DEVICE_S = 0.01
# Of a site on a device; each is larger than asked for by this part: batches differ, and one that does not fit waits.
_NUM_STAGES, _SPARE_PART = 2, 8
# Beyond so many pieces one gather through an index is quicker than a copy of each: measured on two cores; on CUDA,
# where each is a launch, a guess that no GPU has tried; elsewhere there is always an index.
MOST_COPIES = {"cpu": 64, "cuda": 4}


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device; to CUDA without waiting for what that has yet to do."""
    if device.type != "cuda":
        # mps would read memory that by then is another tensor's (pytorch/pytorch#189690)
        return tensor.to(device)
    # from memory that is not pinned, CUDA copies when the model's stream is empty, and the host waits for that
    return tensor.pin_memory().to(device, non_blocking=True)


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the host, and wait for a device once for all of them."""
    # to memory that torch pins for it; elsewhere a copy that does not wait could be read before it has happened
    fetched = [tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return fetched


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
        if pinned:  # nothing is read that was not written, and zeros would be a pass over all of it
            return torch.empty(shape, dtype=dtype, pin_memory=True, device="cpu")
        if num_bytes < _PAGED_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.zeros(shape, dtype=dtype, device="cpu")
        # No large pages are asked for: a virtual machine that gives free ones back to its host pays for each anew, at a
        # third of a gigabyte a second, where the small ones at hand cost a fifth of that.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=dtype).view(shape)


class BufferPool:
    """A few host buffers that take turns, each made when it is first needed.

    Args:
        make: Makes a buffer.
        count: How many there are at most.
        is_busy: Asked while a caller waits: whether its device still computes what it was given before.

    `stalled_s` is the time that callers have waited for one while their device had nothing to do: a host that runs
    ahead of a GPU waits for buffers that the GPU has yet to fill, and nothing is lost by that.
    """

    def __init__(self, make: Callable[[], HostBuffer], count: int, is_busy: Callable[[], bool] = lambda: False) -> None:
        self._make = make
        self._is_busy = is_busy
        self._count = count
        # not a `Condition`: Ctrl-C within one may leave its lock held, and the writer would wait for it for ever
        self._free: queue.SimpleQueue[HostBuffer] = queue.SimpleQueue()
        # one that Ctrl-C has lost on its way from hand to hand is made again
        self._made: list[weakref.ref[HostBuffer]] = []
        self.stalled_s = 0.0

    def acquire(self, check: Callable[[], None]) -> HostBuffer:
        """Take a free buffer, waiting for one if need be; by one thread at a time.

        Args:
            check: Raises if no buffer will ever come free; called before waiting, at each change and now and then.
        """
        check()
        buffer = self._find()
        while buffer is None:
            is_busy, start = self._is_busy(), time.perf_counter()
            # not for ever: a writer that dies gives no buffer back
            with contextlib.suppress(queue.Empty):
                buffer = self._free.get(timeout=_LOOK_AT_DEVICE_S if is_busy else _LOOK_AGAIN_S)
            if not is_busy:
                self.stalled_s += time.perf_counter() - start
            check()
            buffer = buffer or self._find()
        return buffer

    def _find(self) -> HostBuffer | None:
        """Take a free buffer, or make one; None where all are busy."""
        with contextlib.suppress(queue.Empty):
            return self._free.get_nowait()
        self._made = [made for made in self._made if made() is not None]
        if len(self._made) >= self._count:
            return None
        buffer = self._make()
        self._made.append(weakref.ref(buffer))
        return buffer

    def release(self, buffer: HostBuffer) -> None:
        """Give a buffer back."""
        self._free.put(buffer)


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

    def joined(self) -> AbstractContextManager[object]:
        """Let the device do what is asked of it meanwhile after what it was asked in earlier such blocks."""
        ...

    def is_busy(self) -> bool:
        """Whether the device has yet to make what was put."""
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

    def joined(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def is_busy(self) -> bool:
        return False

    def shrink(self) -> None:
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
        self._made: Any = None
        self._last: Any = None
        self._joined: Any = None

    def put(self, key: int, target: Target, produce: Produce) -> None:
        stages = self._stages.setdefault(key, [])
        if len(stages) < _NUM_STAGES:
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
        made = self._made = self._streams.record()
        if target.scale is not None:
            assert staged.scale is not None
            self._streams.copy(target.scale, staged.scale, made)
        # copies run in the order given, so the last one's event stands for both
        stage.copied = self._last = self._streams.copy(target.values, staged.values, made)

    def fence(self) -> Callable[[], None]:
        return partial(self._streams.wait, self._last) if self._last is not None else _nothing_to_wait_for

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        # calls may be made in several streams, of which none waits for another
        if self._joined is not None:
            self._streams.hold(self._joined)
        yield
        self._joined = self._streams.record()

    def is_busy(self) -> bool:
        return self._made is not None and not self._streams.has_passed(self._made)

    def shrink(self) -> None:
        self.fence()()
        self._stages.clear()

    def _make_stage(self, target: Target) -> _Stage:
        count = _add_spare(target.count)
        with torch.inference_mode(False):
            values = torch.empty(count, *target.whole.shape[1:], dtype=target.whole.dtype, device=self._device)
            scale = None if target.scales is None else torch.empty(count, dtype=torch.float32, device=self._device)
        return _Stage(values, scale)


def _add_spare(count: int) -> int:
    return count + count // _SPARE_PART


def hold_stages(device: torch.device, sites: Sequence[StoredSite], room: Room) -> Tensor:
    """Take as much of a device's memory as the stages of these sites do for batches of so much; on a CPU none.

    Returns:
        What holds it: uint8, of no values.
    """
    num_bytes = 0
    for site in sites if device.type != "cpu" else ():
        # attention lies flat
        is_flat = site.kind == "attention"
        count = _add_spare(room.of(site.kind) * (site.width if is_flat else 1))
        num_bytes += _NUM_STAGES * count * (site.dtype.itemsize if is_flat else site.bytes_per_vector)
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def make_lane(device: torch.device) -> Lane:
    """Choose the way from a device to the host."""
    if device.type == "cuda":
        return StagedLane(device, CudaStreams(device))
    if device.type == "cpu":
        return DirectLane()
    # Elsewhere (mps, xpu) there is one stream, and a copy to the host waits by itself.
    return StagedLane(device, PlainCopies(), pinned=False)
