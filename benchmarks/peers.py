"""Every layer of the same texts by layerprobe and by what else a user would pick: time, memory, bytes, agreement.

Each run is a process of its own, so that its peak of resident memory is its own; the ways take turns, round by round.
What a way loads and a first run over a few texts are not timed, except that NeuroX loads its model in each call. Its
rows are held against layerprobe's in float32. A way whose package is missing, or that fails, is named with the reason
and left out.

The texts are docstrings of at most 256 tokens, their white space made single spaces: every way then sees the same
tokens, the one that reads a text a line and the one that cuts at 256 among them.

    pip install 'layerprobe[bench]'
    pip install --no-deps neurox        its own pins are years older; what it runs with is in the extra
    python benchmarks/peers.py [--quick] [--save] [--texts 400] [--seconds 360]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from corpora import SITES, list_docstrings
from harness import emit, make_parser, read_peak
from ways import LONGEST, PACKAGES, WAYS, Job

import layerprobe as lp
from layerprobe.tables import format_bytes, format_table

# float16 keeps 11 bits; batches of other shapes reorder the sums of a forward
RELATIVE, ABSOLUTE = 2**-11, 1e-3
_WARM_TEXTS = 16


def main() -> None:
    parser = make_parser("Every layer of the same texts, by layerprobe and by others.")
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=360.0, help="begin no further round after; at least one")
    parser.add_argument("--way", help="run one way, and print what was found")
    parser.add_argument("--place", type=Path, help="where that way finds the texts and the reference")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.place)))
        return
    demo = lp.load_model("demo", "cpu")
    texts = list_texts(demo.tokenizer, 24 if options.quick else options.texts)
    seconds = 0.0 if options.quick else options.seconds
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        place = Path(folder)
        (place / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        lp.extract(
            demo.model,
            texts,
            place / "reference",
            sites=SITES,
            dtype="float32",
            tokenizer=demo.tokenizer,
            progress=False,
        )
        num_tokens = lp.open(place / "reference").num_tokens
        start, rounds = time.perf_counter(), 0
        while not rounds or time.perf_counter() - start < seconds:
            run_round(found, missing, place, rounds)
            rounds += 1
    results = {way: lay_out(runs, found["layerprobe"]) for way, runs in found.items() if way not in missing}
    print_tables(results, missing)
    versions = {package: version(package) for way, package in PACKAGES.items() if way in results}
    settings = {"texts": len(texts), "tokens": num_tokens, "rounds": rounds, "seconds": seconds, "versions": versions}
    emit("peers", settings, {"ways": results, "missing": missing}, save=options.save)


def list_texts(tokenizer: Any, count: int) -> list[str]:
    """Choose docstrings from all over the standard library that no way has to cut."""
    texts = list(dict.fromkeys(" ".join(text.split()) for text in list_docstrings()))
    lengths = map(len, tokenizer(texts)["input_ids"])
    short = [text for text, length in zip(texts, lengths, strict=True) if length <= LONGEST and text.isascii()]
    return short[:: max(1, len(short) // count)][:count]


def run_round(found: dict[str, list[dict[str, Any]]], missing: dict[str, str], place: Path, number: int) -> None:
    """Run every way that can be run once, from another one on each round."""
    names = [way for way in WAYS if way not in missing]
    shift = number % len(names)
    for way in names[shift:] + names[:shift]:
        command = [sys.executable, __file__, "--way", way, "--place", str(place)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = ended.stdout.splitlines()
        if ended.returncode or not lines:
            missing[way] = (ended.stderr.strip().splitlines() or [f"ended with {ended.returncode}"])[-1]
        elif "missing" in (one := json.loads(lines[-1])):
            missing[way] = one["missing"]
        else:
            found[way].append(one)


def measure(name: str, place: Path) -> dict[str, Any]:
    """Run one way in this process, and compare what it left."""
    way = WAYS[name]
    package = PACKAGES.get(name)
    try:
        if package is not None:
            version(package)
        job = Job(lp.load_model("demo", "cpu"), json.loads((place / "texts.json").read_text(encoding="utf-8")))
        with torch.inference_mode():
            run = way.make(job)
    except (PackageNotFoundError, ImportError) as error:
        return {"missing": f"{type(error).__name__}: {error}"}
    with tempfile.TemporaryDirectory(dir=place) as scratch, torch.inference_mode():
        warm, folder = Path(scratch) / "warm", Path(scratch) / "run"
        warm.mkdir()
        folder.mkdir()
        before = read_peak(resets=True)
        run(job.texts[:_WARM_TEXTS], warm)
        wall, cpu = time.perf_counter(), time.process_time()
        run(job.texts, folder)
        wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        peak = read_peak() - before
        num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return {
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "peak_bytes": peak,
            "bytes": num_bytes,
            **compare(way.read(folder, job), place / "reference"),
        }


def compare(rows: Any, folder: Path) -> dict[str, Any]:
    """Hold rows that a way wrote against layerprobe's: how many texts agree, and how far off the worst value is."""
    store = lp.open(folder)
    texts = agree = 0
    worst = 0.0
    for ordinal, states, places in rows:
        example = store.example(ordinal)
        agrees = True
        for depth, got in states.items():
            whole = example[store.sites[depth]]
            assert isinstance(whole, torch.Tensor)
            wanted = whole if places is None else whole[places]
            got = got.float()
            if got.shape != wanted.shape:
                agrees = False
                continue
            worst = max(worst, (got - wanted).abs().max().item())
            agrees = agrees and torch.allclose(got, wanted, rtol=RELATIVE, atol=ABSOLUTE)
        texts, agree = texts + 1, agree + agrees
    return {"compared": texts, "agree": agree, "worst": worst}


def lay_out(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the medians of a way, and how they stand to layerprobe's."""
    pairs = list(zip(runs, base, strict=True))
    return {
        "wall_s": round(statistics.median(run["wall_s"] for run in runs), 3),
        "wall_ratio": round(statistics.median(mine["wall_s"] / theirs["wall_s"] for mine, theirs in pairs), 3),
        "cpu_s": round(statistics.median(run["cpu_s"] for run in runs), 3),
        "cpu_ratio": round(statistics.median(mine["cpu_s"] / theirs["cpu_s"] for mine, theirs in pairs), 3),
        "peak_bytes": round(statistics.median(run["peak_bytes"] for run in runs)),
        "bytes": runs[0]["bytes"],
        "compared": runs[0]["compared"],
        "agree": min(run["agree"] for run in runs),
        "worst": max(run["worst"] for run in runs),
    }


def print_tables(results: dict[str, dict[str, Any]], missing: dict[str, str]) -> None:
    """Print what each way took, and why some are not there."""
    rows = [
        (
            way,
            *(found[name] for name in ("wall_s", "wall_ratio", "cpu_s", "cpu_ratio")),
            format_bytes(found["peak_bytes"]),
            format_bytes(found["bytes"]),
            f"{found['agree']} of {found['compared']}",
            f"{found['worst']:.1e}",
        )
        for way, found in results.items()
    ]
    headers = ("way", "s", "ratio", "cpu s", "cpu ratio", "memory above start", "bytes", "texts agree", "worst")
    print(format_table(headers, rows))
    for way, reason in missing.items():
        print(f"{way} is left out: {reason}")


if __name__ == "__main__":
    main()
