"""Select the rows of real tokens from a padded batch.

A `BatchSelection` is computed once per call from the attention mask and used for every site. Tokenizers pad on one
side, so the real tokens form a few rectangles, each copied and cast in one pass; any other mask falls back to an index.
Must never know where rows go.

Letters: B sequences, S padded positions, T rows (real tokens), D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from layerprobe.capture.casting import NOT_PLAIN, cast_into
from layerprobe.capture.staging import MOST_COPIES, send
from layerprobe.capture.target import Target
from layerprobe.errors import CaptureError

__all__ = ["BatchSelection", "Run", "copy_runs", "take_ids", "write_pairs", "write_rows"]

_CPU = torch.device("cpu")


class Run(NamedTuple):
    """A rectangle of real tokens: sequences `[first, last)` at positions `[start, stop)`."""

    first: int
    last: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class BatchSelection:
    """Which tokens of a `[B, S]` batch are real.

    Args:
        lengths: Number of real tokens per example.
        num_positions: S.
        runs: Rectangles that cover all real tokens, in order; None if the mask has holes or only some tokens are kept.
        index: Flat positions of the real tokens, on the model's device, if rows are gathered by index because there are
            many runs or none.
        sequences: For each example the index of its text in the batch, if several examples share one text; None if each
            has its own.
        spans: Start and end of each example's real tokens, if its mask is contiguous.
        device: The model's device.
        is_flat: Whether all examples are concatenated into one sequence without padding.
    """

    lengths: tuple[int, ...]
    num_positions: int
    runs: tuple[Run, ...] | None
    index: Tensor | None = None
    sequences: tuple[int, ...] | None = None
    spans: tuple[tuple[int, int], ...] = ()
    device: torch.device = _CPU
    is_flat: bool = False

    @cached_property
    def num_sequences(self) -> int:
        """The number of sequences in the batch, B."""
        return 1 if self.is_flat else self.num_distinct

    @cached_property
    def num_distinct(self) -> int:
        """The number of distinct texts."""
        return len(self.lengths) if self.sequences is None else 1 + max(self.sequences, default=-1)

    @cached_property
    def num_rows(self) -> int:
        """The number of real tokens, T."""
        return sum(self.lengths)

    @cached_property
    def num_pairs(self) -> int:
        """The number of pairs of a real query and a real key, over all examples."""
        return sum(length * length for length in self.lengths)

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        num_positions: int,
        device: torch.device,
        sequences: Sequence[int] | None = None,
    ) -> "BatchSelection":
        """Describe a right-padded batch from its lengths alone, without a mask."""
        spans = [(0, length) for length in lengths]
        return cls._from_spans(spans, num_positions, device, None if sequences is None else tuple(sequences))

    @classmethod
    def from_flat(
        cls, lengths: Sequence[int], device: torch.device, sequences: Sequence[int] | None = None
    ) -> "BatchSelection":
        """Describe texts concatenated into one sequence, each once.

        Args:
            lengths: Number of tokens per example.
            device: Device of the model's values.
            sequences: For each example the index of its text, if several examples share one.
        """
        own = dict(enumerate(lengths)) if sequences is None else dict(zip(sequences, lengths, strict=True))
        starts = dict(zip(own, accumulate(own.values(), initial=0), strict=False))
        numbers = range(len(lengths)) if sequences is None else sequences
        spans = [(starts[number], starts[number] + own[number]) for number in numbers]
        runs: list[Run] = []
        for start, stop in spans:
            if runs and runs[-1].stop == start:
                start = runs.pop().start
            runs.append(Run(0, 1, start, stop))
        several = None if sequences is None else tuple(sequences)
        return cls._from_runs(runs, spans, [0] * len(spans), sum(own.values()), device, several, is_flat=True)

    @classmethod
    def from_mask(cls, mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> "BatchSelection":
        """Describe a batch from its attention mask.

        Args:
            mask: `[B, S]`, zero for padding; None keeps every token.
            shape: B and S.
            device: Device of the model's values.

        Raises:
            CaptureError: the mask has another shape.
        """
        num_sequences, num_positions = shape
        if mask is None:
            return cls._from_spans([(0, num_positions)] * num_sequences, num_positions, device)
        if tuple(mask.shape) != (num_sequences, num_positions):
            raise CaptureError(
                f"attention_mask has shape {tuple(mask.shape)}: rows need one of shape {shape}. "
                "Pass a [batch, positions] mask, or capture into memory without pool."
            )
        kept = (mask != 0).cpu()
        # on raw bytes: a dozen small torch operators cost about 1% of a small model's forward
        flags = kept.numpy().tobytes()
        rows = [flags[start : start + num_positions] for start in range(0, len(flags), max(1, num_positions))]
        spans = [(max(0, row.find(1)), 1 + row.rfind(1)) for row in rows] if num_positions else [(0, 0)] * num_sequences
        lengths = [row.count(1) for row in rows] if num_positions else [0] * num_sequences
        if all(stop - start == length for (start, stop), length in zip(spans, lengths, strict=True)):
            return cls._from_spans(spans, num_positions, device)
        index = send(kept.flatten().nonzero()[:, 0], device)
        return cls(tuple(lengths), num_positions, None, index, device=device)

    @classmethod
    def _from_spans(
        cls,
        spans: list[tuple[int, int]],
        num_positions: int,
        device: torch.device,
        sequences: tuple[int, ...] | None = None,
    ) -> "BatchSelection":
        numbers = sequences or range(len(spans))
        runs: list[Run] = []
        for sequence, (start, stop) in zip(numbers, spans, strict=True):
            if runs and (runs[-1].last, runs[-1].start, runs[-1].stop) == (sequence, start, stop):
                runs[-1] = Run(runs[-1].first, sequence + 1, start, stop)
            else:
                runs.append(Run(sequence, sequence + 1, start, stop))
        return cls._from_runs(runs, spans, numbers, num_positions, device, sequences)

    @classmethod
    def _from_runs(
        cls,
        runs: Sequence[Run],
        spans: Sequence[tuple[int, int]],
        rows: Sequence[int],
        num_positions: int,
        device: torch.device,
        sequences: tuple[int, ...] | None,
        is_flat: bool = False,
    ) -> "BatchSelection":
        """Add an index if there are many runs; `rows`: for each example its row of the batch."""
        lengths = tuple(stop - start for start, stop in spans)
        index = None
        if len(runs) > MOST_COPIES.get(device.type, 0):
            firsts = [row * num_positions + start for row, (start, _) in zip(rows, spans, strict=True)]
            index = send(_count_on(firsts, lengths), device)
        return cls(lengths, num_positions, tuple(runs), index, sequences, tuple(spans), device, is_flat)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Start and end of each example among the rows, int64 `[N]` each, on the model's device."""
        bounds = send(torch.tensor([0, *accumulate(self.lengths)], device="cpu"), self.device)
        return bounds[:-1], bounds[1:]

    @cached_property
    def distinct(self) -> "BatchSelection":
        """The selection with each text once."""
        if self.sequences is None:
            return self
        first = [self.sequences.index(number) for number in range(self.num_distinct)]
        if self.is_flat:
            return BatchSelection.from_flat([self.lengths[place] for place in first], self.device)
        return BatchSelection._from_spans([self.spans[place] for place in first], self.num_positions, self.device)

    def keep(self, kept: Sequence[Tensor]) -> "BatchSelection":
        """Keep some tokens of each example.

        Args:
            kept: int64, increasing positions among each example's real tokens. `spans` must be known.
        """
        numbers = self.sequences or tuple(range(len(self.lengths)))
        rows_of = (0,) * len(kept) if self.is_flat else numbers
        firsts = [row * self.num_positions + start for row, (start, _) in zip(rows_of, self.spans, strict=True)]
        rows = [first + those for first, those in zip(firsts, kept, strict=True)]
        index = torch.cat(rows) if rows else torch.empty(0, dtype=torch.long, device="cpu")
        index = send(index, self.device)
        lengths = tuple(map(len, kept))
        return BatchSelection(lengths, self.num_positions, None, index, numbers, self.spans, self.device, self.is_flat)

    def repeat_rows(self, rows_TD: Tensor) -> Tensor:
        """Expand rows of the distinct texts to rows of every example.

        Raises:
            CaptureError: the number of rows does not match the distinct texts.
        """
        if self.sequences is None:
            return rows_TD
        if len(rows_TD) != self.distinct.num_rows:
            raise CaptureError(f"{len(rows_TD)} rows were made for {self.distinct.num_rows} tokens.")
        return rows_TD.index_select(0, self._repeated_rows.to(rows_TD.device))

    def repeat_vectors(self, vectors: Tensor) -> Tensor:
        """Expand one vector per distinct text to one per example; any other number of vectors is returned unchanged."""
        if self.sequences is None or len(vectors) != self.num_distinct:
            return vectors
        return vectors.index_select(0, self._repeated.to(vectors.device))

    # cached for all sites of a call: sending them to a GPU for each site would synchronise each time

    @cached_property
    def _repeated(self) -> Tensor:
        return send(torch.tensor(self.sequences, device="cpu"), self.device)

    @cached_property
    def _repeated_rows(self) -> Tensor:
        assert self.sequences is not None
        starts = list(accumulate(self.distinct.lengths, initial=0))
        return send(_count_on([starts[number] for number in self.sequences], self.lengths), self.device)


def _count_on(firsts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Concatenate the ranges `[first, first + length)`, int64; in numpy, whose small operators cost less."""
    stops = np.cumsum(lengths, dtype=np.int64)
    offsets = np.array(firsts, dtype=np.int64) - (stops - np.array(lengths, dtype=np.int64))
    return torch.from_numpy(np.arange(stops[-1] if len(stops) else 0) + np.repeat(offsets, lengths))


def write_rows(target: Target, value: Tensor, selection: BatchSelection) -> None:
    """Gather the real tokens of a batch into `target`, casting them.

    Args:
        target: Destination of shape `[T, ...]`.
        value: `[B, S, ...]`.
        selection: Which tokens are real.

    Raises:
        CaptureError: `value` does not start with the call's B and S, or its rows do not fit a row of `target`.

    Cost: one pass over the rows without temporary memory; two passes for an indexed gather with a cast, for int8 and
    for float8.
    """
    whole = target.whole
    wanted = (selection.num_sequences, selection.num_positions, *whole.shape[1:])
    if value.shape != wanted:
        advice = "Capture this site into memory instead."
        if value.ndim > 1 and value.shape[0] == wanted[0] and value.shape[1] > wanted[1]:
            advice += (
                " If the model pads by itself, as Longformer does to its attention_window, pad the batch before: a "
                "tokenizer takes pad_to_multiple_of."
            )
        raise CaptureError(f"a value of shape {tuple(value.shape)} has no row per token: it must be {wanted}. {advice}")
    if target.count != selection.num_rows or not whole.is_contiguous():
        raise CaptureError(
            f"{selection.num_rows} rows do not go into a place for {target.count}, of shape {tuple(whole.shape)} and "
            f"strides {whole.stride()}."
        )
    if selection.index is not None:
        flat = value.reshape(selection.num_sequences * selection.num_positions, *whole.shape[1:])
        if flat.dtype == whole.dtype:
            torch.index_select(flat, 0, selection.index, out=target.values)
        else:
            cast_into(target, flat.index_select(0, selection.index))
        return
    assert selection.runs is not None
    if whole.dtype in NOT_PLAIN:
        row = 0
        for first, last, start, stop in selection.runs:
            block = value[first:last, start:stop]
            cast_into(target.part(row, row + len(block) * (stop - start), block.shape[:2]), block)
            row += len(block) * (stop - start)
    else:
        copy_runs(whole, target.start, value, selection.runs)


def copy_runs(whole: Tensor, row: int, value: Tensor, runs: Sequence[Run]) -> None:
    """Copy the runs of a value consecutively into rows from `row` on, casting them.

    Args:
        whole: `[R, ...]`, contiguous.
        row: Index of the first row written.
        value: `[B, S, ...]`.
        runs: The rectangles of `value` to copy.
    """
    # Runs at every site of every batch: two views and a copy per run; slicing would take a dozen torch operators.
    strides, offset, trailing = value.stride(), value.storage_offset(), value.shape[2:]
    out_strides = whole.stride()
    size, out_offset = out_strides[0], whole.storage_offset() + row * out_strides[0]
    for first, last, start, stop in runs:
        length = stop - start
        shape = (last - first, length, *trailing)
        block = value.as_strided(shape, strides, offset + first * strides[0] + start * strides[1])
        whole.as_strided(shape, (length * size, *out_strides), out_offset).copy_(block)
        out_offset += (last - first) * length * size


def write_pairs(target: Target, weights_BHSS: Tensor, selection: BatchSelection) -> None:
    """Write the attention weights among real tokens, flat, `[H, len, len]` per example.

    Args:
        target: Destination of `H * num_pairs` values.
        weights_BHSS: Attention probabilities.
        selection: Which tokens are real.

    Raises:
        CaptureError: the shape of the weights does not match the call's B and S.
    """
    size, _, *positions = weights_BHSS.shape
    if size != selection.num_sequences or positions != [selection.num_positions] * 2:
        raise CaptureError(f"attention weights of shape {tuple(weights_BHSS.shape)} are not between the call's tokens.")
    blocks: list[Tensor] = []
    if selection.runs is not None:
        blocks = [weights_BHSS[r.first : r.last, :, r.start : r.stop, r.start : r.stop] for r in selection.runs]
    else:
        assert selection.index is not None
        numbers = selection.sequences or range(len(selection.lengths))
        for number, rows in zip(numbers, selection.index.split(list(selection.lengths)), strict=True):
            kept = rows - number * selection.num_positions
            blocks.append(weights_BHSS[number : number + 1].index_select(2, kept).index_select(3, kept))
    start = 0
    for block in blocks:
        cast_into(target.part(start, start + block.numel(), tuple(block.shape)), block)
        start += block.numel()


def take_ids(input_ids: Tensor | None, selection: BatchSelection) -> Tensor:
    """Return the ids of the real tokens on the CPU; -1 if the model was called with embeddings.

    Raises:
        CaptureError: the ids are not of shape `[B, S]`.
    """
    if input_ids is None:
        return torch.full((selection.num_rows,), -1, dtype=torch.int64, device="cpu")
    # in numpy, whose small operators cost a fifth of torch's
    ids_BS = input_ids.cpu().numpy()
    if ids_BS.shape != (selection.num_sequences, selection.num_positions):
        raise CaptureError(
            f"input_ids have shape {ids_BS.shape}: a store takes [batch, positions]. Capture into memory instead."
        )
    if selection.runs is None:
        assert selection.index is not None
        ids_T = ids_BS.reshape(-1)[selection.index.cpu().numpy()]
    else:
        runs = [ids_BS[first:last, start:stop].reshape(-1) for first, last, start, stop in selection.runs]
        ids_T = np.concatenate(runs) if runs else ids_BS[:0].reshape(-1)
    return torch.from_numpy(ids_T.astype(np.int64, copy=False))
