"""Activation patching: the effect of each site, position and head on a metric.

A clean and a corrupt text differ in the detail of interest. Each patch runs the corrupt text with one value replaced by
the clean one. A batch holds many copies, each with its own patch, so a sweep takes a few dozen forward passes.
`attribution` estimates all patches from one gradient.

Hides how patches are batched. Must never know of hooks.
Letters: B copies in a batch, S positions, D width, L sites, P positions patched, H heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.capture.probe import Probe
from layerprobe.edit.editor import edit
from layerprobe.edit.edits import Edit
from layerprobe.edit.effects import Effects
from layerprobe.edit.making import patch, replace
from layerprobe.edit.plan import head_width, require_editable
from layerprobe.errors import CaptureError, OptionError
from layerprobe.models import LoadedModel
from layerprobe.sites.resolve import ModelMap, Site, map_model
from layerprobe.sites.stacks import find_called, need_model, widen
from layerprobe.store.guard import check_count, is_whole
from layerprobe.tables import format_count
from layerprobe.telling import make_bar

__all__ = ["patching"]

Metric = Callable[[Any], Tensor]
Batch = Mapping[str, Any]


def patching(
    model: nn.Module | LoadedModel,
    clean: Batch,
    corrupt: Batch,
    metric: Metric,
    sites: str | Sequence[str] = "layers.*",
    *,
    positions: bool | Sequence[int] = True,
    heads: bool = False,
    method: str = "exact",
    batch_size: int = 32,
    tokenizer: Any = None,
    progress: bool | None = None,
) -> Effects:
    """Measure how far a metric moves from the corrupt run towards the clean one when one value is patched.

    Args:
        model: A supported model in eval mode, or the result of `load_model`, with its tokenizer; of a
            SentenceTransformer the model in it.
        clean, corrupt: Keyword arguments of the model for one text each, with the same number of tokens. In an
            encoder-decoder model, positions are those of the half that the sites are in, for the decoder by
            `decoder_input_ids` or `labels`.
        metric: Function from the model's output to one number per row, `[B]`: `lambda out: out.logits[:, 4, answer]`.
        sites: Sites to patch, with a vector per token.
        positions: True: patch every real token, one at a time. A list: only these positions. False: all at once.
        heads: Patch single heads, at attention.query, key, value and context.
        method: `exact` runs each patch. `attribution` estimates `(clean - corrupt) * gradient` with two forward passes
            and one backward pass.
        batch_size: Patched copies per forward pass, for `exact`.
        tokenizer: Names the positions in tables and pictures.
        progress: Show a progress bar on stderr; None: only on a terminal.

    Returns:
        The effects, which print, save and plot.

    Raises:
        SiteError, ArchitectureError: as `lp.edit`.
        OptionError: the texts do not match, a site has no row per token or no heads, the model is in training mode.
        CaptureError: the metric gives something other than one number per row.

    Cost: `L * P * H / batch_size` forward passes of a batch, plus two; the clean values of all sites are held.

    Source: exact patching: Meng et al. 2022, section 2 (causal tracing). Attribution: Nanda 2023 (attribution
        patching), the first-order term of the same difference.

    Example:
        >>> import torch, layerprobe as lp
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> model = BertModel(tiny).eval()
        >>> clean, corrupt = ({"input_ids": torch.tensor([ids])} for ids in ([5, 6, 7], [5, 8, 7]))
        >>> found = lp.patching(model, clean, corrupt, lambda out: out.last_hidden_state[:, 0, 0])
        >>> found.effects.shape
        torch.Size([2, 3])
    """
    if isinstance(model, LoadedModel):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    model = find_called(need_model(model))
    sweep = _plan(model, clean, corrupt, metric, sites, positions, heads)
    if method not in ("exact", "attribution"):
        raise OptionError(f"patching: no method {method!r}: use 'exact' or 'attribution'.")
    check_count("patching: batch_size", batch_size)
    names = [site.name for site in sweep.sites]
    with torch.no_grad(), Probe(model, names, this_thread=True) as probe:
        clean_metric = sweep.measure(model(**clean), 1)
    values = {name: probe[name] for name in names}
    if method == "exact":
        with torch.no_grad():
            corrupt_metric = sweep.measure(model(**corrupt), 1)
            found = _run_patches(sweep, values, batch_size, progress) - corrupt_metric
    else:
        corrupt_metric, found = _attribute(sweep, values)
    heads_found = None if sweep.num_heads is None else tuple(range(sweep.num_heads))
    return Effects(
        tuple(names),
        sweep.positions,
        heads_found,
        found.reshape(sweep.shape),
        float(clean_metric),
        float(corrupt_metric),
        method,
        _name_positions(sweep, tokenizer),
    )


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The tokens of one text in a stack: ids `[S]`, or None for embeddings, and a bool mask `[S]` of the real ones."""

    ids: Tensor | None
    real: Tensor


@dataclass(frozen=True, eq=False)
class _Sweep:
    """A validated sweep; `positions` and `num_heads` are None if all are patched at once.

    `tokens` holds those of clean and of corrupt.
    """

    model: nn.Module
    clean: Batch
    corrupt: Batch
    metric: Metric
    sites: tuple[Site, ...]
    tokens: tuple[_Tokens, _Tokens]
    positions: tuple[int, ...] | None
    num_heads: int | None
    head_widths: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        more = [len(self.positions)] if self.positions is not None else []
        return (len(self.sites), *more, *([self.num_heads] if self.num_heads is not None else []))

    def measure(self, output: Any, num_rows: int) -> Tensor:
        """Compute the metric of a batch, float64 `[B]`."""
        found = self.metric(output)
        if not isinstance(found, Tensor) or tuple(found.shape) != (num_rows,):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise CaptureError(
                f"patching: the metric gave {got} for {format_count(num_rows, 'row')}: it must give one number per "
                "row, as in lambda out: out.logits[:, 4, answer]."
            )
        return widen(found)


def _plan(
    model: nn.Module,
    clean: Batch,
    corrupt: Batch,
    metric: Metric,
    sites: str | Sequence[str],
    positions: bool | Sequence[int],
    heads: bool,
) -> _Sweep:
    """Check everything before the model runs."""
    if not callable(metric):
        raise OptionError(f"patching: metric={metric!r} is no function: give one from the output to a number per row.")
    mapped = map_model(model)
    if model.training:
        raise OptionError("patching a model in training mode: dropout would move every number. Call model.eval().")
    chosen = mapped.select(sites)
    widths = [_check_site(mapped, site, heads) for site in chosen]
    if heads and len({count for _, count in widths}) > 1:
        raise OptionError(f"patching: sites with {sorted({count for _, count in widths})} heads: sweep them apart.")
    tokens = _check_texts(mapped, chosen, clean, corrupt, has_positions=positions is not False)
    listed: tuple[int, ...] | None = None
    if positions is True:
        listed = tuple(tokens[0].real.nonzero()[:, 0].tolist())
    elif positions is not False:
        listed = tuple(positions)
        size = len(tokens[0].real)
        if not listed or not all(is_whole(place) and -size <= place < size for place in listed):
            raise OptionError(
                f"patching: positions={positions!r}: the texts have {size}. Give a list of them, or True."
            )
        listed = tuple(int(place) % size for place in listed)
    num_heads = widths[0][1] if heads else None
    return _Sweep(model, clean, corrupt, metric, chosen, tokens, listed, num_heads, tuple(w for w, _ in widths))


def _check_site(mapped: ModelMap, site: Site, heads: bool) -> tuple[int, int]:
    require_editable(site, mapped.owner)
    if site.kind not in ("token", "unknown"):
        raise OptionError(f"patching {site.name!r}: it has no row per token of the text. Patch 'layers.*' or the like.")
    found = head_width(mapped, site) if heads else (site.width or 0, 1)
    if found is None:
        raise OptionError(f"patching {site.name!r} by heads: it has none. Use attention.query, key, value or context.")
    return found


def _check_texts(
    mapped: ModelMap, sites: Sequence[Site], clean: Batch, corrupt: Batch, *, has_positions: bool
) -> tuple[_Tokens, _Tokens]:
    """Check that the texts' positions match, and return the tokens of both for which the sites have rows."""
    for name, batch in (("clean", clean), ("corrupt", corrupt)):
        if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
            raise OptionError(f"patching: {name} is {type(batch).__name__}: give what the model is called with.")
    shapes = [
        {key: tuple(value.shape) for key, value in batch.items() if isinstance(value, Tensor)}
        for batch in (clean, corrupt)
    ]
    if shapes[0] != shapes[1] or any(shape[0] != 1 for shape in shapes[0].values()):
        raise OptionError(
            f"patching: clean is {shapes[0]}, corrupt {shapes[1]}: give one text each, of the same number of tokens."
        )
    last = len(mapped.stacks) - 1
    stacks = {last if site.stack is None else site.stack for site in sites}
    if has_positions and len(stacks) > 1:
        raise OptionError(
            "patching: sites of the encoder and of the decoder have other tokens: sweep them apart, or all positions "
            "at once with positions=False."
        )
    prefix = "decoder_" if max(stacks) else ""
    one, other = (_read_tokens(mapped.model, batch, prefix) for batch in (clean, corrupt))
    masks = [[batch.get(f"{name}attention_mask") for name in ("", "decoder_")] for batch in (clean, corrupt)]
    for pair in ((one.real, other.real), *zip(*masks, strict=True)):
        if any(mask is not None for mask in pair) and not torch.equal(*pair):  # type: ignore[arg-type]
            raise OptionError("patching: clean and corrupt have other attention masks: pad them alike.")
    return one, other


def _read_tokens(root: Any, batch: Batch, prefix: str) -> _Tokens:
    """Read a stack's tokens from the model's arguments; a decoder's may be derived from labels."""
    ids, embeds, mask = (batch.get(f"{prefix}{name}") for name in ("input_ids", "inputs_embeds", "attention_mask"))
    if prefix and ids is None and embeds is None and batch.get("labels") is not None:
        ids = root.prepare_decoder_input_ids_from_labels(batch["labels"])
        mask = ids != root.config.pad_token_id if mask is None else mask
    tokens = embeds if ids is None else ids
    if tokens is None:
        accepted = "decoder_input_ids, decoder_inputs_embeds or labels" if prefix else "input_ids or inputs_embeds"
        raise OptionError(f"patching: clean has {list(batch)}: give {accepted}.")
    if tokens.ndim != (3 if ids is None else 2):
        raise OptionError(
            f"patching: {prefix}{'inputs_embeds' if ids is None else 'input_ids'} of shape {tuple(tokens.shape)}: a "
            "text with several choices has no one row of positions. Patch the base model, a choice at a time."
        )
    everything = torch.ones(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    return _Tokens(None if ids is None else ids[0], everything if mask is None else mask[0].bool())


def _run_patches(sweep: _Sweep, values: Mapping[str, Tensor], batch_size: int, progress: bool | None) -> Tensor:
    """Run every patch in batches of copies of the corrupt text; returns float64, one metric per patch, site-major."""
    places = sweep.positions if sweep.positions is not None else (None,)
    numbers = range(sweep.num_heads) if sweep.num_heads is not None else (None,)
    jobs = list(product(range(len(sweep.sites)), places, numbers))
    found = torch.empty(len(jobs), dtype=torch.float64, device="cpu")
    with make_bar(len(jobs), "", progress, "patches") as bar:
        for start in range(0, len(jobs), batch_size):
            part = jobs[start : start + batch_size]
            copies = {key: _repeat(value, len(part)) for key, value in sweep.corrupt.items()}
            with edit(sweep.model, _make_edits(sweep, values, part)):
                found[start : start + len(part)] = sweep.measure(sweep.model(**copies), len(part)).cpu()
            bar.update(len(part))
    return found


def _make_edits(sweep: _Sweep, values: Mapping[str, Tensor], part: Sequence[tuple[Any, ...]]) -> dict[str, Edit]:
    """Give each row of a batch its own patch: one edit per site, masked to its rows, positions and columns."""
    masks: dict[int, Tensor] = {}
    for row, (number, place, head) in enumerate(part):
        value = values[sweep.sites[number].name]
        if number not in masks:
            size = (len(part), *value.shape[1 : 2 if head is None else 3])
            masks[number] = torch.zeros(size, dtype=torch.bool, device="cpu")
        where = masks[number][row] if place is None else masks[number][row, place : place + 1]
        width = sweep.head_widths[number]
        (where if head is None else where[:, head * width : (head + 1) * width]).fill_(True)
    return {
        sweep.sites[number].name: patch(values[sweep.sites[number].name], where=mask.to(sweep.tokens[0].real.device))
        for number, mask in masks.items()
    }


def _attribute(sweep: _Sweep, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the metric of the corrupt text and the first-order effect of every patch.

    The gradient is taken with respect to a zero added at each site, which works even if the site is only part of its
    module's output and no parameter requires a gradient.
    """
    names = [site.name for site in sweep.sites]
    with torch.enable_grad():
        nothing = {name: torch.zeros_like(values[name]).requires_grad_() for name in names}

        def add(name: str) -> Edit:
            return replace(lambda value: value + nothing[name], where="all")

        adding = edit(sweep.model, {name: add(name) for name in names})
        with adding, Probe(sweep.model, names, this_thread=True) as probe:
            measured = sweep.measure(sweep.model(**sweep.corrupt), 1)
        gradients = torch.autograd.grad(measured.sum(), [nothing[name] for name in names], allow_unused=True)
    effects = []
    for number, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
        change = widen(values[name]) - widen(probe[name].detach())
        effect = (change * (0 if gradient is None else widen(gradient)))[0]
        if sweep.num_heads is not None:
            width = sweep.head_widths[number] * sweep.num_heads
            effect = effect[:, :width].unflatten(-1, (sweep.num_heads, -1)).sum(-1)
        else:
            effect = effect.sum(-1)
        effects.append(effect.sum(0) if sweep.positions is None else effect[list(sweep.positions)])
    return measured.detach()[0], torch.stack(effects).cpu()


def _repeat(value: Any, count: int) -> Any:
    # not a view: a model may call .view() on it, for example on labels
    return value.expand(count, *value.shape[1:]).contiguous() if isinstance(value, Tensor) else value


def _name_positions(sweep: _Sweep, tokenizer: Any) -> tuple[str, ...] | None:
    ids = [tokens.ids.tolist() for tokens in sweep.tokens if tokens.ids is not None]
    if tokenizer is None or sweep.positions is None or len(ids) < 2:
        return None
    rows = [tokenizer.convert_ids_to_tokens(each) for each in ids]
    pairs = [(rows[0][place], rows[1][place]) for place in sweep.positions]
    return tuple(one if one == other else f"{one}/{other}" for one, other in pairs)
