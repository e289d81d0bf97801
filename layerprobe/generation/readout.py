"""The result of `layerprobe.fit_decoder`: scores by layer, as table, CSV, JSON and curve, and the decoders.

They can be saved to a folder and loaded again; `keeping` knows its files. Must never know how they were fitted.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from layerprobe.analysis.figures import Curve, draw_curves
from layerprobe.analysis.results import lay_out, write_csv, write_json
from layerprobe.errors import FormatError, OptionError, SiteError
from layerprobe.generation.decoding import list_examples
from layerprobe.generation.keeping import read_decoders, write_decoders
from layerprobe.generation.narrow import NarrowDecoder
from layerprobe.generation.results import Generated, Generation
from layerprobe.store.fingerprint import MODEL_FIELDS
from layerprobe.store.guard import brief
from layerprobe.store.padded import choose_layer
from layerprobe.store.reader import Store, take_store
from layerprobe.tables import format_count

__all__ = ["LayerReading", "Readout", "load_decoder"]

_HEADERS = ("site", "loss", "accuracy", "exact", "train_loss")
_BATCH = 64
_NUMBERS = ("num_train", "num_test", "num_test_tokens", "num_types", "num_cut")


@dataclass(frozen=True)
class LayerReading:
    """The scores of one decoder on the test examples.

    Args:
        site: The site that it reads; `none` for the decoder without context.
        loss: Cross entropy in nats per token, the end token included, given the true tokens before it.
        accuracy: Share of tokens that it predicts correctly, given the true tokens before them.
        exact: Share of examples that it decodes greedily without a mistake.
        train_loss: Loss on train over the last epoch, in nats per token.
    """

    site: str
    loss: float
    accuracy: float
    exact: float
    train_loss: float


@dataclass(frozen=True, eq=False)
class Readout:
    """What `layerprobe.fit_decoder` found.

    Args:
        layers: The scores of each layer, in the order of the store.
        baseline: The scores of a decoder of the same shape without context.
        num_train, num_test: Number of examples in train and test.
        num_test_tokens: Number of test tokens that loss and accuracy are computed over.
        num_types: Number of tokens that the decoders can write.
        num_cut: Number of targets that were longer than `max_length` and were truncated.
        test: Ordinals of the test examples.
        decoders: The fitted decoders by site.
        model: The store's description of its model.
    """

    layers: tuple[LayerReading, ...]
    baseline: LayerReading
    num_train: int
    num_test: int
    num_test_tokens: int
    num_types: int
    num_cut: int
    test: tuple[int, ...]
    decoders: Mapping[str, NarrowDecoder] = field(repr=False)
    model: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def table(self) -> str:
        """Format the scores as a text table, the baseline last."""
        said = (
            f"{format_count(self.num_train, 'example')} to train, {self.num_test:,} to judge "
            f"({format_count(self.num_test_tokens, 'token')}); {format_count(self.num_types, 'type')}"
        )
        cut = f"; {format_count(self.num_cut, 'target')} cut" if self.num_cut else ""
        return f"{lay_out((*self.layers, self.baseline), _HEADERS)}\n{said}{cut}"

    __str__ = table
    __repr__ = table

    def to_csv(self, path: str | Path) -> Path:
        """Write the scores as CSV, one row per decoder."""
        rows = [[getattr(one, name) for name in _HEADERS] for one in (*self.layers, self.baseline)]
        return write_csv(path, _HEADERS, rows)

    def to_json(self, path: str | Path) -> Path:
        """Write everything but the decoders as one JSON object."""
        return write_json(path, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the decoders as JSON values."""
        names = ("layers", "baseline", *_NUMBERS, "test")
        return {name: getattr(self, name) for name in names}

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw `accuracy` and `exact` over depth, and the accuracy without context."""
        names = [one.site for one in self.layers]
        curves = [
            Curve("tokens right", names, [one.accuracy for one in self.layers]),
            Curve("examples exact", names, [one.exact for one in self.layers]),
            Curve("tokens, no context", names, [self.baseline.accuracy] * len(names)),
        ]
        return draw_curves(names, curves, "read by a narrow decoder, held out", path)

    def read(self, store: Store | str | Path, site: int | str, examples: Any = None) -> Generation:
        """Decode examples greedily with the decoder of a site.

        Args:
            store: The store that it was fitted on, or another one of the same model.
            site: A site that has a decoder, or a layer's number; negative numbers count from the last layer with a
                decoder.
            examples: Ordinals, a slice of them, or one; None for all.

        Raises:
            SiteError: no decoder was fitted for the site.
            OptionError: the store is of a different model than the decoders were fitted on.
        """
        if isinstance(site, int):
            site = choose_layer(site, list(self.decoders), "the decoders")
        decoder = self.decoders.get(site)
        if decoder is None:
            raise SiteError(f"no decoder for {site!r}: there are those of {', '.join(self.decoders)}.")
        store = take_store(store)
        self._check_model(store)
        ordinals, found = list_examples(store, examples), []
        vocabulary = store.vocabulary
        for first in range(0, len(ordinals), _BATCH):
            part = ordinals[first : first + _BATCH]
            outputs = store.encoder_outputs(site, part).to(decoder.mean.device)
            with torch.no_grad():
                made = decoder.read(outputs.states, outputs.mask, len(part))
            for ordinal, places in zip(part, made, strict=True):
                ids = decoder.write(places, unknown_id=-1)
                known = [token for token in ids if token >= 0]
                text = None if vocabulary is None else vocabulary.decode(known)
                found.append(Generated(ordinal, tuple(ids), text))
        return Generation(site, tuple(found))

    def _check_model(self, store: Store) -> None:
        here = store.description.get("model") or {}
        differing = [key for key in MODEL_FIELDS if self.model.get(key) != here.get(key)]
        if differing:
            there, own = self.model.get(differing[0]), here.get(differing[0])
            raise OptionError(
                f"decoders for {store.place}: they were fitted on another model's states "
                f"({differing[0]} {there!r} there, {own!r} here). Use a store of the same model."
            )

    def save(self, folder: str | Path) -> Path:
        """Save decoders and scores to a folder, which is created if needed; existing files are replaced.

        Raises:
            StoreError: the folder cannot be written.
        """
        said = {"layers": [asdict(one) for one in self.layers], "baseline": asdict(self.baseline)}
        said |= {name: getattr(self, name) for name in (*_NUMBERS, "test")}
        return write_decoders(folder, self.decoders, {**said, "model": dict(self.model)})


def load_decoder(folder: str | Path) -> Readout:
    """Load the decoders saved by `fit_decoder(...).save(folder)`, and their scores.

    Args:
        folder: The folder.

    Raises:
        StoreError: there are no decoders in it.
        FormatError: they are damaged.

    Example:
        >>> import layerprobe as lp
        >>> things = ("hat", "cup", "dog", "sun", "car")
        >>> texts = [f"{how} {thing}" for how in ("red", "green", "old", "new") for thing in things]
        >>> store = lp.extract("demo", texts, "memory://kept", sites="layers.5")
        >>> folder = lp.fit_decoder(store, width=32, num_layers=1, epochs=1).save("reader")
        >>> lp.load_decoder(folder).read(store, "layers.5", 3).site
        'layers.5'
    """
    decoders, said = read_decoders(folder)
    try:
        layers = tuple(_reading_of(one) for one in said["layers"])
        if [one.site for one in layers] != list(decoders):
            raise ValueError(f"readings of {len(layers)} sites, decoders of {len(decoders)}")
        numbers = {name: int(said[name]) for name in _NUMBERS}
        test = tuple(int(ordinal) for ordinal in said["test"])
        baseline, model = _reading_of(said["baseline"]), dict(said["model"])
        return Readout(layers, baseline, **numbers, test=test, decoders=decoders, model=model)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{folder}: holds no whole readings ({brief(error)}). Keep them again.") from error


def _reading_of(said: Mapping[str, Any]) -> LayerReading:
    return LayerReading(str(said["site"]), *(float(said[name]) for name in _HEADERS[1:]))
