"""The destination of a site's vectors: a slice of a buffer, with views created only when needed.

Must never know which tokens are real, or on which device a buffer is.
"""

from torch import Tensor

__all__ = ["Target"]


class Target:
    """A slice of a buffer.

    Args:
        whole: `[R, ...]`; vectors `[start, stop)` are written.
        scales: For int8, one float32 per vector of `whole`, sliced alike.
        overflow: Zero-dimensional int64 counter of values beyond the range of float8, which the cast would clip
            silently. (Other overflows leave an infinity, which is counted on the way to disk.)
        start, stop: Bounds of the slice; `stop` None for the end of the buffer.
    """

    # Created for each site of each call; most rows are copied without creating a view.
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
        """Capacity in vectors."""
        size = len(self.whole)
        return (size if self.stop is None else min(self.stop, size)) - self.start

    @property
    def values(self) -> Tensor:
        """The slice of `whole`, `[T, ...]` or `[N, ...]`, a view."""
        return self._part_of(self.whole)

    @property
    def scale(self) -> Tensor | None:
        """The slice of `scales`, one float32 per vector, a view, or None."""
        return None if self.scales is None else self._part_of(self.scales)

    def _part_of(self, vectors: Tensor) -> Tensor:
        return vectors[self.start : self.stop] if self.start or self.stop is not None else vectors

    def part(self, start: int, stop: int, shape: tuple[int, ...] | None = None) -> "Target":
        """Return the target for vectors `[start, stop)` of this slice, their first dimension unflattened to `shape`."""
        shape = (stop - start,) if shape is None else shape
        values, scale = self.values[start:stop], self.scale
        scale = None if scale is None else scale[start:stop].view(shape)
        return Target(values.view(*shape, *values.shape[1:]), scale, self.overflow)
