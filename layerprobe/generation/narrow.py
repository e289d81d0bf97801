"""The narrow decoder that learns to read a layer: a small BERT with cross attention to projected rows.

It has its own vocabulary, made of tokens from its training targets; the first four entries are padding, start, end and
unknown. A layer's rows are standardised with the mean and deviation of the training rows, so that layers of different
scales are treated alike.

Must never know of stores or of how it is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["END", "NUM_RESERVED", "PAD", "START", "UNKNOWN", "DecoderShape", "NarrowDecoder"]

PAD, START, END, UNKNOWN = range(4)
NUM_RESERVED = 4


@dataclass(frozen=True)
class DecoderShape:
    """The size of a narrow decoder, the same for every layer so that decoders can be compared."""

    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    max_length: int = 32


class NarrowDecoder(nn.Module):
    """A small causal decoder that attends to the rows of one layer, or to no context.

    Args:
        types: Token ids that it can write, in the order of its vocabulary.
        width: Width D of the rows; None for a decoder without context.
        shape: The size of the decoder.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, types: Sequence[int], width: int | None, shape: DecoderShape) -> None:
        super().__init__()
        from transformers import BertConfig, BertLMHeadModel

        self.types = tuple(types)
        self.shape = shape
        self._places = {token: place + NUM_RESERVED for place, token in enumerate(self.types)}
        config: Any = BertConfig(
            vocab_size=len(self.types) + NUM_RESERVED,
            hidden_size=shape.width,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            intermediate_size=4 * shape.width,
            max_position_embeddings=shape.max_length + 1,
            pad_token_id=PAD,
            is_decoder=True,
            add_cross_attention=True,
        )
        self.language: Any = BertLMHeadModel(config)
        self.project = None if width is None else nn.Linear(width, shape.width)
        self.register_buffer("mean", torch.zeros(width or 1))
        self.register_buffer("scale", torch.ones(width or 1))

    def forward(self, places_BS: Tensor, states: Tensor | None, mask: Tensor | None) -> Tensor:
        """Score the next tokens.

        Args:
            places_BS: int64, indices into the vocabulary.
            states: `[B, R, D]`, the rows as context; None for a decoder without context.
            mask: int64 `[B, R]`, 1 for real rows.

        Returns:
            float32 `[B, S, V]`, the logits.
        """
        if self.project is None or states is None:
            # a single row of zeros, so that the decoder keeps its cross attention but gets no information from it
            context = torch.zeros(len(places_BS), 1, self.shape.width, device=places_BS.device)
            mask = torch.ones(len(places_BS), 1, dtype=torch.int64, device=places_BS.device)
        else:
            context = self.project((states - self.mean) * self.scale)
        return self.language(
            input_ids=places_BS,
            attention_mask=torch.ones_like(places_BS),
            encoder_hidden_states=context,
            encoder_attention_mask=mask,
            use_cache=False,
        ).logits

    def look_up(self, ids: Sequence[int]) -> list[int]:
        """Convert token ids to indices into the vocabulary, UNKNOWN for ids that it lacks."""
        return [self._places.get(token, UNKNOWN) for token in ids]

    def write(self, places: Sequence[int], unknown_id: int) -> list[int]:
        """Convert indices into the vocabulary to token ids, up to the end token."""
        found = []
        for place in places:
            if place == END:
                break
            found.append(self.types[place - NUM_RESERVED] if place >= NUM_RESERVED else unknown_id)
        return found

    @torch.no_grad()
    def read(self, states: Tensor | None, mask: Tensor | None, batch_size: int) -> list[list[int]]:
        """Decode greedily; returns indices into the vocabulary, with the end token if it was reached."""
        device = self.mean.device
        made = torch.full((batch_size, 1), START, dtype=torch.int64, device=device)
        is_done = torch.zeros(batch_size, dtype=torch.bool, device=device)
        for _ in range(self.shape.max_length + 1):
            scores = self(made, states, mask)[:, -1]
            # padding and start are never targets
            scores[:, [PAD, START]] = -torch.inf
            following = scores.argmax(1).masked_fill(is_done, PAD)
            made = torch.cat([made, following[:, None]], 1)
            is_done |= following == END
            if bool(is_done.all()):
                break
        rows = made[:, 1:].tolist()
        return [row[: row.index(END) + 1] if END in row else row for row in rows]
