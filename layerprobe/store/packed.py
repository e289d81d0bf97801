"""Convert shards to packed arrays in input order, one after the other: `.npz` and Zarr.

Each array is written piece by piece in its own pass over the shards, so memory does not grow with the store and no
array is pickled. Records stay as they are in a shard: JSON objects back to back in bytes, with their offsets.

Must never know of folders or stores.
"""

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from layerprobe.errors import FormatError
from layerprobe.packages import need_package
from layerprobe.store.columns import column_dtype, cut_places, rows_of, take_site
from layerprobe.store.description import StoredSite
from layerprobe.store.headers import POSITIONS
from layerprobe.store.records import has_records
from layerprobe.store.shards import Shard
from layerprobe.tables import format_dtype

__all__ = ["PackedArray", "list_arrays", "write_npz", "write_zarr"]

_OFFSETS_SUFFIX = ":offsets"
# Bytes written at a time, and size of a Zarr chunk.
_PIECE_BYTES = 4 << 20
# The name of an archive member or of a group's array; it cannot be a path that leads outside.
_SAFE_NAME = re.compile(r"\w[\w.:+-]*\Z")
_RESERVED = ("zarr.json",)

Shards = Callable[[], Iterable[Shard]]


@dataclass(frozen=True)
class PackedArray:
    """One array: its full shape, and its values in pieces along the first axis."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class _Totals:
    num_examples: int = 0
    num_tokens: int = 0
    num_pairs: int = 0
    record_bytes: int = 0
    has_positions: bool = False


def list_arrays(shards: Shards, sites: Sequence[StoredSite]) -> list[PackedArray]:
    """Plan the arrays of an export.

    Args:
        shards: Iterates over the shards in input order; called once to measure, then once per array.
        sites: The sites to export.

    Returns:
        `example [N]`, `offsets [N + 1]`, `input_ids [T]`, `positions [T]` if not all rows were kept, `record_offsets
        [N + 1]` and `records` if texts were kept, then the sites: `[T, D]`, `[N, D]`, or flat with
        `SITE:offsets [N + 1]` for attention weights.

    Raises:
        FormatError: a site's name cannot be used as the name of an array.
    """
    for site in sites:
        if not _SAFE_NAME.match(site.name) or site.name in _RESERVED:
            raise FormatError(f"a site is named {site.name!r}, which cannot be the name of an array in a file.")
    totals = _measure(shards(), any(site.kind == "attention" for site in sites))
    by_example, by_token, begins = (totals.num_examples,), (totals.num_tokens,), (totals.num_examples + 1,)
    int64 = np.dtype(np.int64)

    def ordinals() -> Iterator[np.ndarray]:
        for shard in shards():
            yield shard.tensor("example").numpy()[shard.position]

    def of_tokens(name: str) -> Iterator[np.ndarray]:
        for shard in shards():
            for places in cut_places(shard, ()):
                yield shard.tensor(name)[rows_of(shard, places)[0]].numpy()

    arrays = [
        PackedArray("example", int64, by_example, ordinals),
        PackedArray("offsets", int64, begins, lambda: _accumulate(shards, lambda shard: np.diff(shard.offsets))),
        PackedArray("input_ids", int64, by_token, lambda: of_tokens("input_ids")),
    ]
    if totals.has_positions:
        arrays.append(PackedArray(POSITIONS, int64, by_token, lambda: of_tokens(POSITIONS)))
    if totals.record_bytes:
        arrays += [
            PackedArray("record_offsets", int64, begins, lambda: _accumulate(shards, _record_sizes)),
            PackedArray("records", np.dtype(np.uint8), (totals.record_bytes,), lambda: _list_records(shards)),
        ]
    for site in sites:
        arrays += _list_site(shards, site, totals)
    return arrays


def _measure(shards: Iterable[Shard], has_pairs: bool) -> _Totals:
    totals = _Totals()
    for shard in shards:
        header = shard.header
        records = header.tensors.get("records")
        totals = _Totals(
            totals.num_examples + header.num_examples,
            totals.num_tokens + header.num_tokens,
            totals.num_pairs + (shard.pairs_before[-1] if has_pairs else 0),
            totals.record_bytes + (records.shape[0] if records is not None else 0),
            totals.has_positions or POSITIONS in header.tensors,
        )
    return totals


def _list_site(shards: Shards, site: StoredSite, totals: _Totals) -> list[PackedArray]:
    dtype = np.dtype(format_dtype(column_dtype(site)))

    def values() -> Iterator[np.ndarray]:
        for shard in shards():
            for places in cut_places(shard, (site,)):
                yield take_site(shard, site, places)

    if site.kind == "attention":
        return [
            PackedArray(
                site.name + _OFFSETS_SUFFIX,
                np.dtype(np.int64),
                (totals.num_examples + 1,),
                lambda: _accumulate(shards, lambda shard: np.diff(shard.pairs_before) * site.width),
            ),
            PackedArray(site.name, dtype, (site.width * totals.num_pairs,), values),
        ]
    return [PackedArray(site.name, dtype, (site.count_vectors(totals), site.width), values)]


def _accumulate(shards: Shards, sizes: Callable[[Shard], np.ndarray]) -> Iterator[np.ndarray]:
    """Convert the sizes of examples, given in shard order, to offsets in input order."""
    end = np.zeros(1, dtype=np.int64)
    yield end
    for shard in shards():
        ends = end[-1] + np.cumsum(sizes(shard)[shard.position], dtype=np.int64)
        if len(ends):
            yield ends
            end = ends[-1:]


def _record_sizes(shard: Shard) -> np.ndarray:
    if not has_records(shard):
        return np.zeros(shard.header.num_examples, dtype=np.int64)
    return shard.tensor("record_offsets").diff().numpy()


def _list_records(shards: Shards) -> Iterator[np.ndarray]:
    for shard in shards():
        if has_records(shard):
            begins = shard.tensor("record_offsets").tolist()
            records = shard.tensor("records")
            for place in shard.position:
                yield records[begins[place] : begins[place + 1]].numpy()


def write_npz(path: Path, arrays: Sequence[PackedArray]) -> None:
    """Write arrays to an archive that `numpy.load(allow_pickle=False)` reads."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for array in arrays:
            # `ZipInfo` has a fixed date, so the same store gives the same bytes
            with archive.open(zipfile.ZipInfo(array.name + ".npy"), "w", force_zip64=True) as member:
                _write_npy(member, array)


def _write_npy(member: IO[bytes], array: PackedArray) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
    for piece in _cut_evenly(array):
        member.write(piece.tobytes())


def write_zarr(path: Path, arrays: Sequence[PackedArray]) -> None:
    """Write arrays to a Zarr group, format 3, one chunk at a time."""
    zarr = need_package("zarr", "Zarr", "data")
    # Ctrl-C during a call would leave zarr's own threads writing, so calls run in a worker thread and always finish
    with ThreadPoolExecutor(1, "layerprobe-zarr") as thread:
        group = thread.submit(zarr.open_group, str(path), mode="w", zarr_format=3).result()
        for array in arrays:
            chunks = (min(_chunk_rows(array), max(1, array.shape[0])), *array.shape[1:])
            make = partial(group.create_array, shape=array.shape, dtype=array.dtype, chunks=chunks)
            target = thread.submit(make, array.name).result()
            start = 0
            for piece in _cut_evenly(array):
                thread.submit(target.__setitem__, slice(start, start + len(piece)), piece).result()
                start += len(piece)


def _chunk_rows(array: PackedArray) -> int:
    return max(1, _PIECE_BYTES // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:]))))


def _cut_evenly(array: PackedArray) -> Iterator[np.ndarray]:
    """Regroup the values so that each piece but the last fills a chunk, because a partial chunk is written twice.

    Raises:
        FormatError: their number differs from the shape.
    """
    most = _chunk_rows(array)
    room = np.empty((min(most, array.shape[0]), *array.shape[1:]), dtype=array.dtype)
    filled = total = 0
    for piece in array.pieces():
        total += len(piece)
        while len(piece):
            count = min(len(piece), len(room) - filled)
            if not count:
                break
            room[filled : filled + count] = piece[:count]
            piece, filled = piece[count:], filled + count
            if filled == most:
                yield room
                filled = 0
    if total != array.shape[0]:
        raise FormatError(f"{array.name!r} has {total:,} vectors; its shards said {array.shape[0]:,}.")
    if filled:
        yield room[:filled]
