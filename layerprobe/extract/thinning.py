"""Find which rows a run keeps, from its options and its tokenizer.

Turns the name of a kind of token into ids, and refuses what cannot be combined with keeping some rows: a pool,
attention weights, and sites without a row per token. The rule itself and the random draw live in the store.

Must never know of files.
"""

from collections.abc import Sequence
from typing import Any

from layerprobe.errors import OptionError
from layerprobe.extract.tokens import tokenize
from layerprobe.store.description import StoredSite
from layerprobe.store.kept import Kept

__all__ = ["find_kept"]

# More than any tokenizer adds around a text.
_MOST_SPECIAL = 16


def find_kept(tokens: str, keep: float, tokenizer: Any, stored: Sequence[StoredSite], pool: object) -> Kept | None:
    """Return the rule by which a run keeps rows; None if it keeps all.

    Args:
        tokens: `all`, `first`, `cls`, `special` or `nonspecial`.
        keep: Share of those rows to keep.
        tokenizer: Tokenizer of the run. The special tokens are those that it adds around a text.
        stored: The sites of the run.
        pool: Pool of the run.

    Raises:
        OptionError: the tokenizer has no such tokens, or the run has no rows to choose from.
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
