"""How the input is cut into units, by a rule that looks at the texts alone.

Any process can therefore do any unit, and a resumed run cuts as the one before it did. One pass over the input
counts, estimates, and takes a fingerprint up to the end of each unit, by which a unit is known again.

Must never know of models.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from layerprobe.extract.inputs import InputDigest, Record, TextSource
from layerprobe.store.kept import Kept

__all__ = ["Survey", "Unit", "UnitRule", "survey_input"]

_MOST_UNIT_EXAMPLES = 65536


@dataclass(frozen=True)
class UnitRule:
    """How the input is cut into units: by an estimate of each text's bytes on disk, made from the text alone."""

    row_bytes: int
    example_bytes: int
    pair_bytes: int
    shard_bytes: int
    max_length: int
    text_bytes_per_token: float
    kept: Kept | None = None

    def estimate_tokens(self, text_bytes: int) -> int:
        """Estimate the tokens of a text, two special ones included."""
        return min(self.max_length, 2 + round(text_bytes / self.text_bytes_per_token))

    def cost(self, tokens: int) -> int:
        """Bytes on disk of a text's values and ids."""
        rows, own_bytes = (tokens, 8) if self.kept is None else (self.kept.estimate(tokens), 16)
        return round(rows * (self.row_bytes + own_bytes)) + tokens * tokens * self.pair_bytes + self.example_bytes

    def cut(self, records: Iterator[Record]) -> Iterator["Unit"]:
        """Cut records into units."""
        members: list[Record] = []
        first = number = size = 0
        for record in records:
            text_bytes = len(record.text.encode())
            tokens = self.estimate_tokens(text_bytes)
            # the text goes into the shard too, with 24 bytes of places: most of a pooled store
            cost = self.cost(tokens) + text_bytes + 24
            if members and (size + cost > self.shard_bytes or len(members) == _MOST_UNIT_EXAMPLES):
                yield Unit(number, first, members)
                first, number, size, members = first + len(members), number + 1, 0, []
            members.append(record)
            size += cost
        if members:
            yield Unit(number, first, members)


@dataclass(frozen=True, eq=False)
class Unit:
    """The run of consecutive examples that becomes one shard."""

    number: int
    first_example: int
    records: list[Record]


@dataclass(frozen=True)
class Survey:
    """What going through the whole input once tells of it; sizes are estimates."""

    num_examples: int
    num_tokens: int
    value_bytes: int
    record_bytes: int
    digests: tuple[bytes, ...]


def survey_input(source: TextSource, rule: UnitRule) -> Survey:
    """Go through the whole input once: count, estimate, and take its fingerprint, up to each unit and as a whole."""
    digest = InputDigest(source.name)
    digests: list[bytes] = []
    num_examples = num_tokens = value_bytes = record_bytes = 0
    for unit in rule.cut(iter(source)):
        for record in unit.records:
            record_bytes += digest.add(record)
            num_examples += 1
            tokens = rule.estimate_tokens(len(record.text.encode()))
            num_tokens += tokens
            value_bytes += rule.cost(tokens)
        digests.append(digest.digest())
    return Survey(num_examples, num_tokens, value_bytes, record_bytes, tuple(digests))
