"""Buffers between the model and the writer, each allocated once.

On the CPU a value is written directly into the shard-shaped host buffer, since a stage would add a copy. On CUDA it is
written to a stage on the device and copied from there, on a copy stream, into a pinned host buffer while the model
continues. Host buffers rotate, two of them with one writer; if all are in use the forward pass waits, and the wait is
timed.

Apart from `streams`, the only file in capture that owns streams, stages and pinned memory. Must never know what the
values mean.
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

# Buffers of at least this size are page-aligned, so that the disk can take them as they are: `durable` goes through a
# bounce buffer for smaller ones.
_PAGED_BYTES = 1 << 20
_LOOK_AGAIN_S = 1.0
# Interval for polling whether the device still computes, while the host has nothing to give it.
_LOOK_AT_DEVICE_S = 0.01
# Stages per site on a device, and the fraction (1/8) by which each is larger than requested: batches differ in size,
# and growing a stage means waiting for its copy.
_NUM_STAGES, _SPARE_PART = 2, 8
# Above this number of runs one index gather is faster than a copy per run. The CPU value was measured on two cores; the
# CUDA value, where each copy is a kernel launch, is an estimate. Other devices always use an index.
MOST_COPIES = {"cpu": 64, "cuda": 4}


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device; for CUDA, without waiting for the device's pending work."""
    if device.type != "cuda":
        # a non-blocking copy to mps could read memory that has been reused meanwhile (pytorch/pytorch#189690)
        return tensor.to(device)
    # from unpinned memory, the copy would block the host until the model's stream is empty
    return tensor.pin_memory().to(device, non_blocking=True)


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the host, synchronising once per device."""
    # torch pins the destination for CUDA; on other devices a non-blocking copy could be read before it is complete
    fetched = [tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return fetched


class Room(NamedTuple):
    """Capacity or use of a buffer: rows, examples, and query-key pairs."""

    rows: int
    examples: int
    pairs: int = 0

    def of(self, kind: str) -> int:
        """Return the number of vectors (or pairs) for sites of one kind."""
        return self.rows if kind == "token" else self.examples if kind == "example" else self.pairs

    def plus(self, other: "Room") -> "Room":
        """Add two rooms, field by field."""
        return Room(self.rows + other.rows, self.examples + other.examples, self.pairs + other.pairs)

    def holds(self, wanted: "Room", kinds: Iterable[str]) -> bool:
        """Return whether `wanted` fits, for these kinds of sites."""
        return all(wanted.of(kind) <= self.of(kind) for kind in kinds)


NO_ROOM = Room(0, 0)


class HostBuffer:
    """Host memory for one shard: one tensor per site.

    Args:
        sites: The sites to store.
        room: Initial capacity of each kind; grows.
        pinned: Whether the memory is page-locked, so that CUDA can copy into it while it computes.

    Cost: address space at once; physical memory as it is filled.
    """

    def __init__(self, sites: Sequence[StoredSite], room: Room, pinned: bool) -> None:
        self._sites = sites
        self._pinned = pinned
        self.kinds = {site.kind for site in sites}
        # attention weights are stored flat
        self._flat_widths = [site.width if site.kind == "attention" else 1 for site in sites]
        self.room = room
        self.values = [self._allocate(site, room.of(site.kind)) for site in sites]
        self._scales = [self._allocate_scale(site, room.of(site.kind)) for site in sites]

    def target(self, index: int, start: int, stop: int, overflow: Tensor | None = None) -> Target:
        """Return the target for vectors `[start, stop)` of a site; for attention, pairs `[start, stop)`, flat."""
        width = self._flat_widths[index]
        return Target(self.values[index], self._scales[index], overflow, start * width, stop * width)

    def fits(self, wanted: Room) -> bool:
        """Return whether `wanted` fits into the buffer."""
        return self.room.holds(wanted, self.kinds)

    def grow(self, wanted: Room, used: Room = NO_ROOM) -> None:
        """Grow the buffer to hold `wanted`, keeping the used part."""
        if self.fits(wanted):
            return
        old, room = self.room, Room(*map(max, wanted, self.room))
        for index, site in enumerate(self._sites):
            extent = room.of(site.kind)
            if extent == old.of(site.kind):
                continue
            # One site at a time, so that at most one is held twice; an unused one is freed before it is replaced.
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
    """Allocate a tensor outside inference mode; an inference tensor could not be written outside that mode."""
    with torch.inference_mode(False):
        num_bytes = math.prod(shape) * dtype.itemsize
        if pinned:  # unwritten memory is never read, and zeroing would cost a pass over it
            return torch.empty(shape, dtype=dtype, pin_memory=True, device="cpu")
        if num_bytes < _PAGED_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.zeros(shape, dtype=dtype, device="cpu")
        # No huge pages: on a virtual machine that returns free memory to its host, each must be faulted in anew, at a
        # third of a gigabyte per second; small pages already at hand cost a fifth of that.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=dtype).view(shape)


class BufferPool:
    """A rotating pool of host buffers, each created on first use.

    Args:
        make: Creates a buffer.
        count: Maximum number of buffers.
        is_busy: Called while a caller waits: whether its device still has earlier work to do.

    `stalled_s` counts only waits during which the device was idle: a host that runs ahead of a GPU waits for buffers
    that the GPU has yet to fill, at no loss.
    """

    def __init__(self, make: Callable[[], HostBuffer], count: int, is_busy: Callable[[], bool] = lambda: False) -> None:
        self._make = make
        self._is_busy = is_busy
        self._count = count
        # not a `Condition`: Ctrl-C inside one may leave its lock held, and the writer would block forever
        self._free: queue.SimpleQueue[HostBuffer] = queue.SimpleQueue()
        # weak references: a buffer that Ctrl-C drops between acquire and release is replaced
        self._made: list[weakref.ref[HostBuffer]] = []
        self.stalled_s = 0.0

    def acquire(self, check: Callable[[], None]) -> HostBuffer:
        """Take a free buffer, waiting if necessary. Only one thread may call this at a time.

        Args:
            check: Raises if no buffer will ever become free; called before waiting and after each wait.
        """
        check()
        buffer = self._find()
        while buffer is None:
            is_busy, start = self._is_busy(), time.perf_counter()
            # with a timeout, because a writer that dies returns no buffer
            with contextlib.suppress(queue.Empty):
                buffer = self._free.get(timeout=_LOOK_AT_DEVICE_S if is_busy else _LOOK_AGAIN_S)
            if not is_busy:
                self.stalled_s += time.perf_counter() - start
            check()
            buffer = buffer or self._find()
        return buffer

    def _find(self) -> HostBuffer | None:
        """Return a free buffer or create one; None if all are in use."""
        with contextlib.suppress(queue.Empty):
            return self._free.get_nowait()
        self._made = [made for made in self._made if made() is not None]
        if len(self._made) >= self._count:
            return None
        buffer = self._make()
        self._made.append(weakref.ref(buffer))
        return buffer

    def release(self, buffer: HostBuffer) -> None:
        """Return a buffer to the pool."""
        self._free.put(buffer)


class Lane(Protocol):
    """The path of values from the model's device into a host buffer."""

    pinned: bool
    # whether the caller may write values to the host buffer directly
    is_direct: bool

    def put(self, key: int, target: Target, produce: Produce) -> None:
        """Have `produce` compute the values of site `key` for a slice of a host buffer."""

    def fence(self) -> Callable[[], None]:
        """Return a function that waits until everything put so far has arrived."""
        ...

    def joined(self) -> AbstractContextManager[object]:
        """Return a context whose device work is ordered after that of earlier such contexts."""
        ...

    def is_busy(self) -> bool:
        """Return whether the device has yet to compute what was put."""
        ...

    def shrink(self) -> None:
        """Free the lane's device memory, after an out-of-memory error."""


def _nothing_to_wait_for() -> None:
    return None


class DirectLane:
    """The lane for the CPU: values are written directly into the host buffer."""

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
    """The lane for accelerators: values are staged on the device and copied to the host asynchronously.

    Each site has two alternating stages, so the model can compute the next batch's values while the previous ones are
    still being copied.
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
            # free the old stage before allocating the new one
            del stage, stages[-1]
            stage = self._make_stage(target)
            stages.append(stage)
        staged = Target(stage.values, stage.scale, target.overflow, 0, count)
        produce(staged)
        made = self._made = self._streams.record()
        if target.scale is not None:
            assert staged.scale is not None
            self._streams.copy(target.scale, staged.scale, made)
        # copies run in order, so the last event covers both
        stage.copied = self._last = self._streams.copy(target.values, staged.values, made)

    def fence(self) -> Callable[[], None]:
        return partial(self._streams.wait, self._last) if self._last is not None else _nothing_to_wait_for

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        # calls may run in different streams that do not wait for one another
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
    """Allocate as much device memory as these sites' stages need for batches of this size; none on a CPU.

    Returns:
        uint8 tensor that holds the memory; its content is undefined.
    """
    num_bytes = 0
    for site in sites if device.type != "cpu" else ():
        # attention weights are stored flat
        is_flat = site.kind == "attention"
        count = _add_spare(room.of(site.kind) * (site.width if is_flat else 1))
        num_bytes += _NUM_STAGES * count * (site.dtype.itemsize if is_flat else site.bytes_per_vector)
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def make_lane(device: torch.device) -> Lane:
    """Choose the lane from a device to the host."""
    if device.type == "cuda":
        return StagedLane(device, CudaStreams(device))
    if device.type == "cpu":
        return DirectLane()
    # Other devices (mps, xpu) use one stream, and a copy to the host blocks.
    return StagedLane(device, PlainCopies(), pinned=False)
