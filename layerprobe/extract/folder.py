"""The folder of a run: held against other runs, cleared of what an ended one left, given what precedes the shards.

What is removed is flushed before anything new has a name, so that a power loss cannot bring back an index beside shards
that are gone. Must never know of models or units.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerprobe.errors import StoreError
from layerprobe.extract.elsewhere import begin_remote
from layerprobe.extract.plan import Plan
from layerprobe.extract.resume import check_finite, find_done
from layerprobe.extract.space import RoomKeeper
from layerprobe.extract.tokens import tokenizing
from layerprobe.store.description import commit_description
from layerprobe.store.durable import commit_folder, flush_folder, make_folder, tell_failure
from layerprobe.store.format import INDEX_FILE, STORE_FILE, TOKENIZER_FOLDER, clear_leftovers, remove_path
from layerprobe.store.headers import parse_shard_name
from layerprobe.store.lock import StoreLock
from layerprobe.store.paths import NamedPath

__all__ = ["hold_store"]


@contextlib.contextmanager
def hold_store(plan: Plan, keeper: RoomKeeper) -> Iterator[tuple[Plan, int | None]]:
    """Hold the place of a plan while it is carried out, ready for its first missing shard.

    Gives the plan with what is done listed again, since another run may have continued it meanwhile, and the
    descriptor of the lock, where there is one. No `.tmp` of the store outlives the block, and none of another run is
    touched, since none can be active.

    Raises:
        LockError: another run is writing there.
        PlanError: the folder has come to hold another run.
        StoreError: it cannot be written.
    """
    folder = plan.place.folder
    if folder is None:
        begin_remote(plan)
        yield plan, None
        return
    _need_name(folder.path)
    try:
        make_folder(folder.path)
    except OSError as error:
        raise tell_failure(folder, error) from error
    with StoreLock(folder) as lock:
        keeper.check = lock.check
        if not plan.overwrite:
            done, num_damaged = find_done(plan.place, plan.description)
            plan = replace(plan, done=done, num_damaged=num_damaged)
            if plan.options.nonfinite == "error":
                check_finite(done.values())
        try:
            try:
                _clear(folder.path, plan)
                _begin(plan, folder, keeper)
            except OSError as error:
                raise error if isinstance(error, StoreError) else tell_failure(folder, error) from error
            yield plan, lock.descriptor
        finally:
            # gives back what was kept for a unit that did not come about; a forked process holds no lock, and what is
            # there is its parent's
            if lock.descriptor is not None:
                with contextlib.suppress(OSError):
                    lock.check()  # nor is what has come to lie there
                    clear_leftovers(folder.path)


def _need_name(folder: Path) -> None:
    """Make sure that the tokenizer, which is written by a library in Rust, can be written there.

    Raises:
        StoreError: the path is not UTF-8.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise StoreError(
            f"{folder}: the path is not UTF-8, and a tokenizer cannot be written there. Choose another name, or a "
            "locale that writes it in UTF-8."
        ) from error


def _clear(folder: Path, plan: Plan) -> None:
    """Remove what an ended or replaced run left."""
    overwrite = plan.overwrite
    if (folder / INDEX_FILE).exists() and (overwrite or len(plan.done) < plan.num_units):
        # first of all, and permanently: an index beside missing shards would call the store complete
        (folder / INDEX_FILE).unlink()
        flush_folder(folder)
    clear_leftovers(folder)
    if overwrite:
        for file in list(folder.iterdir()):
            if file.name == TOKENIZER_FOLDER or parse_shard_name(file.name) is not None:
                remove_path(file)
        flush_folder(folder)


def _begin(plan: Plan, folder: NamedPath, keeper: RoomKeeper) -> None:
    """Write what comes before the first shard."""
    if not (folder / STORE_FILE).path.exists() or plan.overwrite:
        keeper.attempt(lambda: commit_description(plan.place, plan.description))
    if not (folder / TOKENIZER_FOLDER).path.exists():
        keeper.attempt(lambda: _commit_tokenizer(plan.tokenizer, folder))


def _commit_tokenizer(tokenizer: Any, folder: NamedPath) -> None:
    partial, final = (folder / (TOKENIZER_FOLDER + ".tmp")).path, folder / TOKENIZER_FOLDER
    remove_path(partial)
    try:
        try:
            with tokenizing:
                tokenizer.save_pretrained(partial)
        except OSError:
            raise
        except Exception as error:
            # the library underneath raises a bare Exception that tells the system's number in its text
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number.group(1)), str(error)) from error
        commit_folder(partial, final.path)
    except OSError as error:
        raise tell_failure(final, error) from error
