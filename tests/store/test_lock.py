"""One writer at a time: who is refused learns by whom, and no dead process holds a store."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import FaultySystem, Step
from layerprobe.errors import LockError, StoreError
from layerprobe.store import lock
from layerprobe.store.lock import LOCK_FILE, StoreLock, find_holder

HOLDER = """
import sys
from pathlib import Path
from layerprobe.store.lock import StoreLock
with StoreLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_elsewhere(folder: Path) -> "Iterator[subprocess.Popen[str]]":
    """Another process that holds the lock until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_the_second_process_is_refused_with_the_first_named(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as process:
        with pytest.raises(LockError) as caught, StoreLock(tmp_path):
            pass
        said = str(caught.value)
        assert said.startswith(f"{tmp_path}: another run is writing there (process {process.pid} on ")
        assert f"on {socket.gethostname()}, since 20" in said and f"{sys.executable} -c" in said
        assert "Wait for it or end it, and run the same command again" in said
        process.communicate("")
        assert process.returncode == 0
    with StoreLock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with StoreLock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with StoreLock(tmp_path):
        with pytest.raises(LockError, match=f"process {os.getpid()} on"), StoreLock(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()


def test_the_lock_goes_whatever_happens_under_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StoreLock(tmp_path):
        raise KeyboardInterrupt
    with StoreLock(tmp_path):
        (tmp_path / LOCK_FILE).unlink()  # somebody tidied up
    assert not list(tmp_path.iterdir())


def test_a_forked_process_that_outlives_the_holder_holds_nothing(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from layerprobe.store.lock import StoreLock
lock = StoreLock(Path(sys.argv[1])).__enter__()
if os.fork() == 0:
    print("forked", flush=True)
    sys.stdin.read()
    os._exit(0)
signal.pause()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        # the child says so: before, it may not yet have run at all
        assert process.stdout is not None and process.stdout.readline() == "forked\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL
        with StoreLock(tmp_path):
            pass


def test_a_file_whose_name_goes_while_it_is_locked_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / LOCK_FILE
    opened: list[int] = []

    def after(step: Step) -> None:
        # the holder before us ends between our open and our lock
        if step.name == "open" and not opened:
            path.unlink()
        if step.name == "open":
            opened.append(1)

    monkeypatch.setattr(lock, "os", FaultySystem(after=after))
    with StoreLock(tmp_path):
        assert len(opened) == 2 and path.exists()
        monkeypatch.undo()
        with pytest.raises(LockError), StoreLock(tmp_path):
            pass


class WithoutLocks:
    """The module `fcntl` on a file system that refuses."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __getattr__(self, name: str) -> Any:
        return getattr(fcntl, name)

    def flock(self, *_: object) -> None:
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_of_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setattr(lock, "fcntl", WithoutLocks(number))
    with StoreLock(tmp_path) as held:
        assert (tmp_path / LOCK_FILE).exists()
        # another run there, which nothing keeps out, may end first and take the file with it
        (tmp_path / LOCK_FILE).unlink()
        held.check()
    said = capsys.readouterr().err
    assert said == (
        f"layerprobe: {tmp_path}: cannot be locked ({os.strerror(number)}). Make sure that no other run writes there.\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    with StoreLock(tmp_path):
        pass
    assert "cannot be locked (Python has no file locks on this system)" in capsys.readouterr().err


def test_what_else_goes_wrong_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=r"run\.lock: cannot be written \(No such file"), StoreLock(tmp_path / "none"):
        pass
    monkeypatch.setattr(lock, "fcntl", WithoutLocks(errno.EIO))
    with pytest.raises(StoreError, match=r"run\.lock: cannot be written \(Input/output error\)"), StoreLock(tmp_path):
        pass


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b"[" * 50_000])
def test_a_holder_that_is_not_named_is_a_refusal_all_the_same(tmp_path: Path, text: bytes) -> None:
    with StoreLock(tmp_path):
        (tmp_path / LOCK_FILE).write_bytes(text)
        with pytest.raises(LockError, match=r"\(it has not said which\)"), StoreLock(tmp_path):
            pass


def test_a_full_disk_forbids_no_lock(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    with StoreLock(small_disk), pytest.raises(LockError), StoreLock(small_disk):
        pass


def test_who_looks_learns_the_holder_and_keeps_nobody_out(tmp_path: Path) -> None:
    assert find_holder(tmp_path) is None and find_holder(tmp_path / "none") is None
    with held_elsewhere(tmp_path) as process:
        said = find_holder(tmp_path)
        assert said is not None and said.startswith(f"process {process.pid} on {socket.gethostname()}, since ")
    # left behind by a process that was killed
    (tmp_path / LOCK_FILE).write_text("{}")
    assert find_holder(tmp_path) is None
    with StoreLock(tmp_path):
        pass


def test_a_run_that_begins_while_somebody_looks_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK_FILE).touch()
    with open(tmp_path / LOCK_FILE) as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        whole, calls = fcntl.flock, []

        def flock(descriptor: int, operation: int) -> None:
            calls.append(operation)
            if len(calls) == 3:  # refused, and seen that no writer is the cause
                whole(looking, fcntl.LOCK_UN)
            whole(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        with StoreLock(tmp_path):
            assert len(calls) > 3


def test_a_folder_that_was_moved_leaves_the_lock_of_the_next_one_of_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    folder.mkdir()
    first = StoreLock(folder).acquire()
    first.check()
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    with StoreLock(folder) as second:
        with pytest.raises(StoreError, match="acts: was moved, replaced or removed while the run was under way"):
            first.check()
        first.release()
        second.check()
        with pytest.raises(LockError, match="another run is writing there"):
            StoreLock(folder).acquire()
    assert not (folder / LOCK_FILE).exists()


def test_a_folder_that_a_file_has_replaced_is_one_that_was_moved(tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    folder.mkdir()
    with StoreLock(folder) as held:
        folder.rename(tmp_path / "moved")
        folder.write_text("not a folder")
        with pytest.raises(StoreError, match="was moved, replaced or removed"):
            held.check()
