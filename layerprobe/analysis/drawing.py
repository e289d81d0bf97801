"""Rows of a store in a mixed order, all of them or as many as are drawn, each fetched once.

A draw is of rows, not of examples: any row is as likely as any other. Memory stays that of one block of rows, however
large the store and the draw.

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

# A drawn row may lie anywhere, and with it the system maps so much around it as is in its cache.
_AROUND_BYTES = 64 << 10
_DRAWN_ROWS = 1024
# Rows of a draw that are mixed with each other, as they are held, and how many pieces they are of at least: shards, or
# parts of shards where there are too few. A piece is fetched at one time, so it has a limit of its own.
_BLOCK_BYTES = 128 << 20
_LEAST_BLOCK_PIECES = 16
_PIECE_BYTES = 256 << 20
# A plan takes some bytes for each, and whoever wrote the store says how wide a row is.
_MOST_PIECES = 1 << 20
# Of a store elsewhere, the one that is worked on and the one that is fetched meanwhile.
_PIECES_AHEAD = 2


def draw_numbers(count: int, wanted: int, seed: int) -> np.ndarray:
    """Draw numbers from `0 .. count - 1`, rising, each at most once; all where there are no more than wanted.

    Cost: some 400 bytes for each that is drawn, whatever the count.
    """
    if count <= wanted:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False, shuffle=False))


def draw_rows(
    store: Store, sites: Sequence[StoredSite], *, max_rows: int | None, seed: int, progress: bool | None
) -> Iterator[list[Tensor]]:
    """Go through rows of several sites mixed, in batches of at most 1,024, float64; not whole examples.

    All rows come in the order of an epoch of `store.rows`. Those of a draw lie anywhere in the store. All of them are
    mixed with each other if they take no more than 128 MiB, else by blocks of about as much, each of some 16 shards or
    more, or parts of shards, from all over the store.

    Raises:
        NonFiniteError: as `sweep`.

    Cost: of a draw, each shard is read once, or each part of it once; parts that are fetched from elsewhere are not
    held against the checksum of the whole. Memory of one block, that of `draw_numbers`, and of a store elsewhere two
    shards or parts, of 256 MiB at most each, beside its cache.
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
                # the shuffled order does not know what a row belongs to; the order of the store does
                for _ in sweep(store, sites, progress=False):
                    pass
            yield values
            mapped.add(_AROUND_BYTES * len(names) * len(values[0]))
            bar.update(len(values[0]))


@dataclass(frozen=True, eq=False)
class _Piece:
    """Rows `start .. stop - 1` of a shard, and the places among them of those that are drawn, rising."""

    shard: int
    start: int
    stop: int
    drawn: np.ndarray


def _read_drawn(store: Store, sites: Sequence[StoredSite], wanted: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Read rows that are drawn over the whole store, block by block, each block mixed."""
    catalog, mapped, maker = store.catalog, Mappings(store.catalog), np.random.default_rng([seed, 29])
    catalog.check_claims()
    for pieces in _plan_blocks(catalog, sites, wanted, seed):
        yield from _mix(_gather(catalog, sites, pieces, mapped), maker)


def _mix(rows: dict[str, Tensor], maker: np.random.Generator) -> Iterator[dict[str, Tensor]]:
    """Cut rows into batches at random; copies, so that no batch keeps a block in memory."""
    count = len(next(iter(rows.values())))
    for places in torch.from_numpy(maker.permutation(count)).split(_DRAWN_ROWS):
        yield {name: values[places] for name, values in rows.items()}


def _plan_blocks(catalog: Catalog, sites: Sequence[StoredSite], wanted: int, seed: int) -> Iterator[list[_Piece]]:
    """Draw rows, and put the pieces that they are of into blocks at random, each piece into one."""
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
    # blocks are of as many drawn rows, up to those of one piece
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
    """Bring the drawn rows of pieces together, piece by piece."""
    num_rows, filled = sum(len(piece.drawn) for piece in pieces), 0
    found = {site.name: torch.empty(num_rows, site.width, dtype=_held_dtype(site), device="cpu") for site in sites}
    names = [*found, *(site.name + SCALE_SUFFIX for site in sites if site.dtype == torch.int8)]
    spans = [(piece.shard, piece.start, piece.stop) for piece in pieces]
    # of a folder none: its mapping would be let go of before its turn, and made again
    ahead = 1 if catalog.place.folder is not None else _PIECES_AHEAD
    held = list[object]()
    for place, piece in enumerate(pieces):
        held = held[1:]  # what is done with is let go of first
        # what is read now comes whether there is room for it or not
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
