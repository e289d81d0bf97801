"""Progress bars and messages on stderr.

They are best effort: a closed pipe, a log on a full disk or a terminal that is gone loses output but stops nothing.
Must never know what is said.
"""

import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Stderr", "find_stderr", "go_through", "make_bar", "make_run_bar", "say"]

T = TypeVar("T")

_INTERVAL_S, _LOG_INTERVAL_S = 0.1, 10.0
_UNASKED_DELAY_S = 0.5


@dataclass(frozen=True)
class Stderr:
    """A stream whose failures are ignored; equal for the same stream, so that tqdm clears bars to print lines on it.

    Args:
        stream: Like `sys.stderr`; None if the process has none.
    """

    stream: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        """Write a text, ignoring failures."""
        with suppress(AttributeError, OSError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        """Flush the stream, ignoring failures."""
        with suppress(AttributeError, OSError, ValueError):
            self.stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        with suppress(AttributeError, OSError, ValueError):
            return self.stream.isatty()
        return False


def find_stderr() -> Stderr:
    """Return the current stderr, looked up on each call because notebooks and tests replace it."""
    return Stderr(sys.stderr)


def make_bar(
    total: int | None,
    what: str,
    progress: bool | None,
    unit: str = "rows",
    *,
    initial: int = 0,
    pause_s: float = 0.0,
) -> "tqdm[Any]":
    """Make a progress bar that follows the width of the terminal; every bar of the library is made here.

    Args:
        total: Number of items; None if not known.
        what: Label before the bar; none if empty.
        progress: Whether to show it; None: only on a terminal, and not for work that ends at once.
        unit: What it counts, in the plural, or `B` for bytes.
        initial: Items that an earlier run has done.
        pause_s: Seconds before it is first shown, and between updates.
    """
    from tqdm import tqdm

    stderr = find_stderr()
    return tqdm(
        total=total,
        initial=initial,
        desc=what or None,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit in ("rows", "B"),
        disable=not (stderr.isatty() if progress is None else progress),
        leave=False,
        mininterval=max(pause_s, _INTERVAL_S),
        delay=max(pause_s, _UNASKED_DELAY_S if progress is None else 0.0),
        file=stderr,
        dynamic_ncols=True,
    )


def make_run_bar(shows: bool, total: int | None = None, initial: int = 0) -> "tqdm[Any]":
    """Make the bar of a run over examples; the caller decides whether to show it."""
    # in a log file, print a line now and then, and none for a short run
    pause_s = 0.0 if find_stderr().isatty() else _LOG_INTERVAL_S
    return make_bar(total, "", shows, "examples", initial=initial, pause_s=pause_s)


def go_through(items: Collection[T], what: str, progress: bool | None, unit: str) -> Iterator[T]:
    """Iterate over items under a progress bar."""
    with make_bar(len(items), what, progress, unit) as bar:
        for one in items:
            yield one
            bar.update()


def say(text: str) -> None:
    """Print a line above the progress bars."""
    from tqdm import tqdm

    # tqdm bars that the caller opened write to the raw stream, and have to make way for the line too
    with suppress(AttributeError, OSError, ValueError), tqdm.external_write_mode(sys.stderr):
        tqdm.write(f"layerprobe: {text}", file=find_stderr())
