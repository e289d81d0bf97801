"""One call of a model, for what it makes at some sites: how wide they are, what a text's rows are.

Must never know of stores.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.capture.early import can_end_early
from layerprobe.capture.probe import Probe
from layerprobe.sites.stacks import find_device

__all__ = ["look"]


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
