"""Resolve site patterns on a model: which module, input or output, kind and width.

Looks up each stack of the model in the table of architectures. Sites are resolved before any hook is attached, so a
wrong name is reported at no cost.

Must never touch hooks or run the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, overload

from torch import nn

from layerprobe.errors import ArchitectureError, SiteError
from layerprobe.models import LoadedModel
from layerprobe.sites.anatomy import Anatomy, Fused, Place
from layerprobe.sites.grammar import MODULE_PREFIX, expand_patterns, list_patterns
from layerprobe.sites.stacks import Stack, config_of, find_stacks, guess_embeddings, has_module, unwrap
from layerprobe.tables import format_table

__all__ = ["DEFAULT_SITES", "ModelMap", "Part", "Site", "SiteTable", "map_model", "sites"]

# The default sites; those that the model lacks are left out.
DEFAULT_SITES = ("embeddings", "layers.*")

Kind = Literal["token", "example", "attention", "source", "unknown"]

# Task models whose logits have one row per token; every other head gives one row per example.
_TOKEN_HEADS = (
    "ForMaskedLM", "ForCausalLM", "LMHeadModel", "GenerationDecoder", "ForPreTraining", "ForTokenClassification",
    "ForQuestionAnswering", "ForConditionalGeneration", "EncoderDecoderModel",
)  # fmt: skip

# Attributes under which torch.compile, FSDP and checkpoint wrappers store the wrapped module.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Part:
    """Which third of a fused projection is used.

    Args:
        index: 0, 1 or 2.
        num_heads: Number of heads if the thirds are interleaved head by head; None if they are three contiguous blocks.
        bias: Name, in the unwrapped model, of the parameter that is added afterwards, or None.
    """

    index: int
    num_heads: int | None
    bias: str | None


@dataclass(frozen=True)
class Site:
    """A named place in a model.

    Args:
        name: Canonical name, such as `layers.3.attention.query`.
        module: Name of the module that is read, as in `named_modules()` of the unwrapped model.
        takes: What is read: the module's output, its first input or its attention weights.
        kind: `token` for one vector per token, `example` for one per text, `attention` for `[H, S, S]` per text,
            `source` for one vector per token of the other sequence of an encoder-decoder, such as cross attention's
            keys, `unknown` until the model has run.
        width: Size of the vector (number of heads for `attention`), or None if only running the model can tell.
        call_index: Index of the call used, if the module runs several times; None if it runs once.
        part: Which part of a fused output is used, or None.
        stack: Index of the stack of layers that the site belongs to, or None for modules after the stacks.
    """

    name: str
    module: str
    takes: Literal["output", "input", "weights"]
    kind: Kind
    width: int | None
    call_index: int | None = None
    part: Part | None = None
    stack: int | None = 0

    @cached_property
    def is_by_name(self) -> bool:
        """Whether the site is a `module:` site. The model may modify such a module's output in place later."""
        return self.name.startswith(MODULE_PREFIX)


@dataclass(frozen=True)
class SiteTable(Sequence[Site]):
    """Sites of a model, in the order in which it runs them. Prints as a table."""

    owner: str
    rows: tuple[Site, ...]

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Site, ...]: ...
    def __getitem__(self, index: int | slice) -> Site | tuple[Site, ...]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.rows)

    def __str__(self) -> str:
        lines = [(site.name, _describe_place(site), site.kind, site.width) for site in self.rows]
        return format_table(("site", "module", "kind", "width"), lines)

    __repr__ = __str__


@dataclass(frozen=True)
class ModelMap:
    """A model as layerprobe sees it: the unwrapped model, its stacks, its sites and its name in messages."""

    model: nn.Module
    stacks: tuple[Stack, ...]
    owner: str
    table: SiteTable

    @property
    def num_layers(self) -> dict[str, int]:
        """Number of layers behind each prefix that ends in `layers`."""
        return {f"{stack.prefix}layers": len(stack.layers) for stack in self.stacks}

    @property
    def base(self) -> Any:
        """The base model of the first stack."""
        return self.stacks[0].base

    def select(self, patterns: "str | Sequence[str]") -> tuple[Site, ...]:
        """Find the sites that match the patterns, in execution order, without duplicates.

        Raises:
            SiteError: a pattern is malformed or matches nothing.
        """
        modules = list(dict.fromkeys(filter(None, (_leave_out(name) for name, _ in self.model.named_modules()))))
        patterns = [_leave_out(text) for text in list_patterns(patterns)]
        known = {site.name: site for site in self.table}
        names = expand_patterns(patterns, list(known), self.num_layers, self.owner, modules)
        return tuple(known.get(name) or self._module_site(name) for name in names)

    def leave_out_missing(self, patterns: Sequence[str] = DEFAULT_SITES) -> list[str]:
        """Drop the default patterns that match no site of the model; return all of them if none match."""
        known = []
        for pattern in patterns:
            try:
                self.select(pattern)
            except SiteError:
                continue
            known.append(pattern)
        return known or list(patterns)

    def is_chunked(self, site: Site) -> bool:
        """Return whether the module of a site may run several times per call, each time on a slice of the positions.

        `chunk_size_feed_forward` splits the FFN this way, and possibly a `module:` site inside it.
        """
        config = self.stacks[site.stack or 0].base.config
        in_ffn = ".ffn." in site.name or (site.kind == "unknown" and site.stack is not None)
        return in_ffn and bool(getattr(config, "chunk_size_feed_forward", 0))

    def _module_site(self, name: str) -> Site:
        takes = "input" if name.endswith(":input") else "output"
        path = name[len(MODULE_PREFIX) :].removesuffix(":input")
        width = _module_width(self.model.get_submodule(path), takes)
        is_source = any(site.kind == "source" and site.module == path for site in self.table) or any(
            stack.is_of_decoder(path, self.model) for stack in self.stacks
        )
        owners = (i for i, stack in enumerate(self.stacks) if not stack.path or f"{path}.".startswith(f"{stack.path}."))
        return Site(name, path, takes, "source" if is_source else "unknown", width, stack=next(owners, None))


def sites(model: nn.Module | LoadedModel, patterns: str | Sequence[str] | None = None) -> SiteTable:
    """List the sites of a model: name, module, kind, width.

    Args:
        model: Any supported Hugging Face model, with or without a task head, or the result of `load_model`.
        patterns: Only sites that match these; None for all.

    Raises:
        ArchitectureError: layerprobe has no row for the architecture.
        SiteError: a pattern matches nothing.

    Example:
        >>> import layerprobe as lp
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> [site.name for site in lp.sites(BertModel(tiny), ["embeddings", "layers.*"])]
        ['embeddings', 'layers.0', 'layers.1']
    """
    mapped = map_model(model)
    return mapped.table if patterns is None else SiteTable(mapped.owner, mapped.select(patterns))


def map_model(model: nn.Module | LoadedModel) -> ModelMap:
    """Find the stacks of a model, their architecture and all sites.

    Raises:
        ArchitectureError: not a Hugging Face model, or its architecture is not supported.
        OptionError: the argument is not a model.
    """
    root = unwrap(model)
    if not isinstance(getattr(root, "base_model", None), nn.Module) or not hasattr(config_of(root), "model_type"):
        raise ArchitectureError(
            f"{type(root).__name__} is not a Hugging Face model: it has no base_model with a config. "
            "Pass a transformers model such as BertModel."
        )
    checkpoint = getattr(config_of(root), "_name_or_path", "")
    owner = f"{type(root).__name__} {checkpoint!r}" if checkpoint else type(root).__name__
    stacks = tuple(find_stacks(root))
    rows = [site for number, stack in enumerate(stacks) for site in _list_stack(root, number, stack)]
    rows += _list_head(root, stacks)
    return ModelMap(root, stacks, owner, SiteTable(owner, tuple(rows)))


@dataclass
class _Lister:
    """Build the sites of one stack."""

    root: nn.Module
    number: int
    stack: Stack
    hidden_size: int = field(init=False)
    num_heads: int | None = field(init=False)

    def __post_init__(self) -> None:
        config = self.stack.base.config
        self.hidden_size = config.hidden_size
        # without a row the number of heads may differ from layer to layer
        self.num_heads = getattr(config, "num_attention_heads", None) if self.stack.anatomy else None

    def make(
        self, name: str, layer: str, place: Place, kind: Kind, call: int | None = None, takes: str | None = None
    ) -> Site:
        """Make a site for a place in a layer, or in the base model if `layer` is empty."""
        path = place.path if isinstance(place, Fused) else place.removesuffix(":input")
        takes = takes or ("input" if isinstance(place, str) and place.endswith(":input") else "output")
        path = f"{layer}.{path}" if layer and path else layer or path
        width = _module_width(self.stack.base.get_submodule(path), takes)
        part = None
        if isinstance(place, Fused):
            width = width and width // 3
            bias = self.full_path(f"{layer}.{place.bias}") if place.bias else None
            part = Part(place.part, self.num_heads if place.by_head else None, bias)
        if takes == "weights":
            # the module takes precedence: ConvBERT replaces some heads by a convolution
            width = getattr(self.stack.base.get_submodule(path), "num_attention_heads", self.num_heads) or width
        # some modules do not state their width, such as a custom adapter around a projection
        width = self._usual_width(name) if width is None else width
        full = self.full_path(path)
        if kind == "token" and self.stack.is_of_decoder(full, self.root):
            kind = "source"
        return Site(self.stack.prefix + name, full, takes, kind, width, call, part, self.number)  # type: ignore[arg-type]

    def _usual_width(self, name: str) -> int | None:
        """Return the width expected from the config; None for `ffn.act`, whose width only the module can tell."""
        if name.endswith(".ffn.act"):
            return None
        groups = getattr(self.stack.base.config, "num_key_value_heads", None)
        if groups and self.num_heads and name.endswith((".key", ".value")):
            return self.hidden_size // self.num_heads * groups
        return self.hidden_size

    def full_path(self, path: str) -> str:
        """Convert a module path in the base model to its path in the unwrapped model."""
        return f"{self.stack.path}.{path}" if self.stack.path else path


def _list_stack(root: nn.Module, number: int, stack: Stack) -> Iterator[Site]:
    lister = _Lister(root, number, stack)
    anatomy, base = stack.anatomy, stack.base
    embeddings = anatomy.embeddings if anatomy is not None else guess_embeddings(stack)
    for name in embeddings:
        if has_module(base, name):
            yield lister.make("embeddings", "", name, "token")
            break
    for index, (layer, call) in enumerate(stack.layers):
        if anatomy is not None:
            yield from _list_layer(lister, anatomy, index, layer, call)
        yield lister.make(f"layers.{index}", layer, "", "token", call)
    if anatomy is None:
        return
    if anatomy.norm is not None and has_module(base, anatomy.norm):
        yield lister.make("norm", "", anatomy.norm, "token")
    if anatomy.pooler is not None and has_module(base, anatomy.pooler):
        yield lister.make("pooler", "", anatomy.pooler, "example")


def _list_layer(lister: _Lister, anatomy: Anatomy, index: int, layer: str, call: int | None) -> Iterator[Site]:
    """List the sites inside a layer, in execution order."""
    block = lister.stack.base.get_submodule(layer)
    yield from _list_attention(lister, anatomy, f"layers.{index}.attention", layer, call, "")
    cross = anatomy.cross if anatomy.cross and has_module(block, anatomy.cross) else None
    if cross:
        yield from _list_attention(lister, anatomy, f"layers.{index}.cross_attention", layer, call, cross)
    mid = cross or anatomy.mid
    if mid is not None:
        # the width of the attention output that is added to it: in a bottleneck this is less than the layer's width
        width = _module_width(block.get_submodule(anatomy.out), "output")
        yield replace(lister.make(f"layers.{index}.mid", layer, mid, "token", call), width=width or lister.hidden_size)
    yield lister.make(f"layers.{index}.ffn.act", layer, f"{anatomy.down}:input", "token", call)
    yield lister.make(f"layers.{index}.ffn.out", layer, anatomy.down, "token", call)


def _list_attention(
    lister: _Lister, anatomy: Anatomy, name: str, layer: str, call: int | None, cross: str
) -> Iterator[Site]:
    """List the sites of one attention block; `cross`, if not empty, replaces the first segment of its paths."""

    def moved(place: Any) -> Any:
        return cross + place[place.index(".") :] if cross and isinstance(place, str) else place

    made_by = 0 if anatomy.first_call and call is None else call
    source: Kind = "source" if cross else "token"
    yield lister.make(f"{name}.query", layer, moved(anatomy.query), "token", made_by)
    yield lister.make(f"{name}.key", layer, moved(anatomy.key), source, made_by)
    yield lister.make(f"{name}.value", layer, moved(anatomy.value), source, made_by)
    yield lister.make(f"{name}.weights", layer, moved(anatomy.attention), "attention", call, "weights")
    yield lister.make(f"{name}.context", layer, moved(f"{anatomy.out}:input"), "token", call)
    yield lister.make(f"{name}.out", layer, moved(anatomy.out), "token", call)


def _list_head(root: nn.Module, stacks: tuple[Stack, ...]) -> list[Site]:
    """Find the module that computes the logits, if there is one."""
    stack = stacks[-1]
    owner = root if len(stacks) == 1 else root.decoder
    if stack.anatomy is None or owner is stack.base:
        return []
    if getattr(config_of(root), "classifier_pooling", None) == "late" and type(root).__name__ == (
        "EuroBertForSequenceClassification"
    ):
        return []  # it pools after the classifier, so no module outputs the logits
    head = next((name for name in stack.anatomy.heads if has_module(owner, name)), None)
    if head is None:
        return []
    per_token: Kind = "source" if stack.has_decoder else "token"
    kind: Kind = per_token if type(root).__name__.endswith(_TOKEN_HEADS) else "example"
    path = head if owner is root else f"decoder.{head}"
    return [Site("logits", path, "output", kind, _last_linear_width(root.get_submodule(path)), stack=None)]


def _leave_out(name: str) -> str:
    """Remove wrapper attributes from a module path; a wrapper forwards attribute access to the wrapped module."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def _describe_place(site: Site) -> str:
    place = site.module or "(the model)"
    if site.part is not None:
        place += f" ({site.part.index + 1} of 3)"
    if site.takes != "output":
        place += f" ({site.takes})"
    if site.call_index is not None:
        place += f" (call {site.call_index})"
    return place


def _module_width(module: nn.Module, takes: str) -> int | None:
    """Read a module's width from its attributes, or None if it has no such attribute."""
    # nx and nf belong to transformers' Conv1D, the transposed Linear of GPT-2
    for name in ("in_features", "nx") if takes == "input" else ("out_features", "embedding_dim", "nf"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    return module.normalized_shape[-1] if isinstance(module, nn.LayerNorm) else None


def _last_linear_width(module: nn.Module) -> int | None:
    # A pre-training head also holds a second classifier; the logits come from `predictions`.
    widths = [_module_width(part, "output") for part in getattr(module, "predictions", module).modules()]
    widths = [width for width in widths if width is not None]
    return widths[-1] if widths else None
