"""Read a store back: `layerprobe.open` and the `Store` it returns.

Works on complete stores and on those still being written. This file assembles examples from tokens, text and fields;
the catalog handles shards, and a site's view its values.

Hides how an example is assembled. Must never know of models or hooks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerprobe.store.catalog import Catalog
from layerprobe.store.columns import Columns, open_dataset
from layerprobe.store.description import StoredSite
from layerprobe.store.difference import Difference, pair_depth
from layerprobe.store.examples import Example
from layerprobe.store.format import TOKENIZER_FILE, need_store, read_bounded
from layerprobe.store.guard import LARGE, check_flag
from layerprobe.store.headers import POSITIONS, SCALE_SUFFIX
from layerprobe.store.kept import Kept
from layerprobe.store.naming import is_stored, match_sites
from layerprobe.store.order import RowOptions
from layerprobe.store.padded import EncoderOutputs, choose_layer, pad_examples
from layerprobe.store.places import Place, find_place, need_folder
from layerprobe.store.records import RECORD_TENSORS, read_record
from layerprobe.store.rows import RowBatches, choose_sites
from layerprobe.store.selection import Asked, Selection, select
from layerprobe.store.shards import Shard, span_of
from layerprobe.store.siteview import SiteView
from layerprobe.store.vocabulary import Vocabulary, find_characters
from layerprobe.tables import format_count

__all__ = ["Store", "open_store", "take_store"]


class Store:
    """An extraction on disk, returned by `layerprobe.open` and `layerprobe.extract`.

    `store[site]` is a view of a site and `site in store` says whether it is stored; negative numbers count from the
    last stored layer. `store.example(i)` is everything about one example. `len(store)` is the number of stored
    examples, and iterating returns them in the order of the input. `store.catalog` is for code that goes shard by
    shard.
    """

    def __init__(self, where: Path | Place, check: bool) -> None:
        self.catalog = Catalog(find_place(where), check)
        self._views: dict[str, SiteView] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"catalog": self.catalog, "_views": {}}

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release every mapped shard. Tensors that were read stay valid; reading more is an error."""
        self.catalog.close()

    @property
    def folder(self) -> Path:
        """The local folder of the store, as an absolute path.

        Raises:
            StoreError: the store is remote.
        """
        return need_folder(self.place).path

    @property
    def place(self) -> Place:
        """Where the store is, folder or not; `str()` of it is its path or URL."""
        return self.catalog.place

    @property
    def description(self) -> dict[str, Any]:
        """The content of `store.json`."""
        return self.catalog.description

    @property
    def index(self) -> dict[str, Any] | None:
        """The content of `index.json`; None while the run is not complete."""
        return self.catalog.index

    @property
    def fingerprint(self) -> str:
        """The fingerprint that identifies the run."""
        return self.catalog.fingerprint

    @property
    def pool(self) -> str | None:
        """How rows were pooled; None for a row per token."""
        return self.catalog.pool

    @property
    def is_complete(self) -> bool:
        """Whether the extraction is complete; its index is written last."""
        return self.catalog.is_complete

    @property
    def sites(self) -> list[str]:
        """Names of the stored sites."""
        return list(self.catalog.sites)

    @property
    def num_shards(self) -> int:
        """Number of committed shards."""
        return len(self.catalog.shards)

    @property
    def num_tokens(self) -> int:
        """Number of real tokens in the committed shards."""
        return self.catalog.num_tokens

    def __len__(self) -> int:
        return self.catalog.num_examples

    def __iter__(self) -> Iterator[Example]:
        names = [*(name for site in self.sites for name in (site, site + SCALE_SUFFIX)), "input_ids", *RECORD_TENSORS]
        held: list[object] = []
        for number, info in enumerate(self.catalog.shards):
            held.clear()
            held += self.catalog.prefetch(range(number, self.num_shards), names, num_needed=1)
            for ordinal in range(info.first_example, info.first_example + info.num_examples):
                yield self.example(ordinal)

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else "incomplete"
        counts = f"{format_count(len(self), 'example')}, {format_count(len(self.sites), 'site')}"
        return f"Store({str(self.place)!r}, {counts}, {state})"

    def __getitem__(self, site: str) -> SiteView:
        name = self.catalog.need_site(site).name
        view = self._views.get(name)
        if view is None:
            view = self._views[name] = SiteView(self.catalog, name)
        return view

    def __contains__(self, site: object) -> bool:
        return is_stored(site, self.catalog.sites)

    @property
    def stored_sites(self) -> Mapping[str, StoredSite]:
        """How each site is stored, by name."""
        return self.catalog.sites

    def difference(self, site: str, other: str) -> Difference:
        """Subtract one site from another, lazily: `store.difference("layers.5", "layers.4")[17]`.

        Raises:
            SiteError: a site is not stored.
            OptionError: the two have no rows in common, or other widths.
        """
        return Difference(self[site], self[other])

    def differences(self) -> list[Difference]:
        """Subtract from each layer's output the one before it, the embeddings first, lazily.

        Raises:
            SiteError: fewer than two such sites are stored.
        """
        return [self.difference(*pair) for pair in pair_depth(self.catalog.sites, str(self.place))]

    def encoder_outputs(self, layer: int | str, examples: Any, dtype: torch.dtype = torch.float32) -> EncoderOutputs:
        """Return the states of some examples as context for a decoder: `model.generate(**outputs.inputs())`.

        Args:
            layer: A site or a layer number.
            examples: Ordinals, a slice of them, or one.
            dtype: Dtype of the states; use the decoder's.

        Returns:
            `states` `[B, S, D]`, padded on the right, and their `mask`, int64 `[B, S]`.

        Raises:
            SiteError: no stored site is selected, or several are.
            OptionError: the site has no row per token, no example is requested, or one has no tokens.
            NonFiniteError: a value is not finite.
        """
        return pad_examples(self[choose_layer(layer, self.sites, str(self.place))], examples, dtype)

    def ordinals(self) -> Iterator[int]:
        """Iterate over the ordinals of the stored examples, in ascending order."""
        return self.catalog.ordinals()

    def ordinal_at(self, place: int) -> int:
        """Return the ordinal of the k-th stored example; k itself if none is missing.

        Raises:
            MissingExample: there are fewer examples.
        """
        return self.catalog.ordinal_at(place)

    def input_ids(self, ordinal: int) -> Tensor:
        """Return an example's token ids, int64 `[T]`, special tokens included: a view of the file.

        Raises:
            MissingExample: it is not in the store, or not in it yet.
        """
        shard, ordinal = self.catalog.find(ordinal)
        _, start, stop = span_of(shard, ordinal)
        return shard.part("input_ids", start, stop)

    def positions(self, ordinal: int) -> Tensor:
        """Return the positions of an example's rows among all its tokens, int64 `[T]`; raises as `input_ids` does."""
        shard, ordinal = self.catalog.find(ordinal)
        _, start, stop = span_of(shard, ordinal)
        return torch.arange(stop - start, device="cpu") if self.kept is None else shard.part(POSITIONS, start, stop)

    @property
    def kept(self) -> Kept | None:
        """Which rows were kept (`keep`, `tokens` of `extract`); None for a row per token."""
        return self.catalog.kept

    def iter_shards(self) -> Iterator[Shard]:
        """Iterate over the shards in the order of the input."""
        return self.catalog.iter_shards()

    def rows(
        self,
        batch_size: int = 4096,
        shuffle: bool = False,
        seed: int = 0,
        sites: str | Sequence[str] | None = None,
        rank: int = 0,
        world: int = 1,
        epoch: int = 0,
    ) -> RowBatches[dict[str, Tensor]]:
        """Iterate over the rows of several sites at once, in batches.

        Args:
            batch_size, shuffle, seed, rank, world: As in `store[site].rows`.
            sites: Names, all with a row per token or all with a vector per example; None for all with a row per
                token, or in a pooled store all with a vector.
            epoch: Each epoch of a seed has its own order.

        Returns:
            An iterator of `{site: [n, D]}`; row k is the same token, or example, at every site.

        Raises:
            OptionError: an invalid value, attention weights, or sites that have no rows in common.
            SiteError: a site is not stored.
        """
        options = RowOptions(batch_size, shuffle, seed, rank, world, epoch)
        return RowBatches(self.catalog, choose_sites(self.catalog, sites), options, dict)

    def record(self, ordinal: int) -> dict[str, Any]:
        """Return an example's input record, `text` and `fields` if they were stored; raises as `input_ids` does."""
        shard, ordinal = self.catalog.find(ordinal)
        return read_record(shard, ordinal, self.place.label(shard.header.file))

    def example(self, ordinal: int) -> Example:
        """Return everything about one example: ids, tokens, text, other fields, every site.

        Raises:
            MissingExample: it is not in the store, or not in it yet.
        """
        _, ordinal = self.catalog.find(ordinal)
        input_ids, record = self.input_ids(ordinal), self.record(ordinal)
        text, fields = record.get("text"), record.get("fields", {})
        sites = {site: self[site][ordinal] for site in self.catalog.sites}
        tokens = self.vocabulary.tokens(input_ids) if self.vocabulary is not None else None
        return Example(ordinal, input_ids, self.positions(ordinal), tokens, text, fields, sites)

    def where(
        self,
        record: Callable[[dict[str, Any]], object] | None = None,
        /,
        *,
        token: str | None = None,
        token_id: int | None = None,
        word: str | None = None,
        id: int | Sequence[int] | None = None,  # noqa: A002 - a common field name in records
        **fields: object,
    ) -> Selection:
        """Select tokens or examples; several conditions must all hold.

        Args:
            record: A predicate on an example's record, `{"text": ..., **fields}`.
            token: A token as the tokenizer writes it: `bank`, `##er`.
            token_id: A token by its id.
            word: A word or several consecutive ones: the run of tokens that the tokenizer splits it into, not as part
                of a longer word.
            id: An ordinal, or several; negative numbers count from the end.
            fields: `text=`, or any field of the input record, equal to the value. For a field with the name of another
                argument, or named `text` where another held the text, use `record`.

        Returns:
            Pairs of an example and a position if a token or word is requested, else examples; in the order of the
            input, each once.

        Raises:
            OptionError: a field that no record has, a token or word that the tokenizer does not have, or two ways to
                name a token.
            MissingExample: an ordinal that is not in the store.

        Cost: one pass over the ids, and over the records if they are needed; not over any site.
        """
        asked = Asked(record, token, token_id, word, id, fields)
        return select(self.catalog, asked, lambda: self.vocabulary)

    def to_datasets(self, sites: str | Sequence[str] | None = None, *, cache: str | Path | None = None) -> Any:
        """Return the store as a `datasets.Dataset` that maps an Arrow file: a row per example, a column per site.

        Args:
            sites: Patterns over the stored sites; None for all.
            cache: Folder of the Arrow file; None for the cache of `datasets`. An existing file is reused.

        Raises:
            OptionError: the extra `data` is not installed.
            SiteError: a pattern matches nothing that is stored.

        Cost: a copy of the requested data, on disk; about 100 MiB of memory. The columns are those of `export`.
        """
        names = match_sites(sites, self.sites, str(self.place))
        columns = Columns(
            tuple(self.catalog.sites[name] for name in names), "examples", self.id_to_tokens, self.kept is not None
        )
        return open_dataset(self.iter_shards, columns, self.fingerprint, cache)

    def token_offsets(self, ordinal: int) -> list[tuple[int, int]]:
        """Return the character span of each token in an example's text; (0, 0) for special tokens.

        Raises:
            MissingExample: it is not in the store, or not in it yet.
            OptionError: the store keeps no tokenizer or no text, or its tokenizer splits the text into other ids.
        """
        _, ordinal = self.catalog.find(ordinal)
        text = self.record(ordinal).get("text")
        self.catalog.need_every_row("token_offsets()", "Cut the text with its tokenizer, and take positions().")
        what = f"characters of example {ordinal} of {self.place}"
        return find_characters(self.vocabulary, text, self.input_ids(ordinal), what)

    @property
    def id_to_tokens(self) -> Callable[[Tensor], list[str]] | None:
        """A function from ids to tokens; None if the store has no tokenizer."""
        return self.vocabulary.tokens if self.vocabulary is not None else None

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The tokenizer in the store; None if it has none."""
        if not self.place.exists(TOKENIZER_FILE):
            return None
        data = read_bounded(self.place, TOKENIZER_FILE, LARGE)
        return Vocabulary(self.place.label(TOKENIZER_FILE), data, self.description.get("tokenizer"))


def open_store(folder: str | Path | Place, *, check: bool = True) -> Store:
    """Open a store, complete or still being written.

    Args:
        folder: Where it is: a path, or a URL under `s3://`, `gs://`, `hf://` or `memory://`.
        check: Verify the checksum of each tensor of a shard when it is first read, once. False reads only the pages
            that are needed, and does not notice a damaged row. Under a URL, single examples are fetched by range, which
            no checksum covers; whole tensors are verified.

    Raises:
        OptionError: `folder` is not a location, its kind of URL is not supported, or a package for it is not installed.
        StoreError: there is no store there.
        FormatError: a file of it is damaged.

    Example:
        >>> import layerprobe as lp
        >>> made = lp.extract("demo", ["The kettle whistled.", "Who left?"], "memory://opened", sites="layers.-1")
        >>> store = lp.open("memory://opened")
        >>> store.is_complete, len(store), store["layers.5"][1].shape
        (True, 2, torch.Size([5, 384]))
    """
    check_flag("check", check)
    place = find_place(folder)
    need_store(place)
    return Store(place, check)


def take_store(store: Store | str | Path) -> Store:
    """Return an open store as it is, or open the one at a path or URL."""
    return store if isinstance(store, Store) else open_store(store)
