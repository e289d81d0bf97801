"""Keep Python's garbage collector from repeatedly scanning objects that stay alive anyway.

To find reference cycles, a full collection scans all objects of the process whenever the long-lived ones have grown by
a quarter. With torch and transformers loaded that takes a fifth of a second, several times while a model is loaded.
Objects without cycles are freed without it.

Must never know what is made.
"""

import contextlib
import gc
from collections.abc import Iterator
from types import ModuleType

from layerprobe.sharing import SharedSetting

__all__ = ["collecting_later", "keep_for_good"]


def _put_back(collector: ModuleType, was_enabled: bool) -> None:
    # moves all objects into the oldest generation, so that none is scanned right away; skipped if a caller has frozen
    # objects, which this would unfreeze
    if not collector.get_freeze_count():
        collector.freeze()
        collector.unfreeze()
    if was_enabled:
        collector.enable()


_enabled = SharedSetting[ModuleType, bool](lambda collector: collector.isenabled(), _put_back)


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Disable garbage collection in all threads while this is open, for a second or two that make many objects."""
    with _enabled.held(gc):
        gc.disable()
        yield


def keep_for_good() -> None:
    """Exclude all existing objects from garbage collection for good, in a process that is layerprobe's own."""
    gc.freeze()
