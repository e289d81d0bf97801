"""Scan the values of a shard before they are written: compute checksums and count non-finite values.

Each piece is read from memory once and used twice while it is in the CPU cache, because the forward pass competes for
memory bandwidth. Uses numpy, because torch's threads would compete with those of the forward pass.

Must never know what the values mean.
"""

from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

__all__ = ["Scan", "scan_tensor"]

# For each float dtype: the integer dtype of its size, and the least magnitude bits that are not finite.
_SPECIAL = {
    torch.float64: ("i8", 0x7FF0000000000000),
    torch.float32: ("i4", 0x7F800000),
    torch.float16: ("i2", 0x7C00),
    torch.bfloat16: ("i2", 0x7F80),
    torch.float8_e4m3fn: ("i1", 0x7F),
}
# Small enough to stay in a core's cache between the two uses.
_PIECE_BYTES = 1 << 19


class Scan(NamedTuple):
    """Result of a scan: xxh3-64 as 16 hexadecimal digits, and the number of NaN or infinite values."""

    checksum: str
    num_nonfinite: int


def scan_tensor(tensor: Tensor) -> Scan:
    """Scan a contiguous tensor's memory once.

    Cost: one pass without a copy; a second pass over a piece only if it holds values to count.
    """
    memory = tensor.view(-1).view(torch.uint8).numpy()
    digest, num_nonfinite = xxhash.xxh3_64(), 0
    for start in range(0, len(memory), _PIECE_BYTES):
        piece = memory[start : start + _PIECE_BYTES]
        digest.update(piece.data)
        if tensor.dtype in _SPECIAL:
            num_nonfinite += _count_nonfinite(piece, *_SPECIAL[tensor.dtype])
    return Scan(digest.hexdigest(), num_nonfinite)


def _count_nonfinite(piece: np.ndarray, whole: str, special: int) -> int:
    """Count NaN and infinite values by their bits, at or above `special` without the sign."""
    bits, largest = piece.view(whole), np.iinfo(whole).max
    # signed, the maximum finds positive non-finite values; unsigned, those with the sign bit set
    if bits.max() < special and bits.view(whole.replace("i", "u")).max() <= largest + special:
        return 0
    return int(np.count_nonzero((bits & largest) >= special))
