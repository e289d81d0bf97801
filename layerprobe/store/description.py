"""The content of `store.json`, which describes a store and its sites: written first, and read without trusting it.

Must never know of the bytes of shards.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from layerprobe.errors import FormatError, StoreError
from layerprobe.store.fingerprint import fingerprint_run
from layerprobe.store.format import STORE_FILE, load_json
from layerprobe.store.guard import MOST_SITES, brief
from layerprobe.store.headers import DTYPES, FORMAT_VERSION, POSITIONS, SCALE_SUFFIX
from layerprobe.store.kept import parse_kept
from layerprobe.store.places import Place, find_place
from layerprobe.tables import format_dtype

__all__ = ["Counts", "StoredSite", "commit_description", "load_description"]

_DTYPES = {format_dtype(dtype): dtype for dtype in DTYPES}
_MOST_WIDTH = 1 << 24
_MOST_NAME = 1000


class Counts(Protocol):
    """Anything with token and example counts: a shard's header, its entry in the index, a whole store."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_examples(self) -> int: ...


@dataclass(frozen=True)
class StoredSite:
    """A site as it is stored.

    Args:
        name: Name of the site.
        kind: `token` for a row per token, `example` for a vector per example, `attention` for `[H, len, len]` per
            example, flattened.
        dtype: Stored dtype.
        width: D; H for `attention`.
    """

    name: str
    kind: str
    dtype: torch.dtype
    width: int

    @classmethod
    def from_description(cls, name: str, said: Mapping[str, Any]) -> "StoredSite":
        """Create it from what `describe` returns, read from a checked `store.json`."""
        return cls(name, said["kind"], _DTYPES[said["dtype"]], said["width"])

    def tell_vector(self, pool: str | None) -> str:
        """Describe for a message where its one vector per example comes from.

        Args:
            pool: Pool of the store; if None, the model itself produces one vector per example.
        """
        how = "as the model makes it" if pool is None else f"pooled by {pool}"
        return f"{self.name!r} has one vector per example, {how}"

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of one vector, including its scale; for `attention`, of one query-key pair over all heads."""
        return self.width * self.dtype.itemsize + (4 if self.dtype == torch.int8 else 0)

    def count_vectors(self, counts: Counts) -> int:
        """Return the number of its vectors: one per token or one per example."""
        return counts.num_tokens if self.kind == "token" else counts.num_examples

    def layout(self, counts: Counts, num_pairs: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the dtype and shape of each of its tensors in a shard with these counts."""
        count = self.count_vectors(counts)
        shape = (self.width * num_pairs,) if self.kind == "attention" else (count, self.width)
        scale = {self.name + SCALE_SUFFIX: (torch.float32, (count,))} if self.dtype == torch.int8 else {}
        return {self.name: (self.dtype, shape), **scale}

    def describe(self) -> dict[str, Any]:
        """Return the entry of the site in `store.json`."""
        return {"kind": self.kind, "dtype": format_dtype(self.dtype), "width": self.width}


def commit_description(where: Path | Place, description: Mapping[str, Any]) -> None:
    """Write `store.json`, the first file of a store.

    Raises:
        StoreError: it names more sites than a reader accepts, or cannot be written.
    """
    if (count := len(description.get("sites", {}))) > MOST_SITES:
        raise StoreError(f"{find_place(where)}: {count:,} sites; at most {MOST_SITES:,} are read. Ask for fewer sites.")
    text = json.dumps({"format": FORMAT_VERSION, **description}, indent=2, ensure_ascii=False)
    find_place(where).commit(STORE_FILE, [text.encode()])


def load_description(place: Place, *, checks_fingerprint: bool = False) -> dict[str, Any]:
    """Read `store.json` and check everything that a reader uses.

    Args:
        place: Location of the store.
        checks_fingerprint: Verify the fingerprint against the other fields, if the way to compute it is known.

    Raises:
        FormatError: it is damaged, or of another format.
        StoreError: it cannot be read.
    """
    label, description = place.label(STORE_FILE), load_json(place, STORE_FILE)
    found = description.get("format")
    if type(found) is not int or found != FORMAT_VERSION:
        raise FormatError(f"{label}: format {brief(repr(found))}; this version reads format {FORMAT_VERSION}.")
    try:
        _check_description(description)
        # every version of layerprobe writes a plan; without one, how the fingerprint was computed is unknown
        own = fingerprint_run(description) if checks_fingerprint and "plan" in description else None
    except KeyError as error:
        raise FormatError(f"{label}: lacks {brief(error)}.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{label}: is damaged ({brief(error)}).") from error
    if own not in (None, description["fingerprint"]):
        raise FormatError(
            f"{label}: its fingerprint is {brief(description['fingerprint'])}, that of what it says is {own}."
        )
    return description


def _check_description(description: Mapping[str, Any]) -> None:
    """Check what a reader uses of `store.json`; raises KeyError, TypeError or ValueError."""
    _check_sites(description["sites"])
    pool, model = description["pool"], description.get("model")
    for name, value in (("fingerprint", description["fingerprint"]), ("pool", "" if pool is None else pool)):
        if not isinstance(value, str) or not value.isprintable() or len(value) > _MOST_NAME:
            raise ValueError(f"its {name} is {brief(repr(value))}")
    if not isinstance(model, dict | None) or not all(isinstance(said, str | None) for said in (model or {}).values()):
        raise ValueError(f"its model is {brief(repr(model))}")
    for name in ("input", "plan", "tokenizer"):
        if not isinstance(description.get(name), dict | None):
            raise ValueError(f"its {name} is {brief(repr(description[name]))}")
    parse_kept(description.get("plan"))
    if POSITIONS in description["sites"]:
        raise ValueError(f"a site is named {POSITIONS!r}, which is the name of another tensor")


def _check_sites(sites: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the sites in `store.json`; raises KeyError, TypeError or ValueError."""
    if not isinstance(sites, dict):
        raise TypeError(f"sites are {type(sites).__name__}, not an object")
    if len(sites) > MOST_SITES:
        raise ValueError(f"{len(sites):,} sites; at most {MOST_SITES:,} are read")
    for site, said in sites.items():
        _check_site(site, said)


def _check_site(site: str, said: Mapping[str, Any]) -> None:
    """Check one site in `store.json`; raises KeyError, TypeError or ValueError."""
    kind, dtype, width = said["kind"], said["dtype"], said["width"]
    name = brief(repr(site))
    if not site.isprintable() or len(site) > _MOST_NAME:
        raise ValueError(f"{name} is no name of a site: it is too long, or holds control characters")
    is_known = kind in ("token", "example", "attention") and isinstance(dtype, str) and dtype in _DTYPES
    if not is_known or type(width) is not int or not 0 <= width <= _MOST_WIDTH:
        raise ValueError(
            f"{name} is of kind {brief(repr(kind))}, dtype {brief(repr(dtype))}, width {brief(repr(width))}"
        )
    if kind == "attention" and dtype == "int8":
        raise ValueError(f"{name} is of kind 'attention' and dtype 'int8', which has no scale there")
