"""The points of a picture: which rows or examples are drawn, their vectors at each site, and their colours.

Rows or examples are sampled from the whole store with one seed, the same ones at every site; only the sample is read.
A colour is a number or a category per point.

Hides shards and records. Must never know of projections or figures.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.analysis.drawing import draw_numbers
from layerprobe.analysis.results import plain
from layerprobe.analysis.sweep import Mappings
from layerprobe.errors import InputError, NonFiniteError, OptionError
from layerprobe.store.description import StoredSite
from layerprobe.store.guard import is_number
from layerprobe.store.reader import Store
from layerprobe.store.records import iter_records
from layerprobe.store.rows import take_rows
from layerprobe.store.shards import POOLS, Shard, pool_packed, positions_of
from layerprobe.tables import format_count
from layerprobe.telling import make_bar

__all__ = ["Colours", "Points", "choose_points", "colour_points", "draw_points", "has_field"]

# Colours that belong to rows; any other except `norm` is a field of the records.
_ROW_COLOURS = ("token", "position")
# More distinct numbers than this make a scale, fewer make categories.
_MOST_CATEGORIES = 7


@dataclass(frozen=True, eq=False)
class Points:
    """The points of a picture.

    Args:
        values: float64 `[n, D]` of each site.
        kind: `rows` or `examples`.
        num_all: Number of rows or examples in the store.
        examples: int64 `[n]`, the ordinal of each point's example.
        positions: int64 `[n]`, the position of each row in its example; None for examples.
        input_ids: int64 `[n]`, the token id of each row; None for examples.
        constant: Sites that were left out because all points are the same there.
    """

    values: dict[str, Tensor]
    kind: str
    num_all: int
    examples: Tensor
    positions: Tensor | None
    input_ids: Tensor | None
    constant: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True, eq=False)
class Colours:
    """The colours of the points.

    Args:
        name: The quantity or field shown by colour.
        numbers: float64 `[n]` for a scale, NaN where a point has none, or `[S, n]` if it differs between sites; None
            for categories.
        categories: The category of each point, None for the rest; None for a scale.
        order: The categories that get a colour, the most frequent first, then None if there is a rest.
    """

    name: str
    numbers: np.ndarray | None = None
    categories: tuple[str | None, ...] | None = None
    order: tuple[str | None, ...] = ()


def choose_points(store: Store, sites: Sequence[StoredSite], color: str, points: str | None, pool: str | None) -> str:
    """Decide whether rows or examples are drawn: as requested, otherwise by the kind of colour.

    Raises:
        OptionError: an unknown value, options that conflict, or rows of a pooled store.
    """
    if points not in (None, "rows", "examples"):
        raise OptionError(f"points={points!r}: use rows or examples.")
    if pool is not None and pool not in POOLS:
        raise OptionError(f"pool={pool!r}: use {', '.join(POOLS)}.")
    is_pooled = sites[0].kind != "token"
    if is_pooled and (points == "rows" or color in _ROW_COLOURS):
        what = "points='rows'" if points == "rows" else f"color={color!r}"
        raise OptionError(
            f"{what}: in {store.place} {sites[0].tell_vector(store.pool)}, and no row per token. "
            "Take a site that has, of a store without a pool."
        )
    if is_pooled and pool not in (None, store.pool):
        raise OptionError(f"pool={pool!r}: in {store.place} {sites[0].tell_vector(store.pool)}. Leave pool out.")
    if color in _ROW_COLOURS and (points == "examples" or pool is not None):
        raise OptionError(f"color={color!r} belongs to rows, and examples were asked for. Use points='rows', no pool.")
    if points is not None and points == "rows" and pool is not None:
        raise OptionError(f"pool={pool!r} makes examples of rows, and points='rows' asks for rows. Use one of the two.")
    if points is not None:
        return points
    return "rows" if not is_pooled and pool is None and color in (*_ROW_COLOURS, "norm") else "examples"


def draw_points(
    store: Store,
    sites: Sequence[StoredSite],
    kind: str,
    *,
    pool: str | None,
    max_points: int,
    seed: int,
    named: Collection[str],
    progress: bool | None = None,
) -> Points:
    """Sample points at random and read them at every site, with a progress bar as in `make_bar`.

    A site at which all points are the same is left out, unless it is `named` or no other is left.

    Raises:
        InputError: the store has fewer than three.
        NonFiniteError: a point is not finite; the message names it.
        OptionError: all points are the same at a site that is not left out.
    """
    by_rows = kind == "rows"
    num_all = store.num_tokens if by_rows else len(store)
    if num_all < 3:
        raise InputError(f"a picture of {store.place}: it has {format_count(num_all, kind[:-1])}; three are the least.")
    chosen = draw_numbers(num_all, max_points, seed)
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    identity: list[tuple[Tensor, Tensor, Tensor]] = []
    first = 0
    if not by_rows and any(site.kind == "token" for site in sites):
        store.catalog.need_every_row("a picture of examples", "Draw rows, or extract with a pool.")
    mapped = Mappings(store.catalog)
    with make_bar(len(chosen), "points", progress, kind) as bar:
        for shard in store.iter_shards():
            count = shard.header.num_tokens if by_rows else shard.header.num_examples
            part = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, first + count)] - first
            first += count
            if not len(part):
                continue
            picked = torch.from_numpy(part)
            identity.append(_identify(shard, picked, by_rows))
            for site in sites:
                is_single = by_rows or site.kind != "token"
                rows = take_rows(shard, site, picked) if is_single else _pool(shard, site, picked, pool or "mean")
                found[site.name].append(rows.double())
            mapped.add_shard(sites, shard.header)
            bar.update(len(part))
    examples, positions, ids = (torch.cat(parts) for parts in zip(*identity, strict=True))
    values = {name: torch.cat(rows) for name, rows in found.items()}
    drawn = Points(values, kind, num_all, examples, positions if by_rows else None, ids if by_rows else None)
    _refuse_nonfinite(store, drawn)
    return _leave_out_constant(store, drawn, pool, named)


def _identify(shard: Shard, picked: Tensor, by_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ordinal of each picked row or example of a shard, and for rows their positions and token ids."""
    if not by_rows:
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        return shard.tensor("example")[picked], nothing, nothing
    of = torch.searchsorted(shard.tensor("offsets"), picked, right=True) - 1
    return shard.tensor("example")[of], positions_of(shard, picked, of), shard.tensor("input_ids")[picked]


def _pool(shard: Shard, site: StoredSite, picked: Tensor, pool: str) -> Tensor:
    """Pool some examples of a shard, given by their indices in it."""
    offsets = shard.tensor("offsets")
    starts, stops = offsets[picked], offsets[picked + 1]
    pooled = [
        pool_packed(
            take_rows(shard, site, torch.arange(start, stop, device="cpu")).float(),
            torch.tensor([0, stop - start], device="cpu"),
            pool,
        )
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
    ]
    return torch.cat(pooled)


def _refuse_nonfinite(store: Store, points: Points) -> None:
    for name, values in points.values.items():
        is_bad = ~torch.isfinite(values).all(1)
        if bool(is_bad.any()):
            raise NonFiniteError(
                f"{name!r} in {store.place}: example {int(points.examples[is_bad][0])} is not finite or has no rows, "
                "and has no place in a picture. Leave the site out; 'layerprobe check' counts such rows."
            )


def _leave_out_constant(store: Store, points: Points, pool: str | None, named: Collection[str]) -> Points:
    constant = [name for name, values in points.values.items() if bool((values == values[0]).all())]
    refused = [name for name in constant if name in named or len(constant) == len(points.values)]
    if refused:
        is_first = points.kind == "examples" and "cls" in (pool, store.pool)
        why = ": the first token's vector there does not depend on the text" if is_first else ""
        raise OptionError(
            f"a picture of {refused[0]!r}: all {len(points):,} points are the same{why}. "
            f"Leave the site out{', or use another pool' if pool == 'cls' and store.pool is None else ''}."
        )
    values = {name: of for name, of in points.values.items() if name not in constant}
    return replace(points, values=values, constant=tuple(constant))


def colour_points(store: Store, points: Points, color: str) -> Colours:
    """Find the colour of each point.

    Args:
        store: The store.
        points: The points.
        color: `token`, `position`, `norm`, or a field of the records such as `label`.

    Raises:
        OptionError: no record has the field, or the store has no tokenizer to name tokens.
    """
    if color == "norm":
        return Colours("norm", np.stack([values.norm(dim=1).numpy() for values in points.values.values()]))
    if color == "position":
        assert points.positions is not None
        return Colours("position", points.positions.double().numpy())
    if color == "token":
        assert points.input_ids is not None
        if store.id_to_tokens is None:
            raise OptionError(
                f"color='token': {store.place} has no tokenizer to name them. Stores of layerprobe.extract have one; "
                "use position or norm here."
            )
        return _categorise("token", store.id_to_tokens(points.input_ids))
    # NaN counts as missing, as in JSON
    values = plain(_read_field(store, points, color))
    given = [value for value in values if value is not None]
    is_scale = all(is_number(value) for value in given)
    if is_scale and len(set(given)) > _MOST_CATEGORIES:
        return Colours(color, np.asarray(values, dtype=float))
    return _categorise(color, ["none" if value is None else str(value) for value in values])


def has_field(store: Store, field: str) -> bool:
    """Return whether the first example's record has a field."""
    return bool(len(store)) and field in store.record(store.ordinal_at(0)).get("fields", {})


def _read_field(store: Store, points: Points, field: str) -> list[Any]:
    ordinals = points.examples.tolist()
    records = iter_records(store.catalog, sorted(set(ordinals)))
    fields = {ordinal: record.get("fields", {}) for ordinal, record in records}
    if not any(field in found for found in fields.values()):
        known = sorted({name for found in fields.values() for name in found})
        raise OptionError(
            f"color={field!r}: no record in {store.place} has such a field: they have {', '.join(known) or 'none'}. "
            "Use one of them, or token, position or norm."
        )
    return [fields[ordinal].get(field) for ordinal in ordinals]


def _categorise(name: str, values: Sequence[str]) -> Colours:
    ranked = [value for value, _ in Counter(sorted(values)).most_common()]
    if len(ranked) <= _MOST_CATEGORIES:
        return Colours(name, categories=tuple(values), order=tuple(ranked))
    first = ranked[:_MOST_CATEGORIES]
    return Colours(name, categories=tuple(value if value in first else None for value in values), order=(*first, None))
