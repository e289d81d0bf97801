"""Read a store back: sites, examples, pooled vectors and batches of rows, straight from mapped shards.

Shards are mapped when they are first asked for and checked against their header then; what `store[site][i]` gives is a
view of the file, not a copy. Works on complete stores and on those still being written.

Hides files, mappings and the order of rows inside a shard. Must never know of models or hooks.
"""

import json
import operator
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.errors import FormatError, MissingExample, OptionError, SiteError, StoreError
from layerprobe.store.format import (
    FORMAT_VERSION,
    INDEX_FILE,
    SCALE_SUFFIX,
    STORE_FILE,
    TOKENIZER_FOLDER,
    check_site,
    parse_shard_name,
    read_header,
    read_json,
)
from layerprobe.store.shards import MappedShard, ScaledRows, ShardInfo, check_index, pool_packed

__all__ = ["Example", "SiteView", "Store", "open_store"]

# A mapping holds a file descriptor; a process may have about a thousand.
_MOST_OPEN_SHARDS = 256
_BLOCK_ROWS = 1024
_SHUFFLE_BLOCKS = 64


@dataclass(frozen=True, eq=False)
class Example:
    """One example of a store.

    Args:
        index: Its ordinal in the input.
        input_ids: int64 `[T]`, its real tokens, special ones included.
        tokens: The same as text, or None where the store has no tokenizer.
        text: The input text, or None where it was not kept.
        fields: The other fields of the input record.
        sites: The vectors of each site, as `store[site][index]` gives them.
    """

    index: int
    input_ids: Tensor
    tokens: list[str] | None
    text: str | None
    fields: dict[str, Any]
    sites: Mapping[str, Tensor | ScaledRows]

    def __getitem__(self, site: str) -> Tensor | ScaledRows:
        return self.sites[site]


class Store:
    """An extraction on disk. Made by `layerprobe.open`.

    `store[site]` is a view of a site; `store.example(i)` everything about one example; `len(store)` the number of
    examples that are there; iterating gives each of them in the order of the input.
    """

    def __init__(self, folder: Path, check: bool) -> None:
        self.folder = folder
        self._check = check
        self.description = read_json(folder / STORE_FILE)
        if self.description.get("format") != FORMAT_VERSION:
            found = self.description.get("format")
            raise FormatError(f"{folder / STORE_FILE}: format {found!r}; this version reads format {FORMAT_VERSION}.")
        try:
            self._sites: dict[str, dict[str, Any]] = dict(self.description["sites"])
            self.fingerprint: str = self.description["fingerprint"]
            self.pool: str | None = self.description["pool"]
            for site, said in self._sites.items():
                check_site(site, said)
        except KeyError as error:
            raise FormatError(f"{folder / STORE_FILE}: lacks {error}.") from error
        except (TypeError, ValueError) as error:
            raise FormatError(f"{folder / STORE_FILE}: is damaged ({error}).") from error
        self.index: dict[str, Any] | None = None
        if (folder / INDEX_FILE).exists():
            self.index = read_json(folder / INDEX_FILE)
        self._shards = sorted(self._list_shards(), key=lambda info: info.first_example)
        self._firsts = [info.first_example for info in self._shards]
        self._open: OrderedDict[int, MappedShard] = OrderedDict()

    @property
    def is_complete(self) -> bool:
        """Whether the extraction has ended; its index is written last."""
        return self.index is not None

    @property
    def sites(self) -> list[str]:
        """Names of the sites that are stored."""
        return list(self._sites)

    @property
    def num_shards(self) -> int:
        """Shards that are committed."""
        return len(self._shards)

    @property
    def num_tokens(self) -> int:
        """Real tokens in the committed shards."""
        return sum(info.num_tokens for info in self._shards)

    def __len__(self) -> int:
        return sum(info.num_examples for info in self._shards)

    def __iter__(self) -> Iterator[Example]:
        return (self.example(ordinal) for ordinal in self.ordinals())

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else "incomplete"
        return f"Store({str(self.folder)!r}, {len(self)} examples, {len(self._sites)} sites, {state})"

    def __getitem__(self, site: str) -> "SiteView":
        if site not in self._sites:
            raise SiteError(f"no site {site!r} in {self.folder}: it holds {', '.join(self._sites)}.")
        return SiteView(self, site)

    def ordinals(self) -> Iterator[int]:
        """List the ordinals of the examples that are there, rising."""
        for info in self._shards:
            yield from range(info.first_example, info.first_example + info.num_examples)

    def example(self, ordinal: int) -> Example:
        """Gather everything about one example: ids, tokens, text, other fields, every site.

        Raises:
            MissingExample: it is not in the store, or not in it yet.
        """
        shard, ordinal = self._find(ordinal)
        position, start, stop = shard.span(ordinal)
        input_ids = shard.tensor("input_ids")[start:stop]
        record: dict[str, Any] = {}
        if "record_offsets" in shard.header.tensors:
            first, last = shard.tensor("record_offsets")[position : position + 2].tolist()
            try:
                record = json.loads(shard.tensor("records")[first:last].numpy().tobytes())
            except ValueError as error:
                raise FormatError(f"{self.folder / shard.header.file}: record {ordinal} is damaged.") from error
        text = record.pop("text", None)
        sites = {site: self[site][ordinal] for site in self._sites}
        return Example(ordinal, input_ids, self._tokens(input_ids), text, record.get("fields", {}), sites)

    def _tokens(self, input_ids: Tensor) -> list[str] | None:
        if self._tokenizer is None:
            return None
        tokens = (self._tokenizer.id_to_token(token_id) for token_id in input_ids.tolist())
        return ["" if token is None else token for token in tokens]

    @cached_property
    def _tokenizer(self) -> Any:
        path = self.folder / TOKENIZER_FOLDER / "tokenizer.json"
        if not path.exists():
            return None
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise FormatError(f"{path}: is not a tokenizer ({error}).") from error

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

    def _find(self, ordinal: int) -> tuple[MappedShard, int]:
        """Find the shard of an example; a negative ordinal counts from the last."""
        last = self._shards[-1].first_example + self._shards[-1].num_examples if self._shards else 0
        wanted = ordinal + last if ordinal < 0 else ordinal
        number = bisect_right(self._firsts, wanted) - 1
        if number >= 0 and wanted < self._firsts[number] + self._shards[number].num_examples:
            return self._shard(number), wanted
        if self.is_complete:
            raise MissingExample(f"no example {ordinal} in {self.folder}: it holds 0 to {last - 1}.")
        raise MissingExample(
            f"no example {ordinal} in {self.folder} yet: the run is not complete, {len(self)} examples are there. "
            "Run the same extraction again to go on."
        )

    def _shard(self, number: int) -> MappedShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        info = self._shards[number]
        shard = MappedShard(self.folder / info.file, info, self.fingerprint, self._check)
        for site in self._sites:
            self[site]._check(shard)
        self._open[number] = shard
        if len(self._open) > _MOST_OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard

    def iter_shards(self) -> Iterator[MappedShard]:
        """Go through the mapped shards in the order of the input."""
        return (self._shard(number) for number in range(len(self._shards)))


@dataclass(frozen=True, eq=False, repr=False)
class SiteView(Sequence[Tensor | ScaledRows]):
    """One site of a store, example by example.

    `view[17]` is `[T, D]` for a site with a row per token, `[D]` for a pooled one, `[H, T, T]` for attention weights: a
    view of the mapped file in the stored dtype (int8 comes as `ScaledRows`); a slice or a list of ordinals gives a
    list of them.
    """

    store: Store
    site: str

    @property
    def kind(self) -> str:
        """`token` for rows per token, `example` for one vector per example, `attention` for `[H, len, len]`."""
        return self.store.description["sites"][self.site]["kind"]

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return getattr(torch, self.store.description["sites"][self.site]["dtype"])

    @property
    def width(self) -> int:
        """D; the number of heads for `attention`."""
        return self.store.description["sites"][self.site]["width"]

    def __repr__(self) -> str:
        return f"SiteView({self.site!r}, {len(self)} examples, {self.kind}, {self.width} x {self.dtype})"

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[ordinal] for ordinal in list(self.store.ordinals())[index]]
        if isinstance(index, bool) or np.ndim(index) > 0:
            ordinals = np.asarray(index)
            if ordinals.size and ordinals.dtype.kind not in "iu":
                raise OptionError(f"{self.site!r} is indexed by ordinals: an index of {ordinals.dtype} is none.")
            return [self[int(ordinal)] for ordinal in ordinals]
        try:
            shard, ordinal = self.store._find(operator.index(index))
        except TypeError as error:
            raise OptionError(f"{self.site!r} is indexed by ordinals, not by {index!r}.") from error
        position, start, stop = shard.span(ordinal)
        if self.kind == "attention":
            length, first = stop - start, self.width * shard.pairs_before[position]
            flat = shard.tensor(self.site)[first : first + self.width * length * length]
            return flat.view(self.width, length, length)
        return self._take(shard, slice(start, stop) if self.kind == "token" else position)

    def __iter__(self) -> Iterator[Tensor | ScaledRows]:
        return (self[ordinal] for ordinal in self.store.ordinals())

    def _check(self, shard: MappedShard) -> None:
        """Refuse a shard that holds this site otherwise than `store.json` says."""
        count = shard.header.num_tokens if self.kind == "token" else shard.header.num_examples
        shape = (self.width * shard.pairs_before[-1],) if self.kind == "attention" else (count, self.width)
        wanted: list[tuple[str, torch.dtype, tuple[int, ...]]] = [(self.site, self.dtype, shape)]
        if self.dtype == torch.int8:
            wanted.append((self.site + SCALE_SUFFIX, torch.float32, (count,)))
        for name, dtype, shape in wanted:
            entry = shard.header.tensors.get(name)
            if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
                found = "nothing" if entry is None else f"{entry.dtype} of {entry.shape}"
                path = self.store.folder / shard.header.file
                raise FormatError(f"{path}: {name!r} is {found}; {STORE_FILE} asks for {dtype} of {shape}.")

    def _take(self, shard: MappedShard, where: int | slice | Tensor) -> Tensor | ScaledRows:
        values = shard.tensor(self.site)[where]
        if self.dtype == torch.int8:
            return ScaledRows(values, shard.tensor(self.site + SCALE_SUFFIX)[where])
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
        if pool not in (None, "mean", "max", "cls", "last", self.store.pool):
            raise OptionError(f"no pool {pool!r}: use mean, max, cls or last.")
        if self.kind != "token" and pool not in (None, self.store.pool):
            raise OptionError(f"{self.site!r} has one vector per example, pooled by {self.store.pool}, not {pool!r}.")
        out = torch.empty(len(self), self.width, dtype=torch.float32)
        row = 0
        for shard in self.store.iter_shards():
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
            for number, info in enumerate(self.store._shards)
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
        vectors = self._take(self.store._shard(number), slice(start, stop))
        return vectors.float() if isinstance(vectors, ScaledRows) else vectors


def open_store(folder: str | Path, *, check: bool = True) -> Store:
    """Open a store, complete or still being written.

    Args:
        folder: Where it is.
        check: Compare each tensor of a shard with its checksum when it is first read, once. False reads only the pages
            that are asked for, and takes a damaged row for a sound one.

    Raises:
        StoreError: there is no store there.
        FormatError: a file of it is damaged.
    """
    folder = Path(folder)
    if not (folder / STORE_FILE).is_file():
        what = "is not a store: it has no store.json" if folder.is_dir() else "does not exist"
        raise StoreError(f"{folder}: {what}. Make one with 'layerprobe extract MODEL INPUT -o {folder}'.")
    return Store(folder, check)
