"""Classify texts with a saved probe, running its model only up to the layers it needs.

Each forward pass ends after the last layer that the probe reads. Vectors are computed in the model's own dtype, without
the rounding of a store with a narrower dtype.

Hides batches and hooks. Must never know of labels' meaning or of scikit-learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.analysis.keeping import KeptProbe, load_probe
from layerprobe.errors import InputError, OptionError
from layerprobe.extract.batching import cut_batches
from layerprobe.extract.forward import find_precision, running
from layerprobe.extract.inputs import check_list
from layerprobe.extract.looking import look
from layerprobe.extract.network import check_ids, find_max_length
from layerprobe.extract.padding import sees_padding
from layerprobe.extract.records import check_text
from layerprobe.extract.tokens import TokenizedUnit, tokenize, tokenizing
from layerprobe.extract.untrained import find_same_model
from layerprobe.models import LoadedModel
from layerprobe.sites.resolve import map_model
from layerprobe.store.shards import POOLS, pool_packed
from layerprobe.tables import format_count

__all__ = ["Classifier", "load_classifier"]

_BATCH_TOKENS = 2048
_TEXTS_AHEAD = 1024


@dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier of texts. Made by `layerprobe.load_classifier`.

    Args:
        probe: The saved probe.
        model: The model that its vectors come from.
    """

    probe: KeptProbe
    model: LoadedModel

    @property
    def classes(self) -> tuple[Any, ...]:
        """The labels that it distinguishes."""
        return self.probe.classes

    def predict(self, texts: Sequence[str], spans: Sequence[tuple[int, int]] | None = None) -> list[Any]:
        """Give each text's class.

        Args:
            texts: The texts.
            spans: For a classifier of spans: of each text the first character and the one after the last.

        Returns:
            A label per text; for a classifier of tokens, a list of labels per text, special tokens included.

        Raises:
            InputError: one text instead of several, something that is not a text, or a span that is in no token.
            OptionError: spans where there must be none, or none where there must be some.
        """
        if isinstance(texts, str):
            raise InputError("predict: got one text. Give a list of texts.")
        check_list(texts, "a list of texts")
        texts = list(texts)
        if (spans is not None) != (self.probe.kind == "spans"):
            raise OptionError(
                f"predict(spans={'...' if spans is not None else None}): this classifier is of {self.probe.kind}. "
                f"{'Leave spans out' if spans is not None else 'Give a pair of characters per text'}."
            )
        if spans is not None and len(spans) != len(texts):
            raise OptionError(
                f"predict: {format_count(len(spans), 'span')} for {format_count(len(texts), 'text')}. "
                "Give one for each."
            )
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"predict: text {number} is {type(text).__name__}, not a text. Give a list of texts.")
            check_text(text, "texts", number)
        found: list[Any] = []
        for first in range(0, len(texts), _TEXTS_AHEAD):
            part = texts[first : first + _TEXTS_AHEAD]
            found += self._predict(first, part, None if spans is None else spans[first : first + _TEXTS_AHEAD])
        return found

    def _predict(self, first: int, texts: list[str], spans: Sequence[tuple[int, int]] | None) -> list[Any]:
        tokenizer, network = self.model.tokenizer, self.model.model
        unit = tokenize(tokenizer, texts, self._max_length)
        check_ids(network, unit, "texts", first)
        out: list[Any] = [None] * len(texts)
        sites = list(dict.fromkeys(self.probe.feature.sites))
        pad_id = tokenizer.pad_token_id or 0
        with running(network, find_precision(network, None)):
            equal_lengths = len(np.unique(unit.lengths)) > 1 and self._sees_padding
            for batch in cut_batches(unit, _BATCH_TOKENS, pad_id, equal_lengths=equal_lengths):
                mask = batch.attention_mask.bool()
                made = look(network, sites, batch.input_ids, batch.attention_mask)
                values = {site: value.float().cpu() for site, value in made.items()}
                for member, sequence in zip(batch.members, batch.sequences, strict=True):
                    rows = [values[site][sequence] for site in sites]
                    if rows[0].ndim == 2:
                        rows = [value[mask[sequence]] for value in rows]
                    out[member] = self._decide(rows, None if spans is None else self._find(texts, unit, member, spans))
        return out

    def _decide(self, rows: list[Tensor], span: tuple[int, int] | None) -> Any:
        """Classify one text from its rows at each site."""
        probe = self.probe
        if probe.kind == "spans":
            assert span is not None
            rows = [value[span[0] : span[1]].mean(0, keepdim=True) for value in rows]
        elif probe.kind == "examples" and rows[0].ndim == 2:
            rows = [
                pool_packed(value, torch.tensor([0, len(value)], device="cpu"), probe.pool or "mean") for value in rows
            ]
        vectors = probe.feature.combine([np.atleast_2d(value.numpy()) for value in rows])
        labels = [probe.classes[number] for number in probe.linear.predict(vectors)]
        return labels if probe.kind == "tokens" else labels[0]

    def _find(
        self, texts: list[str], unit: TokenizedUnit, member: int, spans: Sequence[tuple[int, int]]
    ) -> tuple[int, int]:
        start, end = spans[member]
        with tokenizing:
            encoding = self.model.tokenizer(
                texts[member], truncation=True, max_length=self._max_length, return_offsets_mapping=True
            )
        places = encoding["offset_mapping"]
        rows = [row for row, (first, last) in enumerate(places) if first < end and last > start]
        if not rows or len(places) != len(unit[member]):
            raise InputError(f"predict: characters {start} to {end} of text {member} are in no token. Mend the span.")
        return rows[0], rows[-1] + 1

    @cached_property
    def _sees_padding(self) -> bool:
        network, tokenizer = self.model.model, self.model.tokenizer
        unit, sites = tokenize(tokenizer, ["layer probe"], 8), map_model(network).select(self.probe.feature.sites)
        return sees_padding(network, unit, tokenizer.pad_token_id or 0, find_precision(network, None), sites)

    @property
    def _max_length(self) -> int:
        return self.probe.max_length or find_max_length(self.model.model, self.model.tokenizer)


def load_classifier(
    folder: str | Path, model: nn.Module | LoadedModel | str | None = None, *, device: str | int | None = None
) -> Classifier:
    """Load a classifier saved by `classify(...).probe.save(folder)`, with the model that it reads.

    Args:
        folder: Where it was saved.
        model: Its model; None for the one that it names.
        device: Device for a model loaded by name.

    Raises:
        StoreError: there is none in the folder, or it is damaged.
        ModelError: the model is not the one that it was fitted on.
        OptionError: it was fitted on vectors that a function pooled, or `device` is given with a model object.

    Example:
        >>> import layerprobe as lp
        >>> things = ("The rain", "A storm", "The snow", "A cold wind", "The fog", "Hail")
        >>> texts = [{"text": f"{thing} came down", "label": "weather"} for thing in things]
        >>> foods = ("Bread", "Cake", "Pie", "Fish", "Rice", "Corn")
        >>> texts += [{"text": f"{food} was baked", "label": "food"} for food in foods]
        >>> found = lp.classify(lp.extract("demo", texts, "memory://said", sites="layers.3"))
        >>> classifier = lp.load_classifier(found.probe.save("weather-or-food"))
        >>> classifier.predict(["The soup was baked", "The sleet came down"])
        ['food', 'weather']
    """
    probe = load_probe(folder)
    if probe.kind == "examples" and probe.pool not in POOLS:
        raise OptionError(f"{folder}: its vectors were pooled by {probe.pool!r}, which no file holds. Pool by a name.")
    return Classifier(probe, find_same_model(probe.model, str(folder), model, device))
