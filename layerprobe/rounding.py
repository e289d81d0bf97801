"""Read and hold the precision of float32 matrix products on CUDA, that is, whether their operands may be rounded.

torch has this setting under an old name and, from 2.9 on, under new names that its kernels follow. It is global to the
process, so the first run that needs another value sets it, the last one restores it, and a run that needs the opposite
meanwhile is refused.

Hides the names of the setting. Must never know of models.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from layerprobe.errors import OptionError

__all__ = ["holding_products", "rounds_products", "rounds_products_outside"]


def rounds_products() -> bool:
    """Whether CUDA may now round the operands of float32 products."""
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    # kernels follow the new name if there is one; reading the old one raises if the two disagree
    return torch.get_float32_matmul_precision() != "highest" if setting is None else setting == "tf32"


def rounds_products_outside() -> bool:
    """Whether CUDA may round them outside of the runs that hold the setting."""
    return _held.original()


@contextlib.contextmanager
def holding_products(is_rounded: bool) -> Iterator[None]:
    """Let CUDA round float32 products, or prevent it, while this is open.

    Raises:
        OptionError: an active run in this process needs the opposite.
    """
    _held.take(is_rounded)
    try:
        yield
    finally:
        _held.release()


class _HeldRounding:
    """The setting as runs hold it: their number, the value they need, and the original value."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_open = 0
        self._is_rounded = False
        self._was_rounded = False
        self._put_back: Callable[[], None] = lambda: None

    def original(self) -> bool:
        with self._lock:
            return self._was_rounded if self._num_open else rounds_products()

    def take(self, is_rounded: bool) -> None:
        # one lock for all of this, so that of two runs that start at once with opposite needs, one is refused
        with self._lock:
            if self._num_open and is_rounded != self._is_rounded:
                raise OptionError(
                    f"precision={'tf32' if is_rounded else None!r}: a run of this process computes otherwise now, and "
                    "the setting is the process's. Wait for its end, or use another process."
                )
            if not self._num_open:
                self._is_rounded, self._was_rounded = is_rounded, rounds_products()
                self._put_back = _change(is_rounded)
            self._num_open += 1

    def release(self) -> None:
        with self._lock:
            self._num_open -= 1
            if not self._num_open:
                self._put_back()


_held = _HeldRounding()


def _change(is_rounded: bool) -> Callable[[], None]:
    """Set how products are rounded, if it differs; returns a function that restores the previous value."""
    parent = getattr(torch.backends, "fp32_precision", None)
    places: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    settings = [(place, place.fp32_precision) for place in places if hasattr(place, "fp32_precision")]
    before = "highest"
    with contextlib.suppress(RuntimeError):  # the old name raises if it disagrees with the new ones
        before = torch.get_float32_matmul_precision()
    is_plain = before == "highest" and all(setting in ("none", "ieee") for _, setting in settings)
    if not is_rounded and is_plain:
        return lambda: None
    torch.set_float32_matmul_precision("high" if is_rounded else "highest")

    def put_back() -> None:
        torch.set_float32_matmul_precision(before)
        for place, setting in settings:
            # a value equal to the parent's was inherited, so inherit it again
            place.fp32_precision = "none" if setting == parent else setting

    return put_back
