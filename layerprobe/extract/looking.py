"""One call of a model, for what it makes at some sites: how wide they are, what a text's rows are.

Must never know of stores.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.capture.early import can_end_early
from layerprobe.capture.probe import Probe
from layerprobe.errors import LayerProbeError, ModelError, first_line
from layerprobe.extract.memory import ran_out
from layerprobe.sites.stacks import find_device

__all__ = ["look", "try_out"]


def look(
    model: nn.Module, sites: Sequence[str], input_ids_BS: Tensor, mask_BS: Tensor | None = None, pool: Any = None
) -> dict[str, Any]:
    """Call a model once, no further than its last asked site where it can end there.

    Args:
        model: Called as it is: see `running`.
        sites: Names.
        input_ids_BS: int64 `[B, S]`, on any device.
        mask_BS: 1 for real tokens; None where all are.
        pool: As for `Probe`.

    Returns:
        The value of each site, as `Probe` gives it.
    """
    ids_BS = input_ids_BS.to(find_device(model))
    mask_BS = torch.ones_like(ids_BS) if mask_BS is None else mask_BS.to(ids_BS.device)
    with Probe(model, list(sites), pool=pool, stop=can_end_early(model), this_thread=True) as probe:
        model(input_ids=ids_BS, attention_mask=mask_BS)
    return {site: probe[site] for site in sites}


def try_out(model: nn.Module, sites: Sequence[str], input_ids_BS: Tensor, precision: str | None) -> dict[str, Any]:
    """Look at what a model makes of a first text, in a precision that was asked for.

    Raises:
        ModelError: it does not run on one.
    """
    try:
        return look(model, sites, input_ids_BS)
    except LayerProbeError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        first = first_line(error)
        advice = "Call it on such a text without layerprobe to see why."
        if precision is not None:
            advice = f"Leave precision={precision!r} out: not every model computes so."
        raise ModelError(
            f"{type(model).__name__}: does not run on a short text ({type(error).__name__}: {first}). {advice}"
        ) from error
