"""The public functions that make edits: `lp.steer`, `lp.ablate` and the others.

Each turns user arguments, such as a list of heads, into a validated, frozen `Edit`. Computes nothing. Must never know
of models.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from layerprobe.edit.edits import Ablate, Clamp, Edit, Noise, Patch, ProjectOut, Replace, Resample, Scale, Steer
from layerprobe.errors import OptionError

__all__ = ["ablate", "clamp", "noise", "patch", "project_out", "replace", "scale", "steer"]

Numbers = Sequence[int] | None


def steer(vector: Tensor, scale: float | Tensor = 1.0, *, where: Any = None) -> Edit:
    """Add `scale * vector` to each value. Gradients flow to both.

    Args:
        vector: `[D]`.
        scale: A number, or a tensor without dimensions.
        where: Selected tokens: None for real ones, `"all"`, `"special"`, a token such as `"[MASK]"` or a list of them,
            `lp.token_ids(...)`, a position, a list or a slice of positions within each text (negative ones from its
            end), or a bool mask `[B, S]`.

    Raises:
        OptionError: an option has an invalid value.

    Example:
        >>> import torch, layerprobe as lp
        >>> lp.steer(torch.ones(32), 4.0, where=-1).where
        -1
    """
    return Steer(vector=vector, scale=scale, where=where)


def ablate(
    kind: str = "zero", *, heads: Numbers = None, units: Numbers = None, where: Any = None, seed: int = 0
) -> Edit:
    """Replace values by zeros, the mean, or another token's vector.

    Args:
        kind: `zero`; `mean` over the selected tokens, in all texts of the call; or `resample`, which shuffles the
            vectors among these tokens (a token may keep its own).
        heads: Only these heads, at query, key, value and context.
        units: Only these columns.
        where: As in `steer`.
        seed: Seed of `resample`. Each call of the model draws again.

    Raises:
        OptionError: an option has an invalid value.

    Example:
        >>> import layerprobe as lp
        >>> lp.ablate(heads=[3]).heads
        (3,)
    """
    if kind == "resample":
        return Resample(seed=seed, heads=heads, units=units, where=where)
    if seed != 0:
        raise OptionError(f"lp.ablate: kind {kind!r} draws nothing: leave out seed={seed!r}, or use 'resample'.")
    return Ablate(kind=kind, heads=heads, units=units, where=where)


def patch(values: Any, *, heads: Numbers = None, units: Numbers = None, where: Any = None) -> Edit:
    """Replace values by given ones.

    Args:
        values: A tensor: `[B, S, D]` (or `[1, S, D]`) as a `Probe` returns it, `[T, D]` for the T real tokens of one
            text, `[D]` for every token. Or a `Probe`, one of its calls, an example of a store, or tensors by site: each
            site takes its own.
        heads, units: Only these, as in `ablate`.
        where: As in `steer`.

    Raises:
        OptionError: an option has an invalid value.

    Example:
        >>> import torch, layerprobe as lp
        >>> lp.patch(torch.zeros(32), where=[1, 2]).where
        [1, 2]
    """
    return Patch(values=values, heads=heads, units=units, where=where)


def project_out(directions: Tensor, *, where: Any = None) -> Edit:
    """Remove the component of each value in the span of some directions.

    Args:
        directions: `[D]`, or `[K, D]`: linearly independent, of any length, not necessarily orthogonal.
        where: As in `steer`.

    Raises:
        OptionError: a direction is zero, or depends linearly on the others (of class means minus their mean, leave out
            one).

    Example:
        >>> import torch, layerprobe as lp
        >>> lp.project_out(torch.eye(32)[:2]).directions.shape
        torch.Size([2, 32])
    """
    return ProjectOut(directions=directions, where=where)


def noise(std: float, seed: int = 0, *, heads: Numbers = None, units: Numbers = None, where: Any = None) -> Edit:
    """Add Gaussian noise. The model's own random numbers are not affected.

    Args:
        std: Standard deviation.
        seed: The same seed gives the same noise, call by call, in a batch of the same shape.
        heads, units: Only these, as in `ablate`.
        where: As in `steer`.

    Raises:
        OptionError: an option has an invalid value.

    Example:
        >>> import layerprobe as lp
        >>> lp.noise(0.1, seed=7).seed
        7
    """
    return Noise(std=std, seed=seed, heads=heads, units=units, where=where)


def clamp(
    low: float | None = None,
    high: float | None = None,
    *,
    heads: Numbers = None,
    units: Numbers = None,
    where: Any = None,
) -> Edit:
    """Keep values within bounds.

    Args:
        low, high: The bounds; None for none.
        heads, units: Only these, as in `ablate`.
        where: As in `steer`.

    Raises:
        OptionError: no bound is given, or `low` is above `high`.

    Example:
        >>> import layerprobe as lp
        >>> lp.clamp(-3.0, 3.0).high
        3.0
    """
    return Clamp(low=low, high=high, heads=heads, units=units, where=where)


def scale(factor: float | Tensor, *, heads: Numbers = None, units: Numbers = None, where: Any = None) -> Edit:
    """Multiply values. Gradients flow to the factor.

    Args:
        factor: A number, or a tensor `[D]`.
        heads, units: Only these, as in `ablate`.
        where: As in `steer`.

    Raises:
        OptionError: an option has an invalid value.

    Example:
        >>> import layerprobe as lp
        >>> lp.scale(0.5, units=[7]).factor
        0.5
    """
    return Scale(factor=factor, heads=heads, units=units, where=where)


def replace(function: Callable[[Tensor], Tensor], *, where: Any = None) -> Edit:
    """Replace values by the result of a function.

    Args:
        function: From `[B, S, D]` (padding included) to a tensor of the same shape and dtype. It gets a copy, and may
            write into it.
        where: As in `steer`; other positions keep the model's value.

    Raises:
        OptionError: it is not a function.

    Example:
        >>> import torch, layerprobe as lp
        >>> lp.replace(torch.tanh).function is torch.tanh
        True
    """
    return Replace(function=function, where=where)
