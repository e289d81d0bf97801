"""Sums over rows that are enough for a statistic, so that no row need be kept.

`RunningMoments` holds the mean and the covariance of a site in D x D numbers; `UnitSums` what the mean cosine of all
pairs is made of; `Scaling` how rows are prepared before a cosine is taken. Rows come in batches, in any order.

Letters: n rows, D width. Must never know of stores.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerprobe.analysis.geometry import cut_cosines, mean_cosine, normalise
from layerprobe.errors import OptionError

__all__ = ["RunningMoments", "Scaling", "UnitSums", "check_cosine"]

_COSINES = ("raw", "centred", "zscored")
# Of its own size, or of what is usual among the dimensions: a deviation that rounding alone may leave.
_DEAD = 1e-6


def check_cosine(cosine: object) -> None:
    """Refuse a way to take a cosine that does not exist.

    Raises:
        OptionError: it does not.
    """
    if cosine not in _COSINES:
        raise OptionError(f"cosine={cosine!r}: use {', '.join(_COSINES)}.")


@dataclass(frozen=True, eq=False)
class Scaling:
    """What is done to rows before a cosine is taken: nothing, the mean taken off, or z-scores.

    A dimension that does not vary is left out of z-scores, where it would be 0 / 0.

    Args:
        shift: float64 `[D]`, taken off; None for nothing.
        factor: float64 `[D]`, multiplied after that; None for nothing.
    """

    shift: Tensor | None = None
    factor: Tensor | None = None

    def apply(self, rows_nD: Tensor) -> Tensor:
        """Prepare rows, float64 `[n, D]`."""
        rows = rows_nD.double()
        if self.shift is not None:
            rows = rows - self.shift
        return rows if self.factor is None else rows * self.factor


class RunningMoments:
    """Count, mean, deviations and covariance of rows that come in batches.

    The first batch's mean is taken off before anything is summed: products of large equal numbers would leave few
    digits for what differs.

    Args:
        width: D.
        has_covariance: Whether dimensions are compared with each other; without it there is no `covariance`.

    Cost: 8 D (D + 2) bytes, and 2 D^2 operations a row; without the covariance 24 D and a few D.
    """

    def __init__(self, width: int, has_covariance: bool = True) -> None:
        self.count = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64, device="cpu")
        shape = (width, width) if has_covariance else (width,)
        self._second = torch.zeros(shape, dtype=torch.float64, device="cpu")

    def add(self, rows_nD: Tensor) -> None:
        """Take rows in."""
        if not len(rows_nD):
            return
        rows = rows_nD.double()
        if self._shift is None:
            self._shift = rows.mean(0)
        rows = rows - self._shift
        self.count += len(rows)
        self._sum += rows.sum(0)
        if self._second.ndim == 2:
            self._second.addmm_(rows.T, rows)
        else:
            self._second += rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """float64 `[D]`."""
        if self._shift is None:
            return torch.full_like(self._sum, float("nan"))
        return self._shift + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """float64 `[D, D]`, divided by n."""
        mean = self._sum / max(1, self.count)
        return self._second / max(1, self.count) - torch.outer(mean, mean)

    @property
    def variance(self) -> Tensor:
        """float64 `[D]`, divided by n: the diagonal of the covariance, which is not made for it."""
        squares = self._second.diagonal() if self._second.ndim == 2 else self._second
        return (squares / max(1, self.count) - (self._sum / max(1, self.count)).square()).clamp_min(0)

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of each dimension, float64 `[D]`; exactly 0 for one that does not vary.

        That is one whose deviation is below a millionth of its mean, or of the median of all deviations.
        """
        deviation = self.variance.sqrt()
        least = _DEAD * torch.maximum(self.mean.abs(), deviation.median())
        return deviation.masked_fill(deviation <= least, 0.0)

    @property
    def rms(self) -> Tensor:
        """Root mean square of each dimension, float64 `[D]`."""
        return (self.variance + self.mean.square()).sqrt()

    @property
    def dead(self) -> list[int]:
        """The dimensions that do not vary."""
        return (self.deviation == 0).nonzero().flatten().tolist()

    def scaling(self, cosine: str) -> Scaling:
        """Give the preparation of rows that a way to take cosines asks for."""
        if cosine == "raw":
            return Scaling()
        if cosine == "centred":
            return Scaling(self.mean)
        deviation = self.deviation
        return Scaling(self.mean, torch.where(deviation > 0, 1 / deviation, 0.0))


class UnitSums:
    """Sums of rows scaled to length 1: the mean cosine over all pairs of different rows, and each dimension's part.

    Cost: 16 D bytes.
    """

    def __init__(self, width: int) -> None:
        self.num_rows = 0
        self._num_units = 0.0
        self._sum = torch.zeros(width, dtype=torch.float64, device="cpu")
        self._squares = torch.zeros(width, dtype=torch.float64, device="cpu")

    def add(self, rows_nD: Tensor) -> Tensor:
        """Take rows in; gives them scaled to length 1, float64 `[n, D]`."""
        units = normalise(rows_nD)
        squares = units.square().sum(0)
        self.num_rows += len(units)
        self._num_units += float(squares.sum())
        self._sum += units.sum(0)
        self._squares += squares
        return units

    @property
    def mean_cosine(self) -> float:
        """Over all pairs of different rows; NaN for fewer than two rows."""
        return mean_cosine(self._sum, self._num_units, self.num_rows)

    @property
    def parts(self) -> Tensor:
        """What each dimension gives to it, float64 `[D]`; for at least two rows."""
        return cut_cosines(self._sum, self._squares, self.num_rows)
