"""One remote shard: its header, rows and whole tensors, read with range requests.

One example of one site costs its own bytes and, for the first one in a shard, the first 64 KiB. Whole tensors are
fetched with concurrent requests, verified against their checksums, and cached while there is room or someone holds
them. Rows fetched alone cannot be verified, because the checksum covers the whole tensor; only their size is checked.

Hides threads and the cache. Must never know of sites, or of the kind of place that the bytes come from.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from layerprobe.errors import FormatError, StoreError
from layerprobe.store.format import load_start
from layerprobe.store.headers import ShardHeader, TensorEntry
from layerprobe.store.index import ShardInfo
from layerprobe.store.places import Place
from layerprobe.store.shards import check_bytes, check_header, count_pairs, need_entry, read_order

__all__ = ["RangedShard", "TensorCache"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")
# file, tensor name, first row and the row after the last
Key = tuple[str, str, int, int]
# key and size of a tensor, and the function that fetches it
_Request = tuple[Key, int, Callable[[], Tensor]]

# Bytes per request: large enough that the server's latency is small in comparison.
_REQUEST_BYTES = 8 << 20
_NUM_REQUESTS = 8
_NUM_TENSORS = 4
# Rows are shuffled over 1 GiB at a time; what is fetched ahead needs room beside it.
_CACHE_BYTES = 2 << 30


class _Held:
    """Keeps a fetched tensor in the cache for as long as it is referenced."""

    def __init__(self, future: "Future[Tensor]") -> None:
        self.future = future


_GONE: "Future[Tensor]" = Future()
_GONE.cancel()


class TensorCache:
    """A cache of tensors fetched by threads, evicting the least recently used. One per open store.

    Args:
        most_bytes: Size limit; only held tensors, or a single tensor of any size, may exceed it.
    """

    def __init__(self, most_bytes: int = _CACHE_BYTES) -> None:
        self._most_bytes = most_bytes
        self._reset()

    def __reduce__(self) -> "tuple[type[TensorCache], tuple[int]]":
        return TensorCache, (self._most_bytes,)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, tuple[Future[Tensor], int]] = OrderedDict()
        self._held: WeakValueDictionary[Key, _Held] = WeakValueDictionary()
        self._num_bytes = 0
        self._pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None

    def close(self) -> None:
        """Drop everything and end the threads."""
        with self._lock:
            pools, self._pools = self._pools, None
            for held in list(self._held.values()):
                held.future = _GONE  # iterators that hold it may live on
            self._kept.clear()
            self._held.clear()
            self._num_bytes = 0
        for pool in pools or ():
            pool.shutdown(cancel_futures=True)

    def map(self, ask: Callable[[Item], Answer], items: Iterable[Item]) -> Iterator[Answer]:
        """Make several requests concurrently; answers come in the order of the items."""
        return self._start()[1].map(ask, items)

    def find(self, key: Key) -> Tensor | None:
        """Return a tensor that is cached or being fetched; None if it was not requested, or could not be fetched.

        Raises:
            FormatError: it was fetched, and is damaged.
        """
        if self._pid != os.getpid():
            return None
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
        try:
            return kept[0].result() if kept is not None else None
        except FormatError:
            raise
        except StoreError:
            return None

    def begin(self, key: Key, size: int, load: Callable[[], Tensor]) -> _Held:
        """Begin to fetch a tensor, unless it is cached or being fetched."""
        held = self._begin(key, size, load, needs_room=False)
        assert held is not None
        return held

    def begin_ahead(self, key: Key, size: int, load: Callable[[], Tensor]) -> _Held | None:
        """Begin to fetch a tensor as `begin` does, if it fits beside those that are held; None if it does not."""
        return self._begin(key, size, load, needs_room=True)

    def _begin(self, key: Key, size: int, load: Callable[[], Tensor], needs_room: bool) -> _Held | None:
        tensors, _ = self._start()
        with self._lock:
            if key in self._kept and not _has_failed(self._kept[key][0]):
                self._kept.move_to_end(key)
            else:
                self._forget(key)
                if needs_room and not self._has_room(size):
                    return None
                self._make_room(size)
                self._kept[key] = tensors.submit(load), size
                self._num_bytes += size
            held = self._held.get(key)
            if held is None or held.future is not self._kept[key][0]:
                held = self._held[key] = _Held(self._kept[key][0])
            return held

    def _has_room(self, size: int) -> bool:
        """Return whether a tensor fits beside those that are held; if none is held, any tensor does."""
        held_bytes = sum(size for key, (_, size) in self._kept.items() if key in self._held)
        return not held_bytes or held_bytes + size <= self._most_bytes

    def _make_room(self, size: int) -> None:
        """Evict the least recently used tensors that are not held, until there is room."""
        for key in list(self._kept) if self._num_bytes + size > self._most_bytes else ():
            if self._num_bytes + size <= self._most_bytes:
                return
            if key not in self._held:
                self._forget(key)

    def _start(self) -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
        """Return the pool that loads tensors and the pool that makes requests, starting them if needed."""
        if self._pid != os.getpid():  # threads do not survive a fork
            self._reset()
        with self._lock:
            if self._pools is None:
                self._pools = (
                    ThreadPoolExecutor(_NUM_TENSORS, "layerprobe-tensors"),
                    ThreadPoolExecutor(_NUM_REQUESTS, "layerprobe-requests"),
                )
            return self._pools

    def _forget(self, key: Key) -> None:
        if key in self._kept:
            # not cancelled: someone may be waiting for it
            self._num_bytes -= self._kept.pop(key)[1]


class RangedShard:
    """A remote shard, read with range requests.

    Args:
        place: Location of the store.
        info: The shard's entry in the index.
        fingerprint: Fingerprint of the store's plan.
        check: Verify the checksums of whole tensors.
        cache: The store's tensor cache.

    Raises:
        FormatError: the file is damaged, or belongs to another run.
        StoreError: it cannot be read.

    Cost: two requests and 64 KiB, as long as the header, ordinals and offsets fit in those.
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
    def pairs_before(self) -> Sequence[int]:
        """For each example, the number of token pairs of the examples before it."""
        return count_pairs(self._offsets)

    def tensor(self, name: str) -> Tensor:
        """Fetch a whole tensor and verify its checksum."""
        if name == "offsets":
            return self._offsets
        return self._begin(name).future.result()

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows of a tensor, fetching only those unless the whole is cached."""
        entry = self._entry(name)
        if (whole := self._cache.find(self._key(name))) is not None:
            return whole[start:stop]
        start, stop = min(start, _count(entry)), min(stop, _count(entry))
        first, last = _bytes_of(entry, start, stop)
        return _view(bytearray(self._place.read(self._file, first, last)), entry, stop - start)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Fetch some rows of a tensor as one piece; verified if they are the whole tensor."""
        return self._begin(name, start, stop).future.result()

    def fetch(self, names: Sequence[str], start: int, stop: int, needs_room: bool = False) -> list[object]:
        """Begin to fetch pieces: all of them or, with `needs_room`, as many as fit into the cache."""
        return self._begin_all([self._request(name, start, stop) for name in names], needs_room)

    def prefetch(self, names: Sequence[str], needs_room: bool = True) -> list[object]:
        """Begin to fetch whole tensors: as many as fit into the cache or, without `needs_room`, all of them."""
        return self._begin_all([self._request(name) for name in names if name in self.header.tensors], needs_room)

    def _begin_all(self, requests: Sequence[_Request], needs_room: bool) -> list[object]:
        begin = self._cache.begin_ahead if needs_room else self._cache.begin
        found: list[object] = []
        for request in requests:
            held = begin(*request)
            if held is None:
                break
            found.append(held)
        return found

    def _entry(self, name: str) -> TensorEntry:
        return need_entry(self._label, self.header, name)

    def _key(self, name: str) -> Key:
        return self._file, name, 0, _count(self._entry(name))

    def _begin(self, name: str, start: int = 0, stop: int | None = None) -> _Held:
        """Begin to fetch rows of a tensor; all of them by default."""
        return self._cache.begin(*self._request(name, start, stop))

    def _request(self, name: str, start: int = 0, stop: int | None = None) -> _Request:
        key = whole = self._key(name)
        if stop is not None and (start, stop) != whole[2:]:
            key = self._file, name, start, stop
        first, last = _bytes_of(self._entry(name), *key[2:])
        return key, last - first, partial(self._load, name, key == whole, *key[2:])

    def _load(self, name: str, is_whole: bool, start: int, stop: int) -> Tensor:
        entry = self._entry(name)
        first, last = _bytes_of(entry, start, stop)
        data = bytearray(last - first)

        def ask(begin: int) -> None:
            end = min(begin + _REQUEST_BYTES, last)
            data[begin - first : end - first] = self._place.read(self._file, begin, end)

        for _ in self._cache.map(ask, range(first, last, _REQUEST_BYTES)):
            pass
        return self._finish(name, data) if is_whole else _view(data, entry, stop - start)

    def _read_small(self, name: str, first: bytes) -> Tensor:
        """Take a tensor from the first bytes of the file, fetching what they do not include."""
        entry = self._entry(name)
        data = bytearray(first[entry.start : entry.stop])
        data += self._place.read(self._file, entry.start + len(data), entry.stop)
        return self._finish(name, data)

    def _finish(self, name: str, data: bytearray) -> Tensor:
        if self._check:
            check_bytes(self._label, self.header, name, memoryview(data))
        entry = self._entry(name)
        return _view(data, entry, _count(entry))


def _count(entry: TensorEntry) -> int:
    return entry.shape[0] if entry.shape else 0


def _bytes_of(entry: TensorEntry, start: int, stop: int) -> tuple[int, int]:
    """Return the byte range of some rows of a tensor in the file."""
    row_bytes = (entry.stop - entry.start) // max(1, _count(entry))
    return entry.start + start * row_bytes, entry.start + stop * row_bytes


def _view(data: bytearray, entry: TensorEntry, count: int) -> Tensor:
    shape = (count, *entry.shape[1:])
    if not data:
        return torch.empty(shape, dtype=entry.dtype, device="cpu")
    return torch.frombuffer(data, dtype=entry.dtype).view(shape)


def _has_failed(future: "Future[Tensor]") -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
