"""The context an edit needs: which run of a module this is, selected tokens, random numbers and rows.

A moment is one value of one module in one call of the model. A module may run several times per call (ALBERT's shared
layer, an FFN in chunks), and the number of the run decides which edits apply and at which positions.

Hides how runs of a module are counted. Must never know of hooks or compilers, or of what an edit does.
Letters: B sequences, S positions, D width, T rows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerprobe.capture.calls import Call, Context
from layerprobe.edit.plan import Point, Slot
from layerprobe.edit.where import pick_tokens, place_in_text
from layerprobe.errors import CaptureError
from layerprobe.tables import format_count

__all__ = ["CallState", "Moment", "note_value"]


@dataclass
class CallState:
    """State of one call of the model: its number, and masks shared by several sites."""

    number: int
    masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    # for compiled graphs, which request the parts of a moment in separate operators
    moments: dict[int, "Moment"] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Moment:
    """One value of one module.

    Args:
        call: The call of the model.
        number: Index of this run of the module within the call.
        start: First position that the value covers; above 0 for a later chunk, and for logits of the last tokens.
        masks: For each edit a bool mask `[B, S]`, or None for every position.
        is_meant: For each edit whether it applies to this run.
    """

    call: Call
    number: int
    start: int
    masks: tuple[Tensor | None, ...]
    is_meant: tuple[bool, ...]

    def give(self, slot: Slot, mask: Tensor | None, value: Tensor) -> Tensor | None:
        """Return the extra input that an edit needs."""
        need = slot.edit.need
        if need == "rows":
            return _lay_out(slot, self.call, value, self.start)
        if need == "noise":
            maker = self._generator(slot, value.device)
            return torch.randn(value.shape, generator=maker, device=value.device, dtype=value.dtype)
        if need == "order":
            meant = torch.ones(value.shape[:-1], dtype=torch.bool, device="cpu") if mask is None else mask.cpu()
            meant = meant.any(-1) if meant.ndim == value.ndim else meant
            places = meant.flatten().nonzero()[:, 0]
            order = torch.arange(meant.numel(), device="cpu")
            order[places] = places[
                torch.randperm(len(places), generator=self._generator(slot, torch.device("cpu")), device="cpu")
            ]
            return order.to(value.device)
        return None

    def _generator(self, slot: Slot, device: torch.device) -> torch.Generator:
        """Return a generator that depends only on the seed and on the value's site, call and position."""
        edit: Any = slot.edit
        # with a cache the newest token's logits come alone, without one they come last: the noise must be the same
        start = 0 if slot.site.name == "logits" else self.start
        name = f"{edit.seed}/{slot.site.name}/{self.call.state.number}/{start}"
        digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def note_value(call: Call, point: Point, shape: Sequence[int], device: torch.device) -> Moment:
    """Record that a module produced a value, and compute the masks of the selected tokens.

    Raises:
        CaptureError: the value has no row per token, or the call lacks the information to select tokens.
    """
    number, start = call.counts.get(point.key, 0), None
    num_missing = _count_missing(shape, call.context(point.slots[0].index).shape)
    if num_missing and point.is_chunked:
        start = call.counts.get(~point.key, 0)
        stop, size = start + shape[1], shape[1] + num_missing
        call.counts[~point.key] = stop % size
        if stop == size:
            call.counts[point.key] = number + 1
    else:
        call.counts[point.key] = number + 1
        if num_missing and point.makes_logits:
            start = num_missing  # `logits_to_keep` keeps the last positions
    is_meant = tuple(slot.site.call_index in (None, number) for slot in point.slots)
    masks = tuple(
        _mask_of(call, slot, shape, start, device) if meant else None
        for slot, meant in zip(point.slots, is_meant, strict=True)
    )
    for slot, meant in zip(point.slots, is_meant, strict=True):
        call.seen |= meant << slot.index
    return Moment(call, number, start or 0, masks, is_meant)


def _count_missing(shape: Sequence[int], whole: tuple[int, int] | None) -> int:
    """Count the tokens of a call for which a value has no row; 0 if its shape differs in any other way."""
    is_part = whole is not None and len(shape) == 3 and shape[0] == whole[0] and shape[1] < whole[1]
    return whole[1] - shape[1] if whole is not None and is_part else 0


def _mask_of(call: Call, slot: Slot, shape: Sequence[int], start: int | None, device: torch.device) -> Tensor | None:
    """Compute the mask of the tokens of a value that an edit selects; `start` is None unless the value is a part."""
    if slot.spot.kind == "all":
        return None
    context = _context_of(call, slot)
    is_part = start is not None and context.shape is not None and start + shape[1] <= context.shape[1]
    if context.shape is None or len(shape) != 3 or (tuple(shape[:2]) != context.shape and not is_part):
        raise CaptureError(
            f"lp.{slot.edit.name} at {slot.site.name!r}: its value has shape {tuple(shape)}, not a row for each token "
            f"of {context.shape}. Edit every position with where='all'."
        )
    key = (id(slot.spot) if slot.spot.kind != "real" else 0, id(context))
    masks = call.state.masks
    if key not in masks:
        masks[key] = pick_tokens(slot.spot, context, device)
    mask = masks[key]
    if mask is None:
        return None
    width = shape[-1] if slot.site.part is None else shape[-1] // 3
    if mask.ndim == 3 and mask.shape[-1] != width:
        raise CaptureError(
            f"lp.{slot.edit.name} at {slot.site.name!r}: where is a mask of {mask.shape[-1]} columns, the value has "
            f"{width}. Pass a mask [B, S], or one as wide as the site."
        )
    mask = mask if mask.device == device else mask.to(device)  # layers may be on different devices
    return mask if start is None else mask[:, start : start + shape[1]]


def _context_of(call: Call, slot: Slot) -> Context:
    """Return the context of the texts that a value has rows for; in cross attention, that of the other stack."""
    if slot.site.kind != "source":
        return call.context(slot.index)
    source = call.find_source(slot.index)
    if source is None:
        raise CaptureError(
            f"lp.{slot.edit.name} at {slot.site.name!r}: its rows are the tokens of the other half, of whose padding "
            "this call does not tell. Edit every position with where='all'."
        )
    return source


def _lay_out(slot: Slot, call: Call, value: Tensor, start: int) -> Tensor:
    """Lay given values out on a value, by position or by the real tokens of each text."""
    edit: Any = slot.edit
    values: Tensor = edit.values.to(value.dtype)
    is_whole = slot.site.kind == "source" and values.shape[1:] == value.shape[1:]
    if slot.site.kind == "example" or is_whole:
        return _expand(slot, values, value)
    context = _context_of(call, slot)
    size = value.shape[1]
    if values.ndim == 3:
        first = (context.first_position or 0) + start
        if context.first_position and values.shape[1] <= first:
            return value.clone()  # generated tokens beyond the given values
        whole = context.shape is None or values.shape[1] == context.shape[1]
        return _expand(slot, values[:, first : first + size] if whole else values, value)
    place_BS, length_B1 = place_in_text(context)
    place_BS = place_BS[:, start : start + size].to(value.device)
    if not context.first_position and not bool((length_B1 == len(values)).all()):
        raise CaptureError(
            f"lp.patch at {slot.site.name!r}: {format_count(len(values), 'row')} for texts of "
            f"{length_B1.flatten().tolist()} real tokens: "
            "give as many rows as each text has tokens, or one vector."
        )
    laid = values[place_BS.clamp(0, len(values) - 1)]
    return torch.where(((place_BS >= 0) & (place_BS < len(values)))[..., None], laid, value)


def _expand(slot: Slot, values: Tensor, value: Tensor) -> Tensor:
    if values.shape[0] not in (1, value.shape[0]) or values.shape[1:] != value.shape[1:]:
        edit: Any = slot.edit
        raise CaptureError(
            f"lp.patch at {slot.site.name!r}: values of shape {tuple(edit.values.shape)} do not fit "
            f"{tuple(value.shape)}. Patch a batch of the same shape, or give [T, D] or [D]."
        )
    return values.expand_as(value)
