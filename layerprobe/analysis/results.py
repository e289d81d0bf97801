"""Turn results into tables, CSV and JSON.

A result is a frozen dataclass; this file turns its numbers into text and files. Missing numbers (NaN, None) become
empty cells and JSON nulls, so that any reader can parse them.

Must never know of stores or of what the numbers mean.
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from layerprobe.errors import telling_refusals
from layerprobe.store.format import need_parent
from layerprobe.store.guard import need_path
from layerprobe.tables import format_headers, format_table

__all__ = [
    "give_csv",
    "give_json",
    "lay_out",
    "plain",
    "shorten",
    "shorten_apart",
    "table_cell",
    "write_csv",
    "write_json",
    "write_text",
]

_MOST_LETTERS = 60


def plain(value: Any) -> Any:
    """Convert a result to JSON values: dataclasses to objects, tuples to lists, NaN and infinities to null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str | Path, value: Any) -> Path:
    """Write a result as one JSON object.

    Raises:
        StoreError: the file cannot be written.
    """
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    return write_text(path, text + "\n")


def write_csv(path: str | Path, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write rows as CSV, with headers.

    Raises:
        StoreError: the file cannot be written.
    """
    return write_text(path, _format_csv(headers, rows))


def give_json(value: Any, path: str | Path | None) -> str:
    """Return a result as one line of JSON, and write it if a path is given.

    Raises:
        StoreError: the file cannot be written.
    """
    return _give_text(json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n", path)


def give_csv(headers: Sequence[str], rows: Iterable[Sequence[object]], path: str | Path | None) -> str:
    """Return rows with headers as CSV, and write it if a path is given.

    Raises:
        StoreError: the file cannot be written.
    """
    return _give_text(_format_csv(headers, rows), path)


def _format_csv(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows([plain(cell) for cell in row] for row in rows)
    return text.getvalue()


def _give_text(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text(path, text)
    return text


def table_cell(value: object) -> object:
    """Format a value for a table: three decimals, lists joined, None for a number that is not finite."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        # three decimals would round small numbers to zero
        return float(f"{value:.3g}") if abs(value) < 0.01 else round(value, 3)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value[:5])) + (", ..." if len(value) > 5 else "") or "none"
    return value


def lay_out(results: Iterable[object], names: Sequence[str]) -> str:
    """Format results as a table, one row per result and one column per field in `names`."""
    rows = [[table_cell(getattr(result, name)) for name in names] for result in results]
    return format_table(format_headers(names), rows)


def shorten(text: str, most: int = _MOST_LETTERS) -> str:
    """Shorten a text to one line of at most `most` characters without control characters, plus `...` if it was cut."""
    line = "".join(character if character.isprintable() else " " for character in text[:most])
    return line + ("..." if len(text) > most else "")


def shorten_apart(texts: Sequence[str], most: int) -> list[str]:
    """Shorten texts as `shorten` does, but cut the middle out of those that would otherwise look the same."""
    whole = [shorten(text, len(text)) for text in texts]
    cut = [shorten(text, most) for text in whole]
    counts, half = Counter(cut), most // 2
    return [
        f"{text[:half]}...{text[-half:]}" if counts[short] > 1 and len(text) > most else short
        for text, short in zip(whole, cut, strict=True)
    ]


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file in UTF-8.

    Raises:
        OptionError: the file would lie in a store.
        StoreError: the file cannot be written.
    """
    path = need_parent(need_path("path", path))
    with telling_refusals(path, "written", "Choose another path."):
        path.write_text(text, encoding="utf-8")
    return path
