"""Where the vectors of one site go: a stretch of a buffer, of which a view is made only where one is needed.

Must never know which tokens are real, or on which device a buffer is.
"""

from torch import Tensor

__all__ = ["Target"]


class Target:
    """A stretch of a buffer.

    Args:
        whole: `[R, ...]`, of which vectors `[start, stop)` are written.
        scales: One float32 per vector of `whole`, written alike, when that is int8.
        overflow: Zero-dimensional int64, raised by the number of values beyond the range of float8, which that cast
            would clip in silence. (Every other overflow leaves an infinity behind and is counted on its way to disk.)
        start, stop: To the end of it where `stop` is None.
    """

    # One is made for each site of each call, and the rows of most go to their place without a view of it being made.
    __slots__ = ("overflow", "scales", "start", "stop", "whole")

    def __init__(
        self,
        whole: Tensor,
        scales: Tensor | None = None,
        overflow: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self.whole = whole
        self.scales = scales
        self.overflow = overflow
        self.start = start
        self.stop = stop

    @property
    def count(self) -> int:
        """Vectors there is room for."""
        size = len(self.whole)
        return (size if self.stop is None else min(self.stop, size)) - self.start

    @property
    def values(self) -> Tensor:
        """`[T, ...]` or `[N, ...]`, a view."""
        return self._part_of(self.whole)

    @property
    def scale(self) -> Tensor | None:
        """One float32 per vector, a view, or None."""
        return None if self.scales is None else self._part_of(self.scales)

    def _part_of(self, vectors: Tensor) -> Tensor:
        return vectors[self.start : self.stop] if self.start or self.stop is not None else vectors

    def part(self, start: int, stop: int, shape: tuple[int, ...] | None = None) -> "Target":
        """Give vectors `[start, stop)` of these, with their first dimension unfolded to `shape`."""
        shape = (stop - start,) if shape is None else shape
        values, scale = self.values[start:stop], self.scale
        scale = None if scale is None else scale[start:stop].view(shape)
        return Target(values.view(*shape, *values.shape[1:]), scale, self.overflow)
