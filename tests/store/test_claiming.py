"""A place for a new store: empty, and held."""

from pathlib import Path

import pytest

from layerprobe.errors import LockError, StoreError
from layerprobe.store.claiming import claim_place


def test_a_new_folder_is_made_with_its_parents_and_locked(tmp_path: Path) -> None:
    lock = claim_place(tmp_path / "a" / "b")
    assert lock is not None
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["run.lock"]
    with pytest.raises(LockError, match=r"b: another run is writing there \(process \d+ on "):
        claim_place(tmp_path / "a" / "b")
    lock.release()
    assert not list((tmp_path / "a" / "b").iterdir())
    again = claim_place(tmp_path / "a" / "b")
    assert again is not None
    again.release()


def test_a_folder_that_holds_something_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    with pytest.raises(StoreError, match="is not a store: it holds 'notes'"):
        claim_place(tmp_path)
    (tmp_path / "store.json").touch()
    with pytest.raises(StoreError, match="holds another run"):
        claim_place(tmp_path)
    with pytest.raises(StoreError, match="cannot be written"):
        claim_place(tmp_path / "notes" / "below")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes", "store.json"]
