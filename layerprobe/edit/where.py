"""Select the tokens of a call that an edit changes.

The user's `where` is checked when the edit is made, becomes a `Spot` once the tokenizer is known, and a mask when the
model is called. Positions count within each text: 0 is its first real token, -1 its last, whichever side is padded
and however many of its tokens are in a key-value cache.

Hides masks, padding and caches. Must never know of hooks, sites or what an edit does.
Letters: B sequences in a batch, S positions of the call, N positions with those in a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from layerprobe.capture.calls import Context
from layerprobe.errors import CaptureError, OptionError
from layerprobe.store.guard import is_whole

__all__ = ["Spot", "TokenIds", "check_where", "pick_tokens", "place_in_text", "resolve_where", "token_ids"]

_ACCEPTED = (
    "None (real tokens), 'all', 'special', a token or a list of them, lp.token_ids(...), "
    "a position, a list or a slice of them, or a bool mask [B, S]"
)


@dataclass(frozen=True)
class TokenIds:
    """Tokens selected by id, as `where` of an edit."""

    ids: tuple[int, ...]


def token_ids(*ids: int) -> TokenIds:
    """Select tokens by their ids: `where=lp.token_ids(101, 102)`.

    Raises:
        OptionError: something is not an id.

    Example:
        >>> import layerprobe as lp
        >>> lp.scale(0.5, where=lp.token_ids(103)).where
        TokenIds(ids=(103,))
    """
    if not ids or not all(is_whole(token) and token >= 0 for token in ids):
        raise OptionError(f"token ids {ids!r}: give one or more numbers from 0 on, as in lp.token_ids(101, 102).")
    return TokenIds(tuple(int(token) for token in ids))


@dataclass(frozen=True, eq=False)
class Spot:
    """A `where` whose tokens have been resolved to ids.

    Args:
        kind: How tokens are selected; determines which of the other fields applies.
        ids: Ids of the selected tokens.
        mask: bool `[B, S]`, or `[B, S, D]` to select single values of the vectors.
        positions: Selected positions within each text.
    """

    kind: Literal["real", "all", "ids", "mask", "positions"]
    ids: tuple[int, ...] = ()
    mask: Tensor | None = None
    positions: tuple[int, ...] | slice = ()


def check_where(where: Any) -> None:
    """Check that `where` has an accepted type and value.

    Raises:
        OptionError: it does not.
    """
    if isinstance(where, Tensor):
        if where.dtype != torch.bool or where.ndim not in (2, 3):
            raise OptionError(
                f"where is a tensor of {where.dtype} and shape {tuple(where.shape)}: a mask is bool and [B, S]. "
                "Write positions as a list, tokens by id as lp.token_ids(...)."
            )
        return
    if isinstance(where, slice):
        bounds = [where.start, where.stop, where.step]
        if not all(bound is None or is_whole(bound) for bound in bounds) or (where.step or 1) < 1:
            raise OptionError(f"where={where!r}: the bounds of a slice are whole numbers, its step is 1 or more.")
        return
    if where is None or isinstance(where, (str, TokenIds)) or is_whole(where):
        return
    if isinstance(where, Sequence) and where and (all(map(is_whole, where)) or all(isinstance(w, str) for w in where)):
        return
    raise OptionError(f"where={where!r} picks no position: use {_ACCEPTED}.")


def resolve_where(where: Any, tokenizer: Any) -> Spot:
    """Resolve `where` to a `Spot`, looking tokens up in the tokenizer.

    Raises:
        OptionError: tokens are named without a tokenizer, or the tokenizer lacks one.
    """
    if where is None or where == "real" or where == "all":
        return Spot("all" if where == "all" else "real")
    if isinstance(where, Tensor):
        return Spot("mask", mask=where)
    if isinstance(where, TokenIds):
        return Spot("ids", ids=where.ids)
    if isinstance(where, slice):
        return Spot("positions", positions=where)
    if is_whole(where):
        return Spot("positions", positions=(where,))
    if not isinstance(where, str) and is_whole(where[0]):
        return Spot("positions", positions=tuple(where))
    if tokenizer is None:
        raise OptionError(f"where={where!r} asks for tokens: pass tokenizer=, or ids as lp.token_ids(...).")
    if where == "special":
        padding = tokenizer.pad_token_id
        return Spot("ids", ids=tuple(token for token in tokenizer.all_special_ids if token != padding))
    return Spot(
        "ids", ids=tuple(_find_id(token, tokenizer) for token in ([where] if isinstance(where, str) else where))
    )


def pick_tokens(spot: Spot, context: Context, device: torch.device) -> Tensor | None:
    """Compute the mask of the selected tokens of one call.

    Args:
        spot: The selection.
        context: The arguments of the stack's call.
        device: Device of the result.

    Returns:
        bool `[B, S]` (`[B, S, D]` for a user's mask of that shape), or None for every position.

    Raises:
        CaptureError: the call lacks the ids or attention mask that the selection needs, or does not match the user's
            mask.
    """
    if spot.kind == "all":
        return None
    if spot.kind == "mask":
        assert spot.mask is not None
        if context.shape is None or not _fits(spot.mask.shape[:2], context.shape):
            raise CaptureError(
                f"where is a mask of shape {tuple(spot.mask.shape)}: the model was called with {context.shape}. "
                "Pass a mask of the batch's own shape."
            )
        return spot.mask.to(device).expand(context.shape[0], *spot.mask.shape[1:])
    real = _real_tokens(context)
    if spot.kind == "real":
        return None if real is None else real[:, -_num_positions(context) :].to(device)
    if spot.kind == "positions":
        return _among(spot.positions, *place_in_text(context)).to(device)
    if context.input_ids is None:
        raise CaptureError(
            "where asks for tokens: the model was called with embeddings. Pick positions, or use a mask."
        )
    wanted = torch.tensor(spot.ids, device=context.input_ids.device)
    picked = torch.isin(context.input_ids, wanted)
    return (picked if real is None else picked & real[:, -_num_positions(context) :].to(picked.device)).to(device)


def place_in_text(context: Context) -> tuple[Tensor, Tensor]:
    """Number the tokens of a call within their texts.

    Returns:
        int64 `[B, S]` positions, -1 for padding, and int64 `[B, 1]` lengths of the texts so far.

    Raises:
        CaptureError: the number of tokens in the cache is not known.
    """
    real = _real_tokens(context)
    size = _num_positions(context)
    if real is not None:
        place = (real.long().cumsum(1) - 1).masked_fill(~real, -1)
        return place[:, -size:], real.sum(1, keepdim=True)
    if context.first_position is None:
        raise CaptureError(
            "positions are not known: the model was compiled and called with a key-value cache. Pass attention_mask."
        )
    assert context.shape is not None
    stop = context.first_position + size
    place = torch.arange(context.first_position, stop, device="cpu").expand(context.shape[0], -1)
    return place, torch.full((context.shape[0], 1), stop, device="cpu")


def _among(positions: tuple[int, ...] | slice, place_BS: Tensor, length_B1: Tensor) -> Tensor:
    """Return the mask of the selected positions; negative ones count from the end of each text."""
    is_real = place_BS >= 0
    if isinstance(positions, slice):
        start, stop = _bound(positions.start, 0, length_B1), _bound(positions.stop, None, length_B1)
        step = positions.step or 1
        return is_real & (place_BS >= start) & (place_BS < stop) & ((place_BS - start) % step == 0)
    wanted = torch.tensor(positions, device=place_BS.device)
    from_end = torch.isin(place_BS - length_B1, wanted[wanted < 0])
    return is_real & (torch.isin(place_BS, wanted) | from_end)


def _bound(bound: int | None, default: int | None, length_B1: Tensor) -> Tensor:
    if bound is None:
        return length_B1 if default is None else torch.full_like(length_B1, default)
    return (length_B1 + bound).clamp(min=0) if bound < 0 else torch.full_like(length_B1, bound)


def _real_tokens(context: Context) -> Tensor | None:
    """Return the attention mask as bool `[B, N]`, or None if every token is real."""
    mask, shape = context.attention_mask, context.shape
    if mask is None:
        return None
    has_cache = context.first_position is None or context.first_position > 0
    num_kept = mask.shape[1] - shape[1] if mask.ndim == 2 and shape is not None and mask.shape[0] == shape[0] else -1
    if num_kept < 0 or (num_kept > 0 and not has_cache):
        raise CaptureError(
            f"attention_mask has shape {tuple(mask.shape)}: padding is known by one of {shape}. "
            "Pass a [batch, positions] mask, or edit every position with where='all'."
        )
    return mask != 0


def _num_positions(context: Context) -> int:
    if context.shape is None:
        raise CaptureError("the model was called with neither ids nor embeddings. Edit with where='all'.")
    return context.shape[1]


def _fits(given: Sequence[int], shape: tuple[int, int]) -> bool:
    return given[0] in (1, shape[0]) and given[1] == shape[1]


def _find_id(token: str, tokenizer: Any) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
        pieces = tokenizer.tokenize(token)
        raise OptionError(
            f"where: the tokenizer has no token {token!r}; it writes it as {pieces}. Name those, or pick positions."
        )
    return int(found)
