"""What can be asked of a run, checked when it is said.

Must never look at a model, an input or a folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layerprobe.capture.casting import resolve_dtype
from layerprobe.capture.pooling import Pool, check_pool
from layerprobe.capture.probe import DEFAULT_SHARD_BYTES
from layerprobe.errors import OptionError
from layerprobe.extract.forward import check_backend, resolve_precision
from layerprobe.store.kept import check_kept
from layerprobe.store.writer import NONFINITE_POLICIES

__all__ = ["DEFAULT_SITES", "ExtractOptions"]

DEFAULT_SITES = ("embeddings", "layers.*")


@dataclass(frozen=True)
class ExtractOptions:
    """What to extract and how; checked when made.

    Args:
        sites: Patterns.
        dtype: Stored dtype by name, or None for the model's own.
        pool: As for `Probe`.
        field: Which field of a record holds the text.
        max_length: Longest text in tokens; None for the model's own limit.
        batch_tokens: Tokens per batch, padding included; None chooses by device, and tries for long runs.
        padding_free: Whether texts go through the model behind one another, without padding; None where they can.
        shard_bytes: What a shard should hold.
        nonfinite: `warn` counts values that are not finite, `error` stops at them.
        keep: Share of the rows to keep.
        tokens: Which tokens to keep rows of: `all`, `first`, `cls`, `special` or `nonspecial`.
        precision: What the forward computes in, by name; None for the dtype of the weights.
        compile: Whether to compile the model for the run, or torch's backend to do so, or `reduce-overhead`.
        writers: Shards written at once, each from a buffer of its own.

    Raises:
        OptionError: a value that does not exist.
    """

    sites: Sequence[str] = DEFAULT_SITES
    dtype: str | torch.dtype | None = None
    pool: Pool = None
    field: str = "text"
    max_length: int | None = None
    batch_tokens: int | None = None
    padding_free: bool | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    nonfinite: str = "warn"
    keep: float = 1.0
    tokens: str = "all"
    precision: str | None = None
    compile: bool | str = False
    writers: int = 1

    def __post_init__(self) -> None:
        resolve_dtype(self.dtype)
        check_pool(self.pool)
        check_kept(self.tokens, self.keep)
        check_backend(self.compile)
        # by one name, since it is part of what the run is
        object.__setattr__(self, "precision", resolve_precision(self.precision))
        if self.padding_free is not None and type(self.padding_free) is not bool:
            raise OptionError(f"padding_free is {self.padding_free!r}: use True, False, or None for where it can be.")
        if self.nonfinite not in NONFINITE_POLICIES:
            raise OptionError(f"no policy {self.nonfinite!r} for values that are not finite: use warn or error.")
        sizes = {
            "max_length": self.max_length,
            "batch_tokens": self.batch_tokens,
            "shard_size": self.shard_bytes,
            "writers": self.writers,
        }
        for name, value in sizes.items():
            if value is not None and (type(value) is not int or value < 1):
                raise OptionError(f"{name} is {value!r}: it must be a whole number of at least 1.")
