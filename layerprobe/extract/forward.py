"""How the forward of a run is computed: in which precision, and compiled or not.

Neither touches the model: precision is torch's autocast around the calls, which casts the operands of what gains by
it, or how far float32 products are rounded while they run, and a compiled model is a wrapper that the run calls. Both
change values in their last digits, so both belong to the plan.

Must never know of files.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from layerprobe.errors import OptionError
from layerprobe.sites.stacks import find_device

__all__ = [
    "CUDA_GRAPHS",
    "PRECISIONS",
    "REORDERED",
    "check_device",
    "check_forward",
    "compile_network",
    "compute_in",
    "find_dtype",
    "find_precision",
]

# torch's name for a compiled model whose kernels a GPU replays as a graph, one for each shape of a batch
CUDA_GRAPHS = "reduce-overhead"
# tf32 is float32 whose products a GPU may round to ten bits of mantissa
_TF32 = "tf32"
# What sums in another order may change, as a share of the largest magnitude that a site has in a text: by the dtype
# that the model computes in. About ten times the most that was seen with models of 12 layers.
REORDERED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_forward(precision: object, backend: object) -> None:
    """Refuse a precision that does not exist, or a backend that torch does not have.

    Raises:
        OptionError: there is none.
    """
    if precision is not None and precision not in PRECISIONS:
        raise OptionError(f"no precision {precision!r}: use {', '.join(PRECISIONS)}, or None for that of the weights.")
    if isinstance(backend, bool) or backend == CUDA_GRAPHS:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise OptionError(
            f"compile={backend!r}: no such backend. Use True, False, {CUDA_GRAPHS!r}, or one of {', '.join(known)}."
        )


def check_device(device: torch.device, backend: bool | str) -> None:
    """Refuse what a device cannot do.

    Raises:
        OptionError: CUDA graphs elsewhere; batches would be filled up for nothing.
    """
    if backend == CUDA_GRAPHS and device.type != "cuda":
        raise OptionError(
            f"compile={backend!r} (--cuda-graphs) on {device}: CUDA devices replay graphs. Use compile=True here."
        )


def find_precision(model: nn.Module, precision: str | None) -> str | None:
    """Find the precision to compute in, where it is not that of the weights.

    Raises:
        OptionError: the weights have fewer digits than that, or the device does not compute so.
    """
    weights = find_dtype(model, None)
    if precision == _TF32 and find_device(model).type != "cuda":
        raise OptionError(f"precision='tf32' on {find_device(model)}: CUDA devices compute so. Leave it out here.")
    if precision is None or (PRECISIONS[precision] == weights and precision != _TF32):
        return None
    if weights != torch.float32:
        raise OptionError(
            f"precision={precision!r} with weights of {str(weights).removeprefix('torch.')}: it lowers that of "
            "float32. Load the model in float32, or leave precision out."
        )
    return precision


def find_dtype(model: nn.Module, precision: str | None) -> torch.dtype:
    """Find the dtype that a model computes in: that of a precision from `find_precision`, or of its weights."""
    if precision is not None:
        return PRECISIONS[precision]
    return next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)


def compute_in(model: nn.Module, precision: str | None) -> AbstractContextManager[object]:
    """Compute a model's calls of this thread in a precision, from `find_precision`, while this is open."""
    if precision in (None, _TF32):
        return _setting_products("highest" if precision is None else "high")
    return torch.autocast(find_device(model).type, dtype=PRECISIONS[precision])


@contextlib.contextmanager
def _setting_products(level: str) -> Iterator[None]:
    """Say how far the operands of float32 products may be rounded; the setting is the process's, and put back.

    Not at all unless a run asks for it: what the rest of a program has set is no part of the plan, so a run that goes
    on in another program would compute other rows.
    """
    # torch has the setting under an old name and, from 2.9 on, under new ones, by which its kernels go; where they
    # differ it refuses to tell the old one, which then is most often what it begins with
    places: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    places = [place for place in places if hasattr(place, "fp32_precision")]
    settings = [place.fp32_precision for place in places]
    before = "highest"
    with contextlib.suppress(RuntimeError):
        before = torch.get_float32_matmul_precision()
    if before == level == "highest" and set(settings) <= {"none", "ieee"}:
        yield  # as it is unless a program says otherwise: then runs in several threads do not meet here
        return
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for place, setting in zip(places, settings, strict=True):
            place.fp32_precision = setting


def compile_network(model: nn.Module, backend: bool | str) -> nn.Module:
    """Give what to call in place of a model: itself, or a compiled wrapper of it for texts of any length."""
    if backend is False:
        return model
    if backend == CUDA_GRAPHS:
        wrapper = torch.compile(model, dynamic=True, mode=CUDA_GRAPHS)
    else:
        wrapper = torch.compile(model, dynamic=True, backend="inductor" if backend is True else backend)
    assert isinstance(wrapper, nn.Module)
    return wrapper
