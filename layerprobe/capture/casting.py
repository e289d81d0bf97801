"""The storage dtypes, and the cast of values to them.

Must never know which rows are real or where they go.
"""

import functools

import torch
from torch import Tensor

from layerprobe.capture.target import Target
from layerprobe.errors import OptionError

__all__ = ["DTYPES", "NOT_PLAIN", "cast_into", "resolve_dtype"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
}
# Dtypes for which `cast_into` does more than a plain copy.
NOT_PLAIN = (torch.int8, torch.float8_e4m3fn)


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the storage dtype of this name; None keeps the model's dtype.

    Raises:
        OptionError: layerprobe does not store this dtype.
    """
    if dtype is None or dtype in DTYPES.values():
        return dtype if isinstance(dtype, torch.dtype) else None
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise OptionError(f"no dtype {str(dtype)!r}: use {', '.join(DTYPES)}, or None for the model's own.")


def cast_into(target: Target, value: Tensor) -> None:
    """Cast `value` into `target`, which has the same shape.

    For int8 each vector is divided by its scale, its largest magnitude over 127.
    """
    out = target.values
    if out.dtype not in NOT_PLAIN:
        out.copy_(value)
        return
    if out.dtype == torch.int8:
        scale = target.scale
        assert scale is not None
        vectors = value.float()
        scale.copy_(vectors.abs().amax(dim=-1) / 127)
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))[..., None]
        # NaN has no int8 representation; the vector's scale is NaN, so the vector reads back as NaN.
        out.copy_((vectors / divisor).nan_to_num(0.0).round())
        return
    most = torch.finfo(out.dtype).max
    if target.overflow is not None:
        target.overflow.add_((value.abs() > most).sum())
    out.copy_(value if _saturates(value.device) else value.clamp(-most, most))


@functools.cache
def _saturates(device: torch.device) -> bool:
    """Return whether torch clamps values beyond the range of float8 when casting; older releases produce NaN."""
    ends = torch.finfo(torch.float8_e4m3fn)
    given = torch.tensor([1e4, -1e4], device=device)
    return given.to(torch.float8_e4m3fn).float().tolist() == [ends.max, ends.min]
