"""The progress of a run, seen from outside: `progress.json`, and how `layerprobe status` reads it.

The run writes the file periodically. It is a courtesy: never flushed, never trusted by a reader of the store, and a
disk that refuses it stops nothing. Whether a run is alive is asked of the system, not of the file, because a killed
process can no longer update it.

Hides processes and rates. Must never know of models or hooks.
"""

import json
import math
import os
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerprobe.errors import FormatError, StoreError
from layerprobe.forking import watch_forks
from layerprobe.store.checks import read_totals
from layerprobe.store.format import INDEX_FILE, PROGRESS_FILE, STORE_FILE, load_header, load_json, need_store
from layerprobe.store.guard import brief
from layerprobe.store.headers import parse_shard_name
from layerprobe.store.paths import NamedPath
from layerprobe.store.places import Place, Placed, find_store
from layerprobe.tables import format_count

__all__ = ["Done", "ProgressFile", "StoreStatus", "read_status"]

_INTERVAL_S = 1.0
# Window for rates: long enough to include committed shards, short enough to be the current pace.
_PACE_S = 300.0
# If a process cannot be checked, the run counts as alive while its last update is this recent.
_SILENCE_S = 60.0


@dataclass(frozen=True)
class Done:
    """What a run has done so far.

    Args:
        units, num_units: Committed units and all units, including those committed by earlier runs.
        examples, num_examples: The same for examples, including those of the current units.
        tokens, num_bytes: Tokens processed and bytes committed, by this run alone.
        missing_bytes: Estimate of the bytes still to be written.
        stalled_s: Seconds that the forward pass waited for the disk, with its device idle.
        waited_s: Seconds that the run waited for free space on the disk.
        is_waiting: Whether it is waiting for free space now.
    """

    units: int
    num_units: int
    examples: int
    num_examples: int
    tokens: int
    num_bytes: int
    missing_bytes: int
    stalled_s: float
    waited_s: float = 0.0
    is_waiting: bool = False


@dataclass(frozen=True)
class StoreStatus:
    """The progress of a store's run. Made by `layerprobe.status`.

    Args:
        folder: Path or URL of the store.
        state: `complete`; `damaged` (the index names shards that do not exist, see `reason`); `running`;
            `killed` (its process is gone); `stopped` (it ended by itself, see `reason`);
            `silent` (its process cannot be checked, and it has not been heard of for a minute); `incomplete` (no
            valid progress file).
        reason: Why it stopped, or what is damaged.
        num_units_done, num_units: Number of stored shards, and of all; None if that is not known.
        num_examples_done, num_examples: The same for examples.
        tokens_per_s, bytes_per_s: Rates over the last five minutes; None unless it runs.
        stalled: Share of that time in which the forward pass waited for the disk.
        remaining_s: Seconds until the run is complete, at that rate.
        missing_bytes: Estimate of the bytes still to be written.
        free_bytes: Free space on the disk; None under a URL.
        full_s: Seconds until the disk is full, at that rate.
        process: The process that runs it, or ran it.
        is_alive: Whether that process is alive; None if it cannot be checked.
        heard_s: Seconds since its last update.
        waited_s: Seconds that the run has waited for free space on the disk; None unless it runs.
        is_waiting: Whether it is waiting for free space now; None unless it runs.
    """

    folder: str
    state: str
    num_units_done: int
    num_units: int | None
    num_examples_done: int
    num_examples: int | None
    reason: str | None = None
    tokens_per_s: float | None = None
    bytes_per_s: float | None = None
    stalled: float | None = None
    remaining_s: float | None = None
    missing_bytes: int | None = None
    free_bytes: int | None = None
    full_s: float | None = None
    process: str | None = None
    is_alive: bool | None = None
    heard_s: float | None = None
    waited_s: float | None = None
    is_waiting: bool | None = None


class ProgressFile(AbstractContextManager["ProgressFile"]):
    """Write the progress of a run into its store, at most once a second.

    Args:
        folder: The store; None if it is not a local folder, and then nothing is written.

    If `check` is set, nothing is written once it raises. Any thread may call `tick`. Leaving the block removes the file
    if the store is complete; otherwise it records that the run has ended, and why.
    """

    def __init__(self, folder: Path | NamedPath | None) -> None:
        self._path = None if folder is None else NamedPath.of(folder).path / PROGRESS_FILE
        self._measure: Callable[[], Done] | None = None
        self.check: Callable[[], None] = lambda: None
        self._paces: deque[tuple[float, Done]] = deque()
        self._next = 0.0
        self._turn = threading.Lock()
        self._is_there = False
        self._about = {**_describe_process(os.getpid()), "started": round(time.time(), 3)}
        _told.add(self)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._path is None:
            return
        # nothing here may hide the error of the run
        with suppress(OSError):
            self.check()
            if error is None and (self._path.parent / INDEX_FILE).exists():
                self._path.unlink(missing_ok=True)
            elif self._measure is not None:
                reason = "it was asked to" if error is None else f"{type(error).__name__}: {error}".rstrip(": ")
                self._write("stopped", brief(reason))

    def begin(self, measure: Callable[[], Done]) -> None:
        """Record that the run has begun, and how to measure its progress."""
        self._measure = measure
        self._write("running")

    def tick(self) -> None:
        """Write the progress, unless the last update is less than a second old."""
        if time.monotonic() >= self._next:
            self._write("running")

    def _write(self, state: str, reason: str | None = None) -> None:
        with self._turn:
            self._write_alone(state, reason)

    def _write_alone(self, state: str, reason: str | None) -> None:
        if self._path is None or self._measure is None:
            return
        try:
            self.check()
        except OSError:
            return
        now, done = time.monotonic(), self._measure()
        self._next = now + _INTERVAL_S
        self._paces.append((now, done))
        while now - self._paces[0][0] > _PACE_S:
            self._paces.popleft()
        then, before = self._paces[0]
        pace = {
            "seconds": round(now - then, 3),
            "examples": done.examples - before.examples,
            "tokens": done.tokens - before.tokens,
            "num_bytes": done.num_bytes - before.num_bytes,
            "stalled_s": round(done.stalled_s - before.stalled_s, 3),
        }
        updated = round(time.time(), 3)
        said = {"state": state, "reason": reason, **self._about, "updated": updated, **asdict(done), "pace": pace}
        partial, data = self._path.with_name(PROGRESS_FILE + ".tmp"), json.dumps(said, indent=1).encode()
        try:
            partial.write_bytes(data)
            os.replace(partial, self._path)
            self._is_there = True
        except OSError:
            # leave the last space of a full disk to the shards
            with suppress(OSError):
                partial.unlink()
            if self._is_there:
                with suppress(OSError):
                    _write_over(self._path, data)

    def _forget(self) -> None:
        """Stop writing in a forked process: the run's progress and end are its parent's to report."""
        self._path, self._turn = None, threading.Lock()


_told = watch_forks(ProgressFile._forget)


def _write_over(path: Path, data: bytes) -> None:
    """Overwrite a small file in its existing block, so that a waiting run can report even on a full disk."""
    descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    try:
        # A single write, padded with blanks to the old length: a concurrent reader finds valid JSON or, at worst, a mix
        # that it takes for no progress until it reads again.
        os.write(descriptor, data.ljust(os.fstat(descriptor).st_size))
    finally:
        os.close(descriptor)


def read_status(folder: Placed | str | Path) -> StoreStatus:
    """Show the progress of a run, without disturbing it.

    Args:
        folder: A store, or its path or URL.

    Raises:
        StoreError: there is no store there.
        FormatError: `store.json` or `index.json` is damaged.

    Cost: without an index and an active run, the header of each shard is read.

    Example:
        >>> import tempfile, layerprobe as lp
        >>> folder = tempfile.mkdtemp()
        >>> store = lp.extract("demo", ["The kettle whistled.", "Who left?"], folder, sites="layers.-1")
        >>> lp.status(folder).state
        'complete'
    """
    place = find_store(folder)
    need_store(place)
    files = place.list_files()
    shards = [file for file in files if parse_shard_name(file) is not None]
    free = shutil.disk_usage(place.folder).free if place.folder is not None else None
    if INDEX_FILE in files:
        return _read_complete(place, files, free)
    said = _read_progress(place) if PROGRESS_FILE in files else None
    if said is None:
        units, examples = read_totals(load_json(place, STORE_FILE))
        done = _count_examples(place, shards)
        return StoreStatus(str(place), "incomplete", len(shards), units, done, examples, free_bytes=free)
    return _judge(place, shards, said, free)


def _read_complete(place: Place, files: list[str], free: int | None) -> StoreStatus:
    index, there = load_json(place, INDEX_FILE), set(files)
    try:
        listed = {str(shard["file"]): int(shard["examples"]) for shard in index["shards"]}
        whole = int(index["examples"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{place.label(INDEX_FILE)}: is damaged. Run 'layerprobe verify {place}'.") from error
    lost = sorted(file for file in listed if file not in there)
    done = whole - sum(listed[file] for file in lost)
    state, reason = "complete", None
    if lost:
        state = "damaged"
        reason = f"{format_count(len(lost), 'shard')} of the index not there, {brief(lost[0])} the first"
    num_found = len(listed) - len(lost)
    return StoreStatus(str(place), state, num_found, len(listed), done, whole, reason=reason, free_bytes=free)


def _judge(place: Place, shards: list[str], said: Mapping[str, Any], free: int | None) -> StoreStatus:
    heard_s = max(0.0, time.time() - said["updated"])
    is_alive = _ask_process(said)
    if said["state"] == "stopped":
        state = "stopped"
    elif is_alive is None:
        state = "running" if heard_s <= _SILENCE_S else "silent"
    else:
        state = "running" if is_alive else "killed"
    known: dict[str, Any] = {
        "reason": brief(said["reason"]) if said["reason"] is not None else None,
        "process": brief(f"process {said['pid']} on {said['host']}"),
        "is_alive": is_alive,
        "heard_s": heard_s,
        "free_bytes": free,
    }
    if state != "running":
        done = _count_examples(place, shards)
        return StoreStatus(str(place), state, len(shards), said["num_units"], done, said["num_examples"], **known)
    pace = said["pace"]
    seconds = max(pace["seconds"], 1e-9)
    left = said["num_examples"] - said["examples"]
    return StoreStatus(
        str(place), state, len(shards), said["num_units"], said["examples"], said["num_examples"], **known,
        tokens_per_s=pace["tokens"] / seconds,
        bytes_per_s=pace["num_bytes"] / seconds,
        stalled=min(1.0, pace["stalled_s"] / seconds),
        remaining_s=left * seconds / pace["examples"] if pace["examples"] else None,
        missing_bytes=said["missing_bytes"],
        full_s=free * seconds / pace["num_bytes"] if pace["num_bytes"] and free is not None else None,
        waited_s=said.get("waited_s", 0.0),
        is_waiting=said.get("is_waiting", False),
    )  # fmt: skip


_COUNTS = ("pid", "units", "num_units", "examples", "num_examples", "tokens", "num_bytes", "missing_bytes")
_PACE = ("seconds", "examples", "tokens", "num_bytes", "stalled_s")


def _read_progress(place: Place) -> Mapping[str, Any] | None:
    """Read the progress file; None if it is not what a run writes, because it is only informative."""
    try:
        said = load_json(place, PROGRESS_FILE)
        is_sound = (
            said["state"] in ("running", "stopped")
            and all(type(said[key]) is int and said[key] >= 0 for key in _COUNTS)
            and all(_is_amount(said["pace"][key]) for key in _PACE)
            and _is_amount(said["updated"])
            # older versions did not write these two
            and _is_amount(said.get("waited_s", 0))
            and type(said.get("is_waiting", False)) is bool
            and {"host", "space", "process_start", "reason"} <= said.keys()
        )
    except (StoreError, KeyError, TypeError):
        return None
    return said if is_sound else None


def _is_amount(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]


def _count_examples(place: Place, shards: list[str]) -> int:
    """Count the committed examples; a damaged shard has none."""
    count = 0
    for file in shards:
        with suppress(StoreError):
            count += load_header(place, file).num_examples
    return count


def _describe_process(pid: int) -> dict[str, Any]:
    """Identify the process, also against a later process with the same pid."""
    return {"host": socket.gethostname(), "space": _find_space(), "pid": pid, "process_start": _read_stat(pid)[1]}


def _find_space() -> str | None:
    """Return the PID namespace of this process, because pids in another container are unrelated; None if unknown."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def _read_stat(pid: int) -> tuple[str | None, str | None]:
    """Return a process's state, and its start time in clock ticks since boot; None if unknown."""
    with suppress(OSError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()  # the process name, in parentheses, may contain anything
        return fields[0], fields[19]
    return None, None


def _ask_process(said: Mapping[str, Any]) -> bool | None:
    """Ask the system whether the process of a run is alive; None if it runs on another system."""
    if os.name == "nt" or said["host"] != socket.gethostname() or said["space"] != _find_space():
        return None
    try:
        os.kill(said["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's process, but alive
    state, start = _read_stat(said["pid"])
    if state == "Z":
        return False  # a zombie: dead, but not reaped
    return said["process_start"] is None or start is None or said["process_start"] == start
