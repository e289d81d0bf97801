"""Masks and casts against float64 numpy and a slow reading of the mask.

Letters: B sequences, S padded positions, T rows, D width.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layerprobe.capture import casting
from layerprobe.capture import select as select_module
from layerprobe.capture.casting import DTYPES, cast_into, resolve_dtype
from layerprobe.capture.pooling import pool_rows
from layerprobe.capture.select import BatchSelection, write_rows
from layerprobe.capture.target import Target
from layerprobe.errors import CaptureError, OptionError
from masks import CPU, MASKS, index, make_value, select


@pytest.fixture
def value() -> Tensor:
    return make_value()


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("through_index", [False, True])
def test_rows_are_the_real_tokens_in_order(value: Tensor, mask: Any, through_index: bool) -> None:
    selection = select(mask)
    if through_index:
        selection = index(selection, mask)
    expected = [value[b, s] for b in range(4) for s in range(5) if mask[b][s]]
    assert selection.lengths == tuple(sum(row) for row in mask)
    assert selection.num_rows == len(expected)
    out = torch.zeros(len(expected), 3)
    write_rows(Target(out), value, selection)
    assert torch.equal(out, torch.stack(expected) if expected else torch.empty(0, 3))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int32, torch.uint8])
def test_mask_may_be_of_any_dtype(kind: torch.dtype) -> None:
    selection = BatchSelection.from_mask(torch.tensor(MASKS["right"]).to(kind), (4, 5), CPU)
    assert selection.lengths == (5, 2, 2, 1)


def test_no_mask_keeps_every_token(value: Tensor) -> None:
    selection = BatchSelection.from_mask(None, (4, 5), CPU)
    out = torch.empty(20, 3)
    write_rows(Target(out), value, selection)
    assert torch.equal(out, value.flatten(0, 1))


def test_lengths_select_what_the_mask_would() -> None:
    masked = select(MASKS["right"])
    told = BatchSelection.from_lengths([sum(row) for row in MASKS["right"]], 5, CPU)
    assert (told.lengths, told.num_positions, told.runs) == (masked.lengths, masked.num_positions, masked.runs)


def test_neighbours_of_one_length_are_one_rectangle() -> None:
    runs = select(MASKS["right"]).runs
    assert runs is not None
    assert [(run.first, run.last, run.start, run.stop) for run in runs] == [(0, 1, 0, 5), (1, 3, 0, 2), (3, 4, 0, 1)]


def test_many_rectangles_become_an_index() -> None:
    lengths = [1 + number % 7 for number in range(100)]
    selection = BatchSelection.from_lengths(lengths, 7, CPU)
    assert selection.index is not None
    assert selection.index.tolist() == [7 * b + place for b, length in enumerate(lengths) for place in range(length)]
    value = torch.randn(100, 7, 2)
    out = torch.empty(sum(lengths), 2)
    write_rows(Target(out), value, selection)
    assert torch.equal(out, torch.cat([value[b, :length] for b, length in enumerate(lengths)]))


@pytest.mark.parametrize("sequences", [None, [0, 0, 1, 2, 2, 2, 3]])
@pytest.mark.parametrize("through_index", [False, True])
@pytest.mark.parametrize("kept", [None, [[0], [1, 2], [], [0], [0], [0], []]])
def test_rows_of_a_flat_batch_are_those_of_each_text(
    monkeypatch: pytest.MonkeyPatch, sequences: list[int] | None, through_index: bool, kept: list[list[int]] | None
) -> None:
    if through_index:
        monkeypatch.setattr(select_module, "MOST_COPIES", {})
    lengths = [3, 3, 2, 1, 1, 1, 0]
    numbers = list(range(7)) if sequences is None else sequences
    own = dict(zip(numbers, lengths, strict=True))
    value = torch.randn(1, sum(own.values()), 5)
    parts = dict(zip(own, value[0].split(list(own.values())), strict=True))
    selection = BatchSelection.from_flat(lengths, CPU, sequences)
    assert (selection.index is not None) == through_index
    rows = [parts[number] for number in numbers]
    if kept is not None:
        selection = selection.keep([torch.tensor(places, dtype=torch.int64) for places in kept])
        rows = [own_rows[places] for own_rows, places in zip(rows, kept, strict=True)]
    assert (selection.num_sequences, selection.lengths) == (1, tuple(map(len, rows)))
    out = torch.zeros(selection.num_rows, 5)
    write_rows(Target(out), value, selection)
    assert torch.equal(out, torch.cat(rows))
    for pool in ("mean", "cls", "max") if kept is None else ():
        vectors = selection.repeat_vectors(pool_rows(value, selection.distinct, pool))
        alone = [pool_rows(one[None], BatchSelection.from_mask(None, (1, len(one)), CPU), pool) for one in rows]
        torch.testing.assert_close(vectors, torch.cat(alone), equal_nan=True)  # many means at once add in another order


def test_what_tells_repeated_texts_is_made_once_for_all_sites() -> None:
    """On a GPU, sending it anew for each site would wait for the model at each."""
    lengths, sequences = [3, 3, 2, 2, 1], [0, 0, 1, 1, 2]
    selection = BatchSelection.from_flat(lengths, CPU, sequences)
    rows, vectors = torch.arange(6), torch.tensor([7.0, 8.0, 9.0])
    assert selection.repeat_rows(rows).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4, 5]
    assert selection.repeat_vectors(vectors).tolist() == [7, 7, 8, 8, 9]
    made = vars(selection)["_repeated"], vars(selection)["_repeated_rows"]
    selection.repeat_rows(rows)
    selection.repeat_vectors(vectors)
    assert vars(selection)["_repeated"] is made[0] and vars(selection)["_repeated_rows"] is made[1]
    with pytest.raises(CaptureError, match="5 rows were made for 6 tokens"):
        selection.repeat_rows(rows[:5])


def test_neighbours_in_a_flat_batch_are_copied_at_once() -> None:
    assert BatchSelection.from_flat([4, 3, 3, 1], CPU).runs == ((0, 1, 0, 11),)
    assert BatchSelection.from_flat([4, 4, 3], CPU, [0, 0, 1]).runs == ((0, 1, 0, 4), (0, 1, 0, 7))


def test_values_may_be_strided(value: Tensor) -> None:
    strided = value.transpose(0, 1).contiguous().transpose(0, 1)
    for selection in (select(MASKS["holes"]), select(MASKS["left"])):
        expected, out = torch.empty(selection.num_rows, 3), torch.empty(selection.num_rows, 3)
        write_rows(Target(expected), value, selection)
        write_rows(Target(out), strided, selection)
        assert torch.equal(out, expected)


def test_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"attention_mask has shape \(4, 1, 5, 5\): rows need one of shape \(4, 5\)"):
        BatchSelection.from_mask(torch.ones(4, 1, 5, 5), (4, 5), CPU)


@pytest.mark.parametrize("shape", [(4, 6, 3), (3, 5, 3), (4, 5, 2)])
def test_value_without_a_row_per_token_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        CaptureError, match=r"has no row per token: it must be \(4, 5, 3\)\. Capture this site into mem"
    ):
        write_rows(Target(torch.empty(20, 3)), torch.zeros(shape), BatchSelection.from_mask(None, (4, 5), CPU))


# casts


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_is_found_by_name_and_by_itself(name: str) -> None:
    assert resolve_dtype(name) == resolve_dtype(DTYPES[name]) == getattr(torch, name)


def test_no_dtype_is_the_models_own() -> None:
    assert resolve_dtype(None) is None


@pytest.mark.parametrize("dtype", ["float64", "half", torch.int64, ""])
def test_unknown_dtype_is_refused(dtype: Any) -> None:
    with pytest.raises(OptionError, match=r"no dtype .*: use float32, float16, bfloat16, float8_e4m3fn, int8, or None"):
        resolve_dtype(dtype)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("mask", [MASKS["left"], MASKS["holes"]], ids=["left", "holes"])
def test_rows_are_cast_like_torch_casts(value: Tensor, name: str, mask: Any) -> None:
    dtype, selection = DTYPES[name], select(mask)
    out = torch.empty(selection.num_rows, 3, dtype=dtype)
    write_rows(Target(out), value, selection)
    assert torch.equal(out.float(), value[torch.tensor(mask).bool()].to(dtype).float())


@pytest.mark.parametrize("mask", [MASKS["left"], MASKS["holes"]], ids=["left", "holes"])
def test_int8_rows_decode_to_half_a_step(value: Tensor, mask: Any) -> None:
    selection = select(mask)
    out = torch.empty(selection.num_rows, 3, dtype=torch.int8)
    scale = torch.empty(selection.num_rows)
    write_rows(Target(out, scale), value, selection)
    rows = value[torch.tensor(mask).bool()].double().numpy()
    magnitude = np.abs(rows).max(axis=1)
    np.testing.assert_allclose(scale.numpy(), magnitude / 127, rtol=1e-6)  # one float32 division
    assert np.array_equal(np.abs(out.numpy()).max(axis=1), np.full(len(rows), 127))
    error = np.abs(out.double().numpy() * scale.double().numpy()[:, None] - rows)
    assert (error <= magnitude[:, None] / 127 * 0.5001).all()  # rounding is half a step, and the scale is float32


def test_int8_of_zeros_is_zeros() -> None:
    out, scale = torch.ones(2, 3, dtype=torch.int8), torch.ones(2)
    cast_into(Target(out, scale), torch.zeros(2, 3))
    assert not out.any()
    assert not scale.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_int8_shows_a_value_that_is_not_finite_in_its_scale(bad: float) -> None:
    out, scale = torch.empty(2, 3, dtype=torch.int8), torch.empty(2)
    cast_into(Target(out, scale), torch.tensor([[1.0, bad, 2.0], [1.0, 1.0, 2.0]]))
    assert not torch.isfinite(scale[0])
    decoded = out.float() * scale[:, None]
    assert not torch.isfinite(decoded[0]).any()
    assert decoded[1].tolist() == pytest.approx([1.0, 1.0, 2.0], abs=1 / 127)  # half a step of 2/127


def test_float8_counts_what_it_clips_and_keeps_counting() -> None:
    overflow = torch.zeros((), dtype=torch.int64)
    out = torch.empty(5, dtype=torch.float8_e4m3fn)
    cast_into(Target(out, None, overflow), torch.tensor([448.0, -448.0, 449.0, -1e9, float("nan")]))
    assert overflow.item() == 2  # a NaN stays a NaN and is counted on its way to disk
    cast_into(Target(out, None, overflow), torch.tensor([float("inf"), 0.0, 1.0, 2.0, 3.0]))
    assert overflow.item() == 3


class _Operators(TorchDispatchMode):
    """Note the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("saturates", [True, False])
def test_float8_is_clipped_before_a_cast_that_does_not(
    monkeypatch: pytest.MonkeyPatch, saturates: bool, dtype: torch.dtype
) -> None:
    if saturates and not casting._saturates(CPU):
        pytest.skip("this torch makes NaN of what is beyond the range")
    monkeypatch.setattr(casting, "_saturates", lambda _: saturates)
    value = torch.tensor([448.0, -448.0, 460.0, 1e4, -1e4, float("inf"), float("-inf"), float("nan"), 1.7]).to(dtype)
    overflow, out = torch.zeros((), dtype=torch.int64), torch.empty(9, dtype=torch.float8_e4m3fn)
    with _Operators() as ran:
        cast_into(Target(out, None, overflow), value)
    assert ("clamp" in ran.names) is not saturates
    assert out[:7].float().tolist() == [448, -448, 448, 448, -448, 448, -448]
    assert out[7:8].float().isnan().all() and out[8].float() == 1.75
    assert overflow.item() == 5  # once, though what is cast is within the range by then


def test_a_cast_that_saturates_is_told_by_trying() -> None:
    made = torch.tensor([1e4, -1e4]).to(torch.float8_e4m3fn).float()
    assert casting._saturates(CPU) == (made.abs().max().item() == torch.finfo(torch.float8_e4m3fn).max)


def test_part_of_a_target_is_a_view_of_it() -> None:
    target = Target(torch.zeros(6, 2, dtype=torch.int8), torch.zeros(6))
    part = target.part(2, 6, (2, 2))
    assert part.values.shape == (2, 2, 2)
    assert part.scale is not None
    assert part.scale.shape == (2, 2)
    part.values.fill_(1)
    part.scale.fill_(1)
    assert target.values.sum(1).tolist() == [0, 0, 2, 2, 2, 2]
    assert target.scale is not None
    assert target.scale.tolist() == [0, 0, 1, 1, 1, 1]
    assert target.part(0, 3).values.shape == (3, 2)


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_rows_go_to_their_stretch_of_a_buffer_and_nowhere_else(value: Tensor, mask: Any, dtype: torch.dtype) -> None:
    selection = select(mask)
    count = selection.num_rows
    buffer, scales = torch.zeros(3 * count, 3).to(dtype), torch.zeros(3 * count)
    alone, its_scale = torch.zeros(count, 3).to(dtype), torch.zeros(count)
    write_rows(Target(alone, its_scale), value, selection)
    for start in (count, 2 * count):  # one selection for both
        buffer.zero_()
        scales.zero_()
        target = Target(buffer, scales, None, start, start + count)
        write_rows(target, value, selection)
        assert torch.equal(target.values.float(), alone.float())
        assert target.scale is not None
        assert torch.equal(target.scale, its_scale)
        beside = torch.ones(len(buffer), dtype=torch.bool)
        beside[start : start + count] = False
        assert not buffer.float()[beside].any()
        assert not scales[beside].any()


def test_a_stretch_that_ends_beyond_its_buffer_is_refused(value: Tensor) -> None:
    selection = select(MASKS["right"])
    count = selection.num_rows
    buffer = torch.zeros(2 * count, 3)
    inside = buffer[: 2 * count - 1]  # whose memory goes on
    write_rows(Target(inside, start=0, stop=count), value, selection)
    buffer.zero_()
    with pytest.raises(CaptureError, match=rf"{count} rows do not go into a place for {count - 1}, of shape"):
        write_rows(Target(inside, start=count, stop=2 * count), value, selection)
    assert not buffer.any()


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_rows_do_not_depend_on_how_a_value_lies_in_memory(mask: Any, dtype: torch.dtype) -> None:
    selection, kept = select(mask), torch.tensor(mask).bool()
    whole = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(3))
    values = {
        "transposed": whole[:, :4, :3].transpose(0, 1),
        "inside another": whole[1:, 1:, 2:5],
        "repeated": whole[:1, :5, :3].expand(4, 5, 3),
        "of another width": whole[:4, :5, :7].contiguous(),
        "of several dimensions": whole[:4, :5].unflatten(2, (2, 4)),
    }
    if dtype == torch.int8:  # whose scales are of vectors
        del values["of several dimensions"]
    for name, value in values.items():
        out = torch.empty(10 + int(kept.sum()), *value.shape[2:], dtype=dtype)[10:]
        scale, expected_scale = (torch.empty(out.shape[:-1]) if dtype == torch.int8 else None for _ in range(2))
        write_rows(Target(out, scale), value, selection)
        expected = torch.empty_like(out)
        cast_into(Target(expected, expected_scale), value[kept])
        assert torch.equal(out, expected), name
        if scale is not None and expected_scale is not None:
            assert torch.equal(scale, expected_scale), name


def test_a_value_of_no_such_rows_is_refused_after_one_that_fits(value: Tensor) -> None:
    selection = select(MASKS["right"])
    out = torch.empty(selection.num_rows, 3)
    write_rows(Target(out), value, selection)
    with pytest.raises(CaptureError, match=r"it must be \(4, 5, 3\)"):
        write_rows(Target(out), value[:, :4], selection)
    with pytest.raises(CaptureError, match=r"it must be \(4, 5, 2\)"):
        write_rows(Target(out[:, :2]), value, selection)


@pytest.mark.parametrize("through_index", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_nothing_is_written_beside_the_place_for_it(value: Tensor, dtype: torch.dtype, through_index: bool) -> None:
    selection = select(MASKS["right"])
    selection = index(selection, MASKS["right"]) if through_index else selection
    count = selection.num_rows
    whole = torch.zeros(count + 2, 6).to(dtype)
    places = {"too few rows": whole[: count - 1, :3], "too many": whole[: count + 2, :3].contiguous()}
    places |= {"strided": whole[:count, :3], "fewer rows": whole[: count - 1].view(-1)[: 3 * count - 3].view(-1, 3)}
    write_rows(Target(torch.zeros(count, 3).to(dtype), torch.zeros(count)), value, selection)
    for name, place in places.items():
        with pytest.raises(CaptureError, match=rf"{count} rows do not go into a place"):
            write_rows(Target(place, torch.zeros(len(place))), value, selection)
        assert not whole.float().any(), name
