"""One shard, mapped: its tensors as views of the file, and where each example lies in it.

A shard is checked against its header, and its ordinals and offsets against its counts, before anything is read from it.
Must never know of stores or sites.
"""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerprobe.errors import FormatError
from layerprobe.store.format import INDEX_FILE, STORE_FILE, ShardHeader, checksum, read_header

__all__ = ["MappedShard", "ScaledRows", "ShardInfo", "check_index", "pool_packed"]


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """int8 vectors with the scale that turns them back: `value = values * scale`.

    Args:
        values: int8 `[T, D]` (or `[D]` of a pooled example).
        scale: float32 `[T]` (or a scalar).
    """

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def float(self) -> Tensor:
        """Decode to float32, of the shape of `values`."""
        return self.values.float() * self.scale[..., None]


@dataclass(frozen=True)
class ShardInfo:
    """What the index, or else the header, says of a shard."""

    file: str
    first_example: int
    num_examples: int
    num_tokens: int


class MappedShard:
    """A mapped shard.

    Args:
        path: The file.
        info: What the index says of it.
        fingerprint: Of the store's plan.
        check: Compare each tensor with its checksum before it is first handed out.

    Raises:
        FormatError: the file is damaged, or of another run.
    """

    def __init__(self, path: Path, info: ShardInfo, fingerprint: str, check: bool) -> None:
        self.header: ShardHeader = read_header(path)
        if self.header.fingerprint != fingerprint:
            raise FormatError(f"{path}: belongs to another run than {STORE_FILE} beside it.")
        counts = (self.header.first_example, self.header.num_examples, self.header.num_tokens)
        if counts != (info.first_example, info.num_examples, info.num_tokens):
            raise FormatError(f"{path}: does not hold the examples that {INDEX_FILE} says.")
        self._path = path
        self._check = check
        with open(path, "rb") as file:
            # Copy on write: tensors are writable, as torch wants them, and the file stays as it is.
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._tensors: dict[str, Tensor] = {}
        self.offsets: list[int] = self.tensor("offsets").tolist()
        order = self.tensor("example") - self.header.first_example
        if not torch.equal(order.sort().values, torch.arange(info.num_examples)):
            raise FormatError(f"{path}: its ordinals are not a run of {info.num_examples} examples.")
        if (
            self.offsets[:1] != [0]
            or self.offsets[-1] != self.header.num_tokens
            or sorted(self.offsets) != self.offsets
        ):
            raise FormatError(f"{path}: its offsets do not rise from 0 to {self.header.num_tokens}.")
        # where each example of the unit lies in the shard
        self.position: list[int] = torch.argsort(order).tolist()

    @cached_property
    def pairs_before(self) -> list[int]:
        """For each example the pairs of tokens of those that lie before it: where its attention weights begin."""
        lengths = self.tensor("offsets").diff()
        return [0, *(lengths * lengths).cumsum(0).tolist()]

    def tensor(self, name: str) -> Tensor:
        """Give a view of a whole tensor of the file."""
        if name not in self._tensors:
            try:
                entry = self.header.tensors[name]
            except KeyError as error:
                raise FormatError(f"{self._path}: has no tensor {name!r}.") from error
            if self._check:
                with memoryview(self._memory) as whole, whole[entry.start : entry.stop] as part:
                    if checksum(part) != self.header.checksums[name]:
                        raise FormatError(
                            f"{self._path}: the bytes of {name!r} are not those that were written. "
                            "Remove the file and run the same extraction again to make it anew."
                        )
            count = (entry.stop - entry.start) // entry.dtype.itemsize
            if count == 0:
                self._tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
            else:
                flat = torch.frombuffer(self._memory, dtype=entry.dtype, count=count, offset=entry.start)
                self._tensors[name] = flat.view(entry.shape)
        return self._tensors[name]

    def span(self, ordinal: int) -> tuple[int, int, int]:
        """Find an example: its position in the shard, and its first and last row."""
        position = self.position[ordinal - self.header.first_example]
        return position, self.offsets[position], self.offsets[position + 1]


def check_index(path: Path, index: Mapping[str, Any], shards: Sequence[ShardInfo]) -> None:
    """Make sure that an index names shards without a gap, with the counts that it says.

    Raises:
        FormatError: it does not.
    """
    place = 0
    for shard in sorted(shards, key=lambda shard: shard.first_example):
        if shard.first_example != place:
            raise FormatError(f"{path}: is damaged: no shard has example {place}.")
        place += shard.num_examples
    if (place, sum(shard.num_tokens for shard in shards)) != (index.get("examples"), index.get("tokens")):
        raise FormatError(f"{path}: is damaged: its shards do not add up to the counts that it says.")


def pool_packed(rows_TD: Tensor, offsets: Tensor, pool: str) -> Tensor:
    """Reduce packed float32 rows to one vector per example, `[N, D]`."""
    if pool in ("mean", "max"):
        return torch.segment_reduce(rows_TD, pool, offsets=offsets, axis=0, initial=None).masked_fill_(
            (offsets[1:] == offsets[:-1])[:, None], float("nan")
        )
    if not len(rows_TD):
        return rows_TD.new_full((len(offsets) - 1, rows_TD.shape[1]), float("nan"))
    picked = offsets[:-1] if pool == "cls" else offsets[1:] - 1
    empty = offsets[1:] == offsets[:-1]
    return rows_TD[picked.masked_fill(empty, 0)].masked_fill_(empty[:, None], float("nan"))
