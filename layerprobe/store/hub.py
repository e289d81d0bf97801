"""Push and pull stores to and from the Hugging Face Hub, as dataset repositories.

A push sends only a complete, checked store, its index last. A pull fetches only a store's files: names and sizes are
checked before the first byte, headers before the folder gets its final name. Authentication is up to the Hub client;
no token passes through here.

Hides huggingface_hub. Must never know of models or hooks.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from layerprobe.errors import (
    FormatError,
    LayerProbeError,
    OptionError,
    PlanError,
    SpaceError,
    StoreError,
    first_line,
    telling_refusals,
)
from layerprobe.store.durable import commit_folder, flush_folder, make_folder
from layerprobe.store.format import INDEX_FILE, STORE_FILE, TOKENIZER_FOLDER, read_json
from layerprobe.store.guard import brief
from layerprobe.store.headers import parse_shard_name
from layerprobe.store.places import find_place, need_folder
from layerprobe.store.reader import Store, open_store
from layerprobe.tables import format_bytes, format_count

__all__ = ["Moved", "pull", "push"]

_Found = TypeVar("_Found")

_URL = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./-]+))?/?\Z")
_TOKENIZER_FILE = re.compile(re.escape(TOKENIZER_FOLDER) + r"/\w[\w-]*(\.[\w-]+)*\.(json|txt|model|jinja)\Z")
# Files that the Hub or its users add to any dataset.
_BESIDE = re.compile(r"\.gitattributes\Z|README\.md\Z|LICENSE(\.\w+)?\Z")
_TOKEN = re.compile(r"hf_\w{4,}")
# Where the Hub client keeps its download state.
_CLIENT_FOLDER = ".cache"
# Marks a folder that a pull created.
_MARKER = ".layerprobe-pull"


@dataclass(frozen=True)
class Moved:
    """The result of a push or pull; `str(moved)` describes it.

    Args:
        source, target: Path or URL.
        num_files, num_bytes: Size of the store.
    """

    source: str
    target: str
    num_files: int
    num_bytes: int

    def __str__(self) -> str:
        count = format_count(self.num_files, "file")
        return f"{self.source} -> {self.target}: {count}, {format_bytes(self.num_bytes)}"


def push(folder: str | Path, url: str, *, private: bool = False, api: Any = None) -> Moved:
    """Push a complete store to a Hub repository of its own.

    Args:
        folder: The store.
        url: `hf://datasets/USER/NAME`. The repository is created if it does not exist; one that holds the same run is
            added to.
        private: Whether a newly created repository is private.
        api: The Hub client; None for `huggingface_hub.HfApi()`, which finds the user's token itself.

    Raises:
        OptionError: the URL does not name a repository, or names a revision.
        StoreError: the store is not complete, or the Hub refused.
        FormatError: a shard is damaged, or the repository holds something other than a store.
        PlanError: the repository holds another run.
    """
    repo, revision = _parse(url)
    if revision is not None:
        raise OptionError(f"{url}: a store is pushed to the main branch. Leave '@{revision}' out.")
    where = need_folder(find_place(folder)).said
    with open_store(where, check=False) as store:
        _check_store(store, where)
        fingerprint = store.fingerprint
        files = _list_own(where, store)
    api = api or _connect()
    _ask(url, lambda: api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True))
    there = _list_files(api, url, repo, None)[1]
    if STORE_FILE in there:
        path = _ask(url, lambda: api.hf_hub_download(repo, STORE_FILE, repo_type="dataset"))
        if read_json(Path(os.path.realpath(path))).get("fingerprint") != fingerprint:
            raise PlanError(f"{url}: holds another run than {where}. Choose another repository.")
    # older clients have a separate call for large uploads
    upload = getattr(api, "upload_large_folder", None) or api.upload_folder
    first = [name for name in files if name != INDEX_FILE]
    _ask(url, lambda: upload(repo_id=repo, folder_path=str(where), repo_type="dataset", allow_patterns=first))
    # last, as in a folder: its presence means complete
    index = str(where / INDEX_FILE)
    _ask(
        url, lambda: api.upload_file(path_or_fileobj=index, path_in_repo=INDEX_FILE, repo_id=repo, repo_type="dataset")
    )
    return Moved(str(where), url, len(files), sum((where / name).stat().st_size for name in files))


def pull(url: str, folder: str | Path, *, api: Any = None) -> Moved:
    """Pull a store from the Hub.

    Args:
        url: `hf://datasets/USER/NAME`, or `...@REVISION`.
        folder: Destination; new or empty. Files are fetched into `FOLDER.tmp`, which the same call resumes, and the
            folder gets its final name once all are there and checked. A `FOLDER.tmp` that no pull began is refused.
        api: As for `push`.

    Raises:
        OptionError: the URL does not name a repository.
        FormatError: the repository holds something other than a store, or a damaged one. Tensor checksums are not
            verified; run `layerprobe verify` afterwards for that.
        SpaceError: the disk has too little space.
        StoreError: the folder is not empty, the store there is not complete, or the Hub refused.
    """
    repo, revision = _parse(url)
    target = need_folder(find_place(folder)).said
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: exists already. Choose a new or empty folder.")
    api = api or _connect()
    commit, sizes = _list_files(api, url, repo, revision)
    if STORE_FILE not in sizes:
        raise FormatError(f"{url}: is not a store: it has no {STORE_FILE}.")
    if INDEX_FILE not in sizes:
        raise StoreError(f"{url}: the store there is not complete: it has no {INDEX_FILE}.")
    partial = target.with_name(target.name + ".tmp")
    with telling_refusals(target, "written", "Run the same command again to go on."):
        _begin(partial)
        _check_room(partial, sizes)
        _ask(
            url,
            lambda: api.snapshot_download(
                repo, repo_type="dataset", revision=commit, local_dir=str(partial), allow_patterns=sorted(sizes)
            ),
        )
        try:
            _keep_only(partial, sizes)
            with open_store(partial, check=False) as store:
                _check_store(store, partial)
        except FormatError:
            # otherwise the next call would take the damaged files for fetched
            shutil.rmtree(partial)
            raise
        if target.is_dir():
            target.rmdir()
        commit_folder(partial, target)
        # last: until then the same call resumes
        (target / _MARKER).unlink()
        flush_folder(target)
    return Moved(url, str(target), len(sizes), sum(sizes.values()))


def _parse(url: str) -> tuple[str, str | None]:
    match = _URL.match(url)
    if match is None or ".." in url:
        raise OptionError(f"{brief(repr(url))} names no data set: write hf://datasets/USER/NAME.")
    return match.group(1), match.group(2)


def _connect() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _ask(url: str, request: Callable[[], _Found]) -> _Found:
    """Make a request through the Hub client, which raises many kinds of errors."""
    try:
        return request()
    except LayerProbeError:
        raise
    except Exception as error:
        said = brief(_TOKEN.sub("hf_...", first_line(error)))
        # no cause: its traceback could reveal what is masked here
        raise StoreError(f"{url}: the hub refused ({said}). Run the same command again to go on.") from None


def _list_files(api: Any, url: str, repo: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """List the files of a store in a repository, with their sizes, and the commit that holds them.

    Raises:
        FormatError: it holds another file, or one without a size.
    """
    info = _ask(url, lambda: api.dataset_info(repo, revision=revision, files_metadata=True))
    sizes: dict[str, int] = {}
    for sibling in info.siblings or []:
        name = str(sibling.rfilename)
        if _BESIDE.match(name):
            continue
        is_own = name in (STORE_FILE, INDEX_FILE) or _TOKENIZER_FILE.match(name) or parse_shard_name(name) is not None
        if not is_own:
            raise FormatError(f"{url}: is not a store: it holds {brief(repr(name))}.")
        if type(sibling.size) is not int or sibling.size < 0:
            raise FormatError(f"{url}: {name} has no size.")
        sizes[name] = sibling.size
    return str(info.sha), sizes


def _list_own(folder: Path, store: Store) -> list[str]:
    """List the files in a folder that belong to the store."""
    tokenizer = folder / TOKENIZER_FOLDER
    names = sorted(f"{TOKENIZER_FOLDER}/{name}" for name in (os.listdir(tokenizer) if tokenizer.is_dir() else ()))
    shards = [shard.header.file for shard in store.iter_shards()]
    return [STORE_FILE, *(name for name in names if _TOKENIZER_FILE.match(name)), *shards, INDEX_FILE]


def _check_store(store: Store, folder: Path) -> None:
    """Check that a store is complete, and every header against the file size, `store.json` and the index."""
    if not store.is_complete:
        raise StoreError(f"{folder}: is not complete. Run the same extraction again to go on, then push.")
    for _ in store.iter_shards():
        pass


def _begin(partial: Path) -> None:
    """Create the folder to fetch into, or continue one that a pull began."""
    marker = partial / _MARKER
    is_own = not partial.is_symlink() and partial.is_dir() and (marker.is_file() or not any(partial.iterdir()))
    if os.path.lexists(partial) and not is_own:
        raise StoreError(f"{partial}: exists already, and no pull began it. Move it away, or choose another folder.")
    make_folder(partial)
    marker.touch()


def _check_room(partial: Path, sizes: dict[str, int]) -> None:
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    needed, free = sum(sizes.values()) - there, shutil.disk_usage(partial).free
    if needed > free:
        raise SpaceError(
            f"{partial}: needs {format_bytes(needed)} more, the disk has {format_bytes(free)} free. Make room, or "
            "choose another disk."
        )


def _keep_only(partial: Path, sizes: dict[str, int]) -> None:
    """Remove the client's own files and leftovers of an earlier revision, and compare sizes."""
    shutil.rmtree(partial / _CLIENT_FOLDER, ignore_errors=True)
    for path in sorted(partial.rglob("*"), reverse=True):
        name = path.relative_to(partial).as_posix()
        if name == _MARKER:
            continue
        if path.is_symlink() or (path.is_file() and name not in sizes):
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for name, size in sizes.items():
        path = partial / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise FormatError(f"{name}: came with {found} bytes; the hub lists {size}. Run the same command again.")
