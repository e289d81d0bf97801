"""One site of a store: its values by example, pooled, or row by row.

Indexing returns views of the mapped file, not copies. An index is an ordinal of the input, and a slice a range of
ordinals; on an incomplete store both raise for missing examples, while iteration skips them.

Hides how kinds and dtypes are laid out in a shard. Must never know of models or hooks.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.errors import OptionError, StoreError
from layerprobe.store.catalog import Catalog
from layerprobe.store.guard import brief
from layerprobe.store.headers import SCALE_SUFFIX
from layerprobe.store.order import RowOptions
from layerprobe.store.rows import RowBatches, choose_sites, take_rows
from layerprobe.store.shards import POOLS, ScaledRows, Shard, pool_packed, span_of
from layerprobe.tables import format_count

__all__ = ["SiteView"]

_NUMPY_DTYPES = (torch.float64, torch.float32, torch.float16)
# Rows converted to float32 at a time while pooling.
_POOLED_ROWS = 1 << 15


class SiteView(Sequence[Tensor | ScaledRows]):
    """One site of a store, example by example. Made by `store[site]`.

    `view[17]` is `[T, D]` for a site with a row per token, `[D]` for a pooled one, `[H, T, T]` for attention weights: a
    view of the mapped file in the stored dtype (int8 comes as `ScaledRows`); a slice or a list of ordinals gives a
    list of them. Bounds of a slice that are left out or negative are relative to what is there; between others, an
    example that is not there yet is a `MissingExample`.
    """

    def __init__(self, catalog: Catalog, site: str) -> None:
        self.catalog = catalog
        self.site = site
        stored = self._stored = catalog.sites[site]
        self.kind: str = stored.kind  # `token`: a row per token; `example`: a vector each; `attention`: [H, len, len]
        self.dtype: torch.dtype = stored.dtype
        self.width: int = stored.width  # D; the number of heads for `attention`
        self._scale_name = site + SCALE_SUFFIX if stored.dtype == torch.int8 else None

    def __repr__(self) -> str:
        return (
            f"SiteView({self.site!r}, {format_count(len(self), 'example')}, {self.kind}, {self.width} x {self.dtype})"
        )

    def __len__(self) -> int:
        return self.catalog.num_examples

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[ordinal] for ordinal in self.catalog.slice_ordinals(index)]
        if type(index) is not int and (ordinals := self._list_ordinals(index)) is not None:
            return [self[ordinal] for ordinal in ordinals]
        shard, ordinal = self.catalog.find(index)
        position, start, stop = span_of(shard, ordinal)
        if self.kind == "token":
            values = shard.part(self.site, start, stop)
            return values if self._scale_name is None else ScaledRows(values, shard.part(self._scale_name, start, stop))
        if self.kind == "example":
            values = shard.part(self.site, position, position + 1)[0]
            if self._scale_name is None:
                return values
            return ScaledRows(values, shard.part(self._scale_name, position, position + 1)[0])
        length, first = stop - start, self.width * shard.pairs_before[position]
        flat = shard.part(self.site, first, first + self.width * length * length)
        return flat.view(self.width, length, length)

    def _list_ordinals(self, index: Any) -> list[int] | None:
        """Parse an index as a list of ordinals; None if it is not a list."""
        try:
            ordinals = np.asarray(index)
        except ValueError as error:  # lists of different lengths
            raise OptionError(
                f"{self.site!r} is indexed by ordinals: {brief(repr(index))} is no list of them."
            ) from error
        if ordinals.ndim == 0 and not isinstance(index, bool):
            return None
        if ordinals.ndim != 1:
            raise OptionError(f"{self.site!r} is indexed by ordinals: {brief(repr(index))} is no list of them.")
        if ordinals.size and ordinals.dtype.kind not in "iu":
            raise OptionError(f"{self.site!r} is indexed by ordinals: an index of {ordinals.dtype} is none.")
        return ordinals.tolist()

    def __iter__(self) -> Iterator[Tensor | ScaledRows]:
        held: list[object] = []
        for number, info in enumerate(self.catalog.shards):
            self._prefetch(number, held)
            for ordinal in range(info.first_example, info.first_example + info.num_examples):
                yield self[ordinal]

    def __reversed__(self) -> Iterator[Tensor | ScaledRows]:
        return (self[ordinal] for ordinal in reversed(list(self.catalog.ordinals())))

    def _take(self, shard: Shard, where: int | slice | Tensor) -> Tensor | ScaledRows:
        values = shard.tensor(self.site)[where]
        if self._scale_name is not None:
            return ScaledRows(values, shard.tensor(self._scale_name)[where])
        return values

    def numpy(self, index: int) -> np.ndarray:
        """Return an example as a numpy array: a view of the mapped file, like `view[index]`.

        Raises:
            OptionError: numpy has no such dtype (bfloat16, float8), or the values need their scale (int8).
            MissingExample: the example is not in the store.
        """
        if self._scale_name is not None or self.dtype not in _NUMPY_DTYPES:
            why = "int8 values mean nothing without their scale" if self._scale_name else f"numpy has no {self.dtype}"
            raise OptionError(f"{self.site!r} as a numpy array: {why}. Use view[{index!r}].float().numpy(), a copy.")
        values = self[index]
        if isinstance(values, list):
            raise OptionError(f"{self.site!r} as a numpy array: {index!r} is not one example. Ask for them one by one.")
        return values.numpy()

    def pooled(self, pool: str | None = None) -> Tensor:
        """Reduce each example to one vector, in the order of the input.

        Args:
            pool: `mean`, `max`, `cls` (first token) or `last`, over all real tokens, special tokens included; None for
                `mean`. A site with one vector per example accepts only None, or the pool that it was stored with.

        Returns:
            float32 `[N, D]`. An example without tokens gives NaN.

        Raises:
            OptionError: the pool does not exist, or differs from that of the store.
            StoreError: the vectors do not fit into memory.

        Cost: one pass over the site; beside the result, one shard's vectors and 32,768 rows in float32.
        """
        self._check_pool(pool)
        self.catalog.check_claims()
        try:
            out = torch.empty(len(self), self.width, dtype=torch.float32, device="cpu")
        except RuntimeError as error:
            raise StoreError(
                f"{self.catalog.place}: {len(self):,} vectors of {self.width:,} values do not fit into memory. "
                "Use iter_pooled()."
            ) from error
        row = 0
        for vectors in self._iter_pooled(pool or "mean"):
            out[row : row + len(vectors)] = vectors
            row += len(vectors)
        return out

    def iter_pooled(self, pool: str | None = None) -> Iterator[Tensor]:
        """Reduce each example to one vector, shard by shard, for stores whose vectors do not fit into memory.

        Returns:
            An iterator of float32 `[n, D]` which joined are `pooled(pool)`; their ordinals are `store.ordinals()`.

        Raises:
            OptionError: as `pooled`.
        """
        self._check_pool(pool)
        return self._iter_pooled(pool or "mean")

    def _iter_pooled(self, pool: str) -> Iterator[Tensor]:
        held: list[object] = []
        for number in range(len(self.catalog.shards)):
            self._prefetch(number, held)
            yield self._pool_shard(self.catalog.shard(number), pool)

    def _prefetch(self, number: int, held: list[object]) -> None:
        """Fetch the values of a shard, and of the next ones in the background; `held` keeps them cached."""
        names = [self.site] if self._scale_name is None else [self.site, self._scale_name]
        held.clear()
        held += self.catalog.prefetch(range(number, len(self.catalog.shards)), names, num_needed=1)

    def _check_pool(self, pool: str | None) -> None:
        if self.kind == "attention":
            raise OptionError(f"{self.site!r} is one matrix per head and cannot be pooled: read it by example.")
        if pool not in (None, *POOLS, self.catalog.pool):
            raise OptionError(f"no pool {pool!r}: use {', '.join(POOLS)}.")
        if self.kind != "token" and pool not in (None, self.catalog.pool):
            raise OptionError(f"{self._stored.tell_vector(self.catalog.pool)}, and not by {pool!r}. Leave pool out.")
        if self.kind == "token":
            self.catalog.need_every_row(f"a pool of {self.site!r}", "Extract with a pool, or go through rows().")

    def _pool_shard(self, shard: Shard, pool: str) -> Tensor:
        """Return a shard's pooled vectors in input order."""
        order = torch.from_numpy(np.asarray(shard.position))
        if self.kind != "token":
            return take_rows(shard, self._stored, order).float()
        offsets = shard.tensor("offsets")
        if pool in ("cls", "last"):
            is_empty = (offsets[1:] == offsets[:-1])[order]
            picked = (offsets[:-1] if pool == "cls" else offsets[1:] - 1)[order]
            vectors = torch.full((len(order), self.width), float("nan"), dtype=torch.float32, device="cpu")
            vectors[~is_empty] = take_rows(shard, self._stored, picked[~is_empty]).float()
            return vectors
        vectors = torch.empty(len(order), self.width, dtype=torch.float32, device="cpu")
        first = 0
        while first < len(order):
            most = shard.offsets[first] + _POOLED_ROWS
            last = max(first + 1, bisect_right(shard.offsets, most) - 1)
            rows = self._take(shard, slice(shard.offsets[first], shard.offsets[last])).float()
            vectors[first:last] = pool_packed(rows, offsets[first : last + 1] - offsets[first], pool)
            first = last
        return vectors[order]

    def rows(
        self,
        batch_size: int = 4096,
        shuffle: bool = False,
        seed: int = 0,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> RowBatches[Tensor]:
        """Iterate over every vector of the site once, in batches.

        Args:
            batch_size: Vectors per batch; the last may be smaller.
            shuffle: Shuffle the vectors. Shards are shuffled and taken in groups of about a million rows or 1 GiB, from
                8 shards to 128, large ones in parts; all rows of a group are mixed. Without it, vectors come as they
                are stored: texts of similar length together, not in the order of the input.
            seed: Random seed of the order, for `shuffle`.
            rank: Share of the batches to return: every `world`-th, starting with this one.
            world: Number of shares. Inside a worker of a `DataLoader` a share is split again, so that over all
                workers and ranks every row comes once, in the batches that one process would have made.

        Returns:
            An iterator of `[batch_size, D]` copies in the stored dtype (float32 where int8 is stored), with
            `state_dict()` and `load_state_dict()` to resume in the middle.

        Raises:
            OptionError: an invalid value, or attention weights, which have no rows.

        Cost: one copy of each row. Memory of the process: 16 bytes per row of one group, and either 4 MiB of rows or
        one batch, twice. Rows are read through the page cache, which works best with room for one group.
        """
        options = RowOptions(batch_size, shuffle, seed, rank, world)
        return RowBatches(self.catalog, choose_sites(self.catalog, self.site), options, itemgetter(self.site))
