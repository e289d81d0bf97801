"""Find what a folder already holds of a run: nothing, part of it, or another run.

Resuming needs no journal: a shard with an intact header that carries the plan's fingerprint is done; everything else
is missing. Must never write.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from layerprobe.capture.probe import DEFAULT_SHARD_BYTES
from layerprobe.errors import FormatError, NonFiniteError, PlanError, StoreError
from layerprobe.extract.cutting import MOST_UNIT_TOKENS, UnitRule
from layerprobe.store.format import (
    INDEX_FILE,
    PROGRESS_FILE,
    STORE_FILE,
    TOKENIZER_FOLDER,
    is_leftover,
    load_header,
    load_json,
)
from layerprobe.store.headers import FORMAT_VERSION, ShardHeader, parse_shard_name
from layerprobe.store.lock import LOCK_FILE, refuse_held
from layerprobe.store.mismatch import list_differences
from layerprobe.store.paths import NamedPath
from layerprobe.store.places import Place, find_place

__all__ = [
    "RecalledRun",
    "check_finite",
    "check_folder",
    "check_place",
    "find_done",
    "is_same_run",
    "recall_run",
    "size_units",
]

_NUM_REQUESTS = 8
# Batches are cut within a shard. 128 MiB hold 7,281 tokens of all layers of bert-base in float16: enough for a CPU,
# but less than half of a GPU batch.
_CUDA_SHARD_BYTES = 1 << 30


def check_place(place: Place) -> None:
    """Check that a store can be written at a place, as far as possible without creating anything that stays.

    Raises:
        LockError: another run is writing there.
        StoreError: it holds something other than a store, or cannot be written.
    """
    if place.folder is not None:
        check_folder(place.folder)
        refuse_held(place.folder)
        return
    if (foreign := _find_foreign(place.list_files())) is not None:
        raise StoreError(f"{place}: is not a store: it holds {foreign!r}. Choose an empty or new prefix.")


def check_folder(folder: NamedPath) -> None:
    """Check that a store can be written to a folder, without creating anything that stays."""
    try:
        place = _find_existing(folder.path)
        if not place.is_dir():
            what = "is a file, not a folder" if place == folder.path else f"{place} is not a folder"
            raise StoreError(f"{folder}: {what}. Choose another folder.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise StoreError(f"{folder}: cannot be written (no permission in {place}). Choose another folder.")
        if folder.path.is_dir() and (foreign := _find_foreign(os.listdir(folder))) is not None:
            raise StoreError(f"{folder}: is not a store: it holds {foreign!r}. Choose an empty or new folder.")
    except StoreError:
        raise
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error}). Choose another folder."
        ) from error


def _find_foreign(names: Sequence[str]) -> str | None:
    """Return the name of a file that belongs to no store; None if the place is a store or can become one."""
    if STORE_FILE in names:
        return None
    # files of a run that has just started, or was killed at the start
    ours = {LOCK_FILE, PROGRESS_FILE}
    if any(parse_shard_name(name) is not None for name in names):
        # or a store that lost its `store.json`: `find_done` checks its shards
        ours |= {INDEX_FILE, TOKENIZER_FOLDER}
    foreign = (name for name in names if name not in ours and parse_shard_name(name) is None)
    return next((name for name in foreign if not is_leftover(name)), None)


def _find_existing(path: Path) -> Path:
    """Return the nearest existing ancestor of a path; OSError for a name that no file can have."""
    while True:
        try:
            os.lstat(path)
            return path
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent


def check_finite(headers: Iterable[ShardHeader]) -> None:
    """Check that existing shards meet `nonfinite="error"`, whatever policy they were written under.

    Raises:
        NonFiniteError: a shard counts values that are not finite.
    """
    for header in headers:
        if header.nonfinite:
            listed = ", ".join(f"{count} at {site!r}" for site, count in header.nonfinite.items())
            raise NonFiniteError(
                f"{header.file}: was written with values that are not finite or do not fit the dtype: {listed}. "
                "Keep nonfinite='warn', or pass overwrite=True (--overwrite) with a wider dtype."
            )


class RecalledRun(NamedTuple):
    """The description of a stored run, and those of its values that were chosen by trial or by device."""

    said: Mapping[str, Any]
    shard_bytes: object
    batch_tokens: int
    is_flat: bool
    batch_cost: int | None
    fingerprint: object


def recall_run(place: Place) -> RecalledRun | None:
    """Read the description of the run at a place; None if there is none."""
    try:
        found = load_json(place, STORE_FILE) if place.exists(STORE_FILE) else {}
        plan = found["plan"]
        recalled = RecalledRun(
            said=found,
            shard_bytes=plan.get("shard_bytes"),
            batch_tokens=plan["batch_tokens"],
            is_flat=plan.get("padding_free") is True,
            batch_cost=cost if _is_count(cost := plan.get("batch_cost_tokens")) else None,
            fingerprint=found.get("fingerprint"),
        )
    except (AttributeError, FormatError, KeyError, TypeError):
        return None
    return recalled if _is_count(recalled.batch_tokens) else None


def is_same_run(recalled: RecalledRun | None, description: Mapping[str, Any]) -> bool:
    """Whether a place holds exactly this run, so that `--overwrite` has nothing to replace.

    The version of layerprobe and the model's revision may differ: neither changes the bytes that are written.
    """
    own = {"format": FORMAT_VERSION, **json.loads(json.dumps(description))}
    return recalled is not None and _leave_out_versions(recalled.said) == _leave_out_versions(own)


def _leave_out_versions(said: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in said.items() if key != "layerprobe"}
    if isinstance(model := said.get("model"), dict):
        kept["model"] = {key: value for key, value in model.items() if key != "revision"}
    return kept


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def size_units(rule: UnitRule, asked: int | None, recalled: RecalledRun | None, device: torch.device) -> UnitRule:
    """Set the maximum size of a run's units.

    Args:
        rule: The rest of the rule that cuts the input.
        asked: Bytes of a shard, as in the options.
        recalled: The run already in the store's place, whose sizes are kept whatever the device.
        device: Device of the model.
    """
    shard_bytes = _CUDA_SHARD_BYTES if device.type == "cuda" else DEFAULT_SHARD_BYTES
    unit_tokens: int | None = MOST_UNIT_TOKENS
    if recalled is not None:
        # any other size was given explicitly, and has to be given again
        usual = (size for size in (DEFAULT_SHARD_BYTES, _CUDA_SHARD_BYTES) if recalled.shard_bytes == size)
        shard_bytes = next(usual, shard_bytes)
        # older versions had no token limit
        said = recalled.said["plan"].get("unit_tokens")
        unit_tokens = said if _is_count(said) else None
    return replace(rule, shard_bytes=shard_bytes if asked is None else asked, unit_tokens=unit_tokens)


def find_done(where: Path | Place, description: dict[str, Any]) -> tuple[dict[int, ShardHeader], int]:
    """Find the shards of this run that are already there, and count the damaged ones.

    Raises:
        PlanError: the folder holds another run, or shards without a `store.json` that are not all of this run.
        FormatError: it holds a store of another format.
    """
    place = find_place(where)
    names = [name for name in place.list_files() if parse_shard_name(name) is not None]
    if not place.exists(STORE_FILE):
        return _adopt(place, names, description), 0
    found = load_json(place, STORE_FILE)
    if found.get("format") != FORMAT_VERSION:
        raise FormatError(
            f"{place}: holds a store of format {found.get('format')!r}, this version writes format {FORMAT_VERSION}. "
            "Choose another folder, or pass overwrite=True (--overwrite) to replace it."
        )
    if found.get("fingerprint") != description["fingerprint"]:
        raise PlanError(
            f"{place}: holds another run ({'; '.join(list_differences(found, description)) or 'its fingerprint'}). "
            "Choose another folder, repeat its options, or pass overwrite=True (--overwrite) to replace it."
        )
    done: dict[int, ShardHeader] = {}
    num_damaged = 0
    for header in _load_headers(place, names):
        if header is None:
            num_damaged += 1
        elif header.fingerprint == description["fingerprint"]:
            done[header.unit] = header
    return done, num_damaged


def _adopt(place: Place, names: Sequence[str], description: Mapping[str, Any]) -> dict[int, ShardHeader]:
    """Adopt the shards of a run whose `store.json` was lost; refuse the place if any may belong to another run."""
    done: dict[int, ShardHeader] = {}
    for name, header in zip(names, _load_headers(place, names), strict=True):
        if header is None or header.fingerprint != description["fingerprint"]:
            what = "is damaged or no shard" if header is None else "is of another run than this command asks for"
            raise PlanError(
                f"{place}: has no {STORE_FILE}, and {name} {what}. Copy {STORE_FILE} back, repeat the options of the "
                "run that was there, or choose another folder."
            )
        done[header.unit] = header
    return done


def _load_headers(place: Place, names: Sequence[str]) -> Iterator[ShardHeader | None]:
    """Read the headers of shards; None for each damaged one."""

    def load(name: str) -> ShardHeader | None:
        try:
            # drop the checksums and tensor offsets, most of a header's size and not needed here
            return replace(load_header(place, name), checksums={}, tensors={})
        except StoreError as error:
            # a server error does not mean that the shard is damaged
            if place.folder is None and not isinstance(error, FormatError):
                raise
            return None

    if place.folder is not None:
        yield from map(load, names)
        return
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        yield from pool.map(load, names)
