"""Turn texts into token ids, stored back to back in one array: four bytes a token, however many texts there are.

A tokenizer returns a Python int per token, nine times as much memory, so texts are tokenised in parts. The Python work
that a tokenizer's `__call__` does for each text is skipped unless a subclass changes it, as it would delay the model.

Must never know of models or files.
"""

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.capture.staging import Room

__all__ = ["NO_TEXTS", "TokenizedUnit", "tokenize", "tokenizing"]

_TEXTS_AT_ONCE = 256
# A text is tokenised in full before it is truncated, which takes up to a hundred bytes per token.
_CHARACTERS_AT_ONCE = 1 << 20
# The method that configures the backend's truncation and padding; classes derived from its own may override calls.
_OF_BACKEND = "set_truncation_and_padding"
# Truncation is state of the tokenizer, and two runs may share one.
tokenizing = threading.Lock()
_OF_CALLS = {
    "__call__", "_call_one", "_switch_to_input_mode", "_convert_encoding", "_get_padding_truncation_strategies",
    _OF_BACKEND,
    *(f"{of_some}encode{of_plus}" for of_some in ("_batch_", "_", "batch_", "") for of_plus in ("_plus", "")),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class TokenizedUnit:
    """The ids of a unit's texts, in input order, and which texts were truncated.

    `unit[i]` is a view of text i's ids, `len(unit)` the number of texts.

    Args:
        ids: int32 `[T]`, the texts back to back.
        offsets: int64 `[N + 1]`, the bounds of each text.
        truncated: bool `[N]`.
    """

    ids: np.ndarray
    offsets: np.ndarray
    truncated: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[Sequence[int]], truncated: Sequence[bool] | None = None) -> "TokenizedUnit":
        """Build a unit from the ids of each text."""
        parts = [np.asarray(ids, dtype=np.int32) for ids in texts]
        offsets = np.fromiter(itertools.accumulate(map(len, parts), initial=0), np.int64, len(parts) + 1)
        cut = np.zeros(len(parts), dtype=bool) if truncated is None else np.asarray(truncated, dtype=bool)
        return cls(np.concatenate([np.empty(0, np.int32), *parts]), offsets, cut)

    def __len__(self) -> int:
        return len(self.truncated)

    def __getitem__(self, place: int) -> np.ndarray:
        return self.ids[self.offsets[place] : self.offsets[place + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Length of each text in tokens, int64 `[N]`."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the whole unit."""
        return len(self.ids)

    @property
    def num_truncated(self) -> int:
        """Number of truncated texts."""
        return int(self.truncated.sum())

    @property
    def room(self) -> Room:
        """Size of the unit in a buffer."""
        return Room(self.num_tokens, len(self), int((self.lengths**2).sum()))

    def part(self, start: int, stop: int) -> "TokenizedUnit":
        """Return texts `[start, stop)`."""
        offsets = self.offsets[start : stop + 1]
        return TokenizedUnit(self.ids[offsets[0] : offsets[-1]], offsets - offsets[0], self.truncated[start:stop])

    def gather(self, places: Iterable[int]) -> Tensor:
        """Concatenate the ids of some texts, int64 `[T]`."""
        parts = [self[place] for place in places]
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts], dtype=np.int64))


NO_TEXTS = TokenizedUnit.of([])


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> TokenizedUnit:
    """Tokenise texts, including special tokens, truncated to `max_length`.

    Cost: besides the ids, the tokenizer's output for at most 256 texts with a million characters in total, or for one
    longer text.
    """
    parts = [_tokenize(tokenizer, some, max_length) for some in _cut_texts(texts)]
    if len(parts) == 1:
        return parts[0]
    begins = itertools.accumulate((part.num_tokens for part in parts), initial=0)
    ends = [part.offsets[1:] + begin for part, begin in zip(parts, begins, strict=False)]
    return TokenizedUnit(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([np.zeros(1, np.int64), *ends]),
        np.concatenate([part.truncated for part in parts]),
    )


def _cut_texts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Split texts into groups for single tokenizer calls; no texts give one empty group."""
    start = size = 0
    for place, text in enumerate(texts):
        if place > start and (place - start == _TEXTS_AT_ONCE or size + len(text) > _CHARACTERS_AT_ONCE):
            yield texts[start:place]
            start, size = place, 0
        size += len(text)
    yield texts[start:]


def _tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> TokenizedUnit:
    if not texts:
        return NO_TEXTS
    with tokenizing:
        call = _call_backend if _is_plain(tokenizer) else _call
        return TokenizedUnit.of(*call(tokenizer, texts, max_length))


def _call_backend(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
    """Do what the tokenizer's own call does, without its Python work for each text."""
    from transformers.tokenization_utils_base import TruncationStrategy
    from transformers.utils.generic import PaddingStrategy

    tokenizer.set_truncation_and_padding(
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=TruncationStrategy.LONGEST_FIRST,
        max_length=max_length,
        stride=0,
        pad_to_multiple_of=None,
        padding_side=None,
    )
    backend = tokenizer.backend_tokenizer
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings = backend.encode_batch_fast(list(texts))
    return [one.ids for one in encodings], [bool(one.overflowing) for one in encodings]


def _call(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
    encoding = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_length,
        padding=False,
        # the overflow of a long text comes as further rows of the same sample, which reveals truncation
        return_overflowing_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    ids: list[list[int]] = [[] for _ in texts]
    rows = [0] * len(texts)
    for row, sample in zip(encoding["input_ids"], encoding["overflow_to_sample_mapping"], strict=True):
        if not rows[sample]:
            ids[sample] = row
        rows[sample] += 1
    return ids, [count > 1 for count in rows]


def _is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer tokenises with its backend alone, without overriding methods of the base class's call."""
    classes = type(tokenizer).__mro__
    bases = [number for number, one in enumerate(classes) if _OF_BACKEND in vars(one)]
    own = {name for one in classes[: max(bases, default=0)] for name in vars(one)} | set(vars(tokenizer))
    return bool(bases) and not own & _OF_CALLS
