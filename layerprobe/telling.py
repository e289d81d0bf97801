"""What is said on stderr while something goes on: bars and lines.

They are a courtesy. A pipe that nobody reads any more, a log on a full disk and a terminal that is gone take no more of
them, and that stops nothing. Must never know what is said.
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
    """A stream whose failures end nobody's work; equal for the same stream, since bars of one give way to lines of it.

    Args:
        stream: As `sys.stderr` is; None where a process has none.
    """

    stream: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        """Write a text, if the stream takes it."""
        with suppress(AttributeError, OSError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        """Pass on what was written, if the stream takes it."""
        with suppress(AttributeError, OSError, ValueError):
            self.stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with suppress(AttributeError, OSError, ValueError):
            return self.stream.isatty()
        return False


def find_stderr() -> Stderr:
    """Give the stderr of this moment; a notebook and a test put their own in its place."""
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
    """Make a bar, as wide as the terminal is at the moment; every bar of the library is made here.

    Args:
        total: How many there are to do; None where nobody knows.
        what: What stands before the bar; nothing if empty.
        progress: Whether to show it; None for only on a terminal, and not for what is done at once.
        unit: What it counts, in the plural, or `B` for bytes.
        initial: How many an earlier run has done.
        pause_s: Seconds before it is shown, and between two times.
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
    """Make the bar of a run over examples; whether it is shown, the caller has decided."""
    # a log file wants a line now and then, and none of a short run
    pause_s = 0.0 if find_stderr().isatty() else _LOG_INTERVAL_S
    return make_bar(total, "", shows, "examples", initial=initial, pause_s=pause_s)


def go_through(items: Collection[T], what: str, progress: bool | None, unit: str) -> Iterator[T]:
    """Go through some things under a bar."""
    with make_bar(len(items), what, progress, unit) as bar:
        for one in items:
            yield one
            bar.update()


def say(text: str) -> None:
    """Say something in a line of its own, above the bars."""
    from tqdm import tqdm

    # the caller's own bars, around a run, write to the stream itself, and give way to the line too
    with suppress(AttributeError, OSError, ValueError), tqdm.external_write_mode(sys.stderr):
        tqdm.write(f"layerprobe: {text}", file=find_stderr())
