"""Prepare the next unit while the model runs the current one.

Tokenizers are native code that releases the GIL, so a thread is enough. It works at most one unit ahead: only the
texts, the ids and the first batches of that unit are held in addition.

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

# A padded token takes 16 bytes in a batch and 8 more in its announcement; pooled units have tens of millions.
_MOST_TOKENS = 1_000_000

_Made = TypeVar("_Made")


def prepare_ahead(units: Iterator[Unit], prepare: Callable[[Unit], _Made]) -> Iterator[_Made]:
    """Iterate over prepared units, preparing one ahead.

    Args:
        units: Iterated in a separate thread.
        prepare: Prepares a unit; called in that thread.

    Returns:
        The results of `prepare`, in order. An error in the thread is raised when its unit is requested.
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
            # if the input forked and the child came back here, this is its only thread, and it would wait forever
            if os.getpid() != owner:
                os._exit(1)

    with ThreadPoolExecutor(1, thread_name_prefix="layerprobe-ahead") as thread:
        ahead = thread.submit(take)
        while (taken := ahead.result()) is not None:
            ahead = thread.submit(take)
            yield taken[0]


def make_first(batches: Iterator[_Made], count_tokens: Callable[[_Made], int]) -> Iterator[_Made]:
    """Make the first batches of a unit now, up to a million tokens, and the others on demand."""
    made: list[_Made] = []
    num_tokens = 0
    for batch in batches:
        made.append(batch)
        num_tokens += count_tokens(batch)
        if num_tokens >= _MOST_TOKENS:
            break
    return itertools.chain(made, batches)
