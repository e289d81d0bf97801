"""When Python's garbage collector looks at what."""

import gc
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerprobe.collecting import collecting_later
from layerprobe.extract.description import describe_tokenizer


@pytest.fixture
def generations() -> Iterator[list[int]]:
    """The generation of each collection while the test runs."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


@pytest.fixture(autouse=True)
def _thawed() -> None:
    """Let nothing be kept for good, as commands have it that other tests run in this process."""
    gc.unfreeze()


def make_lists(count: int = 20_000) -> list[list[int]]:
    return [[] for _ in range(count)]


def test_nothing_is_collected_within_and_what_was_made_is_not_looked_at_after(generations: list[int]) -> None:
    gc.collect()
    del generations[:]
    with collecting_later(), collecting_later():
        kept = make_lists()
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_count()[0] < 100
    assert not generations and len(kept) == 20_000
    more = make_lists()
    assert generations and set(generations) <= {0, 1} and len(more) == 20_000


@pytest.mark.parametrize("is_enabled", [True, False])
def test_collector_is_left_as_it_was_found(is_enabled: bool) -> None:
    def fail() -> None:
        with collecting_later():
            raise KeyError

    (gc.enable if is_enabled else gc.disable)()
    try:
        with pytest.raises(KeyError):
            fail()
        assert gc.isenabled() == is_enabled
    finally:
        gc.enable()


def test_what_somebody_keeps_for_good_stays_so() -> None:
    gc.freeze()
    try:
        num_kept = gc.get_freeze_count()
        with collecting_later():
            pass
        # but for some that have gone meanwhile
        assert gc.get_freeze_count() > 0.9 * num_kept > 0
    finally:
        gc.unfreeze()


def test_describing_a_tokenizer_collects_nothing(demo: Any, generations: list[int]) -> None:
    del generations[:]
    describe_tokenizer(demo.tokenizer)
    # thirty thousand pairs are made to sort the vocabulary
    assert not generations


def test_a_command_never_looks_at_the_model_and_the_packages_that_it_loads() -> None:
    """Looking at all of them once takes as long as a hundred texts."""
    code = textwrap.dedent(
        """
        import gc, sys, tempfile
        import torch
        from layerprobe.cli.main import main

        full = []
        gc.callbacks.append(lambda phase, info: full.append(info["generation"] == 2 and len(gc.get_objects())))
        sys.argv = ["layerprobe", "extract", "demo", sys.argv[1], "-o", tempfile.mkdtemp() + "/acts", "--quiet"]
        num_before = len(gc.get_objects())
        try:
            main()
        finally:
            print(num_before, max(filter(None, full), default=0), gc.get_freeze_count(), file=sys.stderr)
        """
    )
    texts = Path(__file__).parents[1] / "docs" / "sample.txt"
    done = subprocess.run([sys.executable, "-c", code, str(texts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    num_before, most_seen, num_kept = map(int, done.stderr.split()[-3:])
    assert most_seen < 1.5 * num_before < num_kept
