"""Sequences that a decoder generated from stored states, as table, CSV and JSON.

Must never know of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layerprobe.analysis.results import shorten, write_csv, write_json
from layerprobe.tables import format_table

__all__ = ["Generated", "Generation"]


@dataclass(frozen=True)
class Generated:
    """One generated sequence.

    Args:
        example: Ordinal of the example whose states were the context.
        ids: Token ids without the start token, and with the end token if it was reached.
        text: The decoded ids without special tokens; None without a tokenizer.
    """

    example: int
    ids: tuple[int, ...]
    text: str | None


@dataclass(frozen=True)
class Generation(Sequence[Generated]):
    """The sequences of `layerprobe.generate`, in the requested order of examples.

    Args:
        site: The site whose states were the context.
        sequences: One per example, or `num_return_sequences` per example.
    """

    site: str
    sequences: tuple[Generated, ...]

    def __getitem__(self, index: int) -> Generated:  # type: ignore[override]
        return self.sequences[index]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def texts(self) -> list[str | None]:
        """The text of each sequence."""
        return [one.text for one in self.sequences]

    def table(self) -> str:
        """Format the sequences as a text table, one row each."""
        rows = [(one.example, len(one.ids), shorten(_said(one), 100)) for one in self.sequences]
        return format_table(("example", "tokens", f"from {self.site}"), rows)

    __str__ = table
    __repr__ = table

    def to_csv(self, path: str | Path) -> Path:
        """Write the sequences as CSV, one row each."""
        rows = [(one.example, one.text, " ".join(map(str, one.ids))) for one in self.sequences]
        return write_csv(path, ("example", "text", "ids"), rows)

    def to_json(self, path: str | Path) -> Path:
        """Write everything as one JSON object."""
        return write_json(path, self)


def _said(one: Generated) -> str:
    return " ".join(map(str, one.ids)) if one.text is None else one.text
