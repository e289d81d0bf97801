"""Merge stores of the same plan, each with some of its units, into one store: `layerprobe.merge`.

Headers are read first, so that another plan or two versions of a unit are refused before a byte is written. Each shard
is then copied or linked into a staging folder, verified there, and renamed into the store. Missing and damaged units
are reported, and the index is written only if there are none.

Must never know of models or hooks.
"""

import contextlib
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from layerprobe.errors import FormatError, LayerProbeError, OptionError, PlanError, SpaceError, StoreError
from layerprobe.store.checks import Wanted, check_shard, check_tokenizer, tell
from layerprobe.store.description import commit_description, load_description
from layerprobe.store.durable import commit_folder, flush_file, flush_folder, make_folder, tell_failure
from layerprobe.store.format import (
    INDEX_FILE,
    STAGE_FOLDER,
    STORE_FILE,
    TOKENIZER_FOLDER,
    clear_leftovers,
    is_leftover,
    need_store,
    read_header,
    remove_path,
)
from layerprobe.store.guard import check_flag, open_inside
from layerprobe.store.headers import ShardHeader, parse_shard_name
from layerprobe.store.index import commit_index
from layerprobe.store.lock import LOCK_FILE, StoreLock
from layerprobe.store.mismatch import list_differences
from layerprobe.store.places import Placed, find_place, find_store, need_folder
from layerprobe.tables import format_bytes, format_count
from layerprobe.telling import make_bar

__all__ = ["MergeReport", "merge"]

_PIECE_BYTES = 4 << 20
_MOST_LISTED = 8


@dataclass
class MergeReport:
    """The result of a merge; `str(report)` describes it, with a line for each problem.

    Args:
        out: The store.
        num_units: Number of units in the plan.
        num_added: Number of shards taken from the folders.
        num_kept: Number of shards that the store had already.
        num_alike: Number of further copies of a shard, byte-identical according to headers and checksums.
        damaged: Files that were left out, and why.
        missing: Units of which no folder has an intact shard.
        lacks_tokenizer: Whether the plan has a tokenizer that is intact in no folder.
    """

    out: Path
    num_units: int
    num_added: int = 0
    num_kept: int = 0
    num_alike: int = 0
    damaged: list[tuple[Path, str]] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    lacks_tokenizer: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether every unit and the tokenizer are present, and thus the index."""
        return not self.missing and not self.lacks_tokenizer

    def __str__(self) -> str:
        lines = [f"{path}: left out: {why}" for path, why in self.damaged]
        there = self.num_added + self.num_kept
        line = f"{self.out}: {there:,} of {format_count(self.num_units, 'shard')}, {self.num_added:,} of them new"
        if self.num_alike:
            line += f"; {format_count(self.num_alike, 'shard')} came twice and alike"
        lines.append(line)
        if self.missing:
            listed = ", ".join(map(str, self.missing[:_MOST_LISTED])) + ", ..." * (len(self.missing) > _MOST_LISTED)
            lines.append(
                f"not complete: {format_count(len(self.missing), 'unit')} missing ({listed}). Merge the store that has "
                "them into it, or run the same extraction there."
            )
        if self.lacks_tokenizer:
            lines.append(
                "not complete: no sound tokenizer. Merge a store that has it into it, or run 'layerprobe verify "
                "--repair' and the same extraction there."
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Copy:
    """One copy of a shard, with its parsed header."""

    folder: Path
    header: ShardHeader

    @property
    def path(self) -> Path:
        return self.folder / self.header.file


def merge(
    out: str | Path, folders: Sequence[Placed | str | Path], *, link: bool = False, progress: bool | None = None
) -> MergeReport:
    """Join stores that hold parts of the same plan.

    Args:
        out: Folder of the store: new, empty, or a store of that plan to add to.
        folders: The stores, or their paths. They are only read.
        link: Hard-link shards instead of copying them; all folders must be on one file system. Shards are never
            modified, so neither store can harm the other.
        progress: Show a progress bar; None: only on a terminal.

    Returns:
        What was done, what was damaged and which units are missing. `index.json` is written only when none is.

    Raises:
        OptionError: no folder is given, or a value of the wrong type.
        PlanError: a folder holds another plan (the error lists the fields that differ), or two folders hold different
            values of the same unit. Nothing is written.
        LockError: a run is writing into `out`.
        SpaceError: the disk cannot hold the copies.
        StoreError: a folder is not a store, or writing failed; the same call resumes.

    Cost: each byte is read twice and written once; linked, read once. 4 MiB of memory.

    Example:
        >>> import tempfile, layerprobe as lp
        >>> folder = tempfile.mkdtemp()
        >>> store = lp.extract("demo", ["The kettle whistled.", "Who left?"], folder, sites="layers.-1")
        >>> lp.merge(folder + "-whole", [folder]).is_complete
        True
    """
    if isinstance(folders, (Placed, str, Path)) or not folders:
        raise OptionError(f"folders is {folders!r}: give a list of at least one store.")
    check_flag("link", link)
    target = need_folder(find_place(out)).said
    sources = list(dict.fromkeys(need_folder(find_store(folder)).said for folder in folders))
    if not (target / STORE_FILE).exists():
        _check_new(target)
    made = [path for path in (target, *target.parents) if not path.exists()]
    try:
        make_folder(target)
        # look at the shards only under the lock, so that no run can be writing them
        with StoreLock(target):
            return _merge_into(target, sources, link, progress)
    except BaseException as error:
        for path in made:
            with contextlib.suppress(OSError):  # not empty: it holds merged files
                path.rmdir()
        if isinstance(error, OSError) and not isinstance(error, LayerProbeError):
            raise tell_failure(target, error) from error
        raise


def _merge_into(target: Path, sources: Sequence[Path], link: bool, progress: bool | None) -> MergeReport:
    has_store = (target / STORE_FILE).exists()
    descriptions = {folder: _describe(folder) for folder in [*([target] if has_store else []), *sources]}
    first, description = next(iter(descriptions.items()))
    for folder, other in descriptions.items():
        if other["fingerprint"] != description["fingerprint"]:
            differing = "; ".join(list_differences(description, other)) or "its fingerprint"
            raise PlanError(f"{folder}: holds another run than {first} ({differing}). Merge stores of one plan.")
    if not has_store:
        _check_new(target)
    report = MergeReport(target, description["plan"]["units"])
    copies = _list_copies(descriptions, report)
    if not link:
        _check_room(target, copies)
    try:
        _fill(target, copies, descriptions, report, link, progress)
    finally:
        with contextlib.suppress(OSError):
            clear_leftovers(target)
    return report


def _describe(folder: Path) -> dict[str, Any]:
    need_store(find_place(folder))
    description = load_description(find_place(folder), checks_fingerprint=True)
    plan = description.get("plan")
    if not isinstance(plan, dict) or type(plan.get("units")) is not int:
        raise PlanError(f"{folder}: has no plan that says how many units there are. Only stores of extract are merged.")
    return description


def _check_new(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise StoreError(f"{target}: is a file, not a folder. Choose another folder.")
    names = os.listdir(target) if target.is_dir() else ()
    foreign = next((name for name in names if name != LOCK_FILE and not is_leftover(name)), None)
    if foreign is not None:
        raise StoreError(f"{target}: is not a store: it holds {foreign!r}. Choose an empty or new folder.")


def _list_copies(descriptions: Mapping[Path, dict[str, Any]], report: MergeReport) -> dict[int, list[_Copy]]:
    """Find the copies of each unit, the target store's own first; refuse two copies that differ."""
    found: defaultdict[int, list[_Copy]] = defaultdict(list)
    seen: set[Path] = set()
    for folder, description in descriptions.items():
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        for name in sorted(name for name in os.listdir(folder) if parse_shard_name(name) is not None):
            try:
                header = read_header(folder / name)
                if header.fingerprint != description["fingerprint"]:
                    raise FormatError(f"belongs to another run than {STORE_FILE}")
                if header.unit >= report.num_units:
                    raise FormatError(f"is unit {header.unit}; the plan has {report.num_units}")
            except StoreError as error:
                report.damaged.append((folder / name, tell(find_place(folder), name, error)))
                continue
            found[header.unit].append(_Copy(folder, header))
    for copies in found.values():
        for other in copies[1:]:
            _compare(copies[0], other)
    return found


def _compare(one: _Copy, other: _Copy) -> None:
    if _without_places(one.header) == _without_places(other.header):
        return
    there, here = one.header.checksums, other.header.checksums
    tensors = [repr(name) for name in there if there[name] != here.get(name)] or ["counts"]
    listed = ", ".join(tensors[:3]) + (", ..." if len(tensors) > 3 else "")
    raise PlanError(
        f"{other.path}: differs from {one.path} in {listed}, though the plan is the same: they were made by other "
        "hardware or software. Leave one of the two folders out, or remove one of the two files."
    )


def _without_places(header: ShardHeader) -> ShardHeader:
    """Drop the tensor offsets from a header: the amount of padding before them is up to the writer."""
    tensors = {name: replace(entry, start=0, stop=entry.stop - entry.start) for name, entry in header.tensors.items()}
    return replace(header, tensors=tensors)


def _check_room(target: Path, copies: Mapping[int, list[_Copy]]) -> None:
    needed = sum(found[0].path.stat().st_size for found in copies.values() if found[0].folder != target)
    place = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    if needed > (free := shutil.disk_usage(place).free):
        raise SpaceError(
            f"{target}: needs {format_bytes(needed)}, the disk has {format_bytes(free)} free. Make room, choose "
            "another disk, or link the shards on the disk where they are, with link=True (--link)."
        )


def _fill(
    target: Path,
    copies: Mapping[int, list[_Copy]],
    descriptions: Mapping[Path, dict[str, Any]],
    report: MergeReport,
    link: bool,
    progress: bool | None,
) -> None:
    description = next(iter(descriptions.values()))
    clear_leftovers(target)
    (target / STAGE_FOLDER).mkdir()
    if not (target / STORE_FILE).exists():
        commit_description(target, description)
    highest_id = _bring_tokenizer(target, descriptions, report)
    if report.lacks_tokenizer:
        (target / INDEX_FILE).unlink(missing_ok=True)
    wanted = Wanted.from_description(description, highest_id)
    headers: list[ShardHeader] = []
    size = sum(copy.path.stat().st_size for found in copies.values() for copy in found[:1])
    with make_bar(size, "", progress, "B") as bar:
        for unit in range(report.num_units):
            header = _bring(target, copies.get(unit, []), wanted, report, link, bar)
            if header is None:
                report.missing.append(unit)
            else:
                headers.append(header)
    if report.is_complete:
        _check_run(target, headers, wanted)
        if not (target / INDEX_FILE).exists() or report.num_added:
            commit_index(target, headers)


def _bring(
    target: Path, copies: Sequence[_Copy], wanted: Wanted, report: MergeReport, link: bool, bar: "tqdm[Any]"
) -> ShardHeader | None:
    """Bring the first intact copy of a unit into the store, unless it is there; return its header."""
    for copy in copies:
        is_own = copy.folder == target
        place = copy.folder if is_own else _stage(target, copy, link)
        try:
            header = check_shard(find_place(place), copy.header.file, wanted, bar.update)
        except FormatError as error:
            report.damaged.append((copy.path, tell(find_place(place), copy.header.file, error)))
            # an existing index refers to a damaged shard now
            (target / INDEX_FILE if is_own else place / copy.header.file).unlink(missing_ok=True)
            continue
        if is_own or link:  # whoever wrote it may not have flushed it to disk
            flush_file(place / header.file)
        if not is_own:
            (target / INDEX_FILE).unlink(missing_ok=True)
            os.replace(place / header.file, target / header.file)
            flush_folder(target)
        report.num_added += not is_own
        report.num_kept += is_own
        report.num_alike += len(copies) - 1 - copies.index(copy)
        return header
    (target / INDEX_FILE).unlink(missing_ok=True)
    return None


def _stage(target: Path, copy: _Copy, link: bool) -> Path:
    """Link or copy a shard into the staging folder, under its own name; return the folder. A copy is flushed."""
    stage = target / STAGE_FOLDER
    path = stage / copy.header.file
    path.unlink(missing_ok=True)
    if not link:
        _copy(copy.folder, copy.header.file, path)
        return stage
    try:
        os.link(copy.path, path, follow_symlinks=False)
    except OSError as error:
        raise StoreError(
            f"{copy.path}: cannot be linked into {target} ({error.strerror or error}). Copy instead: leave link out."
        ) from error
    return stage


def _copy(folder: Path, file: str, path: Path) -> None:
    try:
        with open_inside(folder, file) as source, open(path, "xb") as sink:
            while piece := source.read(_PIECE_BYTES):
                sink.write(piece)
            sink.flush()
            os.fsync(sink.fileno())
    except StoreError:
        raise
    except OSError as error:
        raise tell_failure(path, error) from error


def _bring_tokenizer(target: Path, descriptions: Mapping[Path, dict[str, Any]], report: MergeReport) -> int | None:
    """Copy the first tokenizer that matches the plan, if the store has none; return its highest id."""
    report.lacks_tokenizer = isinstance(next(iter(descriptions.values())).get("tokenizer"), dict)
    for folder, description in descriptions.items():
        said = description.get("tokenizer")
        if not isinstance(said, dict) or not (folder / TOKENIZER_FOLDER).exists():
            continue
        try:
            highest_id = check_tokenizer(find_place(folder), said)
            if folder != target:
                partial = target / (TOKENIZER_FOLDER + ".tmp")
                remove_path(partial)
                partial.mkdir()
                for name in sorted(os.listdir(folder / TOKENIZER_FOLDER)):
                    if (folder / TOKENIZER_FOLDER / name).is_file():
                        _copy(folder, f"{TOKENIZER_FOLDER}/{name}", partial / name)
                shutil.rmtree(target / TOKENIZER_FOLDER, ignore_errors=True)
                commit_folder(partial, target / TOKENIZER_FOLDER)
            report.lacks_tokenizer = False
            return highest_id
        except FormatError as error:
            report.damaged.append((folder / TOKENIZER_FOLDER, tell(find_place(folder), TOKENIZER_FOLDER, error)))
    return None


def _check_run(target: Path, headers: Sequence[ShardHeader], wanted: Wanted) -> None:
    """Check that all units together are the examples of the plan, without a gap."""
    place = 0
    for header in headers:
        if header.first_example != place:
            raise FormatError(f"{target / header.file}: begins with example {header.first_example}, not with {place}.")
        place += header.num_examples
    if wanted.num_examples not in (None, place):
        raise FormatError(
            f"{target}: its shards hold {format_count(place, 'example')}; {STORE_FILE} says {wanted.num_examples}."
        )
