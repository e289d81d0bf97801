"""Objects that a forked process must release: it inherits them, but not the threads and locks behind them.

Must never know what they are.
"""

import os
import weakref
from collections.abc import Callable
from typing import TypeVar

__all__ = ["watch_forks"]

Owner = TypeVar("Owner")


def watch_forks(let_go: Callable[[Owner], None]) -> "weakref.WeakSet[Owner]":
    """Return a weak set; in a forked child, `let_go` is called first thing with each live object in it."""
    watched: weakref.WeakSet[Owner] = weakref.WeakSet()

    def let_all_go() -> None:
        for one in list(watched):
            let_go(one)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=let_all_go)
    return watched
