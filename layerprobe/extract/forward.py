"""Set up the forward pass of a run: its precision, and whether it is compiled.

Neither changes the model: precision is torch's autocast around the calls, or how far float32 matrix products are
rounded while they run; a compiled model is a wrapper that the run calls. Both change values in their last digits, so
both belong to the plan.

Must never know of files.
"""

import contextlib
import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from layerprobe.errors import OptionError
from layerprobe.models import evaluating
from layerprobe.rounding import holding_products, rounds_products_outside
from layerprobe.sites.stacks import find_device, find_weight_dtype
from layerprobe.tables import format_dtype

__all__ = [
    "CUDA_GRAPHS",
    "PRECISIONS",
    "REORDERED",
    "check_backend",
    "check_device",
    "check_recording",
    "compile_network",
    "compute_in",
    "count_compiled",
    "find_dtype",
    "find_precision",
    "resolve_precision",
    "running",
    "tracing",
]

# torch's name for a compiled model whose kernels are replayed as CUDA graphs, one per batch shape
CUDA_GRAPHS = "reduce-overhead"
# float32 whose matrix products a GPU may round to a 10-bit mantissa
_TF32 = "tf32"
# Tolerance for sums taken in another order, relative to the largest magnitude at a site in a text, by the dtype of the
# forward pass. About ten times the largest difference seen with models of 12 layers.
REORDERED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def resolve_precision(precision: object) -> str | None:
    """Return the full name of a precision, as stores record it; None for that of the weights.

    Raises:
        OptionError: there is no such precision.
    """
    if precision is None:
        return None
    name = _SHORT_NAMES.get(precision, precision) if isinstance(precision, str) else ""
    if name not in PRECISIONS:
        shorts = {long: f" (or {short})" for short, long in _SHORT_NAMES.items()}
        known = ", ".join(long + shorts.get(long, "") for long in PRECISIONS)
        raise OptionError(
            f"no precision {str(precision)!r}: use {known}, or leave it out to compute in that of the weights."
        )
    return name


def check_backend(backend: object) -> None:
    """Check that torch has a compiler backend.

    Raises:
        OptionError: there is no such backend.
    """
    if isinstance(backend, bool) or backend == CUDA_GRAPHS:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise OptionError(
            f"compile={backend!r}: no such backend. Use True, False, {CUDA_GRAPHS!r}, or one of {', '.join(known)}."
        )


def check_device(device: torch.device, backend: bool | str) -> None:
    """Check that a device and this torch support a backend.

    Raises:
        OptionError: CUDA graphs on another device, where padding batches to fixed shapes would gain nothing, or with a
            torch that would record operators that must not be recorded.
    """
    if backend != CUDA_GRAPHS:
        return
    if device.type != "cuda":
        raise OptionError(
            f"compile={backend!r} (--cuda-graphs) on {device}: CUDA devices replay graphs. Use compile=True here."
        )
    import torch._inductor.config as compiler  # imported here because it takes a second

    check_recording(hasattr(torch.Tag, "cudagraph_unsafe"), getattr(compiler, "graph_partition", False))


def check_recording(has_tag: bool, is_partitioned: bool) -> None:
    """Refuse CUDA graphs that would record the operators that read values out, which would not run again on replay.

    Args:
        has_tag: Whether operators can be marked as unsafe to record.
        is_partitioned: Whether the compiler splits graphs at such operators.

    Raises:
        OptionError: either is missing.
    """
    asked = f"compile={CUDA_GRAPHS!r} (--cuda-graphs)"
    if not has_tag:
        raise OptionError(
            f"{asked} with torch {torch.__version__}: it would record what reads values once, and replay graphs "
            "without it. Install torch 2.9 or newer, or use compile=True (--compile)."
        )
    if not is_partitioned:
        raise OptionError(
            f"{asked}: torch's compiler has graph_partition off, and would record what reads values once. Switch it "
            "on (it is from torch 2.9 on; TORCHINDUCTOR_GRAPH_PARTITION=1), or use compile=True (--compile)."
        )


def find_precision(model: nn.Module, precision: str | None) -> str | None:
    """Return the precision of the forward pass if it differs from that of the weights, else None.

    Args:
        model: Its weights and its device limit the choice.
        precision: As given; None for what the calling program has set: its autocast, or rounded float32 products.

    Raises:
        OptionError: the weights are neither float32 nor of that precision, or the device does not support it.
    """
    weights = find_weight_dtype(model)
    if precision == _TF32 and find_device(model).type != "cuda":
        raise OptionError(f"precision='tf32' on {find_device(model)}: CUDA devices compute so. Leave it out here.")
    if precision is None:
        return _find_ambient(model)
    if PRECISIONS[precision] == weights and precision != _TF32:
        return None
    if weights != torch.float32:
        raise OptionError(
            f"precision={precision!r} with weights of {format_dtype(weights)}: it lowers that of "
            "float32. Load the model in float32, or leave precision out."
        )
    return precision


def find_dtype(model: nn.Module, precision: str | None) -> torch.dtype:
    """Return the dtype a model computes in: that of a precision from `find_precision`, or that of its weights."""
    return find_weight_dtype(model) if precision is None else PRECISIONS[precision]


@contextlib.contextmanager
def compute_in(model: nn.Module, precision: str | None) -> Iterator[None]:
    """Run a model's calls in a precision from `find_precision` while this is open, whatever the program has set.

    Autocast is set for this thread, the rounding of float32 products for the whole process.

    Raises:
        OptionError: an active run in this process needs a different rounding.
    """
    kind = find_device(model).type
    with contextlib.ExitStack() as computing:
        if precision not in (None, _TF32):
            computing.enter_context(torch.autocast(kind, dtype=PRECISIONS[precision]))
        else:
            if _has_autocast(kind):
                computing.enter_context(torch.autocast(kind, enabled=False))
            computing.enter_context(holding_products(is_rounded=precision == _TF32))
        yield


@contextlib.contextmanager
def running(model: nn.Module, precision: str | None) -> Iterator[None]:
    """Set up a model for the calls of a run while this is open: eval mode, no gradients, its precision.

    Its CUDA device is made current, since allocations without a device would initialise the first one.

    Raises:
        OptionError: as `compute_in`.
    """
    device = find_device(model)
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with current, evaluating(model), torch.inference_mode(), compute_in(model, precision):
        yield


def _find_ambient(model: nn.Module) -> str | None:
    """Return the precision that the calling program has set if it differs from that of the weights, else None."""
    kind, weights = find_device(model).type, find_weight_dtype(model)
    if _has_autocast(kind):
        names = {dtype: name for name, dtype in PRECISIONS.items() if name != _TF32}
        dtype = torch.get_autocast_dtype(kind)
        return None if dtype == weights else names.get(dtype)
    return _TF32 if kind == "cuda" and weights == torch.float32 and rounds_products_outside() else None


def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def compile_network(model: nn.Module, backend: bool | str) -> nn.Module:
    """Return the module to call for a model: itself, or a compiled wrapper for texts of any length."""
    if backend is False:
        return model
    if backend == CUDA_GRAPHS:
        wrapper = torch.compile(model, dynamic=True, mode=CUDA_GRAPHS)
    else:
        wrapper = torch.compile(model, dynamic=True, backend="inductor" if backend is True else backend)
    assert isinstance(wrapper, nn.Module)
    return wrapper


def count_compiled(backend: bool | str) -> int:
    """Return the number of graphs that torch has compiled in this process so far; 0 without a backend."""
    if backend is False:
        return 0
    return importlib.import_module("torch._dynamo.utils").counters["stats"]["unique_graphs"]


def tracing(backend: bool | str) -> AbstractContextManager[Any]:
    """Let graphs compiled while this is open select a data-dependent number of rows without a graph break."""
    if backend is False:
        return contextlib.nullcontext()
    return importlib.import_module("torch._dynamo").config.patch(capture_dynamic_output_shape_ops=True)
