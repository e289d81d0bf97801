"""What is to be classified: which value belongs to which example, and which values are none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import layerprobe as lp
from layerprobe.analysis.tasks import make_task
from layerprobe.errors import OptionError
from layerprobe.store.reader import Store
from planting import IndexedColumn, plant

COUNT = 40


@pytest.fixture
def store(tmp_path: Path) -> Store:
    rows = torch.randn(2 * COUNT, 3, generator=torch.Generator().manual_seed(0))
    return lp.open(plant(tmp_path / "acts", {"layers.0": rows}, [2] * COUNT, ids=torch.arange(2 * COUNT)))


def test_a_column_of_a_mixed_or_filtered_table_is_read_in_its_order(store: Store) -> None:
    values: list[Any] = ["ab"[place * 7 % 5 % 2] for place in range(COUNT)]
    sides = ["train" if place % 3 else "test" for place in range(COUNT)]
    mixed = np.random.default_rng(0).permutation(COUNT).tolist()
    for labels in (mixed, range(100, 100 + 3 * COUNT, 3)):
        column: Any = IndexedColumn(values, labels)
        task = make_task(store, column, split=IndexedColumn(sides, labels))  # type: ignore[arg-type]
        assert [task.classes[one] for one in task.labels] == values
        assert [bool(side == 2) for side in task.sides] == [one == "test" for one in sides]
    groups: Any = IndexedColumn([place // 8 for place in range(COUNT)], mixed)
    by_group = make_task(store, values, group=groups).sides
    assert all(len(set(by_group[first : first + 8].tolist())) == 1 for first in range(0, COUNT, 8))


def test_drawn_examples_keep_their_own_values(store: Store) -> None:
    values = [place % 2 for place in range(COUNT)]
    column: Any = IndexedColumn(values, range(COUNT, 2 * COUNT))
    task = make_task(store, column, max_examples=20)
    assert len(task.labels) == 20
    assert [task.classes[one] for one in task.labels] == [values[one] for one in task.examples.tolist()]


def test_values_without_an_order_are_refused(store: Store) -> None:
    by_ordinal: Any = {place: place % 2 for place in range(COUNT)}
    with pytest.raises(OptionError, match="group: a dict has no order"):
        make_task(store, [0, 1] * 20, group=by_ordinal)
