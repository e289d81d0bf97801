"""`lp.profile`: what is counted against torch's own counters, what is timed against itself."""

import json
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import layerprobe as lp
from families import FAMILIES, build, make_batch
from layerprobe.cost.counting import make_flop_counter
from layerprobe.cost.machine import check_device
from layerprobe.cost.marks import find_points
from layerprobe.errors import CaptureError, OptionError, SiteError, StoreError
from layerprobe.models import LoadedModel
from layerprobe.sites.resolve import map_model

Batch = dict[str, Tensor]


def count_by_torch(model: Any, batch: Batch) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops()


def test_flops_are_torchs_total_and_add_up_to_it(make_bert: Callable[..., Any], batch: Batch) -> None:
    model = make_bert("BertForMaskedLM", attn_implementation="eager")
    profile = lp.profile(model, batch, repeats=1)
    assert profile.total.flops == count_by_torch(model, batch)
    assert sum(cost.flops for cost in profile.layers) == sum(cost.flops for cost in profile.places)
    assert sum(cost.flops for cost in profile.steps) == profile.total.flops


def test_the_attention_kernel_of_the_cpu_counts_as_eager_attention_does(
    make_bert: Callable[..., Any], batch: Batch
) -> None:
    fused, eager = make_bert(attn_implementation="sdpa"), make_bert(attn_implementation="eager")
    batch = {"input_ids": batch["input_ids"]}  # a mask would take the kernel away
    assert lp.profile(fused, batch, repeats=1).total.flops == count_by_torch(eager, batch)
    with torch.no_grad(), make_flop_counter() as counter:
        fused(**batch)
    assert counter.get_total_flops() == count_by_torch(eager, batch)


def test_a_step_is_charged_with_what_it_multiplies(make_bert: Callable[..., Any], batch: Batch) -> None:
    """By hand, for S tokens of width D, F in the FFN: 2 operations for each weight and token."""
    profile = lp.profile(make_bert(attn_implementation="eager"), batch, repeats=1)
    steps = {cost.name: cost for cost in profile.steps}
    tokens, width, wide = batch["input_ids"].numel(), 32, 64
    for name in ("query", "key", "value", "out"):
        assert steps[f"layers.1.attention.{name}"].flops == 2 * tokens * width * width
        assert steps[f"layers.1.attention.{name}"].parameters == width * width + width
    # q k and its product with v, over S keys each
    assert steps["layers.1.attention.context"].flops == 2 * 2 * tokens * 7 * width
    assert steps["layers.1.attention.context"].parameters == 0
    assert steps["layers.1.ffn.act"].flops == 2 * tokens * width * wide == steps["layers.1.ffn.out"].flops
    assert steps["layers.1.ffn.out"].parameters == width * wide + width
    assert steps["layers.1.ffn.act"].output_bytes == tokens * wide * 4
    assert steps["layers.1"].parameters == 2 * width  # the norm's


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_charged_for_all_it_does_and_has(name: str) -> None:
    model = build(name)
    batch = make_batch()
    profile = lp.profile(model, batch, repeats=1)
    with torch.no_grad(), make_flop_counter() as counter:
        model.requires_grad_(False)(**batch)
    assert profile.total.flops == counter.get_total_flops()
    assert profile.total.parameters == sum(parameter.numel() for parameter in model.parameters())
    layers = [cost.name for cost in profile.layers if cost.name.startswith("layers.")]
    assert layers == [f"layers.{index}" for index in range(map_model(model).num_layers["layers"])]
    assert len({cost.flops for cost in profile.layers if cost.name.startswith("layers.")}) == 1 or "modernbert" in name
    own = {site.name for site in lp.sites(model) if site.takes != "weights"}
    charged = {part for cost in profile.steps for part in _split(cost.name)}
    assert charged - {"other"} <= own


def _split(name: str) -> list[str]:
    """`layers.0.attention.query+key` is two sites."""
    first, *others = name.split("+")
    return [first, *(f"{first.rpartition('.')[0]}.{other}" for other in others)]


def test_intervals_add_up_to_the_model_in_each_repeat(make_bert: Callable[..., Any], batch: Batch) -> None:
    profile = lp.profile(make_bert(), batch, repeats=3)
    for repeat in range(3):
        whole = profile.total.seconds[repeat]
        for costs in (profile.steps, profile.layers, profile.places):
            # the same floats in another order
            assert sum(cost.seconds[repeat] for cost in costs) == pytest.approx(whole, rel=1e-9)
    assert len(profile.bare_s) == 3


def test_only_asked_steps_are_told_apart_and_layers_always(make_bert: Callable[..., Any], batch: Batch) -> None:
    whole = lp.profile(make_bert(), batch, repeats=1)
    coarse = lp.profile(make_bert(), batch, repeats=1, sites="layers.0.ffn.act")
    assert [cost.name for cost in coarse.layers] == [cost.name for cost in whole.layers]
    assert [cost.flops for cost in coarse.layers] == [cost.flops for cost in whole.layers]
    assert [cost.parameters for cost in coarse.layers] == [cost.parameters for cost in whole.layers]
    names = [cost.name for cost in coarse.steps]
    assert names == ["embeddings", "other", "layers.0.ffn.act", "layers.0", "layers.1", "layers.2", "pooler"]


def test_shared_layers_are_told_apart() -> None:
    model = build("albert")
    profile = lp.profile(model, make_batch(), repeats=1)
    layers = [cost for cost in profile.layers if cost.name.startswith("layers.")]
    assert layers[0].flops == layers[2].flops > 0
    assert layers[0].parameters > 0 == layers[2].parameters


def test_memory_is_that_of_the_tensors_alive(make_bert: Callable[..., Any], batch: Batch) -> None:
    """Against the allocator's own record, as torch's profiler keeps it."""
    model = make_bert(attn_implementation="eager", hidden_size=64, intermediate_size=1024)
    batch = {"input_ids": torch.randint(1, 100, (8, 60))}
    profile = lp.profile(model, batch, repeats=1)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profiler:
        model(**batch)
    live = most = 0
    results: Any = profiler.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    # matrix products take a workspace that no tensor shows
    assert profile.total.peak_bytes == pytest.approx(most, rel=0.25)
    wide = 8 * 60 * 1024 * 4
    assert profile.total.peak_bytes >= 2 * wide
    assert max(cost.peak_bytes for cost in profile.layers) == profile.total.peak_bytes


def test_bytes_moved_by_a_product_are_its_operands(make_bert: Callable[..., Any], batch: Batch) -> None:
    steps = {cost.name: cost for cost in lp.profile(make_bert(), batch, repeats=1).steps}
    tokens, width = batch["input_ids"].numel(), 32
    assert steps["layers.0.attention.key"].moved_bytes == 4 * (2 * tokens * width + width * width + width)


def test_the_model_is_left_as_it_was(make_bert: Callable[..., Any], batch: Batch) -> None:
    model = make_bert().train()
    model.encoder.layer[1].eval()
    model.pooler.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    lp.profile(model, batch, repeats=1)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert [module.training for module in model.modules()] == modes
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "__getstate__" not in module.__dict__


def test_hooks_are_gone_after_a_failed_forward(make_bert: Callable[..., Any]) -> None:
    model = make_bert()
    with pytest.raises(IndexError):
        lp.profile(model, {"input_ids": torch.tensor([[5000]])}, repeats=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tables_json_and_picture(make_bert: Callable[..., Any], batch: Batch, tmp_path: Path) -> None:
    profile = lp.profile(LoadedModel("tiny", make_bert(), None), batch, repeats=2)
    assert str(profile).splitlines()[0] == "tiny, 3 x 7 tokens, float32 on cpu, median of 2"
    assert "layers.*.ffn.act" in profile.table("place") and "layers.2.ffn.act" in profile.table("site")
    document = json.loads(profile.to_json(tmp_path / "profile.json"))
    assert document == json.loads((tmp_path / "profile.json").read_text())
    with pytest.raises(StoreError, match="there is no folder"):
        profile.to_json(tmp_path / "nowhere" / "profile.json")
    assert [entry["name"] for entry in document["steps"]] == [cost.name for cost in profile.steps]
    assert sum(entry["flops"] for entry in document["layers"]) == document["total"]["flops"]
    assert len(document["total"]["seconds"]) == document["repeats"] == 2
    figure = profile.plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = figure.axes
    ends: dict[float, float] = {}
    for bar in axes.patches:
        ends[bar.get_y()] = max(ends.get(bar.get_y(), 0.0), bar.get_x() + bar.get_width())
    # each layer's bar is as long as its steps' medians together
    wanted = [1e3 * sum(s.median_s for s in profile.steps if s.part == layer.name) for layer in profile.layers]
    assert sorted(ends.values()) == pytest.approx(sorted(wanted))
    # the first on top, and no room above or below
    assert axes.get_ylim() == (len(profile.layers) - 0.4, -0.6)


def test_trace_has_a_range_for_each_layer_and_site(make_bert: Callable[..., Any], batch: Batch, tmp_path: Path) -> None:
    model = make_bert()
    profile = lp.profile(model, batch, repeats=1)
    profile.to_chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ranges = {event["name"]: event for event in events if event.get("cat") == "user_annotation"}
    sites = {site.name for site in lp.sites(model) if site.takes != "weights"}
    assert set(ranges) == sites | {"other"}
    # the product that makes the query lies in its range, and that in its layer's
    inner, outer = ranges["layers.1.attention.query"], ranges["layers.1"]
    assert outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    products = [
        event for event in events
        if event["name"] == "aten::addmm" and inner["ts"] <= event["ts"] <= inner["ts"] + inner["dur"]
    ]  # fmt: skip
    assert len(products) == 1


def test_trace_of_a_model_that_is_gone(make_bert: Callable[..., Any], batch: Batch, tmp_path: Path) -> None:
    model = make_bert()
    profile = lp.profile(model, batch, repeats=1)
    with pytest.raises(StoreError, match="there is no folder"):
        profile.to_chrome_trace(tmp_path / "none" / "trace.json")
    gone = weakref.ref(model)
    del model
    import gc

    gc.collect()
    assert gone() is None
    with pytest.raises(OptionError, match="the model of this profile is gone"):
        profile.to_chrome_trace(tmp_path / "trace.json")


def test_a_path_that_changes_is_refused(make_bert: Callable[..., Any], batch: Batch) -> None:
    model = make_bert()
    passed: list[int] = []
    layers, forward = model.encoder.layer, model.encoder.layer[1].forward

    def skip_later(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        passed.append(1)
        # a layer inside a layer, but not in the first pass
        return forward(hidden, *args, **kwargs) if len(passed) == 1 else layers[2](hidden, *args, **kwargs)

    layers[1].forward = skip_later
    with pytest.raises(CaptureError, match="the same path"):
        lp.profile(model, batch, repeats=1)


def test_what_cannot_be_profiled_is_refused(make_bert: Callable[..., Any], batch: Batch) -> None:
    model = make_bert()
    with pytest.raises(OptionError, match=r"repeats is 0"):
        lp.profile(model, batch, repeats=0)
    with pytest.raises(OptionError, match=r"'layers.0.attention.context'"):
        lp.profile(model, batch, sites="layers.0.attention.weights")
    with pytest.raises(SiteError, match=r"layers\.9"):
        lp.profile(model, batch, sites="layers.9")
    with pytest.raises(OptionError, match="compiled"):
        lp.profile(torch.compile(model), batch)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="'meta'"):
        check_device(torch.device("meta"))
    with pytest.raises(OptionError, match="give what the model is called with, by name, such as input_ids"):
        lp.profile(model, {})
    profile = lp.profile(model, batch, repeats=1)
    with pytest.raises(OptionError, match="by='head'"):
        profile.table("head")
    with pytest.raises(OptionError, match=r"'.txt' is not"):
        profile.plot("profile.txt")


def test_every_site_that_is_made_has_a_point(make_bert: Callable[..., Any]) -> None:
    mapped = map_model(make_bert("BertForSequenceClassification"))
    made = {site.name for point in find_points(mapped, None) if point.takes != "enter" for site in point.sites}
    assert made == {site.name for site in mapped.table if site.takes != "weights"}


def test_a_profile_can_be_kept_without_its_model(make_bert: Callable[..., Any], batch: Batch, tmp_path: Path) -> None:
    profile = lp.profile(make_bert(), batch, repeats=1)
    kept = pickle.loads(pickle.dumps(profile))
    assert kept.table("site") == profile.table("site")
    with pytest.raises(OptionError, match="the model of this profile is gone"):
        kept.to_chrome_trace(tmp_path / "trace.json")
