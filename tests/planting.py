"""Stores of known numbers: what an analysis must find is put in by hand.

`plant` writes sites with a row per token, or pooled ones, in several shards whose examples lie in a shuffled order.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerprobe.store.description import commit_description
from layerprobe.store.format import commit_shard
from layerprobe.store.headers import ShardHeader
from layerprobe.store.index import commit_index

__all__ = ["FINGERPRINT", "IndexedColumn", "plant"]

FINGERPRINT = "0" * 32


def plant(
    folder: Path,
    sites: Mapping[str, Tensor],
    lengths: Sequence[int],
    *,
    ids: Tensor | None = None,
    fields: Sequence[Mapping[str, Any]] | None = None,
    pool: str | None = None,
    shards: int = 3,
) -> Path:
    """Write a store.

    Args:
        folder: A new folder; what is no path is taken as a URL.
        sites: `[T, D]` of each site, examples one after the other; `[N, D]` if `pool` is given.
        lengths: Rows of each example.
        ids: int64 `[T]`; None for the ordinal of each row modulo 7.
        fields: Of each example's record.
        pool: How the store was pooled.
        shards: How many.
    """
    if isinstance(folder, Path):
        folder.mkdir()
    kind = "token" if pool is None else "example"
    said = {
        name: {"kind": kind, "dtype": str(rows.dtype).removeprefix("torch."), "width": rows.shape[1]}
        for name, rows in sites.items()
    }
    commit_description(folder, {"sites": said, "fingerprint": FINGERPRINT, "pool": pool})
    total = sum(lengths)
    ids = torch.arange(total) % 7 if ids is None else ids
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    maker = torch.Generator().manual_seed(3)
    cuts = [len(lengths) * shard // shards for shard in range(shards + 1)]
    headers = []
    for unit, (first, last) in enumerate(pairwise(cuts)):
        order = torch.randperm(last - first, generator=maker) + first
        rows = torch.cat([torch.arange(starts[one], starts[one + 1]) for one in order.tolist()])
        tensors = [
            ("example", order),
            ("offsets", torch.tensor([0, *(lengths[one] for one in order.tolist())]).cumsum(0)),
            ("input_ids", ids[rows]),
        ]
        if fields is not None:
            texts = [
                json.dumps({"text": f"text {one}", "fields": dict(fields[one])}).encode() for one in order.tolist()
            ]
            tensors.append(("record_offsets", torch.tensor([0, *map(len, texts)]).cumsum(0)))
            tensors.append(("records", torch.tensor(list(b"".join(texts)), dtype=torch.uint8)))
        tensors += [(name, values[rows if pool is None else order]) for name, values in sites.items()]
        header = ShardHeader(unit, last - first, len(rows), first, FINGERPRINT)
        commit_shard(folder, header, sorted(tensors, key=lambda named: -named[1].dtype.itemsize))
        headers.append(header)
    commit_index(folder, headers)
    return folder


class IndexedColumn:
    """Values in order under labels of their own, as a column of a mixed table: `[5]` is what label 5 names.

    Args:
        values: In order.
        labels: Of each.
    """

    def __init__(self, values: Sequence[Any], labels: Sequence[int]) -> None:
        self._values = list(values)
        self._by_label = dict(zip(labels, self._values, strict=True))

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __getitem__(self, label: int) -> Any:
        return self._by_label[label]
