"""Export a store as one file, or folder, of another format: `layerprobe.export`.

Iterates over the shards in input order, holding at most one record batch or chunk, and renames the finished result to
its final name. A killed export leaves only a folder `.layerprobe-NAME-*.tmp` beside it, which the next export to that
name removes.

Must never know of models or hooks.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from layerprobe.errors import LayerProbeError, OptionError, StoreError
from layerprobe.packages import need_package
from layerprobe.store.columns import Columns, column_dtype, write_arrow, write_parquet
from layerprobe.store.durable import commit_folder, flush_folder, tell_failure
from layerprobe.store.format import need_parent
from layerprobe.store.guard import check_flag, need_path
from layerprobe.store.headers import checksum
from layerprobe.store.lock import LOCK_FILE, StoreLock, is_abandoned
from layerprobe.store.naming import leave_out, match_sites
from layerprobe.store.packed import PackedArray, list_arrays, write_npz, write_zarr
from layerprobe.store.reader import Store, take_store
from layerprobe.store.shards import Shard
from layerprobe.tables import format_bytes, format_count, format_dtype
from layerprobe.telling import make_bar

__all__ = ["ExportReport", "export"]

_TABLES: dict[str, Callable[..., None]] = {"parquet": write_parquet, "arrow": write_arrow}
_PACKED: dict[str, Callable[[Path, Sequence[PackedArray]], None]] = {"npz": write_npz, "zarr": write_zarr}
_MODULES = {"parquet": "pyarrow.parquet", "arrow": "pyarrow.ipc", "zarr": "zarr"}
_FORMATS = (*_TABLES, *_PACKED)
# file systems allow 255 bytes, and the temporary folder's name adds a prefix and suffix
_MOST_NAME_BYTES = 180


@dataclass(frozen=True)
class ExportReport:
    """The result of an export; `str(report)` describes it in a few lines.

    Args:
        out: Path of the export.
        format: `parquet`, `arrow`, `npz` or `zarr`.
        num_examples, num_tokens, num_bytes: Size of the export.
        sites: Names of the exported sites.
        widened: Sites whose dtype the format lacks, with that dtype; they are exported as float32.
        is_complete: Whether the store was complete; if not, examples are missing.
        left_out: Sites left out of a table of tokens because they have no row per token.
    """

    out: Path
    format: str
    num_examples: int
    num_tokens: int
    num_bytes: int
    sites: tuple[str, ...]
    widened: Mapping[str, str]
    is_complete: bool
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.out}: {format_count(self.num_examples, 'example')}, {format_count(self.num_tokens, 'token')}, "
            f"{format_count(len(self.sites), 'site')}, {format_bytes(self.num_bytes)} as {self.format}"
        ]
        if self.widened:
            dtypes = " and ".join(dict.fromkeys(self.widened.values()))
            lines.append(
                f"{format_count(len(self.widened), 'site')} of {dtypes} became float32, which {self.format} has"
            )
        if self.left_out:
            lines.append(f"left out, without a row per token: {', '.join(self.left_out)}")
        if not self.is_complete:
            lines.append("the store is not complete: examples are missing")
        return "\n".join(lines)


def export(
    store: Store | str | Path,
    out: str | Path,
    to: str | None = None,
    *,
    sites: str | Sequence[str] | None = None,
    rows: str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> ExportReport:
    """Write a store as one file of another format; `zarr` is a folder.

    Args:
        store: A store, or its path or URL.
        out: Path to write.
        to: `parquet` or `arrow`: a table; `npz` or `zarr`: packed arrays. `docs/export.md` lists columns and arrays.
            None: by the suffix of `out`, else `parquet`.
        sites: Patterns over the stored sites; None for all of them. With `rows="tokens"` those without a row per token
            are left out, or refused if they are named.
        rows: One table row per example (`examples`, the default) or per token (`tokens`). For tables only.
        overwrite: Replace an existing `out`.
        progress: Show a progress bar; None: only on a terminal.

    Returns:
        What was written.

    Raises:
        OptionError: an invalid value, a suffix of another format, a site without a row per token that is named for a
            table of tokens, or a package that is not installed.
        SiteError: a pattern matches nothing that is stored.
        StoreError: there is no store, a shard is damaged, `out` exists, or writing failed. No partial file is left.

    Cost: about 100 MiB, however large the store; packed arrays take one pass over it for each of them.

    Example:
        >>> import numpy, tempfile, layerprobe as lp
        >>> store = lp.extract("demo", ["The kettle whistled.", "Who left?"], "memory://exported", pool="mean")
        >>> out = tempfile.mkdtemp() + "/acts.npz"
        >>> report = lp.export(store, out, "npz", sites="layers.5")
        >>> numpy.load(out)["layers.5"].shape
        (2, 384)
    """
    out = need_path("out", out)
    to = _choose_format(out, to)
    check_flag("overwrite", overwrite)
    if rows is not None and to in _PACKED:
        raise OptionError(f"rows={rows!r} goes with a table: {to} holds packed rows with the offsets of examples.")
    if to in _MODULES:
        _require(to)
    store = take_store(store)
    columns, left_out = _choose_columns(store, sites, rows or "examples")
    _check_target(store, out, to, overwrite)
    with _committed(out, overwrite) as partial:
        if to in _TABLES:
            with make_bar(store.num_shards, "", progress, "shards") as bar:
                _TABLES[to](partial, _counted(store, bar), columns)
        else:
            with make_bar(0, "", progress, "shards") as bar:
                arrays = list_arrays(lambda: _counted(store, bar), columns.sites)
                # the pass that measures the arrays is done
                bar.reset(store.num_shards * len(arrays))
                _PACKED[to](partial, arrays)
    widened = {site.name: format_dtype(site.dtype) for site in columns.sites if column_dtype(site) != site.dtype}
    names = tuple(site.name for site in columns.sites)
    return ExportReport(
        out, to, len(store), store.num_tokens, _measure(out), names, widened, store.is_complete, left_out
    )  # fmt: skip


def _choose_format(out: Path, to: str | None) -> str:
    suffix = out.suffix.lower()
    said = "arrow" if suffix == ".feather" else suffix.removeprefix(".") if suffix[1:] in _FORMATS else None
    if to is None:
        return said or "parquet"
    if to not in _FORMATS:
        raise OptionError(f"no format {to!r}: use {', '.join(_FORMATS)}.")
    if said not in (None, to):
        raise OptionError(f"{out}: the name says {said}, to={to!r} another format. Leave out to (--to), or rename it.")
    return to


def _require(to: str) -> None:
    # on Python before 3.11 the extra does not install zarr
    what = "to='zarr', which is for Python 3.11 or newer," if to == "zarr" else f"to={to!r}"
    module = need_package(_MODULES[to], what, "data")
    if to == "zarr" and int(module.__version__.partition(".")[0]) < 3:
        raise OptionError(
            f"to='zarr' needs zarr 3, {module.__version__} is installed. Install it, on Python 3.11 or newer, with "
            "pip install 'layerprobe[data]'."
        )


def _choose_columns(store: Store, patterns: str | Sequence[str] | None, rows: str) -> tuple[Columns, tuple[str, ...]]:
    """Choose the columns of the export; also return the sites that are left out."""
    names, place, stored = store.sites, str(store.place), store.stored_sites
    if rows == "tokens":
        if patterns is None and all(site.kind != "token" for site in stored.values()):
            raise OptionError(f"rows='tokens': {place} holds no site with a row per token. Use rows='examples'.")
        chosen, left_out = leave_out(patterns, names, place, lambda name: stored[name].kind != "token")
    else:
        chosen, left_out = match_sites(patterns, names, place), []
    columns = Columns(tuple(stored[name] for name in chosen), rows, store.id_to_tokens, store.kept is not None)
    return columns, tuple(left_out)


def _check_target(store: Store, out: Path, to: str, overwrite: bool) -> None:
    """Check that an export overwrites neither the store nor anything that is not an export."""
    folder = store.place.folder
    if folder is not None:
        inside, target = folder.path.resolve(), out.resolve()
        if target == inside or inside in target.parents or target in inside.parents:
            raise OptionError(f"{out}: lies in or around the store {folder}. Choose another place.")
    need_parent(out)
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise StoreError(f"{out}: exists already. Choose another name, or pass overwrite=True (--overwrite).")
    is_group = out.is_dir() and (out / "zarr.json").is_file()
    if out.is_symlink() or (not is_group if to == "zarr" else not out.is_file()):
        what = "a Zarr group" if to == "zarr" else "a file"
        raise StoreError(f"{out}: is not {what}, so it is not replaced. Choose another name.")


@contextlib.contextmanager
def _committed(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield the temporary name to write to; commit it on success, and clean up after a failure."""
    try:
        # hash a long name, so that the temporary name is not too long for the file system
        is_short = len(os.fsencode(out.name)) <= _MOST_NAME_BYTES
        prefix = f".layerprobe-{out.name if is_short else checksum(os.fsencode(out.name))}-"
        _remove_leftovers(out.parent, prefix)
        # a unique name, so that nothing of the user's is ever removed
        work = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=out.parent))
        partial, old = work / "new", work / "old"
        lock = StoreLock(work)
        try:
            # the lock shows that this export is alive, and not a killed one's leftover
            lock.acquire()
            yield partial
            if overwrite and out.is_dir():
                # a folder cannot be renamed onto one that is not empty
                os.replace(out, old)
            commit_folder(partial, out)
        except BaseException:
            if old.exists() and not out.exists():
                os.replace(old, out)
            raise
        finally:
            _remove_work(work, lock)
        flush_folder(out.parent)
    except LayerProbeError:
        raise
    except OSError as error:
        raise tell_failure(out, error) from error


def _remove_work(work: Path, lock: StoreLock) -> None:
    """Remove the folder of an export that has ended; if part of it stays, keep the lock file that marks it."""
    new, old = work / "new", work / "old"
    try:
        if not _has_only_copy(work):
            for path in (new, old):
                with contextlib.suppress(OSError):
                    # `unlink` works even at the limit of open files, unlike `rmtree`
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    finally:
        is_empty = not os.path.lexists(new) and not os.path.lexists(old)
        lock.release(keeps_file=not is_empty)
    if is_empty:
        with contextlib.suppress(OSError):
            (work / LOCK_FILE).unlink(missing_ok=True)
            work.rmdir()


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove the leftovers of killed exports to this name: folders with a lock file that nobody holds."""
    for path in list(folder.iterdir()):
        is_work = path.name.startswith(prefix) and path.suffix == ".tmp" and path.is_dir() and not path.is_symlink()
        if is_work and not _has_only_copy(path) and is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _has_only_copy(work: Path) -> bool:
    """Return whether the old export was moved aside and the new one not yet renamed."""
    return (work / "old").exists() and (work / "new").exists()


def _counted(store: Store, bar: "tqdm[Any]") -> Iterator[Shard]:
    for shard in store.iter_shards():
        yield shard
        bar.update()


def _measure(out: Path) -> int:
    if out.is_file():
        return out.stat().st_size
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
