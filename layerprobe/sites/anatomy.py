"""Where each architecture keeps its parts: one row of module paths per `model_type`.

A location is a module path, relative to the base model or to one layer; `:input` after it means what goes into the
module instead of what comes out. Reading `attention.context` and `ffn.act` as inputs of the projection that follows
makes fused and gated variants look alike.

Everything that differs between families lives in this table as data. Must never know of hooks or tensors.
"""

from dataclasses import dataclass

from layerprobe.errors import ArchitectureError

__all__ = ["Anatomy", "find_anatomy", "register_architecture", "registered_architectures"]


@dataclass(frozen=True)
class Anatomy:
    """Module paths of one architecture.

    Args:
        embeddings: The embedding block, from the base model.
        layers: The `ModuleList` of layers, from the base model.
        mid: The residual stream between attention and FFN, from a layer.
        query, key, value: The projections, from a layer.
        context: What the output projection reads, from a layer.
        attention_out: The output projection, before dropout, residual and norm.
        ffn_act: What the down projection reads.
        ffn_out: The down projection, before dropout, residual and norm.
        pooler: The pooler, from the base model, or None.
        norm: The norm after the last layer, from the base model, or None.
        heads: Names under which task models keep the module that makes the logits; the first that exists counts.
    """

    embeddings: str
    layers: str
    mid: str
    query: str
    key: str
    value: str
    context: str
    attention_out: str
    ffn_act: str
    ffn_out: str
    pooler: str | None = None
    norm: str | None = None
    heads: tuple[str, ...] = ()

    def layer_sites(self) -> dict[str, str]:
        """Map the tail of each site inside a layer to its location, in the order in which a layer runs them."""
        return {
            "attention.query": self.query,
            "attention.key": self.key,
            "attention.value": self.value,
            "attention.context": self.context,
            "attention.out": self.attention_out,
            "mid": self.mid,
            "ffn.act": self.ffn_act,
            "ffn.out": self.ffn_out,
        }


_ROWS: dict[str, Anatomy] = {
    "bert": Anatomy(
        embeddings="embeddings",
        layers="encoder.layer",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        context="attention.output.dense:input",
        attention_out="attention.output.dense",
        mid="attention",
        ffn_act="output.dense:input",
        ffn_out="output.dense",
        pooler="pooler",
        heads=("cls", "classifier", "qa_outputs"),
    ),
}


def register_architecture(model_type: str, anatomy: Anatomy) -> None:
    """Teach layerprobe where an architecture keeps its parts.

    Args:
        model_type: The `model_type` of the architecture's config.
        anatomy: Its module paths.

    Example:
        >>> import layerprobe as lp
        >>> from layerprobe.sites.anatomy import find_anatomy
        >>> lp.register_architecture("my-bert", find_anatomy("bert"))
    """
    _ROWS[model_type] = anatomy


def registered_architectures() -> list[str]:
    """List the `model_type` of every row, sorted."""
    return sorted(_ROWS)


def find_anatomy(model_type: str) -> Anatomy:
    """Give the row of an architecture.

    Raises:
        ArchitectureError: there is no row.
    """
    try:
        return _ROWS[model_type]
    except KeyError as error:
        raise ArchitectureError(
            f"no row for architecture {model_type!r}: layerprobe knows {', '.join(registered_architectures())}. "
            "Describe its module paths with layerprobe.register_architecture."
        ) from error
