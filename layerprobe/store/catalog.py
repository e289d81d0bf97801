"""Which shards a store has, which of them is mapped, and where each example lies.

Shards are mapped when they are first asked for and checked against their header and `store.json` then. A catalog keeps
what it saw when it was opened; it can be pickled, and then its paths travel and its mappings do not.

Hides files, names of shards and the limit on open files. Must never know of sites' meaning, models or hooks.
"""

import operator
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from layerprobe.errors import FormatError, MissingExample, StoreError
from layerprobe.store.format import (
    FORMAT_VERSION,
    INDEX_FILE,
    SCALE_SUFFIX,
    STORE_FILE,
    check_site,
    parse_shard_name,
    read_header,
    read_json,
)
from layerprobe.store.shards import MappedShard, ShardInfo, check_index
from layerprobe.store.writer import StoredSite

__all__ = ["MOST_OPEN_SHARDS", "Catalog"]

# A mapping holds a file descriptor; a process may have about a thousand.
MOST_OPEN_SHARDS = 256


class Catalog:
    """The shards of one store.

    Args:
        folder: Where it is.
        check: Compare each tensor of a shard with its checksum when it is first read.

    Raises:
        FormatError: `store.json`, `index.json` or, where there is no index, a shard is damaged.
    """

    def __init__(self, folder: Path, check: bool) -> None:
        self.folder = folder
        self.check = check
        self.description = read_json(folder / STORE_FILE)
        if self.description.get("format") != FORMAT_VERSION:
            found = self.description.get("format")
            raise FormatError(f"{folder / STORE_FILE}: format {found!r}; this version reads format {FORMAT_VERSION}.")
        try:
            self.fingerprint: str = self.description["fingerprint"]
            self.pool: str | None = self.description["pool"]
            said_of: dict[str, dict[str, Any]] = dict(self.description["sites"])
            for site, said in said_of.items():
                check_site(site, said)
        except KeyError as error:
            raise FormatError(f"{folder / STORE_FILE}: lacks {error}.") from error
        except (TypeError, ValueError) as error:
            raise FormatError(f"{folder / STORE_FILE}: is damaged ({error}).") from error
        self.sites = {
            site: StoredSite(site, said["kind"], getattr(torch, said["dtype"]), said["width"])
            for site, said in said_of.items()
        }
        self.index: dict[str, Any] | None = None
        if (folder / INDEX_FILE).exists():
            self.index = read_json(folder / INDEX_FILE)
        self.shards = sorted(self._list_shards(), key=lambda info: info.first_example)
        self.num_examples = sum(info.num_examples for info in self.shards)
        self.num_tokens = sum(info.num_tokens for info in self.shards)
        # one past the last ordinal that is there
        self.end = max((info.first_example + info.num_examples for info in self.shards), default=0)
        self._firsts = [info.first_example for info in self.shards]
        self._open: OrderedDict[int, MappedShard] = OrderedDict()
        self._is_closed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def is_complete(self) -> bool:
        return self.index is not None

    @property
    def num_open(self) -> int:
        """Shards that are mapped now."""
        return len(self._open)

    def close(self) -> None:
        """Let go of every mapping; the memory goes with the last tensor that looks at it."""
        self._is_closed = True
        self._open.clear()

    def ordinals(self) -> Iterator[int]:
        """List the ordinals of the examples that are there, rising."""
        for info in self.shards:
            yield from range(info.first_example, info.first_example + info.num_examples)

    def find(self, ordinal: int) -> tuple[MappedShard, int]:
        """Find the shard of an example; a negative ordinal counts from the last.

        Raises:
            MissingExample: no shard has it, or none has it yet.
            TypeError: it is no whole number.
        """
        wanted = operator.index(ordinal)
        if wanted < 0:
            wanted += self.end
        number = bisect_right(self._firsts, wanted) - 1
        if number >= 0 and wanted < self._firsts[number] + self.shards[number].num_examples:
            return self.shard(number), wanted
        if self.is_complete:
            held = f"it holds 0 to {self.end - 1}" if self.end else "it holds none"
            raise MissingExample(f"no example {ordinal} in {self.folder}: {held}.")
        raise MissingExample(
            f"no example {ordinal} in {self.folder} yet: the run is not complete, {self.num_examples} examples are "
            "there. Run the same extraction again to go on."
        )

    def shard(self, number: int) -> MappedShard:
        """Give a shard by its place in the order of the input, mapped and checked.

        Raises:
            FormatError: it is damaged.
            StoreError: it cannot be read, or the store was closed.
        """
        found = self._open.get(number)
        if found is not None:
            self._open.move_to_end(number)
            return found
        if self._is_closed:
            raise StoreError(f"{self.folder}: this store was closed. Open it again with layerprobe.open.")
        info = self.shards[number]
        shard = MappedShard(self.folder / info.file, info, self.fingerprint, self.check)
        for site in self.sites.values():
            self._check_site(shard, site)
        self._open[number] = shard
        if len(self._open) > MOST_OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard

    def iter_shards(self) -> Iterator[MappedShard]:
        """Go through the mapped shards in the order of the input."""
        return (self.shard(number) for number in range(len(self.shards)))

    def _check_site(self, shard: MappedShard, site: StoredSite) -> None:
        """Refuse a shard that holds a site otherwise than `store.json` says."""
        count = shard.header.num_tokens if site.kind == "token" else shard.header.num_examples
        shape = (site.width * shard.pairs_before[-1],) if site.kind == "attention" else (count, site.width)
        wanted: list[tuple[str, torch.dtype, tuple[int, ...]]] = [(site.name, site.dtype, shape)]
        if site.dtype == torch.int8:
            wanted.append((site.name + SCALE_SUFFIX, torch.float32, (count,)))
        for name, dtype, shape in wanted:
            entry = shard.header.tensors.get(name)
            if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
                found = "nothing" if entry is None else f"{entry.dtype} of {entry.shape}"
                path = self.folder / shard.header.file
                raise FormatError(f"{path}: {name!r} is {found}; {STORE_FILE} asks for {dtype} of {shape}.")

    def _list_shards(self) -> list[ShardInfo]:
        if self.index is not None:
            try:
                shards = [
                    ShardInfo(
                        str(shard["file"]), int(shard["first_example"]), int(shard["examples"]), int(shard["tokens"])
                    )
                    for shard in self.index["shards"]
                ]
            except (KeyError, TypeError, ValueError) as error:
                raise FormatError(f"{self.folder / INDEX_FILE}: is damaged ({error!r}).") from error
            for shard in shards:
                if parse_shard_name(shard.file) is None:
                    raise FormatError(f"{self.folder / INDEX_FILE}: {shard.file!r} is not the name of a shard.")
            check_index(self.folder / INDEX_FILE, self.index, shards)
            return shards
        headers = [read_header(path) for path in self.folder.iterdir() if parse_shard_name(path.name) is not None]
        return [ShardInfo(h.file, h.first_example, h.num_examples, h.num_tokens) for h in headers]
