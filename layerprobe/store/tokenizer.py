"""Read a `tokenizer.json` that may be untrusted: map ids to tokens, or load it with the native parser.

Mapping ids to tokens needs only the vocabulary and the added tokens. Tokenizing and decoding need the tokenizers
package, whose parser aborts the whole process on some merges, so merges are checked against the vocabulary first.

Hides that parser. Must never know of stores.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from layerprobe.errors import FormatError
from layerprobe.store.guard import LARGE, brief, parse_json

__all__ = ["TokenNames", "load_tokenizer", "parse_tokenizer"]

_MOST_IDS = 1 << 32


class TokenNames:
    """The token of each id, and the id of each token.

    Args:
        label: What to call the file in messages.
        rules: The parsed file.

    Raises:
        FormatError: it has no valid vocabulary.
    """

    def __init__(self, label: str, rules: Mapping[str, Any]) -> None:
        try:
            listed = list(_list_tokens(rules["model"]["vocab"]))
            ids = dict(listed)
            # a token that is listed twice has two ids, and both map to it
            added = _number_added(rules.get("added_tokens") or (), ids, len(listed))
            ids |= added
            if not all(type(token_id) is int and 0 <= token_id < _MOST_IDS for token_id in ids.values()):
                raise ValueError("an id is no whole number of 32 bits")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{label}: is not a tokenizer ({brief(error)}).") from error
        self._ids = ids
        self._tokens = {token_id: token for token, token_id in (*listed, *added.items())}

    def token_of(self, token_id: int) -> str | None:
        """Return the token of an id; None if there is none."""
        return self._tokens.get(token_id)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token; None if there is no such token."""
        return self._ids.get(token)


def _list_tokens(vocab: Any) -> Iterator[tuple[str, int]]:
    """List the tokens of a model with their ids: it is either a mapping, or a list of tokens and scores in id order."""
    pairs = vocab.items() if isinstance(vocab, dict) else ((token, place) for place, (token, _) in enumerate(vocab))
    for token, token_id in pairs:
        if not isinstance(token, str):
            raise TypeError(f"a token is {brief(repr(token))}")
        yield token, token_id


def _number_added(added_tokens: Any, ids: Mapping[str, int], following: int) -> dict[str, int]:
    """Give added tokens the ids that the tokenizers package assigns on load, whatever the file says."""
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
    """Parse a `tokenizer.json`.

    Raises:
        FormatError: it is not a JSON object, or exceeds the limits.
    """
    try:
        rules = parse_json(data, LARGE)
        if not isinstance(rules, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise FormatError(f"{label}: is not a tokenizer ({brief(error)}).") from error
    return rules


def load_tokenizer(label: str, data: bytes, rules: Mapping[str, Any] | None = None) -> Any:
    """Load a `tokenizer.json` with the tokenizers package.

    Args:
        label: What to call the file in messages.
        data: The bytes of the file.
        rules: The parsed file, if it was parsed already.

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
    except BaseException as error:  # tokenizers raises bare Exception, and a panic is not even that
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise FormatError(f"{label}: is not a tokenizer ({brief(error)}).") from error


def _check_merges(model: Mapping[str, Any]) -> None:
    """Check that each merge joins two tokens into a third; from others the parser may build invalid UTF-8."""
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
