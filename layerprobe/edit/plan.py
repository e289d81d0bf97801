"""Turn the requested edits into a validated list of edits per module.

Resolves patterns to sites, tokens to ids and heads to columns, and checks widths, devices and what each site allows,
all before the model runs and before any hook exists.

Hides which sites can be edited and how heads are laid out in a vector. Must never touch hooks or run the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.edit.edits import Edit, Patch
from layerprobe.edit.where import Spot, resolve_where
from layerprobe.errors import OptionError, SiteError
from layerprobe.sites.resolve import ModelMap, Site
from layerprobe.sites.stacks import find_device
from layerprobe.store.guard import brief

__all__ = ["Point", "Slot", "head_width", "plan_points", "require_editable"]

_WITH_HEADS = ("query", "key", "value", "context")


@dataclass(frozen=True, eq=False)
class Slot:
    """One edit at one site.

    Args:
        index: Index of the site among the edited sites.
        site: The site.
        edit: The edit, fitted to the site.
        spot: The selected tokens.
        columns: bool `[D]`, the selected columns; None for all.
    """

    index: int
    site: Site
    edit: Edit
    spot: Spot
    columns: Tensor | None


@dataclass(frozen=True, eq=False)
class Point:
    """A module whose output or input is edited, with its edits in the order given."""

    key: int
    module: nn.Module
    takes: str
    slots: tuple[Slot, ...]
    is_chunked: bool

    @property
    def makes_logits(self) -> bool:
        """Whether the module outputs logits per token, of all tokens or only those that `logits_to_keep` selects."""
        return any(slot.site.name == "logits" and slot.site.kind == "token" for slot in self.slots)


def plan_points(
    mapped: ModelMap, asked: Mapping[str, Edit | Sequence[Edit]], tokenizer: Any
) -> tuple[tuple[Site, ...], tuple[Point, ...]]:
    """Check edits and group them by module.

    Args:
        mapped: The model.
        asked: Edits by pattern.
        tokenizer: For a `where` that names tokens, or None.

    Returns:
        The edited sites, and the edited modules.

    Raises:
        SiteError: a pattern matches nothing, or a site cannot be edited.
        OptionError: an edit does not fit a site.
    """
    if not isinstance(asked, Mapping) or not asked:
        raise OptionError(
            f"lp.edit: {_shorten(asked)} is no edit: give them by site, as in {{'layers.3': lp.scale(0.5)}}."
        )
    wanted = []
    for pattern, edits in asked.items():
        listed = [edits] if isinstance(edits, Edit) else edits
        if not isinstance(listed, (list, tuple)) or not listed or not all(isinstance(one, Edit) for one in listed):
            raise OptionError(
                f"lp.edit at {pattern!r}: {_shorten(edits)} is no edit: give one of lp.steer, lp.ablate, lp.patch, "
                "lp.project_out, lp.noise, lp.clamp, lp.scale, lp.replace, or a list of them."
            )
        wanted += [(site, edit) for site in mapped.select(pattern) for edit in listed]
    names = list(dict.fromkeys(site.name for site, _ in wanted))
    grouped: dict[tuple[str, str], list[Slot]] = {}
    for site, edit in wanted:
        slot = _make_slot(mapped, names.index(site.name), site, edit, tokenizer)
        grouped.setdefault((site.module, site.takes), []).append(slot)
    points = tuple(
        Point(key, mapped.model.get_submodule(path), takes, tuple(slots), mapped.is_chunked(slots[0].site))
        for key, ((path, takes), slots) in enumerate(grouped.items())
    )
    found = {site.name: site for site, _ in wanted}
    return tuple(found.values()), points


def _shorten(asked: object) -> str:
    """Describe the object given in place of an edit; a tensor by its shape."""
    if isinstance(asked, Tensor):
        return f"a tensor {tuple(asked.shape)}"
    return brief(repr(asked))


def require_editable(site: Site, owner: str) -> None:
    """Refuse sites at which an edit would have no effect, or only part of it.

    Raises:
        SiteError: the site cannot be edited; names the site to edit instead.
    """
    if site.takes == "weights":
        raise SiteError(
            f"lp.edit at {site.name!r} of {owner}: the model does not compute with these weights again, a change would "
            f"go nowhere. Edit {site.name.replace('.weights', '.context')!r}, what they mix."
        )
    if site.name.endswith(".mid") and site.takes == "input":
        layer = site.name.removesuffix(".mid")
        raise SiteError(
            f"lp.edit at {site.name!r} of {owner}: its residual stream goes past every module there, a change would "
            f"reach the FFN alone. Edit '{layer}.attention.out', which is added to it, or {layer!r}."
        )


def head_width(mapped: ModelMap, site: Site) -> tuple[int, int] | None:
    """Return the head width and the number of heads at a site, or None if it has no heads.

    Keys and values may have fewer heads than queries, and ConvBERT's context has columns beyond those of its heads.
    """
    prefix, _, last = site.name.rpartition(".")
    known = {other.name: other for other in mapped.table}
    weights, query = known.get(f"{prefix}.weights"), known.get(f"{prefix}.query")
    if last not in _WITH_HEADS or weights is None or query is None or site.width is None:
        return None
    assert weights.width and query.width
    width = query.width // weights.width
    return width, min(site.width // width, weights.width)


def _make_slot(mapped: ModelMap, index: int, site: Site, edit: Edit, tokenizer: Any) -> Slot:
    require_editable(site, mapped.owner)
    device = _device_at(mapped, site)
    for label, tensor in edit.tensors.items():
        if tensor.device != device:
            raise OptionError(
                f"lp.{edit.name} at {site.name!r}: its {label} is on {tensor.device}, the site on {device}. "
                f"Move it with .to({str(device)!r})."
            )
    if edit.needs_whole and mapped.is_chunked(site):
        raise OptionError(
            f"lp.{edit.name} at {site.name!r}: chunk_size_feed_forward makes its value in chunks, and this edit needs "
            f"the whole. Set model.config.chunk_size_feed_forward to 0 before the model is made."
        )
    if site.kind == "example" and edit.where is not None and not (isinstance(edit.where, str) and edit.where == "all"):
        raise OptionError(f"lp.{edit.name} at {site.name!r}: it has one vector per text: leave out where.")
    fitted = edit.fit(site.name, site.width)
    if isinstance(fitted, Patch):
        most = 2 if site.kind == "example" else 3
        if fitted.values.ndim > most:
            raise OptionError(f"lp.patch at {site.name!r}: values {tuple(fitted.values.shape)} are no [B, D].")
        fitted = replace(fitted, values=fitted.values.to(device))
    spot = Spot("all") if site.kind == "example" else resolve_where(edit.where, tokenizer)
    return Slot(index, site, fitted, spot, _find_columns(mapped, site, edit, device))


def _find_columns(mapped: ModelMap, site: Site, edit: Edit, device: torch.device) -> Tensor | None:
    """Convert heads or units to a column mask."""
    asked = edit.heads if edit.heads is not None else edit.units
    if asked is None:
        return None
    if site.width is None:
        raise OptionError(f"lp.{edit.name} at {site.name!r}: its width is not known before it runs: leave out units.")
    width, count, label = 1, site.width, "units"
    if edit.heads is not None:
        found = head_width(mapped, site)
        if found is None:
            raise OptionError(
                f"lp.{edit.name} at {site.name!r}: it has no heads: they are told apart at attention.query, key, value "
                "and context. Edit one of these, or use units."
            )
        (width, count), label = found, "heads"
    columns = torch.zeros(site.width, dtype=torch.bool, device=device)
    for number in asked:
        if not -count <= number < count:
            raise OptionError(f"lp.{edit.name} at {site.name!r}: no {label} {number}: they are 0 to {count - 1}.")
        first = number % count * width
        columns[first : first + width] = True
    return columns


def _device_at(mapped: ModelMap, site: Site) -> torch.device:
    """Return the device of a site's values, which may differ from that of the first layer."""
    module = mapped.model.get_submodule(site.module)
    device = next((parameter.device for parameter in module.parameters()), None)
    return find_device(mapped.model) if device is None or device.type == "meta" else device
