"""What is to be classified: which value belongs to which example, and which values are none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import layerprobe as lp
from layerprobe.analysis.tasks import make_task
from layerprobe.errors import InputError, OptionError
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


def test_a_test_side_of_one_class_is_noted(store: Store) -> None:
    labels = ["rare" if place == 39 else "often" for place in range(COUNT)]
    sides = ["train" if place % 2 else "test" for place in range(COUNT)]
    assert make_task(store, labels, split=sides).notes == (
        "Every item of test is 'often': accuracy there tells little.",
    )
    both = ["rare" if place > 37 else "often" for place in range(COUNT)]
    assert make_task(store, both, split=sides).notes == ()


def test_values_without_an_order_are_refused(store: Store) -> None:
    by_ordinal: Any = {place: place % 2 for place in range(COUNT)}
    with pytest.raises(OptionError, match="group: a dict has no order"):
        make_task(store, [0, 1] * 20, group=by_ordinal)


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), np.float64("nan"), torch.tensor(torch.nan)])
def test_a_value_that_is_no_number_is_none(store: Store, missing: Any) -> None:
    labels: list[Any] = [missing if place == 7 else float(place % 2) for place in range(COUNT)]
    with pytest.raises(InputError, match="1 of 40 examples have none, the first is example 7"):
        make_task(store, labels)
    with pytest.raises(InputError, match="group 'given': 1 of 40 examples have none"):
        make_task(store, [0, 1] * 20, group=labels)
    of_tokens = [[place % 2, missing] for place in range(COUNT)]
    task = make_task(store, of_tokens)
    assert task.classes == (0, 1) and len(task.labels) == COUNT


def test_fields_and_labels_of_spans_that_are_no_number_are_refused(tmp_path: Path) -> None:
    texts = [f"{first} {second}" for first in ("rain", "snow", "wind") for second in ("falls", "comes", "stops")]
    records = [
        {"text": text, "y": float("nan") if place == 4 else place % 2, "from": [0], "to": [4]}
        for place, text in enumerate(texts)
    ]
    made = lp.extract("demo", records, tmp_path / "acts", sites="layers.0", progress=False)
    with pytest.raises(InputError, match="1 of 9 examples have none, the first is example 4"):
        make_task(made, "y")
    with pytest.raises(InputError, match="nan is no label"):
        make_task(made, [[float("nan") if place == 4 else place % 2] for place in range(9)], span=("from", "to"))


def test_words_that_the_layers_did_not_see_are_noted(tmp_path: Path) -> None:
    texts = [f"{first} {second}" for first in ("rain", "snow", "wind", "hail") for second in ("falls", "comes on")]
    records = [{"text": text, "from": 0, "to": 4} for text in texts]
    labels = [place % 2 for place in range(8)]
    for length, num_cut in ((4, 4), (9, 0)):
        place = tmp_path / str(length)
        store = lp.extract("demo", records, place, sites="layers.0", max_length=length, progress=False)
        notes = make_task(store, labels).notes
        assert notes == ((f"{num_cut} texts cut to the maximum length; tfidf reads whole ones.",) if num_cut else ())
        assert make_task(store, labels, span=("from", "to")).notes == ()
