"""The table of families in docs/sites.md says what running them gives."""

import pytest
import transformers

from families import FAMILIES, IS_V5, is_known
from sites_table import BEGIN, END, PAGE, make_table, replace_table


@pytest.mark.skipif(not IS_V5, reason="the page shows transformers 5")
def test_page_shows_the_table_that_the_models_give() -> None:
    missing = [name for name in FAMILIES if not is_known(name)]
    if missing:
        pytest.skip(f"transformers {transformers.__version__} has no {', '.join(missing)}")
    page = PAGE.read_text(encoding="utf-8")
    assert page == replace_table(page, make_table()), "run python tests/sites_table.py"


def test_nothing_is_wrong_in_the_table() -> None:
    table = make_table()
    assert "wrong" not in table
    assert all(line.count("|") == table.splitlines()[0].count("|") for line in table.splitlines() if line[:1] == "|")


def test_page_has_its_markers_once() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert replace_table(f"a\n{BEGIN}old\n{END}b\n", "new") == f"a\n{BEGIN}\nnew\n{END}b\n"
