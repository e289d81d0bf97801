"""`layerprobe.generate`: generate text with stored states as the context of a decoder, without running an encoder.

The mask always comes from the store and cannot be omitted. Generation itself is left to transformers' `generate`; this
file passes it states, mask and start token, and splits its output into one sequence each.

Hides how each kind of decoder takes its context. Must never know of shards or hooks.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.errors import InputError, ModelError, OptionError, first_line
from layerprobe.extract.network import load_named
from layerprobe.generation.results import Generated, Generation
from layerprobe.models import LoadedModel, evaluating
from layerprobe.sites.stacks import find_device, unwrap
from layerprobe.store.guard import check_count, is_number
from layerprobe.store.padded import EncoderOutputs
from layerprobe.store.reader import Store, take_store
from layerprobe.telling import make_bar

__all__ = ["generate", "list_examples"]

# These change the return type of `generate`, not what it generates.
_RETURNS = ("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_logits", "output_scores")


def generate(
    store: Store | str | Path,
    model: nn.Module | LoadedModel | str,
    *,
    layer: int | str = -1,
    examples: Any = None,
    tokenizer: Any = None,
    batch_size: int = 16,
    seed: int = 0,
    device: str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Generation:
    """Generate text with stored states as context, without running the encoder.

    Args:
        store: A store with a row per token of the layer.
        model: An encoder-decoder model, such as an `EncoderDecoderModel`, or a decoder with cross attention, such as a
            `BertLMHeadModel` with `is_decoder` and `add_cross_attention`; or its name.
        layer: A stored site or a layer number; negative numbers count from the last stored layer. For an encoder with a
            final norm use `norm`, which is what it passes on.
        examples: Ordinals, a slice of them, or one; None for all.
        tokenizer: The decoder's tokenizer; None for that of a model given by name. It decodes ids, and defines how a
            sequence starts, ends and is padded if the model does not.
        batch_size: Examples per batch.
        seed: Random seed, for options that sample.
        device: Device for a model given by name.
        progress: Show a progress bar; None: only on a terminal.
        options: As in transformers' `GenerationConfig`: `max_new_tokens=32`, `num_beams=4`, `do_sample=True`. The
            model's own settings apply to the rest.

    Returns:
        A sequence per example, in the order requested.

    Raises:
        InputError: the store has no examples.
        SiteError: no stored site is selected, or several are.
        OptionError: the model reads no states or states of another width, an unknown option, or no start token.
        NonFiniteError: a state is not finite.

    Example:
        >>> import layerprobe as lp
        >>> from transformers import BertConfig, BertLMHeadModel
        >>> store = lp.extract("demo", ["The kettle whistled.", "Who left?"], "memory://context", sites="layers.-1")
        >>> shape = {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 64}
        >>> decoder = BertLMHeadModel(BertConfig(**shape, is_decoder=True, add_cross_attention=True))
        >>> tokenizer = lp.load_model("demo", "cpu").tokenizer
        >>> found = lp.generate(store, decoder, layer=-1, tokenizer=tokenizer, max_new_tokens=5, do_sample=False)
        >>> [one.example for one in found], max(len(one.ids) for one in found) <= 5
        ([0, 1], True)
    """
    check_count("batch_size", batch_size)
    seed = check_count("seed", seed, 0)
    store = take_store(store)
    model = load_named(model, device)
    if isinstance(model, LoadedModel):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    decoder: Any = unwrap(model)
    _check_options(options)
    ordinals = list_examples(store, examples)
    view = store[store.encoder_outputs(layer, ordinals[:1]).site]
    has_encoder = _check_decoder(decoder, view.site, view.width)
    _check_length(decoder, options)
    ids = _find_ids(decoder, tokenizer, options, has_encoder)
    found: list[Generated] = []
    with evaluating(decoder), torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(seed)
        with make_bar(len(ordinals), "generate", progress, "examples") as bar:
            for first in range(0, len(ordinals), batch_size):
                part = ordinals[first : first + batch_size]
                outputs = store.encoder_outputs(view.site, part, next(decoder.parameters()).dtype)
                made = _run(decoder, outputs.to(find_device(decoder)), has_encoder, {**ids, **options})
                found += _split(made, part, _ends_of(decoder, {**ids, **options}), tokenizer)
                bar.update(len(part))
    return Generation(view.site, tuple(found))


def list_examples(store: Store, examples: Any) -> list[int]:
    """List the selected ordinals: all, one, a slice of them, or several.

    Raises:
        InputError: the store has no examples.
        OptionError: the selection is empty, or something in it is not an ordinal.
        MissingExample: an example is not in the store.
    """
    if not len(store):
        raise InputError(f"a generation from {store.place}: it has no examples. Extract some first.")
    if examples is None:
        found = list(store.ordinals())
    elif isinstance(examples, slice):
        found = list(store.catalog.slice_ordinals(examples))
    else:
        asked = np.atleast_1d(np.asarray(examples))
        if asked.size and (asked.dtype.kind not in "iu" or asked.ndim > 1):
            raise OptionError(f"examples={examples!r}: they are ordinals. Use 3, [0, 3], slice(10) or None for all.")
        found = [store.catalog.find(int(one))[1] for one in asked]
    if not found:
        raise OptionError(f"examples={examples!r} of {store.place}: none is meant. Name one at least.")
    return found


def _check_options(options: Mapping[str, Any]) -> None:
    from transformers import GenerationConfig

    for name in ("num_beams", "num_return_sequences", "max_new_tokens", "max_length"):
        if options.get(name) is not None:
            check_count(name, options[name])
    top_p = options.get("top_p")
    if top_p is not None and (not is_number(top_p) or not 0 < top_p <= 1):
        raise OptionError(f"top_p is {top_p!r}: it is a share of the probability, above 0 and at most 1.")
    known = set(GenerationConfig().to_dict()) - {"transformers_version"}
    for name in options:
        if name in _RETURNS:
            raise OptionError(f"{name}: changes what transformers gives back, of which sequences alone are kept.")
        if name not in known:
            raise OptionError(
                f"no option {name!r} of generate: it takes those of transformers' GenerationConfig, such as "
                "max_new_tokens, num_beams, do_sample."
            )


def _check_decoder(decoder: Any, site: str, width: int) -> bool:
    """Check that a model can read the states; return whether it has an encoder of its own."""
    config = getattr(decoder, "config", None)
    has_encoder = bool(getattr(config, "is_encoder_decoder", False))
    has_cross = bool(getattr(config, "is_decoder", False) and getattr(config, "add_cross_attention", False))
    if not (has_encoder or has_cross) or not hasattr(decoder, "generate") or not decoder.can_generate():
        raise OptionError(
            f"generate with {type(decoder).__name__}: it does not generate from states. Use an EncoderDecoderModel, "
            "or a BertLMHeadModel with is_decoder=True and add_cross_attention=True."
        )
    needed = getattr(getattr(config, "encoder", config), "hidden_size", width)
    if needed != width:
        raise OptionError(
            f"generate from {site!r}: its states are {width} wide, {type(decoder).__name__} reads {needed}. "
            "Use the layers of an encoder of that width."
        )
    return has_encoder


def _check_length(decoder: Any, options: Mapping[str, Any]) -> None:
    config = getattr(decoder.config, "decoder", decoder.config)
    most = getattr(config, "max_position_embeddings", None)
    for name in ("max_new_tokens", "max_length"):
        asked = options.get(name)
        if asked is None:
            continue
        if most is not None and asked > most:
            raise OptionError(f"{name} is {asked}: {type(decoder).__name__} has {most} positions. Ask for fewer.")


def _find_ids(decoder: Any, tokenizer: Any, options: Mapping[str, Any], has_encoder: bool) -> dict[str, Any]:
    """Find the start, end and padding tokens: from options or model, else from the tokenizer."""
    own, config = decoder.generation_config, decoder.config
    start = "decoder_start_token_id" if has_encoder else "bos_token_id"
    names = {start: ("bos_token_id", "cls_token_id"), "eos_token_id": ("eos_token_id", "sep_token_id")}
    found: dict[str, Any] = {}
    for name, sources in {**names, "pad_token_id": ("pad_token_id",)}.items():
        said = [options.get(name), getattr(own, name, None), getattr(config, name, None)]
        if has_encoder and name == start:
            said += [getattr(own, "bos_token_id", None)]
        said += [getattr(tokenizer, source, None) for source in sources]
        value = next((one for one in said if one is not None), None)
        if value is not None and options.get(name) is None:
            found[name] = value
        elif value is None and name == start:
            raise OptionError(f"generate: nothing says what a sequence starts with. Pass {start}= or tokenizer=.")
    return found


def _run(decoder: Any, outputs: EncoderOutputs, has_encoder: bool, options: dict[str, Any]) -> Tensor:
    """Generate for one batch; return the new tokens, `[B, n]`."""
    try:
        if has_encoder:
            return decoder.generate(**outputs.inputs(), **options)[:, 1:]
        from transformers import DynamicCache, EncoderDecoderCache

        start = torch.full((len(outputs.states), 1), options["bos_token_id"], device=outputs.states.device)
        # the cache that generate creates for a decoder-only model cannot hold cross-attention keys and values
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # transformers before 5.24 calls the argument past_key_values
        name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
        cached = {} if options.get("use_cache") is False else {name: cache}
        context = outputs.cross_inputs()
        return decoder.generate(start, attention_mask=torch.ones_like(start), **context, **cached, **options)[:, 1:]
    except (ValueError, TypeError, NotImplementedError) as error:
        said = first_line(error).rstrip(".")
        raise OptionError(f"generate with {type(decoder).__name__}: {said}. Change the options.") from error
    except IndexError as error:
        raise ModelError(
            f"generate with {type(decoder).__name__}: a token is beyond its tables ({error}). "
            "Give the tokenizer, or the ids, that it was trained with."
        ) from error


def _ends_of(decoder: Any, options: Mapping[str, Any]) -> set[int]:
    ends = options.get("eos_token_id", decoder.generation_config.eos_token_id)
    return set() if ends is None else set(ends) if isinstance(ends, Sequence) else {ends}


def _split(made: Tensor, ordinals: Sequence[int], ends: set[int], tokenizer: Any) -> Iterator[Generated]:
    """Truncate each sequence after its end token; the rest is padding."""
    per_example = len(made) // len(ordinals)
    for number, row in enumerate(made.tolist()):
        stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        text = None if tokenizer is None else tokenizer.decode(row[:stop], skip_special_tokens=True)
        yield Generated(ordinals[number // per_example], tuple(row[:stop]), text)
