"""Activation patching for masked language models: which sites carry the prediction at `[MASK]`.

Both texts contain one mask each; the metric is the logit of an answer there. Handles texts and tokenizers; `patching`
runs the patches.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from layerprobe.edit.effects import Effects
from layerprobe.edit.patching import patching
from layerprobe.errors import OptionError
from layerprobe.models import LoadedModel
from layerprobe.sites.stacks import fills_masks, find_device

__all__ = ["patch_masked"]

_MASK = "[MASK]"


def patch_masked(
    loaded: LoadedModel,
    clean: str,
    corrupt: str,
    answer: str,
    sites: str | Sequence[str] = "layers.*",
    *,
    positions: bool = True,
    heads: bool = False,
    method: str = "exact",
    batch_size: int = 32,
    progress: bool | None = None,
) -> Effects:
    """Measure how much each site and position contributes to one answer at the mask.

    Args:
        loaded: A masked language model and its tokenizer.
        clean, corrupt: Texts with one `[MASK]` each (whatever the tokenizer's own mask token is), equal in length.
        answer: A word that is one token.
        sites, positions, heads, method, batch_size, progress: As in `patching`.

    Raises:
        OptionError: the model is no masked language model, a text has no mask or several, the answer is not one token,
            or the texts differ in length or in the position of the mask.
        SiteError: a pattern matches nothing.
    """
    tokenizer = loaded.tokenizer
    if not fills_masks(loaded.model) or tokenizer.mask_token is None:
        raise OptionError(
            f"patching {loaded.name!r}: {type(loaded.model).__name__} fills no masks. "
            "Use a model for masked language, such as a BertForMaskedLM; lp.patching takes a metric of your own."
        )
    batches = [_encode(loaded, text) for text in (clean, corrupt)]
    places = [_find_mask(tokenizer, batch, text) for batch, text in zip(batches, (clean, corrupt), strict=True)]
    lengths = [int(batch["input_ids"].shape[1]) for batch in batches]
    if lengths[0] != lengths[1]:
        written = [tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist()) for batch in batches]
        raise OptionError(
            f"patching: clean is {lengths[0]} tokens, corrupt {lengths[1]}: {' '.join(written[0])} / "
            f"{' '.join(written[1])}. Use words of as many tokens."
        )
    if places[0] != places[1]:
        raise OptionError(f"patching: the mask is token {places[0]} of clean, {places[1]} of corrupt: put it alike.")
    place, token = places[0], _find_answer(tokenizer, answer)

    def logit(output: Any) -> Tensor:
        logits = getattr(output, "logits", None)
        return (output.prediction_logits if logits is None else logits)[:, place, token]

    return patching(
        loaded.model,
        batches[0],
        batches[1],
        logit,
        sites,
        positions=positions,
        heads=heads,
        method=method,
        batch_size=batch_size,
        tokenizer=tokenizer,
        progress=progress,
    )


def _encode(loaded: LoadedModel, text: str) -> Mapping[str, Tensor]:
    text = text.replace(_MASK, loaded.tokenizer.mask_token)
    return dict(loaded.tokenizer(text, return_tensors="pt").to(find_device(loaded.model)))


def _find_mask(tokenizer: Any, batch: Mapping[str, Tensor], text: str) -> int:
    found = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0].tolist()
    if len(found) != 1:
        raise OptionError(f"patching: {text!r} has {len(found)} masks: write {_MASK} once.")
    return found[0]


def _find_answer(tokenizer: Any, answer: str) -> int:
    """Return the answer's token id; tried with a leading space first, which some tokenizers make part of the token."""
    for text in (f" {answer}", answer):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0]
    raise OptionError(
        f"patching: the answer {answer!r} is {tokenizer.tokenize(answer)} to the tokenizer: use a word of one token."
    )
