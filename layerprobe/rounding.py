"""How far CUDA rounds the operands of float32 products: read, and held for as long as runs need it so.

torch has the setting under an old name and, from 2.9 on, under new ones, by which its kernels go. It is the whole
process's, so the first run that needs it otherwise sets it, the last one puts it back, and one that needs it the other
way meanwhile is refused.

Hides under which names torch has it. Must never know of models.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from layerprobe.errors import OptionError

__all__ = ["holding_products", "rounds_products", "rounds_products_outside"]


def rounds_products() -> bool:
    """Whether CUDA may round the operands of float32 products, now."""
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    # where there is a new name kernels go by it, whatever the old one says, which raises where the two differ
    return torch.get_float32_matmul_precision() != "highest" if setting is None else setting == "tf32"


def rounds_products_outside() -> bool:
    """Whether the program around the runs that hold the setting lets CUDA round them."""
    return _held.original()


@contextlib.contextmanager
def holding_products(is_rounded: bool) -> Iterator[None]:
    """Let CUDA round float32 products, or keep it from that, while this is open.

    Raises:
        OptionError: a run of this process is active that needs it the other way.
    """
    _held.take(is_rounded)
    try:
        yield
    finally:
        _held.release()


class _HeldRounding:
    """The setting as runs hold it: how many do, how they have it, and how it was before."""

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
        # counted, compared and set under one lock: of two runs that begin at once and want it otherwise one is refused
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
    """Set how products are rounded, unless they are so already; gives a function that restores what was set before."""
    parent = getattr(torch.backends, "fp32_precision", None)
    places: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    settings = [(place, place.fp32_precision) for place in places if hasattr(place, "fp32_precision")]
    before = "highest"
    with contextlib.suppress(RuntimeError):  # raised where old and new names differ: the old one is not as it began
        before = torch.get_float32_matmul_precision()
    is_plain = before == "highest" and all(setting in ("none", "ieee") for _, setting in settings)
    if not is_rounded and is_plain:
        return lambda: None
    torch.set_float32_matmul_precision("high" if is_rounded else "highest")

    def put_back() -> None:
        torch.set_float32_matmul_precision(before)
        for place, setting in settings:
            # a value that equals the parent's is taken for inherited, and inherited again
            place.fp32_precision = "none" if setting == parent else setting

    return put_back
