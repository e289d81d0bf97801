"""One unit ahead, in order, and what goes wrong in the thread is heard."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from layerprobe.errors import InputError
from layerprobe.extract import ahead
from layerprobe.extract.ahead import make_first, prepare_ahead
from layerprobe.extract.cutting import Unit


def _units(count: int, fails_at: int | None = None) -> Iterator[Unit]:
    for number in range(count):
        if number == fails_at:
            raise InputError("line 7 is not UTF-8")
        yield Unit(number, number, [])


def test_units_come_in_order_each_made_ready_while_the_last_is_run() -> None:
    began = [threading.Event() for _ in range(6)]

    def prepare(unit: Unit) -> tuple[int, str] | None:
        began[unit.number].set()
        return None if unit.number == 2 else (unit.number, "ready")

    seen = []
    for number, prepared in enumerate(prepare_ahead(_units(5), prepare)):
        if number < 4:
            assert began[number + 1].wait(30)  # while this one is held
        assert not began[min(5, number + 2)].is_set()
        seen.append(prepared)
    assert seen == [(0, "ready"), (1, "ready"), None, (3, "ready"), (4, "ready")]


def test_a_failure_of_the_input_is_raised_where_its_unit_would_come() -> None:
    taken = prepare_ahead(_units(5, fails_at=2), lambda unit: unit.number)
    assert [next(taken), next(taken)] == [0, 1]
    with pytest.raises(InputError, match="line 7 is not UTF-8"):
        next(taken)


def test_a_failure_of_making_ready_is_raised_where_its_unit_would_come() -> None:
    taken = prepare_ahead(_units(5), lambda unit: 6 // (2 - unit.number))
    assert [next(taken), next(taken)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(taken)


def test_a_run_that_ends_early_leaves_no_thread() -> None:
    for number in prepare_ahead(_units(5), lambda unit: unit.number):
        if number == 1:
            break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("layerprobe-ahead")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
# Python 3.12 and later warn of a fork beside threads
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("fails", [False, True])
def test_a_process_that_the_input_forks_does_not_outlive_what_it_did_there(
    fails: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    children = []

    def units() -> Iterator[Unit]:
        for unit in _units(3):
            if unit.number == 1:
                children.append(os.fork())
                if fails and not children[0]:
                    raise InputError("line 7 is not UTF-8")
            yield unit

    assert list(prepare_ahead(units(), lambda unit: unit.number)) == [0, 1, 2]
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(children[0], os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(children[0], signal.SIGKILL)
    assert ended[0] == children[0] and os.waitstatus_to_exitcode(ended[1]) == 1
    assert ("InputError: line 7" in capfd.readouterr().err) == fails


def test_of_a_large_unit_only_the_first_batches_are_made_before_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_MOST_TOKENS", 100)
    made: list[int] = []

    def make() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            yield number

    batches = make_first(make(), lambda _: 40)
    assert made == [0, 1, 2]
    assert list(batches) == made == list(range(6))
    assert list(make_first(make(), lambda _: 1)) == list(range(6))
    assert list(make_first(iter([]), lambda _: 1)) == []
