"""The order of an epoch of rows: which pieces of which shards are shuffled together, and where each row lies.

The order is fixed before the first row is read, so batch k does not depend on reading those before it. This makes it
identical for any number of workers and ranks, and lets an epoch resume in the middle.

Must never know how rows are read.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from layerprobe.errors import OptionError
from layerprobe.store.catalog import MOST_OPEN_SHARDS, Catalog
from layerprobe.store.description import StoredSite
from layerprobe.store.guard import check_count, check_flag

__all__ = ["ORDER", "EpochOrder", "RowOptions", "cut_shard"]

# Rows within a group are shuffled together: enough rows to span many shards, few enough that their pages stay in the
# page cache (or the fetched pieces in memory) while they are read at random.
_GROUP_ROWS = 1 << 20
_GROUP_BYTES = 1 << 30
_LEAST_GROUP_PIECES = 8
# A batch may span two groups.
_MOST_GROUP_PIECES = MOST_OPEN_SHARDS // 2
# A piece is a shard, or part of one that would fill too much of a group. Without shuffling, it is nearly always a whole
# shard, whose checksums can be verified.
_PIECE_ROWS = 1 << 17
# Most pieces fetched at once for ordered rows, so that the server's latency is paid once for all of them.
_PIECES_AHEAD = 16
# An order takes about a hundred bytes per piece, and the row width in an untrusted store may be any number.
_MOST_PIECES = 1 << 20
# Version of the shuffling algorithm; an epoch cannot resume under another version.
ORDER = 2


@dataclass(frozen=True)
class RowOptions:
    """Options for iterating over rows, documented in `SiteView.rows` and `Store.rows`.

    Raises:
        OptionError: a value is invalid.
    """

    batch_size: int = 4096
    shuffle: bool = False
    seed: int = 0
    rank: int = 0
    world: int = 1
    epoch: int = 0

    def __post_init__(self) -> None:
        check_flag("shuffle", self.shuffle)
        for name, least in (("batch_size", 1), ("seed", 0), ("world", 1), ("epoch", 0)):
            check_count(name, getattr(self, name), least)
        # `epoch` is the caller's loop counter, shuffled or not; a seed without shuffle is a mistake
        if self.seed and not self.shuffle:
            raise OptionError(
                f"seed is {self.seed} and shuffle is False: without shuffle=True rows come as they lie. "
                "Pass shuffle=True, or leave out the seed."
            )
        if isinstance(self.rank, bool) or self.rank not in range(self.world):
            raise OptionError(f"rank is {self.rank!r}: of world={self.world} ranks it must be 0 to {self.world - 1}.")


class EpochOrder:
    """Where each row of an epoch lies: groups of shard pieces, with the rows shuffled within each group."""

    def __init__(self, catalog: Catalog, sites: Sequence[StoredSite], options: RowOptions) -> None:
        self._options = options
        catalog.check_claims()
        counts = [sites[0].count_vectors(info) for info in catalog.shards]
        row_bytes = max(1, sum(site.bytes_per_vector for site in sites))
        self._pair_rows = max(1, 2 * _GROUP_BYTES // row_bytes)
        most_rows = min(_GROUP_ROWS, max(1, _GROUP_BYTES // row_bytes))
        piece_rows = min(_PIECE_ROWS, max(1, most_rows // _LEAST_GROUP_PIECES)) if options.shuffle else self._pair_rows
        self.num_rows = sum(counts)
        piece_rows = max(piece_rows, -(-self.num_rows // _MOST_PIECES))
        pieces = [piece for number, count in enumerate(counts) for piece in cut_shard(number, count, piece_rows)]
        if options.shuffle:
            pieces = [pieces[place] for place in self._permute(len(pieces), 0).tolist()]
        wanted = min(-(-self.num_rows // most_rows), len(pieces) // _LEAST_GROUP_PIECES)
        num_groups = max(1, wanted, -(-len(pieces) // _MOST_GROUP_PIECES))
        cuts = [len(pieces) * group // num_groups for group in range(num_groups + 1)]
        self.groups = [pieces[start:stop] for start, stop in pairwise(cuts)]
        self.bounds = [np.cumsum([0, *(stop - start for _, start, stop in group)]) for group in self.groups]
        self.starts = np.cumsum([0, *(int(bounds[-1]) for bounds in self.bounds)]).tolist()
        self._mixed: tuple[int, np.ndarray] | None = None

    def _permute(self, count: int, stream: int) -> np.ndarray:
        """Permute `0 .. count - 1` from a raw bit stream, which numpy keeps stable, unlike `Generator.permutation`."""
        seeds = np.random.SeedSequence([int(self._options.seed), int(self._options.epoch), stream])
        return np.argsort(np.random.PCG64(seeds).random_raw(count))

    def locate(self, rows: np.ndarray) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """Locate ascending rows of a shuffled epoch: yield group, span within `rows`, and places in the group."""
        first = 0
        while first < len(rows):
            group = bisect_right(self.starts, int(rows[first])) - 1
            last = int(np.searchsorted(rows, self.starts[group + 1]))
            if self._mixed is None or self._mixed[0] != group:
                self._mixed = None  # free the old permutation before allocating the next
                self._mixed = group, self._permute(self.starts[group + 1] - self.starts[group], group + 1)
            yield group, first, last, self._mixed[1][rows[first:last] - self.starts[group]]
            first = last

    def find_runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Locate rows of an ordered epoch: yield each group, piece, and the range of rows in the piece."""
        while start < stop:
            group = bisect_right(self.starts, start) - 1
            place = start - self.starts[group]
            piece = bisect_right(self.bounds[group], place) - 1
            first = place - int(self.bounds[group][piece])
            last = min(int(self.bounds[group][piece + 1]) - int(self.bounds[group][piece]), first + stop - start)
            yield group, piece, first, last
            start += last - first

    def list_coming(self, row: int, share: range, batch_size: int) -> list[tuple[int, int, int]]:
        """List the piece that contains a row of an ordered epoch, and those that the share's batches need next."""
        found, left = list[tuple[int, int, int]](), self._pair_rows
        while row < self.num_rows and len(found) < _PIECES_AHEAD:
            # the first turn of this share whose batch holds that row or a later one
            turn = max(0, -((share.start - row // batch_size) // share.step))
            if turn >= len(share):
                break
            row = max(row, share[turn] * batch_size)
            group, piece, _, _ = next(self.find_runs(row, row + 1))
            _, start, stop = self.groups[group][piece]
            left -= stop - start
            if found and left < 0:
                break
            found.append(self.groups[group][piece])
            row = self.starts[group] + int(self.bounds[group][piece + 1])
        return found


def cut_shard(number: int, count: int, piece_rows: int) -> Iterator[tuple[int, int, int]]:
    """Split the rows of a shard into as few pieces as possible, of about equal size."""
    num_pieces = -(-count // piece_rows)
    for piece in range(num_pieces):
        yield number, count * piece // num_pieces, count * (piece + 1) // num_pieces
