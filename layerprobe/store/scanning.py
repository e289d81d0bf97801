"""One look at the values of a shard before they are written: their checksum, and how many of them are not finite.

Each piece is read from memory once and looked at twice while it is in the cache, since the forward pass beside wants
the memory too. In numpy and not in torch, whose own threads would take turns with those of the forward.

Must never know what the values mean.
"""

from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

__all__ = ["Scan", "scan_tensor"]

# For each float dtype a whole number of its size, and from which on its bits without the sign are no finite value.
_SPECIAL = {
    torch.float64: ("i8", 0x7FF0000000000000),
    torch.float32: ("i4", 0x7F800000),
    torch.float16: ("i2", 0x7C00),
    torch.bfloat16: ("i2", 0x7F80),
    torch.float8_e4m3fn: ("i1", 0x7F),
}
# Stays in the cache of a core from one look to the next.
_PIECE_BYTES = 1 << 19


class Scan(NamedTuple):
    """What was seen: xxh3-64 as 16 hexadecimal digits, and how many values are NaN or infinite."""

    checksum: str
    num_nonfinite: int


def scan_tensor(tensor: Tensor) -> Scan:
    """Look at a contiguous tensor's memory once.

    Cost: one pass, no memory; a second over a piece where there is something to count.
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
    """Count NaN and infinite values: those whose exponent is all ones."""
    bits, largest = piece.view(whole), np.iinfo(whole).max
    # as a signed number the largest positive value tells, as an unsigned one the largest with the sign bit set
    if bits.max() < special and bits.view(whole.replace("i", "u")).max() <= largest + special:
        return 0
    return int(np.count_nonzero((bits & largest) >= special))
