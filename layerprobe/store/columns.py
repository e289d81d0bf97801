"""Convert shards to Arrow: a column for each property of an example or token, in input order.

A record batch holds at most about 32 MiB of values, so memory does not grow with the store. Values keep their dtype if
Arrow has it (float16, float32, float64), and are widened to float32 otherwise.

Hides pyarrow, which comes with the extra `data`. Must never know of folders or stores.
"""

import contextlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.errors import FormatError, OptionError, telling_refusals
from layerprobe.packages import need_package
from layerprobe.store.description import StoredSite
from layerprobe.store.fingerprint import fingerprint_of
from layerprobe.store.guard import need_path
from layerprobe.store.headers import POSITIONS, SCALE_SUFFIX
from layerprobe.store.records import read_records
from layerprobe.store.rows import take_rows
from layerprobe.store.shards import Shard, positions_of
from layerprobe.tables import format_dtype

__all__ = [
    "ROWS",
    "Columns",
    "column_dtype",
    "cut_places",
    "open_dataset",
    "rows_of",
    "take_site",
    "write_arrow",
    "write_parquet",
]

ROWS = ("examples", "tokens")
# Bytes of values in one record batch, which is also a row group of a Parquet file.
_BATCH_BYTES = 32 << 20
_MAPPED_BYTES = 1 << 20
_KEPT_DTYPES = (torch.float16, torch.float32, torch.float64)
_OWN_COLUMNS = ("index", "position", "input_id", "input_ids", "token", "tokens", "text", "fields")


@dataclass(frozen=True)
class Columns:
    """The columns of a table.

    Args:
        sites: The sites, in the order in which the model runs them.
        rows: `examples` or `tokens`.
        tokens: Converts ids to tokens; None if the store has no tokenizer.
        has_positions: Whether the store keeps only some rows, so that an example needs their positions.

    Raises:
        OptionError: `rows` is invalid, or a site has no value per token.
        FormatError: a site has the name of a fixed column.
    """

    sites: tuple[StoredSite, ...]
    rows: str = "examples"
    tokens: Callable[[Tensor], list[str]] | None = None
    has_positions: bool = False

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise OptionError(f"rows is {self.rows!r}: use {' or '.join(map(repr, ROWS))}.")
        for site in self.sites:
            if self.rows == "tokens" and site.kind != "token":
                raise OptionError(
                    f"{site.name!r} has no value per token (it is of kind {site.kind!r}): choose other sites, or "
                    "rows='examples'."
                )
            if site.name in _OWN_COLUMNS:
                raise FormatError(f"a site is named {site.name!r}, as a column that every table has.")


def column_dtype(site: StoredSite) -> torch.dtype:
    """Return the dtype of a site's values in formats without bfloat16, float8 and scaled int8."""
    return site.dtype if site.dtype in _KEPT_DTYPES else torch.float32


def cut_places(shard: Shard, sites: Sequence[StoredSite]) -> Iterator[list[int]]:
    """Split a shard's examples, in input order, into lists with about 32 MiB of values, at least one example each.

    Returns:
        An iterator of lists of positions in the shard.
    """
    lengths = np.diff(shard.offsets)
    costs = np.full(len(lengths), 64, dtype=np.int64) + lengths * 16
    for site in sites:
        size = site.width * max(4, site.dtype.itemsize)
        costs += size * {"token": lengths, "example": np.int64(1), "attention": lengths * lengths}[site.kind]
    places: list[int] = []
    total = 0
    for place in shard.position:
        if places and total + int(costs[place]) > _BATCH_BYTES:
            yield places
            places, total = [], 0
        places.append(place)
        total += int(costs[place])
    if places:
        yield places


def rows_of(shard: Shard, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the rows of some examples, concatenated.

    Returns:
        int64 `[n]`, the rows of the shard; int64 `[len(places) + 1]`, where each example begins among them.
    """
    offsets = torch.from_numpy(np.asarray(shard.offsets))
    starts, lengths = offsets[list(places)], offsets.diff()[list(places)]
    begins = _sum_up(lengths)
    rows = torch.arange(int(begins[-1]), device="cpu") + torch.repeat_interleave(starts - begins[:-1], lengths)
    return rows, begins


def take_site(shard: Shard, site: StoredSite, places: Sequence[int]) -> np.ndarray:
    """Copy a site's values of some examples out of a shard.

    Returns:
        `[n, D]` rows or vectors, in the column's dtype; flat for attention weights.
    """
    dtype = np.dtype(format_dtype(column_dtype(site)))
    if site.kind == "example":
        return (
            take_rows(shard, site, torch.tensor(places, dtype=torch.int64, device="cpu")).to(column_dtype(site)).numpy()
        )
    # where the values of each example begin in the shard
    begins = shard.offsets if site.kind == "token" else [site.width * pairs for pairs in shard.pairs_before]
    values = shard.tensor(site.name)
    scale = shard.tensor(site.name + SCALE_SUFFIX) if site.dtype == torch.int8 else None
    count = sum(begins[place + 1] - begins[place] for place in places)
    taken = _allocate((count, site.width) if site.kind == "token" else (count,), dtype)
    target, end = torch.from_numpy(taken), 0
    for place in places:
        start, stop = begins[place], begins[place + 1]
        part = target[end : end + stop - start]
        end += stop - start
        if scale is None:
            part.copy_(values[start:stop])
        else:
            torch.mul(values[start:stop], scale[start:stop, None], out=part)
    return taken


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate memory for the values of one batch.

    Large blocks are memory-mapped, so that they go back to the system after use: on the heap, blocks of slightly
    growing size would each miss the hole that the last one left, and the heap would grow with the store.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _MAPPED_BYTES:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, buffer=mmap.mmap(-1, num_bytes))


def write_arrow(path: Path, shards: Iterable[Shard], columns: Columns, *, as_stream: bool = False) -> None:
    """Write an Arrow IPC file, or a stream of the kind that `datasets` maps."""
    pyarrow = need_package("pyarrow", "Arrow", "data")
    ipc = need_package("pyarrow.ipc", "Arrow", "data")
    schema = _schema(pyarrow, columns)
    new = ipc.new_stream if as_stream else ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as sink, new(sink, schema) as writer:
        for batch in _list_batches(pyarrow, schema, shards, columns):
            writer.write_batch(batch)


def write_parquet(path: Path, shards: Iterable[Shard], columns: Columns) -> None:
    """Write a Parquet file, with a row group per record batch."""
    pyarrow = need_package("pyarrow", "Parquet", "data")
    parquet = need_package("pyarrow.parquet", "Parquet", "data")
    schema = _schema(pyarrow, columns)
    with parquet.ParquetWriter(str(path), schema) as writer:
        for batch in _list_batches(pyarrow, schema, shards, columns):
            writer.write_batch(batch)


def open_dataset(
    shards: Callable[[], Iterable[Shard]], columns: Columns, fingerprint: str, cache: str | Path | None
) -> Any:
    """Return a `datasets.Dataset` that maps an Arrow stream, which is written to a cache unless it exists there.

    Args:
        shards: Iterates over the shards in input order.
        columns: The columns of the table.
        fingerprint: Fingerprint of the store.
        cache: Folder of the stream; None for the cache of `datasets`.
    """
    datasets = need_package("datasets", "to_datasets", "data")
    folder = need_path("cache", cache) if cache is not None else Path(datasets.config.HF_DATASETS_CACHE) / "layerprobe"
    names = [site.name for site in columns.sites]
    # hash the checksums too, so that an added or recomputed shard changes the name
    contents = [[shard.header.file, sorted(shard.header.checksums.items())] for shard in shards()]
    digest = fingerprint_of(
        {"store": fingerprint, "sites": names, "shards": contents, "tokens": columns.tokens is not None}
    )
    path = folder / f"{digest}.arrow"
    if not path.is_file():
        partial = folder / f"{digest}.{os.getpid()}.tmp"
        try:
            with telling_refusals(path, "written", "Choose a folder with cache=."):
                folder.mkdir(parents=True, exist_ok=True)
                write_arrow(partial, shards(), columns, as_stream=True)
                os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    return datasets.Dataset.from_file(str(path))


def _schema(pyarrow: Any, columns: Columns) -> Any:
    has_tokens = columns.tokens is not None
    if columns.rows == "tokens":
        fields = {"index": pyarrow.int64(), "position": pyarrow.int64(), "input_id": pyarrow.int64()}
        fields |= {"token": pyarrow.string()} if has_tokens else {}
    else:
        fields = {"index": pyarrow.int64(), "input_ids": pyarrow.list_(pyarrow.int64())}
        fields |= {POSITIONS: pyarrow.list_(pyarrow.int64())} if columns.has_positions else {}
        fields |= {"tokens": pyarrow.list_(pyarrow.string())} if has_tokens else {}
        fields |= {"text": pyarrow.string(), "fields": pyarrow.string()}
    for site in columns.sites:
        item = pyarrow.from_numpy_dtype(np.dtype(format_dtype(column_dtype(site))))
        if site.kind == "attention":
            fields[site.name] = pyarrow.list_(pyarrow.list_(pyarrow.list_(item)))
        else:
            vector = pyarrow.list_(item, site.width)
            is_listed = site.kind == "token" and columns.rows == "examples"
            fields[site.name] = pyarrow.list_(vector) if is_listed else vector
    return pyarrow.schema(list(fields.items()))


def _list_batches(pyarrow: Any, schema: Any, shards: Iterable[Shard], columns: Columns) -> Iterator[Any]:
    build = _build_tokens if columns.rows == "tokens" else _build_examples
    for shard in shards:
        shard.prefetch(["input_ids", "records", *(site.name for site in columns.sites)])
        for places in cut_places(shard, columns.sites):
            built = build(pyarrow, shard, places, columns)
            yield pyarrow.record_batch([built[name] for name in schema.names], schema=schema)


def _build_examples(pyarrow: Any, shard: Shard, places: Sequence[int], columns: Columns) -> Mapping[str, Any]:
    rows, begins = rows_of(shard, places)
    ids = shard.tensor("input_ids")[rows]
    texts, fields = _read_records(pyarrow, shard, places)
    built = {
        "index": pyarrow.array(shard.tensor("example")[list(places)].numpy()),
        "input_ids": _nest(pyarrow, begins, pyarrow.array(ids.numpy())),
        "text": texts,
        "fields": fields,
    }
    if columns.has_positions:
        built[POSITIONS] = _nest(pyarrow, begins, pyarrow.array(shard.tensor(POSITIONS)[rows].numpy()))
    if columns.tokens is not None:
        built["tokens"] = _nest(pyarrow, begins, pyarrow.array(columns.tokens(ids), pyarrow.string()))
    for site in columns.sites:
        values = pyarrow.array(take_site(shard, site, places).reshape(-1))
        if site.kind == "attention":
            lengths = begins.diff()
            heads = lengths.repeat_interleave(site.width)
            by_query = _nest(pyarrow, _sum_up(heads.repeat_interleave(heads)), values)
            by_head = _nest(pyarrow, _sum_up(heads), by_query)
            built[site.name] = _nest(pyarrow, torch.arange(len(places) + 1, device="cpu") * site.width, by_head)
        else:
            vectors = pyarrow.FixedSizeListArray.from_arrays(values, site.width)
            built[site.name] = _nest(pyarrow, begins, vectors) if site.kind == "token" else vectors
    return built


def _build_tokens(pyarrow: Any, shard: Shard, places: Sequence[int], columns: Columns) -> Mapping[str, Any]:
    rows, begins = rows_of(shard, places)
    ids = shard.tensor("input_ids")[rows]
    lengths, of_places = begins.diff(), torch.tensor(places, device="cpu")
    built = {
        "index": pyarrow.array(shard.tensor("example")[list(places)].repeat_interleave(lengths).numpy()),
        "position": pyarrow.array(positions_of(shard, rows, of_places.repeat_interleave(lengths)).numpy()),
        "input_id": pyarrow.array(ids.numpy()),
    }
    if columns.tokens is not None:
        built["token"] = pyarrow.array(columns.tokens(ids), pyarrow.string())
    for site in columns.sites:
        values = pyarrow.array(take_site(shard, site, places).reshape(-1))
        built[site.name] = pyarrow.FixedSizeListArray.from_arrays(values, site.width)
    return built


def _sum_up(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), lengths.cumsum(0)])


def _nest(pyarrow: Any, begins: Tensor, values: Any) -> Any:
    return pyarrow.ListArray.from_arrays(pyarrow.array(begins.to(torch.int32).numpy()), values)


def _read_records(pyarrow: Any, shard: Shard, places: Sequence[int]) -> tuple[Any, Any]:
    """Return the texts, and the other fields as JSON, because their types differ from record to record."""
    ordinals = shard.tensor("example")[list(places)].tolist()
    records = list(read_records(shard, ordinals, shard.header.file))
    try:
        texts = pyarrow.array([record.get("text") for record in records], pyarrow.string())
        fields = [
            json.dumps(record["fields"], ensure_ascii=False) if "fields" in record else None for record in records
        ]
        return texts, pyarrow.array(fields, pyarrow.string())
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{shard.header.file}: a record is damaged ({error}).") from error
