"""The bytes of a shard: whole round trips, no damaged header believed, and commits that happen or do not."""

import contextlib
import json
import os
import re
import stat
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerprobe.errors import FormatError, OptionError, StoreError
from layerprobe.store import format as fmt
from layerprobe.store.durable import commit_file
from layerprobe.store.format import check_keepable, commit_shard, need_parent, read_header, read_json
from layerprobe.store.headers import ShardHeader

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]
# the folder of a test is the same for all its examples, which overwrite one file
in_one_folder = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def small_shard(dtype: torch.dtype = torch.float32, rows: int = 5, unit: int = 0) -> tuple[ShardHeader, list[Any]]:
    values = torch.arange(rows * 3).reshape(rows, 3).to(dtype)
    tensors: list[tuple[str, Tensor]] = [
        ("example", torch.arange(2)),
        ("offsets", torch.tensor([0, 2, rows])),
        ("input_ids", torch.arange(rows)),
        ("layers.0", values),
    ]
    return ShardHeader(unit, 2, rows, 0, "f" * 32, 1, {"layers.0": 4}), tensors


def committed(folder: Path) -> Path:
    header, tensors = small_shard()
    commit_shard(folder, header, tensors)
    return folder / header.file


def forge(path: Path, entries: Any) -> None:
    """Write a header with a right checksum of itself over what the file holds, as an attacker would."""
    old = path.read_bytes()
    data = old[8 + struct.unpack("<Q", old[:8])[0] :]
    text = json.dumps(entries).encode()
    if b"0" * 16 in text:
        text = text.replace(b"0" * 16, xxhash.xxh3_64_hexdigest(text).encode(), 1)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entries_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    entries = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    entries["__metadata__"]["header_checksum"] = "0" * 16
    return entries


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_through_a_stock_reader(tmp_path: Path, dtype: torch.dtype) -> None:
    header, tensors = small_shard(dtype)
    size = commit_shard(tmp_path, header, tensors)
    path = tmp_path / "shard-000000.safetensors"
    assert path.stat().st_size == size
    with safetensors.safe_open(path, "pt") as file:
        for name, tensor in tensors:
            assert file.get_tensor(name).dtype == tensor.dtype
            assert torch.equal(file.get_tensor(name).view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


@in_one_folder
@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    width=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    unit=st.integers(0, 10**7),
    truncated=st.integers(0, 9),
    nonfinite=st.dictionaries(st.text(max_size=5), st.integers(0, 99), max_size=2),
)
def test_header_comes_back_as_it_was_written(
    tmp_path: Path,
    lengths: list[int],
    width: int,
    dtype: torch.dtype,
    unit: int,
    truncated: int,
    nonfinite: dict[str, int],
) -> None:
    rows = torch.randint(0, 2, (sum(lengths), width)).to(dtype)
    tensors = [
        ("example", torch.arange(len(lengths))),
        ("offsets", torch.tensor([0, *lengths]).cumsum(0)),
        ("input_ids", torch.arange(sum(lengths))),
        ("layers.0", rows),
    ]
    given_header = ShardHeader(unit, len(lengths), sum(lengths), 7, "f" * 32, truncated, nonfinite)
    commit_shard(tmp_path, given_header, tensors)
    path = tmp_path / given_header.file
    assert fmt.parse_shard_name(path.name) == unit
    found = read_header(path)
    raw = path.read_bytes()
    for field in ("unit", "num_examples", "num_tokens", "first_example", "fingerprint", "num_truncated", "nonfinite"):
        assert getattr(found, field) == getattr(given_header, field)
    for name, tensor in tensors:
        entry = found.tensors[name]
        piece = raw[entry.start : entry.stop]
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        assert piece == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert found.checksums[name] == xxhash.xxh3_64_hexdigest(piece)
    path.unlink()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.int64], ids=str)
@pytest.mark.parametrize("lengths", [[3, 2], [1], [7, 7, 7], []])
def test_values_begin_with_a_block_of_the_file(tmp_path: Path, dtype: torch.dtype, lengths: list[int]) -> None:
    header = ShardHeader(0, len(lengths), sum(lengths), 0, "f" * 32)
    values = torch.zeros(sum(lengths), 3).to(dtype)
    places = {
        "example": torch.arange(len(lengths)),
        "offsets": torch.tensor([0, *lengths]).cumsum(0),
        "input_ids": torch.arange(sum(lengths)),
    }
    commit_shard(tmp_path, header, [*places.items(), ("embeddings", values), ("layers.0", values)])
    path = tmp_path / header.file
    raw = path.read_bytes()
    begin = 8 + struct.unpack("<Q", raw[:8])[0]
    with safetensors.safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("layers.0"), values)
    assert read_header(path).tensors["embeddings"].start == 4096
    assert begin % 8 == 0 and len(raw) < 8192 + 4096


def test_bytes_are_little_endian_and_data_begins_aligned(tmp_path: Path) -> None:
    path = committed(tmp_path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = read_header(path)
    assert header.tensors["offsets"].start % 8 == 0
    assert raw[8 : 8 + length].rstrip(b" ").endswith(b"}")
    entry = header.tensors["layers.0"]
    values = np.frombuffer(raw, dtype="<f4", count=15, offset=entry.start)
    assert values.tolist() == list(range(15))
    for entry in header.tensors.values():
        assert entry.start % entry.dtype.itemsize == 0


@in_one_folder
@given(data=st.data())
def test_a_flipped_bit_in_the_header_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = committed(tmp_path)
    raw = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * (8 + struct.unpack("<Q", raw[:8])[0]) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="shard-000000"):
        read_header(path)


@in_one_folder
@given(data=st.data())
def test_a_cut_or_extended_file_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = committed(tmp_path)
    raw = path.read_bytes()
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw += data.draw(st.binary(min_size=1, max_size=99))
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="shard-000000"):
        read_header(path)


@in_one_folder
@given(raw=st.binary(max_size=300))
def test_any_bytes_give_a_format_error(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "shard-000000.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(raw) - 3)) + raw)
    with pytest.raises(FormatError):
        read_header(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("[1e999]"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@in_one_folder
@given(data=st.data(), value=JSON)
def test_a_forged_header_is_read_or_refused_but_never_crashes(tmp_path: Path, data: st.DataObject, value: Any) -> None:
    path = committed(tmp_path)
    entries = entries_of(path)
    place = data.draw(st.sampled_from(["__metadata__", "layers.0"]))
    key = data.draw(st.sampled_from([None, *entries[place]]))
    if key is None:
        entries[place] = value
    else:
        entries[place][key] = json.dumps({"layers.0": value}) if key in ("nonfinite", "checksums") else value
    forge(path, entries)
    with contextlib.suppress(FormatError):
        header = read_header(path)
        assert all(entry.stop <= path.stat().st_size for entry in header.tensors.values())


def test_an_infinite_count_in_a_forged_header_is_refused(tmp_path: Path) -> None:
    path = committed(tmp_path)
    entries = entries_of(path)
    entries["__metadata__"]["nonfinite"] = '{"layers.0": Infinity}'
    forge(path, entries)
    with pytest.raises(FormatError, match="header is damaged"):
        read_header(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries["__metadata__"].update(format="layerprobe/2"), "format 'layerprobe/2'"),
        (lambda entries: entries["__metadata__"].update(header_checksum="1" * 16), "own checksum"),
        (lambda entries: entries["__metadata__"].update(unit="-1"), "a count of -1"),
        (lambda entries: entries["__metadata__"].update(unit="1"), "says it is shard-000001"),
        (lambda entries: entries["__metadata__"].update(examples="3"), "'example' is torch.int64 of shape"),
        (lambda entries: entries["__metadata__"].update(tokens="3"), "'input_ids' is torch.int64 of shape"),
        (lambda entries: entries["__metadata__"].update(checksums="{}"), "do not name the same"),
        (lambda entries: entries["layers.0"].update(data_offsets=[80, 141]), "does not fill"),
        (lambda entries: entries["layers.0"].update(data_offsets=[81, 141]), "begins at 81|ends at|begins at 80"),
        (lambda entries: entries["layers.0"].update(shape=[5, 3.0]), "no whole number"),
        (lambda entries: entries["layers.0"].update(shape=[1 << 40, 3]), "does not fill"),
    ],
)
def test_a_header_that_contradicts_itself_says_how(tmp_path: Path, change: Any, message: str) -> None:
    path = committed(tmp_path)
    entries = entries_of(path)
    change(entries)
    forge(path, entries)
    with pytest.raises(FormatError, match=message):
        read_header(path)


def test_a_missing_shard_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"shard-000000.safetensors: cannot be read"):
        read_header(tmp_path / "shard-000000.safetensors")


@pytest.mark.parametrize(
    "name", ["shard-00000.safetensors", "shard-000000.safetensors.tmp", "x", "shard-٠٠٠٠٠٠.safetensors"]
)
def test_only_names_of_shards_parse(name: str) -> None:
    assert fmt.parse_shard_name(name) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{", "is not the JSON"), (b"[1]", "holds list"), (b"\xff\xfe{", "JSON"), (b"[" * 9999, "JSON")],
)
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "store.json").write_bytes(text)
    with pytest.raises(FormatError, match=message):
        read_json(tmp_path / "store.json")


def test_json_that_is_missing_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        read_json(tmp_path / "store.json")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_honour_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = committed(tmp_path)
        commit_file(tmp_path / "index.json", [b"{}"])
    finally:
        os.umask(before)
    for file in (path, tmp_path / "index.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_a_commit_makes_no_second_copy_of_the_data(tmp_path: Path) -> None:
    header, tensors = small_shard(rows=1 << 21)  # 40 MiB
    tracemalloc.start()
    commit_shard(tmp_path, header, tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_commit_does_not_raise_the_peak_of_the_process(tmp_path: Path) -> None:
    # torch's own memory is none of tracemalloc's business, so the system is asked as well
    script = """
import resource, sys, torch
from pathlib import Path
from layerprobe.store.format import commit_shard
from layerprobe.store.headers import ShardHeader
rows = torch.zeros(1 << 21, 32).fill_(1)
ids = torch.zeros(1 << 21, dtype=torch.int64).fill_(1)
tensors = [("example", torch.arange(1)), ("offsets", torch.tensor([0, 1 << 21])), ("input_ids", ids), ("a", rows)]
commit_shard(Path(sys.argv[1]), ShardHeader(0, 1, 1, 0, "f"), [("x", torch.zeros(9))])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
commit_shard(Path(sys.argv[1]), ShardHeader(1, 1, 1 << 21, 0, "f"), tensors)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 << 10, "kB beyond the 272 MB of data"


# One process that imports torch, and forks one that dies for each step and moment of a commit.
CRASHES = """
import os, signal, sys
from pathlib import Path
import torch
from layerprobe.store.format import commit_shard
from layerprobe.store.headers import ShardHeader

folder = Path(sys.argv[1])
tensors = [("example", torch.arange(2)), ("offsets", torch.tensor([0, 2, 5])), ("input_ids", torch.arange(5))]
tensors.append(("layers.0", torch.arange(15.0).reshape(5, 3)))
header = ShardHeader(0, 2, 5, 0, "f" * 32, 1, {"layers.0": 4})
steps = []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def wrap(name, step, moment):
    real = getattr(os, name)
    def wrapped(*args, **kwargs):
        here = len(steps)
        steps.append(name)
        if here == step and moment == "before":
            die()
        if here == step and moment == "inside" and name == "write":
            real(args[0], bytes(args[1])[: len(args[1]) // 2])
            die()
        result = real(*args, **kwargs)
        if here == step and moment == "after":
            die()
        return result
    setattr(os, name, wrapped)

def commit(name, step, moment):
    (folder / name).mkdir()
    for function in ("open", "write", "fsync", "replace", "rename", "close"):
        wrap(function, step, moment)
    commit_shard(folder / name, header, tensors)

if (child := os.fork()) == 0:
    commit("undisturbed", -1, "never")
    (folder / "steps").write_text(" ".join(steps))
    os._exit(0)
os.waitpid(child, 0)
for step, name in enumerate((folder / "steps").read_text().split()):
    for moment in ("before", "inside", "after"):
        if moment == "inside" and name != "write":
            continue
        if (child := os.fork()) == 0:
            commit(f"{step}-{moment}", step, moment)
            os._exit(0)
        print(f"{step}-{moment}", -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_commit_killed_at_any_step_is_whole_or_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CRASHES, tmp_path], capture_output=True, text=True, check=True)
    steps = (tmp_path / "steps").read_text().split()
    assert steps == ["open", *["write"] * 5, "fsync", "close", "replace", "open", "fsync", "close"]
    expected = (tmp_path / "undisturbed" / "shard-000000.safetensors").read_bytes()
    killed = [line.split() for line in done.stdout.splitlines()]
    assert len(killed) == 2 * len(steps) + 5
    header, tensors = small_shard()
    for name, signal_number in killed:
        assert signal_number == "9"
        step, moment = name.split("-")
        path = tmp_path / name / "shard-000000.safetensors"
        if int(step) > steps.index("replace") or (int(step) == steps.index("replace") and moment == "after"):
            assert path.read_bytes() == expected
            assert read_header(path).num_tokens == 5
        else:
            assert not path.exists()
        commit_shard(path.parent, header, tensors)  # the same again goes over what is left
        assert path.read_bytes() == expected
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_refused_write_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    header, tensors = small_shard()
    with pytest.raises(StoreError, match=r"shard-000000.safetensors: cannot be written .*run the same command again"):
        commit_shard(tmp_path / "missing", header, tensors)
    with pytest.raises(StoreError, match="cannot be written"):
        commit_file(tmp_path / "missing" / "index.json", [b"{}"])


def test_a_full_device_is_an_error_not_a_crash(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    (tmp_path / "index.json.tmp").symlink_to("/dev/full")
    with pytest.raises(StoreError, match="No space left"):
        commit_file(tmp_path / "index.json", [b"{}"])
    assert not (tmp_path / "index.json").exists()


def test_a_file_needs_its_folder(tmp_path: Path) -> None:
    assert need_parent(str(tmp_path / "a.json")) == tmp_path / "a.json"
    (tmp_path / "file").touch()
    for folder in (tmp_path / "none", tmp_path / "file"):
        message = f"{folder / 'a.json'}: there is no folder {folder}. Make it, or choose another path."
        with pytest.raises(StoreError, match=re.escape(message)):
            need_parent(folder / "a.json")


@pytest.mark.parametrize("name", ["index.json", "tokenizer/layers.png", "plots/layers.png"])
def test_nothing_else_is_written_into_a_store(write_store: Callable[..., Any], name: str) -> None:
    folder = write_store().folder
    (folder / name).parent.mkdir(exist_ok=True)
    for _ in ("whole", "damaged"):
        with pytest.raises(OptionError, match=rf"{name}: lies in the store {folder}\. Choose another folder\."):
            need_parent(folder / name)
        (folder / "store.json").write_text("{")


@pytest.mark.parametrize("text", ['{"items": []}', "[1, 2]", "", '{"a": 1,}'])
def test_what_other_programs_call_store_json_is_no_store(tmp_path: Path, text: str) -> None:
    (tmp_path / "store.json").write_text(text)
    assert need_parent(tmp_path / "layers.png") == tmp_path / "layers.png"
    check_keepable(tmp_path / "kept")


def test_a_file_lies_where_its_path_leads(write_store: Callable[..., Any], tmp_path: Path) -> None:
    folder = write_store().folder
    beside = folder / ".." / "layers.png"
    assert need_parent(beside) == beside
    check_keepable(folder / ".." / "kept")
    (tmp_path / "plots").symlink_to(folder)
    (tmp_path / "all.json").symlink_to(folder / "index.json")
    for path in (tmp_path / "plots" / "layers.png", tmp_path / "all.json"):
        with pytest.raises(OptionError, match=rf"{path}: lies in the store {folder}\. Choose another folder\."):
            need_parent(path)
