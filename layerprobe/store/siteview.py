"""One site of a store: its values example by example, pooled, or row by row.

What indexing gives is a view of the mapped file, not a copy. An index is an ordinal of the input, a slice one of
ordinals; on a store with gaps both say what is missing, and iterating gives what is there.

Hides how kinds and dtypes lie in a shard. Must never know of models or hooks.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.errors import OptionError
from layerprobe.store.catalog import Catalog
from layerprobe.store.format import SCALE_SUFFIX
from layerprobe.store.shards import MappedShard, ScaledRows, pool_packed

__all__ = ["SiteView"]

_BLOCK_ROWS = 1024
_SHUFFLE_BLOCKS = 64


class SiteView(Sequence[Tensor | ScaledRows]):
    """One site of a store, example by example. Made by `store[site]`.

    `view[17]` is `[T, D]` for a site with a row per token, `[D]` for a pooled one, `[H, T, T]` for attention weights: a
    view of the mapped file in the stored dtype (int8 comes as `ScaledRows`); a slice or a list of ordinals gives a
    list of them.
    """

    def __init__(self, catalog: Catalog, site: str) -> None:
        self.catalog = catalog
        self.site = site
        stored = catalog.sites[site]
        self.kind: str = stored.kind  # `token`: a row per token; `example`: a vector each; `attention`: [H, len, len]
        self.dtype: torch.dtype = stored.dtype
        self.width: int = stored.width  # D; the number of heads for `attention`
        self._scale_name = site + SCALE_SUFFIX if stored.dtype == torch.int8 else None

    def __repr__(self) -> str:
        return f"SiteView({self.site!r}, {len(self)} examples, {self.kind}, {self.width} x {self.dtype})"

    def __len__(self) -> int:
        return self.catalog.num_examples

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[ordinal] for ordinal in range(*index.indices(self.catalog.end))]
        if isinstance(index, bool) or (type(index) is not int and np.ndim(index) > 0):
            ordinals = np.asarray(index)
            if ordinals.size and ordinals.dtype.kind not in "iu":
                raise OptionError(f"{self.site!r} is indexed by ordinals: an index of {ordinals.dtype} is none.")
            return [self[int(ordinal)] for ordinal in ordinals]
        try:
            shard, ordinal = self.catalog.find(index)
        except TypeError as error:
            raise OptionError(f"{self.site!r} is indexed by ordinals, not by {index!r}.") from error
        position, start, stop = shard.span(ordinal)
        if self.kind == "token":
            values = shard.tensor(self.site)[start:stop]
            return (
                values if self._scale_name is None else ScaledRows(values, shard.tensor(self._scale_name)[start:stop])
            )
        if self.kind == "example":
            return self._take(shard, position)
        length, first = stop - start, self.width * shard.pairs_before[position]
        flat = shard.tensor(self.site)[first : first + self.width * length * length]
        return flat.view(self.width, length, length)

    def __iter__(self) -> Iterator[Tensor | ScaledRows]:
        return (self[ordinal] for ordinal in self.catalog.ordinals())

    def __reversed__(self) -> Iterator[Tensor | ScaledRows]:
        return (self[ordinal] for ordinal in reversed(list(self.catalog.ordinals())))

    def _take(self, shard: MappedShard, where: int | slice | Tensor) -> Tensor | ScaledRows:
        values = shard.tensor(self.site)[where]
        if self._scale_name is not None:
            return ScaledRows(values, shard.tensor(self._scale_name)[where])
        return values

    def pooled(self, pool: str | None = None) -> Tensor:
        """Reduce each example to one vector, in the order of the input.

        Args:
            pool: `mean`, `max`, `cls` (first token) or `last`, over all real tokens, special ones included; None for
                `mean`. A site with one vector per example was pooled already, and takes only None or its own.

        Returns:
            float32 `[N, D]`. An example without tokens gives NaN.

        Raises:
            OptionError: the pool does not exist, or the store was pooled otherwise.

        Cost: one pass over the site, one shard in float32 at a time.
        """
        self._refuse_attention("pooled")
        if pool not in (None, "mean", "max", "cls", "last", self.catalog.pool):
            raise OptionError(f"no pool {pool!r}: use mean, max, cls or last.")
        if self.kind != "token" and pool not in (None, self.catalog.pool):
            raise OptionError(f"{self.site!r} has one vector per example, pooled by {self.catalog.pool}, not {pool!r}.")
        out = torch.empty(len(self), self.width, dtype=torch.float32)
        row = 0
        for shard in self.catalog.iter_shards():
            vectors = self._take(shard, slice(None)).float()
            if self.kind == "token":
                vectors = pool_packed(vectors, shard.tensor("offsets"), pool or "mean")
            count = shard.header.num_examples
            out[row : row + count] = vectors[torch.tensor(shard.position, dtype=torch.long)]
            row += count
        return out

    def rows(self, batch_size: int = 4096, shuffle: bool = False, seed: int = 0) -> Iterator[Tensor]:
        """Go through every vector of the site once, batch by batch.

        Args:
            batch_size: Vectors per batch; the last may be smaller.
            shuffle: Mix them over all shards. Blocks of 1,024 rows are taken in random order, 64 at a time, and mixed
                among themselves, so memory stays at a few tens of thousands of rows.
            seed: The order is a function of it.

        Returns:
            An iterator of `[batch_size, D]` copies in the stored dtype (float32 where int8 is stored).
        """
        self._refuse_attention("gone through by rows")
        if batch_size < 1:
            raise OptionError(f"batch_size is {batch_size}: it must be at least 1.")
        return self._iter_rows(batch_size, shuffle, seed)

    def _refuse_attention(self, what: str) -> None:
        if self.kind == "attention":
            raise OptionError(f"{self.site!r} is one matrix per head and cannot be {what}: read it by example.")

    def _iter_rows(self, batch_size: int, shuffle: bool, seed: int) -> Iterator[Tensor]:
        blocks = [
            (number, start, min(start + _BLOCK_ROWS, count))
            for number, info in enumerate(self.catalog.shards)
            for count in [info.num_tokens if self.kind == "token" else info.num_examples]
            for start in range(0, count, _BLOCK_ROWS)
        ]
        random = np.random.default_rng(seed)
        if shuffle:
            random.shuffle(blocks)
        pending: list[Tensor] = []
        for first in range(0, len(blocks), _SHUFFLE_BLOCKS):
            pending += [self._block(*block) for block in blocks[first : first + _SHUFFLE_BLOCKS]]
            window = torch.cat(pending)
            if shuffle:
                window = window[torch.from_numpy(random.permutation(len(window)))]
            whole = len(window) - len(window) % batch_size
            yield from window[:whole].split(batch_size) if whole else ()
            pending = [window[whole:]]
        if pending and len(pending[0]):
            yield pending[0]

    def _block(self, number: int, start: int, stop: int) -> Tensor:
        vectors = self._take(self.catalog.shard(number), slice(start, stop))
        return vectors.float() if isinstance(vectors, ScaledRows) else vectors
