"""A site's view: arrays of numpy, pooling in pieces, and what indices and slices mean."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import layerprobe
from layerprobe.errors import MissingExample, OptionError

WriteStore = Callable[..., Any]
SECOND = "shard-000001.safetensors"
# what a site gives may be a tensor or ScaledRows; the tests know which
open_store: Callable[[Path], Any] = layerprobe.open


def test_an_example_as_a_numpy_array_is_a_view(write_store: WriteStore) -> None:
    view = open_store(write_store(dtype=torch.float16).folder)["layers.0"]
    array = view.numpy(2)
    assert array.dtype == np.float16 and array.ctypes.data == view[2].data_ptr()
    assert np.array_equal(array, view[2].numpy())
    with pytest.raises(OptionError, match="is not one example"):
        view.numpy([1, 2])
    with pytest.raises(MissingExample, match="no example 9"):
        view.numpy(9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_what_numpy_cannot_hold_names_what_can(write_store: WriteStore, dtype: torch.dtype) -> None:
    view = open_store(write_store(dtype=dtype).folder)["layers.0"]
    with pytest.raises(OptionError, match=rf"numpy has no {dtype}\. Use view\[2\]\.float\(\)\.numpy\(\), a copy"):
        view.numpy(2)
    assert view[2].float().numpy().shape == (5, 8)


@pytest.mark.parametrize("pool", ["mean", "max", "cls", "last"])
def test_pooling_in_pieces_changes_no_bit(write_store: WriteStore, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view = open_store(write_store(((3, 0, 5, 0), (1, 40, 7), (0, 0)), torch.float16).folder)["layers.0"]
    whole = view.pooled(pool)
    monkeypatch.setattr("layerprobe.store.siteview._POOLED_ROWS", 6)
    parts = list(view.iter_pooled(pool))
    assert [len(part) for part in parts] == [4, 3, 2]
    assert torch.equal(torch.cat(parts).nan_to_num(7), whole.nan_to_num(7))
    assert whole.isnan().any(1).tolist() == [False, True, False, True, False, False, False, True, True]
    with pytest.raises(OptionError, match="no pool 'median'"):
        view.iter_pooled("median")


def test_pooling_float8_picks_the_stored_rows(write_store: WriteStore) -> None:
    written = write_store(dtype=torch.float8_e4m3fn)
    found = open_store(written.folder)["layers.0"].pooled("last")
    assert torch.equal(found[[0, 2]], torch.stack([written.rows[0][-1], written.rows[2][-1]]).float())


def test_a_slice_means_ordinals_and_says_what_is_missing(write_store: WriteStore) -> None:
    written = write_store(((3, 0, 5), (1, 4), (2, 2)), complete=False)
    (written.folder / SECOND).unlink()
    view = open_store(written.folder)["layers.0"]
    assert all(map(torch.equal, view[5:], written.rows[5:])) and len(view[5:]) == 2
    assert all(map(torch.equal, view[-2:], written.rows[5:]))
    assert all(map(torch.equal, view[2::-1], written.rows[2::-1]))
    for gap in (slice(2, 4), slice(None), slice(-4, None)):
        with pytest.raises(MissingExample, match=r"no example [34] in .* yet"):
            view[gap]
    there = [written.rows[ordinal] for ordinal in (0, 1, 2, 5, 6)]
    assert all(map(torch.equal, view, there)) and all(map(torch.equal, reversed(view), there[::-1]))


@pytest.mark.parametrize("num_examples", [9, None])
def test_a_slice_beyond_what_is_there_yet_is_missing_and_not_cut(
    write_store: WriteStore, num_examples: int | None
) -> None:
    written = write_store(((3, 0, 5), (1, 4), (2, 2)), complete=False)
    path = written.folder / "store.json"
    if num_examples is not None:
        path.write_text(json.dumps({**json.loads(path.read_text()), "input": {"examples": num_examples}}))
    view = open_store(written.folder)["layers.0"]
    for beyond in (slice(5, 9), slice(7, 9), slice(0, 100), slice(8, None, -1), slice(100, 6, -1), slice(7, 8)):
        with pytest.raises(
            MissingExample, match=r"no example [78]|no example 100 in .* yet: the run is not complete and has 7"
        ):
            view[beyond]
    # left out or negative, a bound is that of what is there
    for index in (slice(None), slice(5, None), slice(-2, None), slice(None, -2), slice(None, None, -1), slice(3, 3)):
        found = view[index]
        assert len(found) == len(written.rows[index]) and all(map(torch.equal, found, written.rows[index]))
    if num_examples is not None:
        # beyond the run there is nothing to miss
        assert view[9:20] == view[50:60] == [] == view[5:3]
        with pytest.raises(MissingExample, match="no example 7 "):
            view[5:20]


@pytest.mark.parametrize("index", [slice("a", None), slice(0, 1.5), slice(0, 4, 0), slice(None, None, "b")])
def test_bounds_that_are_no_whole_numbers_are_refused(write_store: WriteStore, index: slice) -> None:
    for complete, name in ((True, "whole"), (False, "part")):
        view = open_store(write_store(complete=complete, name=name).folder)["layers.0"]
        with pytest.raises(OptionError, match=r"is sliced by ordinals, not by slice\(.*\): bounds are whole numbers"):
            view[index]


@pytest.mark.parametrize("index", [[[0, 1]], [[0], [1, 2]], [0, [1]], np.array([[0, 1]]), torch.tensor([[0]]), True])
def test_an_index_that_is_no_list_of_ordinals_is_refused(write_store: WriteStore, index: Any) -> None:
    view = open_store(write_store().folder)["layers.0"]
    with pytest.raises(OptionError, match=r"'layers\.0' is indexed by ordinals: "):
        view[index]


def test_a_list_of_ordinals_is_any_flat_one(write_store: WriteStore) -> None:
    written = write_store()
    view = open_store(written.folder)["layers.0"]
    for index in ([1, -1], (1, -1), np.array([1, -1]), torch.tensor([1, -1]), range(1, 5, 3)):
        assert all(map(torch.equal, view[index], (written.rows[1], written.rows[4])))
    for index in (1, np.int64(1), torch.tensor(1), np.array(1)):
        assert torch.equal(view[index], written.rows[1])
    assert view[[]] == [] and view[np.array([], dtype=np.int64)] == []
