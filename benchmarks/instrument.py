"""What do edits, sinks, a watch and a profile cost? Each against the bare forward, a sweep against its bare forwards.

The sweep's bare forward passes match its own in number and batch size. Attribution is compared with three forward
passes of one text, standing for two forwards and a backward. A watch at every 50 steps is compared with 50 bare
training steps. The same patch of one layer is also made with nnsight and TransformerLens, if they are installed.

    python benchmarks/instrument.py [--quick | --save] [--seconds 120]
"""

import copy
import importlib
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from harness import Rival, Timings, emit, interleave, make_parser
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

import layerprobe as lp
from layerprobe.tables import format_table

SHAPES = ((1, 8), (8, 128), (32, 128))
# A case of few tokens repeats its call to outweigh the clock's overhead.
_TOKENS_PER_RUN = 4096
_MOST_CALLS = 48
_BATCH = 32
_PACKAGES = {"nnsight": "nnsight", "TransformerLens": "transformer_lens"}


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
    config = BertConfig(**small) if options.quick else BertConfig()
    shapes = ((1, 8), (4, 16)) if options.quick else SHAPES
    cases = []
    with torch.no_grad():
        model = BertModel(config).eval()
        cases = [run_edits(model, size, length, seconds / 2 / len(shapes)) for size, length in shapes]
        sinks = run_sinks(model, *shapes[1], seconds / 4)
    masked = BertForMaskedLM(config).eval()
    with torch.no_grad():
        patch = run_patch(masked, shapes[1][1], seconds / 8)
    watching = run_watching(options.quick, seconds / 4)
    profiled = run_profile(model, *shapes[1], 2 if options.quick else 10)
    sweep = run_sweep(masked, 8 if options.quick else 32, seconds / 2)
    rows = [
        (f"{case['batch']}x{case['length']}", *_lay_out(case["rivals"], rival))
        for case in cases
        for rival in case["rivals"]
    ]
    rows += [
        (f"sweep {sweep['sites']}x{sweep['length']}", *_lay_out(sweep["rivals"], rival)) for rival in sweep["rivals"]
    ]
    named = {"sinks": sinks, "one patch": patch, "50 steps": watching}
    rows += [(name, *_lay_out(case["rivals"], rival)) for name, case in named.items() for rival in case["rivals"]]
    print(format_table(("batch", "rival", "ms", "ratio", "cpu ms", "cpu ratio"), rows))
    print(
        f"a profile's marks cost {profiled['overhead']:+.1%} of a forward; not installed: {patch['missing'] or 'none'}"
    )
    results = {"edits": cases, "sweep": sweep, "sinks": sinks, "patch": patch, "watch": watching, "profile": profiled}
    emit("instrument", {"seconds": seconds, "sweep_batch": _BATCH}, results, save=options.save)


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
    """Time a sweep over all layers and positions, its bare forward passes, and its estimate by attribution."""
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


def run_sinks(model: Any, size: int, length: int, seconds: float) -> dict[str, Any]:
    """Time one batch bare, into memory, and into each statistics sink, at every layer."""
    batch = {"input_ids": torch.randint(1000, 20000, (size, length)), "attention_mask": torch.ones(size, length).long()}
    makers: dict[str, Any] = {
        "memory": lambda: None,
        "moments": lp.Moments,
        "histogram": lp.Histogram,
        "covariance": lp.Covariance,
        "cross-covariance of neighbours": lambda: lp.CrossCovariance("consecutive"),
        "top 10": lp.TopK,
    }
    calls = 3
    rivals = {"bare": Rival(partial(call_bare, model, batch, calls), calls)}
    for name, make in makers.items():
        rivals[name] = Rival(partial(call_probed, model, batch, calls), calls, prepare=make)
    timings = interleave(rivals, seconds=seconds, least_rounds=2)
    return {"batch": size, "length": length, "calls": calls, **_summarise(timings, "bare")}


def call_probed(model: nn.Module, batch: dict[str, Tensor], calls: int, sink: Any) -> None:
    with lp.Probe(model, "layers.*", to=sink):
        call_bare(model, batch, calls)


def run_watching(is_quick: bool, seconds: float) -> dict[str, Any]:
    """Time 50 training steps bare and watched, with the first one recorded; and a single recorded step."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    if not is_quick:
        sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    model = BertForMaskedLM(BertConfig(num_hidden_layers=2 if is_quick else 6, vocab_size=2000, **sizes)).train()
    ids = torch.randint(1000, 2000, (8, 32))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    rivals: dict[str, Rival] = {}
    for steps in (50, 1):
        rivals[f"bare, {steps}"] = Rival(partial(train_bare, model, batch, steps), steps)
        for sites in (["layers.*"], ["layers.*", "layers.*.ffn.act"]):
            name = f"watch {' and '.join(sites)}, {steps}"
            rivals[name] = Rival(partial(train_watched, model, batch, steps, sites), steps)
    timings = interleave(rivals, seconds=seconds, least_rounds=2)
    summaries = [_summarise({n: t for n, t in timings.items() if n.endswith(f", {k}")}, f"bare, {k}") for k in (50, 1)]
    merged = {name: found for summary in summaries for name, found in summary["rivals"].items()}
    return {"batch": 8, "length": 32, "rounds": summaries[0]["rounds"], "rivals": merged}


def train_bare(model: Any, batch: dict[str, Tensor], steps: int, _: object = None) -> None:
    for _step in range(steps):
        model.zero_grad()
        model(**batch).loss.backward()


def train_watched(model: Any, batch: dict[str, Tensor], steps: int, sites: list[str], _: object = None) -> None:
    with lp.watch(model, sites, every=50, log=lambda *_: None):
        train_bare(model, batch, steps)


def run_profile(model: Any, size: int, length: int, repeats: int) -> dict[str, Any]:
    """Return the overhead of a profile's markers, as the profile reports it."""
    batch = {"input_ids": torch.randint(1000, 20000, (size, length))}
    return {
        "batch": size,
        "length": length,
        "repeats": repeats,
        "overhead": lp.profile(model, batch, repeats=repeats).overhead,
    }


def run_patch(model: Any, length: int, seconds: float) -> dict[str, Any]:
    """Patch one layer's values from one text into the forward pass of another, with each installed tool.

    TransformerLens switches attention to `eager` for its hooks, so its time includes that.
    """
    clean, corrupt = ({"input_ids": torch.randint(1000, 20000, (1, length))} for _ in range(2))
    number = model.config.num_hidden_layers // 2
    site = f"layers.{number}"
    with lp.Probe(model, site) as probe:
        expected = model(**clean).logits
    edits = {site: lp.patch(probe[site], where="all")}
    calls = 4
    rivals = {"bare": Rival(partial(call_bare, model, corrupt, calls), calls)}
    missing = []
    makers = {"layerprobe": make_layerprobe, "nnsight": make_nnsight, "TransformerLens": make_transformer_lens}
    for name, make in makers.items():
        try:
            rival = make(copy.deepcopy(model), number, probe[site], edits)
        except ImportError:
            missing.append(name)
            continue
        # everything after the patched layer is computed from the clean text's values
        assert torch.allclose(rival(corrupt), expected, atol=1e-4), f"{name} patches something else"
        rivals[name] = Rival(partial(call_rival, rival, corrupt, calls), calls)
    timings = interleave(rivals, seconds=seconds, least_rounds=2)
    versions = {name: version(package) for name, package in _PACKAGES.items() if name not in missing}
    return {
        "layer": number, "length": length, "missing": missing, "versions": versions, **_summarise(timings, "bare")
    }  # fmt: skip


def call_rival(rival: Callable[[Any], Tensor], batch: dict[str, Tensor], calls: int, _: object = None) -> None:
    for _call in range(calls):
        rival(batch)


def make_layerprobe(model: Any, number: int, values: Tensor, edits: Any) -> Callable[[Any], Tensor]:
    """Patch with layerprobe; hooks are added and removed on each call, as in the others."""

    def run(batch: dict[str, Tensor]) -> Tensor:
        with lp.edit(model, edits):
            return model(**batch).logits

    return run


def make_nnsight(model: Any, number: int, values: Tensor, _: Any) -> Callable[[Any], Tensor]:
    """Patch with nnsight: a trace in which a layer's output is replaced."""
    wrapped = importlib.import_module("nnsight").NNsight(model)

    def run(batch: dict[str, Tensor]) -> Tensor:
        with wrapped.trace(**batch):
            wrapped.bert.encoder.layer[number].output = values
            made = wrapped.output.logits.save()
        return made  # noqa: RET504 - a trace is not left from within

    return run


def make_transformer_lens(model: Any, number: int, values: Tensor, _: Any) -> Callable[[Any], Tensor]:
    """Patch with TransformerLens: its bridge around the same model, and a hook on a block's output."""
    bridges = importlib.import_module("transformer_lens.model_bridge")
    with tempfile.TemporaryDirectory() as folder:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        bridge = bridges.TransformerBridge.boot_transformers(
            folder, hf_model=model, tokenizer=lp.load_model("demo", "cpu").tokenizer
        )

    def replace(value: Tensor, hook: object) -> Tensor:
        return values

    def run(batch: dict[str, Tensor]) -> Tensor:
        return bridge.run_with_hooks(batch["input_ids"], fwd_hooks=[(f"blocks.{number}.hook_out", replace)])

    return run


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
