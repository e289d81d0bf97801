"""Test whether a model's rows of a text depend on the padding after it.

A mask only keeps attention from seeing padding; a convolution over positions, or any other mixing of them, sees it.
Texts of such a model share a batch only if they have the same length, so that each gets the rows that it has alone.

Must never know of stores.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerprobe.errors import LayerProbeError
from layerprobe.extract.forward import REORDERED, find_dtype
from layerprobe.extract.looking import look
from layerprobe.extract.memory import ran_out
from layerprobe.extract.tokens import TokenizedUnit
from layerprobe.sites.resolve import Site, map_model

__all__ = ["TRIED_TOKENS", "sees_padding"]

# How many of the first tokens to test with.
TRIED_TOKENS = 8


def sees_padding(
    model: nn.Module, unit: TokenizedUnit, pad_id: int, precision: str | None = None, sites: Sequence[Site] = ()
) -> bool:
    """Compare a short text's rows alone with those in a batch where a longer text makes it padded.

    Args:
        model: Called as it is: see `running`.
        unit: Texts from whose first tokens both texts are made.
        pad_id: Id of the padding token.
        precision: From `find_precision`.
        sites: Sites to compare; if none of them has a row per token, every layer's output.

    Returns:
        True if the rows differ, and also if the model does not accept so short a text: assuming the worst only costs
        smaller batches. False if there are no rows to compare.

    Raises:
        LayerProbeError: as a call of the model raises it.

    Cost: two forward passes of a short text.
    """
    names, long = _choose_sites(model, sites), unit.ids[:TRIED_TOKENS].tolist()
    half = len(long) // 2
    if not names or not half:
        return False
    short = long[:half]
    batch = torch.tensor([long, short + [pad_id] * (len(long) - half)], device="cpu")
    mask = torch.tensor([[1] * len(long), [1] * half + [0] * (len(long) - half)], device="cpu")
    try:
        alone, padded = look(model, names, torch.tensor([short], device="cpu")), look(model, names, batch, mask)
    except LayerProbeError:
        raise
    except Exception as error:  # the model may raise anything for so short a text
        if ran_out(error):
            raise
        return True
    allowed = REORDERED[find_dtype(model, precision)]
    return not all(_agree(alone[name], padded[name], half, allowed) for name in names)


def _choose_sites(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    names = [site.name for site in sites if site.kind == "token"]
    mapped = map_model(model)
    return names or [site.name for site in mapped.select(f"{mapped.stacks[0].prefix}layers.*")]


def _agree(alone_1HD: Tensor, padded_2SD: Tensor, half: int, allowed: float) -> bool:
    """Whether the shorter text has the same rows, within rounding."""
    if alone_1HD.ndim != 3 or alone_1HD.shape[1] != half or padded_2SD.ndim != 3:
        return True  # not one row per token of the text
    alone_HD, padded_HD = alone_1HD[0], padded_2SD[1, :half]
    # values that are not finite cannot be compared
    are_finite = alone_HD.isfinite() & padded_HD.isfinite()
    difference = (padded_HD - alone_HD)[are_finite]
    return not difference.numel() or bool(difference.abs().max() <= allowed * alone_HD[are_finite].abs().max())
