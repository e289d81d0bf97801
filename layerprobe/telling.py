"""What a run says on stderr while it goes on: bars and lines.

They are a courtesy. A pipe that nobody reads any more, a log on a full disk and a terminal that is gone take no more of
them, and that stops nothing. Must never know what is said.
"""

import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Stderr", "find_stderr", "make_run_bar", "say"]

_TERMINAL_INTERVAL_S, _LOG_INTERVAL_S = 0.1, 10.0


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


def make_run_bar(shows: bool, total: int | None = None, initial: int = 0) -> "tqdm[Any]":
    """Make the bar of a run over examples, as wide as the terminal is at the moment.

    Args:
        shows: Whether there is one at all.
        total: How many examples there are, where that is known.
        initial: How many of them an earlier run has done.
    """
    from tqdm import tqdm

    stderr = find_stderr()
    # a log file wants a line now and then, and none of a short run
    interval_s = _TERMINAL_INTERVAL_S if stderr.isatty() else _LOG_INTERVAL_S
    return tqdm(
        total=total,
        initial=initial,
        unit=" examples",
        disable=not shows,
        leave=False,
        mininterval=interval_s,
        delay=interval_s,
        file=stderr,
        dynamic_ncols=True,
    )


def say(text: str) -> None:
    """Say something in a line of its own, above the bars."""
    from tqdm import tqdm

    # bars of the caller's own, around a run, are on the stream itself
    with suppress(AttributeError, OSError, ValueError), tqdm.external_write_mode(sys.stderr):
        tqdm.write(f"layerprobe: {text}", file=find_stderr())
