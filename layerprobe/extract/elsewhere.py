"""Prepare an object store for a run: clear what an ended run left, and write what precedes the shards.

Object stores have no locks and no renames. A shard is one object, written whole or not at all. If two runs of one plan
are active at once, they write the same bytes, and the last to end writes the index that either removed at its start.

Must never know of models or units.
"""

import tempfile
from pathlib import Path
from typing import Any

from layerprobe.extract.plan import Plan
from layerprobe.store.abandoned import wait_for_abandoned
from layerprobe.store.description import commit_description
from layerprobe.store.format import INDEX_FILE, STORE_FILE, TOKENIZER_FILE, TOKENIZER_FOLDER
from layerprobe.store.headers import parse_shard_name
from layerprobe.store.places import Place

__all__ = ["begin_remote"]


def begin_remote(plan: Plan) -> None:
    """Prepare a prefix for the first missing shard of a plan.

    Raises:
        StoreError: it cannot be written.
    """
    place = plan.place
    wait_for_abandoned(str(place))
    # first: an index while shards are missing would mark the store as complete
    if plan.overwrite or len(plan.done) < plan.num_units:
        place.remove(INDEX_FILE)
    if plan.overwrite:
        for name in place.list_files():
            if parse_shard_name(name) is not None:
                place.remove(name)
        for name in place.list_files(TOKENIZER_FOLDER):
            place.remove(f"{TOKENIZER_FOLDER}/{name}")
    if plan.overwrite or not place.exists(STORE_FILE):
        commit_description(place, plan.description)
    if not place.exists(TOKENIZER_FILE):
        _commit_tokenizer(plan.tokenizer, place)


def _commit_tokenizer(tokenizer: Any, place: Place) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / TOKENIZER_FOLDER
        tokenizer.save_pretrained(saved)
        names = [f"{TOKENIZER_FOLDER}/{file.name}" for file in saved.iterdir() if file.is_file()]
        # last the file whose presence marks the tokenizer as complete
        for name in sorted(names, key=lambda name: (name == TOKENIZER_FILE, name)):
            place.commit(name, [(Path(folder) / name).read_bytes()])
