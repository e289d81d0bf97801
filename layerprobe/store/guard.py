"""Open files and parse JSON that may be untrusted.

Only a regular file inside the store is opened, never a link, a pipe or a device. JSON is limited in size, depth and
number of values before it is parsed, because parsing is what takes memory and stack. `docs/security.md` has the table
of limits.

Hides the limits of the parser. Must never know what a file means.
"""

import errno
import json
import math
import operator
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from layerprobe.errors import FormatError, OptionError
from layerprobe.store.paths import NamedPath

__all__ = [
    "LARGE",
    "MOST_COUNT",
    "MOST_ROWS",
    "MOST_SHARDS",
    "MOST_SITES",
    "NO_LINKS",
    "SMALL",
    "JsonBounds",
    "brief",
    "check_count",
    "check_flag",
    "check_record",
    "exists_inside",
    "is_number",
    "is_whole",
    "need_batch",
    "need_list",
    "need_path",
    "need_wholes",
    "open_inside",
    "parse_json",
    "parse_record",
    "read_inside",
]


@dataclass(frozen=True)
class JsonBounds:
    """Limits on a JSON text.

    Args:
        num_bytes: Size of the text.
        num_values: Number of values of all kinds; each takes up to a quarter of a kilobyte once parsed.
    """

    num_bytes: int
    num_values: int


# A header takes about 500 bytes and 16 values for each site, so this has room for MOST_SITES.
SMALL = JsonBounds(8 << 20, 1 << 19)
# An index takes about 130 bytes and 5 values for each shard. The largest vocabularies take half of this.
LARGE = JsonBounds(64 << 20, 1 << 22)
# Writers keep to the limits of readers.
MOST_SITES = 10_000
MOST_SHARDS = 500_000
# A sum of two counts, or a count times an item size, stays within 64 bits.
MOST_COUNT = 10**17
# More rows than MOST_SHARDS shards of an extraction hold. An order has at most 2**20 pieces, and one more per shard.
MOST_ROWS = 1 << 44
NO_LINKS = "A store holds its files itself; make a copy that follows links, as 'cp -rL' does."
# Far more than a store nests, far less than overflows a C stack.
_MOST_DEPTH = 64
# The fields of a record are the user's own and may nest about as deep as Python's JSON parser allows.
_MOST_RECORD_DEPTH = 900
_MOST_RECORD_VALUES = 1 << 20
_MOST_MESSAGE = 200
_INTEGER_DIGITS = 19
# Python's default limit on converting digits, whose time is quadratic.
_LONG_DIGITS = 4300
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# nesting step of each bracket, by byte
_STEPS = np.full(256, -1, dtype=np.int8)
_STEPS[list(b"[{")] = 1


def brief(value: object) -> str:
    """Format an untrusted value for a message: short, on one line, without control characters."""
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= _MOST_MESSAGE else text[: _MOST_MESSAGE - 3] + "..."
    return "".join(character if character.isprintable() else " " for character in text)


def check_flag(name: str, value: object) -> None:
    """Check that a value is True or False.

    Raises:
        OptionError: it is neither.
    """
    if not isinstance(value, bool):
        raise OptionError(f"{name} is {value!r}: use True or False.")


def check_count(name: str, value: object, least: int = 1) -> int:
    """Check that a value is a whole number of at least `least`, and return it as Python's.

    Raises:
        OptionError: it is not.
    """
    if not is_whole(value) or value < least:
        raise OptionError(f"{name} is {value!r}: it must be a whole number of at least {least}.")
    return int(value)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is one integer, of Python or numpy, and not a bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is one real number, of Python or numpy, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def need_path(name: str, value: object) -> Path:
    """Check that a value is a path, and return it as a `Path`.

    Raises:
        OptionError: it is not a path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise OptionError(f"{name} is {brief(repr(value))}: give a path.")
    return Path(value)


def need_list(name: str, value: object, what: str) -> list[Any]:
    """Convert an iterable of values to a list.

    Args:
        name: Name of the option.
        value: The value given.
        what: What to give instead, for the message.

    Raises:
        OptionError: it is a single value, or a mapping.
    """
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        try:
            return list(value)
        except TypeError:  # a zero-dimensional tensor or array
            pass
    raise OptionError(f"{name} is {brief(repr(value))}: give {what}.")


def need_wholes(name: str, value: object) -> tuple[int, ...]:
    """Take one or more whole numbers as a tuple.

    Raises:
        OptionError: it is no list, an empty one, or holds something else.
    """
    wanted = "a list of whole numbers, as in [0, 3], or leave it out"
    listed = need_list(name, value, wanted)
    with suppress(TypeError):
        if listed and not any(isinstance(number, bool) for number in listed):
            return tuple(map(operator.index, listed))
    raise OptionError(f"{name} is {brief(repr(value))}: give {wanted}.")


def need_batch(what: str, batch: object) -> Mapping[str, Any]:
    """Check that a batch is a non-empty mapping of model arguments, and return it.

    Raises:
        OptionError: it is not a mapping, or is empty.
    """
    if not isinstance(batch, Mapping) or not batch:
        got = "an empty batch" if isinstance(batch, Mapping) else brief(repr(batch))
        raise OptionError(f"{what} of {got}: give what the model is called with, by name, such as input_ids.")
    return batch


def open_inside(folder: Path | NamedPath, file: str) -> BinaryIO:
    """Open a regular file inside a store's folder.

    Args:
        folder: The store; it may itself be a link, because the caller chose it.
        file: Path of the file in the store, with `/` between folders.

    Raises:
        FormatError: it is a link, a pipe, a device or a folder, or lies outside the store.
        OSError: the system refused.
    """
    path = folder / file
    parts = PurePosixPath(file).parts
    # an absolute path, also in Windows style, would replace the folder
    if not parts or Path(file).anchor or {"..", "/"} & set(parts):
        raise FormatError(f"{folder}: {brief(repr(file))} is no file of a store.")
    for part in parts[:-1]:
        folder = folder / part
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise FormatError(f"{folder}: is not a folder. {NO_LINKS}")
    # Opening a device can have side effects, so check the type first.
    _refuse_irregular(path, os.lstat(path).st_mode)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FormatError(f"{path}: is a link. {NO_LINKS}") from error
        raise
    try:
        _refuse_irregular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_irregular(path: Path | NamedPath, mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise FormatError(f"{path}: is a link. {NO_LINKS}")
    if not stat.S_ISREG(mode):
        raise FormatError(f"{path}: is not a regular file. Remove it.")


def exists_inside(folder: Path | NamedPath, file: str) -> bool:
    """Return whether a name exists, even as a dangling link; links are not followed."""
    return os.path.lexists(folder / file)


def read_inside(folder: Path | NamedPath, file: str, most_bytes: int) -> bytes:
    """Read a whole small file of a store.

    Raises:
        FormatError: as `open_inside`, or the file has more than `most_bytes`.
        OSError: the system refused.
    """
    with open_inside(folder, file) as opened:
        size = os.fstat(opened.fileno()).st_size
        # a file that grows meanwhile is read up to the limit only
        data = opened.read(most_bytes + 1) if size <= most_bytes else b""
    if size > most_bytes or len(data) > most_bytes:
        raise FormatError(f"{folder / file}: has {max(size, len(data)):,} bytes; at most {most_bytes:,} are read.")
    return data


def parse_json(data: bytes, bounds: JsonBounds) -> Any:
    """Parse JSON of a store: UTF-8, without duplicate keys, non-finite numbers or lone surrogates.

    Raises:
        ValueError: it is not such JSON, or exceeds the limits. The message is short.

    Cost: at most three times the size of the text, and a quarter of a kilobyte for each value.
    """
    if len(data) > bounds.num_bytes:
        raise ValueError(f"{len(data):,} bytes of JSON; at most {bounds.num_bytes:,} are read")
    text = data.decode("utf-8")
    _check_structure(data, bounds.num_values, _MOST_DEPTH)
    value = json.loads(
        text,
        object_pairs_hook=_unique,
        parse_int=_parse_int,
        parse_float=_parse_float,
        parse_constant=_refuse_constant,
    )
    if _SURROGATE.search(text) is not None:
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate raises a ValueError here
    return value


def check_record(data: bytes) -> None:
    """Check that `parse_record` would accept a record's size, also if its braces are replaced by brackets.

    Raises:
        ValueError: it has too many values, or is nested too deeply.
    """
    _check_structure(data, _MOST_RECORD_VALUES, _MOST_RECORD_DEPTH)


def parse_record(data: bytes) -> dict[str, Any]:
    """Parse the record of an example. Its fields are the user's: numbers of any kind, as Python writes them.

    Raises:
        ValueError: it is not a record.
    """
    check_record(data)
    try:
        record = _RECORDS.decode(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if not isinstance(record.get("text"), str | None) or not isinstance(record.get("fields", {}), dict):
        raise ValueError("its text is no text, or its fields are no object")
    return record


def _check_structure(data: bytes, most_values: int, most_depth: int) -> None:
    """Check the number of values and the depth without parsing; invalid JSON may pass."""
    if sum(map(data.count, (b",", b"[", b"{", b"]", b"}"))) <= most_depth:
        return
    # Remove escapes first, so that every quotation mark left begins or ends a string; both patterns are linear.
    bare = re.sub(rb'"[^"]*"?', b"", re.sub(rb"\\.", b"", data, flags=re.DOTALL))
    if bare.count(b",") + bare.count(b"[") + bare.count(b"{") > most_values:
        raise ValueError(f"more than {most_values:,} values")
    brackets = np.frombuffer(re.sub(rb"[^\[\]{}]+", b"", bare), dtype=np.uint8)
    if len(brackets) > 2 * most_values:
        raise ValueError(f"more than {most_values:,} values")
    if _STEPS[brackets].cumsum(dtype=np.int32).max(initial=0) > most_depth:
        raise ValueError(f"nested more than {most_depth} deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"names {brief(repr(twice))} twice")
    return found


def _parse_int(digits: str, most_digits: int = _INTEGER_DIGITS) -> int:
    if len(digits.lstrip("-")) > most_digits:
        raise ValueError(f"a whole number of {len(digits):,} digits")
    return int(digits)


# created once, not for each of millions of records
_RECORDS = json.JSONDecoder(parse_int=partial(_parse_int, most_digits=_LONG_DIGITS))


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{brief(digits)} is not a finite number")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")
