"""Every layer of the same texts by layerprobe and by its alternatives: time, memory, bytes, agreement.

Each run is a process of its own, so that it has its own peak of resident memory; the ways take turns, round by round.
Loading and a first run over a few texts are not timed, except that NeuroX loads its model in each call. The rows of
each way are compared with layerprobe's in float32: to 1e-4 if they are float32 too, or within the error of a lower
precision. A way whose package is missing, or that fails, is left out and listed with the reason.

The texts are docstrings of at most 256 tokens, with white space collapsed, so that all ways see the same tokens, even
those that read one text per line or truncate at 256.

    pip install 'layerprobe[bench]'
    pip install --no-deps neurox        its own pins are years older; what it runs with is in the extra
    python benchmarks/peers.py [--quick | --save] [--texts 400] [--seconds 360]
    python benchmarks/peers.py --device cuda --model bert-base --precision bf16 --save
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
from corpora import QUICK_TEXTS, SITES, list_docstrings
from harness import emit, make_parser, read_peak
from subjects import Subject, add_subject_options, read_subject, wait_for_model
from ways import LONGEST, PACKAGES, WAYS, Job

import layerprobe as lp
from layerprobe.extract.forward import PRECISIONS, REORDERED, resolve_precision
from layerprobe.models import find_demo_model, load_tokenizer
from layerprobe.tables import format_bytes, format_table

# batches of other shapes change the order of sums; float16 has 11 significant bits
ABSOLUTE = 1e-4
RELATIVE = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
QUICK_LONGEST = 48
_WARM_TEXTS = 16


def main() -> None:
    parser = make_parser("Every layer of the same texts, by layerprobe and by others.")
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=360.0, help="begin no further round after; at least one")
    parser.add_argument("--way", help="run one way, and print what was found")
    parser.add_argument("--place", type=Path, help="where that way finds the texts and the reference")
    add_subject_options(parser)
    options = parser.parse_args()
    subject = read_subject(options)
    if options.way:
        print(json.dumps(measure(options.way, options.place, subject)))
        return
    texts = list_texts(load_tokenizer(str(find_demo_model())), options.texts, options.quick)
    seconds = 0.0 if options.quick else options.seconds
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    missing = find_missing()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        place = Path(folder)
        (place / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        source = subject.save(place / "model")
        (place / "model.json").write_text(json.dumps(str(source)), encoding="utf-8")
        loaded = lp.load_model(source, subject.device)
        lp.extract(
            loaded.model,
            texts,
            place / "reference",
            sites=SITES,
            dtype="float32",
            precision=subject.precision,
            tokenizer=loaded.tokenizer,
            progress=False,
        )
        del loaded
        num_tokens = lp.open(place / "reference").num_tokens
        start, rounds = time.perf_counter(), 0
        while not rounds or time.perf_counter() - start < seconds:
            run_round(found, missing, place, rounds, subject)
            rounds += 1
    results = {way: lay_out(runs, found["layerprobe"]) for way, runs in found.items() if way not in missing}
    print_tables(results, missing)
    versions = {package: version(package) for way, package in PACKAGES.items() if way in results}
    settings = {"texts": len(texts), "tokens": num_tokens, "rounds": rounds, "seconds": seconds, "versions": versions}
    settings |= subject.settings
    emit(subject.name_results("peers"), settings, {"ways": results, "missing": missing}, save=options.save)


def find_missing() -> dict[str, str]:
    """List the ways whose package is not installed, so that no process is started for them."""
    missing = {}
    for way, package in PACKAGES.items():
        try:
            version(package)
        except PackageNotFoundError as error:
            missing[way] = f"{type(error).__name__}: {error}"
    return missing


def list_texts(tokenizer: Any, count: int, is_quick: bool) -> list[str]:
    """Choose docstrings from all over the standard library that no way has to truncate; few and short if quick."""
    longest, count = (QUICK_LONGEST, QUICK_TEXTS) if is_quick else (LONGEST, count)
    texts = list(dict.fromkeys(" ".join(text.split()) for text in list_docstrings()))
    lengths = map(len, tokenizer(texts)["input_ids"])
    short = [text for text, length in zip(texts, lengths, strict=True) if length <= longest and text.isascii()]
    return short[:: max(1, len(short) // count)][:count]


def run_round(
    found: dict[str, list[dict[str, Any]]], missing: dict[str, str], place: Path, number: int, subject: Subject
) -> None:
    """Run every available way once, starting with a different one each round."""
    names = [way for way in WAYS if way not in missing]
    shift = number % len(names)
    for way in names[shift:] + names[:shift]:
        command = [sys.executable, __file__, "--way", way, "--place", str(place), *subject.arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = ended.stdout.splitlines()
        if ended.returncode or not lines:
            missing[way] = (ended.stderr.strip().splitlines() or [f"ended with {ended.returncode}"])[-1]
        elif "missing" in (one := json.loads(lines[-1])):
            missing[way] = one["missing"]
        else:
            found[way].append(one)


def measure(name: str, place: Path, subject: Subject) -> dict[str, Any]:
    """Run one way in this process, and compare its output."""
    way = WAYS[name]
    try:
        texts, source = (
            json.loads((place / file).read_text(encoding="utf-8")) for file in ("texts.json", "model.json")
        )
        job = Job(lp.load_model(source, subject.device), texts, Path(source), subject)
        with torch.inference_mode():
            run = way.make(job)
    except ImportError as error:
        return {"missing": f"{type(error).__name__}: {error}"}
    with tempfile.TemporaryDirectory(dir=place) as scratch, subject.running(job.model):
        warm, folder = Path(scratch) / "warm", Path(scratch) / "run"
        warm.mkdir()
        folder.mkdir()
        before = read_peak(resets=True)
        run(job.texts[:_WARM_TEXTS], warm)
        wait_for_model()
        wall, cpu = time.perf_counter(), time.process_time()
        run(job.texts, folder)
        wait_for_model()
        wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        peak = read_peak() - before
        on_device = {"device_peak_bytes": torch.cuda.max_memory_allocated()} if subject.is_on_cuda else {}
        num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return {
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "peak_bytes": peak,
            "bytes": num_bytes,
            **on_device,
            **compare(way.read(folder, job), place / "reference", subject.precision),
        }


def compare(rows: Any, folder: Path, precision: str) -> dict[str, Any]:
    """Compare a way's rows with layerprobe's: how many texts agree, and the largest difference.

    Args:
        precision: Precision of both forward passes; below float32, differences from summation order are allowed.
    """
    store = lp.open(folder)
    # tf32 has as many mantissa bits as float16
    reordered = REORDERED[torch.float16 if precision == "tf32" else PRECISIONS[resolve_precision(precision) or ""]]
    texts = agree = 0
    worst = 0.0
    for ordinal, states, places in rows:
        example = store.example(ordinal)
        agrees = True
        for depth, got in states.items():
            whole = example[store.sites[depth]]
            assert isinstance(whole, torch.Tensor)
            wanted = whole if places is None else whole[places]
            relative = RELATIVE[got.dtype]
            got = got.float()
            if got.shape != wanted.shape:
                agrees = False
                continue
            worst = max(worst, (got - wanted).abs().max().item())
            absolute = ABSOLUTE if precision == "fp32" else reordered * wanted.abs().max().item()
            agrees = agrees and torch.allclose(got, wanted, rtol=relative, atol=absolute)
        texts, agree = texts + 1, agree + agrees
    return {"compared": texts, "agree": agree, "worst": worst}


def lay_out(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of a way, and their ratios to layerprobe's."""
    pairs = list(zip(runs, base, strict=True))
    return {
        "wall_s": round(statistics.median(run["wall_s"] for run in runs), 3),
        "wall_ratio": round(statistics.median(mine["wall_s"] / theirs["wall_s"] for mine, theirs in pairs), 3),
        "cpu_s": round(statistics.median(run["cpu_s"] for run in runs), 3),
        "cpu_ratio": round(statistics.median(mine["cpu_s"] / theirs["cpu_s"] for mine, theirs in pairs), 3),
        "peak_bytes": round(statistics.median(run["peak_bytes"] for run in runs)),
        "bytes": runs[0]["bytes"],
        **{name: max(run[name] for run in runs) for name in ("device_peak_bytes",) if name in runs[0]},
        "compared": runs[0]["compared"],
        "agree": min(run["agree"] for run in runs),
        "worst": max(run["worst"] for run in runs),
    }


def print_tables(results: dict[str, dict[str, Any]], missing: dict[str, str]) -> None:
    """Print the results of each way, and why some are missing."""
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
