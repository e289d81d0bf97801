"""`lp.Covariance` and `lp.CrossCovariance`: covariance of the dimensions of a site, or between two sites.

The mean of each call is subtracted before multiplying, so a large mean costs no digits. Must never know of probes or
modules.

Letters: T rows, D width, E width of another site.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise

import torch
from torch import Tensor

from layerprobe.capture.statistics import Rows, RowSink, Said, Sums
from layerprobe.errors import CaptureError, OptionError
from layerprobe.sites.resolve import Site
from layerprobe.tables import format_fields, format_table

__all__ = ["Covariance", "CrossCovariance", "SiteCovariance"]

_FIELDS = ("count", "nonfinite", "mean", "other_mean", "products")
# Separates the two sites in the name of a pair; no site name contains it.
_AND = " "


@dataclass(frozen=True, eq=False)
class SiteCovariance:
    """The covariance of a site's dimensions.

    Args:
        count: Number of rows.
        nonfinite: Number of rows with a NaN or an infinity, which are left out.
        mean: float64 `[D]`.
        covariance: float64 `[D, D]`, divided by n.
    """

    count: int
    nonfinite: int
    mean: Tensor
    covariance: Tensor

    def __repr__(self) -> str:
        return format_fields(self)

    @property
    def correlation(self) -> Tensor:
        """The correlation matrix, float64 `[D, D]`; NaN for a constant dimension."""
        deviation = self.covariance.diagonal().sqrt()
        return self.covariance / torch.outer(deviation, deviation)


class Covariance(RowSink[SiteCovariance]):
    """Keep the mean and the covariance of each site's rows, over real tokens, in float64.

    Source: Chan, Golub and LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances.

    Cost: D x D numbers and one product of T x D x D per site and call.

    Example:
        >>> import torch, layerprobe as lp
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> model, covariance = BertModel(tiny).eval(), lp.Covariance()
        >>> with torch.no_grad(), lp.Probe(model, "layers.1", to=covariance):
        ...     output = model(input_ids=torch.randint(100, (2, 5)))
        >>> covariance["layers.1"].count, covariance["layers.1"].covariance.shape
        (10, torch.Size([32, 32]))
    """

    def __init__(self) -> None:
        super().__init__(_FIELDS, _measure, _join, _view, _describe)


class CrossCovariance(RowSink[SiteCovariance]):
    """Keep the covariance of each site and between pairs of sites: enough for linear CKA between layers.

    Rows that are not finite at one of the sites are left out at all of them. `sink[site]` gives a site's own.

    Args:
        pairs: `all`, `consecutive` (each site with the next requested one), or pairs of names.

    Raises:
        OptionError: `pairs` is another word, or empty.

    Cost: D x E numbers and a product of T x D x E per pair; the rows of one call in float64 until its end.

    Example:
        >>> import torch, layerprobe as lp
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> model, between = BertModel(tiny).eval(), lp.CrossCovariance()
        >>> with torch.no_grad(), lp.Probe(model, ["embeddings", "layers.*"], to=between):
        ...     output = model(input_ids=torch.randint(100, (2, 5)))
        >>> between.sites, 0 < between.cka("embeddings", "layers.1") <= 1
        (['embeddings', 'layers.0', 'layers.1'], True)
    """

    def __init__(self, pairs: str | Sequence[tuple[str, str]] = "all") -> None:
        is_list = isinstance(pairs, (list, tuple)) and all(len(pair) == 2 for pair in pairs) and len(pairs) > 0
        if not is_list and pairs not in ("all", "consecutive"):
            raise OptionError(f"pairs={pairs!r}: use all, consecutive, or pairs of sites.")
        chosen = pairs if isinstance(pairs, str) else [(one, other) for one, other in pairs]
        super().__init__(
            _FIELDS, _hold, _join, _view, _describe, partial(_combine, chosen), check=partial(_check_sites, chosen)
        )

    @property
    def sites(self) -> list[str]:
        """Sites with measured values."""
        return [key for key in self._sums if _AND not in key]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of sites whose covariance is kept."""
        return [(one, other) for one, _, other in (key.partition(_AND) for key in self._sums) if other]

    def cross(self, one: str, other: str) -> Tensor:
        """Return the covariance between two sites, float64 `[D, E]`, divided by n.

        Raises:
            SiteError: they are not a pair here.
        """
        is_turned = f"{one}{_AND}{other}" not in self._sums and f"{other}{_AND}{one}" in self._sums
        sums = self._find(f"{other}{_AND}{one}" if is_turned else f"{one}{_AND}{other}")
        products = sums["products"].cpu() / max(1, int(sums["count"]))
        return products.T if is_turned else products

    def cka(self, one: str, other: str) -> float:
        """Return the linear CKA of two sites: 1 for a rotation and scaling, NaN if one does not vary.

        Source: Kornblith, Norouzi, Lee and Hinton 2019, Similarity of neural network representations revisited, eq. 3.

        Raises:
            SiteError: they are not a pair here.
        """
        cross = self.cross(one, other) if one != other else self[one].covariance
        own = self[one].covariance.norm() * self[other].covariance.norm()
        return float(cross.square().sum() / own)

    def summary(self) -> list[Said]:
        """Return the linear CKA of each pair of sites."""
        return [
            {
                "site": one,
                "other": other,
                "rows": int(self._find(f"{one}{_AND}{other}")["count"]),
                "cka": self.cka(one, other),
            }
            for one, other in self.pairs
        ]

    def __str__(self) -> str:
        known = {*self.pairs, *((other, one) for one, other in self.pairs), *((site, site) for site in self.sites)}
        rows = [
            (one, *(round(self.cka(one, other), 3) if (one, other) in known else None for other in self.sites))
            for one in self.sites
        ]
        return format_table(("linear CKA", *self.sites), rows)

    __repr__ = __str__


def _measure(rows: Rows) -> Sums:
    return {**rows.counts, **_multiply(rows.values, rows.values, rows.finite)}


def _multiply(one_TD: Tensor, other_TE: Tensor, finite: Tensor) -> Sums:
    """Return the means of both, and the product of the centred rows."""
    count = finite.sum().clamp_min(1)
    keep = finite[:, None]
    means = [torch.where(keep, rows, 0.0).sum(0) / count for rows in (one_TD, other_TE)]
    one, other = (torch.where(keep, rows - mean, 0.0) for rows, mean in zip((one_TD, other_TE), means, strict=True))
    return {"mean": means[0], "other_mean": means[1], "products": one.T @ other}


def _join(one: Sums, other: Sums) -> Sums:
    first, second = one["count"].double(), other["count"].double()
    n = (first + second).clamp_min(1)
    apart = other["mean"] - one["mean"]
    other_apart = other["other_mean"] - one["other_mean"]
    return {
        "count": one["count"] + other["count"],
        "nonfinite": one["nonfinite"] + other["nonfinite"],
        "mean": one["mean"] + apart * second / n,
        "other_mean": one["other_mean"] + other_apart * second / n,
        "products": one["products"] + other["products"] + torch.outer(apart, other_apart) * (first * second / n),
    }


def _view(sums: Sums) -> SiteCovariance:
    count = int(sums["count"])
    return SiteCovariance(count, int(sums["nonfinite"]), sums["mean"], sums["products"] / max(1, count))


def _describe(found: SiteCovariance) -> Said:
    total = found.covariance.trace().item()
    squares = found.covariance.square().sum().item()
    return {
        "rows": found.count,
        "width": len(found.mean),
        "variance": total,
        # participation ratio: the number of equally large dimensions with the same total
        "dimensions": total**2 / squares if squares else None,
        "not finite": found.nonfinite,
    }


def _hold(rows: Rows) -> Sums:
    """Keep a site's rows until the call is complete."""
    return {"rows": rows.values, "finite": rows.finite}


def _check_sites(pairs: str | Sequence[tuple[str, str]], sites: Sequence[Site]) -> None:
    """Refuse sites whose rows stand for different tokens, and pairs with a site that is not captured.

    Raises:
        OptionError: the sites belong to two stacks or mix tokens and examples, or a pair's site is not captured.
    """
    names = [site.name for site in sites]
    missing = [] if isinstance(pairs, str) else [name for pair in pairs for name in pair if name not in names]
    if missing:
        raise OptionError(f"pairs ask for {missing[0]!r}, which is not captured: the sites are {', '.join(names)}.")
    # logits belong to no stack but have one row per token of the decoder
    apart = {(site.kind, site.kind == "token" and site.name.startswith("encoder.")): site.name for site in sites[::-1]}
    # what the rows of a `module:` site stand for is not known before it runs
    known = [name for (kind, _), name in apart.items() if kind != "unknown"]
    if len(known) > 1:
        raise OptionError(
            f"a covariance between {known[-1]!r} and {known[-2]!r} has no meaning: their rows stand for different "
            "things. Ask for sites with a row per token of one stack, or for sites with a row per text."
        )


def _combine(pairs: str | Sequence[tuple[str, str]], made: dict[str, Sums]) -> dict[str, Sums]:
    """Multiply the rows of a call, for each site and each pair."""
    if not made:
        return {}
    lengths = {site: len(held["rows"]) for site, held in made.items()}
    if len(set(lengths.values())) > 1:
        raise CaptureError(
            f"sites with different rows in one call ({', '.join(f'{site}: {n}' for site, n in lengths.items())}): "
            "a covariance between them has no meaning. Ask for sites with a row per token, or for others, not both."
        )
    finite = torch.stack([held["finite"] for held in made.values()]).all(0)
    count = finite.sum()
    counts = {"count": count, "nonfinite": len(finite) - count}
    names = list(made)
    if pairs == "all":
        chosen = list(combinations(names, 2))
    elif pairs == "consecutive":
        chosen = list(pairwise(names))
    else:
        chosen = list(pairs)
    keys = {**{name: (name, name) for name in names}, **{_AND.join(pair): pair for pair in chosen}}
    return {
        key: {**counts, **_multiply(made[one]["rows"], made[other]["rows"], finite)}
        for key, (one, other) in keys.items()
    }
