"""Capture a model's activations inside a `with` block.

Validates every option before anything is allocated, chooses the sink and owns the registry. Knows what the user
requests; how values are read and packed is hidden below.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.capture.calls import Sink, is_sink
from layerprobe.capture.casting import resolve_dtype
from layerprobe.capture.hooks import Lifecycle
from layerprobe.capture.identity import describe_pool
from layerprobe.capture.packing import StoreSink
from layerprobe.capture.pooling import Pool, check_pool
from layerprobe.capture.registry import ProbeRegistry
from layerprobe.capture.sinks import CallableSink, CapturedCall, MemorySink, find_site
from layerprobe.capture.stage import Stage
from layerprobe.capture.stagesink import StageSink
from layerprobe.errors import CaptureError, OptionError, SiteError
from layerprobe.models import LoadedModel, describe_model
from layerprobe.sites.resolve import Site
from layerprobe.sites.stacks import is_compile_wrapper, need_model, need_one_device, unwrap
from layerprobe.store.guard import check_flag
from layerprobe.store.places import find_place
from layerprobe.store.writer import ShardWriter
from layerprobe.tables import format_count
from layerprobe.version import __version__

__all__ = ["DEFAULT_SHARD_BYTES", "Probe"]

DEFAULT_SHARD_BYTES = 128 << 20


class Probe(AbstractContextManager["Probe"]):
    """Capture activations of a model while a `with` block runs.

    Args:
        model: A supported Hugging Face model, or the result of `load_model`. Its outputs stay bit-equal.
        sites: One pattern or several, such as `"layers.*"` or `["embeddings", "layers.-1"]`.
        to: Where values go. None: memory, `[B, S, D]` as the model produced them. A path or a URL: a store, one row per
            real token. A function: called as `function(site, value)` with each value. A `Sink`: its methods are called.
            A `Stage`: holds the last call, in tensors that never move.
        pool: None, or how an example becomes one vector: `cls`, `mean`, `max`, `last`, or a callable from `[T, D]` rows
            to one vector. Over all real tokens, special tokens included.
        dtype: None for the model's own, or `float32`, `float16`, `bfloat16`, `float8_e4m3fn`, `int8` (with one scale
            per vector).
        stop: End each forward pass after the last requested site. The model's call then returns None.
        gradients: Keep values with their autograd history, so that a loss can be computed from them, and keep the
            gradients of the last `backward` at each site in `probe.gradients`. In memory only.
        this_thread: Capture only calls of the thread that enters the block. By default calls of every thread are
            captured.

    Raises:
        SiteError: a pattern matches nothing.
        ArchitectureError: the model is not supported.
        OptionError: an option has an invalid value, or two options conflict.
        StoreError: the folder cannot hold a new store.

    Cost: in memory a reference per value, a copy at `module:` sites; to a store one pass over each value and two shard
        buffers.

    Example:
        >>> import torch, layerprobe as lp
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> model = BertModel(tiny).eval()
        >>> with lp.Probe(model, "layers.*") as probe:
        ...     output = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> torch.equal(probe["layers.1"], output.last_hidden_state)
        True
    """

    def __init__(
        self,
        model: nn.Module | LoadedModel,
        sites: str | Sequence[str],
        *,
        to: "str | Path | Stage | Sink | Callable[[str, Any], object] | None" = None,
        pool: Pool = None,
        dtype: str | torch.dtype | None = None,
        stop: bool = False,
        gradients: bool = False,
        this_thread: bool = False,
    ) -> None:
        model = need_model(model)
        check_pool(pool)
        stored_dtype = resolve_dtype(dtype)
        for name, value in (("stop", stop), ("gradients", gradients), ("this_thread", this_thread)):
            check_flag(name, value)
        if gradients and (to is not None or pool is not None or stored_dtype is not None):
            raise OptionError("gradients=True keeps values in memory as they are: leave out to, pool and dtype.")
        if gradients and stop:
            raise OptionError("a forward that stop=True ends early has no output to call backward on: leave out one.")
        if isinstance(to, Stage):
            _check_staged(model, pool, stop, this_thread)
        self._sink = self._choose_sink(model, to, pool, stored_dtype, gradients)
        registry = ProbeRegistry(model, sites, self._sink, stop=stop, this_thread=this_thread)
        if isinstance(self._sink, MemorySink):
            self._sink.num_layers = registry.num_layers
        if isinstance(to, Stage):
            to.name_layers(registry.num_layers)
        self._sites = registry.sites
        self._num_layers = registry.num_layers
        # released when the probe closes, so that the probe does not keep the model alive
        self._registry: ProbeRegistry | None = registry
        self._state = Lifecycle.NEW

    @staticmethod
    def _choose_sink(model: nn.Module, to: Any, pool: Pool, dtype: torch.dtype | None, gradients: bool) -> Sink:
        if to is None:
            return MemorySink(pool, dtype, gradients)
        if isinstance(to, Stage):
            return StageSink(to, dtype, unwrap(model))
        if isinstance(to, (str, Path)):
            return _open_store_sink(model, to, pool, dtype)
        if is_sink(to):
            if pool is not None or dtype is not None:
                raise OptionError("a Sink is given values as the model made them: leave out pool and dtype.")
            return to
        if callable(to):
            return CallableSink(to, pool, dtype)
        raise OptionError(f"to={to!r}: give a path, a function of (site, value), a Sink, a Stage, or None for memory.")

    @property
    def sites(self) -> tuple[Site, ...]:
        """The captured sites, in execution order."""
        return self._sites

    def __enter__(self) -> "Probe":
        if self._state is not Lifecycle.NEW or self._registry is None:
            raise CaptureError(f"this probe is {self._state.value}: make a new one for another with block.")
        self._sink.open(self.sites)
        try:
            self._registry.attach()
        except BaseException as error:
            self._sink.close(error)
            raise
        self._state = Lifecycle.OPEN
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._state = Lifecycle.CLOSED
        registry, self._registry = self._registry, None
        try:
            try:
                if registry is not None:
                    registry.detach()
                    registry.attach_history()
            finally:
                self._sink.close(error)
        except Exception:
            # an error raised in the block takes precedence over errors in the cleanup
            if error is None:
                raise

    def __repr__(self) -> str:
        made = f", {format_count(len(self._sink.calls), 'call')}" if isinstance(self._sink, MemorySink) else ""
        return f"Probe({format_count(len(self), 'site')}, {self._state.value}{made})"

    @property
    def calls(self) -> Sequence[CapturedCall]:
        """The values of each call of the model, in memory: `probe.calls[k]["layers.3"]`."""
        return self._memory().calls

    def __contains__(self, site: object) -> bool:
        """Whether a site is captured; by a name, or a pattern that selects one."""
        try:
            return isinstance(site, str) and bool(find_site(site, list(self), self._num_layers))
        except SiteError:
            return False

    def __iter__(self) -> Iterator[str]:
        return (site.name for site in self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, site: str) -> Any:
        """Return the value of a site, if the model was called once."""
        return self._only_call()[site]

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """Gradients by site, after `backward`, if the model was called once; else `probe.calls[k].gradients`."""
        return self._only_call().gradients

    def _only_call(self) -> CapturedCall:
        calls = self._memory().calls
        if len(calls) != 1:
            if not calls:
                raise CaptureError(
                    "the model was not called in the probe (model.forward() goes past its hooks; a call that raised is "
                    "none): call model(...) inside the with block."
                )
            raise CaptureError(
                f"the model was called {len(calls)} times in the probe: use probe.calls, one entry per call."
            )
        return calls[0]

    def _memory(self) -> MemorySink:
        if not isinstance(self._sink, MemorySink):
            raise CaptureError("this probe keeps nothing in memory: its values went where 'to' says.")
        if self._registry is not None:
            self._registry.attach_history()
        return self._sink


def _check_staged(model: nn.Module, pool: Pool, stop: bool, this_thread: bool) -> None:
    """Refuse options that a stage does not support.

    Raises:
        OptionError: a pool, `this_thread`, or `stop` with a compiled model.
    """
    if pool is not None:
        raise OptionError(f"pool={pool!r} and a stage: a stage holds rows as they are. Leave out pool, or use memory.")
    if this_thread:
        raise OptionError("this_thread=True and a stage: a compiled model fills a stage from any thread. Leave it out.")
    if stop and is_compile_wrapper(model):
        raise OptionError(
            "stop=True, a stage and a compiled model: nothing in the graph asks whether to go on. Leave out one."
        )


def _open_store_sink(model: nn.Module, to: str | Path, pool: Pool, dtype: torch.dtype | None) -> StoreSink:
    place = find_place(to)
    description = {
        "layerprobe": __version__,
        "model": describe_model(unwrap(model)),
        "tokenizer": None,
        "pool": describe_pool(pool),
        "plan": None,
    }
    return StoreSink(
        place,
        ShardWriter(place),
        pool=pool,
        dtype=dtype,
        device=need_one_device(model),
        shard_bytes=DEFAULT_SHARD_BYTES,
        description=description,
    )
