"""Settings that several callers may change at once: the first saves the original, the last restores it.

If two runs share a model and both need it in eval mode, the run that ends first must not put it back into training
mode under the other. Must never know which settings there are.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["SharedSetting"]

Owner = TypeVar("Owner")
Value = TypeVar("Value")


@dataclass(eq=False)
class _Held(Generic[Owner, Value]):
    # a reference keeps the object alive, so that its id is not reused
    owner: Owner
    original: Value
    count: int = 0


class SharedSetting(Generic[Owner, Value]):
    """A setting of objects that may be held by several callers at once, in any thread.

    Args:
        read: Returns the setting of an object.
        write: Restores the setting of an object.
    """

    def __init__(self, read: Callable[[Owner], Value], write: Callable[[Owner, Value], None]) -> None:
        self._read = read
        self._write = write
        self._lock = threading.Lock()
        self._held: dict[int, _Held[Owner, Value]] = {}

    def original(self, owner: Owner) -> Value:
        """Return the setting from before anyone held it."""
        with self._lock:
            held = self._held.get(id(owner))
            return held.original if held else self._read(owner)

    @contextlib.contextmanager
    def held(self, owner: Owner) -> Iterator[Value]:
        """Let the block change the setting, and restore it when the last holder exits; yields the original."""
        with self._lock:
            held = self._held.get(id(owner)) or _Held(owner, self._read(owner))
            self._held[id(owner)] = held
            held.count += 1
        try:
            yield held.original
        finally:
            with self._lock:
                held.count -= 1
                if not held.count:
                    del self._held[id(owner)]
                    self._write(owner, held.original)
