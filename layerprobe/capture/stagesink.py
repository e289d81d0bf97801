"""The sink of `lp.Stage`: scatter rows to their places, from Python or inside a compiled graph.

Everything is tensor arithmetic: a cumulative sum of the mask gives each token's row, and padding goes to a last row
that is never read. So nothing is read from the device, no shape depends on the mask, and no operator breaks a
`torch.compile` graph. During a call an object holds the mask; the compiler carries it through the model.

Hides how rows find their places. Must never know of hooks.
Letters: B sequences in a batch, S padded positions, D width.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.capture.abilities import SinkAbilities
from layerprobe.capture.calls import Call
from layerprobe.capture.compiled import Outlet, Reading
from layerprobe.capture.frames import ROOT
from layerprobe.capture.stage import Stage, StageTensors
from layerprobe.capture.values import find_tensor, take_part
from layerprobe.errors import CaptureError, OptionError
from layerprobe.sites.resolve import Site
from layerprobe.sites.stacks import find_weight_dtype
from layerprobe.tables import format_dtype

__all__ = ["StageSink"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class StageSink(SinkAbilities):
    """Write the rows of each call to a stage.

    Args:
        stage: The stage.
        dtype: Dtype of the rows; None for that of the model's weights.
        model: The model.

    Raises:
        OptionError: the dtype needs more than a cast.
    """

    def __init__(self, stage: Stage, dtype: torch.dtype | None, model: nn.Module) -> None:
        if dtype is not None and dtype not in _DTYPES:
            raise OptionError(
                f"dtype={format_dtype(dtype)!r} of a stage: rows there are cast and no more. "
                "Use float32, float16, bfloat16, or None for that of the weights."
            )
        self._dtype = dtype or find_weight_dtype(model)
        self._stage = stage
        self._device = torch.device("cpu")
        self._packer: _Packer | None = None
        self._sites: Sequence[Site] = ()
        self._outlet: _StageOutlet | None = None
        self._lock = threading.Lock()
        self._call: Call | None = None
        self._thread: int | None = None

    def make_outlet(self, root: nn.Module, device: torch.device, readings: Sequence[Reading]) -> Outlet:
        """Return the outlet that takes values directly from compiled graphs."""
        self._device = device
        self._outlet = _StageOutlet(root, readings)
        return self._outlet

    def open(self, sites: Sequence[Site]) -> None:
        _check_sites(sites)
        assert self._outlet is not None
        self._sites = sites
        tensors = self._stage.take(sites, self._dtype, self._device)
        self._packer = self._outlet.packer = _Packer(self._stage, tensors, sites)

    def close(self, error: BaseException | None) -> None:
        if self._packer is not None:
            self._stage.leave()
        self._packer = self._outlet = self._call = self._thread = None

    def begin(self, call: Call) -> None:
        thread = threading.get_ident()
        with self._lock:
            if self._thread not in (None, thread):
                raise CaptureError("a stage holds one call at a time: call the model from one thread, or use memory.")
            # an earlier call of this thread that is still recorded here was interrupted, for example by Ctrl-C
            self._call, self._thread = call, thread
        assert self._packer is not None
        self._packer.start(None, None, in_graph=False)

    def receive(self, call: Call, index: int, value: Tensor) -> None:
        packer = self._packer
        if call is not self._call or packer is None:
            raise CaptureError(
                f"{self._sites[index].name!r} was made after another call of the model began inside this one: a stage "
                "holds one call at a time. Use a second model, or capture into memory."
            )
        if not packer.has_places:
            context = call.context(index)
            packer.mask = context.token_mask
            packer.find_places(context.shape or tuple(value.shape[:2]), value.device)
        packer.write(index, value.detach())

    def finish(self, call: Call) -> None:
        if call is self._call and self._packer is not None:
            self._packer.end(completed=True)
        self._drop(call)

    def abandon(self, call: Call) -> None:
        self._drop(call)

    def _drop(self, call: Call) -> None:
        with self._lock:
            if call is self._call:
                self._call = self._thread = None
                if self._packer is not None:
                    self._packer.end(completed=False)


class _StageOutlet:
    """The outlet from a compiled graph into a stage; the compiler traces these methods."""

    def __init__(self, root: nn.Module, readings: Sequence[Reading]) -> None:
        self._root = root
        self._readings = readings
        self.packer: Any = None

    def enter(self, stack: int, ids: Any, mask: Any, embeds: Any, cached: bool) -> None:
        if stack != ROOT and self.packer.stack in (None, stack):
            tokens = ids if ids is not None else embeds
            if cached and mask is not None and mask.ndim == 2 and tokens is not None:
                mask = mask[:, -tokens.shape[1] :]  # the mask may also have columns for cached tokens
            self.packer.start(tokens, mask, in_graph=True)

    def receive(self, point: int, value: Any, is_rows: bool = False) -> None:
        packer = self.packer
        if not packer.is_in_graph:
            raise CaptureError(
                "layers of the model are compiled one by one: a stage needs the call and its layers in one graph. "
                "Use torch.compile(model), or capture into memory."
            )
        value = find_tensor(value).detach()
        shape = value.shape[:2] if packer.tokens is None else packer.tokens.shape
        reading = self._readings[point]
        if reading.is_chunked and value.ndim == 3 and value.shape[1] != shape[1]:
            held = packer.chunks.setdefault(point, [])
            held.append(value)
            if sum(chunk.shape[1] for chunk in held) != shape[1]:
                return
            value = torch.cat(packer.chunks.pop(point), dim=1)
        run = packer.runs.get(point, 0)
        packer.runs[point] = run + 1
        if not packer.has_places:
            packer.find_places(shape, value.device)
        for index in reading.indices:
            site = packer.sites[index]
            if site.call_index is None or site.call_index == run:
                packer.write(index, take_part(self._root, site.part, value))

    def leave(self, stack: int, completed: bool) -> None:
        packer = self.packer
        if stack != packer.last or not packer.is_in_graph:
            return
        missing = [site.name for site, is_made in zip(packer.sites, packer.is_made, strict=True) if not is_made]
        if completed and missing:
            raise CaptureError(f"the model ran without making {missing[0]!r}. Leave the site out.")
        packer.end(completed)


class _Packer:
    """The destination of the running call's rows."""

    def __init__(self, stage: Stage, tensors: StageTensors, sites: Sequence[Site]) -> None:
        self._most_tokens = stage.max_tokens
        self._most_examples = stage.max_examples
        self._tensors = tensors
        self.sites = sites
        self.stack = next((site.stack for site in sites if site.stack is not None), None)
        # sites outside the stacks are produced by the task model around them
        self.last = ROOT if any(site.stack is None for site in sites) else self.stack
        self._forget()

    def _forget(self) -> None:
        self.is_in_graph = False
        self.mask: Any = None
        self.tokens: Any = None
        # a list, not a bit mask: the compiler would treat a changing integer as dynamic
        self.is_made = [False] * len(self.sites)
        self.runs: dict[int, int] = {}
        self.chunks: dict[int, list[Tensor]] = {}
        self._row_places: Tensor | None = None
        self._example_places: Tensor | None = None

    @property
    def has_places(self) -> bool:
        """Whether the destination of this call's rows has been computed."""
        return self._row_places is not None

    def start(self, tokens: Tensor | None, mask: Tensor | None, in_graph: bool) -> None:
        """Begin a call, marking the stage's content as incomplete."""
        self._forget()
        self.tokens, self.mask, self.is_in_graph = tokens, mask, in_graph
        self._tensors.is_done.logical_and_(self._tensors.is_open.logical_not())

    def end(self, completed: bool) -> None:
        """End the call, and mark the content as complete if it ran to its end."""
        if completed:
            self._tensors.is_done.logical_or_(self._tensors.is_open)
        self._forget()

    def find_places(self, shape: Sequence[int], device: torch.device) -> None:
        """Compute each token's row in the stage, and write the offsets and counts."""
        mask, tensors = self.mask, self._tensors
        if mask is None:
            real_BS = torch.ones(shape[0], shape[1], dtype=torch.bool, device=device)
        elif mask.ndim == 2 and mask.shape[0] == shape[0] and mask.shape[1] == shape[1]:
            real_BS = mask != 0
        else:
            raise CaptureError(
                f"attention_mask has shape {tuple(mask.shape)}: rows need one of shape {tuple(shape)}. "
                "Pass a [batch, positions] mask, or capture into memory."
            )
        is_real, most = real_BS.flatten() & tensors.is_open, self._most_tokens
        self._row_places = torch.where(is_real, is_real.cumsum(0) - 1, most).clamp(max=most)
        most = self._most_examples
        numbers = torch.arange(shape[0], device=device).clamp(max=most)
        places = self._example_places = torch.where(tensors.is_open, numbers, most)
        tensors.offsets.index_copy_(0, places + 1, real_BS.sum(dim=1).cumsum(0))
        counts = torch.stack((real_BS.sum(), torch.ones_like(numbers).sum()))
        tensors.counts.copy_(torch.where(tensors.is_open, counts, tensors.counts))

    def write(self, index: int, value: Tensor) -> None:
        """Write a site's value to its rows, cast to the stage's dtype."""
        site, kept = self.sites[index], self._tensors.values[index]
        if self.is_made[index]:
            raise CaptureError(f"{site.name!r} was made twice in one call. Ask for the sites of single layers.")
        self.is_made[index] = True
        is_token = site.kind == "token"
        places = self._row_places if is_token else self._example_places
        assert places is not None
        rows = value.flatten(0, 1) if is_token and value.ndim == 3 else value
        if rows.ndim != 2 or rows.shape != (places.shape[0], kept.shape[1]):
            wanted = "one row per token" if is_token else "one vector per example"
            raise CaptureError(
                f"{site.name!r} gave a value of shape {tuple(value.shape)}: a stage has room for {wanted}, of width "
                f"{kept.shape[1]}. Capture this site into memory."
            )
        kept.index_copy_(0, places, rows.to(kept.dtype))


def _check_sites(sites: Sequence[Site]) -> None:
    """Refuse, before any hook is attached, sites that a stage cannot hold.

    Raises:
        OptionError: a site has no rows of a known width, or sites are of two stacks.
    """
    for site in sites:
        if site.kind not in ("token", "example") or site.width is None:
            raise OptionError(
                f"{site.name!r} in a stage: only vectors per token or example, of a width that is known before the "
                "model runs, have room there. Capture this site into memory."
            )
    stacks = {site.stack: site.name for site in sites if site.stack is not None}
    if len(stacks) > 1:
        first, second, *_ = stacks.values()
        raise OptionError(
            f"{first!r} and {second!r} in one stage: they are of two stacks, whose tokens differ. Use a probe and a "
            "stage for each."
        )
