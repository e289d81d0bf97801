"""The next unit is made ready for the model while that runs this one.

Tokenizers are native code and leave the interpreter free, so a thread is enough. One unit ahead and no more: its texts,
its ids and the first of its batches are all that is held twice.

Hides the thread. Must never know of models or stores.
"""

import itertools
import os
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from layerprobe.extract.cutting import Unit

__all__ = ["make_first", "prepare_ahead"]

# A padded token takes 16 bytes in a batch and 8 more in what a sink is told; pooled units have tens of millions.
_MOST_TOKENS = 1_000_000

_Made = TypeVar("_Made")


def prepare_ahead(units: Iterator[Unit], prepare: Callable[[Unit], _Made]) -> Iterator[_Made]:
    """Go through units, each made ready.

    Args:
        units: Gone through in a thread of its own.
        prepare: Makes a unit ready; called in that thread.

    Returns:
        What `prepare` gave, in order. What goes wrong in the thread is raised where its unit is asked for.
    """

    owner = os.getpid()

    def take() -> tuple[_Made] | None:
        try:
            unit = next(units, None)
            return None if unit is None else (prepare(unit),)
        except BaseException:
            if os.getpid() != owner:
                traceback.print_exc()
            raise
        finally:
            # forked by the input, and come back from there: it has this thread alone, which would wait for ever
            if os.getpid() != owner:
                os._exit(1)

    with ThreadPoolExecutor(1, thread_name_prefix="layerprobe-ahead") as thread:
        ahead = thread.submit(take)
        while (taken := ahead.result()) is not None:
            ahead = thread.submit(take)
            yield taken[0]


def make_first(batches: Iterator[_Made], count_tokens: Callable[[_Made], int]) -> Iterator[_Made]:
    """Make the first batches of a unit now, up to a million tokens of them, and the others when they are asked for."""
    made: list[_Made] = []
    num_tokens = 0
    for batch in batches:
        made.append(batch)
        num_tokens += count_tokens(batch)
        if num_tokens >= _MOST_TOKENS:
            break
    return itertools.chain(made, batches)
