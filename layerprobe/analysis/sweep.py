"""Read the rows of a store for an analysis: chosen sites, in store order, with their examples, positions and tokens.

A chunk holds whole examples, a few thousand rows of every site in float64, with ids, ordinals and positions. Memory
is bounded by one chunk, however large the store. A row that is not finite raises an error that names it.

Hides shards, dtypes and the choice of examples. Must never know of formulas.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layerprobe.errors import NonFiniteError, SiteError
from layerprobe.store.catalog import Catalog
from layerprobe.store.description import Counts, StoredSite
from layerprobe.store.difference import take_depth
from layerprobe.store.naming import leave_out
from layerprobe.store.reader import Store
from layerprobe.store.rows import choose_sites, take_rows
from layerprobe.store.shards import Shard, positions_of
from layerprobe.telling import make_bar

__all__ = [
    "Chunk",
    "Mappings",
    "choose_depth",
    "count_types",
    "sweep",
]

_CHUNK_ROWS = 4096
# Bytes read before mappings are released.
_MOST_MAPPED_BYTES = 16 << 20
# Number of histogram bins for the random keys of examples; the last example to take is searched within one bin.
_BINS = 4096


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some examples of a store, at every site.

    Args:
        values: float64 `[n, D]` of each site.
        examples: int64 `[n]`, the ordinal of each row's example.
        positions: int64 `[n]`, the position of each row in its example; None for pooled sites.
        input_ids: int64 `[n]`, the token id of each row; None for pooled sites.
    """

    values: dict[str, Tensor]
    examples: Tensor
    positions: Tensor | None
    input_ids: Tensor | None


class Mappings:
    """A count of bytes read from mapped files, which releases the mappings regularly to keep resident memory low.

    Args:
        catalog: The store's catalog.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count bytes that were read and are no longer needed; release the mappings once 16 MiB have been read."""
        self._num_bytes += num_bytes
        if self._num_bytes > _MOST_MAPPED_BYTES:
            self._catalog.release()
            self._num_bytes = 0

    def add_shard(self, sites: Sequence[StoredSite], counts: Counts) -> None:
        """Count a whole shard at some sites, because its checksum reads whole tensors however few rows are drawn."""
        self.add(sum(site.bytes_per_vector * site.count_vectors(counts) for site in sites))


def choose_depth(store: Store, patterns: str | Sequence[str] | None) -> list[StoredSite]:
    """Choose the sites of an analysis, all with a row per token or all with a vector per example.

    Args:
        store: The store.
        patterns: Patterns over the stored sites; attention weights that only a wildcard matches are left out. None for
            the embeddings, every layer's output and the final norm, or, if none of those is stored, for all sites that
            have rows.

    Raises:
        SiteError: a pattern matches nothing that is stored, or nothing stored has rows.
        OptionError: attention weights, or sites that have no rows in common.
    """
    if patterns is not None:
        stored = store.stored_sites
        # attention weights that are named explicitly are refused by choose_sites
        names, _ = leave_out(patterns, store.sites, str(store.place), lambda name: stored[name].kind == "attention")
    else:
        names = take_depth(store.stored_sites)
    if not names:
        raise SiteError(f"no site with rows in {store.place}: it holds {', '.join(store.sites) or 'none'}.")
    return list(choose_sites(store.catalog, names))


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
    """Iterate over whole examples in chunks, in store order.

    Args:
        store: The store.
        sites: From `choose_depth`.
        max_rows: Number of rows to take, in whole examples drawn at random, the last of which may exceed it; None for
            all.
        seed: Seed of the draw.
        what: Label of the progress bar.
        progress: Show a progress bar; None: only on a terminal.
        finite: Whether to refuse rows that are not finite.

    Raises:
        NonFiniteError: a row is not finite; the message names the first.
    """
    num_rows = sites[0].count_vectors(store.catalog)
    total = num_rows if max_rows is None else min(num_rows, max_rows)
    catalog, kind = store.catalog, sites[0].kind
    most = None if total == num_rows else _find_most(store, kind, total, seed)
    names = [site.name for site in sites]
    mapped = Mappings(catalog)
    with make_bar(total, what, progress) as bar:
        for number, shard in enumerate(store.iter_shards()):
            catalog.prefetch(range(number, len(catalog.shards)), names)
            drawn = None if most is None else _draw_keys(shard, number, seed) <= most
            for rows, places in _cut(shard, kind, drawn):
                chunk = _read(shard, sites, rows, places)
                if finite:
                    _refuse_nonfinite(store, chunk)
                yield chunk
                bar.update(len(rows))
            mapped.add_shard(sites, shard.header)


def _draw_keys(shard: Shard, number: int, seed: int) -> np.ndarray:
    """Draw a random key from 0 to 1 for each example of a shard; sorting all keys gives a random order of the store."""
    return np.random.default_rng([seed, number]).random(shard.header.num_examples)


def _find_most(store: Store, kind: str, wanted: int, seed: int) -> float:
    """Find the key of the last example to take so that, in the order of the keys, there are `wanted` rows.

    Cost: two passes over the lengths of the examples; memory for those of one shard, and of 1/4,096 of all examples.
    """
    rows = np.zeros(_BINS)
    for keys, lengths in _key_shards(store, kind, seed):
        rows += np.bincount((keys * _BINS).astype(np.int64), weights=lengths, minlength=_BINS)
    ends = np.cumsum(rows)
    last = int(np.searchsorted(ends, wanted))
    near = [(keys[at], lengths[at]) for keys, lengths in _key_shards(store, kind, seed)
            for at in [(keys * _BINS).astype(np.int64) == last]]  # fmt: skip
    keys, lengths = (np.concatenate(parts) for parts in zip(*near, strict=True))
    order = np.argsort(keys)
    reached = ends[last] - rows[last] + np.cumsum(lengths[order])
    return float(keys[order][np.searchsorted(reached, wanted)])


def _key_shards(store: Store, kind: str, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the keys and the numbers of rows of all examples, shard by shard."""
    for number, shard in enumerate(store.iter_shards()):
        store.catalog.prefetch(range(number, store.num_shards), ["offsets"])
        yield _draw_keys(shard, number, seed), np.diff(_offsets(shard, kind))


def _offsets(shard: Shard, kind: str) -> np.ndarray:
    return np.asarray(shard.offsets) if kind == "token" else np.arange(shard.header.num_examples + 1)


def _cut(shard: Shard, kind: str, drawn: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut a shard into chunks of whole examples; yields row numbers and the index of each row's example."""
    offsets = _offsets(shard, kind)
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


def count_types(store: Store) -> tuple[Tensor, Tensor]:
    """Count how often each token id occurs in a store, reading only the ids.

    Returns:
        int64 `[V]` each: the ids that occur, ascending, and their counts.
    """
    counts: dict[int, int] = {}
    for shard in store.iter_shards():
        ids, times = torch.unique(shard.tensor("input_ids"), return_counts=True)
        for token_id, count in zip(ids.tolist(), times.tolist(), strict=True):
            counts[token_id] = counts.get(token_id, 0) + count
    ordered = sorted(counts)
    return torch.tensor(ordered, dtype=torch.int64, device="cpu"), torch.tensor(
        [counts[one] for one in ordered], dtype=torch.int64, device="cpu"
    )
