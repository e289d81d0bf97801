"""Stores that a stranger made: right rows or one of layerprobe's errors, whatever was done to them.

A small store with every kind of site and dtype, records and a tokenizer is built once; each case spoils a copy of it.
"""

import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import layerprobe as lp
from fuzz.fuzz_header import forge_checksum
from fuzz.mutations import mutate_bytes, mutate_json, write_json
from layerprobe.cli.views import describe_example, describe_store
from layerprobe.errors import FormatError, LayerProbeError, SiteError, StoreError
from layerprobe.store.description import commit_description
from layerprobe.store.format import commit_shard
from layerprobe.store.guard import LARGE, SMALL, open_inside, parse_json, parse_record, read_inside
from layerprobe.store.headers import ShardHeader
from layerprobe.store.index import commit_index
from layerprobe.store.shards import ScaledRows

FINGERPRINT = "0" * 32
FIRST, SECOND = "shard-000000.safetensors", "shard-000001.safetensors"
UNITS = ((3, 0, 2), (1, 4))
DTYPES = ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "int8")
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {f"w{number}": number for number in range(20)}, "unk_token": "w0"},
}
thoroughly = settings(max_examples=150, deadline=None)


@dataclass(frozen=True)
class Sound:
    """A store as it was written, and what it holds."""

    files: dict[str, bytes]
    values: dict[str, list[Tensor]]

    def write(self, folder: Path) -> Path:
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder


def whole(value: Tensor | ScaledRows) -> Tensor:
    return value.float() if isinstance(value, ScaledRows) else value


def build(folder: Path) -> dict[str, list[Tensor]]:
    """Write the store, and give each site's values by example, with `input_ids` among them."""
    maker = torch.Generator().manual_seed(3)
    sites = {dtype: {"kind": "token", "dtype": dtype, "width": 3} for dtype in DTYPES}
    sites["pooler"] = {"kind": "example", "dtype": "float32", "width": 4}
    sites["weights"] = {"kind": "attention", "dtype": "float16", "width": 2}
    commit_description(folder, {"sites": sites, "fingerprint": FINGERPRINT, "pool": None, "model": {"id": "demo"}})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    values: dict[str, list[Tensor]] = {name: [] for name in (*sites, "input_ids")}
    headers, first = [], 0
    for unit, lengths in enumerate(UNITS):
        order = list(reversed(range(len(lengths))))
        made: dict[str, list[Tensor]] = {}
        for dtype in DTYPES:
            made[dtype] = [torch.randn(count, 3, generator=maker).mul(9).to(getattr(torch, dtype)) for count in lengths]
        scales = [torch.rand(count, generator=maker) for count in lengths]
        made["pooler"] = [torch.randn(4, generator=maker) for _ in lengths]
        made["weights"] = [torch.rand(2, count, count, generator=maker).half() for count in lengths]
        made["input_ids"] = [torch.randint(20, (count,), generator=maker) for count in lengths]
        records = [json.dumps({"text": f"t{first + k}", "fields": {"k": k}}).encode() for k in order]
        tensors = [
            ("example", torch.tensor(order) + first),
            ("offsets", torch.tensor([0, *(lengths[k] for k in order)]).cumsum(0)),
            ("record_offsets", torch.tensor([0, *map(len, records)]).cumsum(0)),
            ("records", torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)),
            ("int8:scale", torch.cat([scales[k] for k in order])),
            ("pooler", torch.stack([made["pooler"][k] for k in order])),
            ("weights", torch.cat([made["weights"][k].flatten() for k in order])),
            *((name, torch.cat([made[name][k] for k in order])) for name in ("input_ids", *DTYPES)),
        ]
        header = ShardHeader(unit, len(lengths), sum(lengths), first, FINGERPRINT)
        commit_shard(folder, header, sorted(tensors, key=lambda named: -named[1].dtype.itemsize))
        made["int8"] = [v.float() * s[:, None] for v, s in zip(made["int8"], scales, strict=True)]
        for name, found in made.items():
            values[name] += found
        headers.append(header)
        first += len(lengths)
    commit_index(folder, headers)
    return values


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = tmp_path_factory.mktemp("sound")
    values = build(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return Sound({str(path.relative_to(folder)): path.read_bytes() for path in files}, values)


def list_readings(folder: Path) -> Iterator[tuple[str, int, Tensor]]:
    """Read a store in every way that there is, and give each value that came; its own errors pass."""
    try:
        store = lp.open(folder)
        describe_store(store)
        list(store.ordinals())
    except LayerProbeError:
        return
    for ordinal in range(sum(map(len, UNITS))):
        try:
            example = store.example(ordinal)
            describe_example(example)
            yield "input_ids", ordinal, example.input_ids
            assert example.text is None or isinstance(example.text, str)
        except LayerProbeError:
            pass
        for site in (*DTYPES, "pooler", "weights"):
            try:
                yield site, ordinal, whole(store[site][ordinal])
            except LayerProbeError:
                continue
    for site in store.sites:
        for read in (store[site].pooled, lambda view=store[site]: list(view.rows(2, shuffle=True))):
            try:
                read()
            except LayerProbeError:
                continue
    asking: list[dict[str, Any]] = [{"token": "w3"}, {"token_id": 3}, {"text": "t1"}]
    for asked in asking:
        try:
            list(store.where(**asked))
        except LayerProbeError:
            continue


def same(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bool((one.contiguous().view(-1).view(torch.uint8) == other.contiguous().view(-1).view(torch.uint8)).all())
    )


def test_a_sound_store_gives_every_row(sound: Sound, tmp_path: Path) -> None:
    found = list(list_readings(sound.write(tmp_path)))
    assert len(found) == 5 * (len(DTYPES) + 3)
    assert all(same(value, sound.values[name][ordinal]) for name, ordinal, value in found)


@thoroughly
@given(seed=st.integers(0, 2**63), data=st.data())
def test_spoilt_bytes_give_right_rows_or_an_error(sound: Sound, seed: int, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(sound.files)))
    with tempfile.TemporaryDirectory() as made:
        folder = sound.write(Path(made))
        (folder / name).write_bytes(mutate_bytes(sound.files[name], random.Random(seed)))
        for site, ordinal, value in list_readings(folder):
            assert same(value, sound.values[site][ordinal]), f"{site!r} of {ordinal} is another value"


@thoroughly
@given(seed=st.integers(0, 2**63), name=st.sampled_from([FIRST, SECOND, "store.json", "index.json"]))
def test_forged_structure_gives_rows_or_an_error(sound: Sound, seed: int, name: str) -> None:
    source = random.Random(seed)
    with tempfile.TemporaryDirectory() as made:
        folder = sound.write(Path(made))
        old = sound.files[name]
        if name.endswith(".json"):
            (folder / name).write_bytes(write_json(mutate_json(json.loads(old), source), source))
        else:
            (folder / name).write_bytes(forge_header(old, lambda entries: mutate_json(entries, source)))
        for site, ordinal, value in list_readings(folder):
            # another shard than the forged one is as it was
            is_other = name == (SECOND if ordinal < len(UNITS[0]) else FIRST)
            assert not is_other or same(value, sound.values[site][ordinal])


@thoroughly
@given(seed=st.integers(0, 2**63), data=st.data())
def test_forged_tensors_give_rows_or_an_error(sound: Sound, seed: int, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["example", "offsets", "input_ids", "record_offsets", "records", "int8:scale"]))
    with tempfile.TemporaryDirectory() as made:
        folder = sound.write(Path(made))
        (folder / FIRST).write_bytes(forge_tensor(sound.files[FIRST], name, random.Random(seed)))
        list(list_readings(folder))


def forge_header(old: bytes, change: Any) -> bytes:
    """Change a header and make its checksum right."""
    length = struct.unpack("<Q", old[:8])[0]
    entries = change(json.loads(old[8 : 8 + length]))
    text = json.dumps(entries).encode()
    text = forge_checksum(text + b" " * (-(8 + len(text)) % 64))
    return struct.pack("<Q", len(text)) + text + old[8 + length :]


def forge_tensor(old: bytes, name: str, source: random.Random) -> bytes:
    """Change some items of a tensor to hostile ones, and make both checksums right."""
    from layerprobe.store.headers import checksum

    length = struct.unpack("<Q", old[:8])[0]
    entries = json.loads(old[8 : 8 + length])
    start, stop = (8 + length + offset for offset in entries[name]["data_offsets"])
    spoilt = bytearray(old)
    for _ in range(source.randint(1, 3)):
        if name == "records":
            spoilt[start:stop] = mutate_bytes(bytes(spoilt[start:stop]), source)[: stop - start].ljust(stop - start)
        else:
            size = 4 if name == "int8:scale" else 8
            place = start + size * source.randrange((stop - start) // size)
            number = source.choice((0, 1, -1, 2, 7, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63)))
            spoilt[place : place + size] = struct.pack("<q", number)[:size]

    def change(entries: dict[str, Any]) -> dict[str, Any]:
        said = json.loads(entries["__metadata__"]["checksums"])
        said[name] = checksum(bytes(spoilt[start:stop]))
        entries["__metadata__"]["checksums"] = json.dumps(said)
        return entries

    return forge_header(bytes(spoilt), change)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "dangling", "socket"])
@pytest.mark.parametrize("name", ["store.json", "index.json", FIRST, "tokenizer/tokenizer.json"])
def test_what_is_no_regular_file_is_refused_at_once(sound: Sound, tmp_path: Path, name: str, kind: str) -> None:
    folder, outside = sound.write(tmp_path / "store"), tmp_path / "outside"
    outside.write_bytes(sound.files[name])
    path = folder / name
    path.unlink()
    if kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(path.parent)  # the name of a socket is short
            server.bind(path.name)
    else:
        {
            "link": lambda: path.symlink_to(outside),
            "pipe": lambda: os.mkfifo(path),
            "folder": path.mkdir,
            "dangling": lambda: path.symlink_to(tmp_path / "nowhere"),
        }[kind]()
    with pytest.raises(FormatError, match=rf"{path.name}: is (a link|not a regular file)"):
        lp.open(folder).example(0)


def test_a_tokenizer_folder_that_leads_elsewhere_is_refused(sound: Sound, tmp_path: Path) -> None:
    folder = sound.write(tmp_path / "store")
    (folder / "tokenizer").rename(tmp_path / "elsewhere")
    (folder / "tokenizer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="tokenizer: is not a folder"):
        lp.open(folder).example(0)


def test_a_store_reached_through_a_link_of_the_caller_opens(sound: Sound, tmp_path: Path) -> None:
    sound.write(tmp_path / "store")
    (tmp_path / "mine").symlink_to(tmp_path / "store")
    assert len(lp.open(tmp_path / "mine")) == 5


@pytest.mark.parametrize("file", ["../outside", "/etc/passwd", "a/../../outside", ""])
def test_a_name_that_leads_out_of_the_store_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / "outside").write_text("secret")
    (tmp_path / "store" / "a").mkdir(parents=True)
    with pytest.raises(FormatError, match="is no file of a store"):
        open_inside(tmp_path / "store", file)


def test_code_beside_a_tokenizer_is_never_run(sound: Sound, tmp_path: Path) -> None:
    folder = sound.write(tmp_path / "store")
    mark = tmp_path / "ran"
    (folder / "tokenizer" / "mine.py").write_text(f"open({str(mark)!r}, 'w')\nclass Mine: pass\n")
    asked = {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(asked))
    example = lp.open(folder).example(0)
    assert example.tokens == [f"w{token_id}" for token_id in example.input_ids.tolist()]
    assert not mark.exists() and "mine" not in sys.modules


@pytest.mark.parametrize("token_id", [-1, 20, 2**32, 2**62])
def test_ids_beyond_the_vocabulary_have_no_token(sound: Sound, tmp_path: Path, token_id: int) -> None:
    from layerprobe.store.vocabulary import Vocabulary

    found = Vocabulary("tokenizer.json", json.dumps(TOKENIZER).encode())
    assert found.tokens(torch.tensor([3, token_id])) == ["w3", ""]


BAD_JSON = [
    (b'{"a": 1e400}', "not a finite number"),
    (b'{"a": NaN}', "not a finite number"),
    (b'{"a": -Infinity}', "not a finite number"),
    (b'{"a": ' + b"1" * 5000 + b"}", "a whole number of 5,000 digits"),
    (b'{"a": 1, "a": 2}', "names 'a' twice"),
    (b'{"a": "\\ud800"}', "surrogates not allowed"),
    (b'{"\\udfff": 1}', "surrogates not allowed"),
    (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
    (b'{"a":' * 5000, "nested more than 64 deep"),
    (b'{"a": 1}'.decode().encode("utf-16"), "invalid start byte"),
    (b"[" + b"0," * SMALL.num_values + b"0]", "more than 524,288 values"),
    (b" " * (SMALL.num_bytes + 1), "bytes of JSON; at most"),
]


@pytest.mark.parametrize(("text", "message"), BAD_JSON, ids=range(len(BAD_JSON)))
def test_json_beyond_the_bounds_is_refused_by_name(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text, SMALL)
    (tmp_path / "store.json").write_bytes(text)
    with pytest.raises(FormatError, match=r"store\.json: ") as refused:
        lp.open(tmp_path)
    assert len(str(refused.value)) < 600


@given(value=st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
))  # fmt: skip
@settings(deadline=None)
def test_json_within_the_bounds_is_what_the_standard_library_reads(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text.encode(), SMALL) == json.loads(text)


def test_a_record_keeps_what_a_user_may_put_into_it() -> None:
    nested: Any = 1
    for _ in range(200):
        nested = [nested]
    record = {"text": "[[[,,,{{{", "fields": {"x": float("inf"), "deep": nested, "half": "\ud800", "long": 10**300}}
    assert parse_record(json.dumps(record).encode()) == record


def test_overlapping_shards_of_an_unfinished_store_are_refused(sound: Sound, tmp_path: Path) -> None:
    folder = sound.write(tmp_path)
    (folder / "index.json").unlink()

    def change(entries: dict[str, Any]) -> dict[str, Any]:
        entries["__metadata__"]["first_example"] = "2"
        return entries

    (folder / SECOND).write_bytes(forge_header(sound.files[SECOND], change))
    with pytest.raises(FormatError, match=f"{FIRST} and {SECOND} both hold example 2"):
        lp.open(folder)


def test_an_index_that_names_a_shard_twice_is_refused(sound: Sound, tmp_path: Path) -> None:
    folder = sound.write(tmp_path)
    index = json.loads(sound.files["index.json"])
    index["shards"].append({**index["shards"][1], "first_example": 5, "examples": 0, "tokens": 0})
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"index\.json: is damaged: it names a shard twice"):
        lp.open(folder)


def test_a_site_whose_name_would_drive_a_terminal_is_refused(sound: Sound, tmp_path: Path) -> None:
    folder = sound.write(tmp_path)
    said = json.loads(sound.files["store.json"])
    said["sites"]["\x1b[2J"] = said["sites"]["float32"]
    (folder / "store.json").write_text(json.dumps(said))
    with pytest.raises(FormatError, match="is no name of a site"):
        lp.open(folder)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "store.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match=r"has 1,099,511,627,776 bytes; at most 8,388,608 are read"):
        lp.open(tmp_path)
    with pytest.raises(FormatError, match="at most 10 are read"):
        read_inside(tmp_path, "store.json", 10)


def test_a_removed_site_is_missed_by_its_name(sound: Sound, tmp_path: Path) -> None:
    folder = sound.write(tmp_path)
    said = json.loads(sound.files["store.json"])
    del said["sites"]["pooler"]
    (folder / "store.json").write_text(json.dumps(said))
    with pytest.raises(SiteError, match="no site 'pooler'"):
        lp.open(folder)["pooler"]


def make_bombs(sound: Sound, folder: Path) -> dict[str, Path]:
    """Write stores that ask for much more than they weigh."""
    made: dict[str, Path] = {}

    def begin(name: str) -> Path:
        made[name] = sound.write(folder / name)
        return made[name]

    many = b"[]," * (SMALL.num_values - 9) + b"[]"
    (begin("description") / "store.json").write_bytes(b'{"format":1,"pool":null,"sites":{"a":[' + many + b"]}}")
    (begin("index") / "index.json").write_bytes(b'{"shards":[' + b"{}," * (LARGE.num_values - 9) + b"{}]}")
    (begin("millions of shards") / "index.json").write_bytes(b'{"shards":[' + b"{}," * 10_000_000 + b"{}]}")
    text = b'{"__metadata__":{},"a":[' + many + b"]}"
    (begin("header") / FIRST).write_bytes(struct.pack("<Q", len(text)) + text)
    text = b"{" + b",".join(b'"%d":{}' % number for number in range(600_000)) + b"}"
    (begin("millions of tensors") / FIRST).write_bytes(struct.pack("<Q", len(text)) + text)
    with open(begin("long header") / FIRST, "wb") as file:
        file.write(struct.pack("<Q", 100_000_000) + b'{"')
        file.truncate(200_000_000)

    def widen(entries: dict[str, Any]) -> dict[str, Any]:
        entries["nothing"] = {"dtype": "F32", "shape": [0, 10**18, 10**18], "data_offsets": [0, 0]}
        return entries

    (begin("shape") / FIRST).write_bytes(forge_header(sound.files[FIRST], widen))
    index = json.loads(sound.files["index.json"])
    index["shards"][1].update(examples=10**10, tokens=10**11)
    index.update(examples=3 + 10**10, tokens=5 + 10**11)
    (begin("claims") / "index.json").write_text(json.dumps(index))
    said = json.loads(sound.files["store.json"])
    said["sites"]["float32"]["width"] = 1 << 24
    (begin("width") / "store.json").write_text(json.dumps(said))
    tokenizer = begin("tokenizer") / "tokenizer" / "tokenizer.json"
    with open(tokenizer, "wb") as file:
        file.truncate(1 << 40)
    # thirty-two thousand million repeats, were the pattern compiled
    pattern = {"type": "Split", "pattern": {"Regex": "(((a{2000}){2000}){2000}b)*"}, "behavior": "Isolated"}
    tokenizer = begin("pattern") / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(json.dumps({**TOKENIZER, "pre_tokenizer": {**pattern, "invert": False}}))
    return made


# One process that imports torch, and forks one for each store, whose memory and time are bounded by the system.
READ_BOMBS = """
import os, resource, signal, sys
from pathlib import Path
import layerprobe as lp
from layerprobe.cli.views import describe_store
from layerprobe.errors import LayerProbeError

def size():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

def read(folder):
    asked = [
        lambda: describe_store(lp.open(folder)),
        lambda: lp.open(folder).example(0),
        lambda: lp.open(folder)["float32"].pooled(),
        lambda: next(lp.open(folder)["float32"].rows(1 << 20, shuffle=True)),
        lambda: lp.open(folder).where(token_id=3),
        lambda: lp.open(folder).where(text="t1"),
    ]
    for ask in asked:
        try:
            ask()
            print("fine")
        except LayerProbeError as error:
            print(type(error).__name__, str(error)[:300].replace(chr(10), " "))

for folder in sys.argv[2:]:
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        limit = size() + int(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.alarm(60)
        print("#", os.path.basename(folder))
        read(folder)
        sys.stdout.flush()
        os._exit(0)
    print("!", os.path.basename(folder), os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded through /proc")
def test_stores_that_ask_for_memory_are_refused_within_bounds(sound: Sound, tmp_path: Path) -> None:
    bombs = make_bombs(sound, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", READ_BOMBS, str(1536 << 20), *map(str, bombs.values())],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    ends = dict(line[2:].rsplit(" ", 1) for line in done.stdout.splitlines() if line.startswith("! "))
    assert ends == dict.fromkeys(bombs, "0"), done.stdout + done.stderr
    said: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("# "):
            said[line[2:]] = []
        elif not line.startswith("! "):
            said[next(reversed(said))].append(line)
    for name, message in {
        "description": "store.json: is not the JSON of a store|store.json: lacks|store.json: is damaged",
        "index": "index.json: is damaged|more than 4,194,304 values",
        "millions of shards": "index.json: .*more than 4,194,304 values",
        "header": "shard-000000.*: its header is damaged",
        "millions of tensors": "shard-000000.*: its header is damaged",
        "long header": "shard-000000.*: is cut or no shard",
        "shape": "shard-000000.*: its header is damaged.*does not fill",
        "claims": "shard-000001.*: does not hold the examples that index.json says",
        "width": "shard-00000[01].*: 'float32' is .*asks for",
        "tokenizer": "tokenizer.json: has 1,099,511,627,776 bytes",
    }.items():
        refusals = [line for line in said[name] if line != "fine"]
        assert refusals and all(re.search(message, line) for line in refusals), f"{name}: {chr(10).join(said[name])}"
    assert said["pattern"] == ["fine"] * 6


def test_a_store_with_more_shards_or_sites_than_are_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerprobe.store.index.MOST_SHARDS", 2)
    headers = [ShardHeader(unit, 1, 1, unit, FINGERPRINT) for unit in range(3)]
    with pytest.raises(StoreError, match=r"index\.json: cannot be written \(3 shards; at most 2 are read\)"):
        commit_index(tmp_path, headers)
    monkeypatch.setattr("layerprobe.store.description.MOST_SITES", 2)
    with pytest.raises(StoreError, match="3 sites; at most 2 are read"):
        commit_description(tmp_path, {"sites": {name: {} for name in "abc"}})
    sites = [(f"layers.{number}" + "x" * 900, torch.empty(0, 1)) for number in range(9000)]
    with pytest.raises(StoreError, match=r"shard-000000.*its header has .* bytes; at most 8,388,608 are read"):
        commit_shard(tmp_path, headers[0], sites)
    assert not list(tmp_path.iterdir())


def test_what_is_shown_of_an_example_holds_no_control_characters(tmp_path: Path) -> None:
    sign = "\x1b[2J"
    example = lp.open(build_shown(tmp_path, sign)).example(0)
    assert example.text == sign and example.tokens == [sign] and example.fields == {sign: sign}
    assert sign[0] not in describe_example(example)


def build_shown(folder: Path, sign: str) -> Path:
    """Write a store of one token, whose text, field and token are `sign`."""
    record = json.dumps({"text": sign, "fields": {sign: sign}}).encode()
    tensors = [
        ("example", torch.tensor([0])),
        ("offsets", torch.tensor([0, 1])),
        ("input_ids", torch.tensor([1])),
        ("record_offsets", torch.tensor([0, len(record)])),
        ("layers.0", torch.ones(1, 2)),
        ("records", torch.frombuffer(bytearray(record), dtype=torch.uint8)),
    ]
    sites = {"layers.0": {"kind": "token", "dtype": "float32", "width": 2}}
    commit_description(folder, {"sites": sites, "fingerprint": FINGERPRINT, "pool": None})
    commit_shard(folder, ShardHeader(0, 1, 1, 0, FINGERPRINT), tensors)
    (folder / "tokenizer").mkdir()
    model = {"type": "WordLevel", "vocab": {"w0": 0, sign: 1}, "unk_token": "w0"}
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({**TOKENIZER, "model": model}))
    return folder
