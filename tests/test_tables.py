"""Tables, sizes and bars as people see them."""

import io

import pytest
from tqdm import tqdm

from layerprobe.tables import format_bytes, format_count, format_table, hide_bar


def test_numbers_stand_to_the_right_and_words_to_the_left() -> None:
    table = format_table(("site", "width"), [("embeddings", 8), ("layers.0", 1024), ("logits", None)])
    assert table.split("\n") == [
        "site        width",
        "----------  -----",
        "embeddings      8",
        "layers.0     1024",
        "logits",
    ]


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


class Terminal(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("progress", [True, False, None])
def test_a_bar_is_shown_as_asked_and_else_only_on_a_terminal(progress: bool | None, is_terminal: bool) -> None:
    stream = Terminal(is_terminal)
    with tqdm(total=1, file=stream, disable=hide_bar(progress)) as bar:
        bar.update()
    assert bool(stream.getvalue()) is (is_terminal if progress is None else progress)
