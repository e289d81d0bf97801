"""The difference of two sites of a store, by example, with the interface of a site.

It is computed lazily and nothing is written: `[i]` reads two views of mapped files and subtracts them in float32, so
that the difference of two float16 rows is not rounded a second time.

Hides which sites follow each other in depth. Must never know of models, hooks or statistics.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from layerprobe.errors import OptionError, SiteError
from layerprobe.store.description import StoredSite
from layerprobe.store.order import RowOptions
from layerprobe.store.rows import RowBatches, choose_sites
from layerprobe.store.siteview import SiteView
from layerprobe.tables import format_count

__all__ = ["Difference", "pair_depth", "take_depth"]

# The sites along the residual stream, from the embeddings to the final norm.
_DEPTH = re.compile(r"(?:[a-z]+\.)?(?:embeddings|layers\.\d+|norm)\Z")


def take_depth(sites: Mapping[str, StoredSite]) -> list[str]:
    """Select the embeddings, every layer's output and the final norm, in the order in which the model runs them.

    Returns:
        Names, all with a row per token or, if there are none, all with a vector per example. If no such site is stored,
        choose among all stored sites that have rows.
    """
    names = [name for name in sites if _DEPTH.match(name)] or list(sites)
    for kind in ("token", "example"):
        if chosen := [name for name in names if sites[name].kind == kind]:
            return chosen
    return []


def pair_depth(sites: Mapping[str, StoredSite], where: str) -> list[tuple[str, str]]:
    """Pair each site along depth with the next, as (later, earlier); pairs of different widths are left out.

    Raises:
        SiteError: fewer than two are stored.
    """
    names = take_depth(sites)
    if len(names) < 2:
        raise SiteError(f"no two sites to take a difference of in {where}: it holds {', '.join(sites) or 'none'}.")
    return [(after, before) for before, after in pairwise(names) if sites[before].width == sites[after].width]


class Difference(Sequence[Tensor]):
    """One site minus another, lazily. Made by `store.difference(site, other)`.

    `[17]` is float32 `[T, D]` (`[D]` for pooled sites); a slice or a list of ordinals gives a list of them.

    Raises:
        OptionError: the sites have no rows in common, or different widths.
    """

    def __init__(self, site: SiteView, other: SiteView) -> None:
        # refuses attention weights, and row-per-token with vector-per-example sites
        choose_sites(site.catalog, [site.site, other.site])
        if site.width != other.width:
            raise OptionError(
                f"{site.site!r} minus {other.site!r}: one is {site.width} wide, the other {other.width}. "
                "Take two sites of one width."
            )
        self._site, self._other = site, other
        self.site = f"{site.site} - {other.site}"
        self.kind: str = site.kind
        self.dtype: torch.dtype = torch.float32
        self.width: int = site.width

    def __repr__(self) -> str:
        return (
            f"Difference({self.site!r}, {format_count(len(self), 'example')}, {self.kind}, {self.width} x {self.dtype})"
        )

    def __len__(self) -> int:
        return len(self._site)

    def __getitem__(self, index: Any) -> Any:
        values, others = self._site[index], self._other[index]
        if isinstance(values, list):
            return [one.float() - other.float() for one, other in zip(values, others, strict=True)]
        return values.float() - others.float()

    def __iter__(self) -> Iterator[Tensor]:
        pairs = zip(self._site, self._other, strict=True)
        return (values.float() - others.float() for values, others in pairs)

    def __reversed__(self) -> Iterator[Tensor]:
        pairs = zip(reversed(self._site), reversed(self._other), strict=True)
        return (values.float() - others.float() for values, others in pairs)

    def rows(
        self, batch_size: int = 4096, shuffle: bool = False, seed: int = 0, *, rank: int = 0, world: int = 1
    ) -> RowBatches[Tensor]:
        """Iterate over every row once, in batches, in the order of `store[site].rows`.

        Returns:
            An iterator of float32 `[batch_size, D]`.

        Raises:
            OptionError: a value is invalid.
        """
        catalog = self._site.catalog
        options = RowOptions(batch_size, shuffle, seed, rank, world)
        return RowBatches(catalog, choose_sites(catalog, [self._site.site, self._other.site]), options, self._subtract)

    def _subtract(self, rows: dict[str, Tensor]) -> Tensor:
        return rows[self._site.site].float() - rows[self._other.site].float()

    def pooled(self, pool: str | None = None) -> Tensor:
        """Subtract the pooled values of the two sites; for `max` that is not the maximum of the differences.

        Returns:
            float32 `[N, D]`, in input order.

        Raises:
            OptionError: the pool does not exist, or differs from that of the store.
        """
        return self._site.pooled(pool) - self._other.pooled(pool)
