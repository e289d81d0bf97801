"""Tables and sizes as people see them."""

import importlib
import pkgutil

import numpy as np
import pytest
import torch

import layerprobe as lp
from layerprobe.capture.covariances import SiteCovariance
from layerprobe.store.examples import Example
from layerprobe.store.shards import ScaledRows
from layerprobe.tables import format_bytes, format_count, format_dtype, format_table, format_time, format_value


def test_numbers_stand_to_the_right_and_words_to_the_left() -> None:
    table = format_table(("site", "width"), [("embeddings", 8), ("layers.0", 1024), ("logits", None)])
    assert table.split("\n") == [
        "site        width",
        "----------  -----",
        "embeddings      8",
        "layers.0     1024",
        "logits",
    ]


def test_wide_letters_and_accents_keep_columns_in_line() -> None:
    """A terminal gives a Chinese letter two columns, and an accent on its own none."""
    table = format_table(("token", "norm"), [("模型", 1.5), ("e\u0301", 2.25), ("日本語の", 0.5), ("ok", 1.0)])
    assert table.split("\n") == [
        "token     norm",
        "--------  ----",
        "模型       1.5",
        "e\u0301         2.25",
        "日本語の   0.5",
        "ok         1.0",
    ]


def test_a_cell_stays_on_its_line_and_commands_no_terminal() -> None:
    table = format_table(("token", "n"), [("a\x1b[31mb\nc\td", 1)])
    assert table == "token        n\n-----------  -\na [31mb c d  1"


def test_table_without_rows_is_its_headers() -> None:
    assert format_table(("a", "bcd"), []) == "a  bcd\n-  ---"


def test_rows_may_come_from_an_iterator() -> None:
    assert format_table(("n",), ((number,) for number in (1, 10))) == " n\n--\n 1\n10"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_500_000_000, "1.5 GB"),
        (-2_500, "-2.5 kB"),
        (999_960, "1.0 MB"),
        (999.7, "1.0 kB"),
        (999_900, "999.9 kB"),
        (3e15, "3000.0 TB"),
    ],
)
def test_bytes_have_a_decimal_unit(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_counts_have_a_plural() -> None:
    assert [format_count(number, "shard") for number in (0, 1, 1024)] == ["0 shards", "1 shard", "1,024 shards"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (119.9, "119.9 s"),
        (120, "2.0 minutes"),
        (5400, "90.0 minutes"),
        (9000, "2.5 hours"),
        (2 * 86400, "2.0 days"),
        (5000 * 365 * 86400, "5,000.0 years"),
    ],
)
def test_times_are_written_in_the_largest_unit_that_they_have_two_of(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64, torch.uint8])
def test_dtypes_are_named_as_numpy_names_them(dtype: torch.dtype) -> None:
    assert format_dtype(dtype) == np.dtype(torch.empty(0, dtype=dtype).numpy().dtype).name


def _list_results() -> list[type]:
    """List every class of the package that can lay itself out as a table."""
    found = []
    for info in pkgutil.walk_packages(lp.__path__, "layerprobe."):
        home = importlib.import_module(info.name)
        found += [one for one in vars(home).values() if isinstance(one, type) and one.__module__ == info.name]
    return [one for one in found if callable(vars(one).get("table"))]


def test_what_can_be_a_table_is_one_where_it_is_printed_or_is_the_last_line_of_a_cell() -> None:
    results = _list_results()
    assert len(results) >= 11
    for one in results:
        assert one.__str__ is not object.__str__, one
        assert one.__repr__ is one.__str__, one


def test_what_holds_tensors_is_shown_by_their_shapes() -> None:
    wide = torch.zeros(1000, dtype=torch.float64)
    assert format_value({"layers.0": wide.half(), "n": 3}) == "{'layers.0': Tensor[1000] float16, 'n': 3}"
    seen = SiteCovariance(7, 0, wide, torch.zeros(2, 2))
    assert (
        repr(seen) == "SiteCovariance(count=7, nonfinite=0, mean=Tensor[1000] float64, covariance=Tensor[2, 2] float32)"
    )
    values = ScaledRows(torch.zeros(3, 4, dtype=torch.int8), torch.ones(3))
    ids = torch.arange(3)
    example = Example(4, ids, ids, ["a", "b", "c"], "a b c", {"year": 1969}, {"layers.0": values, "layers.1": wide})
    assert repr(example) == (
        "Example(index=4, input_ids=Tensor[3] int64, positions=Tensor[3] int64, tokens=['a', 'b', 'c'], text='a b c', "
        "fields={'year': 1969}, sites={'layers.0': ScaledRows(values=Tensor[3, 4] int8, scale=Tensor[3] float32), "
        "'layers.1': Tensor[1000] float64})"
    )
    for shown in (lp.Moments, lp.TopK):
        sink = shown()
        lp.extract("demo", ["So it goes."], sink, sites="layers.*")
        assert len(repr(sink["layers.5"])) < 500
