"""Statistics of a site during training: norms, dead and saturated units, gradients, non-finite values.

Computed from sums over the real tokens of a step, kept on the device so that nothing synchronises before the numbers
are read. Constant memory: a few numbers per unit. Must never know of hooks or of when a step is watched.

Letters: T rows, D units.
"""

import torch
from torch import Tensor

from layerprobe.sites.stacks import find_sum_device, widen

__all__ = ["MOVES_LESS", "NEAR_TOP", "Vitals"]

# A unit is dead if its range is at most this fraction of the site's root mean square over all tokens of a step ...
MOVES_LESS = 1e-3
# ... and saturated if its magnitude is at least this fraction of the site's largest for every token.
NEAR_TOP = 0.99


class Vitals:
    """Sums of one site over a step."""

    def __init__(self) -> None:
        self._rows = 0
        self._norms: Tensor | None = None
        self._squares: Tensor | None = None
        self._nonfinite: Tensor | None = None
        # by unit: minimum, negated maximum, and minimum magnitude
        self._extremes: Tensor | None = None
        self._gradient: Tensor | None = None

    def add_rows(self, rows_TD: Tensor) -> None:
        """Add the rows of a call; a row with a NaN or an infinity is counted and otherwise ignored."""
        rows_TD = rows_TD.detach()
        rows_TD = rows_TD.to(find_sum_device(rows_TD.device))
        rows_TD = rows_TD if rows_TD.dtype == torch.float64 else rows_TD.float()
        if not len(rows_TD):
            return
        finite = rows_TD.isfinite().all(dim=1)
        # in float64: the square of a large float32 overflows
        norms = torch.linalg.vector_norm(rows_TD, dim=1, dtype=torch.float64)
        kept = finite[:, None]
        extremes = torch.stack(
            [
                torch.where(kept, rows_TD, float("inf")).amin(0),
                -torch.where(kept, rows_TD, float("-inf")).amax(0),
                torch.where(kept, rows_TD.abs(), float("inf")).amin(0),
            ]
        )
        clean = torch.where(finite, norms, 0.0)
        self._norms = _sum(self._norms, clean.sum())
        self._squares = _sum(self._squares, clean.square().sum())
        self._nonfinite = _sum(self._nonfinite, (~finite).sum())
        self._extremes = extremes if self._extremes is None else torch.minimum(self._extremes, extremes)
        self._rows += len(rows_TD)

    def add_gradient(self, gradient: Tensor) -> None:
        """Add the gradient of a value or of a chunk of it."""
        norm = torch.linalg.vector_norm(gradient.detach().float())
        self._gradient = _sum(self._gradient, widen(norm).square())

    def read(self) -> dict[str, float]:
        """Return the statistics; those without measurements are left out.

        Returns:
            `norm`, the mean over rows; `dead` and `saturated`, fractions of the units; `nonfinite`, a number of rows;
            `gradient_norm`, of the gradient of all values together.
        """
        said: dict[str, float] = {}
        if self._norms is not None and self._squares is not None and self._extremes is not None:
            nonfinite = int(self._nonfinite) if self._nonfinite is not None else 0
            num_rows = self._rows - nonfinite
            least, largest, size = self._extremes[0], -self._extremes[1], self._extremes[2]
            if num_rows:
                mean_square = self._squares / (num_rows * len(least))
                top = torch.maximum(largest.max(), -least.min())
                said["norm"] = float(self._norms / num_rows)
                if num_rows > 1:  # a single row has no range
                    said["dead"] = float((largest - least <= MOVES_LESS * mean_square.sqrt()).double().mean())
                    said["saturated"] = float((size >= NEAR_TOP * top).double().mean())
            said["nonfinite"] = float(nonfinite)
        if self._gradient is not None:
            said["gradient_norm"] = float(self._gradient.sqrt())
        return said


def _sum(held: Tensor | None, more: Tensor) -> Tensor:
    return more if held is None else held + more
