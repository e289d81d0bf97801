"""The next unit is cut and tokenised while the model runs this one.

Tokenizers are native code and leave the interpreter free, so a thread is enough. One unit ahead and no more: its texts
and ids are all that is held twice.

Hides the thread. Must never know of models or stores.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from layerprobe.extract.cutting import Unit
from layerprobe.extract.tokens import TokenizedUnit

__all__ = ["tokenize_ahead"]


def tokenize_ahead(
    units: Iterator[Unit], tokenize: Callable[[Unit], TokenizedUnit | None]
) -> Iterator[tuple[Unit, TokenizedUnit | None]]:
    """Go through units with their ids.

    Args:
        units: Gone through in a thread of its own.
        tokenize: Gives the ids of a unit, or None where they are not wanted; called in that thread.

    Returns:
        Each unit and its ids, in order. What goes wrong in the thread is raised where its unit is asked for.
    """

    def take() -> tuple[Unit, TokenizedUnit | None] | None:
        unit = next(units, None)
        return None if unit is None else (unit, tokenize(unit))

    with ThreadPoolExecutor(1, thread_name_prefix="layerprobe-tokenizer") as thread:
        ahead = thread.submit(take)
        while (taken := ahead.result()) is not None:
            ahead = thread.submit(take)
            yield taken
