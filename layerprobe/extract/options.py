"""What can be asked of a run, checked when it is said.

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

# What a run into a sink takes; all other options concern stores.
_FOR_SINKS = ("sites", "field", "max_length", "batch_tokens")
# Where the name of an option is another than that of its field.
_NAMES = {"shard_bytes": "shard_size"}


@dataclass(frozen=True)
class ExtractOptions:
    """What to extract and how; checked when made.

    Args:
        sites: A pattern, or several; None for the embeddings and every layer, as far as the model has them.
        dtype: Stored dtype by name, or None for the model's own.
        pool: As for `Probe`.
        field: Which field of a record holds the text.
        max_length: Longest text in tokens; None for the model's own limit.
        batch_tokens: Tokens per batch, padding included; None chooses by device, and tries for long runs.
        padding_free: Whether texts go through the model behind one another, without padding; None where they can.
        shard_bytes: What a shard should hold, by an estimate: texts with more tokens a byte than the first ones take
            more. At most about a million tokens and 65,536 texts, whatever it is. None chooses by device.
        nonfinite: `warn` counts values that are not finite, `error` stops at them.
        keep: Share of the rows to keep.
        tokens: Which tokens to keep rows of: `all`, `first`, `cls`, `special` or `nonspecial`.
        precision: What the forward computes in, by name; None for the dtype of the weights.
        compile: Whether to compile the model for the run, or torch's backend to do so, or `reduce-overhead`.
        writers: Shards written at once, each from a buffer of its own.

    Raises:
        OptionError: a value that does not exist.
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
        # as JSON writes it, whatever kind of number it came as
        object.__setattr__(self, "keep", float(self.keep))
        check_backend(self.compile)
        # by one name, since it is part of what the run is
        object.__setattr__(self, "precision", resolve_precision(self.precision))
        if self.padding_free is not None and type(self.padding_free) is not bool:
            raise OptionError(f"padding_free is {self.padding_free!r}: use True, False, or None for where it can be.")
        if self.nonfinite not in NONFINITE_POLICIES:
            raise OptionError(f"no policy {self.nonfinite!r} for values that are not finite: use warn or error.")
        given = [name for name in ("max_length", "batch_tokens", "shard_bytes") if getattr(self, name) is not None]
        for name in (*given, "writers"):
            check_count(_NAMES.get(name, name), getattr(self, name))
            object.__setattr__(self, name, int(getattr(self, name)))

    def list_for_stores(self) -> list[str]:
        """List the options that are given and concern stores alone, by the names that they have in a call."""
        own = (field for field in fields(self) if field.name not in _FOR_SINKS)
        return [_NAMES.get(field.name, field.name) for field in own if getattr(self, field.name) != field.default]


def check_call(to: object, overwrite: object, wait_for_space: object, progress: object) -> None:
    """Refuse what a call of `extract` says beside its options, where it is of another type than asked for.

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
