"""From a model and patterns to sites: which module, its input or its output, which kind, how wide.

Finds the base model inside any task model and looks up its row in the table of architectures. A site is looked up in
the model before anything is attached, so a wrong name costs nothing.

Hides how task models nest their base. Must never touch hooks or run the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

from torch import nn

from layerprobe.errors import ArchitectureError
from layerprobe.sites.anatomy import Anatomy, find_anatomy
from layerprobe.sites.grammar import MODULE_PREFIX, expand_patterns
from layerprobe.tables import format_table

__all__ = ["ModelMap", "Site", "SiteTable", "map_model", "sites"]

Kind = Literal["token", "example", "unknown"]

# Task models whose logits are one row per token; every other head makes one row per example.
_TOKEN_HEADS = ("ForMaskedLM", "LMHeadModel", "ForPreTraining", "ForTokenClassification", "ForQuestionAnswering")


@dataclass(frozen=True)
class Site:
    """A named place in a model.

    Args:
        name: Canonical name, such as `layers.3.attention.query`.
        module: Name of the module that is read, as in `model.named_modules()`.
        takes: Whether the module's output or its first input is read.
        kind: `token` for one vector per token, `example` for one per text, `unknown` until the model has run.
        width: Size of the vector, or None where only running the model can tell.
    """

    name: str
    module: str
    takes: Literal["output", "input"]
    kind: Kind
    width: int | None


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
        modules = ((site.module or "(the model)") + (" (input)" if site.takes == "input" else "") for site in self.rows)
        lines = [(s.name, m, s.kind, s.width) for s, m in zip(self.rows, modules, strict=True)]
        return format_table(("site", "module", "kind", "width"), lines)

    __repr__ = __str__


@dataclass(frozen=True)
class ModelMap:
    """What layerprobe knows of one model: its base, its sites and how to name it in messages."""

    model: nn.Module
    base: nn.Module
    owner: str
    table: SiteTable
    num_layers: dict[str, int]

    def select(self, patterns: "str | Sequence[str]") -> tuple[Site, ...]:
        """Find the sites that the patterns stand for, each once, in running order.

        Raises:
            SiteError: a pattern is malformed or matches nothing.
        """
        modules = [name for name, _ in self.model.named_modules() if name]
        known = {site.name: site for site in self.table}
        names = expand_patterns(patterns, list(known), self.num_layers, self.owner, modules)
        return tuple(known.get(name) or self._module_site(name) for name in names)

    def _module_site(self, name: str) -> Site:
        takes = "input" if name.endswith(":input") else "output"
        path = name[len(MODULE_PREFIX) :].removesuffix(":input")
        return Site(name, path, takes, "unknown", _module_width(self.model.get_submodule(path), takes))


def sites(model: nn.Module, patterns: str | Sequence[str] | None = None) -> SiteTable:
    """List the sites of a model: name, module, kind, width.

    Args:
        model: Any supported Hugging Face model, with or without a task head.
        patterns: Only these; None for all.

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


def map_model(model: nn.Module) -> ModelMap:
    """Find the base model, its architecture and all its sites.

    Raises:
        ArchitectureError: not a Hugging Face model, or one without a row.
    """
    base = _find_base(model)
    config: Any = base.config
    anatomy = find_anatomy(config.model_type)
    prefix = next((name for name, module in model.named_modules() if module is base), "")
    layers = cast(nn.ModuleList, base.get_submodule(anatomy.layers))
    checkpoint = getattr(config, "_name_or_path", "")
    owner = f"{type(model).__name__} {checkpoint!r}" if checkpoint else type(model).__name__
    rows = tuple(_list_sites(model, base, prefix, anatomy, len(layers)))
    return ModelMap(model, base, owner, SiteTable(owner, rows), {"layers": len(layers)})


def _find_base(model: nn.Module) -> nn.Module:
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or not hasattr(getattr(base, "config", None), "model_type"):
        raise ArchitectureError(
            f"{type(model).__name__} is not a Hugging Face model: it has no base_model with a config. "
            "Pass a transformers model such as BertModel."
        )
    return base


def _list_sites(model: nn.Module, base: nn.Module, prefix: str, anatomy: Anatomy, num_layers: int) -> Iterator[Site]:
    hidden_size: int = cast(Any, base.config).hidden_size

    def make(name: str, location: str, kind: Kind, width: int | None = hidden_size) -> Site:
        path = location.removesuffix(":input")
        takes = "input" if location.endswith(":input") else "output"
        own_width = _module_width(base.get_submodule(path), takes)
        return Site(name, f"{prefix}.{path}" if prefix else path, takes, kind, own_width or width)

    yield make("embeddings", anatomy.embeddings, "token")
    for index in range(num_layers):
        layer = f"{anatomy.layers}.{index}"
        for tail, location in anatomy.layer_sites().items():
            yield make(f"layers.{index}.{tail}", f"{layer}.{location}", "token")
        yield make(f"layers.{index}", layer, "token")
    if anatomy.norm is not None:
        yield make("norm", anatomy.norm, "token")
    if anatomy.pooler is not None and getattr(base, anatomy.pooler, None) is not None:
        yield make("pooler", anatomy.pooler, "example")
    if model is not base:
        head = next((name for name in anatomy.heads if isinstance(getattr(model, name, None), nn.Module)), None)
        if head is not None:
            per_token = type(model).__name__.endswith(_TOKEN_HEADS)
            width = _last_linear_width(model.get_submodule(head))
            yield Site("logits", head, "output", "token" if per_token else "example", width)


def _module_width(module: nn.Module, takes: str) -> int | None:
    """Read a module's width off its attributes, where it tells."""
    if isinstance(module, nn.Linear):
        return module.out_features if takes == "output" else module.in_features
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    if isinstance(module, nn.Embedding) and takes == "output":
        return module.embedding_dim
    return None


def _last_linear_width(module: nn.Module) -> int | None:
    # A pre-training head holds a second classifier beside the predictions; the logits are the predictions'.
    linears = [part for part in getattr(module, "predictions", module).modules() if isinstance(part, nn.Linear)]
    return linears[-1].out_features if linears else None
