"""What sinks say that they can do; those of users say nothing, and need not."""

from typing import Any

import pytest
import torch

import layerprobe as lp
from layerprobe.capture.abilities import abilities_of
from layerprobe.capture.sinks import CallableSink, MemorySink
from layerprobe.capture.stagesink import StageSink


class Own:
    """What a user writes: the six methods, and an attribute that happens to have the name of an ability."""

    copies_at_once = True

    def open(self, sites: Any) -> None: ...
    def begin(self, call: Any) -> None: ...
    def receive(self, call: Any, index: int, value: torch.Tensor) -> None: ...
    def finish(self, call: Any) -> None: ...
    def abandon(self, call: Any) -> None: ...
    def close(self, error: Any) -> None: ...


@pytest.mark.parametrize("sink", [Own(), CallableSink(print)], ids=["a sink of one's own", "a callable"])
def test_a_sink_that_says_nothing_can_do_nothing_more_than_take_values(sink: Any) -> None:
    able = abilities_of(sink)
    assert not (able.copies_at_once or able.forgets_abandoned or able.keeps_gradients or able.packs_rows)
    assert able.make_outlet(torch.nn.Identity(), torch.device("cpu"), []) is None
    able.announce_examples([0])
    with pytest.raises(NotImplementedError):
        able.receive_rows(None, 0, torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError):
        able.attach(0, torch.zeros(1))


def test_sinks_of_layerprobe_say_what_they_can_do() -> None:
    stage = StageSink(lp.Stage(8), None, torch.nn.Linear(1, 1))
    sinks: list[Any] = [MemorySink(), MemorySink(gradients=True), lp.Moments(), stage]
    assert all(abilities_of(sink) is sink for sink in sinks)
    assert [sink.keeps_gradients for sink in sinks] == [False, True, False, False]
    assert [sink.copies_at_once for sink in sinks] == [False, False, True, False]
    assert [sink.forgets_abandoned for sink in sinks] == [True, True, False, False]
    assert stage.make_outlet(torch.nn.Identity(), torch.device("cpu"), []) is not None
