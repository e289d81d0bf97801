"""Read texts from lists, files, folders, standard input, and data sets of the hub.

A source can be iterated more than once and always gives the same records in the same order, which makes a run
resumable. Every error names the file and the line.

Hides file formats. Must never know of tokens or models.
"""

import csv
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from layerprobe.errors import InputError, first_line
from layerprobe.extract.records import Record, keep_plain, split_record
from layerprobe.packages import need_package
from layerprobe.store.guard import brief
from layerprobe.tables import format_count

__all__ = ["HUB_PREFIX", "TextSource", "check_list", "open_source"]

_MOST_FIELD_CHARACTERS = (1 << 31) - 1
HUB_PREFIX = "hf:"


def check_list(texts: Any, wanted: str) -> None:
    """Refuse an object that does not yield its texts in a fixed order when iterated."""
    # iterating a data frame yields the names of its columns
    if hasattr(texts, "columns"):
        wanted += ", such as a column of it as a list, or its rows as mappings (in pandas frame.to_dict('records'))"
    # a set has a different order in each process, so a run over one could not be resumed
    elif isinstance(texts, Iterable) and not isinstance(texts, (Mapping, set, frozenset, bytes)):
        return
    raise InputError(f"{type(texts).__name__} is no input: give {wanted}.")


@dataclass(frozen=True)
class TextSource:
    """Texts that can be iterated more than once.

    Args:
        name: Name in messages.
        iterate: Returns a new iterator over all records on each call.
    """

    name: str
    iterate: Callable[[], Iterator[Record]]

    def __iter__(self) -> Iterator[Record]:
        return self.iterate()


def open_source(texts: Any, field: str = "text") -> TextSource:
    """Open an input.

    Args:
        texts: A path to a `.txt` (one text per line), `.jsonl`, `.csv` or `.parquet` file, a folder of them, `-` for
            standard input (one text per line), a data set of the hub (`hf:NAME`, `hf:NAME:SPLIT` or
            `hf:NAME:CONFIG:SPLIT`; split `train` by default), or in Python a list of strings or of mappings. A single
            string is a path.
        field: Name of the record field that holds the text; the others are stored with the example as JSON. Arrays and
            tensors become lists, their scalars numbers, dates and times their ISO text, decimal numbers and UUIDs text
            with all digits; any other value that JSON cannot represent is an error when its record is read.

    Raises:
        InputError: missing, of an unknown kind, or not texts.
    """
    if isinstance(texts, (str, Path)):
        return _open_path(str(texts), field)
    check_list(texts, "a path, '-', or a list of texts")
    # an iterator can be consumed only once
    records = texts if hasattr(texts, "__len__") and hasattr(texts, "__getitem__") else list(texts)
    return TextSource("the list of texts", lambda: _iterate_list(records, field))


def _open_path(path: str, field: str) -> TextSource:
    if not path:
        raise InputError("no input '': give a path, or '-' for standard input.")
    if path == "-":
        _refuse_field("standard input", field)
        return _spool_stdin()
    if path.startswith(HUB_PREFIX):
        return _open_dataset(path, field)
    # not `Path`, which raises if the name is too long, for example when a text is passed instead of a path
    if os.path.isdir(path):
        files = sorted(file for file in Path(path).iterdir() if file.suffix.lower() in _READERS)
        if not files:
            raise InputError(f"{path}: holds no input file. Files end in {', '.join(_READERS)}.")
    else:
        files = [Path(path)]
    for file in files:
        if not os.path.isfile(file):
            raise InputError(
                f"no input {brief(repr(str(file)))}: there is no such file or folder. Give a path, or '-'."
            )
        if file.suffix.lower() not in _READERS:
            raise InputError(f"{file}: {file.suffix or 'no ending'} is not known. Files end in {', '.join(_READERS)}.")
        try:
            with open(file, "rb"):
                pass
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror or error}).") from error

    def iterate() -> Iterator[Record]:
        for file in files:
            if not file.is_file():
                raise InputError(f"{file}: is gone. Put it back and run the same command again.")
            try:
                yield from _READERS[file.suffix.lower()](file, field)
            except OSError as error:
                raise InputError(f"{file}: cannot be read ({error.strerror or error}).") from error

    return TextSource(path, iterate)


def _open_dataset(path: str, field: str) -> TextSource:
    """Load a data set of the hub, or of a folder, into the cache of `datasets` and read it from there."""
    # do not split at colons in brackets: a split may be sliced, as in train[:1000]
    name, *parts = re.split(r":(?![^\[]*\])", path.removeprefix(HUB_PREFIX))
    if not name or name.startswith("//") or len(parts) > 2 or not all(parts):
        raise InputError(f"{path!r}: names no data set. Use hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT.")
    config, split = parts[0] if len(parts) == 2 else None, parts[-1] if parts else "train"
    load_dataset = need_package("datasets", path, "data", InputError).load_dataset
    # older versions run a data set's own script unless told not to
    runs_no_code: Any = {"trust_remote_code": False} if int(version("datasets").partition(".")[0]) < 4 else {}
    try:
        rows: Any = load_dataset(name, config, split=split, **runs_no_code)
    except Exception as error:  # the hub, the cache or a file may raise anything
        cause = error.__cause__ or error  # the outer error says only that something went wrong
        raise InputError(
            f"{path}: the data set cannot be loaded ({first_line(cause)}). Check its name, config and split, and the "
            "network."
        ) from error

    def iterate() -> Iterator[Record]:
        for number, record in enumerate(rows):
            yield keep_plain(record, field, f"{path}, row {number}")

    return TextSource(path, iterate)


class _Spool:
    """A temporary file that is closed when its last reader is gone."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def __del__(self) -> None:
        with suppress(OSError):  # closing flushes once more what did not fit
            self.file.close()


def _spool_stdin() -> TextSource:
    """Copy standard input to a temporary file, since the plan reads it and the run reads it again."""
    try:
        spool = _Spool(tempfile.TemporaryFile())  # noqa: SIM115 - closed above
        while block := sys.stdin.buffer.read(1 << 20):
            spool.file.write(block)
        spool.file.flush()
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"standard input: cannot be kept ({why}). Name a folder with room in TMPDIR.") from error

    def iterate() -> Iterator[Record]:
        spool.file.seek(0)
        yield from _split_lines(spool.file, "standard input")

    return TextSource("standard input", iterate)


def _iterate_list(records: Any, field: str) -> Iterator[Record]:
    for number, record in enumerate(records):
        if isinstance(record, str):
            _refuse_field(f"text {number}", field)
            yield Record(record)
        elif isinstance(record, Mapping):
            yield keep_plain(record, field, f"text {number}")
        else:
            raise InputError(f"text {number} is {type(record).__name__}, not a text: give strings or mappings.")


def _decode_lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # a byte order mark is not part of a text
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}, line {number}: not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start}). "
                "Convert the file first."
            ) from error
        yield number, text


def _split_lines(file: IO[bytes], name: str) -> Iterator[Record]:
    for _, line in _decode_lines(file, name):
        yield Record(line.removesuffix("\n").removesuffix("\r"))


def _refuse_field(name: str, field: str) -> None:
    if field != "text":
        raise InputError(f"{name}: is plain text and has no field {field!r}. Leave out the field.")


def _read_txt(path: Path, field: str) -> Iterator[Record]:
    _refuse_field(str(path), field)
    with open(path, "rb") as file:
        yield from _split_lines(file, str(path))


def _read_jsonl(path: Path, field: str) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in _decode_lines(file, str(path)):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: is not JSON ({error}).") from error
            if not isinstance(record, dict):
                raise InputError(f"{where}: holds {type(record).__name__}, not an object with a field {field!r}.")
            yield split_record(record, field, where)


def _read_csv(path: Path, field: str) -> Iterator[Record]:
    # the csv module refuses fields over 128 kB by default, and documents are longer than that
    csv.field_size_limit(max(csv.field_size_limit(), _MOST_FIELD_CHARACTERS))
    with open(path, "rb") as file:
        lines = (line for _, line in _decode_lines(file, str(path)))
        reader = csv.DictReader(lines, strict=True)
        try:
            names = reader.fieldnames or ()
            if len(set(names)) < len(names):
                raise InputError(f"{path}, line 1: names a column twice. Rename one.")
            for record in reader:
                where = f"{path}, line {reader.line_num}"
                if None in record or None in record.values():
                    raise InputError(
                        f"{where}: has not the {format_count(len(reader.fieldnames or ()), 'column')} of "
                        "the first line."
                    )
                yield split_record(record, field, where)
        except csv.Error as error:
            # DictReader counts a line only after parsing it
            raise InputError(f"{path}, line {reader.reader.line_num}: is not CSV ({error}).") from error


def _read_parquet(path: Path, field: str) -> Iterator[Record]:
    arrow_error = need_package("pyarrow", str(path), "data", InputError).ArrowException
    parquet = need_package("pyarrow.parquet", str(path), "data", InputError)
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise InputError(f"{path}: names a column twice. Rename one.")
        row = 0
        for batch in file.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                yield keep_plain(record, field, f"{path}, row {row}")
                row += 1
    except (arrow_error, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: is not parquet ({first_line(error)}).") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
