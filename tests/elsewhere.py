"""Stores elsewhere in tests: how patient to be, what to extract, every file of one, a copy, what is read of it."""

from dataclasses import replace
from typing import Any

from layerprobe.store.places import Place
from layerprobe.store.remote import Patience, RemotePlace

__all__ = ["OPTIONS", "PATIENCE", "SECOND", "SECRET", "SHARD_BYTES", "SHORT", "CountedPlace", "contents", "copy_store"]

# Of a key that is never to be seen in a message.
SECRET = "not-for-any-eyes"
# Long enough for a busy machine: no test waits for this time to pass.
PATIENCE = Patience(attempts=4, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=30)

SHARD_BYTES = 12_000
OPTIONS: dict[str, Any] = {"sites": "layers.*", "dtype": "float16", "shard_size": SHARD_BYTES}
# for answers that never come: what stalls does so until it is released
SHORT = replace(PATIENCE, timeout_s=2)
SECOND = "shard-000001.safetensors"


class CountedPlace(RemotePlace):
    """Counts the bytes that are read out of shards, and remembers which file each request is of."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.num_bytes = 0
        self.requests: list[str] = []

    def read(self, file: str, start: int, stop: int) -> bytes:
        data = super().read(file, start, stop)
        if file.startswith("shard-") and data:
            self.num_bytes += len(data)
            self.requests.append(file)
        return data


def contents(place: Place, folder: str = "") -> dict[str, bytes]:
    """Read every file of a store."""
    found: dict[str, bytes] = {}
    for name in place.list_files(folder):
        file = f"{folder}/{name}" if folder else name
        if name == "tokenizer":
            found.update(contents(place, file))
        else:
            found[file] = place.read(file, 0, place.size(file))
    return found


def copy_store(store: Any, place: Place) -> None:
    for file, data in contents(store.place).items():
        place.commit(file, [data])
