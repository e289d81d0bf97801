"""`layerprobe.fit_decoder`: measure what a small decoder can learn to read from each layer.

Every layer gets a decoder with the same shape and initial weights, fitted on the same examples in the same order; one
more sees no context. Differences in their scores show what the layers hold in a form that such a decoder can use.

Hides training. The encoder is never run: states come from the store.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from layerprobe.analysis.sweep import choose_depth
from layerprobe.cores import using_few_cores
from layerprobe.errors import InputError, OptionError
from layerprobe.generation.narrow import END, PAD, START, UNKNOWN, DecoderShape, NarrowDecoder
from layerprobe.generation.readout import LayerReading, Readout
from layerprobe.generation.targets import Split, Targets, choose_types, find_targets, split_examples
from layerprobe.models import need_device
from layerprobe.store.guard import check_count
from layerprobe.store.padded import choose_layer
from layerprobe.store.reader import Store, take_store
from layerprobe.telling import make_bar

__all__ = ["fit_decoder"]

_WARM = 0.1
_MOST_SCALED = 64
# A deviation below this fraction of the mean is rounding error.
_STILL = 1e-6


@dataclass(frozen=True)
class _Recipe:
    """Training options, the same for every decoder."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int


def fit_decoder(
    store: Store | str | Path,
    *,
    layer: int | str | Sequence[str] | None = None,
    targets: str | Sequence[object] | None = None,
    width: int = 128,
    num_layers: int = 2,
    max_length: int = 32,
    max_examples: int | None = 5000,
    max_types: int = 8000,
    test_share: float = 0.1,
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
    device: str | int | None = None,
    progress: bool | None = None,
) -> Readout:
    """Fit a small decoder with cross attention to each layer, to measure what can be read from it.

    Args:
        store: A store with a row per token.
        layer: A layer's number, or patterns over the stored sites; None for the embeddings and every layer's output.
        targets: Target texts: a field of the records, or a text or list of ids per example; None for the example's own
            text.
        width, num_layers: Size of the decoders; heads are 32 wide.
        max_length: Maximum number of tokens of a target; longer ones are truncated and counted.
        max_examples: Maximum number of examples, drawn at random; None for all.
        max_types: Maximum size of the decoders' vocabulary: the most frequent tokens of train.
        test_share: Share of the examples for testing. Of examples with equal tokens only one is used.
        epochs: Passes over the training examples.
        batch_size: Examples per step.
        learning_rate: Peak learning rate, reached after a tenth of the steps; it then decays to zero along a cosine.
        seed: Seed of the split, the initial weights and the order.
        device: Device to fit on; None for the CPU with half of the cores.
        progress: Show a progress bar; None: only on a terminal.

    Raises:
        SiteError: no stored site is selected.
        InputError: fewer than 20 different examples, or targets that are not texts.
        OptionError: an invalid value, a device that does not exist, or a site without a row per token.
        NonFiniteError: a state is not finite.

    Example:
        >>> import layerprobe as lp
        >>> things = ("hat", "cup", "dog", "sun", "car")
        >>> texts = [f"{how} {thing}" for how in ("red", "green", "old", "new") for thing in things]
        >>> store = lp.extract("demo", texts, "memory://readable", sites="layers.5")
        >>> found = lp.fit_decoder(store, width=32, num_layers=1, epochs=2)
        >>> [one.site for one in found.layers], found.baseline.site, found.num_train, found.num_test
        (['layers.5'], 'none', 18, 2)
    """
    counts = {"width": width, "num_layers": num_layers, "max_length": max_length, "max_types": max_types}
    for name, value in {**counts, "epochs": epochs, "batch_size": batch_size}.items():
        check_count(name, value)
    seed = check_count("seed", seed, 0)
    if max_examples is not None:
        check_count("max_examples", max_examples, 20)
    if width % 32:
        raise OptionError(f"width is {width}: heads are 32 wide. Use 64, 128 or another multiple of 32.")
    if not 0 < test_share < 1 or not learning_rate > 0:
        raise OptionError(
            f"test_share={test_share}, learning_rate={learning_rate}: a share is between 0 and 1, a rate above 0."
        )
    place = need_device("cpu" if device is None else device)
    store = take_store(store)
    sites = _choose_sites(store, layer)
    split = split_examples(store, max_examples, test_share, seed)
    wanted = find_targets(store, targets, max_length, [*split.train, *split.test])
    types = choose_types(wanted, split.train, max_types)
    if not types:
        raise InputError(f"fit_decoder: the targets of {store.place} are empty. Give texts with tokens in them.")
    shape = DecoderShape(width, num_layers, width // 32, max_length)
    recipe = _Recipe(epochs, batch_size, learning_rate, seed)
    num_steps = (len(sites) + 1) * epochs * math.ceil(len(split.train) / batch_size)
    readings: list[LayerReading] = []
    decoders: dict[str, NarrowDecoder] = {}
    with (
        using_few_cores(),
        torch.random.fork_rng(),
        make_bar(num_steps, "", progress, "steps") as bar,
    ):
        for site in (*sites, None):
            bar.set_description("no context" if site is None else site)
            torch.manual_seed(seed)
            own_width = None if site is None else store[site].width
            decoder = NarrowDecoder(types, own_width, shape).to(place)
            data = _Data(store, site, wanted, decoder)
            train_loss = _train(decoder, data, split, recipe, bar)
            readings.append(_judge(decoder, data, split.test, batch_size, train_loss))
            if site is not None:
                decoders[site] = decoder
    num_tokens = sum(len(wanted.ids[ordinal]) + 1 for ordinal in split.test)
    sizes = (len(split.train), len(split.test), num_tokens, len(types), wanted.num_cut)
    return Readout(
        tuple(readings[:-1]), readings[-1], *sizes, split.test, decoders, dict(store.description.get("model") or {})
    )


def _choose_sites(store: Store, layer: int | str | Sequence[str] | None) -> list[str]:
    if isinstance(layer, int):
        return [choose_layer(layer, store.sites, str(store.place))]
    found = choose_depth(store, layer)
    if found[0].kind != "token":
        raise OptionError(f"fit_decoder of {store.place}: its sites have one vector per example. Extract with no pool.")
    return [site.name for site in found]


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch of examples: inputs and labels of the decoder, int64 `[B, S]`, and its context."""

    places: Tensor
    labels: Tensor
    states: Tensor | None
    mask: Tensor | None


class _Data:
    """The examples of a store as batches for one decoder."""

    def __init__(self, store: Store, site: str | None, targets: Targets, decoder: NarrowDecoder) -> None:
        self.store = store
        self.site = site
        self.device = decoder.mean.device
        self.places = {ordinal: decoder.look_up(ids) for ordinal, ids in targets.ids.items()}

    def batch(self, ordinals: Sequence[int]) -> _Batch:
        targets = [self.places[ordinal] for ordinal in ordinals]
        longest = max(map(len, targets)) + 1
        places = torch.full((len(targets), longest), PAD, device="cpu")
        labels = torch.full((len(targets), longest), PAD, device="cpu")
        for row, target in enumerate(targets):
            places[row, : len(target) + 1] = torch.tensor([START, *target], device="cpu")
            labels[row, : len(target) + 1] = torch.tensor([*target, END], device="cpu")
        places, labels = places.to(self.device), labels.to(self.device)
        if self.site is None:
            return _Batch(places, labels, None, None)
        outputs = self.store.encoder_outputs(self.site, list(ordinals)).to(self.device)
        return _Batch(places, labels, outputs.states, outputs.mask)

    def measure(self, ordinals: Sequence[int], decoder: NarrowDecoder) -> None:
        """Set a decoder's mean and scale from the rows of some examples."""
        total = square = torch.zeros((), dtype=torch.float64, device="cpu")
        count = 0
        for first in range(0, len(ordinals), _MOST_SCALED):
            outputs = self.store.encoder_outputs(str(self.site), list(ordinals[first : first + _MOST_SCALED]))
            rows = outputs.states[outputs.mask.bool()].double()
            total, square, count = total + rows.sum(0), square + (rows**2).sum(0), count + len(rows)
        mean = total / count
        deviation = (square / count - mean**2).clamp_min(0).sqrt()
        varies = deviation > _STILL * mean.abs()
        scale = torch.where(varies, 1 / deviation, torch.zeros_like(deviation))
        decoder.mean.copy_(mean)
        decoder.scale.copy_(scale)


def _shuffled(ordinals: Sequence[int], recipe: _Recipe, epoch: int) -> Iterator[list[int]]:
    order = np.random.default_rng([recipe.seed, 13, epoch]).permutation(len(ordinals)).tolist()
    for first in range(0, len(order), recipe.batch_size):
        yield [ordinals[one] for one in order[first : first + recipe.batch_size]]


def _train(decoder: NarrowDecoder, data: _Data, split: Split, recipe: _Recipe, bar: "tqdm[Any]") -> float:
    """Fit a decoder; return the mean loss of the last epoch."""
    if data.site is not None:
        data.measure(split.train, decoder)
    steps = recipe.epochs * math.ceil(len(split.train) / recipe.batch_size)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    warm = max(1, round(_WARM * steps))

    def rate(step: int) -> float:
        return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    decoder.train()
    loss_sum = num_tokens = 0.0
    for epoch in range(recipe.epochs):
        loss_sum = num_tokens = 0.0
        for ordinals in _shuffled(split.train, recipe, epoch):
            batch = data.batch(ordinals)
            logits = decoder(batch.places, batch.states, batch.mask)
            loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=PAD)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            tokens = int((batch.labels != PAD).sum())
            loss_sum, num_tokens = loss_sum + float(loss.detach()) * tokens, num_tokens + tokens
            bar.update()
    return loss_sum / num_tokens


@torch.no_grad()
def _judge(
    decoder: NarrowDecoder, data: _Data, ordinals: Sequence[int], batch_size: int, train_loss: float
) -> LayerReading:
    decoder.eval()
    loss = right = exact = num_tokens = 0.0
    for first in range(0, len(ordinals), batch_size):
        part = list(ordinals[first : first + batch_size])
        batch = data.batch(part)
        logits = decoder(batch.places, batch.states, batch.mask)
        real = batch.labels != PAD
        loss += float(cross_entropy(logits[real], batch.labels[real], reduction="sum"))
        # a target outside the decoder's vocabulary counts as wrong, even if UNKNOWN is predicted
        known = real & (batch.labels != UNKNOWN)
        right += int((logits.argmax(-1) == batch.labels)[known].sum())
        num_tokens += int(real.sum())
        made = decoder.read(batch.states, batch.mask, len(part))
        wanted = [[*data.places[ordinal], END] for ordinal in part]
        exact += sum(own == other and UNKNOWN not in other for own, other in zip(made, wanted, strict=True))
    site = "none" if data.site is None else data.site
    return LayerReading(site, loss / num_tokens, right / num_tokens, exact / len(ordinals), train_loss)
