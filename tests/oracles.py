"""What each site must hold, worked out a second time: from `hidden_states`, from `attentions`, or by arithmetic.

`compare_sites` runs a tiny model under a probe of all its sites and holds every value against its oracle. The tests
of families and the table of docs/sites.md both come from here.

Letters: B sequences, S positions, D width, H heads.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import layerprobe as lp
from families import FAMILIES, IS_V5, Family, build, make_batch
from layerprobe.sites.anatomy import Fused, find_anatomy

__all__ = [
    "TOLERANCE",
    "Run",
    "build_head",
    "compare_logits",
    "compare_sites",
    "end_layer",
    "expected_attentions",
    "make_head_batch",
    "mix_heads",
    "real_queries",
    "run_family",
    "run_head",
]

# Of attention weights and what they mix: two kernels sum in another order, in float32, over values of a few units.
TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Run:
    """One call of a tiny model under a probe of all its sites, and the same call without it."""

    family: Family
    model: Any
    batch: dict[str, Tensor]
    made: Any
    bare: Any
    probed: Any


@functools.cache
def run_family(name: str) -> Run:
    """Run a variant once without a probe and once with every site probed."""
    model = build(name)
    return _run(FAMILIES[name], model, make_batch(), [site.name for site in lp.sites(model)])


@functools.cache
def run_head(name: str, head: str) -> Run:
    """Run a task model the same way, but for attention weights: a decoder fills a cache, which refuses them."""
    model = build_head(name, head)
    asked = [site.name for site in lp.sites(model) if not site.name.endswith(".weights")]
    return _run(FAMILIES[name], model, make_head_batch(head), asked)


@torch.no_grad()
def _run(family: Family, model: Any, batch: dict[str, Tensor], asked: list[str]) -> Run:
    bare = model(**batch, output_hidden_states=True)
    with lp.Probe(model, asked) as probe:
        probed = model(**batch, output_hidden_states=True)
    return Run(family, model, batch, probe.calls[0], bare, probed)


def build_head(name: str, head: str) -> Any:
    """Build a task model; one that writes text looks only back."""
    is_writer = head.endswith(("CausalLM", "LMHeadModel", "Decoder"))
    return build(name, head, is_decoder=True) if is_writer else build(name, head)


def make_head_batch(head: str) -> dict[str, Tensor]:
    """Make what a task model takes: three choices, or a question token, where it needs them."""
    batch = make_batch()
    if head == "SplinterForPreTraining":
        batch["input_ids"][:, 3] = 4
    if head.endswith("MultipleChoice"):
        return {key: torch.stack([value, value.flip(0), value], dim=1) for key, value in batch.items()}
    return batch


def compare_logits(name: str, head: str) -> float | None:
    """Hold the logits of a task model against its output.

    Returns:
        The largest difference, 0.0 where they are bit-equal, or None where no module makes the logits.
    """
    run = run_head(name, head)
    if "logits" not in run.made:
        return None
    logits, output = run.made["logits"], run.bare
    if "start_logits" in output:
        expected = torch.stack([output.start_logits, output.end_logits], dim=-1)
    else:
        # multiple choice has a column of choices where the output has a row; the rest differ by a last dimension of 1
        field = output.prediction_logits if "prediction_logits" in output else output.logits
        expected = field.reshape(logits.shape)
    return 0.0 if torch.equal(logits, expected) else (logits - expected).abs().max().item()


@functools.cache
def expected_attentions(name: str, num_padded: int = 4) -> tuple[Tensor, ...]:
    """Give the `attentions` of the same weights under eager attention, one per layer."""
    model = build(name, attention="eager")
    with torch.no_grad():
        found = model(**make_batch(num_padded), output_attentions=True).attentions
    # 4.x ALBERT nests them by group
    return tuple(w for item in found for w in ([item] if isinstance(item, Tensor) else _flatten(item)))


def _flatten(item: Any) -> Iterator[Tensor]:
    for part in item:
        yield from [part] if isinstance(part, Tensor) else _flatten(part)


def real_queries(weights_BHSS: Tensor, mask_BS: Tensor) -> Tensor:
    """Keep the rows of real tokens, the ones that layerprobe answers for, as `[T, H, S]`."""
    return weights_BHSS.transpose(1, 2)[mask_BS.bool()]


def compare_sites(name: str) -> dict[str, float]:
    """Hold every site of a variant against its oracle.

    Returns:
        For each site, layer numbers written `i`, the largest difference in any layer; 0.0 says bit-equal.
    """
    run = run_family(name)
    worst: dict[str, float] = {}
    for site, made, expected in _list_oracles(name, run):
        assert made.shape == expected.shape, f"{name} {site}: {tuple(made.shape)} is not {tuple(expected.shape)}"
        # torch.equal first, since a difference hides a NaN or another dtype
        off = 0.0 if torch.equal(made, expected) else (made.double() - expected.double()).abs().max().item() or 1e-12
        worst[site] = max(worst.get(site, 0.0), off)
    return worst


def _list_oracles(name: str, run: Run) -> Iterator[tuple[str, Tensor, Tensor]]:
    made, hidden, base = run.made, run.bare.hidden_states, run.model
    attentions = expected_attentions(name)
    entering = made["embeddings"]
    yield "embeddings", entering, hidden[0]
    for index in range(len(attentions)):
        layer = base.get_submodule(lp.sites(base, f"layers.{index}")[0].module)
        yield from _list_layer_oracles(run, layer, f"layers.{index}", entering)
        weights, mask = made[f"layers.{index}.attention.weights"], run.batch["attention_mask"]
        yield "layers.i.attention.weights", real_queries(weights, mask), real_queries(attentions[index], mask)
        entering = made[f"layers.{index}"]
        if index == len(attentions) - 1 and "norm" in made:
            norm = base.get_submodule(lp.sites(base, "norm")[0].module)
            yield "layers.i", norm(entering), run.bare.last_hidden_state
        elif name == "deberta-v2-conv" and index == 0:
            # a convolution over the embeddings joins the first layer: the two of them make hidden_states[1]
            entering = hidden[1]
        elif name == "albert-inner" and not IS_V5:
            # 4.x keeps one hidden state per group of inner layers
            if index % 2:
                yield "layers.i", entering, hidden[(index + 1) // 2]
        else:
            yield "layers.i", entering, hidden[index + 1]
    if "norm" in made:
        yield "norm", made["norm"], run.bare.last_hidden_state
    if "pooler" in made:
        yield "pooler", made["pooler"], run.bare.pooler_output


@torch.no_grad()
def _list_layer_oracles(run: Run, layer: Any, prefix: str, entering: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Repeat a layer by arithmetic, each site from the one before it."""
    family, row = run.family, find_anatomy(run.family.model_type)
    made = {site.removeprefix(f"{prefix}."): value for site, value in run.made.items() if site.startswith(f"{prefix}.")}
    heads = run.made[f"{prefix}.attention.weights"].shape[1]
    query_in, key_in, value_in, residual = _enter(family, layer, entering)
    for part, states in (("query", query_in), ("key", key_in), ("value", value_in)):
        expected = _project(layer, getattr(row, part), states, heads)
        yield f"layers.i.attention.{part}", made[f"attention.{part}"], expected
    head_width = made["attention.query"].shape[-1] // heads
    mixed = mix_heads(made["attention.weights"], made["attention.value"], head_width)
    context = made["attention.context"][..., : mixed.shape[-1]]  # ConvBERT's other half is a convolution
    keep = run.batch["attention_mask"].bool()
    yield "layers.i.attention.context", context[keep], mixed[keep]
    out, down = layer.get_submodule(row.out), layer.get_submodule(row.down)
    yield "layers.i.attention.out", made["attention.out"], linear(made["attention.context"], out.weight, out.bias)
    mid = _normed(layer, family.mid, made["attention.out"] + residual)
    yield "layers.i.mid", made["mid"], mid
    yield "layers.i.ffn.act", made["ffn.act"], family.activate(layer, made["mid"])
    yield "layers.i.ffn.out", made["ffn.out"], linear(made["ffn.act"], down.weight, down.bias)
    yield "layers.i", run.made[prefix], end_layer(family, layer, made["ffn.out"], made["mid"], entering)


def _normed(layer: Any, norm: str | None, states: Tensor) -> Tensor:
    return states if norm is None else layer.get_submodule(norm)(states)


def _enter(family: Family, layer: Any, entering: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give what query, key and value are made of, and what goes around the attention."""
    if hasattr(layer, "bottleneck"):
        return layer.bottleneck(entering)
    states = _normed(layer, family.enters, entering)
    return states, states, states, entering


def end_layer(family: Family, layer: Any, ffn_out: Tensor, mid: Tensor, entering: Tensor) -> Tensor:
    """Give the output of a layer from its FFN's, the stream before it, and what entered the layer."""
    for block in getattr(layer, "ffn", []) if family.model_type == "mobilebert" else []:
        mid = block(mid)
    states = ffn_out + mid
    if family.model_type == "xmod":
        states = layer.output.lang_adapter(torch.zeros(len(states), dtype=torch.long), states)
    states = _normed(layer, family.ends, states)
    return layer.output.bottleneck(states, entering) if hasattr(layer, "bottleneck") else states


def _project(layer: Any, place: Any, states: Tensor, heads: int) -> Tensor:
    projection = layer.get_submodule(place.path if isinstance(place, Fused) else place)
    made = linear(states, projection.weight, projection.bias)
    if not isinstance(place, Fused):
        return made
    if not place.by_head:
        return made.unflatten(-1, (3, -1))[..., place.part, :]
    third = made.unflatten(-1, (heads, 3, -1))[..., place.part, :].flatten(-2)
    return third if place.bias is None else third + layer.get_parameter(place.bias)


def mix_heads(weights_BHSS: Tensor, value_BSD: Tensor, head_width: int) -> Tensor:
    """Mix the values of each head by its weights and lay the heads side by side again."""
    value = value_BSD.unflatten(-1, (-1, head_width)).transpose(1, 2)
    value = value.repeat_interleave(weights_BHSS.shape[1] // value.shape[1], 1)  # several queries share a value
    return (weights_BHSS @ value).transpose(1, 2).flatten(2)
