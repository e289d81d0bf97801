"""Push and pull against a hub that is a folder: what is sent, what is refused, and what is left after a failure."""

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import layerprobe as lp
from layerprobe.errors import FormatError, OptionError, PlanError, SpaceError, StoreError
from layerprobe.models import LoadedModel
from layerprobe.store.hub import pull, push

extract: Any = lp.extract
URL = "hf://datasets/someone/acts"


class FolderHub:
    """The calls of `huggingface_hub.HfApi` that a store takes, by their own names and arguments, on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commits: list[list[str]] = []
        self.names: dict[str, str] = {}
        self.sizes: dict[str, Any] = {}
        self.error: Exception | None = None

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert repo_id == "someone/acts" and repo_type == "dataset" and exist_ok
        self.private = private
        self.folder.mkdir(exist_ok=True)
        (self.folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")

    def dataset_info(self, repo_id: str, *, revision: str | None, files_metadata: bool) -> Any:
        if self.error is not None:
            raise self.error
        self.revision = revision
        assert files_metadata
        files = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        siblings = [
            SimpleNamespace(
                rfilename=self.names.get(name, name), size=self.sizes.get(name, (self.folder / name).stat().st_size)
            )
            for name in files
        ]
        return SimpleNamespace(sha="c0ffee", siblings=siblings)

    def upload_folder(self, *, repo_id: str, folder_path: str, repo_type: str, allow_patterns: list[str]) -> None:
        assert repo_type == "dataset"
        self.commits.append(self._copy(Path(folder_path), self.folder, allow_patterns))

    def upload_file(self, *, path_or_fileobj: str, path_in_repo: str, repo_id: str, repo_type: str) -> None:
        shutil.copy(path_or_fileobj, self.folder / path_in_repo)
        self.commits.append([path_in_repo])

    def hf_hub_download(self, repo_id: str, filename: str, *, repo_type: str) -> str:
        return str(self.folder / filename)

    def snapshot_download(
        self, repo_id: str, *, repo_type: str, revision: str, local_dir: str, allow_patterns: list[str]
    ) -> str:
        assert revision == "c0ffee" and repo_type == "dataset"
        (Path(local_dir) / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        (Path(local_dir) / ".cache" / "huggingface" / "store.json.metadata").write_text("c0ffee")
        self._copy(self.folder, Path(local_dir), allow_patterns)
        return local_dir

    def _copy(self, source: Path, target: Path, patterns: list[str]) -> list[str]:
        names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        names = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
        return sorted(names)


@pytest.fixture
def hub(tmp_path: Path) -> FolderHub:
    return FolderHub(tmp_path / "hub")


@pytest.fixture
def acts(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> Path:
    assert extract(tiny, texts, tmp_path / "acts", shard_size=20_000).num_shards >= 3
    return tmp_path / "acts"


@pytest.fixture
def pushed(hub: FolderHub, acts: Path) -> FolderHub:
    push(acts, URL, api=hub)
    return hub


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_store_comes_back_as_it_went(hub: FolderHub, acts: Path, tmp_path: Path) -> None:
    before = contents(acts)
    (acts / "notes.txt").write_text("mine, not the store's")
    sent = push(acts, URL, private=True, api=hub)
    assert hub.private and sent.num_files == len(before) and sent.num_bytes == sum(map(len, before.values()))
    # the index says that all is there, so it goes last and alone
    assert hub.commits[-1] == ["index.json"] and "index.json" not in hub.commits[0]
    (hub.folder / "README.md").write_text("a card")
    came = pull(f"{URL}@v1", tmp_path / "back", api=hub)
    assert hub.revision == "v1" and came.num_files == sent.num_files
    assert contents(tmp_path / "back") == before
    assert str(came).startswith(f"{URL}@v1 -> {tmp_path / 'back'}: {len(before)} files, ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts", "back", "hub"]
    push(acts, URL, api=hub)  # again, without harm


def test_a_store_that_is_not_whole_is_not_sent(hub: FolderHub, acts: Path) -> None:
    path = acts / "shard-000001.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(FormatError, match=r"shard-000001\.safetensors: holds"):
        push(acts, URL, api=hub)
    path.write_bytes(raw)
    (acts / "index.json").unlink()
    with pytest.raises(StoreError, match="acts: is not complete"):
        push(acts, URL, api=hub)
    assert not hub.folder.exists()


def test_a_repository_of_another_run_or_of_something_else_is_left_alone(
    pushed: FolderHub, tiny: LoadedModel, acts: Path, tmp_path: Path
) -> None:
    before = contents(pushed.folder)
    extract(tiny, ["another"], tmp_path / "other")
    with pytest.raises(PlanError, match=r"someone/acts: holds another run than .*other"):
        push(tmp_path / "other", URL, api=pushed)
    assert contents(pushed.folder) == before
    (pushed.folder / "train.csv").write_text("a,b")
    with pytest.raises(FormatError, match=r"is not a store: it holds 'train\.csv'"):
        push(acts, URL, api=pushed)


@pytest.mark.parametrize(
    "name",
    [
        "../shard-000001.safetensors",
        "/etc/passwd",
        "shard-000001.safetensors/../../x",
        "tokenizer/../../x.json",
        "tokenizer/run.py",
        "tokenizer/.hidden.json",
        "model.bin",
        "acts/store.json",
        "shard-1.safetensors",
        "..\\x",
        "README.md/x",
    ],
)
def test_a_name_that_no_store_has_is_refused_before_anything_is_fetched(
    pushed: FolderHub, tmp_path: Path, name: str
) -> None:
    pushed.names["shard-000001.safetensors"] = name
    with pytest.raises(FormatError, match="is not a store: it holds "):
        pull(URL, tmp_path / "back", api=pushed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts", "hub"]


def damage_header(hub: Path) -> None:
    path = hub / "shard-000001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[40] ^= 1
    path.write_bytes(raw)


def damage_fingerprint(hub: Path) -> None:
    said = json.loads((hub / "store.json").read_text())
    (hub / "store.json").write_text(json.dumps({**said, "fingerprint": "0" * 32}))


def damage_index(hub: Path) -> None:
    said = json.loads((hub / "index.json").read_text())
    said["shards"][1]["file"] = "../acts/shard-000001.safetensors"
    (hub / "index.json").write_text(json.dumps(said))


@pytest.mark.parametrize("damage", [damage_header, damage_fingerprint, damage_index])
def test_a_damaged_or_hostile_store_is_refused_and_nothing_is_left(
    pushed: FolderHub, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(pushed.folder)
    with pytest.raises(FormatError):
        pull(URL, tmp_path / "back", api=pushed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts", "hub"]


def test_a_file_of_another_size_than_listed_is_refused(pushed: FolderHub, tmp_path: Path) -> None:
    pushed.sizes["shard-000001.safetensors"] = 77
    with pytest.raises(FormatError, match=r"shard-000001\.safetensors: came with \d+ bytes; the hub lists 77"):
        pull(URL, tmp_path / "back", api=pushed)
    pushed.sizes["shard-000001.safetensors"] = None
    with pytest.raises(FormatError, match="has no size"):
        pull(URL, tmp_path / "back", api=pushed)
    pushed.sizes["shard-000001.safetensors"] = 1 << 60
    with pytest.raises(SpaceError, match=r"needs .* more, the disk has"):
        pull(URL, tmp_path / "back", api=pushed)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(("file", "message"), [("store.json", "is not a store"), ("index.json", "is not complete")])
def test_what_is_no_complete_store_is_not_fetched(pushed: FolderHub, tmp_path: Path, file: str, message: str) -> None:
    (pushed.folder / file).unlink()
    with pytest.raises(StoreError, match=message):
        pull(URL, tmp_path / "back", api=pushed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts", "hub"]


def test_a_pull_that_broke_off_is_gone_on_with(
    pushed: FolderHub, acts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = pushed.snapshot_download

    def break_off(*arguments: Any, local_dir: str, **options: Any) -> str:
        (Path(local_dir) / "shard-000000.safetensors").write_bytes(b"half")
        (Path(local_dir) / "shard-000099.safetensors").write_bytes(b"of an older revision")
        raise ConnectionError("peer went away, Bearer hf_AbCdEfGhIjKlMnOp\nsecond line")

    monkeypatch.setattr(pushed, "snapshot_download", break_off)
    with pytest.raises(StoreError, match=r"the hub refused \(peer went away, Bearer hf_\.\.\.\)") as raised:
        pull(URL, tmp_path / "back", api=pushed)
    assert "AbCd" not in str(raised.value) and raised.value.__cause__ is None
    assert (tmp_path / "back.tmp").exists() and not (tmp_path / "back").exists()
    monkeypatch.setattr(pushed, "snapshot_download", fetch)
    (tmp_path / "back").mkdir()
    pull(URL, tmp_path / "back", api=pushed)
    assert contents(tmp_path / "back") == contents(acts) and not (tmp_path / "back.tmp").exists()


def test_a_folder_that_holds_something_is_spared(pushed: FolderHub, acts: Path) -> None:
    before = contents(acts)
    with pytest.raises(StoreError, match="acts: exists already"):
        pull(URL, acts, api=pushed)
    assert contents(acts) == before


@pytest.mark.parametrize(
    "url", ["acts", "hf://someone/acts", "hf://datasets/acts", "hf://datasets/a/b/c", "hf://datasets/../b", "s3://a/b"]
)
def test_what_names_no_repository_is_refused(acts: Path, tmp_path: Path, url: str) -> None:
    for call in (lambda: push(acts, url, api=object()), lambda: pull(url, tmp_path / "back", api=object())):
        with pytest.raises(OptionError, match="write hf://datasets/USER/NAME"):
            call()


def test_a_branch_is_not_pushed_to(acts: Path) -> None:
    with pytest.raises(OptionError, match="Leave '@v1' out"):
        push(acts, f"{URL}@v1", api=object())


def test_the_real_client_refuses_to_go_out_when_told_to_stay(acts: Path) -> None:
    """The tests run with HF_HUB_OFFLINE; what the client raises then is one of ours."""
    with pytest.raises(StoreError, match=r"someone/acts: the hub refused \("):
        push(acts, URL)


def test_the_client_has_the_calls_that_are_made_of_it() -> None:
    import inspect

    from huggingface_hub import HfApi

    for name, arguments in {
        "create_repo": {"repo_type", "private", "exist_ok"},
        "dataset_info": {"revision", "files_metadata"},
        "upload_folder": {"repo_id", "folder_path", "repo_type", "allow_patterns"},
        "upload_file": {"path_or_fileobj", "path_in_repo", "repo_id", "repo_type"},
        "hf_hub_download": {"repo_type", "filename"},
        "snapshot_download": {"repo_type", "revision", "local_dir", "allow_patterns"},
    }.items():
        assert arguments <= set(inspect.signature(getattr(HfApi, name)).parameters), name


def test_a_folder_that_no_pull_began_is_spared(pushed: FolderHub, acts: Path, tmp_path: Path) -> None:
    shutil.copytree(acts, tmp_path / "back.tmp")
    (tmp_path / "back.tmp" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "back.tmp")
    with pytest.raises(StoreError, match=r"back\.tmp: exists already, and no pull began it"):
        pull(URL, tmp_path / "back", api=pushed)
    assert contents(tmp_path / "back.tmp") == before and not (tmp_path / "back").exists()
