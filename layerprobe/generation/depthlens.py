"""The result of a lens: how close each layer is to the true token, as table, CSV, JSON and curve.

Includes the readings of some single tokens. Must never know of models or stores.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprobe.analysis.figures import Curve, draw_curves
from layerprobe.analysis.results import lay_out, shorten, write_csv, write_json
from layerprobe.tables import format_count, format_table

__all__ = ["Lens", "LensReading", "LensSite"]

_HEADERS = ("site", "top1", "top10", "median_rank", "reciprocal_rank", "probability", "loss", "unmapped_top1")


@dataclass(frozen=True)
class LensSite:
    """How close the states of one site are to the true token.

    Args:
        site: The site.
        top1, top10: Share of tokens that are the first guess, or among the first ten.
        median_rank: Median rank of the true token; 1 is the first guess.
        reciprocal_rank: Mean of 1 / rank.
        probability: Mean probability of the true token; None for the embedding lens, whose scores are cosines.
        loss: Mean negative log probability of the true token, in nats; None for the embedding lens.
        unmapped_top1: For the embedding lens, top1 without the map; None if the width is not that of the word
            embeddings, and for the logit lens.
    """

    site: str
    top1: float
    top10: float
    median_rank: float
    reciprocal_rank: float
    probability: float | None
    loss: float | None
    unmapped_top1: float | None


@dataclass(frozen=True)
class LensReading:
    """The reading of one token at every site.

    Args:
        example, position: Its example and position.
        token: The token, before any masking.
        guesses: The first guess at each site.
        ranks: The rank of the true token at each site.
    """

    example: int
    position: int
    token: str
    guesses: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Lens:
    """What `layerprobe.lens` found.

    Args:
        method: `logit` through the model's own head, `embedding` through a map to word embeddings.
        mask: Share of the tokens that were masked; 0 if every token was visible.
        num_tokens: Number of tokens evaluated.
        sites: The scores of each site, in the order in which the model runs them.
        readings: The readings of the first tokens.
    """

    method: str
    mask: float
    num_tokens: int
    sites: tuple[LensSite, ...]
    readings: tuple[LensReading, ...]

    def table(self) -> str:
        """Format the sites as a text table."""
        used = [name for name in _HEADERS if any(getattr(site, name) is not None for site in self.sites)]
        seen = f"{self.mask:.0%} of the tokens masked, those judged" if self.mask else "every token there to be seen"
        end = f"{self.method} lens, {format_count(self.num_tokens, 'token')}, {seen}"
        return f"{lay_out(self.sites, used)}\n{end}"

    __str__ = table
    __repr__ = table

    def grid(self) -> str:
        """Format some tokens as a text table: the first guess at each site, and the rank of the true token."""
        rows = [
            (one.example, one.position, shorten(one.token, 20),
             *(f"{shorten(guess, 16)} {rank}" for guess, rank in zip(one.guesses, one.ranks, strict=True)))
            for one in self.readings
        ]  # fmt: skip
        return format_table(("example", "", "token", *(site.site for site in self.sites)), rows)

    def to_csv(self, path: str | Path) -> Path:
        """Write the sites as CSV, one row each."""
        return write_csv(path, _HEADERS, [[getattr(site, name) for name in _HEADERS] for site in self.sites])

    def to_json(self, path: str | Path) -> Path:
        """Write everything as one JSON object."""
        return write_json(path, self)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw top1, top10 and the mean reciprocal rank over depth."""
        names = [site.site for site in self.sites]
        curves = [
            Curve("first guess", names, [site.top1 for site in self.sites]),
            Curve("among ten", names, [site.top10 for site in self.sites]),
            Curve("1 / rank", names, [site.reciprocal_rank for site in self.sites]),
        ]
        return draw_curves(names, curves, f"the true token, {self.method} lens", path)
