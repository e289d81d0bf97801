"""Go through the rows of a store for an analysis: which sites, in which order, with what they belong to.

A chunk holds whole examples, a few thousand rows of every site in float64, with ids, ordinals and positions. Memory
stays that of one chunk, however large the store. Rows that are not finite are refused by name.

Hides shards, dtypes and the choice of examples. Must never know of formulas.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from layerprobe.errors import NonFiniteError, SiteError
from layerprobe.store.catalog import Catalog
from layerprobe.store.difference import take_depth
from layerprobe.store.naming import match_sites
from layerprobe.store.reader import Store, open_store
from layerprobe.store.rows import choose_sites, take_rows
from layerprobe.store.shards import Shard, positions_of
from layerprobe.store.writer import StoredSite

__all__ = [
    "Chunk",
    "Mappings",
    "bar_of",
    "choose_depth",
    "count_rows",
    "count_types",
    "draw_rows",
    "need_store",
    "sweep",
]

_CHUNK_ROWS = 4096
_SHARDS_AHEAD = 3
# Read since mappings were last let go.
_MOST_MAPPED_BYTES = 16 << 20
# Rows that are drawn lie anywhere, and the system maps so much around each that it finds in its cache.
_AROUND_BYTES = 64 << 10
_DRAWN_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some examples of a store, at every site.

    Args:
        values: float64 `[n, D]` of each site.
        examples: int64 `[n]`, the ordinal that each row belongs to.
        positions: int64 `[n]`, its place in the example; None for pooled sites.
        input_ids: int64 `[n]`; None for pooled sites.
    """

    values: dict[str, Tensor]
    examples: Tensor
    positions: Tensor | None
    input_ids: Tensor | None


class Mappings:
    """What an analysis has read of a store's mapped files, let go of now and then so that it does not count as memory.

    Args:
        catalog: Of the store.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Take note of bytes that were read, none of which is needed in the files any more."""
        self._num_bytes += num_bytes
        if self._num_bytes > _MOST_MAPPED_BYTES:
            self._catalog.release()
            self._num_bytes = 0


def need_store(store: Any) -> Store:
    """Take a store, or open the one that a path names."""
    return store if isinstance(store, Store) else open_store(store)


def choose_depth(store: Store, patterns: str | Sequence[str] | None) -> list[StoredSite]:
    """Choose the sites of an analysis, all with a row per token or all with a vector per example.

    Args:
        store: The store.
        patterns: Over the stored sites; None for the embeddings, every layer's output and the final norm, or where
            there is none of those, for all that have rows.

    Raises:
        SiteError: a pattern matches nothing that is stored, or nothing stored has rows.
        OptionError: attention weights, or sites that have no rows in common.
    """
    if patterns is not None:
        names = match_sites(patterns, store.sites, str(store.place))
        if isinstance(patterns, str) or len(names) > 1:
            with_rows = [name for name in names if store[name].kind != "attention"]
            names = with_rows or names
    else:
        names = take_depth(store.stored_sites)
    if not names:
        raise SiteError(f"no site with rows in {store.place}: it holds {', '.join(store.sites) or 'none'}.")
    return list(choose_sites(store.catalog, names))


def count_rows(store: Store, sites: Sequence[StoredSite]) -> int:
    """Count the rows of sites that were chosen together."""
    return store.num_tokens if sites[0].kind == "token" else len(store)


def bar_of(total: int, what: str, progress: bool | None, unit: str = "rows") -> "tqdm[Any]":
    """Make a progress bar; None shows it only on a terminal, and not for what is done at once."""
    disable, delay = (None, 0.5) if progress is None else (not progress, 0.0)
    return tqdm(
        total=total, desc=what, unit=f" {unit}", unit_scale=unit == "rows", disable=disable, leave=False, delay=delay
    )


def sweep(
    store: Store,
    sites: Sequence[StoredSite],
    *,
    max_rows: int | None = None,
    seed: int = 0,
    what: str = "rows",
    progress: bool | None = None,
    finite: bool = True,
) -> Iterator[Chunk]:
    """Go through whole examples, chunk by chunk, as they lie.

    Args:
        store: The store.
        sites: From `choose_depth`.
        max_rows: About how many rows to take, in examples drawn at random; None for all.
        seed: Of the draw.
        what: What the progress bar says.
        progress: Whether to show it; None for only on a terminal.
        finite: Refuse rows that are not finite.

    Raises:
        NonFiniteError: a row is not finite; the message names the first.
    """
    num_rows = count_rows(store, sites)
    share = 1.0 if max_rows is None else min(1.0, max_rows / max(1, num_rows))
    catalog = store.catalog
    names = [site.name for site in sites]
    row_bytes, mapped = sum(site.bytes_per_vector for site in sites), Mappings(catalog)
    with bar_of(round(num_rows * share), what, progress) as bar:
        for number, shard in enumerate(store.iter_shards()):
            catalog.prefetch(range(number, number + _SHARDS_AHEAD), names)
            drawn = None
            if share < 1:
                drawn = np.random.default_rng([seed, number]).random(shard.header.num_examples) < share
            for rows, places in _cut(shard, sites[0].kind, drawn):
                chunk = _read(shard, sites, rows, places)
                if finite:
                    _refuse_nonfinite(store, chunk)
                yield chunk
                bar.update(len(rows))
            header = shard.header
            mapped.add(row_bytes * (header.num_tokens if sites[0].kind == "token" else header.num_examples))


def _cut(shard: Shard, kind: str, drawn: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut a shard into chunks of whole examples: their rows, and each row's place among the examples of the shard."""
    offsets = np.asarray(shard.offsets) if kind == "token" else np.arange(shard.header.num_examples + 1)
    lengths = np.diff(offsets)
    places = np.arange(len(lengths)) if drawn is None else np.flatnonzero(drawn)
    ends = np.cumsum(lengths[places])
    first = 0
    while first < len(places):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _CHUNK_ROWS, side="right")))
        chosen = places[first:last]
        of_rows = np.repeat(chosen, lengths[chosen])
        starts = np.repeat(np.cumsum(lengths[chosen]) - lengths[chosen], lengths[chosen])
        rows = offsets[of_rows] + np.arange(len(of_rows)) - starts
        if len(rows):
            yield rows, of_rows
        first = last


def _read(shard: Shard, sites: Sequence[StoredSite], rows: np.ndarray, places: np.ndarray) -> Chunk:
    picked, of = torch.from_numpy(rows), torch.from_numpy(places)
    values = {site.name: take_rows(shard, site, picked).double() for site in sites}
    examples = shard.tensor("example")[of]
    if sites[0].kind != "token":
        return Chunk(values, examples, None, None)
    return Chunk(values, examples, positions_of(shard, picked, of), shard.tensor("input_ids")[picked])


def _refuse_nonfinite(store: Store, chunk: Chunk) -> None:
    for site, values in chunk.values.items():
        is_bad = ~torch.isfinite(values).all(1)
        if bool(is_bad.any()):
            row = int(is_bad.nonzero()[0, 0])
            where = f"example {int(chunk.examples[row])}"
            if chunk.positions is not None:
                where = f"row {int(chunk.positions[row])} of {where}"
            raise NonFiniteError(
                f"{site!r} in {store.place}: {where} is not finite, and no statistic is made of it. Leave the site "
                "out, or extract it again in a wider dtype; 'layerprobe check' counts such rows."
            )


def draw_rows(
    store: Store, sites: Sequence[StoredSite], *, max_rows: int | None, seed: int, progress: bool | None
) -> Iterator[list[Tensor]]:
    """Go through rows of several sites mixed, in batches of at most 1,024, float64; not whole examples.

    Raises:
        NonFiniteError: as `sweep`.
    """
    names = [site.name for site in sites]
    mapped = Mappings(store.catalog)
    left = total = min(count_rows(store, sites), max_rows or count_rows(store, sites))
    with bar_of(total, "moments", progress) as bar:
        for batch in store.rows(_DRAWN_ROWS, shuffle=True, seed=seed, sites=names):
            if left <= 0:
                return
            values = [batch[name][:left].double() for name in names]
            if not all(bool(torch.isfinite(value).all()) for value in values):
                # the shuffled order does not know what a row belongs to; the order of the store does
                for _ in sweep(store, sites, progress=False):
                    pass
            yield values
            left -= len(values[0])
            mapped.add(_AROUND_BYTES * len(names) * len(values[0]))
            bar.update(len(values[0]))


def count_types(store: Store) -> tuple[Tensor, Tensor]:
    """Count how often each token id stands in a store, from the ids alone.

    Returns:
        int64 `[V]` each: the ids that occur, rising, and their counts.
    """
    counts: dict[int, int] = {}
    for shard in store.iter_shards():
        ids, times = torch.unique(shard.tensor("input_ids"), return_counts=True)
        for token_id, count in zip(ids.tolist(), times.tolist(), strict=True):
            counts[token_id] = counts.get(token_id, 0) + count
    ordered = sorted(counts)
    return torch.tensor(ordered, dtype=torch.int64), torch.tensor([counts[one] for one in ordered], dtype=torch.int64)
