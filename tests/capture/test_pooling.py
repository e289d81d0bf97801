"""Pools against float64 numpy, over masks that an index reads and masks that rectangles do.

Letters: B sequences, S padded positions, T rows, D width.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layerprobe.capture.pooling import check_pool, pool_rows
from layerprobe.capture.select import BatchSelection
from layerprobe.errors import CaptureError, OptionError
from layerprobe.store.shards import POOLS
from masks import CPU, MASKS, index, make_value, select


@pytest.fixture
def value() -> Tensor:
    return make_value()


def _pool_slowly(value: Tensor, mask: Any, pool: str) -> np.ndarray:
    vectors = []
    for sequence, kept in zip(value.double().numpy(), np.array(mask, dtype=bool), strict=True):
        rows = sequence[kept]
        if not len(rows):
            vectors.append(np.full(rows.shape[1], np.nan))
        else:
            vectors.append({"cls": rows[0], "last": rows[-1], "mean": rows.mean(0), "max": rows.max(0)}[pool])
    return np.stack(vectors)


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("through_index", [False, True])
def test_pool_agrees_with_numpy(value: Tensor, mask: Any, pool: str, through_index: bool) -> None:
    selection = select(mask)
    if through_index:
        selection = index(selection, mask)
    pooled = pool_rows(value, selection, pool)
    assert pooled.dtype == torch.float32
    expected = _pool_slowly(value, mask, pool)
    if pool == "mean":
        np.testing.assert_allclose(pooled.numpy(), expected, rtol=0, atol=1e-6)  # five float32 values of size 1 summed
    else:
        np.testing.assert_array_equal(pooled.numpy(), expected)


@pytest.mark.parametrize("pool", ["cls", "mean", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_many_operators_pool_many_texts_as_few(pool: str, dtype: torch.dtype) -> None:
    class Count(TorchDispatchMode):
        num_calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Count.num_calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for num_texts in (2, 60):
        mask = (torch.arange(9) <= torch.arange(num_texts)[:, None] % 9).int()
        value = torch.randn(num_texts, 9, 4).to(dtype)
        selection = index(select(mask.tolist()), mask.tolist())
        Count.num_calls = 0
        with Count():
            pooled = pool_rows(value, selection, pool)
        counts.append(Count.num_calls)
        expected = torch.from_numpy(_pool_slowly(value, mask.tolist(), pool))
        torch.testing.assert_close(pooled, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=1e-6)
    assert counts[0] == counts[1] < 20


def test_mean_needs_no_operator_that_some_devices_lack(value: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lack(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "embedding_bag" in str(func):
                raise NotImplementedError(func)
            return func(*args, **(kwargs or {}))

    mask = MASKS["holes"]
    selection = index(select(mask), mask)
    with Lack():
        with pytest.raises(NotImplementedError):
            pool_rows(value, selection, "mean")
        monkeypatch.setattr("layerprobe.capture.pooling._MEANS_AT_ONCE", ())
        pooled = pool_rows(value, selection, "mean")
    np.testing.assert_allclose(pooled.numpy(), _pool_slowly(value, mask, "mean"), rtol=0, atol=1e-6)


def test_pooling_by_an_index_passes_gradients_twice() -> None:
    value = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = [[1, 0, 1], [1, 1, 1]]
    selection = index(select(mask), mask)
    assert torch.autograd.gradgradcheck(lambda given: pool_rows(given, selection, "mean"), value)


@pytest.mark.parametrize("through_index", [False, True])
def test_mean_of_half_precision_is_taken_in_float32(through_index: bool) -> None:
    rows = torch.full((1, 4096, 1), 1.0009765625, dtype=torch.float16)
    selection = BatchSelection.from_mask(None, (1, 4096), CPU)
    if through_index:
        selection = index(selection, [[1] * 4096])
    pooled = pool_rows(rows, selection, "mean")
    assert pooled.dtype == torch.float16
    assert pooled.item() == 1.0009765625  # a float16 sum would stick at 2,048


def test_mean_of_double_precision_stays_double() -> None:
    rows = torch.tensor([[[1.0], [1.0 + 2**-40]]], dtype=torch.float64)
    pooled = pool_rows(rows, BatchSelection.from_mask(None, (1, 2), CPU), "mean")
    assert pooled.item() == 1.0 + 2**-41


@pytest.mark.parametrize("mask", [MASKS["left"], MASKS["holes"]], ids=["left", "holes"])
def test_callable_pool_sees_only_the_real_rows_of_each_example(value: Tensor, mask: Any) -> None:
    seen: list[Tensor] = []

    def total(rows: Tensor) -> Tensor:
        seen.append(rows)
        return torch.cat([rows.sum(0), rows.sum(0)])

    pooled = pool_rows(value, select(mask), total)
    assert pooled.shape == (4, 6)
    for rows, sequence, kept in zip(seen, value, torch.tensor(mask).bool(), strict=True):
        assert torch.equal(rows, sequence[kept])


@pytest.mark.parametrize("through_index", [False, True])
def test_callable_pool_whose_vectors_differ_in_length_is_refused(value: Tensor, through_index: bool) -> None:
    mask = next(mask for mask in MASKS.values() if len({sum(row) for row in mask}) > 1)
    selection = index(select(mask), mask) if through_index else select(mask)
    with pytest.raises(
        CaptureError, match=r"the pool callable gave vectors of \d and .* numbers: it must give as many"
    ):
        pool_rows(value, selection, lambda rows: rows[:, 0])
    made: list[int] = []
    with pytest.raises(CaptureError, match=r"the pool callable gave vectors of 1 and 2 numbers"):
        pool_rows(
            value,
            select(torch.ones(value.shape[:2]).tolist()),
            lambda rows: made.append(1) or rows[0, : 1 + len(made) % 2],
        )


def test_callable_pool_that_gives_no_vector_is_refused(value: Tensor) -> None:
    selection = BatchSelection.from_mask(None, (4, 5), CPU)
    with pytest.raises(
        CaptureError, match=r"gave torch.float32 \(5, 3\): it must turn \[T, D\] rows into one vector of floats"
    ):
        pool_rows(value, selection, lambda rows: rows)
    with pytest.raises(CaptureError, match=r"gave torch.int64 \(3,\): it must turn"):
        pool_rows(value, selection, lambda rows: rows.argmax(0))
    with pytest.raises(CaptureError, match=r"the pool callable gave float: it must turn"):
        pool_rows(value, selection, lambda rows: rows.sum().item())  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("mask", [[[0] * 5, [1] * 5, [0] * 5, [1, 1, 0, 0, 0]], [[0] * 5] * 4], ids=["some", "all"])
@pytest.mark.parametrize("through_index", [False, True])
def test_callable_pool_is_not_asked_about_a_text_without_tokens(value: Tensor, mask: Any, through_index: bool) -> None:
    selection = index(select(mask), mask) if through_index else select(mask)
    pooled = pool_rows(value, selection, lambda rows: torch.cat([rows[0], rows[-1]]))
    assert pooled.shape == (4, 6)
    for vector, sequence, kept in zip(pooled, value, torch.tensor(mask).bool(), strict=True):
        rows = sequence[kept]
        assert torch.equal(vector, torch.cat([rows[0], rows[-1]])) if len(rows) else vector.isnan().all()


def test_an_error_of_a_callable_pool_names_it_and_the_example(value: Tensor) -> None:
    def third_row(rows: Tensor) -> Tensor:
        return rows[2]

    mask = [[1] * 5, [1, 1, 0, 0, 0], [1] * 5, [1] * 5]
    with pytest.raises(
        CaptureError, match=r"third_row' failed for example 1 of a call, \(2, 3\) rows: IndexError"
    ) as caught:
        pool_rows(value, select(mask), third_row)
    assert isinstance(caught.value.__cause__, IndexError)


def test_pool_of_no_sequences_is_empty() -> None:
    pooled = pool_rows(torch.empty(0, 5, 3), BatchSelection.from_mask(None, (0, 5), CPU), "mean")
    assert pooled.shape == (0, 3)


@pytest.mark.parametrize("shape", [(4, 5), (4, 6, 3), (4, 5, 3, 2)])
def test_pool_of_a_value_without_rows_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CaptureError, match=r"has no row per token to pool\."):
        pool_rows(torch.zeros(shape), BatchSelection.from_mask(None, (4, 5), CPU), "mean")


@pytest.mark.parametrize("pool", [*POOLS, None, torch.sum])
def test_known_pools_pass(pool: Any) -> None:
    check_pool(pool)


@pytest.mark.parametrize("pool", ["median", "", 3])
def test_unknown_pool_is_refused(pool: Any) -> None:
    with pytest.raises(
        OptionError, match=r"no pool .*: use mean, max, cls, last, a callable on \[T, D\] rows, or None"
    ):
        check_pool(pool)
