"""What watching costs: every way is run, in turns, and nothing of it stays. No time is asserted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from layerprobe.cost.comparison import Comparison, compare
from layerprobe.errors import OptionError


def test_every_way_runs_as_often_and_leaves_nothing(
    make_bert: Callable[..., Any], batch: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = make_bert()
    calls: list[bool] = []
    handle = model.register_forward_pre_hook(
        lambda *given: calls.append("output_hidden_states" in given[2]), with_kwargs=True
    )
    found = compare(model, batch, repeats=2)
    handle.remove()
    assert list(found.seconds) == ["bare", "hooks", "hidden_states", "memory", "store"]
    assert all(len(taken) == 2 for taken in found.seconds.values())
    # two to learn how long one takes, then a round to warm up and two more
    assert len(calls) == 2 + 3 * 5 * found.num_calls and sum(calls) == 3 * found.num_calls
    assert not list(tmp_path.rglob("store.json")) and not list(tmp_path.rglob("*.safetensors"))
    # transformers leaves hooks of its own behind; a module with one of ours would have a __getstate__
    assert not any("__getstate__" in module.__dict__ for module in model.modules())


def test_ratios_are_of_neighbours_in_time(tmp_path: Path) -> None:
    found = Comparison({"bare": (1.0, 2.0, 4.0), "store": (2.0, 3.0, 4.4)}, 7)
    assert found.ratio("bare") == 1.0
    assert found.ratio("store") == pytest.approx(1.5)
    assert "3000.0" in str(found) and "medians of 3 rounds of 7 forwards" in str(found)
    document = json.loads(found.to_json(tmp_path / "compared.json"))
    assert document == json.loads((tmp_path / "compared.json").read_text())
    assert document["seconds"]["store"] == [2.0, 3.0, 4.4] and document["ratios"]["store"] == pytest.approx(1.5)


def test_another_comparison_is_refused(make_bert: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    with pytest.raises(OptionError, match="compare 'attentions': use hidden_states"):
        compare(make_bert(), batch, "attentions")
