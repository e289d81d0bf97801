"""What do hooks into a store cost? On the same batches, against the bare forward and `output_hidden_states`.

The batches are those of a run, once without padding and once with `padding_free=False`. Each batch is run in every way
before the next, in an order that rotates, on models with the same weights, so that other load on the machine affects
all ways alike. Two bare ways show how large that effect is. All layers go into a float16 store, in two passes over all
batches, with a new store each round: in the first pass the system has to allocate the memory of the store's buffers; in
the second, as in nearly all of a long run, it has been used before. The final flush counts into the second. The writer
works in parallel with whichever way runs then, usually not the one it works for, so a separate ratio adds all of its
CPU time to that one. Python's garbage collector is off during the loop, since it would burden whichever way runs then.

    python benchmarks/storing.py [--quick | --save] [--texts 2000] [--rounds 3]
"""

import contextlib
import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from corpora import SITES, choose_quick, cut_plan, list_batches, list_docstrings, make_caller
from harness import emit, make_parser
from torch import nn
from transformers import BertConfig, BertModel

import layerprobe as lp
from layerprobe.extract.batching import Batch, FlatBatch
from layerprobe.extract.flat import attending_flat
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.models import LoadedModel
from layerprobe.store.writer import ShardJob, ShardWriter
from layerprobe.tables import format_table

STORE = "hooks into a store"
PASSES: tuple[str, ...] = ("first", "second")


class WriterClock:
    """Add up the CPU time of the writer's thread."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self._write = ShardWriter._write

    def __enter__(self) -> "WriterClock":
        def timed(writer: ShardWriter, job: ShardJob) -> None:
            start = time.thread_time()
            self._write(writer, job)
            self.cpu_s += time.thread_time() - start

        setattr(ShardWriter, "_write", timed)  # noqa: B010, to a type checker its first argument has the wrong name
        return self

    def __exit__(self, *_: object) -> None:
        ShardWriter._write = self._write


def main() -> None:
    parser = make_parser("What hooks into a store cost.")
    parser.add_argument("--texts", type=int, default=2000, help="a tenth of them for bert-base")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    demo = lp.load_model("demo", "cpu")
    docstrings = list_docstrings()
    texts = docstrings[:: max(1, len(docstrings) // options.texts)][: options.texts]
    if options.quick:
        texts = choose_quick(docstrings)
    torch.manual_seed(0)
    base = BertConfig(num_hidden_layers=2, intermediate_size=768) if options.quick else BertConfig()
    with tempfile.TemporaryDirectory() as place:
        flat = list_flat_batches(demo, texts, Path(place))
        padded, fewer = (list_batches(demo, some, Path(place))[0] for some in (texts, texts[::10]))
    bert = BertModel(base).eval()
    cases = [
        run_case("demo, batches of a run", demo.model, flat, rounds),
        run_case("demo, padded batches", demo.model, padded, rounds),
        run_case("random bert-base, padded batches", bert, fewer, rounds),
    ]
    for case in cases:
        print(f"\n{case['model']}, {case['tokens']:,} tokens in {case['batches']} batches:")
        headers = ("pass", "way", "s", "ratio", "median of batches", "with the writer")
        print(format_table(headers, [tuple(way.values()) for way in case["ways"]]))
    emit("storing", {"texts": len(texts), "rounds": rounds}, cases, save=options.save)


def list_flat_batches(demo: LoadedModel, texts: list[str], folder: Path) -> list[Batch | FlatBatch]:
    """Make the batches of a run of the demo model, without padding."""
    options = ExtractOptions(sites=SITES, dtype="float16", padding_free=True)
    return list(cut_plan(plan_extraction(demo.model, texts, folder, options, tokenizer=demo.tokenizer)))


def run_case(name: str, model: nn.Module, batches: Sequence[Batch | FlatBatch], rounds: int) -> dict[str, Any]:
    """Run all ways over the batches, and return medians over rounds."""
    models = [copy.deepcopy(model) for _ in range(4)]
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as opened:
        opened.enter_context(torch.inference_mode())
        for one in models:
            if any(isinstance(batch, FlatBatch) for batch in batches):
                opened.enter_context(attending_flat(one))
            make_caller(one)(batches[0])
        found = [run_round(models, batches, Path(place) / str(number)) for number in range(rounds)]

    def middle(of: Callable[[dict[str, Any]], float], key: tuple[str, str]) -> float:
        return statistics.median(of(one[key]) for one in found)

    ways = [
        {
            "pass": key[0],
            "way": key[1],
            "s": round(middle(itemgetter("s"), key), 3),
            "ratio": round(middle(itemgetter("ratio"), key), 4),
            "batch_ratio": round(middle(itemgetter("batch_ratio"), key), 4),
            "ratio_with_writer": round(middle(itemgetter("ratio_with_writer"), key), 4) if key[1] == STORE else None,
        }
        for key in found[0]
    ]
    num_tokens = sum(sum(batch.lengths) for batch in batches)
    return {"model": name, "tokens": num_tokens, "batches": len(batches), "ways": ways}


def run_round(
    models: list[nn.Module], batches: Sequence[Batch | FlatBatch], folder: Path
) -> dict[tuple[str, str], dict[str, float]]:
    """Run every batch in every way, twice, into a new store; return seconds and ratios of each pass and way."""
    bare, again, asked, probed = models
    ways = {
        "bare": make_caller(bare),
        "bare, again": make_caller(again),
        "output_hidden_states": make_caller(asked, asks_states=True),
        STORE: make_caller(probed),
    }
    names = list(ways)
    taken: dict[tuple[str, str], list[float]] = {(turn, name): [] for turn in PASSES for name in names}
    writer_s, flush_s = dict.fromkeys(PASSES, 0.0), dict.fromkeys(PASSES, 0.0)
    with WriterClock() as writer, contextlib.ExitStack() as opened:
        opened.enter_context(lp.Probe(probed, SITES, to=folder, dtype="float16"))
        # a full collection would add a quarter of a second to whichever way it interrupts
        gc.collect()
        gc.disable()
        opened.callback(gc.enable)
        for turn in PASSES:
            before_s = writer.cpu_s
            for number, batch in enumerate(batches):
                shift = number % len(names)
                for name in names[shift:] + names[:shift]:
                    start = time.perf_counter()
                    ways[name](batch)
                    taken[turn, name].append(time.perf_counter() - start)
            start = time.perf_counter()
            if turn == PASSES[-1]:
                opened.close()
            flush_s[turn] = time.perf_counter() - start
            writer_s[turn] = writer.cpu_s - before_s
    result = {}
    for (turn, name), times in taken.items():
        base = taken[turn, "bare"]
        seconds = sum(times) + (flush_s[turn] if name == STORE else 0.0)
        result[turn, name] = {
            "s": seconds,
            "ratio": seconds / sum(base),
            "batch_ratio": statistics.median(mine / theirs for mine, theirs in zip(times, base, strict=True)),
            "ratio_with_writer": (seconds + writer_s[turn]) / sum(base),
        }
    return result


if __name__ == "__main__":
    main()
