"""Time the whole job, from 2,000 real texts to every layer on disk, against the loop that people write today.

The texts are docstrings of the standard library in the order of its files; their paragraphs of 5 to 256 tokens,
shuffled; and both together, shuffled. The rivals are the loop (32 texts at a time in input order, padded to the
longest, `output_hidden_states=True`, one `torch.save` per batch, nothing flushed to disk), the bare forward pass over
layerprobe's own batches, tokenised beforehand, and `layerprobe.extract` in float16 with everything it does: planning,
tokenising, checksums and flushes. At the end the rows of the loop and of the store are compared.

    python benchmarks/extract.py [--quick | --save] [--texts 2000] [--rounds 3]
"""

import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from corpora import QUICK_TEXTS, SITES, choose_quick, cut_plan, list_batches, list_docstrings, list_paragraphs, shuffle
from harness import Rival, emit, interleave, make_parser

import layerprobe as lp
from layerprobe.extract.batching import Batch
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.models import LoadedModel
from layerprobe.tables import format_bytes, format_table

LOOP_BATCH = 32
# float16 has 11 significant bits; batches of other shapes change the order of sums
RELATIVE, ABSOLUTE = 2**-11, 1e-3


def main() -> None:
    parser = make_parser("The whole job against the loop that people write today.")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    num_texts, rounds = (QUICK_TEXTS, 1) if options.quick else (options.texts, options.rounds)
    demo = lp.load_model("demo", "cpu")
    whole, parts = list_docstrings(), list_paragraphs(demo.tokenizer)
    if options.quick:
        whole, parts = choose_quick(whole), choose_quick(parts)
    corpora = {
        "docstrings": whole[:: max(1, len(whole) // num_texts)][:num_texts],
        "paragraphs": shuffle(parts)[:num_texts],
        "both": shuffle([*whole, *parts])[:num_texts],
    }
    results = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name, texts in corpora.items():
            results[name] = run_corpus(demo, texts, Path(folder) / name, rounds)
    headers = ("texts", "way", "s", "cpu s", "computed per real token", "bytes")
    print(format_table(headers, [row for name, found in results.items() for row in _lay_out(name, found)]))
    for name, found in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found["ratios"].items()))
    settings = {"texts": num_texts, "rounds": rounds, "loop_batch": LOOP_BATCH, "sites": SITES, "dtype": "float16"}
    emit("extract", settings, results, save=options.save)


def run_corpus(demo: LoadedModel, texts: list[str], folder: Path, rounds: int) -> dict[str, Any]:
    """Time the three ways, and compare what the loop and layerprobe left on disk."""
    folder.mkdir()
    loop, store = folder / "loop", folder / "store"
    run_layerprobe(demo, texts[:LOOP_BATCH], folder / "warm")
    start = time.perf_counter()
    batches, num_tokens, max_length = list_batches(demo, texts, folder / "plan")
    tokenize_s = time.perf_counter() - start
    asked = ExtractOptions(sites=SITES, dtype="float16")
    plan = plan_extraction(demo.model, texts, folder / "plan", asked, tokenizer=demo.tokenizer)
    rivals = {
        "loop": Rival(partial(run_loop, demo, texts, max_length, loop), prepare=partial(_make_empty, loop)),
        "bare": Rival(partial(run_bare, demo, batches)),
        "layerprobe": Rival(partial(run_layerprobe, demo, texts, store), prepare=partial(_make_empty, store)),
    }
    timings = interleave(rivals, seconds=0.0, least_rounds=rounds, most_rounds=rounds, warm_rounds=0)
    found = {way: timing.summary(timings["bare"]) for way, timing in timings.items()}
    against_loop = timings["layerprobe"].summary(timings["loop"])
    num_bytes = {"loop": _size(loop), "layerprobe": _size(store)}
    computed = {
        "loop": sum(_load(path)["input_ids"].numel() for path in loop.iterdir()),
        "bare": sum(batch.input_ids.numel() for batch in batches),
    }
    computed["layerprobe"] = sum(batch.input_ids.numel() for batch in cut_plan(plan))
    worst = compare(loop, store)
    shutil.rmtree(folder)
    return {
        "texts": len(texts),
        "tokens": num_tokens,
        "ways": found,
        "plan_and_tokenize_s": round(tokenize_s, 3),
        "bytes": num_bytes,
        "computed_per_token": {way: round(count / num_tokens, 3) for way, count in computed.items()},
        "ratios": {
            "loop_over_layerprobe_wall": round(1 / against_loop["wall_ratio"], 2),
            "loop_over_layerprobe_cpu": round(1 / against_loop["cpu_ratio"], 2),
            "layerprobe_over_bare_wall": found["layerprobe"]["wall_ratio"],
            "layerprobe_over_bare_cpu": found["layerprobe"]["cpu_ratio"],
            "loop_over_layerprobe_bytes": round(num_bytes["loop"] / num_bytes["layerprobe"], 2),
        },
        "rows_agree_within": worst,
    }


def run_loop(demo: LoadedModel, texts: list[str], max_length: int, folder: Path, _: object = None) -> None:
    """Extract as people do today."""
    for number, start in enumerate(range(0, len(texts), LOOP_BATCH)):
        batch = demo.tokenizer(
            texts[start : start + LOOP_BATCH],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        output = demo.model(**batch, output_hidden_states=True)
        saved = {"hidden_states": output.hidden_states, **batch}
        torch.save(saved, folder / f"batch-{number:06d}.pt")


def run_bare(demo: LoadedModel, batches: list[Batch], _: object = None) -> None:
    for batch in batches:
        demo.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)


def run_layerprobe(demo: LoadedModel, texts: list[str], folder: Path, _: object = None) -> None:
    lp.extract(demo.model, texts, folder, sites=SITES, dtype="float16", tokenizer=demo.tokenizer, progress=False)


def compare(loop: Path, folder: Path, every: int = 8) -> float:
    """Compare the rows of the loop's files with the store's, and return the largest difference.

    Args:
        every: Compare one in `every` batches of the loop.
    """
    store = lp.open(folder)
    worst = 0.0
    for number, path in enumerate(sorted(loop.iterdir())):
        if number % every:
            continue
        saved = _load(path)
        for row, mask in enumerate(saved["attention_mask"].bool()):
            example = store.example(number * LOOP_BATCH + row)
            assert torch.equal(example.input_ids, saved["input_ids"][row][mask]), f"{path.name}, row {row}: other ids"
            for site, hidden in zip(store.sites, saved["hidden_states"], strict=True):
                wanted, got = hidden[row][mask], example[site].float()
                torch.testing.assert_close(got, wanted, rtol=RELATIVE, atol=ABSOLUTE)
                worst = max(worst, (got - wanted).abs().max().item())
    return round(worst, 6)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _load(path: Path) -> dict[str, Any]:
    # memory-mapped, so that counting ids does not read gigabytes of hidden states
    return torch.load(path, weights_only=True, mmap=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _lay_out(name: str, found: dict[str, Any]) -> list[tuple[object, ...]]:
    return [
        (
            name,
            way,
            round(times["wall_ms"] / 1e3, 2),
            round(times["cpu_ms"] / 1e3, 2),
            found["computed_per_token"][way],
            format_bytes(found["bytes"][way]) if way in found["bytes"] else None,
        )
        for way, times in found["ways"].items()
    ]


if __name__ == "__main__":
    main()
