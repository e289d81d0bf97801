"""The rows that a lens looks through: of a store, or of texts that go through the model now.

A row belongs to a token that is not a special one. Texts may have some of their tokens masked; then the rows are those
of the masks, and what is to be found is what stood there.

Hides tokenizing, batches and shards. Must never know of heads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.analysis.sweep import bar_of, choose_depth
from layerprobe.errors import InputError, NonFiniteError, OptionError
from layerprobe.extract.batching import cut_batches
from layerprobe.extract.forward import find_precision, running
from layerprobe.extract.inputs import open_source
from layerprobe.extract.looking import look
from layerprobe.extract.network import choose_max_length
from layerprobe.extract.padding import sees_padding
from layerprobe.extract.tokens import tokenize
from layerprobe.sites.resolve import map_model
from layerprobe.sites.stacks import find_device
from layerprobe.store.reader import Store

__all__ = ["TokenRows", "gather_store", "gather_texts"]

_BATCH_TOKENS = 2048
_TEXTS_AHEAD = 256


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of some tokens, at every site.

    Args:
        rows: float32 `[T, D]` by site.
        ids: int64 `[T]`, the token that stands there, or stood there before it was masked.
        examples, positions: int64 `[T]`, where that is.
    """

    rows: dict[str, Tensor]
    ids: Tensor
    examples: Tensor
    positions: Tensor


class _Pile:
    """Rows as they come in, up to a number."""

    def __init__(self, sites: Sequence[str], most: int, owner: str) -> None:
        self._rows: dict[str, list[Tensor]] = {site: [] for site in sites}
        self._places: list[tuple[Tensor, Tensor, Tensor]] = []
        self._owner = owner
        self.left = most

    def add(self, example: int, ids: Tensor, positions: Tensor, rows: dict[str, Tensor]) -> int:
        kept = positions[: self.left]
        for site, values in rows.items():
            chosen = values[kept].float().cpu()
            if not bool(torch.isfinite(chosen).all()):
                raise NonFiniteError(f"{site!r} of {self._owner}: example {example} is not finite. Leave the site out.")
            self._rows[site].append(chosen)
        self._places.append((ids[kept], torch.full((len(kept),), example), kept))
        self.left -= len(kept)
        return len(kept)

    def close(self) -> TokenRows:
        count = sum(len(ids) for ids, _, _ in self._places)
        if count < 2:
            raise InputError(f"lens of {self._owner}: it has {count} tokens that are no special ones. Give more text.")
        columns = [torch.cat(parts) for parts in zip(*self._places, strict=True)]
        return TokenRows({site: torch.cat(parts) for site, parts in self._rows.items()}, *columns)


def gather_store(
    store: Store, patterns: str | Sequence[str] | None, special: set[int], most: int, seed: int
) -> TokenRows:
    """Read rows of examples that are drawn at random, all tokens of each but special ones.

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
        pile.add(ordinal, ids, torch.tensor(wanted, dtype=torch.int64), rows)
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
    with running(model, find_precision(model, None)), bar_of(most, "lens", progress) as bar:
        while pile.left and (part := [record.text for record in islice(records, _TEXTS_AHEAD)]):
            for member, ids, wanted, rows in _run(model, tokenizer, part, sites, length, mask, special, maker):
                if pile.left:
                    bar.update(pile.add(first + member, ids, wanted, rows))
            first += len(part)
    return pile.close()


def _run(
    model: nn.Module,
    tokenizer: Any,
    texts: list[str],
    sites: list[str],
    length: int,
    mask: float,
    special: set[int],
    maker: np.random.Generator,
) -> Iterator[tuple[int, Tensor, Tensor, dict[str, Tensor]]]:
    """Give each text's number, ids, the positions that are asked for, and its rows."""
    device = find_device(model)
    unit = tokenize(tokenizer, texts, length)
    pad_id = tokenizer.pad_token_id or 0
    equal_lengths = sees_padding(model, unit, pad_id, find_precision(model, None))
    for batch in cut_batches(unit, _BATCH_TOKENS, pad_id, equal_lengths=equal_lengths):
        real, ids_BS = batch.attention_mask.bool(), batch.input_ids.clone()
        wanted = real & ~torch.isin(ids_BS, torch.tensor(sorted(special)))
        if mask:
            # one at least of each text
            drawn = torch.from_numpy(maker.random(ids_BS.shape))
            drawn[~wanted] = torch.inf
            wanted &= (drawn < mask) | (drawn == drawn.min(1, keepdim=True).values)
            ids_BS[wanted] = tokenizer.mask_token_id
        values = look(model, sites, ids_BS, batch.attention_mask)
        for member, sequence in zip(batch.members, batch.sequences, strict=True):
            own = real[sequence]
            positions = wanted[sequence][own].nonzero()[:, 0]
            rows = {site: values[site][sequence][own.to(device)] for site in sites}
            yield member, batch.input_ids[sequence][own], positions, rows
