"""What do hooks into a store cost? On the very batches of a run, against the bare forward and `output_hidden_states`.

Each batch is run in every way before the next one is, in an order that rotates, on models of the same weights: what the
machine does meanwhile hits all ways alike. Two bare ways show how far that goes. All layers go into a store in float16,
fresh memory for its buffers and the closing flush included. The writer works beside whichever way runs then, most often
not the one it works for; so its CPU time is added to that one, all of it once more, in a ratio of its own.
Python's garbage collector is off during the loop: it would fall upon whichever way runs just then.

    python benchmarks/storing.py [--quick] [--save] [--texts 2000] [--rounds 2]
"""

import contextlib
import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
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
    parser.add_argument("--rounds", type=int, default=2)
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
        print(format_table(("way", "s", "ratio", "median of batches"), [tuple(way.values()) for way in case["ways"]]))
        print("of the store:", ", ".join(f"{name} {value}" for name, value in case["store"].items()))
    emit("storing", {"texts": len(texts), "rounds": rounds}, cases, save=options.save)


def run_case(name: str, demo: LoadedModel, model: nn.Module, texts: list[str], rounds: int) -> dict[str, Any]:
    """Run all ways over the batches that a run of the demo would have, and give medians over rounds."""
    models = [copy.deepcopy(model) for _ in range(4)]
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        batches, num_tokens, _ = list_batches(demo, texts, Path(place) / "plan")
        for one in models:
            call(one, batches[0])
        found = [run_round(models, batches, Path(place) / str(number)) for number in range(rounds)]

    def middle(of: Callable[[dict[str, Any]], float], digits: int) -> float:
        return round(statistics.median(map(of, found)), digits)

    ways = [
        {
            "way": way,
            "s": middle(lambda one, way=way: one[way]["s"], 3),
            "ratio": middle(lambda one, way=way: one[way]["s"] / one["bare"]["s"], 4),
            "batch_ratio": middle(lambda one, way=way: one[way]["batch_ratio"], 4),
        }
        for way in found[0]
    ]
    store = {
        "close_s": middle(lambda one: one[STORE]["close_s"], 3),
        "writer_cpu_s": middle(lambda one: one[STORE]["writer_cpu_s"], 3),
        "ratio_with_writer": middle(lambda one: (one[STORE]["s"] + one[STORE]["writer_cpu_s"]) / one["bare"]["s"], 4),
    }
    return {"model": name, "tokens": num_tokens, "batches": len(batches), "ways": ways, "store": store}


def run_round(models: list[nn.Module], batches: list[Batch], folder: Path) -> dict[str, Any]:
    """Run every batch in every way, into a new store, and give the seconds of each way in all."""
    bare, again, asked, probed = models
    ways: dict[str, Callable[[Batch], object]] = {
        "bare": partial(call, bare),
        "bare, again": partial(call, again),
        "output_hidden_states": partial(call, asked, output_hidden_states=True),
        STORE: partial(call, probed),
    }
    names = list(ways)
    taken: dict[str, list[float]] = {name: [] for name in names}
    with WriterClock() as writer, contextlib.ExitStack() as opened:
        opened.enter_context(lp.Probe(probed, SITES, to=folder, dtype="float16"))
        # a full collection costs a quarter of a second of whichever way it falls into
        gc.collect()
        gc.disable()
        opened.callback(gc.enable)
        for number, batch in enumerate(batches):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                start = time.perf_counter()
                ways[name](batch)
                taken[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        opened.close()
        close_s = time.perf_counter() - start
    result: dict[str, Any] = {
        name: {
            "s": sum(taken[name]),
            "batch_ratio": statistics.median(
                mine / theirs for mine, theirs in zip(taken[name], taken["bare"], strict=True)
            ),
        }
        for name in names
    }
    result[STORE]["s"] += close_s
    result[STORE] |= {"close_s": close_s, "writer_cpu_s": writer.cpu_s}
    return result


def call(model: nn.Module, batch: Batch, **options: Any) -> None:
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)


if __name__ == "__main__":
    main()
