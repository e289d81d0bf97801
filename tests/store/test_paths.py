"""Paths with a name: they lead where they led, and are called what they were called."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from layerprobe.errors import FormatError, LockError, MissingExample, StoreError
from layerprobe.store.lock import StoreLock
from layerprobe.store.paths import NamedPath


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to go to; the program begins in the one above."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def test_a_path_leads_where_it_led_and_is_called_as_it_was(elsewhere: Path) -> None:
    path = NamedPath.of("acts") / "index.json"
    os.chdir(elsewhere)
    assert os.fspath(path) == str(elsewhere.parent / "acts" / "index.json")
    assert str(path) == "acts/index.json" and str(path.parent) == "acts"
    assert str(path.with_name("x")) == "acts/x" and str(NamedPath.of(".") / "x") == "x"
    assert NamedPath.of(path) is path


def test_an_open_store_stays_where_it_was_opened(elsewhere: Path, write_store: Callable[..., Any]) -> None:
    written = write_store(units=((3, 2), (4,)))
    store = lp.open(written.folder.name)
    os.chdir(elsewhere)
    for again in (store, pickle.loads(pickle.dumps(store)), lp.open(store.place), lp.open(store.folder)):
        assert torch.equal(again["layers.0"][2], lp.open(written.folder)["layers.0"][2])
    assert store.folder == written.folder and repr(store).startswith(f"Store('{written.folder.name}', ")


def test_messages_keep_the_path_that_was_given(elsewhere: Path, write_store: Callable[..., Any]) -> None:
    written = write_store(units=((3, 2), (4,)))
    name = written.folder.name
    store = lp.open(name)
    (written.folder / "shard-000000.safetensors").unlink()
    second = written.folder / "shard-000001.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    os.chdir(elsewhere)
    with pytest.raises(MissingExample, match=rf"^{name}/shard-000000\.safetensors: is gone, .* of {name}\. "):
        store["layers.0"][0]
    with pytest.raises(FormatError, match=rf"^{name}/shard-000001\.safetensors: holds "):
        store["layers.0"][2]
    os.chdir(elsewhere.parent)
    with StoreLock(written.folder), pytest.raises(LockError, match=rf"^{name}: another run"):
        lp.verify(name, repair=True)


def test_a_relative_path_in_a_folder_that_is_gone_is_refused(elsewhere: Path) -> None:
    os.chdir(elsewhere)
    elsewhere.rmdir()
    with pytest.raises(StoreError, match=r"^acts: the working folder is gone\. Give an absolute path\."):
        lp.open("acts")
