"""Python's garbage collector, kept from looking at what stays anyway.

It looks for objects that hold each other, and for that goes through all objects of the process whenever a quarter more
of them have come to stay: a fifth of a second once torch and transformers are there, several times over while a model
is loaded. What nothing holds any more is freed without it.

Must never know what is made.
"""

import contextlib
import gc
from collections.abc import Iterator
from types import ModuleType

from layerprobe.sharing import SharedSetting

__all__ = ["collecting_later", "keep_for_good"]


def _put_back(collector: ModuleType, was_enabled: bool) -> None:
    # all objects become old ones, so that none is gone through at once; not where a caller has frozen some, which this
    # would thaw
    if not collector.get_freeze_count():
        collector.freeze()
        collector.unfreeze()
    if was_enabled:
        collector.enable()


_enabled = SharedSetting[ModuleType, bool](lambda collector: collector.isenabled(), _put_back)


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Let no garbage be collected while this is open, in any thread; for a second or two that make many objects."""
    with _enabled.held(gc):
        gc.disable()
        yield


def keep_for_good() -> None:
    """Have the collector never again look at what there is now, in a process that is layerprobe's own."""
    gc.freeze()
