"""Faults under a run: system calls that fail, processes that die, and a disk that forgets what was not flushed.

`FaultySystem` stands in for the module `os` where a file of the store takes its calls from, tells a function of each
call before it is made, and passes it on; `fallocate` stands in for the call by which space is reserved, which `os` has
not. The file system underneath is a real one.
"""

import os
import random
import stat
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import safe_open

import layerprobe as lp
from layerprobe.store import durable
from layerprobe.store.format import read_header

# What changes a store, or makes a change permanent.
CALLS = ("open", "fallocate", "write", "ftruncate", "fsync", "close", "replace")
_FALLOCATE = durable._fallocate


@dataclass(frozen=True)
class Step:
    """A call of the system that is about to be made."""

    name: str
    arguments: tuple[Any, ...]

    @property
    def inode(self) -> int:
        """Of the file that an open descriptor stands for."""
        return os.fstat(self.arguments[0]).st_ino


class FaultySystem:
    """The module `os`, with a function that is told of each call and may raise, or kill, instead of it.

    Calls of several threads take turns, so that what a function looks at holds still.
    """

    def __init__(
        self, before: Callable[[Step], object] | None = None, after: Callable[[Step], object] | None = None
    ) -> None:
        self._before = before
        self._after = after
        self._turn = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        real: Any = _FALLOCATE if name == "fallocate" else getattr(os, name)
        if name not in CALLS:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            step = Step(name, arguments)
            with self._turn:
                if self._before is not None:
                    self._before(step)
                result = real(*arguments, **options)
                if self._after is not None:
                    self._after(step)
                return result

        return call


def fail(name: str, number: int, nth: int = 0) -> Callable[[Step], None]:
    """Let the calls of one kind fail with an error of the system, from the nth on, counted from 0."""
    seen = 0

    def before(step: Step) -> None:
        nonlocal seen
        if step.name == name:
            seen += 1
            if seen > nth:
                if name == "close":  # a descriptor is gone whatever its last flush said
                    os.close(step.arguments[0])
                raise OSError(number, os.strerror(number))

    return before


class ForgetfulDisk:
    """What a disk holds of a folder after a power loss, as far as the flushes of a run oblige it.

    Contents are kept as they were when their file was last flushed, names as they were when their folder was. What was
    not flushed may be there or not: `lose_power` leaves it out, takes every name at once but no content that was not
    flushed, or draws for each name.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._held: dict[int, int] = {}
        weakref.finalize(self, _close_all, self._held)

    def remember(self) -> None:
        """Take all that is there now for flushed."""
        for folder in (self.root, *(path for path in self.root.rglob("*") if path.is_dir())):
            self._names[self._hold(folder)] = {file.name: self._hold(file) for file in folder.iterdir()}
        for file in self.root.rglob("*"):
            if file.is_file():
                self._contents[self._hold(file)] = file.read_bytes()

    def watch(self, step: Step) -> None:
        """Take note of a call that was made; for `FaultySystem(after=...)`."""
        if step.name != "fsync":
            return
        descriptor = step.arguments[0]
        inode = self._hold(f"/proc/self/fd/{descriptor}")
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self._names[inode] = {name: self._hold(name, descriptor) for name in os.listdir(descriptor)}
        else:
            with open(f"/proc/self/fd/{descriptor}", "rb") as file:
                self._contents[inode] = file.read()

    def lose_power(self, survivor: Path, metadata: str, seed: int = 0) -> None:
        """Write down what a disk may hold now.

        Args:
            survivor: Where to; made here.
            metadata: `flushed` for names as they were flushed, `all` for names as they are, `some` for a draw.
            seed: Of the draw.
        """
        draw = random.Random(seed)
        survivor.mkdir()
        if self.root.exists():
            self._restore(
                self.root.stat().st_ino,
                self.root,
                survivor,
                lambda: metadata == "all" or (metadata == "some" and draw.random() < 0.5),
            )

    def _hold(self, name: str | Path, folder: int | None = None) -> int:
        """Keep a file open by its path alone, which holds no lock of its; gives its inode."""
        descriptor = os.open(name, os.O_PATH, dir_fd=folder)
        inode = os.fstat(descriptor).st_ino
        if self._held.setdefault(inode, descriptor) != descriptor:
            os.close(descriptor)
        return inode

    def _restore(self, inode: int, current: Path | None, target: Path, takes_current: Callable[[], bool]) -> None:
        flushed = self._names.get(inode, {})
        now = {file.name: file for file in current.iterdir()} if current is not None and current.is_dir() else {}
        for name in sorted(flushed.keys() | now.keys()):
            if takes_current():
                if name not in now:
                    continue
                found, place = now[name].lstat().st_ino, now[name]
            elif name in flushed:
                found = flushed[name]
                place = next((file for file in now.values() if file.lstat().st_ino == found), None)
            else:
                continue
            if found in self._names or (place is not None and place.is_dir()):
                (target / name).mkdir()
                self._restore(found, place, target / name, takes_current)
            else:
                # not flushed: the length may be there before the data
                size = place.lstat().st_size if place is not None else 0
                (target / name).write_bytes(self._contents.get(found, bytes(size)))


def _close_all(held: dict[int, int]) -> None:
    for descriptor in held.values():
        os.close(descriptor)


def check_shards(folder: Path) -> int:
    """Hold every committed shard of a store against its own checksums with a stock reader; gives their number."""
    paths = sorted(folder.glob("shard-*.safetensors"))
    for path in paths:
        checksums = read_header(path).checksums
        raw = path.read_bytes()
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(checksums)
        for name, entry in read_header(path).tensors.items():
            assert xxhash.xxh3_64_hexdigest(raw[entry.start : entry.stop]) == checksums[name], f"{path}: {name}"
    if (folder / "store.json").exists():
        store = lp.open(folder)
        assert store.num_shards == len(paths)
        assert not store.is_complete or len(store) == sum(read_header(path).num_examples for path in paths)
    return len(paths)
