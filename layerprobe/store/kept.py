"""The rule by which a store keeps only some of its rows: by kind of token, and by random draw.

The draw has no seed: it depends only on an example's ordinal and a token's position, so every process draws the same
rows of any unit, and a larger share includes all rows of a smaller one. The rule is recorded in `store.json`, so that a
reader can tell a row that was left out from a missing one.

Hides the draw. Must never know of models or files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.errors import OptionError
from layerprobe.store.guard import is_number

__all__ = ["TOKENS", "Kept", "KeptRows", "check_kept", "draw", "parse_kept"]

TOKENS = ("all", "first", "cls", "special", "nonspecial")
_MOST_IDS = 1000


@dataclass(frozen=True, eq=False)
class KeptRows:
    """The kept rows of a unit.

    Args:
        positions: int64 `[T]`, the position of each row among the tokens of its example; concatenated by example.
        begins: int64 `[N + 1]`, where the rows of each example begin.
    """

    positions: Tensor
    begins: Tensor

    def of(self, member: int) -> Tensor:
        """Return the kept positions of one example, in ascending order."""
        return self.positions[int(self.begins[member]) : int(self.begins[member + 1])]


@dataclass(frozen=True)
class Kept:
    """The rule by which rows are kept.

    Args:
        tokens: `all`, `first` (the first token of each example), `cls`, `special` (those with one of `ids`) or
            `nonspecial` (those without).
        keep: Share of those tokens to keep, drawn token by token; above 0 and at most 1.
        ids: Token ids that `tokens` refers to.
    """

    tokens: str = "all"
    keep: float = 1.0
    ids: tuple[int, ...] = ()

    def choose(self, ids: np.ndarray, offsets: np.ndarray, ordinals: Sequence[int]) -> KeptRows:
        """Choose the rows to keep among the tokens of some examples.

        Args:
            ids: Integers `[T]`, concatenated by example, special tokens included.
            offsets: int64 `[N + 1]`, where each example begins and ends.
            ordinals: Ordinal of each example.
        """
        lengths = np.diff(offsets)
        positions = np.arange(len(ids)) - offsets[:-1].repeat(lengths)
        is_kept = self.allows(ids, np.asarray(ordinals, np.int64).repeat(lengths), positions)
        counts = np.concatenate([[0], is_kept.cumsum()])
        return KeptRows(torch.from_numpy(positions[is_kept]), torch.from_numpy(counts[offsets]))

    def allows(self, ids: np.ndarray, ordinals: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return for each row whether to keep it, from its own values alone, so that anyone can check it.

        Args:
            ids, ordinals, positions: Integers `[T]`: token id, ordinal of the example, and position in the example.

        Returns:
            bool `[T]`.
        """
        if self.tokens == "all":
            is_kept = np.ones(len(ids), dtype=bool)
        elif self.tokens == "first":
            is_kept = positions == 0
        else:
            is_named = np.isin(ids, self.ids)
            is_kept = ~is_named if self.tokens == "nonspecial" else is_named
        return is_kept if self.keep == 1 else is_kept & draw(ordinals, positions, self.keep)

    def estimate(self, num_tokens: int) -> float:
        """Estimate the number of rows kept of a text with this many tokens, from that number alone."""
        named = min(num_tokens, len(self.ids))
        meant = {"all": num_tokens, "nonspecial": num_tokens - named, "special": named}.get(
            self.tokens, min(1, num_tokens)
        )
        return meant * self.keep

    def describe(self) -> dict[str, Any]:
        """Return the rule as it is written to `store.json`."""
        return {"tokens": self.tokens, "keep": self.keep, "ids": list(self.ids)}

    def __str__(self) -> str:
        share = f", {self.keep:g} of them" if self.keep < 1 else ""
        return f"{self.tokens} tokens{share}"


def draw(ordinals: np.ndarray, positions: np.ndarray, keep: float) -> np.ndarray:
    """Draw tokens with probability `keep`, below 1, from the ordinals and positions alone.

    Source: the mixing function of Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators",
    figure 17 (its 64-bit finaliser, as in splitmix64), applied to the ordinal, then to the sum with the position.
    """
    return _mix(_mix(ordinals.astype(np.uint64)) + positions.astype(np.uint64)) < np.uint64(int(keep * 2.0**64))


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def check_kept(tokens: object, keep: object) -> None:
    """Check the options `tokens` and `keep`.

    Raises:
        OptionError: there is no such kind of token, or the share is out of range.
    """
    if tokens not in TOKENS:
        raise OptionError(f"no tokens {tokens!r} to keep: use {', '.join(TOKENS)}.")
    # also refuses False and True; shares below 2 ** -64 would keep nothing at all
    if not is_number(keep) or not 2.0**-64 <= keep <= 1:
        raise OptionError(f"keep is {keep!r}: it is the share of the rows to keep, from 2**-64 to 1, such as 0.05.")


def parse_kept(plan: Mapping[str, Any] | None) -> Kept | None:
    """Parse the rule for kept rows from the plan in `store.json`; None if all rows are kept.

    Raises:
        KeyError, TypeError, ValueError: it is damaged.
    """
    said = (plan or {}).get("kept")
    if said is None:
        return None
    ids = said["ids"]
    if (
        not isinstance(ids, list)
        or len(ids) > _MOST_IDS
        or not all(type(one) is int and 0 <= one < 2**63 for one in ids)
    ):
        raise ValueError("the ids of the tokens it keeps")
    try:
        check_kept(said["tokens"], said["keep"])
    except OptionError as error:
        raise ValueError(str(error)[:100]) from error
    return Kept(said["tokens"], float(said["keep"]), tuple(ids))
