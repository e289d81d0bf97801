"""`lp.Stage`: the rows of one call, in tensors that are allocated once and never move.

Compiled graphs, and CUDA graphs in particular, keep the addresses that they write to. So a stage does not grow:
rows beyond its capacity go to an extra last row that is never read, and reading the stage then raises an error.

Hides how the tensors are laid out. Must never know of models or of who writes.
Letters: B sequences in a batch, S padded positions, T rows (real tokens), D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerprobe.capture.sinks import find_site
from layerprobe.capture.staging import Room
from layerprobe.errors import CaptureError
from layerprobe.sites.resolve import Site
from layerprobe.store.guard import check_count
from layerprobe.tables import format_count

__all__ = ["Stage", "StageTensors"]


class StageTensors(NamedTuple):
    """The tensors of a stage; each has one element more than its capacity.

    `counts` holds T and B of the last call, `is_done` whether it ran to its end, `is_open` whether a probe is open.
    """

    values: list[Tensor]
    offsets: Tensor
    counts: Tensor
    is_done: Tensor
    is_open: Tensor


class Stage:
    """Hold the rows of the last call of a model, in tensors that are allocated once and never move.

    Pass it to `lp.Probe(model, sites, to=stage)`. Rows are packed without padding, as in a store, and cast to the
    probe's `dtype` (None: that of the model's weights). Under `torch.compile` the packing is part of the graph.

    Args:
        max_tokens: Capacity in real tokens of a call. A call with more runs normally, but reading the stage is an
            error.
        max_examples: Capacity in sequences of a call; None for as many as tokens.

    Raises:
        OptionError: there is no room at all.

    Cost: `max_tokens + 1` vectors per site, as long as the stage lives; reading waits for the device.

    Example:
        >>> import torch, layerprobe as lp
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> model, stage = BertModel(tiny).eval(), lp.Stage(max_tokens=64)
        >>> with lp.Probe(model, "layers.*", to=stage):
        ...     output = model(torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
        >>> stage["layers.1"].shape, stage.offsets.tolist()
        (torch.Size([5, 32]), [0, 3, 5])
    """

    def __init__(self, max_tokens: int, *, max_examples: int | None = None) -> None:
        max_examples = max_tokens if max_examples is None else max_examples
        for name, most in (("max_tokens", max_tokens), ("max_examples", max_examples)):
            check_count(f"{name} of a stage", most)
        self.max_tokens = max_tokens
        self.max_examples = max_examples
        self._tensors: StageTensors | None = None
        self._layout: Any = None
        self._kinds: dict[str, tuple[int, str]] = {}
        self._num_layers: Mapping[str, int] = {}
        self._is_taken = False

    @property
    def offsets(self) -> Tensor:
        """`[B + 1]` int64, a view: rows `offsets[b]` to `offsets[b + 1]` belong to sequence b."""
        tensors, room = self._look()
        return tensors.offsets[: room.examples + 1]

    def __getitem__(self, site: str) -> Tensor:
        """Return the last call's value of a site, a view: `[T, D]` rows, or `[B, D]` if it has one vector per example.

        Raises:
            SiteError: the site is not among those of the probe.
            CaptureError: no call has ended, or the last one exceeded the capacity.
        """
        tensors, room = self._look()
        index, kind = self._kinds[find_site(site, list(self._kinds), self._num_layers)]
        return tensors.values[index][: room.of(kind)]

    def _look(self) -> tuple[StageTensors, Room]:
        """Read the size of the last call from the device."""
        if self._tensors is None or not self._tensors.is_done:
            raise CaptureError(
                "the stage holds no call: none of the model has ended in the probe, or the last was cut short. "
                "Call model(...) inside the with block."
            )
        num_tokens, num_examples = self._tensors.counts.tolist()
        if num_tokens > self.max_tokens or num_examples > self.max_examples:
            raise CaptureError(
                f"the last call had {format_count(num_tokens, 'token')} in {format_count(num_examples, 'example')}: "
                f"the stage has room for {self.max_tokens} in "
                f"{self.max_examples}. Make a larger one, or call the model with fewer texts."
            )
        return self._tensors, Room(num_tokens, num_examples)

    def take(self, sites: Sequence[Site], dtype: torch.dtype, device: torch.device) -> StageTensors:
        """Prepare for these sites; the last probe's tensors are reused if they fit.

        Raises:
            CaptureError: another probe is using the stage.
        """
        if self._is_taken:
            raise CaptureError("the stage belongs to another open probe: make one for each.")
        layout = [(site.kind, site.width) for site in sites], dtype, device
        if self._tensors is None or layout != self._layout:
            self._tensors, self._layout = self._allocate(sites, dtype, device), layout
        self._kinds = {site.name: (index, site.kind) for index, site in enumerate(sites)}
        self._tensors.is_done.fill_(False)
        self._tensors.is_open.fill_(True)
        self._is_taken = True
        return self._tensors

    def leave(self) -> None:
        """Disable writing, even for a compiled graph that outlives the probe."""
        if self._tensors is not None:
            self._tensors.is_open.fill_(False)
        self._is_taken = False

    def name_layers(self, num_layers: Mapping[str, int]) -> None:
        """Set the number of layers, to resolve negative layer numbers."""
        self._num_layers = num_layers

    def _allocate(self, sites: Sequence[Site], dtype: torch.dtype, device: torch.device) -> StageTensors:
        with torch.inference_mode(False):
            extents = {"token": self.max_tokens, "example": self.max_examples}
            tensors = StageTensors(
                [torch.zeros(extents[site.kind] + 1, site.width or 0, dtype=dtype, device=device) for site in sites],
                torch.zeros(self.max_examples + 2, dtype=torch.int64, device=device),
                torch.zeros(2, dtype=torch.int64, device=device),
                torch.zeros((), dtype=torch.bool, device=device),
                torch.zeros((), dtype=torch.bool, device=device),
            )
        for tensor in (*tensors.values, *tensors[1:]):
            torch._dynamo.mark_static_address(tensor)
        return tensors
