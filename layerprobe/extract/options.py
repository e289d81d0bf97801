"""The options of a run, checked when they are given.

Must never look at a model, an input or a folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from layerprobe.capture.calls import is_sink
from layerprobe.capture.casting import resolve_dtype
from layerprobe.capture.pooling import Pool, check_pool
from layerprobe.errors import OptionError
from layerprobe.extract.forward import check_backend, resolve_precision
from layerprobe.sites.grammar import list_patterns
from layerprobe.store.guard import brief, check_count, check_flag
from layerprobe.store.kept import check_kept
from layerprobe.store.places import names_place
from layerprobe.store.writer import NONFINITE_POLICIES

__all__ = ["ExtractOptions", "check_call"]

# Options that also apply to a run into a sink; all others concern stores.
_FOR_SINKS = ("sites", "field", "max_length", "batch_tokens")
# Fields whose option has another name.
_NAMES = {"shard_bytes": "shard_size"}


@dataclass(frozen=True)
class ExtractOptions:
    """What to extract and how; checked on construction.

    Args:
        sites: A pattern, or several; None for the embeddings and every layer, as far as the model has them.
        dtype: Stored dtype by name, or None for the model's own.
        pool: As for `Probe`.
        field: Name of the record field that holds the text.
        max_length: Maximum length of a text in tokens; None for the model's own limit.
        batch_tokens: Tokens per batch, padding included; None chooses by device, and by trial for long runs.
        padding_free: Whether to concatenate texts into one sequence instead of padding; None does so where possible.
        shard_bytes: Approximate bytes of a shard, by an estimate: texts with more tokens a byte than the first ones
            take more. At most about a million tokens and 65,536 texts in any case. None chooses by device.
        nonfinite: `warn` counts values that are not finite, `error` stops at them.
        keep: Share of the rows to keep.
        tokens: Which tokens to keep rows of: `all`, `first`, `cls`, `special` or `nonspecial`.
        precision: Precision of the forward pass, by name; None for the dtype of the weights.
        compile: Whether to compile the model for the run, or the torch backend to use, or `reduce-overhead`.
        writers: Shards written at once, each from a buffer of its own.

    Raises:
        OptionError: an invalid value.
        SiteError: `sites` is neither a pattern nor a list of them.
    """

    sites: str | Sequence[str] | None = None
    dtype: str | torch.dtype | None = None
    pool: Pool = None
    field: str = "text"
    max_length: int | None = None
    batch_tokens: int | None = None
    padding_free: bool | None = None
    shard_bytes: int | None = None
    nonfinite: str = "warn"
    keep: float = 1.0
    tokens: str = "all"
    precision: str | None = None
    compile: bool | str = False
    writers: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", None if self.sites is None else tuple(list_patterns(self.sites)))
        if not isinstance(self.field, str):
            raise OptionError(f"field is {self.field!r}: it must be the name of a field, a text such as 'text'.")
        resolve_dtype(self.dtype)
        check_pool(self.pool)
        check_kept(self.tokens, self.keep)
        # stored as a float in JSON, whatever type of number was given
        object.__setattr__(self, "keep", float(self.keep))
        check_backend(self.compile)
        # one name per precision, since it is part of the run's fingerprint
        object.__setattr__(self, "precision", resolve_precision(self.precision))
        if self.padding_free is not None and type(self.padding_free) is not bool:
            raise OptionError(f"padding_free is {self.padding_free!r}: use True, False, or None for where it can be.")
        if self.nonfinite not in NONFINITE_POLICIES:
            raise OptionError(f"no policy {self.nonfinite!r} for values that are not finite: use warn or error.")
        given = [name for name in ("max_length", "batch_tokens", "shard_bytes") if getattr(self, name) is not None]
        for name in (*given, "writers"):
            object.__setattr__(self, name, check_count(_NAMES.get(name, name), getattr(self, name)))

    def list_for_stores(self) -> list[str]:
        """List the options that were given and only concern stores, by their names in a call."""
        own = (field for field in fields(self) if field.name not in _FOR_SINKS)
        return [_NAMES.get(field.name, field.name) for field in own if getattr(self, field.name) != field.default]


def check_call(to: object, overwrite: object, wait_for_space: object, progress: object) -> None:
    """Check the arguments of `extract` that are not options.

    Raises:
        OptionError: `to` is neither a place nor a sink, or a value is neither True nor False.
    """
    if isinstance(to, type):
        raise OptionError(
            f"to is the class {to.__name__}: give one that is made, such as {to.__name__}(), a path or a URL."
        )
    if not (is_sink(to) or names_place(to)):
        what = "a function: functions go with layerprobe.Probe. Give" if callable(to) else f"{brief(repr(to))}: give"
        raise OptionError(f"to is {what} a path, a URL such as s3://bucket/acts, or a sink such as Moments().")
    for name, value in (("overwrite", overwrite), ("wait_for_space", wait_for_space)):
        check_flag(name, value)
    if not isinstance(progress, bool | None):
        raise OptionError(f"progress is {progress!r}: use True or False, or None for only on a terminal.")
