"""One site minus another, lazily, against the subtraction of the tensors that were written."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.errors import OptionError, SiteError
from planting import plant

LENGTHS = [4, 1, 3, 0, 6]


@pytest.fixture
def layers() -> dict[str, Tensor]:
    maker = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(14, width, generator=maker).to(dtype)
        for name, width, dtype in (
            ("embeddings", 6, torch.float32),
            ("layers.0", 6, torch.float16),
            ("layers.1", 6, torch.float16),
            ("layers.1.ffn.act", 9, torch.float32),
        )
    }


def test_each_example_is_one_site_minus_the_other_in_float32(tmp_path: Path, layers: dict[str, Tensor]) -> None:
    store = lp.open(plant(tmp_path / "acts", layers, LENGTHS))
    step = store.difference("layers.1", "layers.0")
    expected = (layers["layers.1"].float() - layers["layers.0"].float()).split(LENGTHS)
    assert step.site == "layers.1 - layers.0" and (step.kind, step.width, step.dtype) == ("token", 6, torch.float32)
    assert len(step) == 5
    for ordinal, rows in enumerate(expected):
        assert torch.equal(step[ordinal], rows) and torch.equal(step[ordinal - 5], rows)
    assert all(map(torch.equal, step, expected)) and all(map(torch.equal, step[1:4], expected[1:4]))
    assert all(map(torch.equal, step[[4, 0]], [expected[4], expected[0]]))


def test_what_is_there_of_an_unfinished_store_comes_in_both_directions(
    tmp_path: Path, layers: dict[str, Tensor]
) -> None:
    folder = plant(tmp_path / "acts", layers, LENGTHS)
    (folder / "index.json").unlink()
    (folder / "shard-000001.safetensors").unlink()
    step = lp.open(folder).difference("layers.1", "layers.0")
    expected = (layers["layers.1"].float() - layers["layers.0"].float()).split(LENGTHS)
    there = [expected[ordinal] for ordinal in (0, 3, 4)]
    assert len(step) == 3
    assert all(map(torch.equal, step, there)) and all(map(torch.equal, reversed(step), there[::-1]))


def test_rows_and_pools_are_those_of_the_two_sites(tmp_path: Path, layers: dict[str, Tensor]) -> None:
    store = lp.open(plant(tmp_path / "acts", layers, LENGTHS))
    step = store.difference("layers.1", "embeddings")
    for options in ({}, {"shuffle": True, "seed": 3}):
        pairs = zip(store["layers.1"].rows(4, **options), store["embeddings"].rows(4, **options), strict=True)
        expected = torch.cat([one.float() - other for one, other in pairs])
        assert torch.equal(torch.cat(list(step.rows(4, **options))), expected)
    pooled = store["layers.1"].pooled("cls") - store["embeddings"].pooled("cls")
    assert torch.equal(step.pooled("cls").nan_to_num(9), pooled.nan_to_num(9))


def test_differences_pair_each_layer_with_the_one_before(tmp_path: Path, layers: dict[str, Tensor]) -> None:
    store = lp.open(plant(tmp_path / "acts", layers, LENGTHS))
    assert [step.site for step in store.differences()] == ["layers.0 - embeddings", "layers.1 - layers.0"]
    alone = lp.open(plant(tmp_path / "alone", {"layers.0": layers["layers.0"]}, LENGTHS))
    with pytest.raises(SiteError, match=r"no two sites to take a difference of in .*: it holds layers.0"):
        alone.differences()


def test_pooled_sites_have_a_difference_too(tmp_path: Path) -> None:
    rows = torch.randn(5, 4)
    store = lp.open(plant(tmp_path / "acts", {"layers.0": rows, "layers.1": rows * 3}, [1] * 5, pool="mean"))
    step = store.differences()[0]
    assert step.kind == "example" and torch.equal(step[2], rows[2] * 3 - rows[2])
    assert torch.equal(step.pooled(), rows * 3 - rows)


def test_sites_that_cannot_be_subtracted_are_refused(tmp_path: Path, layers: dict[str, Tensor]) -> None:
    store = lp.open(plant(tmp_path / "acts", layers, LENGTHS))
    with pytest.raises(OptionError, match=r"'layers.1' minus 'layers.1.ffn.act': one is 6 wide, the other 9"):
        store.difference("layers.1", "layers.1.ffn.act")
    with pytest.raises(SiteError, match=r"no site 'layers.9'"):
        store.difference("layers.9", "layers.0")
