"""The results of a patching sweep, as a table, CSV, JSON and a heat map.

Must never know of models or of how the effects were measured.

Letters: L sites, P positions, H heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerprobe.analysis.figures import GREY, check_picture, cut_names, save_figure, styled
from layerprobe.analysis.results import give_csv, give_json, shorten
from layerprobe.errors import OptionError
from layerprobe.tables import format_table

__all__ = ["Effects"]


# Maximum size of the figure, the space for a line and for a letter of its labels, and the longest column label.
_MOST_INCHES = 12.0
_LINE_INCHES = 0.14
_LETTER_INCHES = 0.07
_MOST_LETTERS = 24


@dataclass(frozen=True, eq=False)
class Effects:
    """The effect of each patch on the metric.

    Args:
        sites: Names of the L sites.
        positions: The P positions that were patched one by one; None if all were patched at once.
        heads: The H heads that were patched one by one; None if all were patched at once.
        effects: float64 `[L]`, `[L, P]`, `[L, H]` or `[L, P, H]`: the metric with the patch minus that of the corrupt
            text.
        clean, corrupt: The metric of each text alone.
        method: `exact` or `attribution`.
        tokens: The token at each position, of both texts where they differ; None if unknown.
    """

    sites: tuple[str, ...]
    positions: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    effects: Tensor
    clean: float
    corrupt: float
    method: str
    tokens: tuple[str, ...] | None = None

    @property
    def normalised(self) -> Tensor:
        """The share of the way from corrupt to clean that each patch restores: 1.0 for the clean metric.

        Raises:
            OptionError: both texts have the same metric.
        """
        if self.clean == self.corrupt:
            raise OptionError(f"effects as shares: clean and corrupt both give {self.clean:.6g}. Use effects.")
        return self.effects / (self.clean - self.corrupt)

    def table(self, digits: int = 3) -> str:
        """Return the effects as a text table: a row per site (and head), a column per position.

        Args:
            digits: Decimals; more if the largest effect would have fewer significant digits.
        """
        headers, rows = self._rows()
        most = float(self.effects.abs().nan_to_num(0.0, posinf=0.0).amax()) if self.effects.numel() else 0.0
        decimals = digits - min(0, math.floor(math.log10(most)) + 1) if most else digits
        # + 0.0 turns -0.0 into 0.0
        rounded = [[round(cell, decimals) + 0.0 if isinstance(cell, float) else cell for cell in row] for row in rows]
        end = f"metric: clean {self.clean:.4g}, corrupt {self.corrupt:.4g}; effects by {self.method} patching"
        return f"{format_table(headers, rounded)}\n{end}"

    __str__ = table
    __repr__ = table

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return the table as CSV in full precision, and write it to a path if given.

        Raises:
            StoreError: the file cannot be written.
        """
        return give_csv(*self._rows(), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return everything as JSON, and write it to a path if given.

        Raises:
            StoreError: the file cannot be written.
        """
        document = {
            "method": self.method,
            "clean": self.clean,
            "corrupt": self.corrupt,
            "sites": self.sites,
            "positions": self.positions,
            "heads": self.heads,
            "tokens": self.tokens,
            "effects": self.effects.tolist(),
        }
        return give_json(document, path)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the effects as a heat map, the first site at the bottom, as the model runs them.

        Args:
            path: Picture to write; its suffix selects the format.

        Returns:
            The matplotlib figure.

        Raises:
            OptionError: matplotlib is not installed, or the suffix is not a picture format.
            StoreError: the file cannot be written.
        """
        if path is not None:
            check_picture(path)
        with styled() as make_figure:
            return save_figure(self._draw(make_figure), path)

    def _draw(self, make_figure: Any) -> Any:
        grid, columns = self._grid()
        labels = self._row_labels(cut_names(self.sites))
        columns = [shorten(column, _MOST_LETTERS) for column in columns]
        high = min(max(1.6, 0.3 * len(labels)), _MOST_INCHES)
        wide = min(max(3.0, 0.46 * len(columns)), _MOST_INCHES)
        figure = make_figure(figsize=(2.6 + wide, 1.8 + high), layout="constrained")
        axes = figure.subplots()
        most = float(grid.abs().nan_to_num(0.0, posinf=0.0).max()) or 1.0
        # white is no effect, grey is not a number
        image = axes.imshow(grid.numpy(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto", origin="lower")
        axes.set_facecolor(GREY)
        # label only every n-th row and column if there is no room for all
        step = math.ceil(len(labels) * _LINE_INCHES / high)
        axes.set_yticks(range(0, len(labels), step), labels[::step])
        step = math.ceil(len(columns) * _LINE_INCHES / wide)
        is_long = max(map(len, columns)) > min(3, step * wide / len(columns) / _LETTER_INCHES)
        axes.set_xticks(
            range(0, len(columns), step), columns[::step], rotation=45 if is_long else 0,
            ha="right" if is_long else "center", rotation_mode="anchor" if is_long else "default", parse_math=False,
        )  # fmt: skip
        what = "head" if self.heads is not None and self.positions is None else "position"
        axes.set_xlabel(f"{what}, one in {step} is named" if step > 1 else what)
        axes.set_title(
            f"Patching clean into corrupt ({self.method})\nclean {self.clean:.3g}, corrupt {self.corrupt:.3g}"
        )
        figure.colorbar(image, ax=axes, label="change of the metric", fraction=0.04, pad=0.02)
        return figure

    def _grid(self) -> tuple[Tensor, list[str]]:
        """Return the effects as a 2-D grid and the column labels."""
        values = self.effects
        if self.positions is not None and self.heads is not None:
            return values.transpose(1, 2).flatten(0, 1), self._column_labels()
        if values.ndim == 1:
            return values[:, None], ["all"]
        return values, self._column_labels() if self.positions is not None else [str(head) for head in self.heads or ()]

    def _column_labels(self) -> list[str]:
        if self.tokens is not None:
            return list(self.tokens)
        return [str(position) for position in self.positions or ()]

    def _row_labels(self, sites: Sequence[str]) -> list[str]:
        if self.positions is None or self.heads is None:
            return list(sites)
        return [f"{site} head {head}" for site in sites for head in self.heads]

    def _rows(self) -> tuple[list[str], list[list[Any]]]:
        grid, columns = self._grid()
        rows = [
            [label, *row]
            for label, row in zip(self._row_labels(self.sites), grid.to(torch.float64).tolist(), strict=True)
        ]
        prefix = "head " if self.heads is not None and self.positions is None else ""
        return ["site", *(prefix + column for column in columns)], rows
