"""What does a store cost the forward pass? Many batches into one probe, its final flush included.

The demo model, all layers in float16, against the bare forward pass and against `output_hidden_states` that keeps
nothing, on the same batches and in turns. Before timing, both buffers are filled and flushed once, as they are for
nearly all of a long run: the first allocation of memory takes the system longer than a copy into it. `--fresh` includes
that. Each shape is an experiment of its own, so a disturbed one can be repeated alone.

    python benchmarks/streaming.py [--quick | --save] [--seconds 90] [--shape 8x512]
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Rival, emit, interleave, make_parser, read_results
from torch import nn

import layerprobe as lp
from layerprobe.capture.probe import DEFAULT_SHARD_BYTES
from layerprobe.tables import format_table

SITES = ["embeddings", "layers.*"]
SHAPES = ((8, 128), (32, 128), (8, 512))
# five shards, so that the final flush weighs as much as in a long run
_TOKENS_PER_RUN = 131072


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=90.0, help="time for the rounds of all shapes together")
    parser.add_argument("--fresh", action="store_true", help="count in the first use of the buffers")
    parser.add_argument("--shape", action="append", metavar="BxS", help="this one alone; with --save the others stay")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = lp.load_model("demo", "cpu").model
    shapes = ((4, 16),) if options.quick else SHAPES
    seconds = 0.0 if options.quick else options.seconds
    if options.shape:
        shapes = tuple(tuple(map(int, shape.split("x"))) for shape in options.shape)
    results, rows = [], []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for size, length in shapes:
            ids = torch.randint(1000, 20000, (size, length))
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            call_bytes = 2 * 384 * 7 * ids.numel()
            warm = 0 if options.quick or options.fresh else -(-2 * DEFAULT_SHARD_BYTES // call_bytes) + 1
            calls = max(4, (256 if options.quick else _TOKENS_PER_RUN) // ids.numel())
            rivals = {
                "bare": Rival(partial(_call, model, batch, calls), calls),
                "output_hidden_states": Rival(partial(_call, model, batch, calls, hidden_states=True), calls),
                "store": Rival(
                    partial(_stream, model, batch, calls), calls, partial(_open, model, Path(folder), batch, warm)
                ),
            }
            timings = interleave(rivals, seconds=seconds / len(shapes), warm_rounds=1)
            for name, timing in timings.items():
                summary = timing.summary(timings["bare"])
                result = {"batch": f"{size}x{length}", "calls": calls, "rounds": len(timing.wall_s), "rival": name}
                results.append({**result, **summary})
                rows.append((f"{size}x{length}", name, len(timing.wall_s), *summary.values()))
    print(format_table(("batch", "rival", "rounds", "ms", "cpu ms", "ratio", "cpu ratio"), rows))
    if options.save and options.shape:
        taken = {result["batch"] for result in results}
        results = [result for result in read_results("streaming") if result["batch"] not in taken] + results
    emit(
        "streaming",
        {"sites": SITES, "dtype": "float16", "buffers": "fresh" if options.fresh else "used"},
        results,
        save=options.save,
    )


def _call(model: nn.Module, batch: dict[str, Any], calls: int, _: object, hidden_states: bool = False) -> None:
    for _number in range(calls):
        model(**batch, output_hidden_states=hidden_states)


def _open(model: nn.Module, folder: Path, batch: dict[str, Any], warm: int) -> lp.Probe:
    """Open a probe into an empty store, allocate its buffers with a small call, and use them for `warm` batches."""
    shutil.rmtree(folder / "acts", ignore_errors=True)
    probe = lp.Probe(model, SITES, to=folder / "acts", dtype="float16")
    probe.__enter__()
    model(input_ids=torch.ones(1, 8, dtype=torch.int64))
    for _number in range(warm):
        model(**batch)
    return probe


def _stream(model: nn.Module, batch: dict[str, Any], calls: int, probe: lp.Probe) -> None:
    for _number in range(calls):
        model(**batch)
    probe.__exit__(None, None, None)


if __name__ == "__main__":
    main()
