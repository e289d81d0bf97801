"""What do hooks into a store cost? On the very batches of a run, against the bare forward and `output_hidden_states`.

Each batch is run in every way before the next one is, in an order that rotates, on models of the same weights: what the
machine does meanwhile hits all ways alike. Two bare ways show how far that goes. All layers go into a store in float16,
twice over all batches: in the first pass the system has to find the memory of the store's buffers, in the second, as in
nearly all of a long run, it has been used before. The closing flush is counted into the second. The writer works beside
whichever way runs then, most often not the one it works for; so its CPU time is added to that one, all of it once more,
in a ratio of its own. Python's garbage collector is off during the loop: it would fall upon whichever way runs then.

    python benchmarks/storing.py [--quick] [--save] [--texts 2000] [--rounds 1]
"""

import contextlib
import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from corpora import SITES, list_batches, list_docstrings
from harness import emit, make_parser
from torch import nn
from transformers import BertConfig, BertModel

import layerprobe as lp
from layerprobe.extract.batching import Batch
from layerprobe.models import LoadedModel
from layerprobe.store.writer import ShardJob, ShardWriter
from layerprobe.tables import format_table

STORE = "hooks into a store"
PASSES: tuple[str, ...] = ("first", "second")


class WriterClock:
    """Adds up the CPU time of the writer's thread."""

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
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    num_texts, rounds = (48, 1) if options.quick else (options.texts, options.rounds)
    demo = lp.load_model("demo", "cpu")
    docstrings = list_docstrings()
    texts = docstrings[:: max(1, len(docstrings) // num_texts)][:num_texts]
    torch.manual_seed(0)
    base = BertConfig(num_hidden_layers=2, intermediate_size=768) if options.quick else BertConfig()
    cases = [
        run_case("demo", demo, demo.model, texts, rounds),
        run_case("random bert-base", demo, BertModel(base).eval(), texts[::10], rounds),
    ]
    for case in cases:
        print(f"\n{case['model']}, {case['tokens']:,} tokens in {case['batches']} batches:")
        headers = ("pass", "way", "s", "ratio", "median of batches", "with the writer")
        print(format_table(headers, [tuple(way.values()) for way in case["ways"]]))
    emit("storing", {"texts": len(texts), "rounds": rounds}, cases, save=options.save)


def run_case(name: str, demo: LoadedModel, model: nn.Module, texts: list[str], rounds: int) -> dict[str, Any]:
    """Run all ways over the batches that a run of the demo would have, and give medians over rounds."""
    models = [copy.deepcopy(model) for _ in range(4)]
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        batches, num_tokens, _ = list_batches(demo, texts, Path(place) / "plan")
        for one in models:
            call(one, batches[0])
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
    return {"model": name, "tokens": num_tokens, "batches": len(batches), "ways": ways}


def run_round(models: list[nn.Module], batches: list[Batch], folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Run every batch in every way, into a new store, twice; give seconds and ratios of each pass and way."""
    bare, again, asked, probed = models
    ways: dict[str, Callable[[Batch], object]] = {
        "bare": partial(call, bare),
        "bare, again": partial(call, again),
        "output_hidden_states": partial(call, asked, output_hidden_states=True),
        STORE: partial(call, probed),
    }
    names = list(ways)
    taken: dict[tuple[str, str], list[float]] = {(turn, name): [] for turn in PASSES for name in names}
    writer_s, flush_s = dict.fromkeys(PASSES, 0.0), dict.fromkeys(PASSES, 0.0)
    with WriterClock() as writer, contextlib.ExitStack() as opened:
        opened.enter_context(lp.Probe(probed, SITES, to=folder, dtype="float16"))
        # a full collection costs a quarter of a second of whichever way it falls into
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


def call(model: nn.Module, batch: Batch, **options: Any) -> None:
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)


if __name__ == "__main__":
    main()
