"""The content of `index.json`: the shards and their totals. It is written last; its presence means complete.

It is read without trusting it. Must never know of sites.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from layerprobe.errors import FormatError, StoreError
from layerprobe.store.format import INDEX_FILE, STORE_FILE, checksum_file
from layerprobe.store.guard import MOST_COUNT, MOST_ROWS, MOST_SHARDS, brief
from layerprobe.store.headers import FORMAT_VERSION, ShardHeader, parse_shard_name
from layerprobe.store.places import Place, find_place

__all__ = ["ShardInfo", "check_apart", "check_index", "commit_index", "parse_index", "sum_headers"]


@dataclass(frozen=True)
class ShardInfo:
    """What the index or, without one, the header says of a shard."""

    file: str
    first_example: int
    num_examples: int
    num_tokens: int


def commit_index(where: Path | Place, headers: Iterable[ShardHeader]) -> None:
    """Write `index.json`, the last file of a store: its presence means complete.

    Raises:
        StoreError: it names more shards than a reader accepts, or cannot be written.
    """
    place, headers = find_place(where), sorted(headers, key=lambda header: header.unit)
    if len(headers) > MOST_SHARDS:
        raise StoreError(
            f"{place.label(INDEX_FILE)}: cannot be written ({len(headers):,} shards; at most "
            f"{MOST_SHARDS:,} are read). Ask for larger shards."
        )
    index = {
        "format": FORMAT_VERSION,
        "store_checksum": checksum_file(place, STORE_FILE),
        **sum_headers(headers),
        "shards": [
            {
                "file": header.file,
                "first_example": header.first_example,
                "examples": header.num_examples,
                "tokens": header.num_tokens,
            }
            for header in headers
        ],
    }
    place.commit(INDEX_FILE, [json.dumps(index, indent=1).encode()])


def sum_headers(headers: Sequence[ShardHeader]) -> dict[str, Any]:
    """Compute the totals over all shards for `index.json`."""
    nonfinite: Counter[str] = Counter()
    for header in headers:
        nonfinite.update(header.nonfinite)
    return {
        "examples": sum(header.num_examples for header in headers),
        "tokens": sum(header.num_tokens for header in headers),
        "truncated": sum(header.num_truncated for header in headers),
        "nonfinite": dict(nonfinite),
    }


def parse_index(label: str, index: Mapping[str, Any]) -> list[ShardInfo]:
    """Parse the shards that an index names.

    Raises:
        FormatError: an entry does not name a shard with valid counts, or shards and totals contradict each other.
    """
    shards: list[ShardInfo] = []
    named = index.get("shards")
    for said in named if isinstance(named, list) else [None]:
        found: dict[str, Any] = said if isinstance(said, dict) else {}
        file = found.get("file")
        counts: list[Any] = [found.get(key) for key in ("first_example", "examples", "tokens")]
        if not all(type(count) is int and 0 <= count <= MOST_COUNT for count in counts):
            raise FormatError(f"{label}: is damaged: {brief(repr(said))} does not name a shard and its counts.")
        if not isinstance(file, str) or parse_shard_name(file) is None:
            raise FormatError(f"{label}: {brief(repr(file))} is not the name of a shard.")
        shards.append(ShardInfo(file, *counts))
    check_index(label, index, shards)
    lost, cut = index.get("nonfinite", {}), index.get("truncated", 0)
    sums = [cut, *lost.values()] if isinstance(lost, dict) else [None]
    if not all(type(count) is int and count >= 0 for count in sums):
        raise FormatError(f"{label}: is damaged: its truncated or nonfinite are no counts.")
    if sum(shard.num_examples + shard.num_tokens for shard in shards) > MOST_ROWS:
        raise FormatError(f"{label}: claims more than {MOST_ROWS:,} rows, which no store holds.")
    return shards


def check_apart(place: str, shards: Sequence[ShardInfo]) -> None:
    """Check that no two shards of an unfinished store hold the same example.

    Raises:
        FormatError: two do.
    """
    ordered = sorted(shards, key=lambda shard: (shard.first_example, shard.num_examples))
    for one, other in pairwise(ordered):
        if one.first_example + one.num_examples > other.first_example:
            raise FormatError(f"{place}: {one.file} and {other.file} both hold example {other.first_example}.")


def check_index(label: str, index: Mapping[str, Any], shards: Sequence[ShardInfo]) -> None:
    """Check that an index names shards without a gap or duplicate, and that its counts add up.

    Raises:
        FormatError: it does not.
    """
    if len({shard.file for shard in shards}) != len(shards):
        raise FormatError(f"{label}: is damaged: it names a shard twice.")
    place = 0
    for shard in sorted(shards, key=lambda shard: shard.first_example):
        if shard.first_example != place:
            raise FormatError(f"{label}: is damaged: no shard has example {place}.")
        place += shard.num_examples
    if (place, sum(shard.num_tokens for shard in shards)) != (index.get("examples"), index.get("tokens")):
        raise FormatError(f"{label}: is damaged: its shards do not add up to the counts that it says.")
