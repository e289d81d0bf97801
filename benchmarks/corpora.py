"""Real texts that every machine has, and the batches that layerprobe makes of them.

Docstrings of the standard library, in the order of its files, and their paragraphs.
"""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerprobe.extract.batching import Batch, cut_batches, tokenize
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.models import LoadedModel

__all__ = ["SITES", "list_batches", "list_docstrings", "list_paragraphs", "shuffle"]

SITES = ["embeddings", "layers.*"]
PARAGRAPH_TOKENS = (5, 256)


def list_docstrings() -> list[str]:
    """Read the docstrings of the standard library's sources, in the order of its files."""
    return list(dict.fromkeys(_iter_docstrings(Path(sysconfig.get_paths()["stdlib"]))))


def _iter_docstrings(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield text


def list_paragraphs(tokenizer: Any) -> list[str]:
    """Cut docstrings at their empty lines and keep the parts of a middle length."""
    found = (part.strip() for text in list_docstrings() for part in text.split("\n\n"))
    parts = list(dict.fromkeys(filter(None, found)))
    lengths = map(len, tokenizer(parts, truncation=True, max_length=512)["input_ids"])
    fewest, most = PARAGRAPH_TOKENS
    return [part for part, length in zip(parts, lengths, strict=True) if fewest <= length <= most]


def shuffle(texts: list[str]) -> list[str]:
    mixed = list(dict.fromkeys(texts))
    random.Random(0).shuffle(mixed)
    return mixed


def list_batches(
    demo: LoadedModel, texts: list[str], folder: Path, options: ExtractOptions | None = None
) -> tuple[list[Batch], int, int]:
    """Make the very batches that layerprobe makes, the count of real tokens, and the longest text it takes.

    Args:
        options: Of the run; None for every layer in float16.
    """
    options = options or ExtractOptions(sites=SITES, dtype="float16")
    plan = plan_extraction(demo.model, texts, folder, options, tokenizer=demo.tokenizer)
    pad_id, side = demo.tokenizer.pad_token_id, demo.tokenizer.padding_side
    batches, num_tokens = [], 0
    for unit in plan.units():
        tokenized = tokenize(demo.tokenizer, [record.text for record in unit.records], plan.rule.max_length)
        batches += cut_batches(tokenized, plan.batch_tokens, pad_id, side)
        num_tokens += tokenized.num_tokens
    return batches, num_tokens, plan.rule.max_length
