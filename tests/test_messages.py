"""What messages of the library say to do: in Python's words, with the flag of the command line behind them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "layerprobe"
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "cli"]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
# overwrite=True (--overwrite), the model (--model); and a whole command, to be typed as it stands
ALLOWED = re.compile(r"[\w}'\"] \(--[a-z][a-z-]*\)|'layerprobe [^']*'")


def list_texts(tree: ast.AST) -> Iterator[str]:
    """List the texts of a file but its docstrings, with {} for what is put into them."""
    inner: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            inner.add(id(node.value))
        elif id(node) in inner:
            continue
        elif isinstance(node, ast.JoinedStr):
            inner.update(id(part) for part in node.values)
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def list_bare_flags(source: str) -> list[str]:
    return [flag for text in list_texts(ast.parse(source)) for flag in FLAG.findall(ALLOWED.sub("", text))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_flag_stands_in_brackets_behind_its_name_in_python(path: Path) -> None:
    assert list_bare_flags(path.read_text(encoding="utf-8")) == []


def test_flags_that_stand_alone_are_found() -> None:
    source = "'''Do --this.'''\nx = f'{a} with --that'\nraise E('pass it (--it)', f'b={b} ' f'(--b), or --c')"
    assert list_bare_flags(source) == ["--that", "--c"]
    assert list_bare_flags("raise E(\"Run 'layerprobe verify acts --repair'.\")") == []
