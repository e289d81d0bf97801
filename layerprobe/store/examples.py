"""One example of a store as a value: the result of `store.example`.

Must never know of files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from layerprobe.store.naming import need_name
from layerprobe.store.shards import ScaledRows
from layerprobe.tables import format_fields

__all__ = ["Example"]


@dataclass(frozen=True, eq=False)
class Example:
    """One example of a store.

    Args:
        index: Ordinal in the input.
        input_ids: int64 `[T]`, the real tokens of the stored rows, special tokens included.
        positions: int64 `[T]`, their positions among all tokens of the example.
        tokens: The tokens as text, or None if the store has no tokenizer.
        text: The input text, or None if it was not stored.
        fields: The other fields of the input record.
        sites: The values of each site, as `store[site][index]` returns them.
    """

    index: int
    input_ids: Tensor
    positions: Tensor
    tokens: list[str] | None
    text: str | None
    fields: dict[str, Any]
    sites: Mapping[str, Tensor | ScaledRows]

    def __repr__(self) -> str:
        return format_fields(self)

    def __getitem__(self, site: str) -> Tensor | ScaledRows:
        return self.sites[need_name(site, self.sites, f"example {self.index}")]
