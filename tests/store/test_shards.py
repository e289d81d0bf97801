"""A mapped shard: views of the file, and nothing believed that contradicts the header."""

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerprobe.errors import FormatError
from layerprobe.store.format import commit_shard
from layerprobe.store.headers import ShardHeader
from layerprobe.store.index import ShardInfo
from layerprobe.store.shards import MappedShard, ScaledRows, pool_packed, span_of

FINGERPRINT = "0" * 32
FILE = "shard-000000.safetensors"


def commit(folder: Path, example: list[int], offsets: list[int], num_tokens: int, first: int = 0) -> ShardInfo:
    header = ShardHeader(0, len(example), num_tokens, first, FINGERPRINT)
    tensors = [
        ("example", torch.tensor(example)),
        ("offsets", torch.tensor(offsets)),
        ("input_ids", torch.arange(num_tokens)),
        ("layers.0", torch.arange(num_tokens * 2.0).view(num_tokens, 2)),
        ("nothing", torch.empty(0, 4)),
    ]
    commit_shard(folder, header, tensors)
    return ShardInfo(header.file, first, len(example), num_tokens)


def test_tensors_are_views_of_one_mapping(write_store: Callable[..., Any]) -> None:
    written = write_store()
    path = written.folder / FILE
    shard = MappedShard(path, ShardInfo(FILE, 0, 3, 8), FINGERPRINT, True)
    entry = shard.header.tensors["layers.0"]
    rows, ids = shard.tensor("layers.0"), shard.tensor("input_ids")
    start = rows.data_ptr() - entry.start
    assert start % mmap.PAGESIZE == 0
    assert ids.data_ptr() - shard.header.tensors["input_ids"].start == start
    assert rows.untyped_storage().nbytes() == entry.stop - entry.start
    assert path.read_bytes()[entry.start : entry.stop] == rows.numpy().tobytes()


def test_where_examples_lie_takes_eight_bytes_a_number_and_is_given_as_whole_numbers(tmp_path: Path) -> None:
    info = commit(tmp_path, [2, 0, 1], [0, 2, 2, 5], 5)
    shard = MappedShard(tmp_path / FILE, info, FINGERPRINT, True)
    found = (shard.offsets, shard.position, shard.pairs_before)
    assert [list(numbers) for numbers in found] == [[0, 2, 2, 5], [1, 2, 0], [0, 4, 4, 13]]
    assert [memoryview(numbers).nbytes for numbers in found] == [32, 24, 32]  # type: ignore[arg-type]
    assert all(type(number) is int for numbers in found for number in numbers)


@pytest.mark.parametrize("example", [[0, 1, 1], [0, 1, 3], [-1, 0, 1], [0, 1, -(1 << 63)]])
def test_ordinals_that_are_no_run_are_refused(tmp_path: Path, example: list[int]) -> None:
    info = commit(tmp_path, example, [0, 2, 2, 5], 5)
    with pytest.raises(FormatError, match="ordinals are not a run of 3 examples"):
        MappedShard(tmp_path / FILE, info, FINGERPRINT, True)


def test_writing_to_a_view_leaves_the_file_as_it_is(write_store: Callable[..., Any]) -> None:
    written = write_store()
    path = written.folder / FILE
    before = path.read_bytes()
    shard = MappedShard(path, ShardInfo(FILE, 0, 3, 8), FINGERPRINT, True)
    shard.tensor("layers.0").fill_(7)
    os.sync()
    assert path.read_bytes() == before


def test_a_comparison_leaves_no_pages_behind_and_takes_no_change_away(tmp_path: Path) -> None:
    count = 1 << 20
    header = ShardHeader(0, 1, count, 0, FINGERPRINT)
    rows = torch.arange(count * 2.0).view(count, 2)
    tensors = [
        ("example", torch.tensor([0])),
        ("offsets", torch.tensor([0, count])),
        ("input_ids", torch.arange(count)),
    ]
    commit_shard(tmp_path, header, [*tensors, ("layers.0", rows), ("layers.1", rows + 1)])
    shard = MappedShard(tmp_path / FILE, ShardInfo(FILE, 0, 1, count), FINGERPRINT, True)

    def count_resident() -> int:
        said = Path("/proc/self/smaps").read_text().split(str(tmp_path / FILE))[1]
        return 1024 * int(said.split("Rss:")[1].split()[0])

    first = shard.tensor("layers.0")
    if Path("/proc/self/smaps").exists():
        assert count_resident() < rows.nbytes / 4
    # their last and first bytes may lie on one page
    first[-1] = -5.0
    second = shard.tensor("layers.1")
    assert first[-1].tolist() == [-5.0, -5.0]
    assert torch.equal(first[:-1], rows[:-1]) and torch.equal(second, rows + 1)


def test_spans_find_each_example_wherever_the_batch_order_put_it(tmp_path: Path) -> None:
    info = commit(tmp_path, [12, 10, 11], [0, 1, 1, 4], 4, first=10)
    shard = MappedShard(tmp_path / FILE, info, FINGERPRINT, True)
    assert [span_of(shard, ordinal) for ordinal in (10, 11, 12)] == [(1, 1, 1), (2, 1, 4), (0, 0, 1)]


def test_a_tensor_without_elements_keeps_its_shape(tmp_path: Path) -> None:
    info = commit(tmp_path, [0], [0, 1], 1)
    assert MappedShard(tmp_path / FILE, info, FINGERPRINT, True).tensor("nothing").shape == (0, 4)


def test_a_tensor_that_is_not_there_is_named_with_the_file(tmp_path: Path) -> None:
    shard = MappedShard(tmp_path / FILE, commit(tmp_path, [0], [0, 1], 1), FINGERPRINT, True)
    with pytest.raises(FormatError, match=f"{FILE}: has no tensor 'layers.9'"):
        shard.tensor("layers.9")


@pytest.mark.parametrize(
    ("example", "offsets", "message"),
    [
        ([0, 0], [0, 1, 3], "ordinals are not a run of 2 examples"),
        ([0, 2], [0, 1, 3], "ordinals are not a run of 2 examples"),
        ([1, 2], [0, 1, 3], "ordinals are not a run of 2 examples"),
        ([0, 1], [1, 1, 3], "offsets do not rise from 0 to 3"),
        ([0, 1], [0, 1, 2], "offsets do not rise from 0 to 3"),
        ([0, 1], [0, 4, 3], "offsets do not rise from 0 to 3"),
    ],
)
def test_wrong_ordinals_and_offsets_are_refused(
    tmp_path: Path, example: list[int], offsets: list[int], message: str
) -> None:
    info = commit(tmp_path, example, offsets, 3)
    with pytest.raises(FormatError, match=f"{FILE}: its {message}"):
        MappedShard(tmp_path / FILE, info, FINGERPRINT, True)


def test_a_shard_of_another_run_is_refused(tmp_path: Path) -> None:
    info = commit(tmp_path, [0], [0, 1], 1)
    with pytest.raises(FormatError, match="belongs to another run"):
        MappedShard(tmp_path / FILE, info, "1" * 32, True)


@pytest.mark.parametrize("said", [(1, 1, 1), (0, 2, 1), (0, 1, 2)], ids=["first example", "examples", "tokens"])
def test_a_shard_that_the_index_describes_otherwise_is_refused(tmp_path: Path, said: tuple[int, int, int]) -> None:
    commit(tmp_path, [0], [0, 1], 1)
    with pytest.raises(FormatError, match=r"does not hold the examples that index\.json says"):
        MappedShard(tmp_path / FILE, ShardInfo(FILE, *said), FINGERPRINT, True)


def test_scaled_rows_decode_to_values_times_scale() -> None:
    values = torch.tensor([[127, -64], [1, 0]], dtype=torch.int8)
    scaled = ScaledRows(values, torch.tensor([0.5, 2.0]))
    assert len(scaled) == 2 and scaled.shape == (2, 2)
    assert torch.equal(scaled.float(), torch.tensor([[63.5, -32.0], [2.0, 0.0]]))
    assert torch.equal(ScaledRows(values[0], torch.tensor(0.5)).float(), torch.tensor([63.5, -32.0]))


@pytest.mark.parametrize("pool", ["mean", "max", "cls", "last"])
def test_examples_of_a_shard_without_rows_pool_to_nan(pool: str) -> None:
    found = pool_packed(torch.empty(0, 3), torch.zeros(3, dtype=torch.int64), pool)
    assert found.shape == (2, 3) and bool(found.isnan().all())
