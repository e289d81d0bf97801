"""Project vectors to two components layer by layer, aligned so that the eye can follow a point.

PCA, t-SNE or UMAP; each layer after the first is rotated and reflected onto the one before, which changes no distance
in the picture. The distortion of a picture is measured too: the share of variance kept, and trustworthiness.

Letters: n points, D width. Must never know of stores or figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layerprobe.analysis.geometry import turn_onto
from layerprobe.errors import OptionError
from layerprobe.packages import need_package

__all__ = ["Panel", "check_method", "project"]

_METHODS = ("pca", "tsne", "umap")
_NEIGHBOURS = 10
# Trustworthiness compares all pairs, so it uses a random sample of at most this many points.
_MOST_TRUSTED = 2000
# Input components of t-SNE and UMAP; more change little and cost much (van der Maaten and Hinton 2008, section 4.2).
_TSNE_WIDTH = 50
# Standard deviation of t-SNE's initial layout: small, so that the layout can form (as scikit-learn's for PCA).
_TSNE_START = 1e-4
_PERPLEXITY = 30.0


@dataclass(frozen=True, eq=False)
class Panel:
    """One layer in two components.

    Args:
        site: The site.
        points: float64 `[n, 2]`, centred, with a mean squared length of 1.
        variance: Share of the variance in the plane; None for t-SNE and UMAP.
        trust: Trustworthiness at k = 10: 1 if no neighbour in the picture is far away in the full space; None for fewer
            than 22 points. Measured on a sample of 2,000 points if there are more.
    """

    site: str
    points: Tensor
    variance: float | None
    trust: float | None


def project(
    values: dict[str, Tensor], method: str, *, shared: bool, seed: int, done: Callable[[], object] = lambda: None
) -> list[Panel]:
    """Project each site's points to two components.

    Args:
        values: float64 `[n, D]` of each site, the same points at each.
        method: `pca`, `tsne` or `umap`; the last two start each layer from the one before.
        shared: Use one PCA basis for all sites, each centred on its own mean, without rotation.
        seed: Seed of t-SNE, UMAP and the draw for trustworthiness.
        done: Called after each site.

    Raises:
        OptionError: a method that is unknown or not installed, or a shared basis for sites of different widths.

    Source: trustworthiness: Venna and Kaski 2001, Neighborhood Preservation in Nonlinear Projection Methods, eq. 2.
    """
    check_method(method, shared)
    basis = _share_basis(values) if shared else None
    panels: list[Panel] = []
    for name, rows in values.items():
        centred = rows - rows.mean(0)
        before = panels[-1].points if panels else None
        variance = None
        if method == "pca":
            axes = basis if basis is not None else _find_axes(centred, 2)
            points = centred @ axes
            variance = float((centred @ axes).square().sum() / centred.square().sum())
        else:
            points = _embed(centred, method, before, seed)
        if not shared:
            points = _size(points)
            points = points if before is None else turn_onto(points, before)
        panels.append(Panel(name, points, variance, _trust(centred, points, seed)))
        done()
    if shared:
        # one scale for all sites, so that their sizes can be compared
        scale = torch.cat([panel.points for panel in panels]).square().sum(1).mean().sqrt()
        panels = [Panel(panel.site, panel.points / scale, panel.variance, panel.trust) for panel in panels]
    return panels


def check_method(method: str, shared: bool) -> None:
    """Check, before any points are read, that a method can be used.

    Raises:
        OptionError: the method is unknown, has no basis to share, or needs a package that is not installed.
    """
    if method not in _METHODS:
        raise OptionError(f"method={method!r}: use {', '.join(_METHODS)}.")
    if shared and method != "pca":
        raise OptionError(f"shared=True with method={method!r}: only PCA has a basis to share.")
    # needed for trustworthiness, which is measured for every method
    need_package("sklearn", f"method={method!r}", "analysis")
    if method == "umap":
        need_package("umap", "method='umap'", None)


def _find_axes(centred_nD: Tensor, count: int) -> Tensor:
    """Find the principal axes, `[D, count]`, each with its largest entry positive."""
    if centred_nD.shape[1] < count:
        raise OptionError(f"{count} components of vectors {centred_nD.shape[1]} wide: there are not as many.")
    _, axes = torch.linalg.eigh(centred_nD.T @ centred_nD)
    axes = axes[:, -count:].flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * largest.sign()


def _share_basis(values: dict[str, Tensor]) -> Tensor:
    widths = {rows.shape[1] for rows in values.values()}
    if len(widths) > 1:
        raise OptionError(f"shared=True: the sites are {sorted(widths)} wide, and a basis has one width.")
    # each centred on its own mean, otherwise the shift between layers would dominate both axes
    return _find_axes(torch.cat([rows - rows.mean(0) for rows in values.values()]), 2)


def _size(points_n2: Tensor) -> Tensor:
    """Centre points and give them a mean squared length of 1."""
    centred = points_n2 - points_n2.mean(0)
    return centred / centred.square().sum(1).mean().sqrt()


def _embed(centred_nD: Tensor, method: str, before: Tensor | None, seed: int) -> Tensor:
    width = min(_TSNE_WIDTH, *centred_nD.shape)
    rows = (centred_nD @ _find_axes(centred_nD, width)).numpy()
    start = rows[:, :2] if before is None else before.numpy()
    if method == "tsne":
        manifold = need_package("sklearn.manifold", "method='tsne'", "analysis")
        embedder = manifold.TSNE(
            perplexity=min(_PERPLEXITY, (len(rows) - 1) / 3),
            init=(start / start.std() * _TSNE_START).astype(np.float32),
            learning_rate="auto",
            random_state=seed,
        )
        return torch.from_numpy(embedder.fit_transform(rows.astype(np.float32))).double()
    umap = need_package("umap", "method='umap'", None)
    embedder = umap.UMAP(
        n_neighbors=min(15, len(rows) - 1),
        init=(10 * start / np.abs(start).max()).astype(np.float32),
        random_state=seed,
        # a seed needs one job; umap-learn warns about any other number
        n_jobs=1,
    )
    return torch.from_numpy(embedder.fit_transform(rows)).double()


def _trust(rows_nD: Tensor, points_n2: Tensor, seed: int) -> float | None:
    # trustworthiness is defined only for k below half of the points
    if len(rows_nD) < 2 * (_NEIGHBOURS + 1):
        return None
    manifold = need_package("sklearn.manifold", "trustworthiness", "analysis")
    drawn: Sequence[int] | slice = slice(None)
    if len(rows_nD) > _MOST_TRUSTED:
        drawn = np.sort(np.random.default_rng(seed).permutation(len(rows_nD))[:_MOST_TRUSTED]).tolist()
    return float(manifold.trustworthiness(rows_nD[drawn].numpy(), points_n2[drawn].numpy(), n_neighbors=_NEIGHBOURS))
