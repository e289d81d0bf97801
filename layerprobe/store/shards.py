"""One memory-mapped shard: its tensors as views of the file, and the rows of each example.

A shard is checked against the index and its header, and its ordinals and offsets against its counts, before it is used.
Must never know of stores or sites.
"""

import errno
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from layerprobe.errors import FormatError, StoreError
from layerprobe.store.format import INDEX_FILE, STORE_FILE, open_shard
from layerprobe.store.headers import POSITIONS, ShardHeader, TensorEntry, checksum
from layerprobe.store.index import ShardInfo
from layerprobe.store.paths import NamedPath
from layerprobe.tables import format_count

__all__ = [
    "POOLS",
    "MappedShard",
    "ScaledRows",
    "Shard",
    "check_bytes",
    "check_header",
    "count_pairs",
    "need_entry",
    "pool_packed",
    "positions_of",
    "read_order",
    "span_of",
]

# Names of the pooling methods.
POOLS = ("mean", "max", "cls", "last")
# Before Python 3.13, each mapping keeps a file descriptor open.
_HOLDS_NO_FILE: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) and os.name != "nt" else {}


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """int8 vectors and their scale: `value = values * scale`.

    Args:
        values: int8 `[T, D]` (or `[D]` for a pooled example).
        scale: float32 `[T]` (or a scalar).
    """

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def float(self) -> Tensor:
        """Decode to float32, in the shape of `values`."""
        return self.values.float() * self.scale[..., None]


class Shard(Protocol):
    """One shard: its header and, on demand, its tensors. Checked against its header when it is created."""

    header: ShardHeader
    # first row of each example, in shard order, and the end of the last
    offsets: Sequence[int]
    # position in the shard of each example of the unit
    position: Sequence[int]

    @cached_property
    def pairs_before(self) -> Sequence[int]:
        """For each example, the number of token pairs of the examples before it in the shard."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor, verified."""
        ...

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows of a tensor, fetching only those if that is cheaper."""
        ...

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows of a tensor, of which nearly all will be used."""
        ...

    def fetch(self, names: Sequence[str], start: int, stop: int, needs_room: bool = False) -> list[object]:
        """Begin to fetch pieces that will be needed soon; they stay cached while the returned objects are held.

        With `needs_room`, fetch only as many as fit into the cache; one object is returned for each piece fetched.
        """
        ...

    def prefetch(self, names: Sequence[str], needs_room: bool = True) -> list[object]:
        """Begin to fetch whole tensors that will be needed soon; they stay cached while the returned objects are held.

        Those that do not fit into the cache are left out, unless `needs_room` is False.
        """
        ...


class MappedShard:
    """A memory-mapped shard.

    Args:
        path: The file.
        info: The shard's entry in the index.
        fingerprint: Fingerprint of the store's plan.
        check: Verify the checksum of each tensor before its first use.
        checked: Tensors already verified; kept by the caller in case the shard is mapped again.

    Raises:
        FormatError: the file is damaged, or belongs to another run.
        StoreError: the file cannot be read or mapped.
    """

    def __init__(
        self, path: Path | NamedPath, info: ShardInfo, fingerprint: str, check: bool, checked: set[str] | None = None
    ) -> None:
        self.header: ShardHeader
        with open_shard(path) as (file, self.header):
            check_header(str(path), self.header, info, fingerprint)
            self._memory = _map_file(path, file, max(entry.stop for entry in self.header.tensors.values()))
        self._path = path
        self._check = check
        self._checked = set() if checked is None else checked
        self._tensors: dict[str, Tensor] = {}
        self.offsets, self.position = read_order(str(path), self.header, self.tensor("example"), self.tensor("offsets"))

    @cached_property
    def pairs_before(self) -> Sequence[int]:
        """For each example, the number of token pairs of the examples before it: where its attention weights begin."""
        return count_pairs(self.tensor("offsets"))

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor as a view of the file."""
        if name not in self._tensors:
            entry = need_entry(str(self._path), self.header, name)
            # keyed by name too: two tensors may have equal checksums and one of them be damaged
            mark = f"{name} {self.header.checksums[name]}"
            if self._check and mark not in self._checked:
                with memoryview(self._memory) as whole, whole[entry.start : entry.stop] as part:
                    check_bytes(str(self._path), self.header, name, part)
                self._checked.add(mark)
                self._let_go(entry.start, entry.stop)
            count = (entry.stop - entry.start) // entry.dtype.itemsize
            if count == 0:
                self._tensors[name] = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
            else:
                flat = torch.frombuffer(self._memory, dtype=entry.dtype, count=count, offset=entry.start)
                self._tensors[name] = flat.view(entry.shape)
        return self._tensors[name]

    def _let_go(self, start: int, stop: int) -> None:
        """Drop the pages touched by checksumming, so that they do not count towards the process's memory.

        They stay in the page cache. Only whole pages of a tensor not handed out yet are dropped: a caller may have
        written to others.
        """
        start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop - stop % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and stop > start:
            self._memory.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows of a tensor as a view of the file.

        Without checksums these may be the first pages touched, so tell the kernel which to read: its default readahead
        around a page fault is megabytes.
        """
        tensor = self.tensor(name)
        if not self._check and stop > start:
            entry = self.header.tensors[name]
            row_bytes = (entry.stop - entry.start) // len(tensor)
            self._read_ahead(entry.start + start * row_bytes, entry.start + stop * row_bytes)
        return tensor[start:stop]

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows of a tensor as a view of the file."""
        return self.tensor(name)[start:stop]

    def fetch(self, names: Sequence[str], start: int, stop: int, needs_room: bool = False) -> list[object]:
        """Advise the kernel to read pieces ahead: random rows of a cold file would fault in page by page."""
        for entry in (self.header.tensors[name] for name in names):
            row_bytes = (entry.stop - entry.start) // max(1, entry.shape[0])
            if row_bytes and stop > start:
                self._read_ahead(entry.start + start * row_bytes, entry.start + stop * row_bytes)
        return [None] * len(names)

    def prefetch(self, names: Sequence[str], needs_room: bool = True) -> list[object]:
        """Advise the kernel to read tensors ahead; it decides itself how much fits into memory."""
        for name in names:
            entry = self.header.tensors.get(name)
            if entry is not None and entry.stop > entry.start:
                self._read_ahead(entry.start, entry.stop)
        return []

    def _read_ahead(self, start: int, stop: int) -> None:
        if not hasattr(mmap, "MADV_WILLNEED"):  # Windows: no readahead advice
            return
        start -= start % mmap.PAGESIZE
        self._memory.madvise(mmap.MADV_WILLNEED, start, stop - start)


def _map_file(path: Path | NamedPath, file: BinaryIO, size: int) -> mmap.mmap:
    try:
        # Copy on write: torch wants writable memory, and the file stays unchanged.
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, **_HOLDS_NO_FILE)
    except ValueError as error:
        raise FormatError(f"{path}: was cut while it was opened.") from error
    except OSError as error:
        advice = ""
        if error.errno == errno.EMFILE and not _HOLDS_NO_FILE:
            advice = (
                " Before Python 3.13 a view holds its shard's file open: keep copies, as view[i].clone() makes, or "
                "allow more open files (ulimit -n)."
            )
        raise StoreError(f"{path}: cannot be mapped ({error.strerror or error}).{advice}") from error


def check_header(label: str, header: ShardHeader, info: ShardInfo, fingerprint: str) -> None:
    """Check that a shard belongs to this run and matches its entry in the index.

    Raises:
        FormatError: it does not.
    """
    if header.fingerprint != fingerprint:
        raise FormatError(f"{label}: belongs to another run than {STORE_FILE} beside it.")
    counts = (header.first_example, header.num_examples, header.num_tokens)
    if counts != (info.first_example, info.num_examples, info.num_tokens):
        raise FormatError(f"{label}: does not hold the examples that {INDEX_FILE} says.")


def need_entry(label: str, header: ShardHeader, name: str) -> TensorEntry:
    """Return the header entry of a tensor.

    Raises:
        FormatError: there is no such tensor.
    """
    try:
        return header.tensors[name]
    except KeyError as error:
        raise FormatError(f"{label}: has no tensor {name!r}.") from error


def check_bytes(label: str, header: ShardHeader, name: str, data: memoryview) -> None:
    """Verify the bytes of a whole tensor against its checksum.

    Raises:
        FormatError: the checksum does not match.
    """
    if checksum(data) != header.checksums[name]:
        raise FormatError(
            f"{label}: the bytes of {name!r} are not those that were written. "
            "Remove the file and run the same extraction again to make it anew."
        )


def read_order(
    label: str, header: ShardHeader, example: Tensor, offsets: Tensor
) -> tuple[Sequence[int], Sequence[int]]:
    """Read the order of the examples in a shard.

    Returns:
        The row offsets, and the position in the shard of each example of the unit. Both are int64 buffers rather than
        lists, to save memory: hundreds of shards may be open.

    Raises:
        FormatError: ordinals or offsets contradict the counts.
    """
    starts, order = offsets.numpy().copy(), example.numpy() - header.first_example
    position = np.full(header.num_examples, -1, dtype=np.int64)
    # if every ordinal of the range gets a position, none occurs twice
    if len(order) and order.min() >= 0 and order.max() < len(order):
        position[order] = np.arange(len(order))
    if len(position) and position.min() < 0:
        raise FormatError(f"{label}: its ordinals are not a run of {format_count(header.num_examples, 'example')}.")
    if not len(starts) or starts[0] != 0 or starts[-1] != header.num_tokens or (starts[1:] < starts[:-1]).any():
        raise FormatError(f"{label}: its offsets do not rise from 0 to {header.num_tokens}.")
    return starts.data, position.data


def count_pairs(offsets: Tensor) -> Sequence[int]:
    """Compute, for each example, the number of token pairs of the examples before it."""
    pairs = np.zeros(len(offsets), dtype=np.int64)
    np.cumsum(np.square(np.diff(offsets.numpy())), out=pairs[1:])
    return pairs.data


def span_of(shard: Shard, ordinal: int) -> tuple[int, int, int]:
    """Locate an example in its shard: its position, its first row and the row after its last."""
    position = shard.position[ordinal - shard.header.first_example]
    return position, shard.offsets[position], shard.offsets[position + 1]


def positions_of(shard: Shard, rows: Tensor, places: Tensor) -> Tensor:
    """Return the positions of rows among all tokens of their examples, including tokens whose rows were not kept.

    Args:
        shard: The shard that holds the rows.
        rows: int64 `[n]`.
        places: int64 `[n]`, the position in the shard of each row's example.
    """
    if POSITIONS in shard.header.tensors:
        return shard.tensor(POSITIONS)[rows]
    return rows - shard.tensor("offsets")[places]


def pool_packed(rows_TD: Tensor, offsets: Tensor, pool: str) -> Tensor:
    """Pool packed float32 rows to one vector per example, `[N, D]`; `pool` is one of `POOLS`."""
    if pool in ("mean", "max"):
        return torch.segment_reduce(rows_TD, pool, offsets=offsets, axis=0, initial=None).masked_fill_(
            (offsets[1:] == offsets[:-1])[:, None], float("nan")
        )
    if not len(rows_TD):
        return rows_TD.new_full((len(offsets) - 1, rows_TD.shape[1]), float("nan"))
    picked = offsets[:-1] if pool == "cls" else offsets[1:] - 1
    empty = offsets[1:] == offsets[:-1]
    return rows_TD[picked.masked_fill(empty, 0)].masked_fill_(empty[:, None], float("nan"))
