"""The module paths of each supported architecture: one row per `model_type`.

A place is a module path, relative to the base model or to one layer; the suffix `:input` selects the module's input
instead of its output. `attention.context` and `ffn.act` are read as the input of the projection that follows, so
fused and gated variants need no special case.

Every difference between model families is data in this table. Must never know of hooks or tensors.
"""

from dataclasses import dataclass, replace

from layerprobe.errors import ArchitectureError

__all__ = ["REFUSED", "Anatomy", "Fused", "Place", "find_anatomy", "register_architecture", "registered_architectures"]


@dataclass(frozen=True)
class Fused:
    """One third of a fused projection that computes query, key and value together.

    Args:
        path: The fused projection.
        part: 0 for query, 1 for key, 2 for value.
        by_head: Whether its output is laid out `H, 3, d` instead of `3, H, d`.
        bias: Name of a parameter that the model adds to this third afterwards, or None.
    """

    path: str
    part: int
    by_head: bool = False
    bias: str | None = None


Place = str | Fused


@dataclass(frozen=True)
class Anatomy:
    """Module paths of one architecture.

    Args:
        embeddings: Module that produces `hidden_states[0]`, relative to the base model; of several the first that
            exists.
        layers: The `ModuleList` of layers, relative to the base model. If one layer is used several times, `{group}`
            and `{inner}` stand for the index of its group and its index in the group.
        attention: The module that mixes the heads, relative to a layer.
        mid: The residual stream between attention and FFN, relative to a layer; None if it passes through no module.
        query, key, value: The projections, relative to a layer.
        out: The output projection, relative to a layer: its input is `attention.context`, its output `attention.out`.
        down: The down projection, relative to a layer: its input is `ffn.act`, its output `ffn.out`.
        pooler: Module that produces the pooler output, relative to the base model, or None.
        norm: The norm after the last layer, relative to the base model, or None.
        heads: Names of the module that produces the logits in task models; the first that exists is used.
        cross: Name that replaces the first segment of the attention paths for a decoder's cross attention, or None.
        first_call: Whether query, key and value come from the first of several calls of their modules.
        flat: Whether `extract` may concatenate texts into one sequence. This requires attention through transformers'
            attention interface and over whole texts, positions as they are passed, and nothing else that relates
            tokens.

    Example:
        >>> import layerprobe as lp
        >>> lp.Anatomy().layers, lp.Anatomy(down="ffn.down").down
        ('encoder.layer', 'ffn.down')
    """

    embeddings: tuple[str, ...] = ("embeddings",)
    layers: str = "encoder.layer"
    attention: str = "attention.self"
    mid: str | None = "attention"
    query: Place = "attention.self.query"
    key: Place = "attention.self.key"
    value: Place = "attention.self.value"
    out: str = "attention.output.dense"
    down: str = "output.dense"
    pooler: str | None = "pooler"
    norm: str | None = None
    heads: tuple[str, ...] = ("cls", "classifier", "qa_outputs")
    cross: str | None = None
    first_call: bool = False
    flat: bool = False


_BERT = Anatomy(cross="crossattention", flat=True)
_ROBERTA = replace(_BERT, heads=("lm_head", "classifier", "qa_outputs"))
_LLAMA_LIKE = Anatomy(
    layers="layers",
    attention="self_attn",
    mid="post_attention_layernorm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.o_proj",
    down="mlp.down_proj",
    pooler=None,
    heads=("lm_head", "cls", "decoder", "classifier", "qa_outputs"),
    flat=True,
)


_ROWS: dict[str, Anatomy] = {
    "bert": _BERT,
    "ernie": _BERT,
    "layoutlm": replace(_BERT, cross=None, flat=False),
    "bert-generation": replace(_BERT, pooler=None, heads=("lm_head",)),
    "megatron-bert": replace(_BERT, norm="encoder.ln", flat=False),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": replace(_ROBERTA, norm="encoder.LayerNorm"),
    "camembert": _ROBERTA,
    "data2vec-text": _ROBERTA,
    "roberta-prelayernorm": replace(_ROBERTA, norm="LayerNorm"),
    "xmod": replace(_ROBERTA, norm="encoder.LayerNorm"),
    # ESM scales a text's embeddings by its fraction of mask tokens
    "esm": replace(_ROBERTA, norm="encoder.emb_layer_norm_after", flat=False),
    "electra": replace(
        _BERT,
        embeddings=("embeddings_project", "embeddings"),
        pooler=None,
        # the discriminator squeezes the last dimension of its final projection, so the site is that projection
        heads=("generator_lm_head", "discriminator_predictions.dense_prediction", "classifier", "qa_outputs"),
    ),
    "roformer": replace(_BERT, embeddings=("embeddings_project", "embeddings"), pooler=None, flat=False),
    "convbert": Anatomy(
        embeddings=("embeddings_project", "embeddings"),
        pooler=None,
        heads=("generator_lm_head", "classifier", "qa_outputs"),
    ),
    # sites inside a layer have the bottleneck's width; the `ffn` sites refer to the last of the layer's several FFNs
    "mobilebert": Anatomy(),
    "splinter": Anatomy(pooler=None, heads=()),
    "deberta": Anatomy(
        query=Fused("attention.self.in_proj", 0, by_head=True, bias="attention.self.q_bias"),
        key=Fused("attention.self.in_proj", 1, by_head=True),
        value=Fused("attention.self.in_proj", 2, by_head=True, bias="attention.self.v_bias"),
        pooler=None,
        heads=("lm_predictions", "cls", "classifier", "qa_outputs"),
    ),
    "deberta-v2": Anatomy(
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        pooler=None,
        heads=("lm_predictions", "cls", "classifier", "qa_outputs"),
        # with share_att_key, relative positions pass through the same projections in later calls
        first_call=True,
    ),
    "mpnet": Anatomy(
        attention="attention.attn",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        out="attention.attn.o",
        heads=("lm_head", "classifier", "qa_outputs"),
    ),
    "distilbert": Anatomy(
        layers="transformer.layer",
        attention="attention",
        mid="sa_layer_norm",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        out="attention.out_lin",
        down="ffn.lin2",
        pooler=None,
        heads=("vocab_projector", "classifier", "qa_outputs"),
        flat=True,
    ),
    "albert": Anatomy(
        embeddings=("encoder.embedding_hidden_mapping_in",),
        layers="encoder.albert_layer_groups.{group}.albert_layers.{inner}",
        attention="attention",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        out="attention.dense",
        down="ffn_output",
        pooler="pooler_activation",
        heads=("predictions", "classifier", "qa_outputs"),
        flat=True,
    ),
    "modernbert": Anatomy(
        layers="layers",
        attention="attn",
        mid="mlp_norm:input",
        query=Fused("attn.Wqkv", 0),
        key=Fused("attn.Wqkv", 1),
        value=Fused("attn.Wqkv", 2),
        out="attn.Wo",
        down="mlp.Wo",
        pooler=None,
        norm="final_norm",
        heads=("decoder", "classifier", "qa_outputs"),
    ),
    "nomic_bert": _LLAMA_LIKE,
    "eurobert": replace(_LLAMA_LIKE, embeddings=("embed_tokens",), mid="post_attention_layernorm:input", norm="norm"),
    "jina_embeddings_v3": replace(_LLAMA_LIKE, down="mlp.fc2", pooler="pooler"),
}

_SHORTENS = "its layers shorten the sequence, so that no row stands for one token"
_SEQUENCE_FIRST = "its layers take positions before sequences, so that rows of one text would be those of others"

# These would be captured incorrectly. Any other architecture without a row may still be inferred from its structure.
REFUSED = {
    "squeezebert": "its layers are called around their hooks, in another layout, and would be missed in silence",
    "funnel": _SHORTENS,
    "canine": _SHORTENS,
    "xlnet": _SEQUENCE_FIRST,
    "fsmt": _SEQUENCE_FIRST,
    "mega": _SEQUENCE_FIRST,
    "transfo-xl": _SEQUENCE_FIRST,
}


def register_architecture(model_type: str, anatomy: Anatomy) -> None:
    """Register the module paths of an architecture.

    Args:
        model_type: The `model_type` of the architecture's config.
        anatomy: Its module paths; those left out are BERT's.

    Example:
        >>> import layerprobe as lp
        >>> lp.register_architecture("my-bert", lp.Anatomy(down="ffn.down", pooler=None))
    """
    _ROWS[model_type] = anatomy


def registered_architectures() -> list[str]:
    """List the `model_type` of every row, sorted."""
    return sorted(_ROWS)


def find_anatomy(model_type: str) -> Anatomy:
    """Return the module paths of an architecture.

    Raises:
        ArchitectureError: the architecture is refused or has no row.
    """
    if model_type in REFUSED:
        raise ArchitectureError(f"architecture {model_type!r} is not supported: {REFUSED[model_type]}.")
    try:
        return _ROWS[model_type]
    except KeyError as error:
        raise ArchitectureError(
            f"no row for architecture {model_type!r}: layerprobe knows {', '.join(registered_architectures())}. "
            "Describe its module paths in three lines:\n"
            "    import layerprobe as lp\n"
            f"    anatomy = lp.Anatomy(layers='encoder.layer', out='attention.output.dense', down='output.dense')\n"
            f"    lp.register_architecture({model_type!r}, anatomy)"
        ) from error
