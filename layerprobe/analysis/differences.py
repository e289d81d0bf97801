"""`layerprobe.differences`: how far rows move from layer to layer, and the geometry of each layer.

Two passes over the store; they keep only sums, a sample for neighbours, and the tokens and examples that move most.
`passes` and `geometry` compute the numbers; this module combines them into a table, CSV, JSON and a picture.

Must never know of models, hooks or shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from layerprobe.analysis.drawing import draw_rows
from layerprobe.analysis.geometry import count_effective_rank, count_participation, find_outliers
from layerprobe.analysis.moments import check_cosine
from layerprobe.analysis.passes import CKA_ROWS, MovePass, ShapePass
from layerprobe.analysis.results import lay_out, shorten, write_csv, write_json
from layerprobe.analysis.sweep import choose_depth, count_types, sweep
from layerprobe.cores import using_few_cores
from layerprobe.errors import InputError, OptionError, SiteError
from layerprobe.store.guard import check_count
from layerprobe.store.reader import Store, take_store
from layerprobe.tables import format_count

__all__ = ["Differences", "ExampleMove", "PairDifference", "SiteShape", "TokenMove", "differences"]

_NEIGHBOURS = 10
_SAMPLE = 2000
_PAIR_COLUMNS = ("before", "after", "l2", "relative_l2", "cosine_distance", "cka", "neighbour_overlap")
_SHAPE_COLUMNS = (
    "site",
    "mean_norm",
    "anisotropy",
    "self_similarity",
    "effective_rank",
    "participation_ratio",
    "outliers",
)


@dataclass(frozen=True)
class PairDifference:
    """How two sites differ, as means over rows. None if the two widths differ, or the number is undefined.

    Args:
        before, after: The sites.
        l2: Length of the difference.
        relative_l2: The same, divided by the length of the row before.
        cosine_distance: 1 minus the cosine.
        cka: Linear CKA: 1 for sites that are the same up to rotation and scale.
        neighbour_overlap: Share of the nearest neighbours of a row that are the same at both sites.
    """

    before: str
    after: str
    l2: float | None
    relative_l2: float | None
    cosine_distance: float | None
    cka: float
    neighbour_overlap: float


@dataclass(frozen=True)
class SiteShape:
    """The geometry of a site's rows.

    Args:
        site: The site.
        mean_norm: Mean length of a row.
        anisotropy: Mean cosine of two different rows.
        self_similarity: Mean cosine of two rows of the same token, averaged over tokens.
        effective_rank: Exponential of the entropy of the singular values of the centred rows.
        participation_ratio: Participation ratio of the eigenvalues of the covariance.
        outliers: Dimensions that are far larger than the others.
    """

    site: str
    mean_norm: float
    anisotropy: float
    self_similarity: float
    effective_rank: float
    participation_ratio: float
    outliers: tuple[int, ...]


@dataclass(frozen=True)
class TokenMove:
    """A token that moves far between two sites: mean cosine distance over the rows that have it."""

    before: str
    after: str
    token_id: int
    token: str | None
    count: int
    cosine_distance: float


@dataclass(frozen=True)
class ExampleMove:
    """An example that moves far between two sites: mean cosine distance over its rows."""

    before: str
    after: str
    example: int
    num_rows: int
    cosine_distance: float
    text: str | None


@dataclass(frozen=True)
class Differences:
    """What `layerprobe.differences` found.

    Args:
        pairs: The pairs of sites.
        sites: The geometry of each site.
        cka: Linear CKA of every site with every other, in the order of `sites`.
        tokens, examples: For each pair the ten that move most, the furthest first.
        num_rows: Number of rows averaged over.
        num_sampled: Number of rows whose neighbours were compared.
        num_words: Number of tokens that self-similarity is averaged over.
        neighbours: Number of neighbours of each row.
        cka_rows: Rows per CKA minibatch.
        cosine: How rows were prepared before each cosine.
        seed: Random seed.
        notes: Remarks on the numbers.
    """

    pairs: tuple[PairDifference, ...]
    sites: tuple[SiteShape, ...]
    cka: tuple[tuple[float, ...], ...]
    tokens: tuple[TokenMove, ...]
    examples: tuple[ExampleMove, ...]
    num_rows: int
    num_sampled: int
    num_words: int
    neighbours: int
    cka_rows: int
    cosine: str
    seed: int
    notes: tuple[str, ...] = ()

    def table(self) -> str:
        """Format pairs and sites as text tables, with the tokens and examples that move most in the furthest pair."""
        parts = [
            f"{format_count(self.num_rows, 'row')}; cosines {self.cosine}; CKA debiased over minibatches of "
            f"{self.cka_rows}; {format_count(self.neighbours, 'neighbour')} of "
            f"{format_count(self.num_sampled, 'row')}; self-similarity of "
            f"{format_count(self.num_words, 'token')}",
            *self.notes,
            "",
            lay_out(self.pairs, _PAIR_COLUMNS),
            "",
            lay_out(self.sites, _SHAPE_COLUMNS),
        ]
        apart = [pair for pair in self.pairs if pair.cosine_distance is not None]
        if apart:
            furthest = max(apart, key=lambda pair: pair.cosine_distance or 0.0)
            parts += ["", f"moves most from {furthest.before} to {furthest.after}, the pair furthest apart by cosine"]
            parts += [f"  {line}" for line in self._name_moves(furthest)]
        return "\n".join(parts)

    __str__ = table
    __repr__ = table

    def _name_moves(self, pair: PairDifference) -> list[str]:
        tokens = [move for move in self.tokens if (move.before, move.after) == (pair.before, pair.after)]
        examples = [move for move in self.examples if (move.before, move.after) == (pair.before, pair.after)]
        lines = []
        if tokens:
            named = ", ".join(
                f"{repr(move.token) if move.token else move.token_id} {move.cosine_distance:.2f}" for move in tokens
            )
            lines.append(f"tokens    {named}")
        for place, move in enumerate(examples[:3]):
            text = f" {shorten(move.text)}" if move.text is not None else ""
            lines.append(f"{'' if place else 'examples':<9} {move.example}: {move.cosine_distance:.2f}{text}")
        return lines

    def to_csv(self, path: str | Path) -> Path:
        """Write the pairs as CSV, one row each.

        Raises:
            StoreError: the file cannot be written.
        """
        return write_csv(path, _PAIR_COLUMNS, [[getattr(pair, name) for name in _PAIR_COLUMNS] for pair in self.pairs])

    def to_json(self, path: str | Path) -> Path:
        """Write everything as one JSON object.

        Raises:
            StoreError: the file cannot be written.
        """
        return write_json(path, self)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the CKA of every site with every other, and the curves over depth.

        Args:
            path: A `.png`, `.svg` or `.pdf` to write; None for the figure alone.

        Returns:
            The matplotlib figure.

        Raises:
            OptionError: matplotlib is not installed, or the suffix is none of these.
        """
        from layerprobe.analysis.figures import Curve, draw_depth

        names = [site.site for site in self.sites]
        by_names = {(pair.before, pair.after): pair for pair in self.pairs}
        steps = [by_names[step] for step in pairwise(names)]
        curves = [
            Curve("anisotropy", names, [site.anisotropy for site in self.sites]),
            Curve("self-similarity", names, [site.self_similarity for site in self.sites]),
            Curve("cosine distance from layer before", names[1:], [step.cosine_distance for step in steps]),
            Curve("neighbours kept from layer before", names[1:], [step.neighbour_overlap for step in steps]),
        ]
        rank = Curve("effective rank", names, [site.effective_rank for site in self.sites])
        return draw_depth(names, self.cka, curves, rank, path)


def differences(
    store: Store | str | Path,
    *,
    sites: str | Sequence[str] | None = None,
    pairs: str = "adjacent",
    cosine: str = "raw",
    max_rows: int | None = None,
    sample: int = _SAMPLE,
    neighbours: int = _NEIGHBOURS,
    seed: int = 0,
    progress: bool | None = None,
) -> Differences:
    """Measure how far rows move from layer to layer, and the geometry of each layer.

    Args:
        store: A store, or its path or URL; for pooled stores, measures that need tokens are empty.
        sites: Patterns over the stored sites; None for the embeddings and every layer's output.
        pairs: `adjacent` sites, or `all` pairs.
        cosine: Cosine of `raw` rows, `centred` ones, or z-scores (`zscored`) of each dimension.
        max_rows: Approximate number of rows, drawn at random: rows in the first pass, whole examples in the second.
            None for all.
        sample: Number of rows whose neighbours are compared; with 2,000 the overlap is accurate to about 0.01.
        neighbours: Number of neighbours of each row; if there are too few rows, half of the other rows, with a note.
        seed: Random seed.
        progress: Show a progress bar; None: only on a terminal.

    Raises:
        OptionError: an invalid value, or sites that have no rows in common.
        SiteError: a pattern matches nothing, or fewer than two sites are left.
        InputError: fewer than two rows.
        NonFiniteError: a row that is not finite, by name.

    Example:
        >>> import layerprobe as lp
        >>> texts = ["The kettle whistled.", "Who left the gate open?", "So it goes."]
        >>> store = lp.extract("demo", texts, "memory://compared", sites="layers.-2:")
        >>> (pair,) = lp.differences(store).pairs
        >>> pair.before, pair.after, round(pair.cosine_distance, 2)
        ('layers.4', 'layers.5', 0.32)

    Cost: two passes over the store. Memory per site 8 D^2 bytes and 8 D per sampled row; a chunk of 4,096 rows; and for
    each pair of sampled rows once 24 bytes and one per site, 96 MB and 4 MB at 2,000.
    """
    if pairs not in ("adjacent", "all"):
        raise OptionError(f"pairs={pairs!r}: use adjacent or all.")
    check_cosine(cosine)
    check_count("sample", sample, 2)
    check_count("neighbours", neighbours)
    seed = check_count("seed", seed, 0)
    if max_rows is not None:
        check_count("max_rows", max_rows, 2)
    store = take_store(store)
    chosen = choose_depth(store, sites)
    names = [site.name for site in chosen]
    if len(chosen) < 2:
        raise SiteError(f"differences of {names[0]!r} alone: it takes two sites. {store.place} holds {store.sites}.")
    num_rows = chosen[0].count_vectors(store.catalog)
    if num_rows < 2:
        raise InputError(f"differences of {store.place}: it has {format_count(num_rows, 'row')}; two are the least.")
    neighbours, notes = _fit_neighbours(neighbours, min(sample, num_rows, max_rows or num_rows))
    places = list(pairwise(range(len(names))) if pairs == "adjacent" else combinations(range(len(names)), 2))
    with using_few_cores():
        shape = ShapePass(chosen, sample, min(num_rows, max_rows or num_rows), seed)
        for values in draw_rows(store, chosen, max_rows=max_rows, seed=seed, progress=progress):
            shape.add(values)
        scalings = [moments.scaling(cosine) for moments in shape.moments]
        types = count_types(store) if chosen[0].kind == "token" else None
        moves = MovePass(chosen, places, scalings, types, seed)
        for chunk in sweep(store, chosen, max_rows=max_rows, seed=seed, what="moves", progress=progress):
            moves.add(chunk)
        pairs_found = _list_pairs(names, places, shape, moves, scalings, neighbours)
    return Differences(
        pairs=pairs_found,
        sites=_list_shapes(names, shape, moves),
        cka=tuple(map(tuple, shape.cka.tolist())),
        tokens=_list_tokens(store, names, places, moves),
        examples=_list_examples(store, names, places, moves),
        num_rows=moves.num_rows,
        num_sampled=shape.num_sampled,
        num_words=moves.num_words,
        neighbours=neighbours,
        cka_rows=CKA_ROWS,
        cosine=cosine,
        seed=seed,
        notes=notes,
    )


def _fit_neighbours(asked: int, num_rows: int) -> tuple[int, tuple[str, ...]]:
    """Limit the number of neighbours to half of the other rows: if all are neighbours, the overlap is always 1."""
    if asked < num_rows - 1:
        return asked, ()
    fewer = max(1, (num_rows - 1) // 2)
    return fewer, (
        f"neighbours: {fewer} and not {asked}, since each row has {format_count(num_rows - 1, 'other')} to choose from",
    )


def _list_pairs(
    names: Sequence[str], places: Sequence[tuple[int, int]], shape: ShapePass, moves: MovePass, scalings: Any, k: int
) -> tuple[PairDifference, ...]:
    cka, overlaps = shape.cka, shape.overlap(places, scalings, k)
    return tuple(
        PairDifference(names[a], names[b], *moves.distances(pair), float(cka[a, b]), overlaps[pair])
        for pair, (a, b) in enumerate(places)
    )


def _list_shapes(names: Sequence[str], shape: ShapePass, moves: MovePass) -> tuple[SiteShape, ...]:
    norms, similar = moves.mean_norms, moves.self_similarity
    return tuple(
        SiteShape(
            name,
            norms[place],
            moves.units[place].mean_cosine,
            similar[place],
            count_effective_rank(moments.covariance),
            count_participation(moments.covariance),
            tuple(find_outliers(moments.rms)),
        )
        for place, (name, moments) in enumerate(zip(names, shape.moments, strict=True))
    )


def _list_tokens(
    store: Store, names: Sequence[str], places: Sequence[tuple[int, int]], moves: MovePass
) -> tuple[TokenMove, ...]:
    import torch

    found = []
    for pair, (a, b) in enumerate(places):
        moved = moves.most_moved_types(pair)
        ids = torch.tensor([token_id for token_id, _, _ in moved], dtype=torch.int64, device="cpu")
        tokens = store.id_to_tokens(ids) if store.id_to_tokens is not None else [None] * len(moved)
        found += [
            TokenMove(names[a], names[b], token_id, token, count, mean)
            for (token_id, count, mean), token in zip(moved, tokens, strict=True)
        ]
    return tuple(found)


def _list_examples(
    store: Store, names: Sequence[str], places: Sequence[tuple[int, int]], moves: MovePass
) -> tuple[ExampleMove, ...]:
    return tuple(
        ExampleMove(names[a], names[b], ordinal, count, mean, store.record(ordinal).get("text"))
        for pair, (a, b) in enumerate(places)
        for ordinal, count, mean in moves.most_moved_examples(pair)
    )
