"""Count what a forward pass computes, moves and keeps alive, operator by operator.

torch's own counter counts floating-point operations; a second dispatch mode sees each operator's inputs and outputs and
counts bytes. Both slow a model down many times, so no time is measured in this pass.

Hides torch's dispatch modes. Must never know of sites.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["Counter", "counting", "make_flop_counter"]

_ATEN = torch.ops.aten
# Operators that read only as many rows of a table as they return.
_LOOKUPS = {_ATEN.embedding, _ATEN.index_select, _ATEN.index, _ATEN.gather}


def _count_cpu_attention(query_shape: Any, key_shape: Any, value_shape: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def make_flop_counter() -> FlopCounterMode:
    """Create torch's counter, and add the CPU attention kernel that it lacks, with torch's own formula."""
    kernel = getattr(_ATEN, "_scaled_dot_product_flash_attention_for_cpu", None)
    return FlopCounterMode(display=False, custom_mapping={kernel: _count_cpu_attention} if kernel else {})


class Counter:
    """The counts so far."""

    def __init__(self, flops: FlopCounterMode, traffic: "_Traffic") -> None:
        self._flops = flops
        self._traffic = traffic

    @property
    def flops(self) -> int:
        """Floating-point operations so far."""
        return self._flops.get_total_flops()

    @property
    def moved_bytes(self) -> int:
        """Bytes that operators have read and written so far, counted per operator."""
        return self._traffic.moved_bytes

    def take_peak(self) -> int:
        """Return the peak of bytes alive since the last call, counting only tensors that the forward pass created."""
        return self._traffic.take_peak()


@contextmanager
def counting(model: nn.Module, given: Iterable[Tensor]) -> Iterator[Counter]:
    """Count what runs in the block; weights, buffers and `given` are not counted as new memory.

    Cost: some microseconds of Python per operator.
    """
    traffic = _Traffic([*model.parameters(), *model.buffers(), *given])
    # torch's counter must be innermost: it decomposes composite operators before their bytes are counted
    with torch.no_grad(), _frozen(model), traffic, make_flop_counter() as flops:
        yield Counter(flops, traffic)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Disable gradients of all parameters: torch's counter fails if a trainable weight is passed to a module."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _Traffic(TorchDispatchMode):
    """A dispatch mode that counts the bytes each operator reads and writes, and tracks live memory."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.moved_bytes = 0
        self._before = {_place(tensor) for tensor in before}
        self._alive: dict[int, int] = {}
        self._live_bytes = 0
        self._peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        written = [item for item in tree_leaves(result) if isinstance(item, Tensor)]
        for tensor in written:
            self._keep(tensor)
        places = {_place(tensor) for tensor in read}
        if func._schema.is_mutable or not all(_place(tensor) in places for tensor in written):
            self.moved_bytes += _count_bytes(func, read, written)
        return result

    def take_peak(self) -> int:
        peak, self._peak_bytes = self._peak_bytes, self._live_bytes
        return peak

    def _keep(self, tensor: Tensor) -> None:
        place = _place(tensor)
        if place in self._before or place in self._alive:
            return
        storage = tensor.untyped_storage()
        self._alive[place] = storage.nbytes()
        self._live_bytes += storage.nbytes()
        self._peak_bytes = max(self._peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._drop, place).atexit = False

    def _drop(self, place: int) -> None:
        self._live_bytes -= self._alive.pop(place, 0)


def _place(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage, which its views share."""
    return tensor.untyped_storage()._cdata


def _count_bytes(func: Any, read: list[Tensor], written: list[Tensor]) -> int:
    out = sum(map(_size, written))
    if getattr(func, "overloadpacket", None) in _LOOKUPS:
        return 2 * out
    return out + sum(map(_size, read))


def _size(tensor: Tensor) -> int:
    """Return a tensor's size in bytes; for an expanded tensor, at most that of its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
