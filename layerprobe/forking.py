"""Objects that a forked process must let go of: it has them too, but none of the threads and rights behind them.

Must never know what they are.
"""

import os
import weakref
from collections.abc import Callable
from typing import TypeVar

__all__ = ["watch_forks"]

Owner = TypeVar("Owner")


def watch_forks(let_go: Callable[[Owner], None]) -> "weakref.WeakSet[Owner]":
    """Make a set of objects; in a forked process `let_go` is called with each that is alive, before anything else."""
    watched: weakref.WeakSet[Owner] = weakref.WeakSet()

    def let_all_go() -> None:
        for one in list(watched):
            let_go(one)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=let_all_go)
    return watched
