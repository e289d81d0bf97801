"""Files that are written past the page cache, and where that cannot be: the same bytes, whole or not at all."""

import os
from pathlib import Path

import numpy as np
import pytest

from layerprobe.errors import StoreError
from layerprobe.store import durable
from layerprobe.store.durable import commit_file, flush_tree, make_folder

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


def test_large_file_goes_past_the_page_cache_where_it_can(tmp_path: Path) -> None:
    descriptor = durable._open(tmp_path / "file", is_direct=True)
    try:
        if not durable._is_direct(descriptor):
            pytest.skip("this file system has no direct writes")
        durable._write_direct(descriptor, _pieces([BOUNCE + 5000]))
        assert not durable._is_direct(descriptor)  # the last bytes fill no block
    finally:
        os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == _pieces([BOUNCE + 5000])[0]


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
    (tmp_path / "a" / "b" / "file").write_bytes(b"x")
    flush_tree(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"x"
