"""`lp.TopK`: for each unit the tokens with the largest activations, and the tokens around them.

Must never know of probes or modules.

Letters: T rows, D units, K kept, C tokens of context on either side and the token itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerprobe.capture.statistics import Rows, RowSink, Said, Sums
from layerprobe.errors import OptionError
from layerprobe.store.guard import check_flag, is_whole
from layerprobe.tables import format_fields

__all__ = ["SiteTops", "Top", "TopK"]

_FIELDS = ("values", "example", "position", "context")


@dataclass(frozen=True)
class Top:
    """A top token of a unit.

    Args:
        value: The unit's value.
        example: Ordinal of the text among all texts that the sink has seen; in a first `lp.extract`, that in its input.
        position: Position among the text's real tokens.
        token_id: Id of the token, -1 if the model was called with embeddings.
        before, after: Ids of the tokens around it in the same text.
    """

    value: float
    example: int
    position: int
    token_id: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    def describe(self, tokenizer: Any) -> str:
        """Return the context as text, with the token itself in brackets."""
        parts = [tokenizer.convert_ids_to_tokens([i for i in ids if i >= 0]) for ids in (self.before, self.after)]
        (token,) = tokenizer.convert_ids_to_tokens([self.token_id]) if self.token_id >= 0 else ("?",)
        return " ".join([*parts[0], f"[{token}]" if not token.startswith("[") else token, *parts[1]])


@dataclass(frozen=True, eq=False)
class SiteTops:
    """The top tokens of each unit of a site, in descending order.

    Args:
        values: float64 `[K, D]`; minus infinity in unused places, if there were fewer than K tokens.
        example, position: int64 `[K, D]`; -1 in unused places.
        context: int64 `[K, D, C]`: ids around the token, which is in the middle; -1 beyond the text's ends.
    """

    values: Tensor
    example: Tensor
    position: Tensor
    context: Tensor

    def __repr__(self) -> str:
        return format_fields(self)

    def unit(self, number: int) -> list[Top]:
        """Return the top tokens of one unit.

        Raises:
            OptionError: there is no such unit.
        """
        if not -self.values.shape[1] <= number < self.values.shape[1]:
            raise OptionError(f"no unit {number}: the site has {self.values.shape[1]}.")
        middle = self.context.shape[2] // 2
        found = []
        for row in range(self.values.shape[0]):
            if int(self.example[row, number]) < 0:
                break
            ids = self.context[row, number].tolist()
            found.append(
                Top(
                    float(self.values[row, number]),
                    int(self.example[row, number]),
                    int(self.position[row, number]),
                    ids[middle],
                    tuple(i for i in ids[:middle] if i >= 0),
                    tuple(i for i in ids[middle + 1 :] if i >= 0),
                )
            )
        return found


class TopK(RowSink[SiteTops]):
    """Keep for each unit the tokens with the largest values, and their context.

    Ties are broken arbitrarily. A row that is not finite is left out.

    Args:
        k: Number of tokens per unit.
        context: Number of tokens on either side.
        magnitude: Rank by absolute value.

    Raises:
        OptionError: `k` is below 1, or `context` below 0.

    Cost: K x (4 + 2 `context`) numbers per unit, and as many from each call until it is joined.

    Example:
        >>> import torch, layerprobe as lp
        >>> demo, top = lp.load_model("demo", "cpu"), lp.TopK(3, context=2)
        >>> batch = demo.tokenizer(["The kettle whistled.", "Who left?"], padding=True, return_tensors="pt")
        >>> with torch.no_grad(), lp.Probe(demo.model, "layers.3.ffn.act", to=top):
        ...     output = demo.model(**batch)
        >>> [found.describe(demo.tokenizer) for found in top["layers.3.ffn.act"].unit(7)][0].count("[") >= 1
        True
    """

    def __init__(self, k: int = 10, *, context: int = 5, magnitude: bool = False) -> None:
        check_flag("magnitude", magnitude)
        if not is_whole(k) or k < 1 or not is_whole(context) or context < 0:
            raise OptionError(f"the top {k!r} with a context of {context!r}: give at least 1, and at least 0.")
        options = {
            "k": torch.tensor(k, device="cpu"),
            "width": torch.tensor(context, device="cpu"),
            "magnitude": torch.tensor(magnitude, device="cpu"),
        }
        super().__init__(
            _FIELDS,
            partial(_measure, k, context, magnitude),
            partial(_join, k, magnitude),
            _view,
            partial(_describe, magnitude),
            options=options,
        )

    def list_tops(self, tokenizer: Any, units: Sequence[int] | None = None) -> list[Said]:
        """Return the top tokens of some units of each site, ordered by site, unit and value.

        Args:
            tokenizer: Turns ids into tokens.
            units: Units to list; None for the three of each site with the largest value.

        Raises:
            OptionError: a site has no such unit.
        """
        found: list[Said] = []
        magnitude = bool(self._options["magnitude"])
        for site in self.sites:
            tops = self[site]
            chosen = _rank_units(tops, magnitude)[:3] if units is None else units
            found += [
                {"site": site, "unit": unit, "value": top.value, "text": top.example, "token": top.describe(tokenizer)}
                for unit in chosen
                for top in tops.unit(unit)
            ]
        return found


def _view(sums: Sums) -> SiteTops:
    return SiteTops(**sums)


def _rank_units(found: SiteTops, magnitude: bool) -> list[int]:
    values = found.values[0]
    return (values.abs() if magnitude else values).sort(descending=True, stable=True).indices.tolist()


def _describe(magnitude: bool, found: SiteTops) -> Said:
    unit = _rank_units(found, magnitude)[0]
    largest = found.values[0, unit].item()
    return {"units": found.values.shape[1], "kept": len(found.values), "largest": largest, "its unit": unit}


def _measure(k: int, context: int, magnitude: bool, rows: Rows) -> Sums:
    values = rows.values
    rank = rows.fill(float("-inf"), values.abs() if magnitude else values)
    order = rank.topk(min(k, len(values)), dim=0)
    is_there = order.values > float("-inf")
    tokens = rows.tokens
    windows_TC = _cut_windows(tokens.ids, tokens.examples, context)
    return _pad(
        k,
        {
            "values": torch.where(is_there, values.gather(0, order.indices), float("-inf")),
            "example": torch.where(is_there, tokens.examples[order.indices], -1),
            "position": torch.where(is_there, tokens.positions[order.indices], -1),
            "context": torch.where(is_there[..., None], windows_TC[order.indices], -1),
        },
    )


def _pad(k: int, sums: Sums) -> Sums:
    """Pad to K places if a call had fewer rows."""
    missing = k - len(sums["values"])
    if not missing:
        return sums
    return {
        name: torch.cat(
            [tensor, tensor.new_full((missing, *tensor.shape[1:]), float("-inf") if name == "values" else -1)]
        )
        for name, tensor in sums.items()
    }


def _cut_windows(ids_T: Tensor, example_T: Tensor, context: int) -> Tensor:
    """Return the ids around each row, `[T, 2 context + 1]`; -1 beyond its text."""
    offsets = torch.arange(-context, context + 1, device=ids_T.device)
    places = torch.arange(len(ids_T), device=ids_T.device)[:, None] + offsets
    inside = (places >= 0) & (places < len(ids_T))
    places = places.clamp(0, len(ids_T) - 1)
    return torch.where(inside & (example_T[places] == example_T[:, None]), ids_T[places], -1)


def _join(k: int, magnitude: bool, one: Sums, other: Sums) -> Sums:
    both = {name: torch.cat([one[name], other[name]]) for name in one}
    rank = both["values"].abs() if magnitude else both["values"]
    # empty places have no example
    rank = torch.where(both["example"] < 0, float("-inf"), rank)
    order = rank.topk(k, dim=0).indices
    chosen = {name: both[name].gather(0, order) for name in ("values", "example", "position")}
    wide = order[..., None].expand(*order.shape, both["context"].shape[2])
    return {**chosen, "context": both["context"].gather(0, wide)}
