"""One shard elsewhere than on a disk: header, rows and whole tensors by byte range.

One example of one site costs its own bytes and, the first time in a shard, the first 64 KiB. Whole tensors are fetched
in pieces, several at once, held against their checksums, and kept for as long as a bounded cache has room. Rows fetched
by range cannot be held against the checksum of the whole; that they come in full is seen.

Hides threads and the cache. Must never know of sites, or of what kind of place gives the bytes.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from layerprobe.errors import FormatError, StoreError
from layerprobe.store.format import ShardHeader, TensorEntry, checksum, load_start
from layerprobe.store.places import Place
from layerprobe.store.shards import ShardInfo, check_header, count_pairs, read_order

__all__ = ["RangedShard", "TensorCache"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")

# Of one request: large enough that a server's answer time is small beside it.
_PIECE_BYTES = 8 << 20
_NUM_REQUESTS = 8
_NUM_TENSORS = 4
# Rows are mixed over a GiB at a time; what is fetched ahead of them needs room beside it.
_CACHE_BYTES = 2 << 30


class TensorCache:
    """Whole tensors, fetched by threads, the latest kept. One per open store.

    Args:
        most_bytes: Kept at most; one tensor is kept however large it is.
    """

    def __init__(self, most_bytes: int = _CACHE_BYTES) -> None:
        self._most_bytes = most_bytes
        self._reset()

    def __reduce__(self) -> "tuple[type[TensorCache], tuple[int]]":
        return TensorCache, (self._most_bytes,)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, str], tuple[Future[Tensor], int]] = OrderedDict()
        self._num_bytes = 0
        self._pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None

    def close(self) -> None:
        """Let go of everything and end the threads."""
        with self._lock:
            pools, self._pools = self._pools, None
            self._held.clear()
            self._num_bytes = 0
        for pool in pools or ():
            pool.shutdown(cancel_futures=True)

    def map(self, ask: Callable[[Item], Answer], items: Iterable[Item]) -> Iterator[Answer]:
        """Make several requests at once; answers come in the order of the items."""
        return self._start()[1].map(ask, items)

    def find(self, key: tuple[str, str]) -> Tensor | None:
        """Give a tensor that is here or on its way; None where it was not asked for, or did not come.

        Raises:
            FormatError: it came, and is damaged.
        """
        held = self._held.get(key) if self._pid == os.getpid() else None
        try:
            return held[0].result() if held is not None else None
        except FormatError:
            raise
        except StoreError:
            return None

    def begin(self, key: tuple[str, str], size: int, load: Callable[[], Tensor]) -> Future[Tensor]:
        """Have a tensor fetched, unless it is here or on its way."""
        tensors, _ = self._start()
        with self._lock:
            if key in self._held and not _has_failed(self._held[key][0]):
                self._held.move_to_end(key)
                return self._held[key][0]
            self._forget(key)
            while self._held and self._num_bytes + size > self._most_bytes:
                self._forget(next(iter(self._held)))
            future = tensors.submit(load)
            self._held[key] = future, size
            self._num_bytes += size
            return future

    def _start(self) -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
        """Give the threads that wait for tensors and those that wait for requests."""
        if self._pid != os.getpid():  # forked: the threads stayed behind
            self._reset()
        with self._lock:
            if self._pools is None:
                self._pools = (
                    ThreadPoolExecutor(_NUM_TENSORS, "layerprobe-tensors"),
                    ThreadPoolExecutor(_NUM_REQUESTS, "layerprobe-requests"),
                )
            return self._pools

    def _forget(self, key: tuple[str, str]) -> None:
        if key in self._held:
            # not cancelled: someone may be waiting for it
            self._num_bytes -= self._held.pop(key)[1]


class RangedShard:
    """A shard whose bytes are asked for one by one.

    Args:
        place: Where the store lies.
        info: What the index says of the shard.
        fingerprint: Of the store's plan.
        check: Compare whole tensors with their checksums.
        cache: Of the store.

    Raises:
        FormatError: the file is damaged, or of another run.
        StoreError: it cannot be read.

    Cost: two requests and 64 KiB, as long as header, ordinals and offsets fit in those.
    """

    def __init__(self, place: Place, info: ShardInfo, fingerprint: str, check: bool, cache: TensorCache) -> None:
        self._place = place
        self._file = info.file
        self._label = place.label(info.file)
        self._check = check
        self._cache = cache
        self.header: ShardHeader
        self.header, first = load_start(place, info.file)
        check_header(self._label, self.header, info, fingerprint)
        self._offsets = self._read_small("offsets", first)
        self.offsets, self.position = read_order(
            self._label, self.header, self._read_small("example", first), self._offsets
        )

    @cached_property
    def pairs_before(self) -> list[int]:
        """For each example the pairs of tokens of those that lie before it."""
        return count_pairs(self._offsets)

    def tensor(self, name: str) -> Tensor:
        """Fetch a whole tensor and hold it against its checksum."""
        if name == "offsets":
            return self._offsets
        return self._begin(name).result()

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Fetch some rows of a tensor, and no others."""
        entry = self._entry(name)
        if (whole := self._cache.find((self._file, name))) is not None:
            return whole[start:stop]
        count = entry.shape[0] if entry.shape else 0
        start, stop = min(start, count), min(stop, count)
        row_bytes = (entry.stop - entry.start) // count if count else 0
        first, last = entry.start + start * row_bytes, entry.start + stop * row_bytes
        return _view(bytearray(self._place.read(self._file, first, last)), entry, (stop - start, *entry.shape[1:]))

    def prefetch(self, names: Sequence[str]) -> None:
        """Begin to fetch whole tensors."""
        for name in names:
            if name in self.header.tensors:
                self._begin(name)

    def span(self, ordinal: int) -> tuple[int, int, int]:
        """Find an example: its position in the shard, and its first and last row."""
        position = self.position[ordinal - self.header.first_example]
        return position, self.offsets[position], self.offsets[position + 1]

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.header.tensors[name]
        except KeyError as error:
            raise FormatError(f"{self._label}: has no tensor {name!r}.") from error

    def _begin(self, name: str) -> "Future[Tensor]":
        entry = self._entry(name)
        return self._cache.begin((self._file, name), entry.stop - entry.start, partial(self._load, name))

    def _load(self, name: str) -> Tensor:
        entry = self._entry(name)
        data = bytearray(entry.stop - entry.start)

        def fetch(start: int) -> None:
            stop = min(start + _PIECE_BYTES, entry.stop)
            data[start - entry.start : stop - entry.start] = self._place.read(self._file, start, stop)

        for _ in self._cache.map(fetch, range(entry.start, entry.stop, _PIECE_BYTES)):
            pass
        return self._finish(name, data)

    def _read_small(self, name: str, first: bytes) -> Tensor:
        """Take a tensor out of the first bytes of the file, or fetch what they do not hold."""
        entry = self._entry(name)
        data = bytearray(first[entry.start : entry.stop])
        data += self._place.read(self._file, entry.start + len(data), entry.stop)
        return self._finish(name, data)

    def _finish(self, name: str, data: bytearray) -> Tensor:
        if self._check and checksum(memoryview(data)) != self.header.checksums[name]:
            raise FormatError(
                f"{self._label}: the bytes of {name!r} are not those that were written. "
                "Remove the file and run the same extraction again to make it anew."
            )
        entry = self._entry(name)
        return _view(data, entry, entry.shape)


def _view(data: bytearray, entry: TensorEntry, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=entry.dtype)
    return torch.frombuffer(data, dtype=entry.dtype).view(shape)


def _has_failed(future: "Future[Tensor]") -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
