"""A device that is late: streams whose copies happen only when someone waits for them."""

import threading
from typing import Any

import torch
from torch import Tensor


class DelayedStreams:
    """Queue every copy; do it, and those before it, when its event is waited for or held."""

    def __init__(self, holds: bool = True) -> None:
        self.num_copies = 0
        self._queue: list[tuple[int, Tensor, Tensor]] = []
        self._holds = holds
        self._lock = threading.Lock()

    def record(self) -> str:
        return "made"

    def hold(self, event: int) -> None:
        if self._holds:
            self.wait(event)

    def copy(self, target: Tensor, source: Tensor, after: Any) -> int:
        assert after == "made"
        with self._lock:
            self.num_copies += 1
            self._queue.append((self.num_copies, target, source))
            return self.num_copies

    def wait(self, event: int) -> None:
        with self._lock, torch.no_grad():
            while self._queue and self._queue[0][0] <= event:
                _, target, source = self._queue.pop(0)
                target.copy_(source)
