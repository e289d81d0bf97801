"""`layerprobe.plot_attention`: an example's attention weights as small multiples, one panel per head.

Draws what is stored and computes only the layout.

Must never know of models, hooks or shards.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerprobe.analysis.figures import check_picture, escape_text, frame_panels, save_figure, styled
from layerprobe.analysis.results import shorten
from layerprobe.errors import OptionError, SiteError
from layerprobe.store.guard import need_wholes
from layerprobe.store.naming import match_sites
from layerprobe.store.reader import Store, take_store

__all__ = ["plot_attention"]

_MOST_HEADS_IN_A_ROW = 4
# Most token labels that stay readable along the edge of an attention map, and most letters of each.
_MOST_TOKENS = 40
_MOST_LETTERS = 10
# For the 8-point type of the title.
_LETTERS_PER_INCH = 14


def plot_attention(
    store: Store | str | Path,
    example: int,
    path: str | Path | None = None,
    *,
    site: str | None = None,
    heads: Sequence[int] | None = None,
) -> Any:
    """Draw an example's attention weights, one panel per head: rows attend, columns are attended to.

    Args:
        store: A store that holds attention weights, or its path or URL.
        example: Ordinal of the example; negative numbers count from the end.
        path: A `.png`, `.svg` or `.pdf` file to write; None to return the figure only.
        site: A site with weights, or a pattern that selects one; None for the first that is stored.
        heads: Heads to draw; None for all.

    Returns:
        The matplotlib figure.

    Raises:
        SiteError: no such weights are stored, or the pattern selects several.
        OptionError: the site holds none, a head that does not exist, or matplotlib is not installed.
        MissingExample: the example is not in the store.

    Example:
        >>> import layerprobe as lp
        >>> store = lp.extract("demo", ["So it goes."], "memory://maps", sites="layers.0.attention.weights")
        >>> figure = lp.plot_attention(store, 0, "heads.svg", heads=[0, 1])
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['head 0', 'head 1']
    """
    if path is not None:
        check_picture(path)
    store = take_store(store)
    site = _find_weights(store, site)
    example = store.catalog.find(example)[1]
    weights = store[site][example].float()
    chosen = range(len(weights)) if heads is None else need_wholes("heads", heads)
    if any(head not in range(len(weights)) for head in chosen):
        raise OptionError(f"heads={list(chosen)}: {site!r} has heads 0 to {len(weights) - 1}.")
    ids = store.input_ids(example)
    tokens = store.id_to_tokens(ids) if store.id_to_tokens is not None else [str(one) for one in ids.tolist()]
    columns = min(_MOST_HEADS_IN_A_ROW, len(chosen))
    rows = -(-len(chosen) // columns)
    # label every token if the labels stay readable, else only every second, third, ...
    inches = float(np.clip(0.115 * len(tokens), 1.3, 3.2))
    step = max(1, -(-len(tokens) // min(_MOST_TOKENS, int(inches / 0.095))))
    marks = [escape_text(shorten(token, _MOST_LETTERS)) for token in tokens][::step]
    with styled() as make_figure:
        figure = make_figure(figsize=(columns * inches + 1.1, rows * (inches + 0.25) + 1.0), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        frame_panels(grid, len(chosen))
        top = float(weights[list(chosen)].max())
        image = None
        for place, (head, axes) in enumerate(zip(chosen, grid.flat, strict=False)):
            image = axes.imshow(weights[head].numpy(), vmin=0, vmax=top, cmap="Blues")
            axes.set_title(f"head {head}")
            axes.set_xticks(range(0, len(tokens), step), marks, rotation=90, fontsize=6)
            axes.set_yticks(range(0, len(tokens), step), marks, fontsize=6)
            axes.tick_params(length=0, labelbottom=place + columns >= len(chosen))
        bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 1.6 / rows), aspect=25, label="weight")
        bar.outline.set_visible(False)
        said = f"{site}, example {example}: rows attend to columns"
        said += f"; one token in {step} is named" if step > 1 else ""
        figure.suptitle(textwrap.fill(said, int(figure.get_figwidth() * _LETTERS_PER_INCH)), fontsize=8)
        return save_figure(figure, path)


def _find_weights(store: Store, site: str | None) -> str:
    stored = [name for name in store.sites if store[name].kind == "attention"]
    if not stored:
        raise SiteError(
            f"no attention weights in {store.place}: it holds {', '.join(store.sites)}. "
            "Extract with sites='layers.*.attention.weights' (--sites)."
        )
    if site is None:
        return stored[0]
    found = match_sites(site, store.sites, str(store.place))
    meant = [name for name in found if name in stored]
    if not meant:
        raise OptionError(f"{site!r} holds no attention weights, which are at {', '.join(stored)}.")
    if len(found) > 1:
        raise SiteError(f"{site!r} means {len(found)} sites: {', '.join(found)}. One picture holds one: name it.")
    return meant[0]
