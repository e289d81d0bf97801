"""The two passes of `layerprobe.differences` over a store, and the state of each.

The first pass takes shuffled rows, for moments, CKA minibatches and a sample for neighbours. The second takes whole
examples, for statistics of rows, tokens and examples. Each keeps D x D numbers per site and a few per pair, type and
sampled row.

Letters: n rows, D width, S sites, P pairs. Must never know of files, tables or pictures.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from layerprobe.analysis.drawing import draw_numbers
from layerprobe.analysis.geometry import find_neighbours, mean_cosine, neighbour_overlap, unbiased_hsic
from layerprobe.analysis.moments import RunningMoments, Scaling, UnitSums
from layerprobe.analysis.sweep import Chunk
from layerprobe.store.description import StoredSite

__all__ = ["CKA_ROWS", "MovePass", "ShapePass"]

# Rows per CKA minibatch, as in Nguyen et al. 2021; the unbiased estimate needs at least 4.
CKA_ROWS = 256
_LEAST_CKA_ROWS = 4
# Ethayarajh 2019 takes 1,000 words, each with at least 5 contexts.
_MOST_WORDS = 1000
_LEAST_CONTEXTS = 5
_MOST_MOVES = 10


class ShapePass:
    """The first pass, over shuffled rows: moments of each site, CKA of each pair, a sample of rows for neighbours.

    Args:
        sites: The sites.
        sample: Size of the sample.
        num_rows: Number of rows that will come, from which the sample is drawn.
        seed: Seed of the sample.
    """

    def __init__(self, sites: Sequence[StoredSite], sample: int, num_rows: int, seed: int) -> None:
        self.moments = [RunningMoments(site.width) for site in sites]
        self._hsic = torch.zeros(len(sites), len(sites), dtype=torch.float64, device="cpu")
        # drawn from all rows, because in a large store the first rows come from only a few shards
        self._sampled = draw_numbers(num_rows, sample, seed)
        self._num_seen = 0
        self._kept: list[list[Tensor]] = [[] for _ in sites]

    def add(self, values: list[Tensor]) -> None:
        """Add a batch of shuffled rows, the same rows at each site."""
        for moments, rows in zip(self.moments, values, strict=True):
            moments.add(rows)
        first, last = np.searchsorted(self._sampled, (self._num_seen, self._num_seen + len(values[0])))
        sampled = torch.from_numpy(self._sampled[first:last] - self._num_seen)
        self._num_seen += len(values[0])
        for kept, rows in zip(self._kept, values, strict=True):
            kept.append(rows[sampled])
        for first in range(0, len(values[0]), CKA_ROWS):
            batch = [rows[first : first + CKA_ROWS] for rows in values]
            if len(batch[0]) >= _LEAST_CKA_ROWS:
                # a shorter last batch is unbiased too, but weighs less
                self._hsic += unbiased_hsic(batch) * len(batch[0])

    @property
    def cka(self) -> Tensor:
        """Linear CKA, float64 `[S, S]`; NaN where a site does not vary, or with fewer than 4 rows."""
        own = self._hsic.diagonal()
        scale = torch.outer(own, own).sqrt()
        return torch.where(scale > 0, self._hsic / scale, float("nan"))

    @property
    def num_sampled(self) -> int:
        """Number of rows in the sample."""
        return sum(len(rows) for rows in self._kept[0])

    def overlap(self, pairs: Sequence[tuple[int, int]], scalings: Sequence[Scaling], k: int) -> list[float]:
        """Compute the neighbour overlap of the sampled rows for pairs of sites."""
        if self.num_sampled <= k:
            return [float("nan")] * len(pairs)
        found = [
            find_neighbours(scaling.apply(torch.cat(kept)), k)
            for scaling, kept in zip(scalings, self._kept, strict=True)
        ]
        return [neighbour_overlap(found[a], found[b]) for a, b in pairs]


class MovePass:
    """The second pass, over whole examples: lengths and cosines of rows, how far each moves, and which move most.

    Args:
        sites: The sites.
        pairs: Indices into `sites`, two each.
        scalings: The preparation of each site's rows for a cosine.
        types: int64 `[V]` each, the ids that occur, ascending, and their counts; None for pooled sites.
        seed: Seed of the draw of words for self-similarity.
    """

    def __init__(
        self,
        sites: Sequence[StoredSite],
        pairs: Sequence[tuple[int, int]],
        scalings: Sequence[Scaling],
        types: tuple[Tensor, Tensor] | None,
        seed: int,
    ) -> None:
        self._names = [site.name for site in sites]
        self._pairs, self._scalings = list(pairs), list(scalings)
        self._is_even = [sites[a].width == sites[b].width for a, b in pairs]
        self.num_rows = 0
        self._norms = torch.zeros(len(sites), dtype=torch.float64, device="cpu")
        self.units = [UnitSums(site.width) for site in sites]
        # sums of L2, relative L2 and cosine distance, and the number of rows whose relative L2 is defined
        self._sums = torch.zeros(4, len(pairs), dtype=torch.float64, device="cpu")
        self._best: list[list[tuple[float, int, int]]] = [[] for _ in pairs]
        self._ids = types[0] if types is not None else None
        self._type_counts = torch.zeros(0 if types is None else len(types[0]), dtype=torch.int64, device="cpu")
        self._type_moves = torch.zeros(len(pairs), len(self._type_counts), dtype=torch.float64, device="cpu")
        words = torch.zeros(0, dtype=torch.int64, device="cpu")
        if types is not None:
            words = (types[1] >= _LEAST_CONTEXTS).nonzero().flatten()
            drawn = np.random.default_rng(seed).permutation(len(words))[:_MOST_WORDS]
            words = words[torch.from_numpy(np.sort(drawn))]
        # maps each type to its drawn word; types that were not drawn share the last index
        self._word_of = torch.full((len(self._type_counts),), len(words), dtype=torch.int64, device="cpu")
        self._word_of[words] = torch.arange(len(words), device="cpu")
        self._word_counts = torch.zeros(len(words) + 1, dtype=torch.int64, device="cpu")
        self._word_squares = torch.zeros(len(sites), len(words) + 1, dtype=torch.float64, device="cpu")
        self._word_sums = [torch.zeros(len(words) + 1, site.width, dtype=torch.float64, device="cpu") for site in sites]

    def add(self, chunk: Chunk) -> None:
        """Add a chunk of whole examples."""
        values = [chunk.values[name] for name in self._names]
        self.num_rows += len(chunk.examples)
        lengths = [rows.norm(dim=1) for rows in values]
        self._norms += torch.stack([length.sum() for length in lengths])
        units = [
            sums.add(scaling.apply(rows))
            for sums, scaling, rows in zip(self.units, self._scalings, values, strict=True)
        ]
        types = None
        if self._ids is not None:
            assert chunk.input_ids is not None
            types = torch.searchsorted(self._ids, chunk.input_ids)
            self._type_counts += torch.bincount(types, minlength=len(self._ids))
            self._add_words(units, self._word_of[types])
        # the rows of an example are consecutive
        ordinals, of_row, counts = torch.unique_consecutive(chunk.examples, return_inverse=True, return_counts=True)
        for pair, (a, b) in enumerate(self._pairs):
            if not self._is_even[pair]:
                continue
            moved = (values[b] - values[a]).norm(dim=1)
            has_length = lengths[a] > 0
            turned = 1 - (units[a] * units[b]).sum(1)
            sums = (moved.sum(), (moved[has_length] / lengths[a][has_length]).sum(), turned.sum(), has_length.sum())
            self._sums[:, pair] += torch.stack([value.double() for value in sums])
            if types is not None:
                self._type_moves[pair].index_add_(0, types, turned)
            means = torch.zeros(len(ordinals), dtype=torch.float64, device="cpu").index_add_(0, of_row, turned) / counts
            self._keep_best(pair, means, ordinals, counts)

    def _add_words(self, units: Sequence[Tensor], words: Tensor) -> None:
        self._word_counts += torch.bincount(words, minlength=len(self._word_counts))
        for site, rows in enumerate(units):
            self._word_sums[site].index_add_(0, words, rows)
            self._word_squares[site].index_add_(0, words, rows.square().sum(1))

    def _keep_best(self, pair: int, means: Tensor, ordinals: Tensor, counts: Tensor) -> None:
        most = means.topk(min(_MOST_MOVES, len(means))).indices
        found = zip(means[most].tolist(), ordinals[most].tolist(), counts[most].tolist(), strict=True)
        self._best[pair] = heapq.nlargest(_MOST_MOVES, [*self._best[pair], *found])

    @property
    def mean_norms(self) -> list[float]:
        """Mean length of the stored rows at each site."""
        return (self._norms / max(1, self.num_rows)).tolist()

    @property
    def self_similarity(self) -> list[float]:
        """Mean over words of the mean cosine between a word's rows, at each site; NaN if no word occurs five times."""
        found = []
        for sums, squares in zip(self._word_sums, self._word_squares, strict=True):
            of_words = [
                mean_cosine(sums[word], float(squares[word]), count)
                for word, count in enumerate(self._word_counts[:-1].tolist())
                if count > 1
            ]
            found.append(sum(of_words) / len(of_words) if of_words else float("nan"))
        return found

    @property
    def num_words(self) -> int:
        """Number of words that self-similarity is averaged over."""
        return int((self._word_counts[:-1] > 1).sum())

    def distances(self, pair: int) -> tuple[float | None, float | None, float | None]:
        """Return mean L2, relative L2 and cosine distance of a pair; None if the two widths differ."""
        if not self._is_even[pair]:
            return None, None, None
        moved, relative, turned, counted = self._sums[:, pair].tolist()
        # relative L2 is undefined if every row before has length 0
        return moved / self.num_rows, relative / counted if counted else None, turned / self.num_rows

    def most_moved_types(self, pair: int) -> list[tuple[int, int, float]]:
        """List the ids that move most, as id, count and mean distance; only ids that occur five times, if any do."""
        if self._ids is None or not self._is_even[pair]:
            return []
        counted = (self._type_counts >= _LEAST_CONTEXTS).nonzero().flatten()
        if not len(counted):
            counted = (self._type_counts > 0).nonzero().flatten()
        means = self._type_moves[pair][counted] / self._type_counts[counted]
        most = means.topk(min(_MOST_MOVES, len(means))).indices
        chosen = counted[most]
        found = zip(self._ids[chosen].tolist(), self._type_counts[chosen].tolist(), means[most].tolist(), strict=True)
        return list(found)

    def most_moved_examples(self, pair: int) -> list[tuple[int, int, float]]:
        """List the examples that move most, as ordinal, number of rows and mean cosine distance."""
        return [(ordinal, count, mean) for mean, ordinal, count in self._best[pair]]
