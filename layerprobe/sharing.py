"""Settings that several may want changed at once: the first remembers how one was, the last puts it back.

Two runs of one model both want it in eval mode; the one that ends first must not put it back to training under the
other. Must never know which settings there are.
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
    # kept, so that nothing else gets its identity meanwhile
    owner: Owner
    original: Value
    count: int = 0


class SharedSetting(Generic[Owner, Value]):
    """A setting of certain objects, each of which may be held by several callers, in any thread.

    Args:
        read: Gives the setting of an object.
        write: Puts it back.
    """

    def __init__(self, read: Callable[[Owner], Value], write: Callable[[Owner, Value], None]) -> None:
        self._read = read
        self._write = write
        self._lock = threading.Lock()
        self._held: dict[int, _Held[Owner, Value]] = {}

    def original(self, owner: Owner) -> Value:
        """Give the setting as it is while nobody holds it."""
        with self._lock:
            held = self._held.get(id(owner))
            return held.original if held else self._read(owner)

    @contextlib.contextmanager
    def held(self, owner: Owner) -> Iterator[Value]:
        """Let the setting be changed within the block; gives the original."""
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
