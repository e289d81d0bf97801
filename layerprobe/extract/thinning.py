"""Which rows a run keeps, from what was asked and the tokenizer.

Turns the name of a kind of token into ids, and refuses what has no meaning on a part of the rows: a pool, attention
weights, sites without a row per token. The rule itself, and the draw, are the store's.

Must never know of files.
"""

from collections.abc import Sequence
from typing import Any

from layerprobe.errors import OptionError
from layerprobe.extract.tokens import tokenize
from layerprobe.store.description import StoredSite
from layerprobe.store.kept import Kept

__all__ = ["find_kept"]

# More than any tokenizer puts around a text.
_MOST_SPECIAL = 16


def find_kept(tokens: str, keep: float, tokenizer: Any, stored: Sequence[StoredSite], pool: object) -> Kept | None:
    """Find the rule by which a run keeps rows; None where it keeps all.

    Args:
        tokens: `all`, `first`, `cls`, `special` or `nonspecial`.
        keep: Share of them.
        tokenizer: Of the run. The special tokens are those that it puts around a text.
        stored: The sites of the run.
        pool: Of the run.

    Raises:
        OptionError: the tokenizer has no such tokens, or the run has no rows to choose among.
    """
    if tokens == "all" and keep == 1:
        return None
    asked = f"tokens={tokens!r}" if tokens != "all" else f"keep={keep:g}"
    if pool is not None:
        raise OptionError(f"{asked} with a pool: a pool takes every row. Leave one of the two out.")
    if pairs := [site.name for site in stored if site.kind == "attention"]:
        raise OptionError(f"{asked} with {pairs[0]!r}: attention weights are between all tokens. Leave the site out.")
    if not any(site.kind == "token" for site in stored):
        raise OptionError(f"{asked}: {stored[0].name!r} has a vector per example and no rows to choose. Leave it out.")
    ids: tuple[int, ...] = ()
    if tokens == "cls":
        if tokenizer.cls_token_id is None:
            raise OptionError("tokens='cls': the tokenizer has no such token. Use 'first'.")
        ids = (int(tokenizer.cls_token_id),)
    elif tokens in ("special", "nonspecial"):
        ids = tuple(sorted(set(tokenize(tokenizer, [""], _MOST_SPECIAL).ids.tolist())))
        if not ids and tokens == "special":
            raise OptionError("tokens='special': the tokenizer puts no tokens around a text. Use another kind.")
    return Kept(tokens, float(keep), ids)
