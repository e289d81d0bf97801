"""One unit ahead, in order, and what goes wrong in the thread is heard."""

import threading
from collections.abc import Iterator

import pytest

from layerprobe.errors import InputError
from layerprobe.extract.ahead import tokenize_ahead
from layerprobe.extract.cutting import Unit
from layerprobe.extract.tokens import TokenizedUnit


def _units(count: int, fails_at: int | None = None) -> Iterator[Unit]:
    for number in range(count):
        if number == fails_at:
            raise InputError("line 7 is not UTF-8")
        yield Unit(number, number, [])


def test_units_come_in_order_each_tokenised_while_the_last_is_run() -> None:
    began = [threading.Event() for _ in range(6)]

    def tokenize(unit: Unit) -> TokenizedUnit | None:
        began[unit.number].set()
        return None if unit.number == 2 else TokenizedUnit.of([[unit.number]])

    seen = []
    for unit, tokenized in tokenize_ahead(_units(5), tokenize):
        if unit.number < 4:
            assert began[unit.number + 1].wait(30)  # while this one is held
        assert not began[min(5, unit.number + 2)].is_set()
        seen.append((unit.number, None if tokenized is None else tokenized.ids.tolist()))
    assert seen == [(0, [0]), (1, [1]), (2, None), (3, [3]), (4, [4])]


def test_a_failure_of_the_input_is_raised_where_its_unit_would_come() -> None:
    taken = tokenize_ahead(_units(5, fails_at=2), lambda _: None)
    assert [next(taken)[0].number, next(taken)[0].number] == [0, 1]
    with pytest.raises(InputError, match="line 7 is not UTF-8"):
        next(taken)


def test_a_run_that_ends_early_leaves_no_thread() -> None:
    for unit, _ in tokenize_ahead(_units(5), lambda _: None):
        if unit.number == 1:
            break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("layerprobe-tokenizer")]
