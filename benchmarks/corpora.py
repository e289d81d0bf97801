"""Real texts available on every machine, and the batches that layerprobe makes of them.

The texts are docstrings of the standard library, in the order of its files, and their paragraphs.
"""

import ast
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from layerprobe.capture.staging import send
from layerprobe.extract.batching import Batch, FlatBatch
from layerprobe.extract.flat import FlatForm, laying
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import Plan, plan_extraction
from layerprobe.extract.tokens import tokenize
from layerprobe.models import LoadedModel
from layerprobe.sites.stacks import find_device

__all__ = [
    "QUICK_TEXTS",
    "SITES",
    "choose_quick",
    "cut_plan",
    "list_batches",
    "list_docstrings",
    "list_paragraphs",
    "make_caller",
    "shuffle",
]

SITES = ["embeddings", "layers.*"]
PARAGRAPH_TOKENS = (5, 256)
QUICK_TEXTS, QUICK_LETTERS = 12, 200


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
    """Split docstrings at their empty lines and keep the paragraphs of 5 to 256 tokens."""
    found = (part.strip() for text in list_docstrings() for part in text.split("\n\n"))
    parts = list(dict.fromkeys(filter(None, found)))
    lengths = map(len, tokenizer(parts, truncation=True, max_length=512)["input_ids"])
    fewest, most = PARAGRAPH_TOKENS
    return [part for part, length in zip(parts, lengths, strict=True) if fewest <= length <= most]


def choose_quick(texts: list[str]) -> list[str]:
    """Choose a few short texts from all over a list, just enough to test that a benchmark runs."""
    short = [text for text in texts if len(text) < QUICK_LETTERS]
    return short[:: max(1, len(short) // QUICK_TEXTS)][:QUICK_TEXTS]


def shuffle(texts: list[str]) -> list[str]:
    mixed = list(dict.fromkeys(texts))
    random.Random(0).shuffle(mixed)
    return mixed


def list_batches(
    demo: LoadedModel, texts: list[str], folder: Path, options: ExtractOptions | None = None
) -> tuple[list[Batch], int, int]:
    """Return layerprobe's padded batches, their number of real tokens, and the maximum length of a text.

    Args:
        options: Options of the run; None for every layer in float16.
    """
    options = replace(options or ExtractOptions(sites=SITES, dtype="float16"), padding_free=False)
    plan = plan_extraction(demo.model, texts, folder, options, tokenizer=demo.tokenizer)
    batches = list(cut_plan(plan))
    assert all(isinstance(batch, Batch) for batch in batches)
    return batches, sum(sum(batch.lengths) for batch in batches), plan.rule.max_length  # type: ignore[return-value]


def cut_plan(plan: Plan) -> Iterator[Batch | FlatBatch]:
    """Make exactly the batches of a run."""
    for unit in plan.units():
        tokenized = tokenize(plan.tokenizer, [record.text for record in unit.records], plan.rule.max_length)
        yield from plan.cut(tokenized)


def make_caller(model: nn.Module, asks_states: bool = False) -> Callable[[Batch | FlatBatch], None]:
    """Return a function that calls a model with a batch; for batches without padding, open `attending_flat` around it.

    Args:
        model: The model.
        asks_states: Whether to pass `output_hidden_states=True`.
    """
    # looked up now, since clocks may replace it later
    form, make_arguments, device = FlatForm.of(model), FlatForm.arguments, find_device(model)
    states = {"output_hidden_states": True} if asks_states else {}

    def call(batch: Batch | FlatBatch) -> None:
        arguments = make_arguments(form, batch) if isinstance(batch, FlatBatch) else batch.arguments
        with laying(batch):
            model(**{name: send(value, device) for name, value in arguments.items()}, **states)

    return call
