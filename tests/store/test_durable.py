"""Files that are written past the page cache, and where that cannot be: the same bytes, whole or not at all."""

import ctypes
import errno
import mmap
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from faults import FaultySystem, Step, fail
from layerprobe.errors import SpaceError, StoreError
from layerprobe.store import durable
from layerprobe.store.durable import (
    commit_file,
    commit_folder,
    is_direct_better,
    make_folder,
    reserve_file,
)
from layerprobe.store.paths import NamedPath
from layerprobe.store.places import LocalPlace

BOUNCE = 4 << 20


def _pieces(sizes: list[int]) -> list[bytes]:
    random = np.random.default_rng(0)
    return [random.bytes(size) for size in sizes]


@pytest.mark.parametrize(
    "sizes",
    [
        [BOUNCE],
        [BOUNCE - 1, 1],
        [BOUNCE + 1],
        [100, 2 * BOUNCE, 4095, 0, 1],
        [3, BOUNCE, BOUNCE - 3],
        [1, 4096, BOUNCE],
        [10, 20],
        [],
    ],
)
def test_file_holds_its_pieces_one_after_the_other(tmp_path: Path, sizes: list[int]) -> None:
    pieces = _pieces(sizes)
    commit_file(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


class Written:
    """Sees where in memory each write begins, and once it is made how much went past the page cache."""

    def __init__(self) -> None:
        self.addresses: set[int] = set()
        self.num_direct = 0

    def before(self, step: Step) -> None:
        if step.name == "write" and len(step.arguments[1]):
            self.addresses.add(_address(step.arguments[1]))

    def after(self, step: Step) -> None:
        if step.name == "write" and durable._is_direct(step.arguments[0]):
            self.num_direct += len(step.arguments[1])


def _address(piece: "bytes | memoryview") -> int:
    return np.frombuffer(piece, np.uint8).ctypes.data


@pytest.fixture
def needs_direct(tmp_path: Path) -> None:
    descriptor = durable._open(tmp_path / "probe", is_direct=True)
    try:
        if not durable._is_direct(descriptor):
            pytest.skip("this file system has no direct writes")
        os.write(descriptor, _place([4096], [512])[0])
    except OSError:
        pytest.skip("this disk wants more of an address than a sector")
    finally:
        os.close(descriptor)
        os.unlink(tmp_path / "probe")


def _place(sizes: list[int], shifts: list[int]) -> list[memoryview]:
    """Lay pieces into memory, each at an address past a multiple of 4,096 that is given."""
    pieces = []
    for size, shift in zip(sizes, shifts, strict=True):
        memory = memoryview(mmap.mmap(-1, size + shift + 1))[shift : shift + size]
        memory[:] = np.random.default_rng(size).bytes(size)
        pieces.append(memory)
    return pieces


@pytest.mark.usefixtures("needs_direct")
@pytest.mark.parametrize(
    ("sizes", "shifts", "in_place"),
    [
        # what fills a block first is taken off the large piece, whose own bytes then begin where a block does
        ([4096, 2 * BOUNCE, 5000], [8, 0, 8], [0, 1, 0]),
        ([100, BOUNCE + 512, 2 * BOUNCE], [0, 612, 0], [0, 1, 0]),
        ([100, BOUNCE], [0, 100], [0, 1]),
        ([100, BOUNCE], [0, 0], [0, 0]),
        ([BOUNCE, BOUNCE + 1], [1, 0], [0, 1]),
        ([BOUNCE // 2, BOUNCE], [512, 1024], [1, 1]),
    ],
)
def test_large_pieces_are_written_from_where_they_lie_if_they_lie_as_blocks_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], shifts: list[int], in_place: list[int]
) -> None:
    written = Written()
    monkeypatch.setattr(durable, "os", FaultySystem(written.before, written.after))
    pieces = _place(sizes, shifts)
    commit_file(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert written.num_direct == sum(sizes) - sum(sizes) % 4096
    for piece, is_there in zip(pieces, in_place, strict=True):
        start = _address(piece)
        assert any(start <= address < start + len(piece) for address in written.addresses) == is_there


@pytest.mark.usefixtures("needs_direct")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EFAULT])
@pytest.mark.parametrize("nth", [0, 1])
def test_a_disk_that_refuses_an_address_is_written_through_the_bounce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, nth: int
) -> None:
    pieces = _place([4096, BOUNCE, BOUNCE, 77], [0, 512, 512, 0])
    refused = []

    def refuse(step: Step) -> None:
        if step.name == "write" and durable._is_direct(step.arguments[0]):
            address = _address(step.arguments[1])
            if address % 4096:
                refused.append(address)
                if len(refused) > nth:
                    raise OSError(number, os.strerror(number))

    written = Written()
    monkeypatch.setattr(durable, "os", FaultySystem(refuse, written.after))
    commit_file(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    # refused once, then not asked again; and still past the page cache
    assert len(refused) == nth + 1 and written.num_direct == 4096 + 2 * BOUNCE


@pytest.mark.usefixtures("needs_direct")
@pytest.mark.parametrize("most", [4096, 3 * 4096, 5000, 100_001])
def test_a_system_that_writes_less_than_asked_is_asked_for_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    class Short(FaultySystem):
        def write(self, descriptor: int, data: memoryview) -> int:
            return os.write(descriptor, data[: most if len(data) > most else len(data)])

    pieces = _place([4096 + 8, BOUNCE // 2, BOUNCE + 7], [0, 8, 0])
    # a short write leaves whole sectors of a direct file, whatever it was asked for
    most -= most % 512
    monkeypatch.setattr(durable, "os", Short())
    commit_file(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


@pytest.mark.usefixtures("needs_direct")
@pytest.mark.parametrize("nth", [0, 1, 7])
def test_a_piece_refused_half_written_goes_on_through_the_bounce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    class Stubborn(FaultySystem):
        """Writes a few blocks a call, and from the nth of them on none from an address past a block's."""

        num_taken = 0

        def write(self, descriptor: int, data: memoryview) -> int:
            if durable._is_direct(descriptor) and _address(data) % 4096:
                if self.num_taken == nth:
                    raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
                self.num_taken += 1
            return os.write(descriptor, data[: 3 * 4096])

    system = Stubborn()
    monkeypatch.setattr(durable, "os", system)
    pieces = _place([4096, BOUNCE + 100, BOUNCE, 77], [0, 512, 0, 0])
    commit_file(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert system.num_taken == nth


@pytest.mark.usefixtures("needs_direct")
@pytest.mark.parametrize("slow", ["direct", "plain", None])
def test_the_better_way_to_a_disk_is_found_by_trying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str | None
) -> None:
    class Slow(FaultySystem):
        num_bytes = 0

        def write(self, descriptor: int, data: memoryview) -> int:
            self.num_bytes += len(data)
            if slow == ("direct" if durable._is_direct(descriptor) else "plain"):
                time.sleep(0.2)
            return os.write(descriptor, data)

    system = Slow()
    monkeypatch.setattr(durable, "os", system)
    monkeypatch.setattr(durable, "_WORTH_OF_NO_COPY", 1.5 if slow else 1e9)
    monkeypatch.setattr(durable, "_PROBE_BYTES", 1 << 20)
    assert is_direct_better(tmp_path) == (slow != "direct")
    assert system.num_bytes == 6 << 20 and not list(tmp_path.iterdir())


def test_where_there_is_but_one_way_to_a_disk_nothing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where the trial's open file would keep its name."""
    called: list[str] = []
    monkeypatch.setattr(durable, "_DIRECT", 0)
    monkeypatch.setattr(durable, "os", FaultySystem(lambda step: called.append(step.name)))
    assert is_direct_better(tmp_path) and not called


@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_what_keeps_a_disk_from_being_tried_is_no_error_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(durable, "os", FaultySystem(fail(call, errno.ENOSPC)))
    assert is_direct_better(tmp_path) and not list(tmp_path.iterdir())


def test_trying_a_disk_takes_no_memory_beside_the_block_it_writes(tmp_path: Path) -> None:
    tracemalloc.start()  # which sees what numpy and Python allocate, and no map
    try:
        is_direct_better(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.usefixtures("needs_direct")
@pytest.mark.parametrize("is_direct", [True, False])
def test_a_large_file_goes_through_the_page_cache_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_direct: bool
) -> None:
    written = Written()
    monkeypatch.setattr(durable, "os", FaultySystem(written.before, written.after))
    pieces = _place([BOUNCE + 100], [0])
    LocalPlace(NamedPath.of(tmp_path), is_direct).commit("file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert written.num_direct == (BOUNCE if is_direct else 0)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory")
def test_file_system_in_memory_is_written_the_same() -> None:
    folder = Path("/dev/shm") / f"layerprobe-test-{os.getpid()}"
    make_folder(folder)
    try:
        pieces = _pieces([7, 2 * BOUNCE, 12345])
        commit_file(folder / "file", pieces)
        assert (folder / "file").read_bytes() == b"".join(pieces)
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_large_file_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file.tmp").symlink_to("/dev/full")
    with pytest.raises(StoreError, match=r"file: cannot be written \(No space left on device\)"):
        commit_file(tmp_path / "file", _pieces([BOUNCE + 1]))
    assert not (tmp_path / "file").exists()


def test_folders_are_made_with_those_above_them(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_is_committed_whole_with_the_folders_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words.tmp" / "more").mkdir(parents=True)
    for name in ("a", "more/b"):
        (tmp_path / "words.tmp" / name).write_bytes(b"x")
    flushed: list[int] = []
    steps = FaultySystem(lambda step: flushed.append(step.inode) if step.name == "fsync" else None)
    monkeypatch.setattr(durable, "os", steps)
    commit_folder(tmp_path / "words.tmp", tmp_path / "words")
    every = [tmp_path / "words", *(tmp_path / "words").rglob("*")]
    assert {file.stat().st_ino for file in every} | {tmp_path.stat().st_ino} == set(flushed)
    assert flushed[-1] == tmp_path.stat().st_ino and [file.name for file in tmp_path.iterdir()] == ["words"]


# Within a block, a block and more, and large enough to go past the page cache.
SIZES = [0, 10, 4096, 5000, BOUNCE - 1, BOUNCE + 4095, 3 * BOUNCE]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spare", [0, 1, 100_000])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_file_is_written_into_the_space_reserved_for_it(tmp_path: Path, size: int, spare: int, shift: int) -> None:
    pieces = _place([size], [shift])
    reserve_file(tmp_path / "file", size + spare)
    reserved = (tmp_path / "file.tmp").stat()
    commit_file(tmp_path / "file", pieces)
    written = (tmp_path / "file").stat()
    assert (tmp_path / "file").read_bytes() == pieces[0]
    assert written.st_ino == reserved.st_ino
    # a whole block may stay for the last bytes
    assert written.st_blocks * 512 <= size + _block_bytes(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def _block_bytes(folder: Path) -> int:
    return max(4096, os.statvfs(folder).f_bsize)


def test_reserved_space_is_taken_from_what_is_free(small_disk: Path) -> None:
    before = shutil.disk_usage(small_disk).free
    reserve_file(small_disk / "file", 1 << 20)
    assert before - shutil.disk_usage(small_disk).free >= 1 << 20
    commit_file(small_disk / "file", _pieces([1 << 20]))
    assert before - shutil.disk_usage(small_disk).free < (1 << 20) + 4 * 4096


def test_what_is_missing_is_told_in_bytes_and_nothing_is_left(small_disk: Path) -> None:
    free = shutil.disk_usage(small_disk).free
    message = rf"takes {free + 5:,} bytes, the disk has {free:,} free, 5 are missing.*Make room on the disk"
    with pytest.raises(SpaceError, match=message):
        reserve_file(small_disk / "file", free + 5)
    assert not list(small_disk.iterdir()) and shutil.disk_usage(small_disk).free == free
    with pytest.raises(SpaceError, match=r"file: cannot be written \(No space left on device\): it takes"):
        commit_file(small_disk / "file", _place([free, 4096], [0, 0]))
    assert not (small_disk / "file").exists()


@pytest.mark.parametrize("folder", ["", "/dev/shm"])
def test_reserved_blocks_are_the_files_own(tmp_path: Path, folder: str) -> None:
    if not Path(folder).is_dir():
        pytest.skip("needs a file system in memory")
    path = Path(folder or tmp_path) / f"layerprobe-test-{os.getpid()}"
    partial = path.with_name(path.name + ".tmp")
    reserve_file(path, BOUNCE + 5)
    try:
        said = partial.stat()
        assert said.st_size == BOUNCE + 5 and said.st_blocks * 512 >= BOUNCE + 5
    finally:
        partial.unlink()


@pytest.fixture
def plain_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB that cannot set space aside, where one may be mounted."""
    image, disk = tmp_path / "image", tmp_path / "plain"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(4 << 20)
    for command in (["mkfs.ext2", "-q", str(image)], ["mount", "-o", "loop", str(image), str(disk)]):
        if not shutil.which(command[0]) or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_where_space_cannot_be_set_aside_nothing_is_written_to_set_it_aside(plain_disk: Path) -> None:
    reserve_file(plain_disk / "file", 1 << 20)
    assert (plain_disk / "file.tmp").stat().st_blocks == 0
    pieces = _pieces([1 << 20])
    commit_file(plain_disk / "file", pieces)
    assert (plain_disk / "file").read_bytes() == pieces[0]
    free = shutil.disk_usage(plain_disk).free
    with pytest.raises(SpaceError, match=rf"takes {free + 5:,} bytes, the disk has {free:,} free, 5 are missing"):
        reserve_file(plain_disk / "more", free + 5)
    assert not (plain_disk / "more.tmp").exists()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, None])
def test_without_a_way_to_reserve_what_is_free_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    refuse = None if number is None else FaultySystem(fail("fallocate", number)).fallocate
    monkeypatch.setattr(durable, "_fallocate", refuse)
    reserve_file(tmp_path / "file", 4096)
    assert (tmp_path / "file.tmp").stat().st_blocks == 0
    with pytest.raises(SpaceError, match=r"takes [\d,]+ bytes, the disk has [\d,]+ free, [\d,]+ are missing"):
        reserve_file(tmp_path / "file", 1 << 60)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's own call does it")
def test_a_call_that_a_signal_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [errno.EINTR, errno.EINTR, 0]

    def answer(*_: object) -> int:
        ctypes.set_errno(numbers.pop(0))
        return -1 if numbers else 0

    reserve = durable._wrap_fallocate(answer)
    reserve(0, 0, 4096)
    assert not numbers
    numbers += [errno.EDQUOT, 0]
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EDQUOT))):
        reserve(0, 0, 4096)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, SpaceError),
        (errno.EDQUOT, SpaceError),
        (errno.EIO, StoreError),
        (errno.EROFS, StoreError),
        (errno.EFBIG, StoreError),
    ],
)
@pytest.mark.parametrize("call", ["open", "write", "ftruncate", "fsync", "replace"])
def test_a_refusal_of_the_system_names_its_cause_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, kind: type[StoreError]
) -> None:
    commit_file(tmp_path / "before", [b"kept"])
    monkeypatch.setattr(durable, "os", FaultySystem(fail(call, number)))
    for pieces in (*map(_pieces, ([9], [BOUNCE + 9])), _place([BOUNCE + 9], [0])):
        with pytest.raises(
            StoreError, match=rf"file: cannot be written \({re.escape(os.strerror(number))}\)"
        ) as caught:
            commit_file(tmp_path / "file", pieces)
        assert type(caught.value) is kind and "hat was committed before stays readable" in str(caught.value)
        assert not (tmp_path / "file").exists()
    assert (tmp_path / "before").read_bytes() == b"kept"
    monkeypatch.undo()
    commit_file(tmp_path / "file", [b"now"])
    assert (tmp_path / "file").read_bytes() == b"now" and not (tmp_path / "file.tmp").exists()


def test_a_limit_on_the_size_of_files_is_an_error_not_a_signal(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from layerprobe.errors import StoreError
from layerprobe.store.durable import commit_file, reserve_file
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for act in (lambda path: reserve_file(path, 60_000), lambda path: commit_file(path, [bytes(60_000)])):
    try:
        act(Path(sys.argv[1], "file"))
    except StoreError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.count("file: cannot be written (File too large)") == 2
