"""The draw of rows is the one that the format page gives, and has the share that was asked for."""

import itertools

import numpy as np
import pytest

from layerprobe.errors import OptionError
from layerprobe.store.kept import Kept, check_kept, draw, parse_kept

MASK = 2**64 - 1


def mix_slowly(value: int) -> int:
    """A second implementation, in Python's own whole numbers."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def test_the_mixing_is_that_of_splitmix64() -> None:
    # the first value of the published generator from seed 0
    assert mix_slowly(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("keep", [0.001, 0.05, 0.5, 0.999])
def test_the_draw_is_that_of_a_slow_second_implementation(keep: float) -> None:
    ordinals = [0, 1, 2, 2**31, 2**32 + 1, 10**12]
    pairs = list(itertools.product(ordinals, range(300)))
    drawn = draw(np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs]), keep)
    slow = [mix_slowly((mix_slowly(ordinal) + position) & MASK) < int(keep * 2**64) for ordinal, position in pairs]
    assert drawn.tolist() == slow


@pytest.mark.parametrize("keep", [0.01, 0.05, 0.3])
def test_the_share_is_what_was_asked_for_in_any_direction(keep: float) -> None:
    ordinals, positions = np.repeat(np.arange(2000), 500), np.tile(np.arange(500), 2000)
    table = draw(ordinals, positions, keep).reshape(2000, 500)
    # six standard deviations of a binomial: the draw is fixed, so this never flickers
    for share, count in ((table.mean(), table.size), *((one, 2000) for one in table.mean(0))):
        assert abs(share - keep) < 6 * (keep * (1 - keep) / count) ** 0.5
    counts = table.sum(1)
    assert abs(counts.var() / (500 * keep * (1 - keep)) - 1) < 0.2  # examples are drawn apart from each other


def test_a_smaller_share_is_a_part_of_a_larger_one() -> None:
    ordinals, positions = np.repeat(np.arange(50), 100), np.tile(np.arange(100), 50)
    small, large = draw(ordinals, positions, 0.05), draw(ordinals, positions, 0.2)
    assert small.any() and not (small & ~large).any()


def pack(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([one for own in ids for one in own], dtype=np.int32), np.cumsum([0, *map(len, ids)])


def test_kinds_of_tokens_are_what_they_say() -> None:
    ids = [[1, 7, 8, 2], [1, 2], [], [7, 1]]
    wanted = {
        "first": ((), [[0], [0], [], [0]]),
        "cls": ((1,), [[0], [0], [], [1]]),
        "special": ((1, 2), [[0, 3], [0, 1], [], [1]]),
        "nonspecial": ((1, 2), [[1, 2], [], [], [0]]),
        "all": ((), [[0, 1, 2, 3], [0, 1], [], [0, 1]]),
    }
    for tokens, (own, positions) in wanted.items():
        rows = Kept(tokens, 1.0, own).choose(*pack(ids), range(4))
        assert [rows.of(member).tolist() for member in range(4)] == positions, tokens


def test_a_share_is_drawn_among_the_tokens_that_are_meant() -> None:
    ids = [[1, *range(10, 200), 2]] * 20
    drawn, all_drawn = (
        Kept(tokens, 0.1, (1, 2)).choose(*pack(ids), range(100, 120)) for tokens in ("nonspecial", "all")
    )
    for member in range(20):
        inner = [position for position in all_drawn.of(member).tolist() if position not in (0, 191)]
        assert drawn.of(member).tolist() == inner


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, float("nan"), True, "0.5", 1e-30])
def test_a_share_that_cannot_be_is_refused(keep: object) -> None:
    with pytest.raises(OptionError, match=r"keep is .*from 2\*\*-64 to 1"):
        check_kept("all", keep)


def test_a_kind_of_token_that_does_not_exist_is_refused() -> None:
    with pytest.raises(OptionError, match="no tokens 'last' to keep: use all, first, cls, special, nonspecial"):
        check_kept("last", 1.0)


@pytest.mark.parametrize(
    "said",
    [{}, [], {"tokens": "all", "keep": 2, "ids": []}, {"tokens": "all", "keep": 0.5, "ids": [-1]},
     {"tokens": "all", "keep": 0.5, "ids": [0] * 2000}, {"tokens": "few", "keep": 0.5, "ids": []}],
)  # fmt: skip
def test_what_a_damaged_store_says_is_refused(said: object) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        parse_kept({"kept": said})


def test_what_is_said_is_read_back() -> None:
    kept = Kept("nonspecial", 0.05, (1, 2))
    assert parse_kept({"kept": kept.describe()}) == kept and parse_kept({}) is None and parse_kept(None) is None
