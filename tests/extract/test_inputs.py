"""Every kind of input gives the same records each time, and every bad one says where it is bad."""

import datetime
import decimal
import io
import json
import subprocess
import sys
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from layerprobe.capture.units import encode_record
from layerprobe.errors import InputError
from layerprobe.extract.inputs import open_source
from layerprobe.extract.records import InputDigest, Record, check_text
from layerprobe.store import guard
from layerprobe.store.guard import parse_record

TEXTS = ["one", "", "中文 text", "two 😀"]


def read_twice(source: Any, field: str = "text") -> list[Record]:
    opened = open_source(source, field)
    first = list(opened)
    assert list(opened) == first
    return first


def texts_of(source: Any, field: str = "text") -> list[str]:
    return [record.text for record in read_twice(source, field)]


def test_a_text_file_gives_a_text_per_line_and_keeps_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    assert texts_of(path) == texts_of(str(path)) == TEXTS


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbfone\r\ntwo", b"one\ntwo\n", b"one\r\ntwo\r\n"])
def test_byte_order_marks_and_line_ends_are_no_part_of_a_text(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.TXT").write_bytes(raw)
    assert texts_of(tmp_path / "a.TXT") == ["one", "two"]


def test_json_lines_take_one_field_and_keep_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": number, "body": text, "tags": ["x"]}) for number, text in enumerate(TEXTS)]
    path.write_text("\n\n".join(lines))
    records = read_twice(path, "body")
    assert [record.text for record in records] == TEXTS
    assert records[2].fields == {"id": 2, "tags": ["x"]}


def test_csv_quotes_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\r\n"a, ""b""\r\nc",x\r\nplain,y\r\n,z\r\n')
    records = read_twice(path)
    assert [record.text for record in records] == ['a, "b"\r\nc', "plain", ""]
    assert [record.fields["label"] for record in records] == ["x", "y", "z"]


def test_a_long_document_fits_in_a_csv_field(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "word " * 50_000 + "\n")
    assert [len(text) for text in texts_of(path)] == [250_000]


def test_parquet_gives_its_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    records = read_twice(tmp_path / "a.parquet")
    assert [record.text for record in records] == TEXTS and records[3].fields == {"n": 4}
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"b\.parquet: is not parquet"):
        texts_of(tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet, row 1: field 'text' is NoneType"):
        texts_of(tmp_path / "c.parquet")


def test_parquet_without_its_extra_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(InputError, match=r"a\.parquet needs pyarrow, .* pip install 'layerprobe\[data\]'"):
        texts_of(tmp_path / "a.parquet")


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\nthird")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    (tmp_path / "notes.md").write_text("not an input")
    assert texts_of(tmp_path) == ["first", "second", "third"]


@pytest.mark.parametrize("texts", [TEXTS, tuple(TEXTS), [{"text": text} for text in TEXTS]])
def test_lists_of_strings_or_mappings_are_texts(texts: Any) -> None:
    assert texts_of(texts) == TEXTS


def test_a_generator_can_be_gone_through_again() -> None:
    assert texts_of(text for text in TEXTS) == TEXTS


def test_standard_input_can_be_gone_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO("\n".join(TEXTS).encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
    assert texts_of("-") == TEXTS


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.txt", b"fine\nca\xe9\n", r"a\.txt, line 2: not UTF-8 \(byte 0xe9 at position 2\)"),
        ("a.txt", b"\xef\xbb\xbfca\xe9", r"line 1: not UTF-8 \(byte 0xe9 at position 2\)"),
        ("a.txt", "wide".encode("utf-16"), "line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', r"a\.jsonl, line 2: no field 'text'; it holds 'body'.*--field"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 3}', "line 3: field 'text' is int, not a text"),
        ("a.jsonl", b"{}", "line 1: no field 'text'; it holds nothing"),
        ("a.jsonl", b'["a"]', "line 1: holds list, not an object"),
        ("a.jsonl", b'{"text": "a', r"line 1: is not JSON"),
        ("a.jsonl", b"[" * 99_999, r"line 1: is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: not UTF-8"),
        ("a.csv", b"body\nb", "line 2: no field 'text'; it holds 'body'"),
        ("a.csv", b"text,x\na,b,c", "line 2: has not the 2 columns"),
        ("a.csv", b"text,x\na", "line 2: has not the 2 columns"),
        ("a.csv", b'text\n"a"b', "line 2: is not CSV"),
        ("a.csv", b"text,x,text\na,b,c", r"a\.csv, line 1: names a column twice\. Rename one"),
        ("a.csv", b"text\n\xff", "line 2: not UTF-8"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=message):
        texts_of(tmp_path / name)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("nothing.txt", "no input 'nothing.txt': there is no such file or folder"),
        # a text in the place of a path is a name that no system takes
        ("The kettle whistled. " * 20, r"^no input 'The kettle .*\.\.\.: there is no such file or folder"),
        ("", "no input '': give a path, or '-' for standard input"),
        ("hf:", "'hf:': names no data set. Use hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"),
        ("hf:imdb:", "'hf:imdb:': names no data set"),
        ("hf://datasets/imdb", "names no data set"),
        ("hf:a:b:c:d", "names no data set"),
        (3, "int is no input"),
        ({"text": "a"}, "dict is no input"),
        ({"a", "b"}, "set is no input"),
        (b"abc", "bytes is no input"),
        (["a", 3], "text 1 is int, not a text"),
        ([{"body": "a"}], "text 0: no field 'text'"),
    ],
)
def test_what_is_no_input_is_refused(texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        texts_of(texts)


def test_a_data_frame_is_refused_and_its_rows_and_columns_are_read() -> None:
    """Going through one gives the names of its columns."""
    frame = pytest.importorskip("pandas").DataFrame({"text": ["one", "two"], "label": [1, 2]})
    with pytest.raises(InputError, match=r"DataFrame is no input: give .* frame\.to_dict\('records'\)\)\.$"):
        texts_of(frame)
    assert texts_of(frame["text"]) == ["one", "two"] == texts_of(frame.to_dict("records"))
    table = pytest.importorskip("pyarrow").Table.from_pandas(frame)
    with pytest.raises(InputError, match=r"Table is no input: give .* a column of it as a list, .*in pandas"):
        texts_of(table)
    assert texts_of(table["text"].to_pylist()) == ["one", "two"] == texts_of(table.to_pylist())


def test_data_sets_are_read_by_split_and_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split, rows in {"train": [("good", 1), ("bad", 0)], "test": [("fair", 1)]}.items():
        lines = [json.dumps({"text": text, "label": label, "more": {"words": [text]}}) for text, label in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    source = open_source(f"hf:{folder}")
    expected = [Record(text, {"label": label, "more": {"words": [text]}}) for text, label in (("good", 1), ("bad", 0))]
    assert list(source) == expected == list(source) and source.name == f"hf:{folder}"
    assert texts_of(f"hf:{folder}:train[:1]") == ["good"] == texts_of(f"hf:{folder}:default:train[:1]")
    assert texts_of(f"hf:{folder}:test") == ["fair"] == texts_of(f"hf:{folder}:default:test")
    with pytest.raises(InputError, match=r"reviews:dev: the data set cannot be loaded \(.*dev.*\)\. Check its name"):
        open_source(f"hf:{folder}:dev")
    with pytest.raises(InputError, match=r"reviews, row 0: no field 'body'; it holds"):
        texts_of(f"hf:{folder}", "body")


def test_files_and_folders_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no input file\. Files end in \.txt"):
        open_source(tmp_path)
    (tmp_path / "a.docx").touch()
    with pytest.raises(InputError, match=r"\.docx is not known\. Files end in \.txt"):
        open_source(tmp_path / "a.docx")
    (tmp_path / "a").touch()
    with pytest.raises(InputError, match="no ending is not known"):
        open_source(tmp_path / "a")


def test_a_field_of_plain_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(InputError, match=r"a\.txt: is plain text and has no field 'body'\. Leave out the field"):
        texts_of(tmp_path / "a.txt", "body")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one")))
    with pytest.raises(InputError, match="standard input: is plain text and has no field 'body'"):
        open_source("-", "body")
    with pytest.raises(InputError, match=r"text 1: is plain text and has no field 'body'\. Leave out the field"):
        texts_of([{"body": "one"}, "two"], "body")


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "one"}')
    opened = open_source(tmp_path)
    assert len(list(opened)) == 2
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(InputError, match=r"b\.jsonl: is gone\. Put it back"):
        list(opened)


@pytest.mark.skipif(sys.platform != "linux", reason="a process reads its own memory as a file")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_file_that_the_disk_does_not_give_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/proc/self/mem")  # opens like a file, and its first page is an EIO
    with pytest.raises(InputError, match=rf"{name}: cannot be read \(Input/output error\)") as caught:
        list(open_source(tmp_path / name))
    assert isinstance(caught.value.__cause__, OSError)


def test_columns_of_one_name_are_refused_in_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table([pyarrow.array(["one"]), pyarrow.array(["two"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: names a column twice\. Rename one"):
        list(open_source(tmp_path / "a.parquet"))


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_standard_input_that_fits_nowhere_is_refused() -> None:
    code = (
        "import resource; from layerprobe.errors import InputError; from layerprobe.extract.inputs import open_source\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: open_source('-')\n"
        "except InputError as error: print(error)"
    )
    ended = subprocess.run([sys.executable, "-c", code], input="text\n" * 1000, capture_output=True, text=True)
    said = "standard input: cannot be kept (File too large). Name a folder with room in TMPDIR.\n"
    assert (ended.stdout, ended.stderr) == (said, "")


def test_a_digest_tells_texts_fields_and_order() -> None:
    def digest(*records: Record) -> bytes:
        made = InputDigest("texts")
        assert all(made.add(record) > 0 for record in records)
        return made.digest()

    one, two = Record("one"), Record("two")
    others = [digest(), digest(one), digest(two, one), digest(one, two, one), digest(Record("one", {"x": 1}), two)]
    assert len({digest(one, two), *others}) == 6
    assert digest(Record("a", {"x": 1, "y": 2})) == digest(Record("a", {"y": 2, "x": 1}))


@pytest.mark.parametrize("record", [Record('a\n"é\U0001f600'), Record("", {"y": [1.5, None], "x": "\u2028"})])
def test_a_digest_is_of_the_json_of_texts_and_fields(record: Record) -> None:
    line = json.dumps([record.text, record.fields], ensure_ascii=False, sort_keys=True).encode()
    made = InputDigest("texts")
    assert made.add(record) == len(line)
    assert made.digest() == xxhash.xxh3_128(line + b"\n").digest()


def test_half_a_character_is_refused_with_its_place() -> None:
    with pytest.raises(InputError, match=r"texts, text 3: holds half a character \('\\ud800' at 2\)"):
        check_text("ab\ud800", "texts", 3)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array([{"n": np.int8(1)}, None], dtype=object), [{"n": 1}, None]),
        (np.array(3), 3),
        (torch.tensor(3), 3),
        (torch.tensor([True, False]), [True, False]),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        ([np.int64(1), (np.float32(2), "x")], [1, [2.0, "x"]]),
        (types.MappingProxyType({"n": np.int64(1)}), {"n": 1}),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        (datetime.datetime(2024, 2, 29, 12, 30), "2024-02-29T12:30:00"),
        (decimal.Decimal("0.10"), "0.10"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (np.longdouble(0.5), 0.5),
        (None, None),
    ],
    ids=repr,
)
def test_fields_given_in_python_are_what_json_says_of_them(value: Any, plain: Any) -> None:
    (record,) = read_twice([{"text": "a", "x": value}])
    assert record.fields == {"x": plain} and json.dumps(record.fields) == json.dumps({"x": plain})


def test_subclasses_of_texts_and_numbers_stay_what_they_are() -> None:
    (record,) = read_twice([{"text": "a", "x": type("Own", (int,), {})(3), "y": float("inf")}])
    assert json.dumps(record.fields) == '{"x": 3, "y": Infinity}'


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"x": object()},
            r"text 1: field 'x' is object, which cannot be kept as JSON\. Give a text, a number.*leave it out",
        ),
        ({"x": b"a"}, "field 'x' is bytes"),
        ({"x": {1}}, "field 'x' is set"),
        ({"x": 1j}, "field 'x' is complex"),
        ({"x": torch.ones(2, 2).to_sparse()}, r"field 'x' is Tensor of torch\.float32"),
        ({"x": {"y": [0, {"z": b"a"}]}}, r"field 'x\.y\[1\]\.z' is bytes"),
        ({"x": np.array([b"a"])}, r"field 'x' is ndarray of \|S1, which"),
        ({"x": np.complex64(1)}, "field 'x' is complex64 of complex64"),
        ({"x": np.datetime64("2024-02-29T12", "ns")}, r"field 'x' is datetime64 of datetime64\[ns\]"),
        ({"x": torch.tensor(1j)}, r"field 'x' is Tensor of torch\.complex64"),
        ({"x": np.array([[1], b"a"], dtype=object)}, r"field 'x\[1\]' is bytes"),
        ({3: "a"}, "text 1: a field is named 3, which is int and cannot be kept as JSON. Name it by a text"),
        ({"b": 1, 3: "a"}, "a field is named 3, which is int"),
        ({"x": {None: 1}}, "a field in 'x' is named None, which is NoneType"),
    ],
)
def test_fields_that_cannot_be_kept_as_json_are_refused(fields: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        texts_of([{"text": "a", "x": 1}, {"text": "b", **fields}])


def test_a_field_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(InputError, match="text 0: its fields are nested too deeply, which cannot be kept as JSON"):
        texts_of([{"text": "a", "x": endless}])


def test_parquet_keeps_dates_as_texts_and_refuses_what_is_no_json(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    day = datetime.date(2024, 2, 29)
    parquet.write_table(pyarrow.table({"text": ["a"], "day": [day]}), tmp_path / "a.parquet")
    assert read_twice(tmp_path / "a.parquet")[0].fields == {"day": "2024-02-29"}
    parquet.write_table(pyarrow.table({"text": ["a"], "raw": [b"a"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet, row 0: field 'raw' is bytes, which cannot be kept as JSON"):
        texts_of(tmp_path / "b.parquet")


def test_fields_with_more_values_than_are_read_are_refused() -> None:
    most = guard._MOST_RECORD_VALUES
    with pytest.raises(
        InputError, match=r"the texts, text 0: its other fields cannot be kept.*more than 1,048,576 value"
    ):
        InputDigest("the texts").add(Record("a", {"audio": [0] * (most + 1)}))
    assert InputDigest("the texts").add(Record("," * (most + 1), {"audio": [0]}))


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.text(',[]{}"\\a', max_size=8),
        lambda inner: st.lists(inner) | st.dictionaries(st.text("ab,"), inner),
    ),
    st.text(',[]{}"\\a'),
)
def test_what_a_digest_takes_is_read_back(value: Any, text: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(guard, "_MOST_RECORD_VALUES", 12)
        patched.setattr(guard, "_MOST_RECORD_DEPTH", 4)
        record = {"text": text, "fields": {"field": value}}
        try:
            InputDigest("the texts").add(Record(text, record["fields"]))
        except InputError:
            with pytest.raises(ValueError, match=r"values|nested"):
                parse_record(encode_record(record))
        else:
            assert parse_record(encode_record(record)) == record
