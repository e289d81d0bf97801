"""`layerprobe.plot`: small multiples, one panel per layer.

Draws what `analysis` has computed and computes only the layout. Each panel states its distortion, as variance kept and
trustworthiness, and the figure states what was left out.

Must never know of models, hooks or shards.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerprobe.analysis.figures import (
    GREY,
    MARKERS,
    PALETTE,
    check_picture,
    escape_text,
    frame_panels,
    save_figure,
    styled,
)
from layerprobe.analysis.points import Colours, Points, choose_points, colour_points, draw_points, has_field
from layerprobe.analysis.projection import Panel, check_method, project
from layerprobe.analysis.results import shorten, shorten_apart, table_cell, write_csv, write_json
from layerprobe.analysis.sweep import choose_depth
from layerprobe.cores import using_few_cores
from layerprobe.errors import OptionError
from layerprobe.packages import need_package
from layerprobe.store.guard import brief, check_count, check_flag
from layerprobe.store.naming import list_named
from layerprobe.store.reader import Store, take_store
from layerprobe.tables import format_table
from layerprobe.telling import make_bar

__all__ = ["Picture", "plot"]

_MOST_POINTS = {"pca": 10_000, "tsne": 2000, "umap": 10_000}
_PANEL_INCHES = 1.85
_LINE_INCHES = 0.14
# For 7-point type.
_LETTERS_PER_INCH = 17
# Most letters of a legend entry, and most sites listed under a picture.
_MOST_LEGEND_LETTERS = 24
_MOST_LISTED = 5


@dataclass(frozen=True, eq=False)
class Picture:
    """What `layerprobe.plot` drew.

    Args:
        panels: One panel per site: its points, the share of variance they keep, their trustworthiness.
        examples: The ordinal of each point's example.
        positions: The position of each point in its example; None if points are examples.
        color: The quantity or field shown by colour.
        num_all: Number of points in the store.
        method: The projection method.
        figure: The matplotlib figure.
        constant: Sites that were left out because all points are the same there.
    """

    panels: tuple[Panel, ...]
    examples: tuple[int, ...]
    positions: tuple[int, ...] | None
    color: str
    num_all: int
    method: str
    figure: Any
    constant: tuple[str, ...] = ()

    def table(self) -> str:
        """Format the variance kept and the trustworthiness of each panel as a text table."""
        rows = [(panel.site, *(table_cell(value) for value in (panel.variance, panel.trust))) for panel in self.panels]
        drawn = f"{len(self.examples):,} of {self.num_all:,} points, {self.method}, coloured by {self.color}"
        left_out = [f"left out, all points are the same: {', '.join(self.constant)}"] if self.constant else []
        return "\n".join([drawn, *left_out, "", format_table(("site", "variance kept", "trustworthiness"), rows)])

    __str__ = table
    __repr__ = table

    def _repr_png_(self) -> bytes:
        return self.figure._repr_png_()

    def to_csv(self, path: str | Path) -> Path:
        """Write the points as CSV, one row per point and site.

        Raises:
            StoreError: the file cannot be written.
        """
        positions = self.positions if self.positions is not None else (None,) * len(self.examples)
        rows = [
            (panel.site, example, position, x, y)
            for panel in self.panels
            for example, position, (x, y) in zip(self.examples, positions, panel.points.tolist(), strict=True)
        ]
        return write_csv(path, ("site", "example", "position", "x", "y"), rows)

    def to_json(self, path: str | Path) -> Path:
        """Write everything but the figure as one JSON object.

        Raises:
            StoreError: the file cannot be written.
        """
        panels = [
            {"site": panel.site, "variance": panel.variance, "trust": panel.trust, "points": panel.points.tolist()}
            for panel in self.panels
        ]
        said = {
            name: getattr(self, name) for name in ("method", "color", "num_all", "examples", "positions", "constant")
        }
        return write_json(path, {**said, "panels": panels})

    def plot(self, path: str | Path | None = None) -> Any:
        """Return the matplotlib figure, and write it if a path is given.

        Raises:
            OptionError: the suffix is not `.png`, `.svg` or `.pdf`.
        """
        return save_figure(self.figure, path)


def plot(
    store: Store | str | Path,
    path: str | Path | None = None,
    *,
    site: str | Sequence[str] = "layers.*",
    color: str | None = None,
    method: str = "pca",
    points: str | None = None,
    pool: str | None = None,
    shared: bool = False,
    max_points: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Picture:
    """Draw each layer's points in two components, one panel per layer, rotated so that the eye can follow a point.

    Args:
        store: A store, or its path or URL.
        path: A `.png`, `.svg` or `.pdf` file to write; None to return the figure only.
        site: Patterns over the stored sites. A site that is not named is left out if all its points are the same.
        color: `token`, `position` or `norm` of a row, or a field of the input records; None for `label` where the
            records have one, else `norm`.
        method: `pca`; `tsne`, each layer started from the one before; `umap`, if umap-learn is installed.
        points: `rows` or `examples`; None for what the colour belongs to.
        pool: How an example's rows become one vector: `mean` if not given, `max`, `cls` or `last`.
        shared: One PCA basis for all layers instead of one each.
        max_points: Maximum number of points, drawn at random; None for 10,000, or 2,000 for t-SNE. The figure says how
            many were left out.
        seed: Random seed.
        progress: Show progress bars; None: only on a terminal.

    Raises:
        OptionError: an invalid value, a pooled store where rows are needed, points that are all the same at a named
            site, or a package that is not installed.
        SiteError: a pattern matches nothing that is stored.
        InputError: fewer than three points.
        NonFiniteError: a point that is not finite, by name.

    Example:
        >>> import layerprobe as lp
        >>> store = lp.extract("demo", ["The kettle whistled.", "So it goes."], "memory://drawn", sites="layers.-2:")
        >>> picture = lp.plot(store, "layers.svg", color="token")
        >>> [panel.site for panel in picture.panels], len(picture.examples)
        (['layers.4', 'layers.5'], 12)

    Cost: the drawn rows in float64 at every site; trustworthiness compares up to 2,000 points with each other.
    """
    check_flag("shared", shared)
    check_method(method, shared)
    most = _MOST_POINTS[method] if max_points is None else max_points
    check_count("max_points", most, 3)
    seed = check_count("seed", seed, 0)
    if color is not None and not isinstance(color, str):
        raise OptionError(f"color is {brief(repr(color))}: use token, position, norm, or the name of a field.")
    if path is not None:
        check_picture(path)
    need_package("matplotlib", "a picture", "analysis")
    store = take_store(store)
    sites = choose_depth(store, site)
    if color is None:
        color = "label" if has_field(store, "label") else "norm"
    kind = choose_points(store, sites, color, points, pool)
    named = list_named(site, store.sites)
    drawn = draw_points(store, sites, kind, pool=pool, max_points=most, seed=seed, named=named, progress=progress)
    colours = colour_points(store, drawn, color)
    with using_few_cores(), make_bar(len(drawn.values), method, progress, "sites") as bar:
        panels = project(drawn.values, method, shared=shared, seed=seed, done=bar.update)
    figure = _draw_panels(panels, drawn, colours, method, shared)
    examples = tuple(drawn.examples.tolist())
    positions = tuple(drawn.positions.tolist()) if drawn.positions is not None else None
    picture = Picture(tuple(panels), examples, positions, color, drawn.num_all, method, figure, drawn.constant)
    picture.plot(path)
    return picture


def _draw_panels(panels: Sequence[Panel], drawn: Points, colours: Colours, method: str, shared: bool) -> Any:
    # a near-square grid, so that forty layers still fit on a page
    columns = 2 if len(panels) == 4 else min(max(3, math.isqrt(len(panels))), len(panels))
    rows = -(-len(panels) // columns)
    width = max(2, columns) * _PANEL_INCHES
    said = textwrap.fill(_say_what(drawn, method, shared), int(width * _LETTERS_PER_INCH))
    lines = said.count("\n") + (_count_legend_lines(colours, width) if colours.categories is not None else 2)
    with styled() as make_figure:
        size = (width, rows * (_PANEL_INCHES + 0.3) + lines * _LINE_INCHES + 0.5)
        figure = make_figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        frame_panels(grid, len(panels))
        limits = _find_limits(panels) if shared else None
        mappable = None
        for place, (panel, axes) in enumerate(zip(panels, grid.flat, strict=False)):
            mappable = _draw_points(axes, panel.points.numpy(), colours, place)
            axes.set_title(f"{panel.site}\n{_describe(panel)}", fontsize=7.5, linespacing=1.25)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_box_aspect(1)
            low, high = limits if limits is not None else _find_limits([panel])
            axes.set_xlim(low[0], high[0])
            axes.set_ylim(low[1], high[1])
        _add_key(figure, grid, colours, mappable)
        figure.supxlabel(said, fontsize=7, color="#444444")
        return figure


def _draw_points(axes: Any, points: np.ndarray, colours: Colours, place: int) -> Any:
    """Draw one panel; return the mappable for a colour bar if colours are a scale."""
    size = float(np.clip(2500 / len(points), 1.5, 14))
    look = {"s": size, "linewidths": 0, "alpha": 0.75, "rasterized": len(points) > 2000}
    if colours.categories is None:
        numbers = colours.numbers
        assert numbers is not None
        of_panel = numbers[place] if numbers.ndim == 2 else numbers
        is_known = np.isfinite(of_panel)
        # grey points first, so that they hide no others
        if not is_known.all():
            axes.scatter(*points[~is_known].T, color=GREY, marker=".", **look)
        low, high = np.nanpercentile(numbers, [1, 99])
        return axes.scatter(*points[is_known].T, c=of_panel[is_known], cmap="viridis", vmin=low, vmax=high, **look)
    categories = np.asarray(colours.categories, dtype=object)
    is_rest = np.asarray([category is None for category in categories])
    if is_rest.any():
        axes.scatter(*points[is_rest].T, color=GREY, marker=".", **look)
    # the other points on top, in a random order of all categories, so that none hides another
    order = np.random.default_rng(0).permutation(np.flatnonzero(~is_rest))
    signs = [_sign(colours, category) for category in categories[order]]
    style = need_package("matplotlib.markers", "a picture", "analysis").MarkerStyle
    paths = {sign: style(sign).get_path().transformed(style(sign).get_transform()) for sign in MARKERS}
    drawn = axes.scatter(*points[order].T, c=[color for color, _ in signs], **look)
    drawn.set_paths([paths[marker] for _, marker in signs])
    return None


def _sign(colours: Colours, category: str | None) -> tuple[str, str]:
    if category is None:
        return GREY, "."
    place = colours.order.index(category)
    return PALETTE[place], MARKERS[place]


def _describe(panel: Panel) -> str:
    said = []
    if panel.variance is not None:
        said.append(f"{panel.variance:.{0 if panel.variance >= 0.1 else 1}%} of variance")
    if panel.trust is not None:
        said.append(f"trust {panel.trust:.2f}")
    return ", ".join(said)


def _find_limits(panels: Sequence[Panel]) -> tuple[np.ndarray, np.ndarray]:
    """Find a square that contains every point of the panels, with a margin."""
    points = torch.cat([panel.points for panel in panels]).numpy()
    low, high = points.min(0), points.max(0)
    middle, half = (low + high) / 2, max(0.54 * float((high - low).max()), 1e-9)
    return middle - half, middle + half


def _add_key(figure: Any, grid: np.ndarray, colours: Colours, mappable: Any) -> None:
    if mappable is not None:
        assert colours.numbers is not None
        known = colours.numbers[np.isfinite(colours.numbers)]
        # points beyond the scale take the colour of its nearer end, which the bar shows by arrows
        beyond = (known.min() < mappable.norm.vmin, known.max() > mappable.norm.vmax)
        extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither")
        bar = figure.colorbar(mappable, ax=grid, location="bottom", shrink=0.5, aspect=40, pad=0.02, extend=extend)
        name = escape_text(shorten(colours.name, int(figure.get_figwidth() * (_LETTERS_PER_INCH - 5)) - 20))
        bar.set_label(name if np.isfinite(colours.numbers).all() else f"{name} (grey: none)")
        bar.outline.set_visible(False)
        bar.solids.set_alpha(1)
        return
    lines = need_package("matplotlib.lines", "a picture", "analysis")
    handles = []
    for category, label in zip(colours.order, _label_categories(colours), strict=True):
        color, marker = _sign(colours, category)
        look = {"color": color, "marker": marker, "linestyle": "", "markersize": 4.5}
        handles.append(lines.Line2D([], [], label=escape_text(label), **look))
    width = figure.get_figwidth()
    figure.legend(
        handles=handles,
        title=escape_text(shorten(colours.name, int(width * (_LETTERS_PER_INCH - 5)))),
        loc="outside upper center",
        ncols=_count_legend_columns(colours, width),
        handletextpad=0.1,
    )


def _label_categories(colours: Colours) -> list[str]:
    rest = "the rest" if "other" in colours.order else "other"
    return shorten_apart([rest if one is None else one for one in colours.order], _MOST_LEGEND_LETTERS)


def _count_legend_columns(colours: Colours, width: float) -> int:
    longest = max(map(len, _label_categories(colours)))
    return int(np.clip(width * _LETTERS_PER_INCH / (longest + 6), 1, 4))


def _count_legend_lines(colours: Colours, width: float) -> int:
    """Count the lines of a legend, its title included."""
    return 1 + math.ceil(len(colours.order) / _count_legend_columns(colours, width))


def _say_what(drawn: Points, method: str, shared: bool) -> str:
    points = f"{len(drawn):,} {drawn.kind}"
    if len(drawn) < drawn.num_all:
        points += f" drawn at random of {drawn.num_all:,}"
    how = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}[method]
    started = "" if method == "pca" else "started from and "
    turned = "one basis for all layers" if shared else f"each layer {started}turned onto the one before"
    few, num = ", ".join(drawn.constant[:_MOST_LISTED]), len(drawn.constant)
    more = f", ... ({num} sites)" if num > _MOST_LISTED else ""
    left_out = f"; left out, all points the same: {few}{more}" if drawn.constant else ""
    return f"{points}; {how}; {turned}{left_out}"
