"""Call a model once and return its values at some sites, to measure their width or a text's rows.

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
    """Call a model once, ending after the last given site if the model allows that.

    Args:
        model: Called as it is: see `running`.
        sites: Names of sites.
        input_ids_BS: int64 `[B, S]`, on any device.
        mask_BS: 1 for real tokens; None if all are real.
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
    """Call a model on a first text, in the precision of the run.

    Raises:
        ModelError: the model does not run on it.
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
