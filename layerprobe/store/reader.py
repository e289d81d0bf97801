"""Read a store back: what `layerprobe.open` gives.

Works on complete stores and on those still being written. Examples with their tokens, text and fields are put together
here; shards are the catalog's, the values of a site its view's.

Hides records and the tokenizer. Must never know of models or hooks.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from layerprobe.errors import FormatError, SiteError, StoreError
from layerprobe.store.catalog import Catalog
from layerprobe.store.format import STORE_FILE, TOKENIZER_FOLDER
from layerprobe.store.rows import RowBatches, RowOptions, choose_sites
from layerprobe.store.shards import MappedShard, ScaledRows
from layerprobe.store.siteview import SiteView

__all__ = ["Example", "Store", "open_store"]


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
        self._catalog = Catalog(folder, check)
        self._views: dict[str, SiteView] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_catalog": self._catalog, "_views": {}}

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of every mapped shard. Tensors that were read stay good; reading more is an error."""
        self._catalog.close()

    @property
    def folder(self) -> Path:
        """Where the store is."""
        return self._catalog.folder

    @property
    def description(self) -> dict[str, Any]:
        """What `store.json` says."""
        return self._catalog.description

    @property
    def index(self) -> dict[str, Any] | None:
        """What `index.json` says; None while the run is not complete."""
        return self._catalog.index

    @property
    def fingerprint(self) -> str:
        """What tells the run from any other."""
        return self._catalog.fingerprint

    @property
    def pool(self) -> str | None:
        """How the run pooled; None for a row per token."""
        return self._catalog.pool

    @property
    def is_complete(self) -> bool:
        """Whether the extraction has ended; its index is written last."""
        return self._catalog.is_complete

    @property
    def sites(self) -> list[str]:
        """Names of the sites that are stored."""
        return list(self._catalog.sites)

    @property
    def num_shards(self) -> int:
        """Shards that are committed."""
        return len(self._catalog.shards)

    @property
    def num_tokens(self) -> int:
        """Real tokens in the committed shards."""
        return self._catalog.num_tokens

    def __len__(self) -> int:
        return self._catalog.num_examples

    def __iter__(self) -> Iterator[Example]:
        return (self.example(ordinal) for ordinal in self.ordinals())

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else "incomplete"
        return f"Store({str(self.folder)!r}, {len(self)} examples, {len(self.sites)} sites, {state})"

    def __getitem__(self, site: str) -> SiteView:
        view = self._views.get(site)
        if view is None:
            if site not in self._catalog.sites:
                raise SiteError(f"no site {site!r} in {self.folder}: it holds {', '.join(self.sites)}.")
            view = self._views[site] = SiteView(self._catalog, site)
        return view

    def ordinals(self) -> Iterator[int]:
        """List the ordinals of the examples that are there, rising."""
        return self._catalog.ordinals()

    def iter_shards(self) -> Iterator[MappedShard]:
        """Go through the mapped shards in the order of the input."""
        return self._catalog.iter_shards()

    def rows(
        self,
        batch_size: int = 4096,
        shuffle: bool = False,
        seed: int = 0,
        sites: str | Sequence[str] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> RowBatches[dict[str, Tensor]]:
        """Go through the rows of several sites at once, batch by batch.

        Args:
            batch_size, shuffle, seed, rank, world: As in `store[site].rows`.
            sites: Names, all with a row per token or all with a vector per example; None for all with a row per
                token, or in a pooled store all with a vector.

        Returns:
            An iterator of `{site: [n, D]}`; row k is the same token, or example, at every site.

        Raises:
            OptionError: a value that cannot be, attention weights, or sites that have no rows in common.
            SiteError: a site is not stored.
        """
        options = RowOptions(batch_size, shuffle, seed, rank, world)
        return RowBatches(self._catalog, choose_sites(self._catalog, sites), options, dict)

    def example(self, ordinal: int) -> Example:
        """Gather everything about one example: ids, tokens, text, other fields, every site.

        Raises:
            MissingExample: it is not in the store, or not in it yet.
        """
        shard, ordinal = self._catalog.find(ordinal)
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
        sites = {site: self[site][ordinal] for site in self._catalog.sites}
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
