"""The edits, as frozen dataclasses that hold only arithmetic.

An edit is validated when it is made, fitted to a site before the model runs, and then applied to values. It returns a
new tensor and never writes into its input. Further input (noise, rows laid out on the call's tokens) is passed in, so
that the edit can be traced. Must never know of hooks, calls or the model.
Letters: B sequences, S positions, D width, T rows, K directions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from layerprobe.edit.where import check_where
from layerprobe.errors import CaptureError, OptionError
from layerprobe.sites.stacks import widen
from layerprobe.store.guard import check_count, is_number, need_wholes
from layerprobe.tables import format_count

__all__ = ["Ablate", "Clamp", "Edit", "Noise", "Patch", "ProjectOut", "Replace", "Resample", "Scale", "Steer"]

Number = float | Tensor
# An edit's extra input: noise shaped like the value, a permutation of its tokens, or rows laid out on its tokens.
Need = Literal["", "noise", "order", "rows"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit:
    """The options shared by all edits: which tokens, heads or units they change.

    Args:
        where: Selected tokens; None for real ones, never padding.
        heads, units: Change only the columns of these heads (at sites that have heads), or only these columns.
    """

    name: ClassVar[str] = ""
    where: Any = None
    heads: Sequence[int] | None = None
    units: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_where(self.where)
        for label, numbers in (("heads", self.heads), ("units", self.units)):
            if numbers is not None:
                object.__setattr__(self, label, need_wholes(f"lp.{self.name}: {label}", numbers))
        if self.heads is not None and self.units is not None:
            raise OptionError(f"lp.{self.name}: heads and units do not go together: leave out one.")

    @property
    def need(self) -> Need:
        """The extra input that `change` needs."""
        return ""

    @property
    def needs_whole(self) -> bool:
        """Whether the edit would change a value differently if applied chunk by chunk."""
        return False

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The user's tensors that are combined with values of the model, by argument name."""
        return {}

    def fit(self, site: str, width: int | None) -> "Edit":
        """Check the edit against one site and precompute what it can."""
        return self

    def change(self, value: Tensor, mask: Tensor | None, extra: Tensor | None) -> Tensor:
        """Return the edited value; the caller restores what `where`, `heads` and `units` leave out.

        Args:
            value: `[B, S, D]`, or `[B, D]` at a site with one vector per text.
            mask: bool `[B, S]`, the selected tokens; None for all.
            extra: The extra input, as `need` says.
        """
        raise NotImplementedError

    def require_width(self, label: str, found: int, site: str, width: int | None) -> None:
        """Refuse a tensor whose width differs from the site's."""
        if width is not None and found != width:
            raise OptionError(
                f"lp.{self.name} at {site!r}: its {label} has {format_count(found, 'value')}, the site {width}. "
                "lp.sites(model) lists the widths."
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Steer(Edit):
    """Add a vector."""

    name: ClassVar[str] = "steer"
    vector: Tensor
    scale: Number = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_tensor(self.name, "vector", self.vector, (1,))
        _require_number(self.name, "scale", self.scale)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"vector": self.vector, **_if_tensor("scale", self.scale)}

    def fit(self, site: str, width: int | None) -> "Edit":
        self.require_width("vector", len(self.vector), site, width)
        return self

    def change(self, value: Tensor, mask: Tensor | None, extra: Tensor | None) -> Tensor:
        if not isinstance(self.scale, Tensor) and self.scale == 0:
            return value
        return value + (self.scale * self.vector).to(value.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class Ablate(Edit):
    """Replace values by zeros or by their mean."""

    name: ClassVar[str] = "ablate"
    kind: str = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("zero", "mean"):
            raise OptionError(f"lp.ablate: no kind {self.kind!r}: use 'zero', 'mean' or 'resample'.")

    @property
    def needs_whole(self) -> bool:
        return self.kind == "mean"

    def change(self, value: Tensor, mask: Tensor | None, extra: Tensor | None) -> Tensor:
        if self.kind == "zero":
            return torch.zeros_like(value)
        dims = tuple(range(value.ndim - 1))
        wide = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
        if mask is None:
            mean = wide.mean(dims, keepdim=True)
        else:
            kept = mask if mask.ndim == value.ndim else mask[..., None]
            mean = torch.where(kept, wide, 0).sum(dims, keepdim=True) / kept.sum(dims, keepdim=True).clamp(min=1)
        return mean.to(value.dtype).expand_as(value)


@dataclass(frozen=True, eq=False, kw_only=True)
class Resample(Edit):
    """Replace each token's vector by that of another token of the call."""

    name: ClassVar[str] = "ablate"
    seed: int = 0

    @property
    def need(self) -> Need:
        return "order"

    @property
    def needs_whole(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(f"lp.{self.name}: seed", self.seed, 0)

    def change(self, value: Tensor, mask: Tensor | None, extra: Tensor | None) -> Tensor:
        assert extra is not None
        flat = value.flatten(0, -2)
        return flat.index_select(0, extra).view_as(value)


@dataclass(frozen=True, eq=False, kw_only=True)
class Patch(Edit):
    """Replace the model's values by given ones."""

    name: ClassVar[str] = "patch"
    values: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.values, Tensor) and not hasattr(self.values, "__getitem__"):
            raise _no_values(self.values)

    @property
    def need(self) -> Need:
        return "rows" if isinstance(self.values, Tensor) and self.values.ndim > 1 else ""

    @property
    def tensors(self) -> dict[str, Tensor]:
        return _if_tensor("values", self.values)

    def fit(self, site: str, width: int | None) -> "Edit":
        values = self.values if isinstance(self.values, Tensor) else _look_up(self.values, site)
        if not 1 <= values.ndim <= 3 or not values.is_floating_point():
            raise OptionError(
                f"lp.patch at {site!r}: values of {values.dtype} and shape {tuple(values.shape)}: give [B, S, D] as a "
                "Probe does, [T, D] for the tokens of one text, or one vector [D]."
            )
        self.require_width("last dimension", values.shape[-1], site, width)
        return replace(self, values=values)

    def change(self, value: Tensor, mask: Tensor | None, extra: Tensor | None) -> Tensor:
        return (self.values if extra is None else extra).to(value.dtype).expand_as(value)


@dataclass(frozen=True, eq=False, kw_only=True)
class ProjectOut(Edit):
    """Remove the component of a value in the span of some directions."""

    name: ClassVar[str] = "project_out"
    directions: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_tensor(self.name, "directions", self.directions, (1, 2))
        if not bool(widen(self.directions).isfinite().all()):
            raise OptionError("lp.project_out: directions are not finite: give finite ones.")
        with torch.no_grad():
            rank = _count_dimensions(self.rows)
        if rank < len(self.rows):
            raise OptionError(
                f"lp.project_out: the rank of {format_count(len(self.rows), 'direction')} is {rank}: one is zero, or "
                "follows from the others. Leave it out."
            )

    @property
    def rows(self) -> Tensor:
        """The directions, `[K, D]`."""
        return self.directions if self.directions.ndim == 2 else self.directions[None]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"directions": self.directions}

    def fit(self, site: str, width: int | None) -> "Edit":
        self.require_width("direction", self.directions.shape[-1], site, width)
        # compute the orthonormal basis once, unless the directions are being learned
        return self if self.directions.requires_grad else replace(self, directions=_orthonormal(self.rows))

    def change(self, value: Tensor, mask: Tensor | None, extra: Tensor | None) -> Tensor:
        wide = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
        basis_KD = _orthonormal(self.rows) if self.directions.requires_grad else self.rows
        basis_KD = basis_KD.to(wide.dtype)
        return (wide - (wide @ basis_KD.T) @ basis_KD).to(value.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class Noise(Edit):
    """Add Gaussian noise."""

    name: ClassVar[str] = "noise"
    std: float
    seed: int = 0

    @property
    def need(self) -> Need:
        return "noise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.std) or not 0 <= self.std < math.inf:
            raise OptionError(f"lp.noise: std={self.std!r}: give a finite number from 0 on.")
        check_count(f"lp.{self.name}: seed", self.seed, 0)

    def change(self, value: Tensor, mask: Tensor | None, extra: Tensor | None) -> Tensor:
        assert extra is not None
        return value if self.std == 0 else value + extra * self.std


@dataclass(frozen=True, eq=False, kw_only=True)
class Clamp(Edit):
    """Clamp values to bounds."""

    name: ClassVar[str] = "clamp"
    low: float | None
    high: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = [bound for bound in (self.low, self.high) if bound is not None]
        if not bounds or not all(is_number(bound) for bound in bounds):
            raise OptionError(f"lp.clamp: low={self.low!r}, high={self.high!r}: give one number or both.")
        if len(bounds) == 2 and not bounds[0] <= bounds[1]:
            raise OptionError(f"lp.clamp: low={self.low!r} is above high={self.high!r}. Swap them.")

    def change(self, value: Tensor, mask: Tensor | None, extra: Tensor | None) -> Tensor:
        return value.clamp(self.low, self.high)


@dataclass(frozen=True, eq=False, kw_only=True)
class Scale(Edit):
    """Multiply values by a factor."""

    name: ClassVar[str] = "scale"
    factor: Number

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_number(self.name, "factor", self.factor, most=1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return _if_tensor("factor", self.factor)

    def fit(self, site: str, width: int | None) -> "Edit":
        if isinstance(self.factor, Tensor) and self.factor.ndim == 1:
            self.require_width("factor", len(self.factor), site, width)
        return self

    def change(self, value: Tensor, mask: Tensor | None, extra: Tensor | None) -> Tensor:
        if not isinstance(self.factor, Tensor):
            return value if self.factor == 1 else value * self.factor
        return value * self.factor.to(value.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class Replace(Edit):
    """Replace values by the result of a function."""

    name: ClassVar[str] = "replace"
    function: Callable[[Tensor], Tensor]

    @property
    def needs_whole(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function):
            raise OptionError(f"lp.replace: {self.function!r} is no function: give one from a value to a value.")

    def change(self, value: Tensor, mask: Tensor | None, extra: Tensor | None) -> Tensor:
        # a copy is cheap next to a layer and protects the model's tensor if the function writes in place
        made = self.function(value.clone())
        if not isinstance(made, Tensor) or made.shape != value.shape or made.dtype != value.dtype:
            got = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise CaptureError(
                f"the function of lp.replace gave {got}: it must give {value.dtype} {tuple(value.shape)}, as it got."
            )
        return made


def _count_dimensions(rows_KD: Tensor) -> int:
    """Return the rank of the rows, ignoring dimensions due to rounding, as in class means minus their mean."""
    units_KD = nn.functional.normalize(widen(rows_KD), dim=1, eps=torch.finfo(torch.float64).tiny)
    # Absolute for unit rows, whatever they share; means of many rows accumulate rounding, in float32 for half types.
    most = (4 if rows_KD.dtype.itemsize <= 2 else 64) * torch.finfo(rows_KD.dtype).eps
    least = max(units_KD.shape) * torch.finfo(torch.float64).eps
    return int(torch.linalg.matrix_rank(units_KD, atol=most, rtol=least))


def _orthonormal(rows_KD: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of the rows, computed in float64 and rounded once."""
    basis_KD = torch.linalg.qr(widen(rows_KD).T)[0].T
    return basis_KD.to(torch.promote_types(rows_KD.dtype, torch.float32)).to(rows_KD.device)


def _look_up(values: Any, site: str) -> Tensor:
    """Find a site's values in a probe, a call, an example or a mapping; int8 values are dequantised."""
    try:
        found = values[site]
    except KeyError as error:
        raise OptionError(f"lp.patch at {site!r}: the values have no {site!r}. Capture the site too.") from error
    except (IndexError, TypeError) as error:  # an array or a list, which has no sites
        raise _no_values(values) from error
    if not hasattr(found, "float"):
        raise _no_values(values, f" with {type(found).__name__}")
    return found if isinstance(found, Tensor) else found.float()


def _no_values(values: Any, of: str = "") -> OptionError:
    return OptionError(
        f"lp.patch: values are {type(values).__name__}{of}: give a tensor, a Probe, one of its calls, an example of a "
        "store, or tensors by site."
    )


def _if_tensor(label: str, value: Any) -> dict[str, Tensor]:
    return {label: value} if isinstance(value, Tensor) else {}


def _require_tensor(name: str, label: str, value: Any, ndims: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.ndim not in ndims or not value.is_floating_point() or not value.numel():
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        wanted = " or ".join("[D]" if ndim == 1 else "[K, D]" for ndim in ndims)
        raise OptionError(f"lp.{name}: {label} is {got}: give a floating tensor {wanted}.")


def _require_number(name: str, label: str, value: Any, most: int = 0) -> None:
    is_tensor = isinstance(value, Tensor) and value.ndim <= most and value.is_floating_point()
    if not is_tensor and not (is_number(value) and math.isfinite(value)):
        raise OptionError(f"lp.{name}: {label}={value!r}: give a finite number{' or a tensor [D]' if most else ''}.")
