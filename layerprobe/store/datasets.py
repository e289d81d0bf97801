"""Stores as torch datasets: one example at a time, or batches of rows.

Both work in `DataLoader` workers however those are started: only the path and a snapshot of the store are pickled, and
each worker maps the shards itself. The tensors returned are copies of the mapped values.

Must never know how shards or orders are made.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from layerprobe.errors import SiteError
from layerprobe.store.naming import list_names
from layerprobe.store.order import RowOptions
from layerprobe.store.reader import Store, take_store
from layerprobe.store.rows import RowBatches
from layerprobe.store.shards import ScaledRows

__all__ = ["ExampleDataset", "RowDataset"]


class ExampleDataset(Dataset[dict[str, Any]]):
    """A map-style dataset of the examples of a store.

    An item is a dict of each site's values, `input_ids` and `index`, the ordinal. If examples are missing, item k is
    the k-th one that is there. Examples differ in length, so a `DataLoader` needs `batch_size=None` or a `collate_fn`,
    unless the store is pooled.

    Args:
        store: A store, or its path or URL.
        sites: Sites to read, one name or several; None for all.

    Raises:
        SiteError: a site is not stored.

    Example:
        >>> import layerprobe as lp
        >>> store = lp.extract("demo", ["The kettle whistled.", "Who left?"], "memory://examples", pool="mean")
        >>> dataset = lp.ExampleDataset(store, "layers.5")
        >>> len(dataset), dataset[1]["layers.5"].shape, dataset[1]["input_ids"].tolist()
        (2, torch.Size([384]), [101, 2040, 2187, 1029, 102])
    """

    def __init__(self, store: Store | str | Path, sites: str | Sequence[str] | None = None) -> None:
        store = take_store(store)
        names = list_names(store.sites if sites is None else sites)
        if not names:
            raise SiteError(f"no site asked of {store.place}: it holds {', '.join(store.sites) or 'none'}.")
        for name in names:
            store[name]
        self.store = store
        self.sites = names

    def __len__(self) -> int:
        return len(self.store)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Python's default iteration stops at an IndexError, and a missing example raises one too
        return (self[place] for place in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        ordinal = self.store.ordinal_at(index)
        values = {name: self.store[name][ordinal] for name in self.sites}
        # A view would carry its whole shard through the worker's queue.
        item: dict[str, Any] = {
            name: value.float() if isinstance(value, ScaledRows) else value.clone() for name, value in values.items()
        }
        return {**item, "input_ids": self.store.input_ids(ordinal).clone(), "index": ordinal}


class RowDataset(IterableDataset[dict[str, Tensor]]):
    """An iterable dataset of the rows of a store in batches; use `DataLoader(dataset, batch_size=None)`.

    Over all workers and ranks every row comes once in an epoch; the batches of a rank are the same for any number of
    workers. Call `set_epoch` to change the order; otherwise it is the same in every epoch.

    Args:
        store: A store, or its path or URL.
        sites, batch_size, shuffle, seed, rank, world: As in `store.rows`.

    Raises:
        SiteError: a site is not stored.
        OptionError: an invalid value, or sites that have no rows in common.

    Example:
        >>> import layerprobe as lp
        >>> store = lp.extract("demo", ["The kettle whistled.", "Who left?"], "memory://rows", sites="layers.*")
        >>> [batch["layers.5"].shape[0] for batch in lp.RowDataset(store, "layers.5", batch_size=8, shuffle=True)]
        [8, 3]
    """

    def __init__(
        self,
        store: Store | str | Path,
        sites: str | Sequence[str] | None = None,
        batch_size: int = 4096,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.store = take_store(store)
        self.sites = sites
        self.options = RowOptions(batch_size, shuffle, seed, rank, world)
        self._num_batches = len(self._start(0))
        # shared, so that persistent workers see the number of the next epoch
        self._epoch = torch.zeros(1, dtype=torch.int64, device="cpu").share_memory_()

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> RowBatches[dict[str, Tensor]]:
        return self._start(int(self._epoch))

    def set_epoch(self, epoch: int) -> None:
        """Set the order of the next epoch: a function of the seed and this number.

        Raises:
            OptionError: it is not a whole number of at least 0.
        """
        self._epoch.fill_(int(RowOptions(epoch=epoch).epoch))

    def _start(self, epoch: int) -> RowBatches[dict[str, Tensor]]:
        options = self.options
        return self.store.rows(
            options.batch_size, options.shuffle, options.seed, self.sites, options.rank, options.world, epoch
        )
