"""A labelled data set available on every machine: docstrings of the standard library, by the family of their module.

    python benchmarks/docstrings.py docstrings.jsonl

Each line is a record: `text`, the first paragraph; `label`, the family; `file`, its source; `split`, which is train,
dev or test. Each file is in one split only, since its docstrings share names and an author, and texts that occur in two
files are left out. Other versions of Python have other docstrings. Needs only the standard library.
"""

import argparse
import ast
import json
import sysconfig
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

__all__ = ["FAMILIES", "list_labelled"]

FAMILIES = {
    "concurrency": "asyncio concurrent multiprocessing threading queue selectors sched subprocess",
    "files": "_pyio bz2 fileinput glob gzip lzma ntpath os pathlib posixpath shutil tarfile tempfile zipfile",
    "mail": "email imaplib mailbox nntplib poplib smtplib",
    "network": "ftplib http ipaddress socket socketserver ssl telnetlib urllib wsgiref xmlrpc",
    "numbers": "_pydatetime _pydecimal calendar colorsys datetime fractions numbers random statistics",
    "windows": "tkinter turtle turtledemo",
}
MOST = 300
# Maximum share of a family's texts from one file, so that no file makes up half of a split.
_SHARE_OF_A_FILE = 0.2
_LETTERS = (20, 300)
_SHARES = {"train": 0.6, "test": 0.2, "dev": 0.2}


def list_labelled(most: int = MOST) -> list[dict[str, str]]:
    """Read the labelled set.

    Args:
        most: Maximum number of texts per family.
    """
    found = {family: dict(_iter_files(names.split())) for family, names in FAMILIES.items()}
    seen = Counter(text for files in found.values() for texts in files.values() for text in texts)
    most_of_a_file = max(1, round(most * _SHARE_OF_A_FILE))
    records = []
    for family, files in found.items():
        single = {file: [text for text in texts if seen[text] == 1][:most_of_a_file] for file, texts in files.items()}
        records += _split(family, single, most)
    return records


def _iter_files(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the source files of some modules, each with its distinct docstrings in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in names:
        single = root / f"{name}.py"
        for path in [single] if single.is_file() else sorted((root / name).rglob("*.py")):
            if {"test", "tests"} & set(path.relative_to(root).parts):
                continue
            texts = list(dict.fromkeys(_iter_texts(ast.parse(path.read_bytes()))))
            if texts:
                yield path.relative_to(root).as_posix(), texts


def _iter_texts(tree: ast.AST) -> Iterator[str]:
    least, most = _LETTERS
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
            text = " ".join(paragraph.split())
            if least <= len(text) <= most:
                yield text


def _split(family: str, files: dict[str, list[str]], most: int) -> list[dict[str, str]]:
    """Assign each file to the split furthest below its share, in an order that does not depend on names."""
    order = sorted(files, key=lambda file: blake2b(file.encode()).digest())
    held = dict.fromkeys(_SHARES, 0)
    records = []
    for file in order:
        texts = files[file][: most - len(records)]
        side = min(held, key=lambda name: held[name] / _SHARES[name])
        held[side] += len(texts)
        records += [{"text": text, "label": family, "split": side, "file": file} for text in texts]
    return records


def main() -> None:
    """Write the labelled set as JSON lines."""
    parser = argparse.ArgumentParser(description="Write docstrings of the standard library as a labelled set.")
    parser.add_argument("out", type=Path, help="a .jsonl to write")
    parser.add_argument("--most", type=int, default=MOST, help=f"the most texts of a family; {MOST}")
    asked = parser.parse_args()
    records = list_labelled(asked.most)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    asked.out.write_text("".join(lines), encoding="utf-8")
    sides = Counter(record["split"] for record in records)
    counted = ", ".join(f"{count:,} {side}" for side, count in sides.items())
    print(f"wrote {asked.out}: {len(records):,} texts of {len(FAMILIES)} families; {counted}")


if __name__ == "__main__":
    main()
