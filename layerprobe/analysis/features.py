"""The vectors that are classified: one site, the last four joined or averaged, or a learned mix of all layers.

Sites are read one at a time, and only the selected items are held in memory. An item without rows, or with a value that
is not finite, raises an error that names it.

Hides shards and pools. Must never know of labels' names or of scikit-learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from layerprobe.analysis.splits import DEV, TRAIN
from layerprobe.analysis.sweep import Mappings
from layerprobe.analysis.tasks import Task
from layerprobe.errors import NonFiniteError, OptionError
from layerprobe.store.headers import SCALE_SUFFIX
from layerprobe.store.reader import Store
from layerprobe.store.shards import ScaledRows, span_of
from layerprobe.tables import format_count

__all__ = ["Feature", "average_of", "joined_of", "learn_mix", "read_site", "single_of"]

# A small set gets more epochs, so that the layer weights have enough steps to move.
_EPOCHS, _LEAST_STEPS = 30, 300
_BATCH = 256


@dataclass(frozen=True)
class Feature:
    """A rule that makes an item's vector from sites.

    Args:
        name: Its name in results.
        sites: The sites.
        factors: The factor of each site in a weighted sum; None to concatenate the sites.
    """

    name: str
    sites: tuple[str, ...]
    factors: tuple[float, ...] | None

    def combine(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Combine the vectors of the sites, `[n, D]` each."""
        if len(values) == 1:
            return values[0]
        if self.factors is None:
            return np.concatenate(values, axis=1)
        total = np.zeros(values[0].shape, dtype=np.float64)
        for factor, value in zip(self.factors, values, strict=True):
            total += factor * value
        return total


def single_of(site: str) -> Feature:
    """Make the feature of a single site."""
    return Feature(site, (site,), (1.0,))


def joined_of(sites: Sequence[str]) -> Feature:
    """Make the feature that concatenates sites."""
    return Feature(f"last{len(sites)}:joined", tuple(sites), None)


def average_of(sites: Sequence[str]) -> Feature:
    """Make the feature that averages sites."""
    return Feature(f"last{len(sites)}:averaged", tuple(sites), (1 / len(sites),) * len(sites))


def read_site(store: Store, site: str, task: Task, pool: str | None) -> np.ndarray:
    """Read the vector of each item at a site, float32 `[n, D]`.

    Args:
        store: The store.
        site: A site with a row per token, or with a vector per example if the items are examples.
        task: The items.
        pool: How an example's rows become one vector.

    Raises:
        OptionError: the site has a vector per example where rows are needed, or the pool is not the store's.
        NonFiniteError: an item is not finite; the message names the first.
    """
    view = store[site]
    if view.kind == "attention":
        raise OptionError(f"{site!r} is one matrix per head and has no rows. Classify by another site.")
    if task.spans is not None and view.kind != "token":
        raise OptionError(
            f"labels {task.name!r} belong to {task.kind}: in {store.place} "
            f"{store.stored_sites[site].tell_vector(store.pool)}, and no row per token. "
            "Take a site that has, of a store without a pool."
        )
    out = np.empty((len(task.examples), view.width), dtype=np.float32)
    stored, mapped = store.stored_sites[site], Mappings(store.catalog)
    if task.spans is None:
        ordinals = np.fromiter(store.ordinals(), dtype=np.int64)
        wanted, first, row = np.searchsorted(ordinals, task.examples), 0, 0
        shards = view.catalog.shards
        for number, vectors in enumerate(view.iter_pooled(pool if view.kind == "token" else None)):
            own = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + len(vectors))] - first
            out[row : row + len(own)] = vectors.numpy()[own]
            first, row = first + len(vectors), row + len(own)
            mapped.add_shard([stored], shards[number])
    else:
        names = [site, site + SCALE_SUFFIX] if stored.dtype == torch.int8 else [site]
        items = zip(task.examples.tolist(), task.spans.tolist(), out, strict=True)
        by_example = {ordinal: list(own) for ordinal, own in groupby(items, key=lambda item: item[0])}
        for shard, ordinals in store.catalog.iter_parts(list(by_example), names):
            tensors = [shard.tensor(name) for name in names]
            for ordinal in ordinals:
                _, first, last = span_of(shard, ordinal)
                values, *scale = (tensor[first:last] for tensor in tensors)
                rows = ScaledRows(values, *scale).float() if scale else values.float()
                for _, (start, stop), into in by_example[ordinal]:
                    into[:] = rows[start:stop].mean(0).numpy()
            mapped.add_shard([stored], shard.header)
    is_bad = ~np.isfinite(out).all(1)
    if is_bad.any():
        raise NonFiniteError(
            f"{site!r} in {store.place}: example {int(task.examples[is_bad][0])} is not finite or has no rows "
            f"({format_count(int(is_bad.sum()), 'item')} in all), and nothing is fitted on it. Leave the site or "
            "the example out; 'layerprobe check' counts such rows."
        )
    return out


def learn_mix(values: Sequence[np.ndarray], sites: Sequence[str], task: Task, seed: int) -> tuple[Feature, np.ndarray]:
    """Learn a softmax-weighted sum of layers together with a linear classifier.

    Each layer is first centred and scaled to a root mean square of 1 on train, so that the weights are comparable.

    Returns:
        The mix, with factors for raw vectors; and the weights, float64 `[L]`, which sum to 1.

    Source: Peters et al. 2018 (ELMo), eq. 1; as a probe, Tenney et al. 2019, section 3.2.
    """
    means, scales = [], []
    train = task.sides == TRAIN
    for value in values:
        # a float32 sum over rows would lose the small variations
        mean = value[train].mean(0, dtype=np.float64).astype(np.float32)
        means.append(torch.from_numpy(mean))
        scales.append(float(np.sqrt(np.square(value[train] - mean).mean(dtype=np.float64))) or 1.0)
    views = [torch.from_numpy(value) for value in values]
    labels = torch.from_numpy(task.labels)
    maker = torch.Generator().manual_seed(seed)
    mix = torch.zeros(len(views), dtype=torch.float32, requires_grad=True, device="cpu")
    weights_DK = torch.zeros(
        views[0].shape[1], len(task.classes), dtype=torch.float32, requires_grad=True, device="cpu"
    )
    bias_K = torch.zeros(len(task.classes), dtype=torch.float32, requires_grad=True, device="cpu")
    optimizer = torch.optim.Adam(
        [{"params": [mix], "lr": 0.05}, {"params": [weights_DK, bias_K], "lr": 0.003, "weight_decay": 1e-3}]
    )

    def loss_of(places: Tensor) -> Tensor:
        # scaled per batch, because scaled copies of all layers would double the memory
        parts = zip(views, means, scales, strict=True)
        stacked_LND = torch.stack([(view[places] - mean) / scale for view, mean, scale in parts])
        mixed_ND = torch.einsum("l,lnd->nd", mix.softmax(0), stacked_LND)
        return torch.nn.functional.cross_entropy(mixed_ND @ weights_DK + bias_K, labels[places])

    own, dev = torch.from_numpy(np.flatnonzero(train)), torch.from_numpy(np.flatnonzero(task.sides == DEV))
    best, kept, waited = float("inf"), mix.detach().softmax(0), 0
    epochs = max(_EPOCHS, -(-_LEAST_STEPS * _BATCH // len(own)))
    for _ in range(min(epochs, _LEAST_STEPS)):
        for batch in own[torch.randperm(len(own), generator=maker, device="cpu")].split(_BATCH):
            optimizer.zero_grad()
            loss_of(batch).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(loss_of(dev))
        waited += 1
        if loss < best:
            best, kept, waited = loss, mix.detach().softmax(0), 0
        if waited >= epochs // 4:
            break
    shares = kept.double().numpy()
    factors = tuple(float(share / scale) for share, scale in zip(shares, scales, strict=True))
    return Feature("mix", tuple(sites), factors), shares
