"""The tokenizer in a store: convert ids to tokens, and a token or a word to ids.

A token is written as the tokenizer writes it (`bank`, `##er`, `Ġbank`). A word is the run of tokens that it is split
into, with no piece of a longer word before or after it.

Hides the conventions of tokenizer families. Must never know of shards.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.errors import OptionError
from layerprobe.store.tokenizer import TokenNames, load_tokenizer, parse_tokenizer

__all__ = ["Vocabulary", "WordRuns", "find_characters"]

# the marker that each tokenizer family puts before a token that begins a word
_MARKERS = {"ByteLevel": "Ġ", "Metaspace": "▁"}


@dataclass(frozen=True, eq=False)
class WordRuns:
    """The ways in which a word occurs among ids.

    Args:
        runs: Each way to write it, as ids.
        continues: bool `[V]`, whether a token continues the word before it.
        ends_in_word: bool `[V]`, whether a token's last character is a letter or digit.
    """

    runs: tuple[tuple[int, ...], ...]
    continues: Tensor
    ends_in_word: Tensor

    @classmethod
    def of_token(cls, token_id: int) -> "WordRuns":
        """Match a single token, wherever it occurs."""
        nothing = torch.zeros(1, dtype=torch.bool, device="cpu")
        return cls(((token_id,),), nothing, nothing)

    def find(self, input_ids: Tensor, offsets: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Find the runs among packed ids.

        Returns:
            int64 `[n]` each: the first row of each run, and its length.
        """
        rows, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for run in self.runs:
            starts = torch.nonzero(input_ids[: max(0, len(input_ids) - len(run) + 1)] == run[0]).flatten()
            for place, token_id in enumerate(run[1:], 1):
                starts = starts[input_ids[starts + place] == token_id]
            # the first row of the next example
            stops = offsets[torch.searchsorted(offsets, starts, right=True)]
            is_inside = starts + len(run) <= stops
            starts, stops = starts[is_inside], stops[is_inside]
            is_cut = (starts + len(run) < stops) & self._look_up(self.continues, input_ids, starts + len(run))
            first, start = torch.tensor([[run[0]], [0]], device="cpu")
            if bool(self._look_up(self.continues, first, start)):
                is_first = torch.isin(starts, offsets)
                is_cut |= ~is_first & self._look_up(self.ends_in_word, input_ids, starts - 1)
            rows.append(starts[~is_cut].numpy())
            lengths.append(np.full(len(rows[-1]), len(run)))
        return np.concatenate(rows), np.concatenate(lengths)

    @staticmethod
    def _look_up(table: Tensor, input_ids: Tensor, rows: Tensor) -> Tensor:
        """Look up the ids at some rows in a table; False for ids that the tokenizer does not have."""
        ids = input_ids[rows.clamp(0, max(0, len(input_ids) - 1))]
        is_known = (ids >= 0) & (ids < len(table))
        return is_known & table[ids.clamp(0, len(table) - 1)]


class Vocabulary:
    """A tokenizer, read from its file.

    Args:
        label: What to call the file in messages.
        data: The bytes of a `tokenizer.json`.
        said: The tokenizer's settings in `store.json`.

    Raises:
        FormatError: it is not a tokenizer.
    """

    def __init__(self, label: str, data: bytes, said: Mapping[str, Any] | None = None) -> None:
        self._label = label
        self._data = data
        self._set = said or {}
        # mapping ids does not run the file's regular expressions, which an attacker may have made slow
        self._names = TokenNames(label, parse_tokenizer(label, data))

    @cached_property
    def _tokenizer(self) -> Any:
        """The full tokenizer, to split texts given by the reader."""
        return self._load()

    def _load(self) -> Any:
        found = load_tokenizer(self._label, self._data)
        found.no_padding()
        found.no_truncation()
        found.encode_special_tokens = self._set.get("split_special_tokens") is True
        return found

    def tokens(self, ids: Tensor) -> list[str]:
        """Return each id's token; an empty string for an id without one."""
        return [self._names.token_of(token_id) or "" for token_id in ids.tolist()]

    def offsets(self, text: str, ids: Tensor) -> list[tuple[int, int]] | None:
        """Find the characters of a text that each of its tokens covers; (0, 0) for special tokens.

        Returns:
            First character and the one after the last, for each id; None if the text is not split into these ids.
        """
        encoding = self._tokenizer.encode(text)
        if len(encoding.ids) > len(ids):
            limited, side = self._load(), self._set.get("truncation_side")
            limited.enable_truncation(max_length=len(ids), direction="left" if side == "left" else "right")
            encoding = limited.encode(text)
        return list(encoding.offsets) if encoding.ids == ids.tolist() else None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens, such as `[CLS]`."""
        return frozenset(added["id"] for added in self._said.get("added_tokens") or () if added.get("special"))

    def encode(self, text: str) -> list[int]:
        """Split a text into ids, without adding special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, without special tokens; what the tokenizer's normalization removed is not restored."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def id_of(self, token: str) -> int:
        """Return a token's id.

        Raises:
            OptionError: it is not a token; the message says which tokens it is split into.
        """
        found = self._names.id_of(token)
        if found is None:
            pieces = ", ".join(map(repr, self._tokenizer.encode(token, add_special_tokens=False).tokens)) or "nothing"
            raise OptionError(
                f"no token {token!r} in {self._label}: it is cut into {pieces}. "
                f"Use word={token!r} for the runs of its pieces, or one of them as token=."
            )
        return found

    def runs_of(self, word: str) -> WordRuns:
        """Find the ways to write a word, or several consecutive ones, as ids.

        Raises:
            OptionError: the tokenizer has no tokens for it.
        """
        encodings = [self._tokenizer.encode(text, add_special_tokens=False) for text in (word, " " + word)]
        runs = tuple(dict.fromkeys(tuple(encoding.ids) for encoding in encodings if encoding.ids))
        runs = tuple(run for run in runs if self._unknown_id not in run)
        if not word.strip() or not runs:
            raise OptionError(f"no word {word!r} for {self._label}: it has no tokens to write it with.")
        continues, ends_in_word = self._joints
        return WordRuns(runs, continues, ends_in_word)

    @cached_property
    def _said(self) -> dict[str, Any]:
        return json.loads(self._tokenizer.to_str())

    @cached_property
    def _unknown_id(self) -> int | None:
        model = self._said["model"]
        if model.get("unk_token") is not None:
            return self._tokenizer.token_to_id(model["unk_token"])
        return model.get("unk_id")

    @cached_property
    def _joints(self) -> tuple[Tensor, Tensor]:
        """For each id, whether it continues a word, and whether it ends in a word character."""
        model = self._said["model"]
        used = json.dumps([self._said.get("pre_tokenizer"), self._said.get("normalizer"), self._said.get("decoder")])
        marker = next((marker for name, marker in _MARKERS.items() if f'"{name}"' in used), None)
        prefix = model.get("continuing_subword_prefix") if model.get("type") in ("WordPiece", "BPE") else None
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        continues = torch.zeros(max([size - 1, *ids.values()]) + 1, dtype=torch.bool, device="cpu")
        ends_in_word = torch.zeros_like(continues)
        for token, token_id in ids.items():
            if prefix:
                continues[token_id] = len(token) > len(prefix) and token.startswith(prefix)
            elif marker is not None:
                text = self._spell(token, token_id, marker)
                continues[token_id] = _is_of_word(text[:1])
                ends_in_word[token_id] = _is_of_word(text[-1:])
        return continues, ends_in_word

    def _spell(self, token: str, token_id: int, marker: str) -> str:
        """Convert a token to text, keeping its leading space."""
        if marker == _MARKERS["Metaspace"]:
            return token.replace(marker, " ")
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


def _is_of_word(sign: str) -> bool:
    # a token may end in the middle of a multi-byte letter
    return sign.isalnum() or sign == "\N{REPLACEMENT CHARACTER}"


def find_characters(vocabulary: Vocabulary | None, text: str | None, ids: Tensor, what: str) -> list[tuple[int, int]]:
    """Find the characters of a text that each of its tokens covers; (0, 0) for special tokens.

    Raises:
        OptionError: there is no tokenizer or no text, or the text is not split into these ids; the message begins with
            `what`.
    """
    if vocabulary is None or text is None:
        lacks = "text" if text is None else "tokenizer"
        raise OptionError(f"{what}: the store keeps no {lacks}. Stores of layerprobe.extract keep both.")
    found = vocabulary.offsets(text, ids)
    if found is None:
        raise OptionError(f"{what}: its tokenizer cuts the text into other ids. Extract it again.")
    return found
