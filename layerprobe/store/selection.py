"""Select examples or tokens of a store, and read their rows.

Conditions are tested on ids and records, shard by shard; sites are read only when rows are requested. Results are in
input order, each example or token once.

Hides how conditions are tested. Must never know of models.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.errors import OptionError
from layerprobe.store.catalog import MOST_OPEN_SHARDS, Catalog
from layerprobe.store.description import StoredSite
from layerprobe.store.guard import brief
from layerprobe.store.records import RECORD_TENSORS, has_records, read_records
from layerprobe.store.rows import take_rows
from layerprobe.store.shards import Shard, positions_of
from layerprobe.store.vocabulary import Vocabulary, WordRuns

__all__ = ["Asked", "Selection", "select"]

_ONE_VALUE = (
    "a field equals one value. For several give a function, such as lambda record: record['label'] in ('a', 'b')."
)


@dataclass(frozen=True)
class Asked:
    """The conditions given to `Store.where`.

    Raises:
        OptionError: there are none, two name a token, or a value has the wrong type.
    """

    record: Callable[[dict[str, Any]], object] | None = None
    token: str | None = None
    token_id: int | None = None
    word: str | None = None
    id: int | Sequence[int] | None = None
    fields: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = [name for name in ("token", "token_id", "word") if getattr(self, name) is not None]
        if len(named) > 1:
            raise OptionError(f"where({', '.join(f'{name}=...' for name in named)}): a token has one name. Use one.")
        if not (named or self.fields or self.record is not None or self.id is not None):
            raise OptionError(
                "where(): asks for nothing. Use token=, word=, id=, a field of the records, or a function."
            )
        if self.record is not None and not callable(self.record):
            raise OptionError(
                f"where({self.record!r}): is no function of a record. Name what it is: id=, token=, text=."
            )
        for name, wanted in (("token", str), ("word", str), ("token_id", int)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
                raise OptionError(f"where({name}={value!r}): it must be of type {wanted.__name__}.")
        for name, value in self.fields.items():
            # records hold plain JSON values: a list or dict may equal one, any other collection never does
            if not isinstance(value, (str, Real, list, dict, np.generic, type(None))):
                raise OptionError(f"where({name}={brief(repr(value))}): {_ONE_VALUE}")
        if self.token_id is not None and not -(1 << 63) <= self.token_id < 1 << 63:
            raise OptionError(f"where(token_id={self.token_id!r}): no token has it: an id has 64 bits.")

    @property
    def has_records(self) -> bool:
        """Whether records must be read."""
        return bool(self.fields) or self.record is not None


@dataclass(frozen=True, eq=False)
class Selection:
    """Examples or tokens of a store, returned by `Store.where`.

    `len()` counts them; iterating gives ordinals, or pairs of an ordinal and a position in it.

    Args:
        catalog: The store's catalog.
        examples: int64 `[n]`, ordinals in ascending order.
        positions: int64 `[n]`, each token's position in its example (a word's first piece); None for examples.
        lengths: int64 `[n]`, the number of pieces of each word, 1 for a token; None for examples.
        places: int64 `[n]`, the row of each within the stored rows of its example; None for examples.
    """

    catalog: Catalog
    examples: Tensor
    positions: Tensor | None = None
    lengths: Tensor | None = None
    places: Tensor | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Any]:
        examples = self.examples.tolist()
        return iter(examples if self.positions is None else zip(examples, self.positions.tolist(), strict=True))

    def __repr__(self) -> str:
        what = "examples" if self.positions is None else "tokens"
        return f"Selection({len(self)} {what} of {str(self.catalog.place)!r})"

    def rows(self, site: str, pieces: str = "first") -> Tensor:
        """Return the rows of the selected tokens or examples.

        Args:
            site: A site with a row per token: one row per token or word, or all rows of each example. For examples
                also one with a vector per example.
            pieces: For a word of several pieces, its `first` row, its `last`, or their `mean`.

        Returns:
            `[n, D]` in the stored dtype (float32 where that is int8, and for `mean`).

        Raises:
            SiteError: the site is not stored.
            OptionError: it has no such rows, or `pieces` is none of the three.

        Cost: the result; each shard that has some of it is read once, and only there.
        """
        stored = self._check(site, pieces)
        spans = list(self._spans())
        if self.positions is None and stored.kind == "token":
            count = sum(int(_lengths(shard, part).sum()) for shard, part in self._shards(spans))
        else:
            count = len(self)
        is_wide = stored.dtype == torch.int8 or (pieces == "mean" and self.positions is not None)
        out = torch.empty(count, stored.width, dtype=torch.float32 if is_wide else stored.dtype, device="cpu")
        row = 0
        for shard, part in self._shards(spans):
            found = self._take(shard, stored, part, pieces)
            out[row : row + len(found)] = found
            row += len(found)
        return out

    def _check(self, site: str, pieces: str) -> StoredSite:
        stored = self.catalog.need_site(site)
        if stored.kind == "attention":
            raise OptionError(f"{site!r} is one matrix per head and has no rows: read it by example.")
        if stored.kind == "example" and self.positions is not None:
            raise OptionError(f"{site!r} has a vector per example and no row per token: select examples for it.")
        if pieces not in ("first", "last", "mean"):
            raise OptionError(f"pieces={pieces!r}: use first, last or mean.")
        return stored

    def _spans(self) -> Iterator[tuple[int, slice]]:
        """Split the selection by shard."""
        first = 0
        while first < len(self):
            number, _ = self.catalog.locate(int(self.examples[first]))
            info = self.catalog.shards[number]
            last = int(torch.searchsorted(self.examples, info.first_example + info.num_examples))
            yield number, slice(first, last)
            first = last

    def _shards(self, spans: Sequence[tuple[int, slice]]) -> Iterator[tuple[Shard, "_Part"]]:
        for number, part in spans:
            shard = self.catalog.shard(number)
            places = torch.from_numpy(np.asarray(shard.position))[self.examples[part] - shard.header.first_example]
            yield shard, _Part(part, places)

    def _take(self, shard: Shard, stored: StoredSite, part: "_Part", pieces: str) -> Tensor:
        if stored.kind == "example":
            return take_rows(shard, stored, part.places)
        starts = shard.tensor("offsets")[part.places]
        if self.places is None or self.lengths is None:
            lengths = _lengths(shard, part)
            begins = lengths.cumsum(0) - lengths
            return take_rows(
                shard,
                stored,
                torch.arange(int(lengths.sum()), device="cpu") + (starts - begins).repeat_interleave(lengths),
            )
        rows, lengths = starts + self.places[part.span], self.lengths[part.span]
        if pieces != "mean":
            return take_rows(shard, stored, rows if pieces == "first" else rows + lengths - 1)
        total = take_rows(shard, stored, rows).float()
        for piece in range(1, int(lengths.max())):
            has_piece = lengths > piece
            total[has_piece] += take_rows(shard, stored, rows[has_piece] + piece).float()
        return total / lengths[:, None]


@dataclass(frozen=True, eq=False)
class _Part:
    """The part of a selection in one shard: its span in the selection, and the positions of its examples."""

    span: slice
    places: Tensor


def _lengths(shard: Shard, part: _Part) -> Tensor:
    return shard.tensor("offsets").diff()[part.places]


def select(catalog: Catalog, asked: Asked, vocabulary: Callable[[], Vocabulary | None]) -> Selection:
    """Find the examples or tokens that meet all conditions.

    Args:
        catalog: The store's catalog.
        asked: The conditions.
        vocabulary: Returns the store's tokenizer, if it has one; called only if it is needed.
    """
    by_shard = _by_shard(catalog, asked.id)
    runs = _find_runs(catalog, asked, vocabulary)
    unseen = set(asked.fields)
    seen: set[str] = set()
    lists: set[str] = set()
    found: list[tuple[np.ndarray, ...]] = []
    names = [*(() if runs is None else ("input_ids",)), *(RECORD_TENSORS if asked.has_records else ())]
    numbers = list(by_shard)
    for place, (number, ordinals) in enumerate(by_shard.items()):
        catalog.prefetch(numbers[place : place + MOST_OPEN_SHARDS], names)
        shard = catalog.shard(number)
        if asked.has_records:
            ordinals = _filter_records(catalog, shard, ordinals, asked, seen, lists)
        none = np.empty(0, np.int64)
        found.append((ordinals, none, none, none) if runs is None else _find_tokens(shard, ordinals, runs))
    if singles := [name for name, value in asked.fields.items() if isinstance(value, list) and name in seen - lists]:
        name = singles[0]
        raise OptionError(f"where({name}={brief(repr(asked.fields[name]))}): no record has a list there; {_ONE_VALUE}")
    if (lacking := unseen - seen) and by_shard:
        name = min(lacking)
        held = f"they have {', '.join(sorted(seen))}" if seen else "no records were kept. Use id=, token= or token_id="
        raise OptionError(f"no record in {catalog.place} has a field {name!r}: {held}.")
    columns = [torch.from_numpy(np.concatenate([*parts, np.empty(0, np.int64)])) for parts in zip(*found, strict=True)]
    if not columns:
        columns = [torch.empty(0, dtype=torch.int64, device="cpu")] * 4
    return Selection(catalog, *(columns if runs is not None else columns[:1]))


def _by_shard(catalog: Catalog, wanted: int | Sequence[int] | None) -> dict[int, np.ndarray]:
    """Group the ordinals to test by shard."""
    if wanted is None:
        catalog.check_claims()
        return {
            number: np.arange(info.first_example, info.first_example + info.num_examples)
            for number, info in enumerate(catalog.shards)
        }
    ordinals = np.atleast_1d(np.asarray(wanted))
    if ordinals.size and (ordinals.dtype.kind not in "iu" or ordinals.ndim > 1):
        raise OptionError(
            f"where(id={wanted!r}): an id is the ordinal of an example, a whole number, or a list of them."
        )
    by_shard: dict[int, list[int]] = {}
    for number, ordinal in sorted({catalog.locate(int(ordinal)) for ordinal in ordinals}):
        by_shard.setdefault(number, []).append(ordinal)
    return {number: np.array(ordinals, np.int64) for number, ordinals in by_shard.items()}


def _filter_records(
    catalog: Catalog, shard: Shard, ordinals: np.ndarray, asked: Asked, seen: set[str], lists: set[str]
) -> np.ndarray:
    """Keep the ordinals whose records match; add the fields seen to `seen`, and those that hold lists to `lists`."""
    if asked.record is not None and not has_records(shard):
        raise OptionError(f"where(function): {catalog.place} keeps no records. Use id=, token= or token_id=.")
    kept = []
    as_lists = [name for name, value in asked.fields.items() if isinstance(value, list)]
    asked_for: list[int] = ordinals.tolist()
    records = read_records(shard, asked_for, catalog.place.label(shard.header.file))
    for ordinal, record in zip(asked_for, records, strict=True):
        text = {"text": record["text"]} if "text" in record else {}
        fields = record.get("fields", {})
        named = {**fields, **text}
        seen.update(named)
        lists.update(name for name in as_lists if isinstance(named.get(name), list))
        has_fields = all(name in named and named[name] == value for name, value in asked.fields.items())
        if has_fields and (asked.record is None or asked.record({**text, **fields})):
            kept.append(ordinal)
    return np.array(kept, np.int64)


def _find_runs(catalog: Catalog, asked: Asked, vocabulary: Callable[[], Vocabulary | None]) -> WordRuns | None:
    """Convert a token or a word to runs of ids; None if examples are requested."""
    if asked.token_id is not None:
        return WordRuns.of_token(asked.token_id)
    name, text = ("token", asked.token) if asked.token is not None else ("word", asked.word)
    if text is None:
        return None
    if name == "word":
        catalog.need_every_row(f"where(word={text!r})", "Use token= or token_id=.")
    found = vocabulary()
    if found is None:
        raise OptionError(f"where({name}={text!r}): {catalog.place} has no tokenizer. Use token_id=.")
    return WordRuns.of_token(found.id_of(text)) if name == "token" else found.runs_of(text)


def _find_tokens(shard: Shard, ordinals: np.ndarray, wanted: WordRuns) -> tuple[np.ndarray, ...]:
    """Find runs of ids in some examples of a shard: ordinals, positions, lengths and places, in input order."""
    if not len(ordinals):
        return (ordinals,) * 4
    rows, lengths = wanted.find(shard.tensor("input_ids"), shard.tensor("offsets"))
    offsets = np.asarray(shard.offsets)
    places = np.searchsorted(offsets, rows, side="right") - 1
    positions = positions_of(shard, torch.from_numpy(rows), torch.from_numpy(places)).numpy()
    examples = shard.tensor("example").numpy()[places]
    order = np.lexsort((positions, examples))
    order = order[np.isin(examples[order], ordinals)]
    return examples[order], positions[order], lengths[order], (rows - offsets[places])[order]
