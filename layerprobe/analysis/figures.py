"""How every picture of the library is made: style, palette, files, heat maps, curves over depth.

Figures are made without pyplot, so the caller's matplotlib state is not touched and no figure has to be closed. The
palette is safe for colour-blind readers; equal numbers give byte-identical files.

matplotlib is imported in the functions that draw. Must never know of stores.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from layerprobe.analysis.results import shorten
from layerprobe.errors import OptionError, telling_refusals
from layerprobe.packages import need_package
from layerprobe.store.format import need_parent
from layerprobe.store.guard import need_path
from layerprobe.tables import format_count
from layerprobe.telling import say

__all__ = [
    "GREY",
    "MARKERS",
    "PALETTE",
    "Curve",
    "check_picture",
    "cut_names",
    "draw_curves",
    "draw_depth",
    "escape_text",
    "frame_panels",
    "label_sites",
    "mark_sites",
    "save_figure",
    "styled",
]

# Okabe and Ito 2008, Color Universal Design, without yellow, which is hardly visible on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
GREY = "#BBBBBB"
# A marker beside each colour, so that they can be distinguished in black-and-white print.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SUFFIXES = (".png", ".svg", ".pdf")
_LAYER = re.compile(r"layers\.(\d+)\Z")
# Beyond this many sites, numbers in the cells of a heat map would be too small to read.
_MOST_NUMBERED = 14
# Longest site name along an axis; on an x axis, names longer than the second number are slanted.
_MOST_LETTERS, _MOST_FLAT = 27, 4
# Each curve is drawn over those before it, which show through its gaps.
_DASHES = ("-", (0, (4, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
# Above this value a cell is so dark that its number is drawn in white.
_DARK = 0.53
# Fallbacks for characters that matplotlib's own font lacks. Colour fonts, as most emoji fonts are, cannot be drawn.
_FONT = "DejaVu Sans"
_MORE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei",
    "SimHei", "Yu Gothic", "Malgun Gothic", "Noto Sans", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai",
    "Arial Unicode MS", "Segoe UI", "Noto Emoji", "Segoe UI Emoji", "Segoe UI Symbol", "Symbola", "Unifont",
)  # fmt: skip
_MISSING = re.compile(r"Glyph (\d+) .*missing from")
_MOST_MISSING = 20
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "svg.hashsalt": "layerprobe",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Curve:
    """A line over depth: its name, its sites, and their values; None leaves a gap."""

    name: str
    sites: Sequence[str]
    values: Sequence[float | None]


@contextmanager
def styled() -> Iterator[Any]:
    """Apply the library's style within a context; yields the class `Figure`.

    Raises:
        OptionError: matplotlib is not installed.
    """
    matplotlib = need_package("matplotlib", "a picture", "analysis")
    figure = need_package("matplotlib.figure", "a picture", "analysis")
    manager = need_package("matplotlib.font_manager", "a picture", "analysis")
    installed = {font.name for font in manager.fontManager.ttflist}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams["font.family"] = [_FONT, *(name for name in _MORE_FONTS if name in installed)]
        yield figure.Figure


def check_picture(path: str | Path) -> Path:
    """Check, before anything is computed, that a picture can be drawn and written to a path.

    Raises:
        OptionError: its suffix is not a picture format, it would lie in a store, or matplotlib is not installed.
        StoreError: its folder does not exist.
    """
    path = need_path("path", path)
    if path.suffix.lower() not in _SUFFIXES:
        raise OptionError(f"no picture {str(path)!r}: {path.suffix or 'no suffix'!r} is not {', '.join(_SUFFIXES)}.")
    need_package("matplotlib", "a picture", "analysis")
    return need_parent(path)


def save_figure(figure: Any, path: str | Path | None) -> Any:
    """Write a figure in the format of the suffix, without date or program version, and return it.

    The figure gets a `_repr_png_`, without which a notebook would not show a figure made without pyplot.
    Characters that no font has, and that are drawn as boxes, are reported in one line.

    Raises:
        StoreError: the file cannot be written.
    """
    figure._repr_png_ = partial(_draw_png, figure)
    if path is None:
        return figure
    path = check_picture(path)
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {"Software": None}}
    telling = telling_refusals(path, "written", "Choose another path.")
    # the style also has settings for saving
    with telling, styled(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        figure.savefig(path, dpi=200, metadata=undated[path.suffix.lower()])
    _tell_missing(path, warned)
    return figure


def _draw_png(figure: Any) -> bytes:
    """Render a figure as PNG bytes for a notebook."""
    drawn = BytesIO()
    with styled():
        figure.savefig(drawn, format="png")
    return drawn.getvalue()


def _tell_missing(path: Path, warned: Sequence[warnings.WarningMessage]) -> None:
    """Report all missing characters in one message, and pass on matplotlib's other warnings."""
    codes = []
    for one in warned:
        missing = _MISSING.match(str(one.message))
        if missing is None:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        else:
            codes.append(int(missing[1]))
    # an SVG viewer uses its own fonts
    if codes and path.suffix.lower() != ".svg":
        letters = [chr(code) for code in sorted(set(codes))]
        more = ", ..." if len(letters) > _MOST_MISSING else ""
        say(
            f"{path}: no installed font has {format_count(len(letters), 'letter')} of it, drawn as boxes: "
            f"{' '.join(letters[:_MOST_MISSING])}{more}. Install one, such as Noto Sans CJK, or write a .svg."
        )


def escape_text(text: str) -> str:
    """Escape a label so that matplotlib neither parses `$` as mathematics nor hides a label that starts with `_`."""
    text = text.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text or "(empty)"


def label_sites(names: Sequence[str]) -> list[str]:
    """Shorten sites for an axis: `layers.3` to `3`, `embeddings` to `emb`, long names by their common prefix."""
    short = []
    for name in names:
        layer = _LAYER.match(name)
        short.append(layer.group(1) if layer else "emb" if name == "embeddings" else name)
    return cut_names(short)


def cut_names(names: Sequence[str]) -> list[str]:
    """Shorten long names for an axis: drop their common prefix, then truncate what is still too long."""
    split = [name.split(".") for name in names if len(name) > _MOST_LETTERS]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*(parts[:-1] for parts in split), strict=False))
    shared = len(list(same))
    dots = "..." if shared else ""
    return [
        name if len(name) <= _MOST_LETTERS else shorten(dots + ".".join(name.split(".")[shared:]), _MOST_LETTERS)
        for name in names
    ]


def mark_sites(figure: Any, names: Sequence[str], *axes: Any, kept: int = 0) -> None:
    """Label the ticks of axes with sites; where labels would overlap, label only every second, third, ... site.

    Call it after everything else is drawn, because that determines the space for labels.

    Args:
        figure: The figure.
        names: The sites.
        axes: Such as `axes.xaxis`.
        kept: Number of sites at the end that are always labelled.
    """
    labels = label_sites(names)
    slanted = {"rotation": 60, "horizontalalignment": "right", "rotation_mode": "anchor"}
    looks = [slanted if axis.axis_name == "x" and max(map(len, labels)) > _MOST_FLAT else {} for axis in axes]
    for axis, look in zip(axes, looks, strict=True):
        axis.set_ticks(axis.get_ticklocs(), labels, **look)
    figure.draw_without_rendering()
    for axis, look in zip(axes, looks, strict=True):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        height = min(box.height for box in boxes) if not look else figure.dpi * axis.get_ticklabels()[0].get_size() / 72
        if look:  # a slanted label is anchored at its right end; next to others it takes about one line height
            spans = [(box.x1 - 1.2 * height, box.x1) for box in boxes]
        else:
            spans = [box.intervalx if axis.axis_name == "x" else box.intervaly for box in boxes]
        gap = 0.4 * height if axis.axis_name == "x" and not look else 0.0
        choices = _thin(len(names), kept)
        # too many that are always labelled are thinned like the others
        choices = chain(choices, _thin(len(names), 0)) if kept else choices
        shown = next(shown for shown in choices if _are_apart([spans[one] for one in shown], gap))
        axis.set_ticks([axis.get_ticklocs()[one] for one in shown], [labels[one] for one in shown], **look)


def _slanted_inches(names: Sequence[str]) -> float:
    """Estimate the extra height that slanted names need, in inches."""
    longest = max(map(len, label_sites(names)))
    return 0.05 * longest if longest > _MOST_FLAT else 0.0


def _thin(count: int, kept: int) -> Iterator[list[int]]:
    """Yield all places, every second, every third, ..., each with the last `kept`; finally those alone."""
    for step in range(1, count - kept + 1):
        yield [*range(0, count - kept, step), *range(count - kept, count)]
    yield [*range(count - kept, count)]


def _are_apart(spans: Sequence[Any], gap: float) -> bool:
    return all(after[0] - before[1] >= gap for before, after in pairwise(spans))


def frame_panels(grid: np.ndarray, num_panels: int) -> None:
    """Frame each panel, and hide the unused axes of the last row."""
    for place, axes in enumerate(grid.flat):
        if place < num_panels:
            axes.spines[:].set(visible=True, color="#CCCCCC")
        else:
            axes.axis("off")


def draw_depth(
    names: Sequence[str],
    cka: Sequence[Sequence[float]],
    curves: Sequence[Curve],
    rank: Curve,
    path: str | Path | None,
) -> Any:
    """Draw a heat map of every site against every other, and curves over depth beside it and below."""
    if path is not None:
        check_picture(path)
    with styled() as make_figure:
        figure = make_figure(figsize=(5.5, 5.2 + 2 * _slanted_inches(names)), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.3, 1), height_ratios=(1.15, 1))
        heat = figure.add_subplot(grid[0, 0])
        _draw_heat(figure, heat, names, cka)
        beside = figure.add_subplot(grid[0, 1])
        _draw_lines(beside, names, [rank])
        beside.set_title("effective rank")
        beside.set_ylim(bottom=0, top=1.08 * max([1.0, *(value for value in rank.values if value is not None)]))
        below = figure.add_subplot(grid[1, :])
        _draw_lines(below, names, curves)
        figure.legend(handles=below.get_legend_handles_labels()[0], loc="outside lower center", ncols=2)
        mark_sites(figure, names, heat.xaxis, heat.yaxis, beside.xaxis, below.xaxis)
        return save_figure(figure, path)


def draw_curves(names: Sequence[str], curves: Sequence[Curve], title: str, path: str | Path | None) -> Any:
    """Draw curves over depth."""
    if path is not None:
        check_picture(path)
    with styled() as make_figure:
        figure = make_figure(figsize=(4.6, 2.4 + _slanted_inches(names)), layout="constrained")
        axes = figure.add_subplot()
        _draw_lines(axes, names, curves)
        axes.set_title(title)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        mark_sites(figure, names, axes.xaxis)
        return save_figure(figure, path)


def _draw_lines(axes: Any, names: Sequence[str], curves: Sequence[Curve]) -> None:
    places = {name: place for place, name in enumerate(names)}
    for number, curve in enumerate(curves):
        values = [np.nan if value is None else value for value in curve.values]
        axes.plot(
            [places[site] for site in curve.sites],
            values,
            color=PALETTE[number % len(PALETTE)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=_DASHES[number % len(_DASHES)],
            label=curve.name,
        )
    axes.set_xticks(range(len(names)))
    axes.set_xlabel("layer")
    axes.grid(axis="y", linewidth=0.3, color="#DDDDDD")
    axes.set_axisbelow(True)


def _draw_heat(figure: Any, axes: Any, names: Sequence[str], cka: Sequence[Sequence[float]]) -> None:
    values = np.asarray(cka, dtype=float)
    image = axes.imshow(values, vmin=0, vmax=1, cmap="cividis_r", origin="lower")
    if len(names) <= _MOST_NUMBERED:
        for row, column in np.ndindex(values.shape):
            if np.isfinite(values[row, column]):
                text = f"{values[row, column]:.2f}".removeprefix("0").removesuffix(".00")
                shade = "white" if values[row, column] > _DARK else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=6, color=shade)
    else:
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.outline.set_visible(False)
    axes.set_xticks(range(len(names)))
    axes.set_yticks(range(len(names)))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("linear CKA, layer by layer")
