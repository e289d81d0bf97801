"""A `tokenizer.json` that may be untrusted: which token each id is, and how it is given to the native parser.

Which token an id is takes the vocabulary and the added tokens alone. Whatever cuts or writes texts takes the tokenizers
package, whose parser ends the whole process at some merges; they are held against the vocabulary before.

Hides that parser. Must never know of stores.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from layerprobe.errors import FormatError
from layerprobe.store.guard import LARGE, brief, parse_json

__all__ = ["TokenNames", "load_tokenizer", "parse_tokenizer"]

_MOST_IDS = 1 << 32


class TokenNames:
    """Which token each id is, and which id each token has.

    Args:
        label: What to call the file in messages.
        rules: What it says.

    Raises:
        FormatError: it has no vocabulary.
    """

    def __init__(self, label: str, rules: Mapping[str, Any]) -> None:
        try:
            listed = list(_list_tokens(rules["model"]["vocab"]))
            ids = dict(listed)
            # a piece that is listed twice has two ids, each of which is that piece
            added = _number_added(rules.get("added_tokens") or (), ids, len(listed))
            ids |= added
            if not all(type(token_id) is int and 0 <= token_id < _MOST_IDS for token_id in ids.values()):
                raise ValueError("an id is no whole number of 32 bits")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{label}: is not a tokenizer ({brief(error)}).") from error
        self._ids = ids
        self._tokens = {token_id: token for token, token_id in (*listed, *added.items())}

    def token_of(self, token_id: int) -> str | None:
        """Give the token that an id is; None where it is none."""
        return self._tokens.get(token_id)

    def id_of(self, token: str) -> int | None:
        """Give the id of a token; None where there is no such token."""
        return self._ids.get(token)


def _list_tokens(vocab: Any) -> Iterator[tuple[str, int]]:
    """List the tokens of a model with their ids: it maps the one to the other, or has them in order, with scores."""
    pairs = vocab.items() if isinstance(vocab, dict) else ((token, place) for place, (token, _) in enumerate(vocab))
    for token, token_id in pairs:
        if not isinstance(token, str):
            raise TypeError(f"a token is {brief(repr(token))}")
        yield token, token_id


def _number_added(added_tokens: Any, ids: Mapping[str, int], following: int) -> dict[str, int]:
    """Give added tokens the ids that the tokenizers package gives them when it reads the file, whatever it says."""
    found: dict[str, int] = {}
    for added in added_tokens:
        token = added["content"]
        if not isinstance(token, str):
            raise TypeError(f"an added token is {brief(repr(token))}")
        if token and token not in found:
            found[token] = ids.get(token, following)
            following += token not in ids
    return found


def parse_tokenizer(label: str, data: bytes) -> dict[str, Any]:
    """Read what a `tokenizer.json` says.

    Raises:
        FormatError: it is no JSON object, or more than is read.
    """
    try:
        rules = parse_json(data, LARGE)
        if not isinstance(rules, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise FormatError(f"{label}: is not a tokenizer ({brief(error)}).") from error
    return rules


def load_tokenizer(label: str, data: bytes, rules: Mapping[str, Any] | None = None) -> Any:
    """Give a `tokenizer.json` to the tokenizers package.

    Args:
        label: What to call the file in messages.
        data: Its bytes.
        rules: What it says, if it was parsed already.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        FormatError: it is not a tokenizer.
    """
    from tokenizers import Tokenizer

    rules = parse_tokenizer(label, data) if rules is None else rules
    try:
        _check_merges(rules["model"])
        return Tokenizer.from_buffer(data)
    except BaseException as error:  # tokenizers raises bare Exception, and where it panics not even that
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise FormatError(f"{label}: is not a tokenizer ({brief(error)}).") from error


def _check_merges(model: Mapping[str, Any]) -> None:
    """Make sure that each merge is of two tokens and makes a third: of others the parser may make text that is none."""
    merges = model.get("merges") or ()
    if not merges:
        return
    tokens = {token.encode() for token in model["vocab"]}
    prefix = len((model.get("continuing_subword_prefix") or "").encode())
    for merge in merges:
        if isinstance(merge, str) and merge.startswith("#version"):
            continue
        left, right = (part.encode() for part in (merge.split(" ") if isinstance(merge, str) else merge))
        if left not in tokens or right not in tokens or len(right) < prefix or left + right[prefix:] not in tokens:
            raise ValueError(f"its merge {brief(repr(merge))} is not of its vocabulary")
