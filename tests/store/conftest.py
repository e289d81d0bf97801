"""A store made by hand from known tensors, so that what is read can be compared with what was written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerprobe.store.format import ShardHeader, commit_shard
from layerprobe.store.writer import commit_description, commit_index

FINGERPRINT = "0" * 32


@dataclass(frozen=True)
class Written:
    """What a store holds, example by example, in the order of the input."""

    folder: Path
    rows: list[Tensor]
    ids: list[Tensor]
    pooled: Tensor
    headers: list[ShardHeader]


@pytest.fixture
def write_store(tmp_path: Path) -> Callable[..., Written]:
    """Write a store of a token site `layers.0` and a pooled one `pooler`, each unit in a shuffled batch order."""

    def write(
        units: tuple[tuple[int, ...], ...] = ((3, 0, 5), (1, 4)),
        dtype: torch.dtype = torch.float32,
        width: int = 8,
        complete: bool = True,
        pool: str | None = None,
        name: str = "store",
    ) -> Written:
        folder = tmp_path / name
        folder.mkdir()
        maker = torch.Generator().manual_seed(5)
        sites = {
            "layers.0": {"kind": "token", "dtype": str(dtype).removeprefix("torch."), "width": width},
            "pooler": {"kind": "example", "dtype": "float32", "width": width},
        }
        commit_description(folder, {"sites": sites, "fingerprint": FINGERPRINT, "pool": pool})
        rows: list[Tensor] = []
        ids: list[Tensor] = []
        vectors: list[Tensor] = []
        headers = []
        for unit, lengths in enumerate(units):
            first = len(rows)
            rows += [torch.randn(length, width, generator=maker).to(dtype) for length in lengths]
            ids += [torch.randint(100, (length,), generator=maker) for length in lengths]
            vectors += [torch.randn(width, generator=maker) for _ in lengths]
            order = torch.randperm(len(lengths), generator=maker) + first
            places = order.tolist()
            tensors = [
                ("example", order),
                ("offsets", torch.tensor([0, *(len(rows[place]) for place in places)]).cumsum(0)),
                ("input_ids", torch.cat([ids[place] for place in places])),
                ("layers.0", torch.cat([rows[place] for place in places])),
                ("pooler", torch.stack([vectors[place] for place in places])),
            ]
            header = ShardHeader(unit, len(lengths), sum(lengths), first, FINGERPRINT)
            commit_shard(folder, header, sorted(tensors, key=lambda named: -named[1].dtype.itemsize))
            headers.append(header)
        if complete:
            commit_index(folder, headers)
        return Written(folder, rows, ids, torch.stack(vectors), headers)

    return write
