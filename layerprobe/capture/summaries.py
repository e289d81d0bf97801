"""`lp.Moments` and `lp.Histogram`: the distribution of a site's values, without keeping them.

Central moments are merged directly, which loses no digits if the mean is large. Must never know of probes or modules.

Letters: T rows, D width.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from layerprobe.capture.statistics import Rows, RowSink, Said, Sums
from layerprobe.errors import OptionError
from layerprobe.store.guard import is_number, is_whole
from layerprobe.tables import format_fields

__all__ = ["Histogram", "Moments", "SiteHistogram", "SiteMoments"]

_MOMENTS = (
    "count", "nonfinite", "mean", "m2", "m3", "m4", "min", "max", "norm_mean", "norm_m2", "norm_min", "norm_max",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class SiteMoments:
    """The moments of a site per dimension, and those of the norms of its rows.

    Args:
        count: Number of rows.
        nonfinite: Number of rows with a NaN or an infinity, which are left out.
        mean, variance: float64 `[D]`; the variance is divided by n.
        skewness, kurtosis: float64 `[D]`; 0 and 3 for a normal distribution, NaN for a constant dimension.
        min, max: float64 `[D]`.
        norm_mean, norm_std, norm_min, norm_max: Of the rows' Euclidean norms.
    """

    count: int
    nonfinite: int
    mean: Tensor
    variance: Tensor
    skewness: Tensor
    kurtosis: Tensor
    min: Tensor
    max: Tensor
    norm_mean: float
    norm_std: float
    norm_min: float
    norm_max: float

    def __repr__(self) -> str:
        return format_fields(self)


class Moments(RowSink[SiteMoments]):
    """Keep count, mean, variance, skewness, kurtosis, minimum and maximum of each dimension, and the norms of rows.

    Over real tokens, never padding, in float64. A row that is not finite is counted and left out.

    Source: Pébay 2008, Formulas for robust, one-pass parallel computation of covariances and arbitrary-order
    statistical moments, equations 2.1, 3.1.

    Cost: 6 numbers per dimension and site; a few passes over the rows in float64.

    Example:
        >>> import torch, layerprobe as lp
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> model, moments = BertModel(tiny).eval(), lp.Moments()
        >>> with torch.no_grad(), lp.Probe(model, "layers.*", to=moments):
        ...     for _ in range(3):
        ...         output = model(input_ids=torch.randint(100, (2, 5)))
        >>> moments["layers.1"].count, moments["layers.1"].mean.shape
        (30, torch.Size([32]))
    """

    def __init__(self) -> None:
        super().__init__(_MOMENTS, _measure_moments, _join_moments, _view_moments, _describe_moments)


def _measure_moments(rows: Rows) -> Sums:
    values = rows.fill(0.0)
    count = rows.counts["count"].clamp_min(1)
    mean = values.sum(0) / count
    centred = rows.fill(0.0, rows.values - mean)
    squares = centred.square()
    norms = values.norm(dim=1)
    norm_mean = norms.sum() / count
    return {
        **rows.counts,
        "mean": mean,
        "m2": squares.sum(0),
        "m3": (squares * centred).sum(0),
        "m4": squares.square().sum(0),
        "min": rows.fill(float("inf")).amin(0),
        "max": rows.fill(float("-inf")).amax(0),
        "norm_mean": norm_mean,
        "norm_m2": torch.where(rows.finite, norms - norm_mean, 0.0).square().sum(),
        "norm_min": torch.where(rows.finite, norms, float("inf")).amin(),
        "norm_max": torch.where(rows.finite, norms, float("-inf")).amax(),
    }


def _join_moments(one: Sums, other: Sums) -> Sums:
    first, second = one["count"].double(), other["count"].double()
    # at least 1 as a denominator; two empty sides give zeros
    n = (first + second).clamp_min(1)
    apart = other["mean"] - one["mean"]
    m2, m3 = (one["m2"], other["m2"]), (one["m3"], other["m3"])
    norm_apart = other["norm_mean"] - one["norm_mean"]
    return {
        "count": one["count"] + other["count"],
        "nonfinite": one["nonfinite"] + other["nonfinite"],
        "mean": one["mean"] + apart * second / n,
        "m2": m2[0] + m2[1] + apart**2 * first * second / n,
        "m3": m3[0]
        + m3[1]
        + apart**3 * first * second * (first - second) / n**2
        + 3 * apart * (first * m2[1] - second * m2[0]) / n,
        "m4": one["m4"]
        + other["m4"]
        + apart**4 * first * second * (first**2 - first * second + second**2) / n**3
        + 6 * apart**2 * (first**2 * m2[1] + second**2 * m2[0]) / n**2
        + 4 * apart * (first * m3[1] - second * m3[0]) / n,
        "min": torch.minimum(one["min"], other["min"]),
        "max": torch.maximum(one["max"], other["max"]),
        "norm_mean": one["norm_mean"] + norm_apart * second / n,
        "norm_m2": one["norm_m2"] + other["norm_m2"] + norm_apart**2 * first * second / n,
        "norm_min": torch.minimum(one["norm_min"], other["norm_min"]),
        "norm_max": torch.maximum(one["norm_max"], other["norm_max"]),
    }


def _view_moments(sums: Sums) -> SiteMoments:
    count = int(sums["count"])
    n = max(1, count)
    variance = sums["m2"] / n
    return SiteMoments(
        count=count,
        nonfinite=int(sums["nonfinite"]),
        mean=sums["mean"],
        variance=variance,
        skewness=sums["m3"] / n / variance**1.5,
        kurtosis=sums["m4"] / n / variance**2,
        min=sums["min"],
        max=sums["max"],
        norm_mean=float(sums["norm_mean"]),
        norm_std=float((sums["norm_m2"] / n).sqrt()),
        norm_min=float(sums["norm_min"]),
        norm_max=float(sums["norm_max"]),
    )


def _describe_moments(found: SiteMoments) -> Said:
    varying = found.kurtosis[found.kurtosis.isfinite()]
    return {
        "rows": found.count,
        "width": len(found.mean),
        "norm": found.norm_mean,
        "its std": found.norm_std,
        "min": found.min.min().item(),
        "max": found.max.max().item(),
        "mean": found.mean.mean().item(),
        "std": found.variance.mean().sqrt().item(),
        # median over the dimensions; a constant dimension has no kurtosis
        "kurtosis": varying.median().item() if len(varying) else None,
        "not finite": found.nonfinite,
    }


@dataclass(frozen=True, eq=False)
class SiteHistogram:
    """The number of values of a site in each bin.

    Args:
        edges: float64 `[bins + 1]`.
        counts: int64 `[bins]`; a value on an edge belongs to the bin above it, but the last bin includes both its
            edges.
        below, above: Number of values beyond the edges.
        nonfinite: Number of rows with a NaN or an infinity, which are left out.
    """

    edges: Tensor
    counts: Tensor
    below: int
    above: int
    nonfinite: int

    def __repr__(self) -> str:
        return format_fields(self)

    def quantile(self, share: float) -> float:
        """Return a quantile, assuming that values are spread evenly within each bin.

        Infinite if it lies beyond the edges, NaN if there are no values.
        """
        if not is_number(share) or not 0 <= share <= 1:
            raise OptionError(f"quantile {share!r}: it must be between 0 and 1.")
        reached = self.below + self.counts.cumsum(0)
        rank = share * (int(reached[-1]) + self.above)
        filled = self.counts.nonzero().flatten().tolist()
        if int(reached[-1]) + self.above == 0:
            return float("nan")
        if self.below and rank <= self.below:
            return float("-inf")
        if rank > int(reached[-1]) or not filled:
            return float("inf")
        place = min(int(torch.searchsorted(reached, rank, right=True)), filled[-1])
        part = (rank - int(reached[place])) / int(self.counts[place]) + 1
        return float(torch.lerp(self.edges[place], self.edges[place + 1], part))


class Histogram(RowSink[SiteHistogram]):
    """Count the values of a site in bins of equal width.

    Args:
        low, high: Edges of the first and the last bin. Values outside are counted separately.
        bins: Number of bins.

    Raises:
        OptionError: `low` is not below `high`, or no bin.

    Example:
        >>> import torch, layerprobe as lp
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> model, histogram = BertModel(tiny).eval(), lp.Histogram(-4, 4, bins=80)
        >>> with torch.no_grad(), lp.Probe(model, "layers.1", to=histogram):
        ...     output = model(input_ids=torch.randint(100, (2, 5)))
        >>> found = histogram["layers.1"]
        >>> int(found.counts.sum()) + found.below + found.above
        320
    """

    def __init__(self, low: float = -10.0, high: float = 10.0, bins: int = 200) -> None:
        is_range = is_number(low) and is_number(high) and math.isfinite(low) and math.isfinite(high) and low < high
        if not is_range or not is_whole(bins) or bins < 1:
            raise OptionError(f"a histogram of {bins!r} bins from {low!r} to {high!r}: give at least one, low first.")
        edges = torch.linspace(low, high, bins + 1, dtype=torch.float64, device="cpu")
        super().__init__(
            ("counts", "nonfinite"),
            partial(_measure_bins, edges),
            _join_bins,
            partial(_view_bins, edges),
            _describe_bins,
            options={"edges": edges},
        )


def _measure_bins(edges: Tensor, rows: Rows) -> Sums:
    edges = edges.to(rows.values.device)
    last = len(edges)
    places = torch.bucketize(rows.values, edges, right=True)
    places = torch.where(rows.values == edges[-1], last - 1, places)
    # one extra bin at the end, for rows that are left out
    counts = torch.bincount(rows.fill(last + 1, places).flatten(), minlength=last + 2)
    return {"counts": counts[: last + 1], "nonfinite": rows.counts["nonfinite"]}


def _join_bins(one: Sums, other: Sums) -> Sums:
    return {name: one[name] + other[name] for name in one}


def _view_bins(edges: Tensor, sums: Sums) -> SiteHistogram:
    counts = sums["counts"]
    return SiteHistogram(edges, counts[1:-1], int(counts[0]), int(counts[-1]), int(sums["nonfinite"]))


def _describe_bins(found: SiteHistogram) -> Said:
    shares = (0.01, 0.25, 0.5, 0.75, 0.99)
    return {
        "values": int(found.counts.sum()) + found.below + found.above,
        "below": found.below,
        "above": found.above,
        **{f"{share:.0%}": found.quantile(share) for share in shares},
        "not finite": found.nonfinite,
    }
