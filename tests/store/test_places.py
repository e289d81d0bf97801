"""Places: the same promises from a folder, from memory and from an S3 server."""

import pickle
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import layerprobe
from layerprobe.errors import OptionError, StoreError
from layerprobe.models import LoadedModel
from layerprobe.store.paths import NamedPath
from layerprobe.store.places import LocalPlace, Place, find_place, need_folder
from layerprobe.store.reader import Store
from layerprobe.store.remote import Patience, RemotePlace


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "local":
        (tmp_path / "acts").mkdir()
        yield LocalPlace(NamedPath.of(tmp_path / "acts"))
    elif request.param == "memory":
        yield RemotePlace(f"memory://{uuid.uuid4()}/acts")
    else:
        yield RemotePlace(request.getfixturevalue("bucket") + "/acts")


def test_what_is_committed_is_read_back_whole_and_in_part(place: Place) -> None:
    place.commit("a.bin", [b"0123", memoryview(b"456"), b"", memoryview(bytearray(b"789"))])
    assert place.exists("a.bin") and place.size("a.bin") == 10
    assert place.read("a.bin", 0, 10) == b"0123456789"
    assert place.read("a.bin", 3, 8) == b"34567"
    assert place.read("a.bin", 4, 4) == b""


def test_pieces_of_many_bytes_arrive_in_their_order(place: Place) -> None:
    pieces = [bytes([number]) * (100_000 * number + 7) for number in range(12)]
    place.commit("large.bin", pieces)
    assert place.read("large.bin", 0, sum(map(len, pieces))) == b"".join(pieces)


def test_a_commit_replaces_what_was_there(place: Place) -> None:
    place.commit("a.bin", [b"a long one"])
    place.commit("a.bin", [b"short"])
    assert place.size("a.bin") == 5 and place.read("a.bin", 0, 5) == b"short"


def test_a_listing_names_files_and_folders_but_not_what_is_deeper(place: Place) -> None:
    assert place.list_files() == [] and place.list_sizes() == {}
    place.commit("a.bin", [b"1"])
    place.commit("b.bin", [b"22"])
    place.commit("deep/c.bin", [b"333"])
    assert sorted(place.list_files()) == ["a.bin", "b.bin", "deep"]
    assert place.list_files("deep") == ["c.bin"] and place.list_files("nowhere") == []
    assert place.list_sizes() == {"a.bin": 1, "b.bin": 2}


def test_what_is_removed_is_gone_and_may_be_removed_again(place: Place) -> None:
    place.commit("a.bin", [b"1"])
    place.remove("a.bin")
    assert not place.exists("a.bin") and place.list_files() == []
    place.remove("a.bin")


def test_a_file_that_is_not_there_is_an_error_that_names_it(place: Place) -> None:
    assert not place.exists("none.bin")
    for ask in (lambda: place.read("none.bin", 0, 4), lambda: place.size("none.bin")):
        with pytest.raises(StoreError, match=r"acts/none\.bin: cannot be read"):
            ask()


def test_bytes_beyond_the_end_are_an_error_not_a_short_answer(place: Place) -> None:
    place.commit("a.bin", [b"0123"])
    with pytest.raises(StoreError, match=r"acts/a\.bin: cannot be read"):
        find_place(quick(place)).read("a.bin", 2, 6)


def quick(place: Place) -> Place:
    """The same place, where waiting is short."""
    return RemotePlace(place.url, Patience(2, 0, 0)) if isinstance(place, RemotePlace) else place


def test_a_place_can_be_pickled(place: Place) -> None:
    place.commit("a.bin", [b"0123"])
    again: Place = pickle.loads(pickle.dumps(place))
    assert str(again) == str(place) and again.read("a.bin", 1, 3) == b"12"


def test_paths_are_folders_urls_are_not_and_a_place_is_itself(tmp_path: Path) -> None:
    for where in (tmp_path, str(tmp_path)):
        assert isinstance(find_place(where), LocalPlace) and need_folder(find_place(where)).path == tmp_path
    remote = find_place("memory://acts/")
    assert remote.folder is None and str(remote) == "memory://acts" and remote.label("x") == "memory://acts/x"
    assert find_place(remote) is remote
    with pytest.raises(StoreError, match="memory://acts: is not a folder of this machine"):
        need_folder(remote)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "ftp://host/acts",
            r"ftp://host/acts: stores do not lie under ftp://\. Give a local path, or .* s3://, gs://, hf",
        ),
        ("file:///acts", "stores do not lie under file://"),
        ("s3://", "names no store. Give a bucket and a prefix: s3://bucket/acts"),
        ("memory:///", "names no store"),
    ],
)
def test_other_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        find_place(url)


@pytest.mark.parametrize("where", [None, 3, True, b"acts", print, LocalPlace, ["acts"]])
def test_what_names_no_place_is_refused(where: Any) -> None:
    for find in (find_place, layerprobe.open):
        with pytest.raises(OptionError, match=r"names no store: give a path, or a URL such as s3://bucket/acts\."):
            find(where)


def test_an_open_store_is_taken_as_what_names_it_is(tiny: LoadedModel, tmp_path: Path) -> None:
    store = layerprobe.extract(tiny, ["The fox.", "A dog."], tmp_path / "acts", sites="layers.0")
    assert layerprobe.verify(store).ok and layerprobe.status(store).state == "complete"
    assert layerprobe.audit(store, tiny) == layerprobe.audit(tmp_path / "acts", tiny)
    assert layerprobe.merge(tmp_path / "whole", [store]).is_complete
    alone: Any = store
    with pytest.raises(OptionError, match="give a list of at least one store"):
        layerprobe.merge(tmp_path / "other", alone)
    for what in (Store, None):
        wrong: Any = what
        with pytest.raises(OptionError, match="names no store: give a path"):
            layerprobe.verify(wrong)


def test_no_name_at_all_is_not_the_folder_of_the_program() -> None:
    with pytest.raises(OptionError, match=r"'' names no store: give a path"):
        find_place("")
    assert find_place(".") == find_place(Path("."))


@pytest.mark.parametrize(
    ("url", "module", "message"),
    [
        ("memory://acts", "fsspec", r"memory:// needs fsspec.*pip install 'layerprobe\[remote\]'"),
        (
            "s3://bucket/acts",
            "s3fs",
            r"s3:// needs s3fs, which is not installed\. Run pip install 'layerprobe\[remote\]'",
        ),
        ("gs://bucket/acts", "gcsfs", r"gs:// needs gcsfs, which is not installed\. Run pip install 'gcsfs'"),
    ],
)
def test_what_is_not_installed_is_named_in_one_line(
    url: str, module: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OptionError, match=message) as caught:
        find_place(url)
    assert "\n" not in str(caught.value)


def test_a_hub_that_may_not_be_asked_is_asked_once() -> None:
    """The tests run with HF_HUB_OFFLINE."""
    with pytest.raises(StoreError, match="offline mode is enabled") as caught:
        layerprobe.open("hf://datasets/someone/acts")
    assert "attempts" not in str(caught.value)


def test_a_password_in_a_url_is_not_repeated() -> None:
    with pytest.raises(OptionError, match=r"ftp://host/acts") as caught:
        find_place("ftp://me:hush@host/acts?token=hush")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"attempts": 0}, {"first_wait_s": -1}, {"longest_wait_s": -1}, {"timeout_s": 0}])
def test_patience_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="ask for at least one attempt"):
        Patience(**changes)


def test_waits_grow_up_to_their_bound() -> None:
    patience = Patience(first_wait_s=1, longest_wait_s=5)
    for attempt, longest in enumerate((1, 2, 4, 5, 5), 1):
        waits = [patience.wait_s(attempt) for _ in range(50)]
        assert longest / 2 <= min(waits) and max(waits) <= longest and len(set(waits)) > 1
