"""Read rows of a store in shuffled order, all of them or a random sample, each once.

The sample is of rows, not of examples: every row is equally likely. Memory is bounded by one block of rows, however
large the store and the sample.

Hides which part of which shard is read when. Must never know of formulas.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layerprobe.analysis.sweep import Mappings, sweep
from layerprobe.store.catalog import Catalog
from layerprobe.store.description import StoredSite
from layerprobe.store.headers import SCALE_SUFFIX
from layerprobe.store.order import cut_shard
from layerprobe.store.reader import Store
from layerprobe.store.shards import ScaledRows, Shard
from layerprobe.telling import make_bar

__all__ = ["draw_numbers", "draw_rows"]

# Reading one row makes the system map up to this much of its cache around the row.
_AROUND_BYTES = 64 << 10
_DRAWN_ROWS = 1024
# Drawn rows are shuffled within blocks of this size in memory, each from at least this many pieces: shards, or parts of
# shards where there are too few. A piece is fetched at once, so its size is limited too.
_BLOCK_BYTES = 128 << 20
_LEAST_BLOCK_PIECES = 16
_PIECE_BYTES = 256 << 20
# The plan takes memory for each piece, and the width of a row, which sets their number, comes from an untrusted store.
_MOST_PIECES = 1 << 20
# For a store behind a URL: the piece being processed, and the next one, fetched in the meantime.
_PIECES_AHEAD = 2


def draw_numbers(count: int, wanted: int, seed: int) -> np.ndarray:
    """Draw `wanted` numbers from `0 .. count - 1` without replacement, in ascending order; all if `count <= wanted`.

    Cost: about 400 bytes per drawn number, whatever the count.
    """
    if count <= wanted:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False, shuffle=False))


def draw_rows(
    store: Store, sites: Sequence[StoredSite], *, max_rows: int | None, seed: int, progress: bool | None
) -> Iterator[list[Tensor]]:
    """Iterate over rows of several sites in shuffled order, in float64 batches of at most 1,024; not whole examples.

    Without a limit, rows come in the order of a shuffled epoch of `store.rows`. A sample is drawn from the whole store.
    It is shuffled as a whole if it takes at most 128 MiB, otherwise in blocks of about that size, each of which takes
    about 16 or more shards, or parts of shards, from all over the store.

    Raises:
        NonFiniteError: as `sweep`.

    Cost: for a sample, each shard, or each part of it, is read once; parts fetched from a URL are not checked against
    the checksum of the whole tensor. Memory for one block, for `draw_numbers`, and for a store behind a URL two shards
    or parts of at most 256 MiB each, in addition to its cache.
    """
    names = [site.name for site in sites]
    mapped = Mappings(store.catalog)
    num_rows = sites[0].count_vectors(store.catalog)
    wanted = num_rows if max_rows is None else min(num_rows, max_rows)
    batches: Iterator[dict[str, Tensor]] = (
        store.rows(_DRAWN_ROWS, shuffle=True, seed=seed, sites=names)
        if wanted == num_rows
        else _read_drawn(store, sites, wanted, seed)
    )
    with make_bar(wanted, "moments", progress) as bar:
        for batch in batches:
            values = [batch[name].double() for name in names]
            if not all(bool(torch.isfinite(value).all()) for value in values):
                # a shuffled batch cannot name the row; a sweep in store order raises the error with its name
                for _ in sweep(store, sites, progress=False):
                    pass
            yield values
            mapped.add(_AROUND_BYTES * len(names) * len(values[0]))
            bar.update(len(values[0]))


@dataclass(frozen=True, eq=False)
class _Piece:
    """Rows `start .. stop - 1` of a shard, and the ascending positions of the drawn rows among them."""

    shard: int
    start: int
    stop: int
    drawn: np.ndarray


def _read_drawn(store: Store, sites: Sequence[StoredSite], wanted: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Read a random sample of the store's rows block by block, each block shuffled."""
    catalog, mapped, maker = store.catalog, Mappings(store.catalog), np.random.default_rng([seed, 29])
    catalog.check_claims()
    for pieces in _plan_blocks(catalog, sites, wanted, seed):
        yield from _mix(_gather(catalog, sites, pieces, mapped), maker)


def _mix(rows: dict[str, Tensor], maker: np.random.Generator) -> Iterator[dict[str, Tensor]]:
    """Split rows into random batches; they are copies, so that no batch keeps its block in memory."""
    count = len(next(iter(rows.values())))
    for places in torch.from_numpy(maker.permutation(count)).split(_DRAWN_ROWS):
        yield {name: values[places] for name, values in rows.items()}


def _plan_blocks(catalog: Catalog, sites: Sequence[StoredSite], wanted: int, seed: int) -> Iterator[list[_Piece]]:
    """Draw rows, and assign the pieces that contain them to blocks at random, each piece to one block."""
    counts = [sites[0].count_vectors(info) for info in catalog.shards]
    num_rows = sum(counts)
    held_bytes = max(1, sum(site.width * _held_dtype(site).itemsize for site in sites))
    num_blocks = -(-wanted // max(_DRAWN_ROWS, _BLOCK_BYTES // held_bytes))
    piece_rows = _PIECE_BYTES // max(1, sum(site.bytes_per_vector for site in sites))
    if num_blocks > 1:
        piece_rows = min(piece_rows, num_rows // (num_blocks * _LEAST_BLOCK_PIECES))
    piece_rows = max(1, piece_rows, -(-num_rows // _MOST_PIECES))
    spans = [span for number, count in enumerate(counts) for span in cut_shard(number, count, piece_rows)]
    edges = np.cumsum([0, *(stop - start for _, start, stop in spans)])
    numbers, maker = draw_numbers(num_rows, wanted, seed), np.random.default_rng([seed, 31])
    cuts = np.searchsorted(numbers, edges)
    order = maker.permutation(len(spans))
    order = order[np.diff(cuts)[order] > 0]
    # blocks have equally many drawn rows, to within one piece
    block_of = (np.cumsum(np.diff(cuts)[order]) - 1) * num_blocks // wanted
    for block in np.split(order, np.flatnonzero(np.diff(block_of)) + 1):
        pieces = []
        for place in block.tolist():
            shard, start, stop = spans[place]
            pieces.append(_Piece(shard, start, stop, numbers[cuts[place] : cuts[place + 1]] - edges[place]))
        yield pieces


def _held_dtype(site: StoredSite) -> torch.dtype:
    return torch.float32 if site.dtype == torch.int8 else site.dtype


def _gather(
    catalog: Catalog, sites: Sequence[StoredSite], pieces: Sequence[_Piece], mapped: Mappings
) -> dict[str, Tensor]:
    """Gather the drawn rows of several pieces, piece by piece."""
    num_rows, filled = sum(len(piece.drawn) for piece in pieces), 0
    found = {site.name: torch.empty(num_rows, site.width, dtype=_held_dtype(site), device="cpu") for site in sites}
    names = [*found, *(site.name + SCALE_SUFFIX for site in sites if site.dtype == torch.int8)]
    spans = [(piece.shard, piece.start, piece.stop) for piece in pieces]
    # no piece ahead for a folder: its mapping would be released before use, then mapped again
    ahead = 1 if catalog.place.folder is not None else _PIECES_AHEAD
    held = list[object]()
    for place, piece in enumerate(pieces):
        held = held[1:]  # release the finished piece before fetching the next
        # the piece needed now is fetched even if the cache has no room for it
        held += catalog.fetch(spans[place + len(held) : place + ahead], names, num_needed=1 - len(held))
        shard, end = catalog.shard(piece.shard), filled + len(piece.drawn)
        for site in sites:
            found[site.name][filled:end] = _take_drawn(shard, site, piece)
        filled = end
        mapped.add_shard(sites, catalog.shards[piece.shard])
    return found


def _take_drawn(shard: Shard, site: StoredSite, piece: _Piece) -> Tensor:
    picked = torch.from_numpy(piece.drawn)
    values = shard.piece(site.name, piece.start, piece.stop)[picked]
    if site.dtype != torch.int8:
        return values
    return ScaledRows(values, shard.piece(site.name + SCALE_SUFFIX, piece.start, piece.stop)[picked]).float()
