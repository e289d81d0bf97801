"""Records: a text and the other fields that came with it, kept as JSON.

A digest over the records, in order, identifies an input. Field values are converted to JSON types when a record is
made; for a value that JSON cannot represent, the error names the record and the field.

Must never know where records come from, or of tokens and models.
"""

import datetime
import decimal
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from layerprobe.errors import InputError
from layerprobe.store.guard import check_record

__all__ = ["InputDigest", "Record", "check_text", "keep_plain", "split_record"]

_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode  # made once; json.dumps would make one per call
# Types that JSON represents directly, and the numpy dtype kinds whose `tolist` returns them.
_PLAIN = (str, int, float, bool, type(None))
_PLAIN_KINDS = "biufU"


@dataclass(frozen=True)
class Record:
    """One input: its text and the other fields that came with it."""

    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)


class InputDigest:
    """A fingerprint of records in order: equal for equal inputs, and almost certainly different for others."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._hash = xxhash.xxh3_128()
        self._count = 0

    def add(self, record: Record) -> int:
        """Add one record and return the bytes of its JSON.

        Raises:
            InputError: the text has half a character, or the fields are not JSON or exceed what can be read back.
        """
        try:
            # the JSON of `[text, fields]`, built from parts because a bare text is encoded three times as fast
            line = f"[{_encode(record.text)}, {_encode(record.fields) if record.fields else '{}'}]\n".encode()
            if record.fields:
                check_record(line)
        except (TypeError, ValueError, RecursionError) as error:
            check_text(record.text, self._name, self._count)
            raise InputError(
                f"{self._name}, text {self._count}: its other fields cannot be kept as JSON ({error}). "
                "Leave them out or clean them."
            ) from error
        self._hash.update(line)
        self._count += 1
        return len(line) - 1

    def digest(self) -> bytes:
        """Return the fingerprint of the records so far, 16 bytes."""
        return self._hash.digest()


def check_text(text: str, name: str, number: int) -> str:
    """Check that a text is one that tokenizers accept, and return it.

    Raises:
        InputError: it holds half a character (a lone surrogate).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}, text {number}: holds half a character ({text[error.start]!r} at {error.start}), which no "
            "tokenizer takes. Clean the text first."
        ) from error
    return text


def split_record(record: Mapping[str, Any], field: str, where: str) -> Record:
    """Split a record into its text and its other fields.

    Raises:
        InputError: it has no such field, or the field holds no text.
    """
    if field not in record:
        found = ", ".join(map(repr, record)) or "nothing"
        raise InputError(f"{where}: no field {field!r}; it holds {found}. Name the field (--field).")
    text = record[field]
    if not isinstance(text, str):
        raise InputError(f"{where}: field {field!r} is {type(text).__name__}, not a text.")
    return Record(text, {key: value for key, value in record.items() if key != field})


def keep_plain(given: Mapping[str, Any], field: str, where: str) -> Record:
    """Split a record whose fields may have any type, and convert them to JSON types.

    Raises:
        InputError: JSON cannot represent a field.
    """
    record = split_record(given, field, where)
    try:
        return Record(record.text, _make_plain(record.fields, "", where))
    except RecursionError as error:
        raise InputError(
            f"{where}: its fields are nested too deeply, which cannot be kept as JSON. Leave them out."
        ) from error


def _make_plain(value: Any, name: str, where: str) -> Any:
    if type(value) in _PLAIN:
        return value
    dtype = ""
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype == np.longdouble:  # whose own `tolist` returns values that JSON does not know
            value = value.astype(np.float64)
        if value.dtype.kind in _PLAIN_KINDS:
            return value.tolist()
        if value.dtype.kind == "O":
            return _make_plain(value.tolist(), name, where)
        dtype = f" of {value.dtype}"
    elif isinstance(value, torch.Tensor):
        if not value.is_complex() and value.layout == torch.strided and not value.is_meta:
            return value.tolist()
        dtype = f" of {value.dtype}"
    elif isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    elif isinstance(value, (decimal.Decimal, uuid.UUID)):
        return str(value)
    elif isinstance(value, Mapping):
        _check_names(value, name, where)
        return {key: _make_plain(inner, f"{name}.{key}" if name else key, where) for key, inner in value.items()}
    elif isinstance(value, (list, tuple)):
        return [_make_plain(inner, f"{name}[{place}]", where) for place, inner in enumerate(value)]
    elif isinstance(value, _PLAIN):  # a subclass, which JSON encodes as its base type
        return value
    raise InputError(
        f"{where}: field {name!r} is {type(value).__name__}{dtype}, which cannot be kept as JSON. "
        "Give a text, a number, a list or a mapping of them, or leave it out; save the columns that you need anew."
    )


def _check_names(fields: Mapping[Any, Any], name: str, where: str) -> None:
    for key in fields:
        if not isinstance(key, str):
            inside = f" in {name!r}" if name else ""
            raise InputError(
                f"{where}: a field{inside} is named {key!r}, which is {type(key).__name__} and cannot be kept as JSON. "
                "Name it by a text, or leave it out."
            )
