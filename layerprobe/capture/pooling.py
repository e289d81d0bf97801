"""Pool rows to one vector per text: cls, mean, max, last, or a user's function.

Runs on the device of the values, before anything is copied. Must never know where vectors go.

Letters: B sequences, S padded positions, T rows, N examples, D width.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from layerprobe.capture.select import BatchSelection
from layerprobe.errors import CaptureError, LayerProbeError, OptionError
from layerprobe.store.shards import POOLS

__all__ = ["Pool", "check_pool", "pool_rows"]

Pool = str | Callable[[Tensor], Tensor] | None

# Devices on which every supported torch version has embedding_bag; mps has it only since 2.10.
_MEANS_AT_ONCE = ("cpu", "cuda")


def check_pool(pool: object) -> None:
    """Check that a pool is valid.

    Raises:
        OptionError: it is neither a known name nor callable.
    """
    if pool is not None and pool not in POOLS and not callable(pool):
        raise OptionError(
            f"no pool {pool!r}: use {', '.join(POOLS)}, a callable on [T, D] rows, or None for every row."
        )


def pool_rows(value_BSD: Tensor, selection: BatchSelection, pool: Pool) -> Tensor:
    """Reduce the real tokens of each sequence to one vector.

    Args:
        value_BSD: `[B, S, D]`.
        selection: Which tokens are real; special tokens count.
        pool: `cls` (first real token), `last` (last real token), `mean`, `max`, or a callable from `[T, D]` to one
            vector.

    Returns:
        `[N, D]` in the dtype of the values (means are computed in at least float32). A sequence without tokens gives
        NaN.

    Raises:
        CaptureError: the values have no row per token, or the callable fails or does not return one vector.
    """
    if value_BSD.ndim != 3 or tuple(value_BSD.shape[:2]) != (selection.num_sequences, selection.num_positions):
        raise CaptureError(f"a value of shape {tuple(value_BSD.shape)} has no row per token to pool.")
    if selection.index is None and not selection.is_flat:
        assert selection.runs is not None
        blocks = [value_BSD[run.first : run.last, run.start : run.stop] for run in selection.runs]
        return _pool_blocks(blocks, pool, value_BSD)
    index, flat = selection.index, value_BSD.flatten(0, 1)
    # embedding_bag's backward is not itself differentiable
    has_mean = value_BSD.device.type in _MEANS_AT_ONCE and not value_BSD.requires_grad
    if pool in ("cls", "last") or (pool == "mean" and has_mean):
        index = torch.arange(len(flat), device=flat.device) if index is None else index
        return _pool_at_once(flat, index, selection, pool)
    rows = flat if index is None else flat.index_select(0, index)
    # consecutive texts of equal length form a block
    groups = [(length, len(list(equal))) for length, equal in groupby(selection.lengths)]
    pieces = rows.split([length * count for length, count in groups])
    blocks = [piece.unflatten(0, (count, length)) for piece, (length, count) in zip(pieces, groups, strict=True)]
    return _pool_blocks(blocks, pool, value_BSD)


def _pool_at_once(flat: Tensor, index: Tensor, selection: BatchSelection, pool: Pool) -> Tensor:
    """Pool all sequences with a constant number of operators: on a GPU each is a kernel launch, and these are small."""
    if not len(index):
        return flat.new_full((len(selection.lengths), flat.shape[1]), float("nan"))
    starts, stops = selection.bounds
    if pool == "mean":
        table = flat
        if flat.dtype not in (torch.float32, torch.float64):
            table, index = flat.index_select(0, index).float(), torch.arange(len(index), device=index.device)
        vectors = embedding_bag(index, table, starts, mode="mean").to(flat.dtype)
    else:
        places = starts.clamp(max=len(index) - 1) if pool == "cls" else (stops - 1).clamp(min=0)
        vectors = flat.index_select(0, index[places])
    if 0 in selection.lengths:
        vectors = vectors.masked_fill((starts == stops)[:, None], float("nan"))
    return vectors


def _pool_blocks(blocks: Sequence[Tensor], pool: Pool, like: Tensor) -> Tensor:
    """Pool blocks of equally long sequences, `[k, t, D]` each, to `[N, D]`."""
    if callable(pool):
        return _pool_by(pool, [rows for block in blocks for rows in block], like)
    return torch.cat([_pool_block(block, pool) for block in blocks]) if blocks else like.new_empty(0, like.shape[2])


def _pool_by(pool: Callable[[Tensor], Tensor], texts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Pool each text with a function; a text without tokens gives NaN without calling it, as with the other pools."""
    vectors = {number: _ask(pool, rows, number) for number, rows in enumerate(texts) if len(rows)}
    if not texts:
        return like.new_empty(0, like.shape[2])
    # only the function knows the width of its vectors
    known = next(iter(vectors.values())) if vectors else _ask(pool, like.new_zeros(1, like.shape[2]), 0)
    lengths = sorted({len(vector) for vector in vectors.values()})
    if len(lengths) > 1:
        raise CaptureError(
            f"the pool callable gave vectors of {' and '.join(map(str, lengths))} numbers: it must give as many for "
            "every text, however many rows that has."
        )
    missing = torch.full_like(known, float("nan"))
    return torch.stack([vectors.get(number, missing) for number in range(len(texts))])


def _ask(pool: Callable[[Tensor], Tensor], rows_TD: Tensor, number: int) -> Tensor:
    try:
        vector = pool(rows_TD)
    except (torch.OutOfMemoryError, LayerProbeError):
        raise
    except Exception as error:
        name = getattr(pool, "__qualname__", type(pool).__name__)
        raise CaptureError(
            f"the pool callable {name!r} failed for example {number} of a call, {tuple(rows_TD.shape)} rows: "
            f"{type(error).__name__}: {error}. It must turn [T, D] rows into one vector."
        ) from error
    if not isinstance(vector, Tensor) or vector.ndim != 1 or not vector.is_floating_point():
        got = f"{vector.dtype} {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise CaptureError(f"the pool callable gave {got}: it must turn [T, D] rows into one vector of floats.")
    return vector


def _pool_block(block: Tensor, pool: Pool) -> Tensor:
    """Pool sequences of equal length, `[k, t, D]`, to `[k, D]`."""
    if block.shape[1] == 0:
        return block.new_full((block.shape[0], block.shape[2]), float("nan"))
    if pool == "cls":
        return block[:, 0]
    if pool == "last":
        return block[:, -1]
    if pool == "max":
        return block.amax(dim=1)
    precision = torch.float64 if block.dtype == torch.float64 else torch.float32
    return block.mean(dim=1, dtype=precision).to(block.dtype)
