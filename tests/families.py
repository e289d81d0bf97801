"""Tiny random models of every supported family and of the variants that differ inside, from configs alone.

A family here is a config and, for the oracles, what a layer of it computes between its sites: which norm follows which
sum, what goes into the attention, how the FFN begins. Biases and norms are random too, so that no check passes because
something is 0 or 1.

Knows transformers' own modules, written down a second time and by hand; never layerprobe's table of architectures.
"""

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

__all__ = [
    "CACHE", "FAMILIES", "IS_V5", "PLAIN", "REFUSED", "Family",
    "build", "is_known", "list_heads", "make_batch", "make_config",
]  # fmt: skip

IS_V5 = int(transformers.__version__.split(".")[0]) >= 5
# What a model's argument for a key-value cache is called, and the field of its output.
CACHE = "cache" if "cache" in inspect.signature(transformers.BertModel.forward).parameters else "past_key_values"
VOCABULARY = 100
PADDING = 1

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "pad_token_id": PADDING,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "cls_token_id": 0,
    "sep_token_id": 2,
    "initializer_range": 0.3,
}
_UNTYPED = {name: size for name, size in _SIZES.items() if name != "type_vocab_size"}

# What goes from the residual stream into the up projection and comes out as the activation: (layer, mid) to ffn.act.
Activation = Callable[[Any, Tensor], Tensor]


def _intermediate(layer: Any, mid: Tensor) -> Tensor:
    return layer.intermediate(mid)


def _after(norm: str, activate: Activation = _intermediate) -> Activation:
    return lambda layer, mid: activate(layer, layer.get_submodule(norm)(mid))


def _gated(layer: Any, mid: Tensor) -> Tensor:
    return layer.mlp.act_fn(layer.mlp.gate_proj(mid)) * layer.mlp.up_proj(mid)


def _modernbert_gate(layer: Any, mid: Tensor) -> Tensor:
    up, gate = layer.mlp.Wi(mid).chunk(2, dim=-1)
    return layer.mlp.act(up) * gate


def _through_more_ffns(layer: Any, mid: Tensor) -> Tensor:
    """MobileBERT: its other FFNs lie between mid and the one whose sites are named."""
    for block in getattr(layer, "ffn", []):
        mid = block(mid)
    return layer.intermediate(mid)


@dataclass(frozen=True)
class Family:
    """A variant of a family: its config and what a layer computes.

    Args:
        model_type: Of the config.
        config: Beside the defaults of the config's class.
        enters: The norm between a layer's input and its attention, None where there is none.
        mid: The norm after input + attention.out, None where the sum itself goes on.
        ends: The norm after mid + ffn.out, None where the sum itself is the layer's output.
        activate: From the layer and mid to ffn.act.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=lambda: _SIZES)
    enters: str | None = None
    mid: str | None = "attention.output.LayerNorm"
    ends: str | None = "output.LayerNorm"
    activate: Activation = _intermediate


def _before(model_type: str, enters: str, activate: Activation, config: Mapping[str, Any] = _SIZES) -> Family:
    """A family whose norms stand before attention and FFN, and whose sums go on as they are."""
    return Family(model_type, config, enters=enters, mid=None, ends=None, activate=activate)


def _albert(**changes: Any) -> Family:
    sizes = _SIZES | {"embedding_size": 24} | changes
    return Family(
        "albert",
        sizes,
        mid="attention.LayerNorm",
        ends="full_layer_layer_norm",
        activate=lambda layer, mid: layer.activation(layer.ffn(mid)),
    )


_ESM = {"mask_token_id": 5, "emb_layer_norm_before": False}
_RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_DEBERTA_V2 = _RELATIVE | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
_DISTILBERT = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "pad_token_id": 1}
_MODERNBERT = {"num_hidden_layers": 4, "global_attn_every_n_layers": 3, "local_attention": 6}
_MODERNBERT |= {"attention_dropout": 0.1, "mlp_dropout": 0.1, "embedding_dropout": 0.1}
_MODERNBERT |= {} if IS_V5 else {"reference_compile": False}
_MOBILEBERT = {"embedding_size": 16, "initializer_range": 0.1}
_XMOD = {"languages": ["en_XX", "de_DE"], "default_language": "en_XX", "adapter_reduction_factor": 2}
_POST_ATTENTION = "post_attention_layernorm"

FAMILIES: dict[str, Family] = {
    "bert": Family("bert"),
    "roberta": Family("roberta"),
    "xlm-roberta": Family("xlm-roberta"),
    "xlm-roberta-xl": _before("xlm-roberta-xl", "attention.self_attn_layer_norm", _after("LayerNorm")),
    "camembert": Family("camembert"),
    "electra": Family("electra", _SIZES | {"embedding_size": 32}),
    "electra-small": Family("electra", _SIZES | {"embedding_size": 24}),
    "ernie": Family("ernie"),
    "esm": _before(
        "esm",
        "attention.LayerNorm",
        _after("LayerNorm"),
        _SIZES | _ESM | {"token_dropout": False, "position_embedding_type": "absolute"},
    ),
    "esm-rotary": _before(
        "esm",
        "attention.LayerNorm",
        _after("LayerNorm"),
        _SIZES | _ESM | {"token_dropout": True, "position_embedding_type": "rotary"},
    ),
    "megatron-bert": _before("megatron-bert", "attention.ln", _after("ln")),
    "roberta-prelayernorm": _before("roberta-prelayernorm", "attention.LayerNorm", _intermediate),
    "bert-generation": Family("bert-generation"),
    "layoutlm": Family("layoutlm"),
    "deberta": Family("deberta", _SIZES | _RELATIVE | {"max_relative_positions": -1}),
    "deberta-plain": Family("deberta"),
    "deberta-v2": Family("deberta-v2", _SIZES | _DEBERTA_V2),
    "deberta-v2-conv": Family("deberta-v2", _SIZES | _DEBERTA_V2 | {"conv_kernel_size": 3}),
    "deberta-v2-plain": Family("deberta-v2"),
    "mpnet": Family("mpnet", mid="attention.LayerNorm"),
    "distilbert": Family(
        "distilbert",
        _DISTILBERT | {"max_position_embeddings": 64, "initializer_range": 0.3},
        mid="sa_layer_norm",
        ends="output_layer_norm",
        activate=lambda layer, mid: layer.ffn.activation(layer.ffn.lin1(mid)),
    ),
    "albert": _albert(num_hidden_groups=1, inner_group_num=1),
    "albert-groups": _albert(num_hidden_layers=4, num_hidden_groups=2, inner_group_num=1),
    "albert-inner": _albert(num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2),
    "modernbert": _before("modernbert", "attn_norm", _after("mlp_norm", _modernbert_gate), _UNTYPED | _MODERNBERT),
    "nomic_bert": Family("nomic_bert", mid=_POST_ATTENTION, ends="post_mlp_layernorm", activate=_gated),
    "eurobert": _before(
        "eurobert", "input_layernorm", _after(_POST_ATTENTION, _gated), _UNTYPED | {"num_key_value_heads": 4}
    ),
    "eurobert-gqa": _before(
        "eurobert", "input_layernorm", _after(_POST_ATTENTION, _gated), _UNTYPED | {"num_key_value_heads": 2}
    ),
    "jina_embeddings_v3": Family(
        "jina_embeddings_v3",
        mid=_POST_ATTENTION,
        ends="post_mlp_layernorm",
        activate=lambda layer, mid: layer.mlp.activation_fn(layer.mlp.fc1(mid)),
    ),
    "convbert": Family("convbert", _SIZES | {"embedding_size": 24, "head_ratio": 2, "conv_kernel_size": 3}),
    "mobilebert": Family(
        "mobilebert",
        _SIZES
        | _MOBILEBERT
        | {
            "intra_bottleneck_size": 16,
            "true_hidden_size": 16,
            "use_bottleneck": True,
            "num_feedforward_networks": 2,
        },
        activate=_through_more_ffns,
    ),
    "mobilebert-plain": Family(
        "mobilebert", _SIZES | _MOBILEBERT | {"use_bottleneck": False, "num_feedforward_networks": 1}
    ),
    "roformer": Family("roformer", _SIZES | {"embedding_size": 32}),
    "roformer-small": Family("roformer", _SIZES | {"embedding_size": 24}),
    "data2vec-text": Family("data2vec-text"),
    "xmod": Family("xmod", _SIZES | _XMOD | {"pre_norm": False}),
    "xmod-prenorm": _before(
        "xmod", "attention.output.LayerNorm", _after("output.LayerNorm"), _SIZES | _XMOD | {"pre_norm": True}
    ),
    "splinter": Family("splinter", _SIZES | {"question_token_id": 4}),
}

# Families that transformers has and layerprobe refuses by name.
REFUSED: dict[str, Family] = {
    "squeezebert": Family("squeezebert", _SIZES | {"embedding_size": 32}),
    "funnel": Family("funnel", {"vocab_size": VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48}),
    "canine": Family("canine"),
    "xlnet": Family("xlnet", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    # of encoders and decoders of one depth there are two lists of layers, which is refused for itself
    "fsmt": Family(
        "fsmt",
        {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["en", "de"], "d_model": 32}
        | {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    ),
    "mega": Family(
        "mega", _SIZES | {"ema_projection_size": 4, "shared_representation_size": 16, "use_chunking": False}
    ),
    "transfo-xl": Family(
        "transfo-xl",
        {"vocab_size": VOCABULARY, "cutoffs": [20, 40], "d_model": 32, "d_embed": 32, "n_head": 4, "n_layer": 2},
    ),
}

# One variant of each family, for what does not depend on the variant.
PLAIN: dict[str, str] = {family.model_type: name for name, family in reversed(FAMILIES.items())}


def is_known(name: str) -> bool:
    """Tell whether the installed transformers has the family."""
    return (FAMILIES | REFUSED)[name].model_type in transformers.CONFIG_MAPPING


def make_config(name: str, **changes: Any) -> Any:
    """Make the config of a variant."""
    family = (FAMILIES | REFUSED)[name]
    return transformers.AutoConfig.for_model(family.model_type, **(dict(family.config) | changes))


def build(name: str, class_name: str | None = None, attention: str | None = None, **changes: Any) -> Any:
    """Build a tiny model in eval mode; the same arguments give the same weights, whatever the attention kernel.

    Args:
        name: A key of `FAMILIES` or `REFUSED`.
        class_name: A class of the family; None for its base model.
        attention: `attn_implementation`; None for transformers' choice.
        changes: To the config.
    """
    config = make_config(name, **changes)
    # AutoModel cannot tell Funnel's two base models apart
    class_name = "FunnelModel" if name == "funnel" and class_name is None else class_name
    options = {} if attention is None else {"attn_implementation": attention}
    torch.manual_seed(0)
    if class_name is None:
        model: Any = transformers.AutoModel.from_config(config, **options)
    else:
        model = getattr(_modeling_file(config), class_name)._from_config(config, **options)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
    return model.eval()


def make_batch(num_padded: int = 4, size: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Make two sequences, the second padded on the right; no special token but padding."""
    ids = torch.randint(6, VOCABULARY, (2, size), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if num_padded:
        ids[-1, -num_padded:] = PADDING
        mask[-1, -num_padded:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def list_heads(name: str) -> list[str]:
    """List the task model classes of a family, as the installed transformers has them."""
    file = _modeling_file(make_config(name))
    own = [
        class_name
        for class_name, kind in inspect.getmembers(file, inspect.isclass)
        if issubclass(kind, transformers.PreTrainedModel) and kind.__module__ == file.__name__
    ]
    task = ("ForPreTraining", "LMHeadModel", "GenerationDecoder")
    return [n for n in own if n.endswith(task) or "For" in n.replace("RoFormer", "")]


def _modeling_file(config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing a file of transformers may warn; nothing of ours does
        return importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
