"""What do edits cost? An edited forward against the bare one, and a sweep of patches against its bare forwards.

The sweep's bare forwards are as many, of batches of the same size, as the sweep makes; attribution is held against
three times one text, for two forwards and a backward.

    python benchmarks/instrument.py [--quick] [--save] [--seconds 120]
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from harness import Rival, Timings, emit, interleave, make_parser
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

import layerprobe as lp
from layerprobe.tables import format_table

SHAPES = ((1, 8), (8, 128), (32, 128))
# A case of few tokens repeats its call so that the clock is not what is measured.
_TOKENS_PER_RUN = 4096
_MOST_CALLS = 48
_BATCH = 32


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=120.0, help="time for the rounds of all cases together")
    options = parser.parse_args()
    torch.manual_seed(0)
    seconds = 1.0 if options.quick else options.seconds
    small: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    config = BertConfig(num_hidden_layers=2, **small) if options.quick else BertConfig()
    shapes = ((1, 8), (4, 16)) if options.quick else SHAPES
    cases = []
    with torch.no_grad():
        model = BertModel(config).eval()
        cases = [run_edits(model, size, length, seconds / 2 / len(shapes)) for size, length in shapes]
    sweep = run_sweep(BertForMaskedLM(config).eval(), 8 if options.quick else 32, seconds / 2)
    rows = [
        (f"{case['batch']}x{case['length']}", *_lay_out(case["rivals"], rival))
        for case in cases
        for rival in case["rivals"]
    ]
    rows += [
        (f"sweep {sweep['sites']}x{sweep['length']}", *_lay_out(sweep["rivals"], rival)) for rival in sweep["rivals"]
    ]
    print(format_table(("batch", "rival", "ms", "ratio", "cpu ms", "cpu ratio"), rows))
    emit("instrument", {"seconds": seconds, "sweep_batch": _BATCH}, {"edits": cases, "sweep": sweep}, save=options.save)


def run_edits(model: Any, size: int, length: int, seconds: float) -> dict[str, Any]:
    """Time one batch bare and under edits; a quarter of the last text is padding, so that a mask is needed."""
    ids = torch.randint(1000, 20000, (size, length))
    mask = torch.ones_like(ids)
    mask[-1, length - length // 4 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    width, last = model.config.hidden_size, model.config.num_hidden_layers - 1
    vector = torch.randn(width)
    edits: dict[str, dict[str, Any]] = {
        "steer one layer": {f"layers.{last // 2}": lp.steer(vector)},
        "steer all layers": {"layers.*": lp.steer(vector)},
        "ablate a head of all layers": {"layers.*.attention.context": lp.ablate(heads=[1])},
        "project out of all layers": {"layers.*": lp.project_out(vector)},
        "scale all ffn.act": {"layers.*.ffn.act": lp.scale(0.5)},
    }
    calls = max(1, min(_MOST_CALLS if seconds > 1 else 2, _TOKENS_PER_RUN // (size * length)))
    rivals = {"bare": Rival(partial(call_bare, model, batch, calls), calls)}
    for name, asked in edits.items():
        rivals[name] = Rival(partial(call_edited, model, batch, calls, asked), calls)
    timings = interleave(rivals, seconds=seconds, least_rounds=2)
    return {"batch": size, "length": length, "calls": calls, **_summarise(timings, "bare")}


def run_sweep(model: Any, length: int, seconds: float) -> dict[str, Any]:
    """Time a sweep of all layers and positions, its bare forwards, and the estimate of it."""
    clean, corrupt = ({"input_ids": torch.randint(1000, 20000, (1, length))} for _ in range(2))
    num_sites = model.config.num_hidden_layers
    num_patches = num_sites * length
    sizes = [min(_BATCH, num_patches - start) for start in range(0, num_patches, _BATCH)]

    def metric(output: Any) -> Tensor:
        return output.logits[:, -1, 7]

    def call_forwards(_: object = None) -> None:
        with torch.no_grad():
            for size in (1, 1, *sizes):
                model(input_ids=corrupt["input_ids"].expand(size, -1))

    def call_single(_: object = None) -> None:
        with torch.no_grad():
            for _call in range(3):
                model(**corrupt)

    def sweep(method: str, _: object = None) -> object:
        return lp.patching(model, clean, corrupt, metric, method=method, batch_size=_BATCH, progress=False)

    rivals = {
        "bare forwards": Rival(call_forwards),
        "exact": Rival(partial(sweep, "exact")),
        "three forwards of one text": Rival(call_single),
        "attribution": Rival(partial(sweep, "attribution")),
    }
    timings = interleave(rivals, seconds=seconds, least_rounds=2)
    return {"sites": num_sites, "length": length, "patches": num_patches, **_summarise(timings, "bare forwards")}


def call_bare(model: nn.Module, batch: dict[str, Tensor], calls: int, _: object = None) -> None:
    for _call in range(calls):
        model(**batch)


def call_edited(model: nn.Module, batch: dict[str, Tensor], calls: int, edits: Any, _: object = None) -> None:
    with lp.edit(model, edits):
        call_bare(model, batch, calls)


def _summarise(timings: Mapping[str, Timings], base: str) -> dict[str, Any]:
    return {
        "rounds": len(timings[base].wall_s),
        "rivals": {name: timing.summary(timings[base]) for name, timing in timings.items()},
    }


def _lay_out(rivals: Mapping[str, Mapping[str, float]], rival: str) -> tuple[object, ...]:
    found = rivals[rival]
    return (rival, found["wall_ms"], found["wall_ratio"], found["cpu_ms"], found["cpu_ratio"])


if __name__ == "__main__":
    main()
