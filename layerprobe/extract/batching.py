"""From the ids of texts to length-sorted batches under a token budget.

Sorting by length inside a unit is what keeps padding small; a budget in tokens instead of a count of texts is what
keeps batches even. Must never know of models or files.

Letters: B sequences, S padded positions, T rows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from layerprobe.extract.tokens import TokenizedUnit

__all__ = [
    "BATCH_COST_TOKENS",
    "SHAPE_STEPS",
    "Batch",
    "FlatBatch",
    "Shapes",
    "cut_batches",
    "cut_flat_batches",
]

# What one more batch costs, in tokens: less than it measures for MiniLM on two cores (36), to keep padding under 2 %.
BATCH_COST_TOKENS = 16
# Lengths go up by 8, or by a quarter of a doubling where that is more; a length has at most six counts of sequences.
SHAPE_STEPS = (8, 4, 6)


class _Text(NamedTuple):
    """A text that is computed once: its tokens, and the places in the unit of those that have its ids."""

    length: int
    members: list[int]


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts that go through the model together.

    Args:
        members: Places of the texts in the unit.
        lengths: Tokens of each.
        sequences: For each its row of `input_ids`; texts of the same ids share one.
        input_ids, attention_mask: `[B, S]` int64; rows of no text come last.
    """

    members: list[int]
    lengths: list[int]
    sequences: list[int]
    input_ids: Tensor
    attention_mask: Tensor

    @property
    def arguments(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def num_sequences(self) -> int:
        """Texts that are computed, and rows of no text."""
        return len(self.input_ids)

    @property
    def num_padding(self) -> int:
        """Positions that are of no text."""
        return self.input_ids.numel() - sum(dict(zip(self.sequences, self.lengths, strict=True)).values())

    @property
    def num_filling(self) -> int:
        """Rows that are of no text."""
        return len(self.input_ids) - 1 - max(self.sequences, default=-1)

    def halves(self) -> "tuple[Batch, Batch]":
        """Cut in two, as long as before and in the same order; at least two sequences."""
        middle = len(self.input_ids) // 2
        first = sum(sequence < middle for sequence in self.sequences)
        return self._part(0, middle, 0, first), self._part(middle, len(self.input_ids), first, len(self.members))

    def _part(self, start: int, stop: int, first: int, last: int) -> "Batch":
        return Batch(
            self.members[first:last],
            self.lengths[first:last],
            [sequence - start for sequence in self.sequences[first:last]],
            self.input_ids[start:stop],
            self.attention_mask[start:stop],
        )


@dataclass(frozen=True, eq=False)
class FlatBatch:
    """Texts that go through the model behind one another, in one sequence with no padding.

    Args:
        members: Places of the texts in the unit.
        lengths: Tokens of each.
        sequences: For each which of the texts of the sequence it is; texts of the same ids are there once.
        input_ids: `[1, T]` int64.
    """

    members: list[int]
    lengths: list[int]
    sequences: list[int]
    input_ids: Tensor

    @cached_property
    def own_lengths(self) -> list[int]:
        """Tokens of each text of the sequence, in order."""
        return list(dict(zip(self.sequences, self.lengths, strict=True)).values())

    @property
    def num_sequences(self) -> int:
        """Texts that are computed."""
        return len(self.own_lengths)

    @property
    def num_padding(self) -> int:
        """None: every position is of a text."""
        return 0

    @property
    def num_filling(self) -> int:
        """None: every row is of a text."""
        return 0

    def halves(self) -> "tuple[FlatBatch, FlatBatch]":
        """Cut in two, in the same order; at least two texts."""
        middle = len(self.own_lengths) // 2
        first = sum(sequence < middle for sequence in self.sequences)
        place = sum(self.own_lengths[:middle])
        sequences = [sequence - middle for sequence in self.sequences[first:]]
        return (
            FlatBatch(self.members[:first], self.lengths[:first], self.sequences[:first], self.input_ids[:, :place]),
            FlatBatch(self.members[first:], self.lengths[first:], sequences, self.input_ids[:, place:]),
        )


@dataclass(frozen=True)
class Shapes:
    """Few shapes for all batches, for what is prepared once for each shape, as CUDA graphs are.

    Lengths are rounded up, by no more than a quarter from 32 on; a length has few counts of sequences: as many as the
    budget takes, and that halved up to five times.

    Args:
        batch_tokens: Padded tokens of a batch, at most.
        longest: Longest text.
    """

    batch_tokens: int
    longest: int

    def width(self, length: int) -> int:
        """Give S of a batch whose longest text has `length` tokens."""
        least, steps, _ = SHAPE_STEPS
        length = max(1, length)
        step = max(least, (1 << (length - 1).bit_length()) // (2 * steps))
        return max(length, min(self.longest, -(-length // step) * step))

    def heights(self, width: int) -> list[int]:
        """List every B of the batches that are S wide, falling."""
        most = max(1, self.batch_tokens // width)
        return sorted({max(1, most >> halvings) for halvings in range(SHAPE_STEPS[2])}, reverse=True)


def cut_batches(
    unit: TokenizedUnit,
    batch_tokens: int,
    pad_id: int,
    *,
    joins_equal: bool = True,
    shapes: Shapes | None = None,
    batch_cost: int = BATCH_COST_TOKENS,
    equal_lengths: bool = False,
) -> Iterator[Batch]:
    """Cut a unit into batches of at most `batch_tokens` padded tokens, longest texts first.

    Texts of the same ids are computed once, unless `joins_equal` is False. Of all cuts of the sorted texts it is the
    one that computes least, each batch counted as `batch_cost` tokens more. The longest come first so that buffers and
    stages reach their size at once. A text longer than the budget is a batch of its own. Ties keep the order of the
    input, so the cut is a function of the unit alone. With `shapes` every batch has one of those, filled up with
    padding, which counts as computed. With `equal_lengths` no batch has any padding.

    Cost: for each text a look at as many as fit into a batch with it, in numpy.
    """
    texts = _sort_texts(unit, joins_equal)
    cuts = _choose_cuts([text.length for text in texts], batch_tokens, batch_cost, shapes, equal_lengths)
    start = 0
    while start < len(texts):
        end, shape = cuts[start]
        yield _pad(unit, texts[start:end], pad_id, shape)
        start = end


def cut_flat_batches(unit: TokenizedUnit, batch_tokens: int, pad_id: int) -> Iterator[Batch | FlatBatch]:
    """Cut a unit into batches of at most `batch_tokens` tokens without padding, longest texts first.

    As `cut_batches`, but every batch is about as large as the others: there is no padding for the cut to save. Texts of
    one length lie together, which attention can take at once. A text of no tokens comes last, as a padded batch, since
    a model wants a position.
    """
    sorted_texts = _sort_texts(unit, joins_equal=True)
    texts = [text for text in sorted_texts if text.length]
    num_tokens = sum(text.length for text in texts)
    enough = math.ceil(num_tokens / max(1, math.ceil(num_tokens / batch_tokens)))
    start = 0
    while start < len(texts):
        end, size = start, 0
        while end < len(texts) and (not size or (size < enough and size + texts[end].length <= batch_tokens)):
            size += texts[end].length
            end += 1
        yield _lay(unit, texts[start:end])
        start = end
    if len(sorted_texts) > len(texts):
        yield _pad(unit, sorted_texts[-1:], pad_id, (1, 1))


def _sort_texts(unit: TokenizedUnit, joins_equal: bool) -> list[_Text]:
    """Give the texts that differ, longest first; those of one length in the order of the input."""
    lengths, groups = unit.lengths.tolist(), [[member] for member in range(len(unit))]
    if joins_equal:
        ids, places = unit.ids.tobytes(), (unit.ids.itemsize * unit.offsets).tolist()
        same: dict[bytes, list[int]] = {}
        for member, (start, stop) in enumerate(pairwise(places)):
            same.setdefault(ids[start:stop], []).append(member)
        groups = list(same.values())
    return sorted((_Text(lengths[members[0]], members) for members in groups), key=lambda text: -text.length)


def _number(texts: Sequence[_Text]) -> tuple[list[int], list[int], list[int]]:
    """Give places in the unit, lengths, and which text each is; the texts in the order in which they are given."""
    members = [member for text in texts for member in text.members]
    numbers = [number for number, text in enumerate(texts) for _ in text.members]
    return members, [texts[number].length for number in numbers], numbers


def _lay(unit: TokenizedUnit, texts: Sequence[_Text]) -> FlatBatch:
    return FlatBatch(*_number(texts), unit.gather(text.members[0] for text in texts)[None])


def _choose_cuts(
    lengths: Sequence[int], batch_tokens: int, batch_cost: int, shapes: Shapes | None, equal_lengths: bool
) -> list[tuple[int, tuple[int, int]]]:
    """For each text, taken as the first of a batch, find where that batch ends, and its B and S; lengths fall.

    What the texts from `start` on cost at best is computed from the last text to the first.
    """
    num_texts = len(lengths)
    cuts = [(0, (0, 0))] * num_texts
    least = np.zeros(num_texts + 1, dtype=np.int64)
    counts = np.arange(1, num_texts + 1)
    filled: dict[int, np.ndarray] = {}
    num_equal = 0
    for start in range(num_texts - 1, -1, -1):
        # A model wants at least one position, even where a tokenizer gives nothing for an empty text.
        width, heights = max(1, lengths[start]), counts
        if shapes is not None:
            width = shapes.width(width)
            if width not in filled:
                filled[width] = _fill_up(shapes.heights(width))
            heights = filled[width]
        most = min(num_texts - start, max(1, batch_tokens // width))
        if equal_lengths:
            num_equal = num_equal + 1 if lengths[start : start + 1] == lengths[start + 1 : start + 2] else 1
            most = min(most, num_equal)
        costs = least[start + 1 : start + most + 1] + width * heights[:most]
        best = int(costs.argmin())
        cuts[start] = start + best + 1, (int(heights[best]), width)
        least[start] = costs[best] + batch_cost
    return cuts


def _fill_up(heights: Sequence[int]) -> np.ndarray:
    """Give for each count of sequences, from 1 on, the height that holds it."""
    rising = np.array(heights[::-1])
    return rising[np.searchsorted(rising, np.arange(1, heights[0] + 1))]


def _pad(unit: TokenizedUnit, texts: Sequence[_Text], pad_id: int, shape: tuple[int, int]) -> Batch:
    """Lay texts side by side, padded on the right whatever side their tokenizer pads.

    On the left, padding would move them to other positions than each has alone, and a class token away from the first.
    """
    num_rows, longest = shape
    input_ids = torch.full((num_rows, longest), pad_id, dtype=torch.int64, device="cpu")
    attention_mask = torch.zeros((num_rows, longest), dtype=torch.int64, device="cpu")
    of_text = torch.arange(longest, device="cpu") < torch.tensor([text.length for text in texts], device="cpu")[:, None]
    attention_mask[: len(texts)] = of_text
    input_ids[: len(texts)][of_text] = unit.gather(text.members[0] for text in texts)
    # attention over nothing at all is not a number
    attention_mask[len(texts) :, 0] = 1
    return Batch(*_number(texts), input_ids, attention_mask)
