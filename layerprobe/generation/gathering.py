"""Gather the rows that a lens reads, from a store or from texts run through the model.

Rows of special tokens are left out. If some tokens of the texts are masked, the rows are those of the masks, and the
true tokens are those that were masked.

Hides tokenizing, batches and shards. Must never know of heads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.analysis.sweep import choose_depth
from layerprobe.errors import InputError, NonFiniteError, OptionError
from layerprobe.extract.batching import cut_batches
from layerprobe.extract.forward import find_precision, running
from layerprobe.extract.inputs import open_source
from layerprobe.extract.looking import look
from layerprobe.extract.network import check_ids, choose_max_length
from layerprobe.extract.padding import sees_padding
from layerprobe.extract.tokens import TokenizedUnit, tokenize
from layerprobe.sites.resolve import map_model
from layerprobe.sites.stacks import find_device
from layerprobe.store.reader import Store
from layerprobe.tables import format_count
from layerprobe.telling import make_bar

__all__ = ["TokenRows", "gather_store", "gather_texts"]

_BATCH_TOKENS = 2048
_TEXTS_AHEAD = 256


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of some tokens, at every site.

    Args:
        rows: float32 `[T, D]` by site.
        ids: int64 `[T]`, the token of each row, before any masking.
        examples, positions: int64 `[T]`, the example and position of each row.
        texts: int64 `[T]`, the number of each row's text; examples with the same tokens are one text.
    """

    rows: dict[str, Tensor]
    ids: Tensor
    examples: Tensor
    positions: Tensor
    texts: Tensor


class _Pile:
    """Collect rows up to a maximum number."""

    def __init__(self, sites: Sequence[str], most: int, owner: str) -> None:
        self._rows: dict[str, list[Tensor]] = {site: [] for site in sites}
        self._places: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._texts: dict[tuple[int, ...], int] = {}
        self._owner = owner
        self.left = most

    def add(self, example: int, ids: Tensor, positions: Tensor, rows: dict[str, Tensor]) -> int:
        kept = positions[: self.left]
        for site, values in rows.items():
            chosen = values[kept].float().cpu()
            if not bool(torch.isfinite(chosen).all()):
                raise NonFiniteError(f"{site!r} of {self._owner}: example {example} is not finite. Leave the site out.")
            self._rows[site].append(chosen)
        text = self._texts.setdefault(tuple(ids.tolist()), len(self._texts))
        self._places.append((ids[kept], torch.full_like(kept, example), kept, torch.full_like(kept, text)))
        self.left -= len(kept)
        return len(kept)

    def close(self) -> TokenRows:
        count = sum(len(ids) for ids, *_ in self._places)
        if count < 2:
            judged = format_count(count, "token")
            raise InputError(f"lens of {self._owner}: it has {judged} to judge; two are the least. Give more text.")
        columns = [torch.cat(parts) for parts in zip(*self._places, strict=True)]
        return TokenRows({site: torch.cat(parts) for site, parts in self._rows.items()}, *columns)


def gather_store(
    store: Store, patterns: str | Sequence[str] | None, special: set[int], most: int, seed: int
) -> TokenRows:
    """Read the rows of randomly drawn examples, without special tokens.

    Raises:
        SiteError: a pattern matches nothing that is stored.
        OptionError: the sites have no row per token.
        InputError: fewer than two tokens.
        NonFiniteError: a row is not finite.
    """
    chosen = choose_depth(store, patterns)
    if chosen[0].kind != "token":
        raise OptionError(f"lens of {store.place}: its sites have one vector per example. Extract with no pool.")
    pile = _Pile([site.name for site in chosen], most, str(store.place))
    ordinals = list(store.ordinals())
    for place in np.random.default_rng([seed, 17]).permutation(len(ordinals)).tolist():
        if not pile.left:
            break
        ordinal = ordinals[place]
        ids = store.input_ids(ordinal)
        wanted = [at for at, token in enumerate(ids.tolist()) if token not in special]
        rows: dict[str, Any] = {site.name: store[site.name][ordinal].float() for site in chosen}
        pile.add(ordinal, ids, torch.tensor(wanted, dtype=torch.int64, device="cpu"), rows)
    return pile.close()


def gather_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Any,
    patterns: Sequence[str],
    *,
    mask: float,
    most: int,
    seed: int,
    progress: bool | None,
) -> TokenRows:
    """Run texts through the model until there are enough rows, with a share of their tokens masked.

    Raises:
        SiteError: a pattern matches nothing.
        OptionError: the tokenizer has no mask.
        InputError: fewer than two tokens.
    """
    mapped = map_model(model)
    sites = [site.name for site in mapped.select(patterns) if site.kind == "token"]
    if mask and tokenizer.mask_token_id is None:
        raise OptionError(f"mask={mask}: {type(tokenizer).__name__} has no mask. Use mask=0.")
    special = set(tokenizer.all_special_ids)
    pile = _Pile(sites, most, mapped.owner)
    length, maker = choose_max_length(model, tokenizer, None), np.random.default_rng([seed, 19])
    records, first = iter(open_source(texts)), 0
    with running(model, find_precision(model, None)), make_bar(most, "lens", progress) as bar:
        while pile.left and (part := [record.text for record in islice(records, _TEXTS_AHEAD)]):
            unit = tokenize(tokenizer, part, length)
            check_ids(model, unit, "texts", first)
            masked = _choose_tokens(unit, sorted(special), mask, maker)
            # the first texts with enough tokens, in the order of the input rather than of the batches
            before = np.cumsum([0, *map(len, masked)])[:-1]
            num_texts = int(np.searchsorted(before, pile.left))
            judged = [places[: pile.left - start] for places, start in zip(masked[:num_texts], before, strict=False)]
            chosen = _Chosen(unit.part(0, num_texts), masked, judged, tokenizer.mask_token_id if mask else None)
            for member, ids, wanted, rows in _run(model, chosen, sites, tokenizer.pad_token_id or 0):
                bar.update(pile.add(first + member, ids, wanted, rows))
            first += len(part)
    return pile.close()


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Texts to run: for each, the tokens to replace by `mask_id` unless it is None, and the tokens to evaluate."""

    unit: TokenizedUnit
    masked: Sequence[np.ndarray]
    judged: Sequence[np.ndarray]
    mask_id: int | None


def _choose_tokens(
    unit: TokenizedUnit, special: list[int], mask: float, maker: np.random.Generator
) -> list[np.ndarray]:
    """Choose tokens of each text: all that are not special, or a random share of them if tokens are to be masked."""
    of_ids: dict[bytes, np.ndarray] = {}
    for number in range(len(unit)):
        ids = unit[number]
        # texts with the same ids are computed once, so they need the same mask
        if ids.tobytes() in of_ids:
            continue
        places = np.flatnonzero(~np.isin(ids, special))
        if mask and len(places):
            drawn = maker.random(len(places))
            # mask at least one token
            places = places[(drawn < mask) | (drawn == drawn.min())]
        of_ids[ids.tobytes()] = places
    return [of_ids[unit[number].tobytes()] for number in range(len(unit))]


def _run(
    model: nn.Module, chosen: _Chosen, sites: list[str], pad_id: int
) -> Iterator[tuple[int, Tensor, Tensor, dict[str, Tensor]]]:
    """Yield each text's number, its ids, the positions to evaluate, and its rows by site."""
    device = find_device(model)
    equal_lengths = sees_padding(model, chosen.unit, pad_id, find_precision(model, None))
    for batch in cut_batches(chosen.unit, _BATCH_TOKENS, pad_id, equal_lengths=equal_lengths):
        real, ids_BS = batch.attention_mask.bool(), batch.input_ids.clone()
        pairs = list(zip(batch.members, batch.sequences, strict=True))
        if chosen.mask_id is not None:
            for member, sequence in pairs:
                ids_BS[sequence, real[sequence].nonzero()[chosen.masked[member], 0]] = chosen.mask_id
        values = look(model, sites, ids_BS, batch.attention_mask)
        for member, sequence in pairs:
            own = real[sequence]
            positions = torch.from_numpy(chosen.judged[member])
            rows = {site: values[site][sequence][own.to(device)] for site in sites}
            yield member, batch.input_ids[sequence][own], positions, rows
