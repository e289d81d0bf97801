"""Claim a place for a new store: check that it is empty, and lock it before anything is written.

Must never know what will be written.
"""

from collections.abc import Sequence
from pathlib import Path

from layerprobe.errors import StoreError, telling_refusals
from layerprobe.store.abandoned import wait_for_abandoned
from layerprobe.store.durable import make_folder
from layerprobe.store.format import STORE_FILE
from layerprobe.store.lock import LOCK_FILE, StoreLock
from layerprobe.store.places import Place, find_place

__all__ = ["claim_place"]


def claim_place(where: Path | Place) -> StoreLock | None:
    """Check that a place is empty, and lock it for a new store.

    Returns:
        The folder's lock, acquired; the caller releases it. None for a remote place: object stores have no locks.

    Raises:
        LockError: another run is writing there.
        StoreError: it is not empty, or cannot be written.
    """
    place = find_place(where)
    folder = place.folder
    if folder is None:
        wait_for_abandoned(str(place))
        _refuse_content(place, place.list_files())
        return None
    with telling_refusals(folder, "written", "Choose another folder."):
        make_folder(folder.path)
        lock = StoreLock(folder).acquire()
    try:
        _refuse_content(place, [name for name in place.list_files() if name != LOCK_FILE])
    except BaseException:
        lock.release()
        raise
    return lock


def _refuse_content(place: Place, names: Sequence[str]) -> None:
    if names:
        what = "holds another run" if STORE_FILE in names else f"is not a store: it holds {names[0]!r}"
        raise StoreError(f"{place}: {what}. Choose an empty or new folder.")
