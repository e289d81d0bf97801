"""Turn token ids into length-sorted batches under a token budget.

Sorting by length within a unit keeps padding small; a budget in tokens rather than in texts keeps batches even in
size. Must never know of models or files.

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

# Cost of one more batch, in tokens: less than measured for MiniLM on two cores (36), to keep padding under 2 %.
BATCH_COST_TOKENS = 16
# Lengths step by 8, or by a quarter of an octave if that is more; each length has at most six batch sizes.
SHAPE_STEPS = (8, 4, 6)


class _Text(NamedTuple):
    """A distinct text, computed once: its length in tokens, and the places in the unit of all texts with its ids."""

    length: int
    members: list[int]


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded texts that go through the model together.

    Args:
        members: Places of the texts in the unit.
        lengths: Length of each text in tokens.
        sequences: Row of `input_ids` of each text; texts with the same ids share a row.
        input_ids, attention_mask: `[B, S]` int64; filler rows, which belong to no text, come last.
    """

    members: list[int]
    lengths: list[int]
    sequences: list[int]
    input_ids: Tensor
    attention_mask: Tensor

    @property
    def arguments(self) -> dict[str, Tensor]:
        """Keyword arguments for the model."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def num_sequences(self) -> int:
        """Number of sequences the model computes, filler rows included."""
        return len(self.input_ids)

    @property
    def num_padding(self) -> int:
        """Number of positions that belong to no text."""
        return self.input_ids.numel() - sum(dict(zip(self.sequences, self.lengths, strict=True)).values())

    @property
    def num_filling(self) -> int:
        """Number of filler rows."""
        return len(self.input_ids) - 1 - max(self.sequences, default=-1)

    def halves(self) -> "tuple[Batch, Batch]":
        """Split into two batches of the same padded length, in the same order; needs at least two sequences."""
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
    """Texts that go through the model concatenated into one sequence, without padding.

    Args:
        members: Places of the texts in the unit.
        lengths: Length of each text in tokens.
        sequences: Index of each text within the sequence; texts with the same ids share one.
        input_ids: `[1, T]` int64.
    """

    members: list[int]
    lengths: list[int]
    sequences: list[int]
    input_ids: Tensor

    @cached_property
    def own_lengths(self) -> list[int]:
        """Length in tokens of each text in the sequence, in order."""
        return list(dict(zip(self.sequences, self.lengths, strict=True)).values())

    @property
    def num_sequences(self) -> int:
        """Number of texts the model computes."""
        return len(self.own_lengths)

    @property
    def num_padding(self) -> int:
        """Always 0: every position belongs to a text."""
        return 0

    @property
    def num_filling(self) -> int:
        """Always 0: there are no filler rows."""
        return 0

    def halves(self) -> "tuple[FlatBatch, FlatBatch]":
        """Split into two batches, in the same order; needs at least two texts."""
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
    """A small set of batch shapes, for work that is prepared once per shape, such as CUDA graphs.

    Lengths are rounded up, by no more than a quarter from 32 on. Each length has few batch sizes: the largest that the
    budget allows, and that halved up to five times.

    Args:
        batch_tokens: Maximum padded tokens of a batch.
        longest: Length of the longest text, in tokens.
    """

    batch_tokens: int
    longest: int

    def width(self, length: int) -> int:
        """Return S for a batch whose longest text has `length` tokens."""
        least, steps, _ = SHAPE_STEPS
        length = max(1, length)
        step = max(least, (1 << (length - 1).bit_length()) // (2 * steps))
        return max(length, min(self.longest, -(-length // step) * step))

    def heights(self, width: int) -> list[int]:
        """List every B allowed for batches of width S, in descending order."""
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

    Texts with the same ids are computed once, unless `joins_equal` is False. Of all cuts of the sorted texts, this is
    the one that computes the fewest tokens, counting `batch_cost` more for each batch. The longest texts come first so
    that buffers reach their full size at once. A text longer than the budget gets a batch of its own. Ties keep the
    order of the input, so the cut depends only on the unit. With `shapes`, every batch is padded to one of those
    shapes, and the padding counts as computed. With `equal_lengths`, no batch has any padding.

    Cost: for each text, one numpy pass over as many texts as fit into a batch with it.
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

    Like `cut_batches`, but with batches of about equal size, since there is no padding to save. Texts of the same
    length are adjacent, so attention can process them together. A text with no tokens comes last, as a padded batch,
    because a model needs at least one position.
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
    """Return the distinct texts, longest first; texts of the same length keep the order of the input."""
    lengths, groups = unit.lengths.tolist(), [[member] for member in range(len(unit))]
    if joins_equal:
        ids, places = unit.ids.tobytes(), (unit.ids.itemsize * unit.offsets).tolist()
        same: dict[bytes, list[int]] = {}
        for member, (start, stop) in enumerate(pairwise(places)):
            same.setdefault(ids[start:stop], []).append(member)
        groups = list(same.values())
    return sorted((_Text(lengths[members[0]], members) for members in groups), key=lambda text: -text.length)


def _number(texts: Sequence[_Text]) -> tuple[list[int], list[int], list[int]]:
    """Return members, lengths and text numbers of a batch, in the order in which the texts are given."""
    members = [member for text in texts for member in text.members]
    numbers = [number for number, text in enumerate(texts) for _ in text.members]
    return members, [texts[number].length for number in numbers], numbers


def _lay(unit: TokenizedUnit, texts: Sequence[_Text]) -> FlatBatch:
    return FlatBatch(*_number(texts), unit.gather(text.members[0] for text in texts)[None])


def _choose_cuts(
    lengths: Sequence[int], batch_tokens: int, batch_cost: int, shapes: Shapes | None, equal_lengths: bool
) -> list[tuple[int, tuple[int, int]]]:
    """For each text, find where a batch that starts with it ends, and the batch's B and S; lengths must not increase.

    Dynamic programming from the last text to the first: the minimum cost of the texts from `start` on.
    """
    num_texts = len(lengths)
    cuts = [(0, (0, 0))] * num_texts
    least = np.zeros(num_texts + 1, dtype=np.int64)
    counts = np.arange(1, num_texts + 1)
    filled: dict[int, np.ndarray] = {}
    num_equal = 0
    for start in range(num_texts - 1, -1, -1):
        # A model needs at least one position, even if the tokenizer returns no tokens for an empty text.
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
    """Return, for each number of sequences from 1 on, the smallest height that holds it."""
    rising = np.array(heights[::-1])
    return rising[np.searchsorted(rising, np.arange(1, heights[0] + 1))]


def _pad(unit: TokenizedUnit, texts: Sequence[_Text], pad_id: int, shape: tuple[int, int]) -> Batch:
    """Stack texts into a batch, padded on the right whatever the tokenizer's padding side.

    Padding on the left would change the positions of tokens and move the class token away from the first place.
    """
    num_rows, longest = shape
    input_ids = torch.full((num_rows, longest), pad_id, dtype=torch.int64, device="cpu")
    attention_mask = torch.zeros((num_rows, longest), dtype=torch.int64, device="cpu")
    of_text = torch.arange(longest, device="cpu") < torch.tensor([text.length for text in texts], device="cpu")[:, None]
    attention_mask[: len(texts)] = of_text
    input_ids[: len(texts)][of_text] = unit.gather(text.members[0] for text in texts)
    # softmax over a fully masked row is NaN
    attention_mask[len(texts) :, 0] = 1
    return Batch(*_number(texts), input_ids, attention_mask)
