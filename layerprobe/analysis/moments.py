"""Running sums over rows from which statistics are computed, so that no row has to be kept.

`RunningMoments` holds the mean and covariance of a site in D x D numbers; `UnitSums` the sums for the mean cosine of
all pairs; `Scaling` the preparation of rows before a cosine is taken. Rows come in batches, in any order.

Letters: n rows, D width. Must never know of stores.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerprobe.analysis.geometry import cut_cosines, mean_cosine, normalise
from layerprobe.errors import OptionError

__all__ = ["RunningMoments", "Scaling", "UnitSums", "check_cosine"]

_COSINES = ("raw", "centred", "zscored")
# A deviation below this fraction of the mean, or of the median deviation, may be rounding error alone.
_DEAD = 1e-6


def check_cosine(cosine: object) -> None:
    """Check the name of a preparation of rows for cosines.

    Raises:
        OptionError: the name is unknown.
    """
    if cosine not in _COSINES:
        raise OptionError(f"cosine={cosine!r}: use {', '.join(_COSINES)}.")


@dataclass(frozen=True, eq=False)
class Scaling:
    """The preparation of rows before a cosine is taken: none, centring, or z-scores.

    A dimension that does not vary is left out of z-scores, where it would be 0 / 0.

    Args:
        shift: float64 `[D]`, subtracted; None for no shift.
        factor: float64 `[D]`, multiplied after the shift; None for no factor.
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

    The mean of the first batch is subtracted before anything is summed, because products of large, nearly equal numbers
    would leave few digits for their differences.

    Args:
        width: D.
        has_covariance: Whether to compute the covariance; without it there is no `covariance`.

    Cost: 8 D (D + 2) bytes, and 2 D^2 operations per row; without the covariance 24 D bytes and a few D operations.
    """

    def __init__(self, width: int, has_covariance: bool = True) -> None:
        self.count = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64, device="cpu")
        shape = (width, width) if has_covariance else (width,)
        self._second = torch.zeros(shape, dtype=torch.float64, device="cpu")

    def add(self, rows_nD: Tensor) -> None:
        """Add a batch of rows."""
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
        """Mean of each dimension, float64 `[D]`; NaN before the first row."""
        if self._shift is None:
            return torch.full_like(self._sum, float("nan"))
        return self._shift + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance, float64 `[D, D]`, divided by n."""
        mean = self._sum / max(1, self.count)
        return self._second / max(1, self.count) - torch.outer(mean, mean)

    @property
    def variance(self) -> Tensor:
        """Variance of each dimension, float64 `[D]`, divided by n; does not compute the covariance."""
        squares = self._second.diagonal() if self._second.ndim == 2 else self._second
        return (squares / max(1, self.count) - (self._sum / max(1, self.count)).square()).clamp_min(0)

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of each dimension, float64 `[D]`; exactly 0 for a dimension that does not vary.

        A dimension does not vary if its deviation is at most a millionth of its mean, or of the median deviation.
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
        """Return the preparation of rows for `raw`, `centred` or `zscored` cosines."""
        if cosine == "raw":
            return Scaling()
        if cosine == "centred":
            return Scaling(self.mean)
        deviation = self.deviation
        return Scaling(self.mean, torch.where(deviation > 0, 1 / deviation, 0.0))


class UnitSums:
    """Sums of rows scaled to length 1, for the mean cosine of all pairs of different rows and its parts by dimension.

    Cost: 16 D bytes.
    """

    def __init__(self, width: int) -> None:
        self.num_rows = 0
        self._num_units = 0.0
        self._sum = torch.zeros(width, dtype=torch.float64, device="cpu")
        self._squares = torch.zeros(width, dtype=torch.float64, device="cpu")

    def add(self, rows_nD: Tensor) -> Tensor:
        """Add a batch of rows, and return them scaled to length 1, float64 `[n, D]`."""
        units = normalise(rows_nD)
        squares = units.square().sum(0)
        self.num_rows += len(units)
        self._num_units += float(squares.sum())
        self._sum += units.sum(0)
        self._squares += squares
        return units

    @property
    def mean_cosine(self) -> float:
        """Mean cosine over all pairs of different rows; NaN for fewer than two rows."""
        return mean_cosine(self._sum, self._num_units, self.num_rows)

    @property
    def parts(self) -> Tensor:
        """Contribution of each dimension to the mean cosine, float64 `[D]`; needs at least two rows."""
        return cut_cosines(self._sum, self._squares, self.num_rows)
