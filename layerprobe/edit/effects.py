"""What a sweep of patches found: the table of effects, as numbers, text, CSV, JSON and a picture.

Must never know of models or of how the effects were measured.

Letters: L sites, P positions, H heads.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerprobe.analysis.figures import check_picture, save_figure, styled
from layerprobe.analysis.results import give_csv, give_json
from layerprobe.errors import OptionError
from layerprobe.tables import format_table

__all__ = ["Effects"]


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
        # what is rounded to nothing has no sign
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
        labels = self._row_labels()
        figure = make_figure(
            figsize=(2.6 + max(3.0, 0.46 * grid.shape[1]), 1.8 + max(1.6, 0.3 * grid.shape[0])), layout="constrained"
        )
        axes = figure.subplots()
        most = float(grid.abs().max()) or 1.0
        # the middle of the colours is no effect
        image = axes.imshow(grid.numpy(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto", origin="lower")
        axes.set_yticks(range(len(labels)), labels)
        is_long = max(map(len, columns)) > 3
        axes.set_xticks(
            range(len(columns)), columns, rotation=45 if is_long else 0, ha="right" if is_long else "center",
            rotation_mode="anchor" if is_long else "default", parse_math=False,
        )  # fmt: skip
        axes.set_xlabel("head" if self.heads is not None and self.positions is None else "position")
        axes.set_title(
            f"Patching clean into corrupt ({self.method})\nclean {self.clean:.3g}, corrupt {self.corrupt:.3g}"
        )
        figure.colorbar(image, ax=axes, label="change of the metric", fraction=0.04, pad=0.02)
        return figure

    def _grid(self) -> tuple[Tensor, list[str]]:
        """Give the effects as rows and columns, and what stands above the columns."""
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

    def _row_labels(self) -> list[str]:
        if self.positions is None or self.heads is None:
            return list(self.sites)
        return [f"{site} head {head}" for site in self.sites for head in self.heads]

    def _rows(self) -> tuple[list[str], list[list[Any]]]:
        grid, columns = self._grid()
        rows = [[label, *row] for label, row in zip(self._row_labels(), grid.to(torch.float64).tolist(), strict=True)]
        prefix = "head " if self.heads is not None and self.positions is None else ""
        return ["site", *(prefix + column for column in columns)], rows
