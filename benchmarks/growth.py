"""How does the cost grow with the work: more examples, sites, tokens per text, shards, threads?

Every point is a process of its own, so that it has its own peak of resident memory; the points take turns, round by
round. Each extracts texts from a file and is then measured on its store: running the same command again with nothing
missing, running it without the index and the last shard, and opening the store. The bare forward pass over batches of
the same run is timed before and after the run and averaged, since a shared machine changes within minutes.

The model is a BERT of 4 layers of width 128 with random weights. The texts are words of the standard library's
docstrings, all different and truncated to the exact length. With so narrow a model, the overhead of a text or a shard
shows at once, and 100,000 texts of 16 tokens take a minute instead of an hour. The batch budget is fixed at 1,024
tokens; a long run would search for a larger one. Long texts pooled to one row have an axis of their own: their units
are bounded by tokens, not by the bytes of rows.

    python benchmarks/growth.py [--quick | --save] [--seconds 420]
    python benchmarks/growth.py --device cuda --model bert-base --precision bf16 --save
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from corpora import cut_plan, list_docstrings, make_caller
from harness import emit, make_parser, read_peak
from subjects import NARROW, Subject, add_subject_options, read_subject, wait_for_model
from torch import nn

import layerprobe as lp
from layerprobe.extract.flat import attending_flat
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import Plan, plan_extraction
from layerprobe.models import LoadedModel
from layerprobe.tables import format_bytes, format_table

SITE_SETS = {
    "one": ["layers.-1"],
    "layers": ["embeddings", "layers.*"],
    "inside": ["embeddings", "layers.*", "layers.*.mid", "layers.*.attention.context", "layers.*.ffn.act"],
    "all": ["embeddings", "layers.*", "layers.*.mid", "layers.*.attention.*", "layers.*.ffn.*", "pooler"],
}
BATCH_TOKENS = 1024
# enough to measure the forward pass's time per token
_FORWARD_TOKENS = 100_000


@dataclass(frozen=True)
class Point:
    """One size of work.

    Args:
        texts: Number of texts.
        length: Tokens per text.
        sites: Name of a set of sites.
        shards: Number of shards; None for shards of the default size, or of `shard_bytes`.
        threads: Number of threads; None for one per core.
        shard_bytes: Size of a shard; None for the default.
        pool: How the rows of a text are pooled; None for all rows.
    """

    texts: int = 10_000
    length: int = 16
    sites: str = "layers"
    shards: int | None = None
    threads: int | None = None
    shard_bytes: int | None = None
    pool: str | None = None


def main() -> None:
    parser = make_parser("How the cost of an extraction grows with the work.")
    parser.add_argument("--seconds", type=float, default=420.0, help="begin no further round after; at least one")
    parser.add_argument("--point", help="measure one point, given as JSON, and print what was found")
    parser.add_argument("--texts-file", type=Path, help="the texts of that point")
    add_subject_options(parser, usual=NARROW)
    options = parser.parse_args()
    subject = read_subject(options)
    if options.point:
        print(json.dumps(measure(Point(**json.loads(options.point)), options.texts_file, subject)))
        return
    axes = list_axes(options.quick)
    seconds = 0.0 if options.quick else options.seconds
    points = list(dict.fromkeys(point for axis in axes.values() for point in axis))
    found: dict[Point, list[dict[str, float]]] = {point: [] for point in points}
    with tempfile.TemporaryDirectory() as folder:
        files = {(point.texts, point.length): Path(folder) / f"{point.texts}-{point.length}.txt" for point in points}
        words = " ".join(list_docstrings()).split()
        for (count, length), path in files.items():
            write_texts(path, words, count, length)
        start = time.perf_counter()
        while not found[points[-1]] or time.perf_counter() - start < seconds:
            for point in points:
                found[point].append(run_point(point, files[point.texts, point.length], subject))
    results = {
        axis: [lay_out(point, found[point], found[members[0]]) for point in members] for axis, members in axes.items()
    }
    print_table(results)
    settings = {
        "rounds": len(found[points[-1]]),
        "seconds": seconds,
        **({"model": "BERT of 4 layers, width 128, random weights"} | subject.settings),
        "batch_tokens": BATCH_TOKENS,
        "dtype": "float16",
        "site_sets": SITE_SETS,
        "memory": "peak of resident memory above what the process held before the run",
    }
    emit(subject.name_results("growth"), settings, results, save=options.save)


def list_axes(is_quick: bool) -> dict[str, list[Point]]:
    """Return the points of each axis; the others are compared with the first of their axis."""
    base = Point()
    if is_quick:
        base = replace(base, texts=100)
        # each point is a process, so one that differs in everything stands for all
        other = Point(texts=25, length=64, sites="one", shards=2, threads=1)
        pooled = replace(base, texts=8, length=64, sites="one", pool="mean")
        return {axis: [base, other] for axis in ("examples", "sites", "length", "shards", "threads")} | {
            "pooled": [pooled]
        }
    cut = replace(base, texts=32_000)
    # so small that the second fewest texts already fill both buffers: memory growth beyond that is due to the texts
    small = replace(base, shard_bytes=32 << 20)
    pooled = replace(base, texts=500, length=512, sites="one", pool="mean")
    return {
        "examples": [small, *(replace(small, texts=count) for count in (1_000, 30_000, 100_000))],
        "sites": [base, *(replace(base, sites=name) for name in ("one", "inside", "all"))],
        "length": [base, *(replace(base, length=length, texts=160_000 // length) for length in (64, 256, 512))],
        "shards": [replace(cut, shards=count) for count in (1, 10, 100, 1000)],
        "threads": [base, replace(base, threads=1)],
        "pooled": [pooled, replace(pooled, texts=2_000)],
    }


def write_texts(path: Path, words: list[str], count: int, length: int) -> None:
    """Write `count` distinct texts of words, one per line, each of at least `length` tokens."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            start = number * length % (len(words) - length)
            file.write(f"{number} {' '.join(words[start : start + length])}\n")


def run_point(point: Point, texts: Path, subject: Subject) -> dict[str, float]:
    """Measure a point in a separate process."""
    asked = ["--point", json.dumps(asdict(point)), "--texts-file", str(texts), *subject.arguments]
    command = [sys.executable, __file__, *asked]
    limits = {} if point.threads is None else {"OMP_NUM_THREADS": str(point.threads)}
    ended = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{point} ended with {ended.returncode}:\n{ended.stderr}")
    return json.loads(ended.stdout.splitlines()[-1])


def measure(point: Point, texts: Path, subject: Subject) -> dict[str, float]:
    """Extract once, between two timings of the forward pass, and time further operations on the store."""
    loaded = subject.load()
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        options = ExtractOptions(
            sites=SITE_SETS[point.sites],
            dtype="float16",
            pool=point.pool,
            max_length=point.length,
            batch_tokens=BATCH_TOKENS,
            precision=subject.precision,
        )
        plan = plan_extraction(loaded.model, texts, Path(place) / "plan", options, tokenizer=loaded.tokenizer)
        if point.shards is not None:
            options = replace(options, shard_bytes=-(-plan.num_bytes // point.shards))
        elif point.shard_bytes is not None:
            options = replace(options, shard_bytes=point.shard_bytes)
        run = partial(extract, loaded, options, texts)
        first = Path(place) / "first.txt"
        with texts.open(encoding="utf-8") as file:
            first.write_text("".join(file.readline() for _line in range(64)), encoding="utf-8")
        before = read_peak(resets=True)
        extract(loaded, options, first, Path(place) / "warm")
        forward_before = time_forward(loaded.model, plan, subject)
        # exclude the peak of the forward pass alone
        read_peak(resets=True)
        found = measure_run(run, Path(place) / "acts", before)
        forward_us = (forward_before + time_forward(loaded.model, plan, subject)) / 2
        on_device = {"device_peak_bytes": torch.cuda.max_memory_allocated()} if subject.is_on_cuda else {}
        return {**found, "forward_us": forward_us, **on_device}


def extract(loaded: LoadedModel, options: ExtractOptions, texts: Path, to: Path) -> None:
    lp.extract(
        loaded.model,
        texts,
        to,
        sites=options.sites,
        dtype="float16",
        pool=options.pool,
        precision=options.precision,
        max_length=options.max_length,
        batch_tokens=options.batch_tokens,
        shard_size=options.shard_bytes,
        tokenizer=loaded.tokenizer,
        progress=False,
    )


def measure_run(run: Callable[[Path], None], folder: Path, before: int) -> dict[str, float]:
    """Time a run, a repeat, a resume without index and last shard, and opening; measure the peak of the first.

    Args:
        before: Resident bytes before anything ran.
    """
    cpu = time.process_time()
    wall_s = _time(partial(run, folder))
    cpu_s = time.process_time() - cpu
    peak = read_peak() - before
    shards = sorted(folder.glob("shard-*"))
    num_bytes = sum(path.stat().st_size for path in shards)
    again_s = _time(partial(run, folder))
    (folder / "index.json").unlink()
    shards[-1].unlink()
    resume_s = _time(partial(run, folder))
    open_s = statistics.median(_time(partial(lp.open, folder)) for _try in range(5))
    store = lp.open(folder)
    return {
        "tokens": store.num_tokens,
        "shards": len(shards),
        "bytes": num_bytes,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "peak_bytes": peak,
        "base_bytes": before,
        "again_s": again_s,
        "resume_s": resume_s,
        "open_s": open_s,
    }


def time_forward(model: nn.Module, plan: Plan, subject: Subject) -> float:
    """Time the bare forward pass over batches of the run, in microseconds per token."""
    batches, tokens = [], 0
    for batch in cut_plan(plan):
        batches.append(batch)
        tokens += sum(batch.lengths)
        if tokens >= _FORWARD_TOKENS:
            break
    call = make_caller(model)

    def forward() -> None:
        for batch in batches:
            call(batch)

    with attending_flat(model) if plan.is_flat else contextlib.nullcontext(), subject.running(model):
        return 1e6 * _time(forward) / tokens


def _time(work: Callable[[], object]) -> float:
    wait_for_model()
    start = time.perf_counter()
    work()
    wait_for_model()
    return time.perf_counter() - start


def lay_out(point: Point, rounds: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    """Return the medians of a point, and their ratios to the first point of its axis."""

    def middle(worth: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(map(worth, rounds))

    def against(worth: Callable[[dict[str, float]], float]) -> float:
        return round(
            statistics.median(worth(mine) / worth(theirs) for mine, theirs in zip(rounds, base, strict=True)), 3
        )

    return {
        **asdict(point),
        "shards": int(rounds[0]["shards"]),
        "tokens": int(rounds[0]["tokens"]),
        "bytes": int(rounds[0]["bytes"]),
        "us_per_token": round(middle(_us_per_token), 2),
        "us_ratio": against(_us_per_token),
        "cpu_us_per_token": round(middle(lambda one: 1e6 * one["cpu_s"] / one["tokens"]), 2),
        "forward_us_per_token": round(middle(lambda one: one["forward_us"]), 2),
        "over_forward": round(middle(lambda one: _us_per_token(one) / one["forward_us"]), 3),
        "peak_bytes": round(middle(lambda one: one["peak_bytes"])),
        **({"device_peak_bytes": int(rounds[0]["device_peak_bytes"])} if "device_peak_bytes" in rounds[0] else {}),
        "peak_ratio": against(lambda one: one["peak_bytes"] + one["base_bytes"]),
        "again_s": round(middle(lambda one: one["again_s"]), 3),
        "resume_s": round(middle(lambda one: one["resume_s"]), 3),
        "open_ms": round(1e3 * middle(lambda one: one["open_s"]), 3),
    }


def _us_per_token(one: dict[str, float]) -> float:
    return 1e6 * one["wall_s"] / one["tokens"]


def print_table(results: dict[str, list[dict[str, Any]]]) -> None:
    names = (
        "texts",
        "length",
        "sites",
        "pool",
        "shards",
        "threads",
        "us_per_token",
        "us_ratio",
        "forward_us_per_token",
    )
    names += ("over_forward", "peak_bytes", "peak_ratio", "again_s", "resume_s", "open_ms")
    rows = []
    for axis, points in results.items():
        for found in points:
            shown = {**found, "peak_bytes": format_bytes(found["peak_bytes"]), "pool": found["pool"] or ""}
            rows.append((axis, *(shown[name] for name in names)))
    print(format_table(("axis", *(name.replace("_", " ") for name in names)), rows))


if __name__ == "__main__":
    main()
