"""Verify every byte of a store, and remove what is damaged.

Checks each file by itself, the shards against each other, and the index against the shards. Repair only removes files;
recomputing a shard is the extraction's task.

Hides what is compared. Must never know of models.
"""

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from layerprobe.errors import FormatError, StoreError, telling_refusals
from layerprobe.store.checks import Wanted, check_shard, check_tokenizer, tell
from layerprobe.store.description import load_description
from layerprobe.store.durable import flush_folder
from layerprobe.store.format import (
    INDEX_FILE,
    STORE_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    checksum_file,
    is_leftover,
    load_json,
    need_store,
)
from layerprobe.store.guard import brief, check_flag
from layerprobe.store.headers import FORMAT_VERSION, ShardHeader, parse_shard_name
from layerprobe.store.index import sum_headers
from layerprobe.store.lock import StoreLock, find_holder
from layerprobe.store.places import Place, Placed, find_store
from layerprobe.tables import format_bytes, format_count
from layerprobe.telling import make_bar

__all__ = ["Problem", "VerifyReport", "verify"]

_GONE = "is not there"
_NUM_THREADS = 2
_NUM_REQUESTS = 8


class Problem(NamedTuple):
    """A file of the store that is not as it was written, and what is wrong with it."""

    file: str
    what: str


@dataclass(frozen=True)
class VerifyReport:
    """The result of verifying a store; `str(report)` is its closing text. Made by `layerprobe.verify`.

    Args:
        folder: Path or URL of the store.
        num_shards: Number of shards read.
        num_bytes: Number of bytes read.
        problems: What is wrong: missing files first, then the others in order; one entry per damaged shard.
        notes: Observations that are not problems.
        removed: Files that repair removed.
        is_complete: Whether the store is complete, or was before repair.
        advice: What to do next.
    """

    folder: str
    num_shards: int
    num_bytes: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    removed: tuple[str, ...]
    is_complete: bool
    advice: str

    @property
    def ok(self) -> bool:
        """Whether there are no problems; those that repair removed still count."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{file}: {what}" for file, what in self.problems]
        lines += [f"note: {note}" for note in self.notes]
        found = format_count(len(self.problems), "problem") if self.problems else "every byte is as it was written"
        state = "" if self.is_complete else ", not complete"
        read = f"{format_count(self.num_shards, 'shard')}, {format_bytes(self.num_bytes)}"
        lines.append(f"{self.folder}: {read}{state}: {found}.")
        if self.removed:
            lines.append(f"removed {', '.join(self.removed)}")
        return "\n".join([*lines, self.advice] if self.advice else lines)


@dataclass
class _Findings:
    """The findings so far."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # what repair may remove: known to be wrong, and recomputed by the next run
    removable: set[str] = field(default_factory=set)

    def add(self, file: str, what: str, *removable: str) -> None:
        self.problems.append(Problem(file, what))
        self.removable.update(removable)


def verify(folder: Placed | str | Path, repair: bool = False, progress: bool | None = None) -> VerifyReport:
    """Read every byte of a store and compare it with what was written.

    Args:
        folder: A store, or its path or URL; complete or not.
        repair: Remove damaged shards, a damaged index or tokenizer, and with any of them the index, so that the same
            extraction writes them again, byte for byte.
        progress: Show a progress bar on stderr; None: only on a terminal.

    Raises:
        OptionError: `folder` is not a location, or `repair` is neither True nor False.
        StoreError: there is no store there; or `repair` on a damaged store that a `Probe` has filled, since it cannot
            be recomputed.
        LockError: `repair` while a run is writing there.

    Cost: each byte is read once, by two threads, in pieces of 8 MiB; memory holds those, and the ordinals and offsets
    of a shard.

    Example:
        >>> import tempfile, layerprobe as lp
        >>> folder = tempfile.mkdtemp()
        >>> store = lp.extract("demo", ["The kettle whistled.", "Who left?"], folder, sites="layers.-1")
        >>> lp.verify(folder).ok
        True
    """
    check_flag("repair", repair)
    place = find_store(folder)
    need_store(place)
    with ExitStack() as held:
        writer = find_holder(place.folder) if place.folder is not None else None
        if repair and place.folder is not None:
            held.enter_context(StoreLock(place.folder))
        files = sorted(place.list_files())
        is_complete = INDEX_FILE in files
        found = _Findings()
        description = _read_description(place, found)
        wanted = Wanted()
        if description is not None:
            wanted = Wanted.from_description(description, _read_tokenizer(place, description, found))
        shards = [file for file in files if parse_shard_name(file) is not None]
        headers, num_bytes = _check_shards(place, shards, wanted, found, progress)
        _check_order(headers, wanted, found)
        if is_complete:
            _check_index(place, shards, headers, wanted, found)
            if description is not None and any(problem.file == STORE_FILE for problem in found.problems):
                # the description may be wrong too, so do not rely on it to remove anything
                description = None
        elif wanted.num_units is not None and len(shards) < wanted.num_units:
            found.notes.append(
                f"{wanted.num_units - len(shards):,} of {format_count(wanted.num_units, 'shard')} not there yet"
            )
        if writer is not None:
            found.notes.append(f"a run is writing ({writer})")
        else:
            found.notes += [f"{file} is left over; the next run removes it" for file in files if is_leftover(file)]
        removed = _remove(place, files, description, found) if repair else ()
    # a missing shard is often the cause of problems in other files
    problems = tuple(sorted(found.problems, key=lambda problem: (not problem.what.startswith(_GONE), problem)))
    notes = tuple(found.notes)
    advice = "" if writer is not None else _advise(place, description, found, removed, is_complete)
    return VerifyReport(str(place), len(shards), num_bytes, problems, notes, removed, is_complete, advice)


def _read_description(place: Place, found: _Findings) -> dict[str, Any] | None:
    try:
        return load_description(place, checks_fingerprint=True)
    except FormatError as error:
        # no run rewrites it, so it is not removed
        found.add(STORE_FILE, tell(place, STORE_FILE, error))
        return None


def _read_tokenizer(place: Place, description: Mapping[str, Any], found: _Findings) -> int | None:
    """Check the tokenizer if the store should have one; return its highest id."""
    said = description.get("tokenizer")
    if not isinstance(said, dict):
        return None
    try:
        return check_tokenizer(place, said)
    except FormatError as error:
        found.add(TOKENIZER_FILE, tell(place, TOKENIZER_FILE, error), TOKENIZER_FOLDER)
        return None


def _check_shards(
    place: Place, files: Sequence[str], wanted: Wanted, found: _Findings, progress: bool | None
) -> tuple[list[ShardHeader], int]:
    """Check each shard by itself; return the headers of the intact ones, and the total bytes."""
    sizes: list[int] = []
    for file in files:
        sizes.append(0)
        with suppress(StoreError):  # a dangling link; reported by the check below
            sizes[-1] = place.size(file)
    bar = make_bar(sum(sizes), "", progress, "B")
    executor = ThreadPoolExecutor(_NUM_THREADS if place.folder is not None else _NUM_REQUESTS)
    headers: list[ShardHeader] = []
    try:
        with bar:
            tasks = [executor.submit(check_shard, place, file, wanted, bar.update) for file in files]
            for file, task in zip(files, tasks, strict=True):
                try:
                    headers.append(task.result())
                except FormatError as error:
                    found.add(file, tell(place, file, error), file)
                except StoreError as error:
                    # an unreadable file is not known to be damaged, so repair keeps it
                    found.add(file, tell(place, file, error))
    finally:
        executor.shutdown(cancel_futures=True)
    return headers, sum(sizes)


def _check_order(headers: Sequence[ShardHeader], wanted: Wanted, found: _Findings) -> None:
    """Check that shards follow each other: no example occurs twice, and neighbours leave no gap."""
    before: ShardHeader | None = None
    for header in sorted(headers, key=lambda header: header.unit):
        end = 0 if before is None else before.first_example + before.num_examples
        is_next = header.unit == (0 if before is None else before.unit + 1)
        if header.first_example < end or (is_next and header.first_example > end):
            after = "" if before is None else f", {before.file} ends before {end}"
            # either of the two may be wrong
            found.add(
                header.file,
                f"begins at example {header.first_example}{after}",
                header.file,
                *([] if before is None else [before.file]),
            )
        elif wanted.num_units is not None and header.unit >= wanted.num_units:
            found.add(
                header.file, f"is beyond the {format_count(wanted.num_units, 'shard')} of {STORE_FILE}", header.file
            )
        elif wanted.num_examples is not None and header.first_example + header.num_examples > wanted.num_examples:
            found.add(
                header.file,
                f"is beyond the {format_count(wanted.num_examples, 'example')} of {STORE_FILE}",
                header.file,
            )
        before = header


def _check_index(
    place: Place, shards: Sequence[str], headers: Sequence[ShardHeader], wanted: Wanted, found: _Findings
) -> None:
    """Check the index against the shards, except for what only a damaged shard could tell."""
    try:
        index = load_json(place, INDEX_FILE)
        listed = {shard["file"]: shard for shard in index["shards"]}
        if len(listed) != len(index["shards"]):
            raise ValueError("it names a shard twice")
    except FormatError as error:
        found.add(INDEX_FILE, tell(place, INDEX_FILE, error), INDEX_FILE)
        return
    except (KeyError, TypeError, ValueError) as error:
        found.add(INDEX_FILE, f"is damaged ({brief(repr(error))})", INDEX_FILE)
        return
    there = set(shards)
    lost = [file for file in listed if file not in there]
    for file in lost:
        found.add(brief(file), f"{_GONE}; {INDEX_FILE} names it", INDEX_FILE)
    wrong = [f"does not name {file}" for file in shards if file not in listed]
    if wanted.num_units not in (None, len(listed)):
        wrong.append(f"names {format_count(len(listed), 'shard')}, {STORE_FILE} has {wanted.num_units:,}")
    for header in headers:
        own = {"first_example": header.first_example, "examples": header.num_examples, "tokens": header.num_tokens}
        if header.file in listed and {"file": header.file, **own} != listed[header.file]:
            wrong.append(f"says {brief(listed[header.file])}, the shard says {own}")
    if index.get("format") != FORMAT_VERSION or type(index["format"]) is not int:
        wrong.append(f"says format {brief(repr(index.get('format')))}; this version reads format {FORMAT_VERSION}")
    if wanted.sites is not None and index.get("store_checksum") is not None:  # older versions did not write it
        own = checksum_file(place, STORE_FILE)
        if index["store_checksum"] != own:
            said = brief(repr(index["store_checksum"]))
            found.add(STORE_FILE, f"its checksum is {own}, {INDEX_FILE} says {said}: one of the two has changed")
    if len(headers) == len(shards) and not lost:
        sums = sum_headers(headers)
        for key, value in sums.items():
            if index.get(key) != value:
                wrong.append(f"{key!r} is {brief(index.get(key))}, of the shards {brief(value)}")
        if wanted.num_examples not in (None, sums["examples"]):
            wrong.append(
                f"the shards have {format_count(sums['examples'], 'example')}, {STORE_FILE} {wanted.num_examples:,}"
            )
    if wrong:
        found.add(INDEX_FILE, "; ".join(wrong[:3]) + ("; ..." if len(wrong) > 3 else ""), INDEX_FILE)


def _remove(
    place: Place, files: Sequence[str], description: Mapping[str, Any] | None, found: _Findings
) -> tuple[str, ...]:
    """Remove what is damaged and can be recomputed; return the names."""
    if not found.removable or description is None:
        return ()
    if not _can_resume(description):
        raise StoreError(
            f"{place}: {sorted(found.removable)[0]} is damaged, and a Probe filled this store: no run makes a part "
            "of it again, so nothing was removed. Copy the damaged files from elsewhere."
        )
    # The index first, and durably: with missing shards it would declare the store complete.
    removed = sorted(found.removable | {INDEX_FILE}, key=lambda file: (file != INDEX_FILE, file))
    removed = [file for file in removed if file in files or file == TOKENIZER_FOLDER]
    for file in removed:
        path = None if place.folder is None else (place.folder / file).path
        with telling_refusals(path, "removed"):
            if path is not None and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif file == TOKENIZER_FOLDER and path is None:
                for name in place.list_files(file):
                    place.remove(f"{file}/{name}")
            else:
                place.remove(file)
            if path is not None:
                flush_folder(path.parent)
    return tuple(removed)


def _can_resume(description: Mapping[str, Any]) -> bool:
    return isinstance(description.get("plan"), dict)


def _advise(
    place: Place,
    description: Mapping[str, Any] | None,
    found: _Findings,
    removed: Sequence[str],
    is_complete: bool,
) -> str:
    if description is None:
        return (
            f"{STORE_FILE} cannot be made again: copy it from elsewhere, or extract anew with overwrite=True "
            "(--overwrite)."
        )
    model = description.get("model")
    name = model.get("id") if isinstance(model, dict) else None
    command = f"'layerprobe extract {brief(name or 'MODEL')} INPUT -o {place}' with the options it was made with"
    if removed:
        return f"Run {command}: it makes what was removed again, byte for byte."
    if found.removable and _can_resume(description):
        return (
            f"Run 'layerprobe verify {place} --repair' to remove what is damaged, then the extraction to make it again."
        )
    if found.problems:
        return "Copy what is damaged from elsewhere, or extract anew."
    return "" if is_complete or not _can_resume(description) else f"Run {command} to go on."
