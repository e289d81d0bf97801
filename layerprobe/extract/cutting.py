"""Cut the input into units, by a rule that depends only on the texts.

Any process can therefore do any unit, and a resumed run cuts the input as the first run did. One pass over the input
counts texts, estimates sizes, and takes a fingerprint up to the end of each unit, which later identifies that unit.

Must never know of models.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from layerprobe.extract.inputs import TextSource
from layerprobe.extract.records import InputDigest, Record
from layerprobe.store.kept import Kept

__all__ = ["MOST_UNIT_TOKENS", "Survey", "Unit", "UnitRule", "survey_input"]

# Upper bounds of a unit, even if few of its rows are kept: an interrupted run recomputes the whole unit. Both double
# after every `_UNITS_PER_DOUBLING` units, so the half a million shards of a store can hold trillions of tokens.
_MOST_UNIT_EXAMPLES = 1 << 16
MOST_UNIT_TOKENS = 1 << 20
_UNITS_PER_DOUBLING = 1 << 16


@dataclass(frozen=True)
class UnitRule:
    """The rule that cuts the input into units, by estimating tokens and bytes on disk from each text alone.

    Without `unit_tokens` it cuts as older versions did, which neither counted tokens nor doubled the bounds.
    """

    row_bytes: int
    example_bytes: int
    pair_bytes: int
    shard_bytes: int
    max_length: int
    text_bytes_per_token: float
    kept: Kept | None = None
    unit_tokens: int | None = MOST_UNIT_TOKENS

    def estimate_tokens(self, text_bytes: int) -> int:
        """Estimate the tokens of a text, including two special tokens."""
        return min(self.max_length, 2 + round(text_bytes / self.text_bytes_per_token))

    def cost(self, tokens: int) -> int:
        """Return the estimated bytes on disk of a text's values and ids."""
        rows, own_bytes = (tokens, 8) if self.kept is None else (self.kept.estimate(tokens), 16)
        return round(rows * (self.row_bytes + own_bytes)) + tokens * tokens * self.pair_bytes + self.example_bytes

    def cut(self, records: Iterator[Record]) -> Iterator["Unit"]:
        """Cut records into units."""
        members: list[Record] = []
        first = number = size = num_tokens = value_bytes = 0
        for record in records:
            text_bytes = len(record.text.encode(errors="surrogatepass"))
            tokens = self.estimate_tokens(text_bytes)
            # the text is stored in the shard too, with 24 bytes of offsets; in a pooled store that is most of the size
            own_cost = self.cost(tokens)
            cost = own_cost + text_bytes + 24
            doublings = 0 if self.unit_tokens is None else number // _UNITS_PER_DOUBLING
            most_tokens = math.inf if self.unit_tokens is None else self.unit_tokens << doublings
            is_full = size + cost > self.shard_bytes or len(members) == _MOST_UNIT_EXAMPLES << doublings
            if members and (is_full or num_tokens + tokens > most_tokens):
                yield Unit(number, first, members, num_tokens, value_bytes, is_bound_by_tokens=not is_full)
                first, number, members = first + len(members), number + 1, []
                size = num_tokens = value_bytes = 0
            members.append(record)
            size += cost
            num_tokens += tokens
            value_bytes += own_cost
        if members:
            yield Unit(number, first, members, num_tokens, value_bytes)


@dataclass(frozen=True, eq=False)
class Unit:
    """The consecutive examples that become one shard.

    Args:
        number, first_example: Index of the unit, and of its first example.
        records: Its examples.
        num_tokens, value_bytes: Estimated tokens, and bytes on disk without the texts; 0 if no rule cut the unit.
        is_bound_by_tokens: Whether the token limit alone ended the unit.
    """

    number: int
    first_example: int
    records: list[Record]
    num_tokens: int = 0
    value_bytes: int = 0
    is_bound_by_tokens: bool = False


@dataclass(frozen=True)
class Survey:
    """Counts and size estimates from one pass over the whole input.

    `is_bound_by_tokens` says whether versions that did not count tokens would have cut other units.
    """

    num_examples: int
    num_tokens: int
    value_bytes: int
    record_bytes: int
    digests: tuple[bytes, ...]
    is_bound_by_tokens: bool


def survey_input(source: TextSource, rule: UnitRule) -> Survey:
    """Count and estimate the whole input in one pass, and fingerprint it up to the end of each unit."""
    digest = InputDigest(source.name)
    digests: list[bytes] = []
    num_examples = num_tokens = value_bytes = record_bytes = 0
    is_bound_by_tokens = False
    for unit in rule.cut(iter(source)):
        is_bound_by_tokens |= unit.is_bound_by_tokens or len(unit.records) > _MOST_UNIT_EXAMPLES
        for record in unit.records:
            record_bytes += digest.add(record)
        num_examples += len(unit.records)
        num_tokens += unit.num_tokens
        value_bytes += unit.value_bytes
        digests.append(digest.digest())
    return Survey(num_examples, num_tokens, value_bytes, record_bytes, tuple(digests), is_bound_by_tokens)
