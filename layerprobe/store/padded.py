"""Examples of a site as one padded tensor and its mask: what a decoder takes instead of running an encoder.

A store keeps no padding and no mask. Both are made here from the lengths of the examples, and always together: states
without their mask would let a decoder silently read padding.

Hides how rows are padded. Must never know of models; transformers is used only for its names for states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerprobe.errors import NonFiniteError, OptionError, SiteError
from layerprobe.store.naming import match_sites
from layerprobe.store.siteview import SiteView
from layerprobe.tables import format_dtype

__all__ = ["EncoderOutputs", "choose_layer", "pad_examples"]


@dataclass(frozen=True, eq=False)
class EncoderOutputs:
    """States of some examples at one site, padded on the right, and their mask.

    Args:
        site: The site.
        states: `[B, S, D]`; zeros where the mask is 0.
        mask: int64 `[B, S]`, 1 for each real token.
    """

    site: str
    states: Tensor
    mask: Tensor

    def to(self, device: str | torch.device) -> "EncoderOutputs":
        """Return the same on another device."""
        return EncoderOutputs(self.site, self.states.to(device), self.mask.to(device))

    def inputs(self) -> dict[str, Any]:
        """Return keyword arguments for an encoder-decoder model: `model.generate(**outputs.inputs())`."""
        from transformers.modeling_outputs import BaseModelOutput

        # the annotations use a tensor type that exists only in torch's stubs
        states: Any = self.states
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": self.mask}

    def cross_inputs(self) -> dict[str, Tensor]:
        """Return keyword arguments for a decoder with cross attention."""
        return {"encoder_hidden_states": self.states, "encoder_attention_mask": self.mask}


def choose_layer(layer: int | str, sites: Sequence[str], owner: str) -> str:
    """Find the one stored site that is selected.

    Args:
        layer: A pattern such as `layers.-1` or `embeddings`, or a layer number. Negative layers count from the last
            stored one; numbers mean encoder layers if the store has any.
        sites: The stored sites.
        owner: What to call the store in messages.

    Raises:
        SiteError: nothing stored is selected, or several sites are.
    """
    if isinstance(layer, bool) or not isinstance(layer, (int, str)):
        raise SiteError(f"layer={layer!r} of {owner}: a layer is a number or a site. Use 5, -1 or 'layers.5'.")
    if isinstance(layer, int):
        has_encoder = any(site.startswith("encoder.layers.") for site in sites)
        layer = f"{'encoder.' if has_encoder else ''}layers.{layer}"
    found = match_sites(layer, sites, owner)
    if len(found) != 1:
        raise SiteError(f"{layer!r} means {len(found)} sites of {owner}: {', '.join(found)}. Name one of them.")
    return found[0]


def pad_examples(view: SiteView, examples: Any, dtype: torch.dtype) -> EncoderOutputs:
    """Read some examples of a site and pad them to the longest.

    Args:
        view: The site.
        examples: Ordinals, a slice of them, or one.
        dtype: Dtype of the states.

    Raises:
        OptionError: the site or store has no row for every token, no example is requested, one has no tokens, or the
            dtype is not a floating-point one.
        NonFiniteError: a value is not finite, as stored or in the dtype.
        MissingExample: an example is not in the store.
    """
    if view.kind != "token":
        what = "attention weights" if view.kind == "attention" else "one vector per example"
        raise OptionError(
            f"states of {view.site!r}: it holds {what}; a decoder reads a row per token. Use another site."
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise OptionError(
            f"states of {view.site!r} as {dtype!r}: no such states. Use torch.float32, float16 or bfloat16."
        )
    view.catalog.need_every_row(f"states of {view.site!r}", "Extract all rows.")
    found = view[examples]
    rows: list[Any] = found if isinstance(found, list) else [found]
    if not rows:
        raise OptionError(f"states of {view.site!r}: no example is asked for. Name one at least.")
    lengths = torch.tensor([len(one) for one in rows], device="cpu")
    if int(lengths.min()) == 0:
        place = int(lengths.argmin())
        raise OptionError(f"states of {view.site!r}: example {place} of those asked for has no tokens. Leave it out.")
    mask = (torch.arange(int(lengths.max()), device="cpu") < lengths[:, None]).long()
    states = torch.zeros(*mask.shape, view.width, dtype=dtype, device="cpu")
    for place, one in enumerate(rows):
        # float8 has no arithmetic, so convert by way of float32
        states[place, : len(one)] = one.float().to(dtype)
        if not bool(torch.isfinite(states[place]).all()):
            raise NonFiniteError(
                f"states of {view.site!r} as {format_dtype(dtype)}: example {place} of those asked for "
                "is not finite. Leave it out, or extract the site again in a wider dtype."
            )
    return EncoderOutputs(view.site, states, mask)
