"""`layerprobe.check`: what would distort cosine similarities in a store, with a verdict in sentences.

Two passes: the first for moments and the first row of each example, the second for the mean cosine of centred rows and
of z-scores. Rows that are not finite are counted and skipped, not refused.

Must never know of models, hooks or shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerprobe.analysis.geometry import find_outliers, find_rogues
from layerprobe.analysis.moments import RunningMoments, Scaling, UnitSums
from layerprobe.analysis.results import lay_out, write_csv, write_json
from layerprobe.analysis.sweep import Chunk, choose_depth, sweep
from layerprobe.cores import using_few_cores
from layerprobe.errors import InputError
from layerprobe.store.description import StoredSite
from layerprobe.store.guard import check_count
from layerprobe.store.reader import Store, take_store
from layerprobe.tables import format_count

__all__ = ["Check", "SiteCheck", "check"]

# First rows count as the same if they differ by at most this fraction of their length.
_SAME = 1e-6
# Mean cosines from this value on are reported in the verdict.
_HIGH = 0.2
_COLUMNS = (
    "site",
    "num_rows",
    "nonfinite_rows",
    "mean_norm",
    "cosine_raw",
    "cosine_centred",
    "cosine_zscored",
    "dead",
    "outliers",
    "rogue",
    "rogue_share",
    "constant_first",
)


@dataclass(frozen=True)
class SiteCheck:
    """What was found at one site.

    Args:
        site: The site.
        num_rows: Rows that are finite.
        nonfinite_rows: Rows that are not.
        mean_norm: Mean length of a row; `norm_deviation` is its standard deviation.
        cosine_raw, cosine_centred, cosine_zscored: Mean cosine of two different rows as stored, after centring, and of
            z-scores: the remaining anisotropy.
        dead: Dimensions that do not vary.
        outliers: Dimensions far larger than the others.
        rogue: Dimensions that each contribute a large part of the raw mean cosine.
        rogue_share: The part that they contribute together.
        constant_first: Whether every example has the same first row; None for pooled sites and single examples.
        constant: Whether every row is the same.
    """

    site: str
    num_rows: int
    nonfinite_rows: int
    mean_norm: float
    norm_deviation: float
    cosine_raw: float
    cosine_centred: float
    cosine_zscored: float
    dead: tuple[int, ...]
    outliers: tuple[int, ...]
    rogue: tuple[int, ...]
    rogue_share: float
    constant_first: bool | None
    constant: bool

    def sentences(self) -> list[str]:
        """Return what matters about the site, one sentence each; an empty list if nothing does."""
        said = []
        if self.nonfinite_rows:
            said.append(
                f"{format_count(self.nonfinite_rows, 'row')} of {self.num_rows + self.nonfinite_rows:,} not finite: "
                "extract the site again in a wider dtype, or leave those examples out."
            )
        if self.constant:
            said.append("every row is the same: nothing can be read from it.")
            return said
        if self.constant_first:
            said.append(
                "the first row of every example is the same, so pool 'cls' says nothing of the text there: use 'mean'."
            )
        if self.dead:
            said.append(
                f"{format_count(len(self.dead), 'dimension')} constant ({_name(self.dead)}): leave out of z-scores."
            )
        if self.rogue:
            verb = "gives" if len(self.rogue) == 1 else "give"
            said.append(
                f"{format_count(len(self.rogue), 'dimension')} ({_name(self.rogue)}) {verb} {self.rogue_share:.0%} of "
                f"the mean cosine {self.cosine_raw:.2f}: a raw cosine is mostly about them; use centred or zscored."
            )
        elif self.cosine_raw >= _HIGH:
            said.append(
                f"two rows have a mean cosine of {self.cosine_raw:.2f}: use centred ({self.cosine_centred:.2f}) or "
                f"zscored ({self.cosine_zscored:.2f}) cosines."
            )
        return said


@dataclass(frozen=True)
class Check:
    """What `layerprobe.check` found.

    Args:
        sites: The result of each site.
        verdict: The verdict in sentences, by site.
    """

    sites: tuple[SiteCheck, ...]
    verdict: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether every row is finite and no site is constant."""
        return not any(site.nonfinite_rows or site.constant for site in self.sites)

    def table(self) -> str:
        """Format the sites as a text table, with the verdict below it."""
        return "\n".join([lay_out(self.sites, _COLUMNS), "", *self.verdict])

    __str__ = table
    __repr__ = table

    def to_csv(self, path: str | Path) -> Path:
        """Write the sites as CSV, one row each; lists of dimensions are joined by spaces.

        Raises:
            StoreError: the file cannot be written.
        """
        rows = [[_cell(getattr(site, name)) for name in _COLUMNS] for site in self.sites]
        return write_csv(path, _COLUMNS, rows)

    def to_json(self, path: str | Path) -> Path:
        """Write everything as one JSON object.

        Raises:
            StoreError: the file cannot be written.
        """
        return write_json(path, self)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the mean cosines over depth.

        Args:
            path: A `.png`, `.svg` or `.pdf` to write; None for the figure alone.

        Returns:
            The matplotlib figure.

        Raises:
            OptionError: matplotlib is not installed, or the suffix is none of these.
        """
        from layerprobe.analysis.figures import Curve, draw_curves

        names = [site.site for site in self.sites]
        curves = [
            Curve(way, names, [getattr(site, f"cosine_{way}") for site in self.sites])
            for way in ("raw", "centred", "zscored")
        ]
        return draw_curves(names, curves, "mean cosine of two rows", path)


class _FirstRows:
    """Check whether the first row of every example is the same."""

    def __init__(self) -> None:
        self._reference: Tensor | None = None
        self._is_same = True
        self._count = 0

    def add(self, rows: Tensor) -> None:
        if not len(rows):
            return
        if self._reference is None:
            self._reference = rows[0].clone()
        self._count += len(rows)
        gap = (rows - self._reference).norm(dim=1).max()
        self._is_same &= bool(gap <= _SAME * self._reference.norm())

    @property
    def is_constant(self) -> bool | None:
        return self._is_same if self._count > 1 else None


class _SiteSums:
    """The sums that the two passes keep for one site."""

    def __init__(self, site: StoredSite) -> None:
        self.name = site.name
        self.moments = RunningMoments(site.width, has_covariance=False)
        self.cosines = {way: UnitSums(site.width) for way in ("raw", "centred", "zscored")}
        self.first = _FirstRows()
        self._norms = RunningMoments(1, has_covariance=False)
        self._nonfinite = 0
        self._scalings: dict[str, Scaling] = {}

    def add(self, chunk: Chunk) -> None:
        rows = chunk.values[self.name]
        is_finite = torch.isfinite(rows).all(1)
        if chunk.positions is not None:
            self.first.add(rows[is_finite & (chunk.positions == 0)])
        rows = rows[is_finite]
        self._nonfinite += int((~is_finite).sum())
        self.moments.add(rows)
        self.cosines["raw"].add(rows)
        self._norms.add(rows.norm(dim=1, keepdim=True))

    def add_prepared(self, chunk: Chunk) -> None:
        rows = chunk.values[self.name]
        rows = rows[torch.isfinite(rows).all(1)]
        # the first pass has completed the moments
        self._scalings = self._scalings or {way: self.moments.scaling(way) for way in ("centred", "zscored")}
        for way, scaling in self._scalings.items():
            self.cosines[way].add(scaling.apply(rows))

    def conclude(self) -> SiteCheck:
        moments, count = self.moments, self.moments.count
        has_pairs = count > 1
        parts = self.cosines["raw"].parts if has_pairs else torch.zeros(0, dtype=torch.float64, device="cpu")
        rogue = find_rogues(parts) if has_pairs else []
        dead = moments.dead if has_pairs else []
        return SiteCheck(
            site=self.name,
            num_rows=count,
            nonfinite_rows=self._nonfinite,
            mean_norm=float(self._norms.mean),
            norm_deviation=float(self._norms.variance.sqrt()) if count else float("nan"),
            cosine_raw=self.cosines["raw"].mean_cosine,
            cosine_centred=self.cosines["centred"].mean_cosine,
            cosine_zscored=self.cosines["zscored"].mean_cosine,
            dead=tuple(dead),
            outliers=tuple(find_outliers(moments.rms)) if count else (),
            rogue=tuple(rogue),
            rogue_share=float(parts[rogue].sum() / parts.sum()) if rogue else 0.0,
            constant_first=self.first.is_constant,
            constant=has_pairs and len(dead) == len(moments.mean),
        )


def check(
    store: Store | str | Path,
    *,
    sites: str | Sequence[str] | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Check:
    """Find what would distort cosine similarities in a store.

    Constant, outlying and rogue dimensions, and rows that are not finite.

    Args:
        store: A store, or its path or URL.
        sites: Patterns over the stored sites; None for the embeddings and every layer's output.
        max_rows: Approximate number of rows, from examples drawn at random; None for all.
        seed: Seed of the draw.
        progress: Show a progress bar; None: only on a terminal.

    Raises:
        OptionError: an invalid value, or sites that have no rows in common.
        SiteError: a pattern matches nothing that is stored.
        InputError: the store has fewer than two rows.

    Example:
        >>> import layerprobe as lp
        >>> store = lp.extract("demo", ["Rain.", "So it goes."], "memory://checked", sites="embeddings")
        >>> lp.check(store).verdict[0]
        "embeddings: the first row of every example is the same, so pool 'cls' says nothing of the text there: ..."

    Cost: two passes over the store; memory per site about 100 D bytes, and a chunk of 4,096 rows.
    """
    seed = check_count("seed", seed, 0)
    if max_rows is not None:
        check_count("max_rows", max_rows, 2)
    store = take_store(store)
    chosen = choose_depth(store, sites)
    num_rows = chosen[0].count_vectors(store.catalog)
    if num_rows < 2:
        raise InputError(f"check of {store.place}: it has {format_count(num_rows, 'row')}; two are the least.")
    sums = [_SiteSums(site) for site in chosen]

    with using_few_cores():
        for what, add in (("moments", _SiteSums.add), ("cosines", _SiteSums.add_prepared)):
            for chunk in sweep(store, chosen, max_rows=max_rows, seed=seed, what=what, progress=progress, finite=False):
                for site in sums:
                    add(site, chunk)
    found = tuple(site.conclude() for site in sums)
    verdict = [f"{site.site}: {sentence}" for site in found for sentence in site.sentences()]
    return Check(found, tuple(verdict) or ("Nothing stands in the way of cosines.",))


def _name(dimensions: Sequence[int]) -> str:
    return ", ".join(map(str, dimensions[:5])) + (", ..." if len(dimensions) > 5 else "")


def _cell(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value
