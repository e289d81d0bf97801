"""Format tables, and numbers with their units, for the terminal.

In one place, so that all tables and messages of the library look alike. Knows nothing of what the cells mean.
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = [
    "format_bytes",
    "format_count",
    "format_dtype",
    "format_fields",
    "format_headers",
    "format_table",
    "format_time",
    "format_value",
]

_UNITS_OF_TIME = (("years", 365 * 86400.0), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("s", 1.0))


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format rows under headers, with numbers aligned right and everything else left.

    Returns:
        The table as one string, without a trailing newline; control characters in cells become spaces.
    """
    rows = [list(row) for row in rows]
    headers = [_make_printable(header) for header in headers]
    cells = [["" if cell is None else _make_printable(str(cell)) for cell in row] for row in rows]
    widths = [max(_count_columns(line[column]) for line in [headers, *cells]) for column in range(len(headers))]
    to_right = [
        all(isinstance(row[column], (int, float)) for row in rows if row[column] is not None)
        for column in range(len(headers))
    ]

    def line(texts: Sequence[str]) -> str:
        aligned = []
        for text, width, right in zip(texts, widths, to_right, strict=True):
            space = " " * (width - _count_columns(text))
            aligned.append(space + text if right else text + space)
        return "  ".join(aligned).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, cells)])


def format_headers(names: Iterable[str]) -> list[str]:
    """Turn names of fields into table headers: `mean_norm` becomes `mean norm`."""
    return [name.replace("_", " ") for name in names]


def _make_printable(text: str) -> str:
    """Replace control characters by spaces, so that a text stays on one line and cannot control the terminal."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else " " for character in text)


def _count_columns(text: str) -> int:
    """Return the width of a text in terminal columns: wide characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.category(character) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def format_count(count: int, noun: str) -> str:
    """Format a count with its noun: `1 shard`, `1,024 shards`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: float) -> str:
    """Format a number of bytes with a decimal unit: `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        # a number that would round to 1000 goes to the next unit
        if abs(count) < (999.5 if unit == "B" else 999.95) or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def format_dtype(dtype: "torch.dtype") -> str:
    """Format a dtype as options, files and numpy name it: `float16`."""
    return str(dtype).removeprefix("torch.")


def format_fields(value: Any) -> str:
    """Format a dataclass like its own `repr`, but with tensors by shape and dtype: `mean=Tensor[384] float64`."""
    named = (f"{field.name}={format_value(getattr(value, field.name))}" for field in fields(value) if field.repr)
    return f"{type(value).__name__}({', '.join(named)})"


def format_value(value: Any) -> str:
    """Format a value like `repr`, but with tensors by shape and dtype, at any depth."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"Tensor{list(value.shape)} {format_dtype(value.dtype)}"
    if is_dataclass(value) and not isinstance(value, type):
        return format_fields(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {format_value(item)}" for key, item in value.items()) + "}"
    return repr(value)


def format_time(seconds: float) -> str:
    """Format a time in the largest unit of which there are at least two: `2.5 hours`, `90.0 s`."""
    for name, size in _UNITS_OF_TIME:
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.1f} s"
