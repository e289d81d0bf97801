"""Measure the analysis of a large store: 1,000,000 rows of 384 numbers at 7 sites, and each analysis's peak memory.

A float16 store of random rows is written with the code that commits shards: each layer is the previous one, scaled and
with noise added, and two of them encode the label. Each analysis runs in a process of its own, whose peak is the VmHWM
of Linux: everything resident at one time, including mapped pages of the store.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import emit, make_parser
from torch import Tensor

import layerprobe as lp
from layerprobe.store.description import commit_description
from layerprobe.store.format import commit_shard
from layerprobe.store.headers import ShardHeader
from layerprobe.store.index import commit_index

SITES = ("embeddings", *(f"layers.{layer}" for layer in range(6)))
WIDTH = 384
ROWS_PER_EXAMPLE = 20
CLASSES = ("a", "b", "c", "d")
KNOWING = ("layers.2", "layers.3")
FINGERPRINT = "0" * 32
_VOCABULARY = 5000

ANALYSES: dict[str, Callable[[str, str], Any]] = {
    "open": lambda store, _: len(lp.open(store)),
    "check": lambda store, _: lp.check(store, progress=True),
    "differences": lambda store, _: lp.differences(store, progress=True),
    "differences, all pairs": lambda store, _: lp.differences(store, pairs="all", cosine="centred", progress=True),
    "plot, rows": lambda store, out: lp.plot(store, f"{out}/rows.png", color="norm", progress=True),
    "plot, examples": lambda store, out: lp.plot(store, f"{out}/examples.png", progress=True),
    "classify": lambda store, _: lp.classify(store, progress=True),
    "report": lambda store, out: lp.report(store, f"{out}/report.html", progress=True),
}


def main() -> None:
    """Write the store, and run every analysis on it."""
    parser = make_parser("The peak memory of each analysis of a large store.")
    parser.add_argument("--run", nargs=3, metavar=("NAME", "STORE", "FOLDER"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run is not None:
        _run(*asked.run)
        return
    num_rows, num_shards = (2_000, 2) if asked.quick else (1_000_000, 25)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "acts"
        num_bytes = plant(store, num_rows, num_shards)
        found = {name: _measure(name, store, folder) for name in ANALYSES}
    print(f"{'analysis':<24}{'peak MiB':>10}{'seconds':>10}")
    for name, one in found.items():
        print(f"{name:<24}{one['peak_mib']:>10,.0f}{one['seconds']:>10.1f}")
    settings = {"rows": num_rows, "examples": num_rows // ROWS_PER_EXAMPLE, "width": WIDTH, "sites": len(SITES)}
    most = max(one["peak_mib"] for one in found.values())
    results = {"store_gib": round(num_bytes / 2**30, 2), "most_mib": most, "analyses": found}
    emit("volume", {**settings, "dtype": "float16"}, results, save=asked.save)


def plant(folder: Path, num_rows: int, num_shards: int) -> int:
    """Write a store of random rows, shard by shard, and return its size in bytes."""
    folder.mkdir()
    said = {name: {"kind": "token", "dtype": "float16", "width": WIDTH} for name in SITES}
    commit_description(folder, {"sites": said, "fingerprint": FINGERPRINT, "pool": None})
    maker = torch.Generator().manual_seed(0)
    scale = torch.rand(WIDTH, generator=maker) + 0.5
    signs = torch.randn(len(CLASSES), WIDTH, generator=maker)
    num_examples = num_rows // ROWS_PER_EXAMPLE
    headers, num_bytes = [], 0
    for unit in range(num_shards):
        first, last = (num_examples * cut // num_shards for cut in (unit, unit + 1))
        ordinals = torch.arange(first, last)
        count = (last - first) * ROWS_PER_EXAMPLE
        records = [
            json.dumps({"text": f"text {one}", "fields": {"label": CLASSES[one % len(CLASSES)]}}).encode()
            for one in ordinals.tolist()
        ]
        tensors = [
            ("example", ordinals),
            ("offsets", torch.arange(last - first + 1) * ROWS_PER_EXAMPLE),
            ("input_ids", torch.randint(_VOCABULARY, (count,), generator=maker)),
            ("record_offsets", torch.tensor([0, *map(len, records)]).cumsum(0)),
            *_draw(maker, scale, signs, ordinals),
            ("records", torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)),
        ]
        header = ShardHeader(unit, last - first, count, first, FINGERPRINT)
        num_bytes += commit_shard(folder, header, tensors)
        headers.append(header)
    commit_index(folder, headers)
    return num_bytes


def _draw(maker: torch.Generator, scale: Tensor, signs: Tensor, ordinals: Tensor) -> Iterator[tuple[str, Tensor]]:
    rows = torch.zeros(len(ordinals) * ROWS_PER_EXAMPLE, WIDTH)
    told = signs[ordinals % len(CLASSES)].repeat_interleave(ROWS_PER_EXAMPLE, 0)
    for name in SITES:
        rows = 0.8 * rows + scale * torch.randn(rows.shape, generator=maker)
        yield name, (rows + 0.05 * told if name in KNOWING else rows).half()


def _measure(name: str, store: Path, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", name, str(store), folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "bar": "%|" in done.stderr}


def _run(name: str, store: str, folder: str) -> None:
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        ANALYSES[name](store, folder)
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_mib": round(_peak_bytes() / 2**20, 1), "seconds": round(seconds, 1)}))


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not say what the peak of a process was")


if __name__ == "__main__":
    main()
