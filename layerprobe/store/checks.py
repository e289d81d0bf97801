"""Check the tokenizer or a shard of a store against itself and `store.json`.

A shard is read in pieces, so that memory is bounded whatever a header claims. Problems are raised as FormatError.

Must never know of the other shards, or of how damage is handled.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from layerprobe.errors import FormatError
from layerprobe.store.description import StoredSite
from layerprobe.store.fingerprint import hash_tokenizer
from layerprobe.store.format import STORE_FILE, TOKENIZER_FILE, load_header, read_bounded
from layerprobe.store.guard import LARGE, brief
from layerprobe.store.headers import POSITIONS, ShardHeader, check_stored
from layerprobe.store.kept import Kept, parse_kept
from layerprobe.store.places import Place
from layerprobe.store.shards import count_pairs, read_order
from layerprobe.store.tokenizer import load_tokenizer, parse_tokenizer
from layerprobe.tables import format_count

__all__ = [
    "Wanted",
    "check_shard",
    "check_tokenizer",
    "read_totals",
    "tell",
]

# A multiple of every item size, so that each piece of ids holds whole ids.
_PIECE_BYTES = 8 << 20
_ADVICE = re.compile(r"\. (Remove|Give|The file|Run|A store holds).*", re.DOTALL)


@dataclass(frozen=True)
class Wanted:
    """What `store.json` and the tokenizer require of shards; None for what they do not say, or if they cannot be read.

    Args:
        fingerprint: Fingerprint of the run.
        sites: How each site is stored.
        num_units, num_examples: Counts of the whole store.
        lowest_id, highest_id: Range of the tokenizer's ids; -1 stands for a row without a token.
        kept: Which rows are kept; None for all.
    """

    fingerprint: str | None = None
    sites: tuple[StoredSite, ...] | None = None
    num_units: int | None = None
    num_examples: int | None = None
    lowest_id: int = -1
    highest_id: int | None = None
    kept: Kept | None = None

    @classmethod
    def from_description(cls, description: Mapping[str, Any], highest_id: int | None) -> "Wanted":
        """Derive it from a description that has been checked."""
        sites = tuple(StoredSite.from_description(name, said) for name, said in description["sites"].items())
        num_units, num_examples = read_totals(description)
        # a Probe keeps no tokenizer, and its model may be called with embeddings, which have no ids
        lowest_id = -1 if description.get("tokenizer") is None else 0
        kept = parse_kept(description.get("plan"))
        return cls(description["fingerprint"], sites, num_units, num_examples, lowest_id, highest_id, kept)


def read_totals(description: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return how many units and examples a store is to have; None for what `store.json` does not say."""
    found: list[int | None] = []
    for section, key in (("plan", "units"), ("input", "examples")):
        said = description.get(section)
        value = said.get(key) if isinstance(said, dict) else None
        found.append(value if type(value) is int else None)
    return found[0], found[1]


def tell(place: Place, file: str, error: Exception) -> str:
    """Describe an error without the file's name, and without advice, which the report gives once."""
    return _ADVICE.sub("", brief(str(error).removeprefix(f"{place.label(file)}: "))).rstrip(".")


def check_tokenizer(place: Place, said: Mapping[str, Any]) -> int:
    """Load the tokenizer as a reader does, and check it against `store.json`.

    Returns:
        Its highest id.

    Raises:
        FormatError: it does not exist, is not a tokenizer, or is another one.
    """
    label = place.label(TOKENIZER_FILE)
    if not place.exists(TOKENIZER_FILE):
        raise FormatError(f"{label}: is not there.")
    data = read_bounded(place, TOKENIZER_FILE, LARGE)
    rules = parse_tokenizer(label, data)
    # before the native parser sees the file
    if said.get("hash") not in (None, found := hash_tokenizer(rules)):
        raise FormatError(f"{label}: its hash is {found}, {STORE_FILE} says {brief(said['hash'])}.")
    tokenizer = load_tokenizer(label, data, rules)
    # ids may have gaps
    return max([tokenizer.get_vocab_size(with_added_tokens=True) - 1, *tokenizer.get_vocab().values()])


def check_shard(place: Place, file: str, wanted: Wanted, advance: Callable[[int], object]) -> ShardHeader:
    """Read every byte of a shard and check it against its header and `store.json`.

    Args:
        place, file: The shard's location.
        wanted: What is required of it.
        advance: Called with the number of bytes of each piece read.

    Raises:
        FormatError: it is damaged.
        StoreError: it cannot be read.
    """
    header = load_header(place, file)
    if wanted.fingerprint is not None and header.fingerprint != wanted.fingerprint:
        raise FormatError(f"belongs to another run than {STORE_FILE}")
    _check_contents(place, header, wanted, advance)
    return header


def _check_contents(place: Place, header: ShardHeader, wanted: Wanted, advance: Callable[[int], object]) -> None:
    """Read the tensors of a shard, each byte once, and check them against the header and `store.json`."""
    damaged: list[str] = []
    kept: dict[str, Tensor] = {}
    lowest, highest = 0, -1
    for name, entry in sorted(header.tensors.items(), key=lambda item: item[1].start):
        digest, pieces = xxhash.xxh3_64(), []
        for piece in _read_pieces(place, header.file, entry.start, entry.stop, advance):
            digest.update(piece)
            is_needed = name == "input_ids" and wanted.kept is not None
            if is_needed or name in ("example", "offsets", "record_offsets", POSITIONS):
                pieces.append(piece)
            if name == "input_ids":
                ids = np.frombuffer(piece, dtype="<i8")
                lowest, highest = min(lowest, int(ids.min())), max(highest, int(ids.max()))
        if pieces and entry.dtype == torch.int64:
            kept[name] = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.int64)
        if digest.hexdigest() != header.checksums[name]:
            damaged.append(name)
    if damaged:
        listed = ", ".join(brief(repr(name)) for name in damaged[:3]) + (", ..." if len(damaged) > 3 else "")
        raise FormatError(f"the bytes of {listed} are not those that were written")
    empty = torch.empty(0, dtype=torch.int64, device="cpu")
    offsets = kept.get("offsets", empty)
    read_order(place.label(header.file), header, kept.get("example", empty), offsets)
    _check_records(header, kept.get("record_offsets", empty))
    if POSITIONS in header.tensors:
        _check_positions(kept.get(POSITIONS, empty), offsets)
    if wanted.kept is not None:
        _check_kept(header, wanted.kept, {"offsets": offsets, **kept})
    if lowest < wanted.lowest_id or (wanted.highest_id is not None and highest > wanted.highest_id):
        raise FormatError(
            f"has ids from {lowest} to {highest}; the tokenizer has {wanted.lowest_id} to {wanted.highest_id}"
        )
    if wanted.sites is not None:
        _check_sites(header, wanted.sites, count_pairs(offsets)[-1])


def _read_pieces(place: Place, file: str, start: int, stop: int, advance: Callable[[int], object]) -> Iterator[bytes]:
    for first in range(start, stop, _PIECE_BYTES):
        piece = place.read(file, first, min(first + _PIECE_BYTES, stop))
        advance(len(piece))
        yield piece


def _check_positions(positions: Tensor, offsets: Tensor) -> None:
    """Check that the positions of the kept rows are at least 0 and ascend within each example."""
    is_first = torch.zeros(len(positions) + 1, dtype=torch.bool, device="cpu").index_fill_(0, offsets, True)[:-1]
    rises = torch.cat([positions[:1] >= 0, positions.diff() > 0])
    if not bool(torch.where(is_first, positions >= 0, rises).all()):
        raise FormatError(f"its {POSITIONS} do not rise in each example")


def _check_kept(header: ShardHeader, rule: Kept, columns: Mapping[str, Tensor]) -> None:
    """Check that the run keeps every stored row; whether one is missing could only be told from the texts."""
    if POSITIONS not in header.tensors:
        raise FormatError(f"has no {POSITIONS}; {STORE_FILE} says that it keeps {rule}")
    if not header.num_tokens:
        return
    ordinals = columns["example"].repeat_interleave(columns["offsets"].diff())
    is_kept = rule.allows(columns["input_ids"].numpy(), ordinals.numpy(), columns[POSITIONS].numpy())
    if not is_kept.all():
        row = int(is_kept.argmin())
        raise FormatError(
            f"row {row} is of token {int(columns[POSITIONS][row])} of example {int(ordinals[row])}; {STORE_FILE} says "
            f"that it keeps {rule}"
        )


def _check_records(header: ShardHeader, offsets: Tensor) -> None:
    """Check that records, if there are any, lie back to back, one per example."""
    there = header.tensors.keys() & {"record_offsets", "records"}
    if not there:
        return
    if len(there) < 2 or header.tensors["records"].dtype != torch.uint8:
        raise FormatError("has records without their offsets, or offsets without records")
    (size,) = header.tensors["records"].shape or (0,)
    is_rising = len(offsets) == header.num_examples + 1 and bool((offsets.diff() >= 0).all())
    if not is_rising or int(offsets[0]) != 0 or int(offsets[-1]) != size:
        raise FormatError(
            f"its record_offsets do not rise from 0 to {size} in {format_count(header.num_examples, 'step')}"
        )


def _check_sites(header: ShardHeader, sites: Sequence[StoredSite], num_pairs: int) -> None:
    """Check the dtype and shape of every tensor, and that none is missing or unknown."""
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for site in sites:
        wanted |= site.layout(header, num_pairs)
    try:
        check_stored(header, wanted)
    except ValueError as error:
        raise FormatError(str(error)) from error
    own = {"example", "offsets", "input_ids", "record_offsets", "records", POSITIONS}
    unknown = sorted(
        (header.tensors.keys() - own - wanted.keys()) | (header.nonfinite.keys() - {s.name for s in sites})
    )
    if unknown:
        raise FormatError(f"{STORE_FILE} does not know {brief(repr(unknown[0]))}")
