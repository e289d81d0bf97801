"""What do hooks cost? layerprobe against `output_hidden_states` and the bare forward pass, on the same batches.

Measured into memory, and into a float16 store with one probe open over several batches and its final flush included:
time per call, and the peak of torch's allocations above the bare forward pass. Also the fixed overhead per call, on a
narrow BERT at 1x8, whose forward pass is little but Python.

The largest cases get one round by default, which takes about seven minutes in all on two cores; `--seconds 600` gives
them several.

    python benchmarks/hooks.py [--quick | --save] [--seconds 120]
"""

import copy
import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Rival, Timings, emit, interleave, make_parser, peak_bytes
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import layerprobe as lp
from layerprobe.tables import format_bytes, format_table

SHAPES = ((1, 8), (8, 128), (32, 128), (8, 512))
SITE_SETS: dict[str, list[str]] = {
    "all": ["embeddings", "layers.*"],
    "last": ["layers.-1"],
    "ffn.act": ["layers.*.ffn.act"],
}
# A case of few tokens repeats its call to outweigh the clock's overhead; a store needs more than one batch.
_TOKENS_PER_RUN = 4096
_MOST_CALLS = 48
_STORE_CALLS = 3
# A case's share of the time grows with its tokens; short calls still need enough rounds for a median.
_LEAST_SHARE = 1024


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=120.0, help="time for the rounds of all cases together")
    options = parser.parse_args()
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"demo": lp.load_model("demo", "cpu").model}
    shapes = ((1, 8), (4, 16)) if options.quick else SHAPES
    if not options.quick:
        models["bert-base"] = BertModel(BertConfig()).eval()
    seconds = 1.0 if options.quick else options.seconds
    whole = len(models) * sum(max(_LEAST_SHARE, size * length) for size, length in shapes)
    cases, rows = [], []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name, model in models.items():
            for size, length in shapes:
                share = seconds * max(_LEAST_SHARE, size * length) / whole
                case = run_case(name, model, size, length, Path(folder), share)
                cases.append(case)
                rows += [_lay_out(case, rival) for rival in case["rivals"]]
        being_there = measure_being_there(rounds=3 if options.quick else 40)
    headers = ("model", "batch", "rival", "ms", "ratio", "cpu ms", "cpu ratio", "extra memory")
    print(format_table(headers, rows))
    print("\ncost of being there, narrow 6-layer BERT at 1x8:")
    print(format_table(("rival", "ms", "added ms", "added cpu ms"), being_there))
    added = [dict(zip(("rival", "wall_ms", "added_wall_ms", "added_cpu_ms"), row, strict=True)) for row in being_there]
    settings = {
        "seconds": seconds,
        "store_dtype": "float16",
        "memory": "peak of torch's own allocations, from the profiler",
    }
    emit("hooks", settings, {"cases": cases, "being_there": added}, save=options.save)


def run_case(name: str, model: nn.Module, size: int, length: int, folder: Path, seconds: float) -> dict[str, Any]:
    """Time all rivals on one batch, and measure the memory of each."""
    input_ids = torch.randint(1000, 20000, (size, length))
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    calls = max(1, min(_MOST_CALLS if seconds > 1 else 2, _TOKENS_PER_RUN // (size * length)))
    store_calls = max(calls, _STORE_CALLS)
    rivals = {
        "bare": Rival(partial(call_bare, model, batch, calls), calls),
        "output_hidden_states": Rival(partial(call_hidden_states, model, batch, calls), calls),
    }
    for set_name, patterns in SITE_SETS.items():
        rivals[f"memory {set_name}"] = Rival(partial(call_memory, model, batch, calls, patterns), calls)
        rivals[f"store {set_name}"] = Rival(
            partial(call_store, model, batch, store_calls),
            store_calls,
            partial(open_store_probe, model, patterns, folder),
        )
    # a round of the largest case takes most of a minute, and one call is enough to warm up
    model(**batch)
    timings = interleave(rivals, seconds=seconds, least_rounds=1, warm_rounds=0)
    peaks = {rival: peak_bytes(work) for rival, work in memory_works(model, batch, folder).items()}
    return {
        "model": name,
        "batch": size,
        "length": length,
        "rounds": len(timings["bare"].wall_s),
        "calls": calls,
        "calls_store": store_calls,
        "rivals": {
            rival: {**timing.summary(timings["bare"]), "peak_extra_bytes": peaks[rival] - peaks["bare"]}
            for rival, timing in timings.items()
        },
    }


def call_bare(model: nn.Module, batch: dict[str, Tensor], calls: int, _: object = None) -> None:
    for _call in range(calls):
        model(**batch)


def call_hidden_states(model: nn.Module, batch: dict[str, Tensor], calls: int, _: object = None) -> object:
    return [model(**batch, output_hidden_states=True).hidden_states for _call in range(calls)]


def call_memory(
    model: nn.Module, batch: dict[str, Tensor], calls: int, patterns: list[str], _: object = None
) -> object:
    with lp.Probe(model, patterns) as probe:
        call_bare(model, batch, calls)
    return probe


def open_store_probe(model: nn.Module, patterns: list[str], folder: Path) -> tuple[ExitStack, Path]:
    """Open a probe into a new store; its first, tiny call allocates the buffers, outside the timing."""
    place = Path(tempfile.mkdtemp(dir=folder))
    opened = ExitStack()
    opened.enter_context(lp.Probe(model, patterns, to=place, dtype="float16"))
    model(input_ids=torch.ones(1, 8, dtype=torch.int64))
    return opened, place


def call_store(model: nn.Module, batch: dict[str, Tensor], calls: int, opened: tuple[ExitStack, Path]) -> None:
    probe, place = opened
    with probe:
        call_bare(model, batch, calls)
    shutil.rmtree(place)


def memory_works(model: nn.Module, batch: dict[str, Tensor], folder: Path) -> dict[str, Callable[[], object]]:
    """Return for each rival one call that includes opening and closing."""
    works: dict[str, Callable[[], object]] = {
        "bare": partial(call_bare, model, batch, 1),
        "output_hidden_states": partial(call_hidden_states, model, batch, 1),
    }
    for set_name, patterns in SITE_SETS.items():
        works[f"memory {set_name}"] = partial(call_memory, model, batch, 1, patterns)
        works[f"store {set_name}"] = partial(store_once, model, batch, patterns, folder)
    return works


def store_once(model: nn.Module, batch: dict[str, Tensor], patterns: list[str], folder: Path) -> None:
    call_store(model, batch, 1, open_store_probe(model, patterns, folder))


def measure_being_there(rounds: int) -> list[tuple[str, float, float, float]]:
    """Measure the overhead of a call whose forward pass is little but Python: milliseconds, medians over rounds.

    The probe is opened and closed outside the timing, like a with block around a loop.
    """
    config = BertConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=128)
    untouched = BertModel(config).eval()
    # transformers leaves its hooks on a model after a call with `output_hidden_states`
    asked, probed, closed = (copy.deepcopy(untouched) for _copy in range(3))
    batch = {"input_ids": torch.randint(1000, 20000, (1, 8)), "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    with lp.Probe(closed, SITE_SETS["all"]):
        closed(**batch)
    calls = _MOST_CALLS
    rivals = {
        "bare": Rival(partial(call_bare, untouched, batch, calls), calls),
        "output_hidden_states": Rival(partial(call_hidden_states, asked, batch, calls), calls),
        "memory all": Rival(
            partial(call_bare, probed, batch, calls),
            calls,
            lambda: lp.Probe(probed, SITE_SETS["all"]).__enter__(),
            lambda probe: probe.__exit__(None, None, None),
        ),
        "after the probe is closed": Rival(partial(call_bare, closed, batch, calls), calls),
    }
    timings = interleave(rivals, seconds=0.0, least_rounds=rounds, most_rounds=rounds)
    return [(rival, *_added(timing, timings["bare"])) for rival, timing in timings.items()]


def _added(timing: Timings, base: Timings) -> tuple[float, float, float]:
    wall = statistics.median(mine - theirs for mine, theirs in zip(timing.wall_s, base.wall_s, strict=True))
    cpu = statistics.median(mine - theirs for mine, theirs in zip(timing.cpu_s, base.cpu_s, strict=True))
    return round(1e3 * statistics.median(timing.wall_s), 4), round(1e3 * wall, 4), round(1e3 * cpu, 4)


def _lay_out(case: dict[str, Any], rival: str) -> tuple[object, ...]:
    found = case["rivals"][rival]
    shape = f"{case['batch']}x{case['length']}"
    times = (found["wall_ms"], found["wall_ratio"], found["cpu_ms"], found["cpu_ratio"])
    return (case["model"], shape, rival, *times, format_bytes(found["peak_extra_bytes"]))


if __name__ == "__main__":
    main()
