"""Prepare the folder of a run: lock it, clear what an ended run left, and write what precedes the shards.

Removals are flushed before any new file is named, so that a power loss cannot bring back an index while its shards are
gone. Must never know of models or units.
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
    """Lock the store of a plan while it runs, and prepare it for the first missing shard.

    Yields the plan, with its done shards listed again because another run may have continued it meanwhile, and the
    descriptor of the lock, or None. The store's `.tmp` files are removed on exit; with the lock held, no other run can
    own one.

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
            # free the space reserved for an unfinished unit; a forked child does not hold the lock, and the files are
            # its parent's
            if lock.is_held:
                with contextlib.suppress(OSError):
                    lock.check()  # nor the files of a folder that has taken this one's place
                    clear_leftovers(folder.path)


def _need_name(folder: Path) -> None:
    """Check that the path is UTF-8, as the Rust library that writes the tokenizer requires.

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
    """Remove the files of an ended or replaced run."""
    overwrite = plan.overwrite
    if (folder / INDEX_FILE).exists() and (overwrite or len(plan.done) < plan.num_units):
        # first, and durably: an index while shards are missing would mark the store as complete
        (folder / INDEX_FILE).unlink()
        flush_folder(folder)
    clear_leftovers(folder)
    if overwrite:
        for file in list(folder.iterdir()):
            if file.name == TOKENIZER_FOLDER or parse_shard_name(file.name) is not None:
                remove_path(file)
        flush_folder(folder)


def _begin(plan: Plan, folder: NamedPath, keeper: RoomKeeper) -> None:
    """Write the description and the tokenizer, which precede the first shard."""
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
            # the tokenizers library raises a bare Exception that has the errno only in its text
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number.group(1)), str(error)) from error
        commit_folder(partial, final.path)
    except OSError as error:
        raise tell_failure(final, error) from error
