"""Masks of four sequences of five positions, a value to select from, and the selections of both kinds."""

from typing import Any

import torch
from torch import Tensor

from layerprobe.capture.select import BatchSelection

CPU = torch.device("cpu")
MASKS = {
    "right": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]],
    "both sides": [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 1, 0, 0, 1], [1, 1, 0, 0, 0]],
    "empty rows": [[0, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "holes and empty rows": [[0, 0, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "nothing": [[0, 0, 0, 0, 0]] * 4,
    "everything": [[1, 1, 1, 1, 1]] * 4,
}


def make_value() -> Tensor:
    """Random `[4, 5, 3]`, the same each time."""
    return torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(2))


def select(mask: Any) -> BatchSelection:
    given = torch.tensor(mask)
    return BatchSelection.from_mask(given, (given.shape[0], given.shape[1]), CPU)


def index(selection: BatchSelection, mask: Any) -> BatchSelection:
    """The same selection as an index, the way it goes on a device."""
    places = torch.tensor(mask).flatten().nonzero()[:, 0]
    return BatchSelection(selection.lengths, selection.num_positions, None, places)
