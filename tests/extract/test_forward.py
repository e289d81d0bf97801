"""Runs in another precision, and compiled: the values of torch's own autocast, and a model left as it was."""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe
from forks import Ended, run_each
from layerprobe.errors import OptionError, PlanError
from layerprobe.extract import audit as auditing
from layerprobe.extract import plan as planning
from layerprobe.extract.audit import audit
from layerprobe.extract.batching import Shapes
from layerprobe.extract.engine import UnitEngine
from layerprobe.extract.forward import check_device, check_recording, compute_in
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.models import LoadedModel

extract: Any = layerprobe.extract
TEXT = "the quick brown fox jumps over the lazy dog ."


def hooks_of(loaded: LoadedModel) -> list[int]:
    """Count them: transformers leaves some of its own."""
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in loaded.model.modules()]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_values_are_those_of_autocast(tiny: LoadedModel, tmp_path: Path, precision: str) -> None:
    store = extract(tiny, [TEXT], tmp_path / "acts", sites=["layers.*", "layers.0.ffn.act"], precision=precision)
    batch = tiny.tokenizer(TEXT, return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        plain = tiny.model(**batch, output_hidden_states=True).hidden_states
        with torch.autocast("cpu", dtype=getattr(torch, precision)):
            states = tiny.model(**batch, output_hidden_states=True).hidden_states
    for layer in range(3):
        assert torch.equal(store[f"layers.{layer}"][0], states[layer + 1][0])
    assert not torch.equal(states[3], plain[3])
    assert store["layers.0.ffn.act"].dtype == getattr(torch, precision)
    assert next(tiny.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_store_of_another_precision_passes_its_audit(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, precision: str
) -> None:
    extract(tiny, texts, tmp_path / "acts", dtype="float16", precision=precision, shard_size=20_000)
    report = audit(tmp_path / "acts", tiny, num_examples=100)
    assert report.ok, report


def test_precision_and_compile_belong_to_the_plan_where_they_change_values(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    def fingerprint(**options: Any) -> str:
        return plan_extraction(tiny, texts, tmp_path / "none", ExtractOptions(**options)).fingerprint

    plain, bfloat16 = fingerprint(), fingerprint(precision="bfloat16")
    assert fingerprint(precision="float32") == plain != bfloat16 != fingerprint(precision="float16")
    assert fingerprint(compile="eager") != plain
    extract(tiny, texts, tmp_path / "acts", precision="bfloat16")
    with pytest.raises(PlanError, match=r"plan\.precision: 'bfloat16' there, None here"):
        extract(tiny, texts, tmp_path / "acts")


@pytest.mark.parametrize(("short", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_a_short_name_of_a_precision_is_the_same_run(tiny: LoadedModel, tmp_path: Path, short: str, name: str) -> None:
    store = extract(tiny, [TEXT], tmp_path / "acts", precision=short)
    assert store.description["plan"].get("precision") == (name if name != "float32" else None)
    plan = plan_extraction(tiny, [TEXT], tmp_path / "acts", ExtractOptions(precision=name))
    assert plan.fingerprint == store.fingerprint and len(plan.done) == plan.num_units
    assert audit(tmp_path / "acts", tiny, num_examples=1).ok


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"sites": "layers.0"}, {"keep": 0.5}])
def test_a_compiled_run_gives_the_rows_of_a_plain_one(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, options: dict[str, Any]
) -> None:
    before = hooks_of(tiny)
    plain = extract(tiny, texts, tmp_path / "plain", **options)
    store = extract(tiny, texts, tmp_path / "compiled", compile="eager", **options)
    assert store.is_complete and store.sites == plain.sites
    assert hooks_of(tiny) == before
    assert tiny.model._compiled_call_impl is None
    for ordinal in range(len(texts)):
        for site in store.sites:
            torch.testing.assert_close(store[site][ordinal], plain[site][ordinal])  # other kernels, other sums
    assert audit(tmp_path / "compiled", tiny, num_examples=4).ok


@pytest.mark.parametrize("sites", ["layers.*", ["layers.2.attention.query", "layers.2.ffn.act"]])
def test_a_compiled_run_reads_inside_late_layers_and_cuts_no_graph(
    tiny: LoadedModel, tmp_path: Path, sites: Any
) -> None:
    options: dict[str, Any] = {"sites": sites, "padding_free": False}
    plain = extract(tiny, [TEXT, "the fox"], tmp_path / "plain", **options)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    store = extract(tiny, [TEXT, "the fox"], tmp_path / "compiled", compile="eager", **options)
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.compiler.reset()
    for site in store.sites:
        assert torch.equal(store[site][0], plain[site][0]) and torch.equal(store[site][1], plain[site][1])


@pytest.mark.parametrize("options", [{"sites": ["layers.*", "pooler"]}, {"pool": "mean"}, {"keep": 0.5}])
def test_batches_for_cuda_graphs_have_few_shapes_and_give_the_rows_of_a_plain_run(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "check_device", lambda *_: None)
    # what a graph is recorded of; the compiler itself is another test's
    engine: Any = sys.modules[UnitEngine.__module__]
    monkeypatch.setattr(engine, "compile_network", lambda model, _: model)
    texts = [*texts, *texts[:3], ""]
    seen: list[tuple[int, int]] = []
    plain = extract(tiny, texts, tmp_path / "plain", batch_tokens=64, shard_size=30_000, **options)
    hook = tiny.model.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    sinks: list[dict[str, Any]] = []
    make_sink = engine.StoreSink
    monkeypatch.setattr(engine, "StoreSink", lambda *args, **how: [sinks.append(how), make_sink(*args, **how)][1])
    with hook:
        plan_options = {"batch_tokens": 64, "shard_size": 30_000, **options}
        store = extract(tiny, texts, tmp_path / "graphs", compile="reduce-overhead", **plan_options)
    assert store.is_complete and store.num_shards == plain.num_shards
    assert [sink["packs_in_graphs"] for sink in sinks] == [False]  # a graph's own buffers are written again by the next
    shapes = Shapes(64, 64)
    widths = {shapes.width(length) for length in range(65)}
    assert set(seen[3:]) <= {
        (height, width) for width in widths for height in shapes.heights(width)
    }  # the rest is the plan's
    for ordinal in range(len(texts)):
        for site in store.sites:
            torch.testing.assert_close(store[site][ordinal], plain[site][ordinal])
    assert store.example(3).tokens == plain.example(3).tokens


@pytest.mark.slow
def test_a_run_for_cuda_graphs_compiles_and_gives_the_rows_of_a_plain_one(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [TEXT, "the fox", TEXT + TEXT]
    plain = extract(tiny, texts, tmp_path / "plain")
    modes: list[Any] = []
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **how: [modes.append(how.get("mode")), compiler(*args, **how)][1]
    )
    monkeypatch.setattr(planning, "check_device", lambda *_: None)
    store = extract(tiny, texts, tmp_path / "graphs", compile="reduce-overhead")
    assert set(modes) == {"reduce-overhead"}
    for ordinal in range(len(texts)):
        for site in store.sites:
            torch.testing.assert_close(store[site][ordinal], plain[site][ordinal])
    assert audit(tmp_path / "graphs", tiny, num_examples=3).ok
    with pytest.raises(PlanError, match=r"plan\.compile: 'reduce-overhead' there, None here"):
        extract(tiny, texts, tmp_path / "graphs")


def test_cuda_graphs_are_refused_where_nothing_replays_them(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"compile='reduce-overhead' .* on cpu: CUDA devices replay graphs"):
        extract(tiny, ["a"], tmp_path / "acts", compile="reduce-overhead")
    assert not (tmp_path / "acts").exists()


def test_cuda_graphs_are_refused_with_a_torch_that_would_record_what_reads_values() -> None:
    asked = r"compile='reduce-overhead' \(--cuda-graphs\)"
    with pytest.raises(
        OptionError, match=rf"{asked} with torch {re.escape(torch.__version__)}: .* torch 2\.9 or newer"
    ):
        check_recording(has_tag=False, is_partitioned=True)
    with pytest.raises(OptionError, match=rf"{asked}: torch's compiler has graph_partition off, .*Switch it on"):
        check_recording(has_tag=True, is_partitioned=False)
    check_recording(has_tag=True, is_partitioned=True)


def test_a_torch_that_does_not_cut_graphs_is_asked_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    check_device(torch.device("cuda"), True)
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("torch 2.9 brings the tag")
    with config.patch(graph_partition=True):
        check_device(torch.device("cuda"), "reduce-overhead")
    with config.patch(graph_partition=False), pytest.raises(OptionError, match="has graph_partition off"):
        check_device(torch.device("cuda"), "reduce-overhead")


def test_what_does_not_exist_is_refused(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    accepted = (
        r"use float32 \(or fp32\), tf32, bfloat16 \(or bf16\), float16 \(or fp16\), or leave it out to compute in"
    )
    for precision in ("half", "", torch.bfloat16, ["bf16"]):
        with pytest.raises(OptionError, match=rf"no precision .*: {accepted}"):
            extract(tiny, texts, tmp_path / "acts", precision=precision)
    with pytest.raises(OptionError, match="compile='quick': no such backend"):
        extract(tiny, texts, tmp_path / "acts", compile="quick")


def test_weights_of_fewer_digits_are_refused(make_bert: Any, tiny: LoadedModel, tmp_path: Path) -> None:
    model = make_bert().to(torch.bfloat16)
    with pytest.raises(OptionError, match="precision='float32' with weights of bfloat16: it lowers that of float32"):
        extract(model, ["a"], tmp_path / "acts", tokenizer=tiny.tokenizer, precision="float32")


def test_tf32_is_refused_where_nothing_computes_so(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="precision='tf32' on cpu: CUDA devices compute so"):
        extract(tiny, ["a"], tmp_path / "acts", precision="tf32")
    assert not (tmp_path / "acts").exists()


def test_tf32_is_a_setting_for_the_length_of_a_run() -> None:
    before = torch.get_float32_matmul_precision()

    def fail_inside() -> None:
        with compute_in(torch.nn.Linear(1, 1), "tf32"):
            assert torch.get_float32_matmul_precision() == "high"
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.get_float32_matmul_precision() == before


SETTINGS = {
    "as torch begins": "pass",
    "the old name": "torch.set_float32_matmul_precision('high')",
    "the old name of cuBLAS": "torch.backends.cuda.matmul.allow_tf32 = True",
    "a new name": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "another new name": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "the new name of all": "torch.backends.fp32_precision = 'tf32'",
}


SETUP = """
import torch
from layerprobe.extract.forward import compute_in

def look():
    new = [getattr(one, "fp32_precision", "") for one in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]
    try:
        return [*new, torch.get_float32_matmul_precision()]
    except RuntimeError:  # old and new names differ
        return [*new, "mixed"]
"""


@pytest.fixture(scope="module")
def rounded() -> dict[tuple[str, str | None], Ended]:
    """What happens in a process that has one setting and computes in one precision: torch keeps no way back."""
    cases = list(itertools.product(SETTINGS.values(), (None, "tf32")))
    pieces = [
        f"""
{said}
before = look()
with compute_in(torch.nn.Linear(1, 1), {precision!r}):
    print(torch.get_float32_matmul_precision())
assert look() == before, (look(), before)
if {said!r}.startswith("torch.backends.fp32"):  # what came from there still does
    torch.backends.fp32_precision = "ieee"
    assert look()[:2] == ["ieee", "ieee"], look()
"""
        for said, precision in cases
    ]
    return dict(zip(cases, run_each(SETUP, pieces), strict=True))


@pytest.mark.parametrize("said", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("precision", [None, "tf32"])
def test_products_are_rounded_as_the_plan_says_whatever_a_program_has_set(
    rounded: dict[tuple[str, str | None], Ended], said: str, precision: str | None
) -> None:
    """Else a run would not be that of its plan."""
    if "fp32_precision" in said and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch 2.9 has the new names")
    ended = rounded[said, precision]
    assert ended.status == 0, ended.said
    assert ended.said.strip() == ("highest" if precision is None else "high")


def test_the_rounding_of_products_is_put_back_by_the_last_of_several_runs() -> None:
    network = torch.nn.Linear(1, 1)
    before = torch.get_float32_matmul_precision()
    first, second = (compute_in(network, "tf32") for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "high"
    with pytest.raises(OptionError, match="precision=None: a run of this process computes otherwise now"):
        compute_in(network, None).__enter__()
    second.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == before
    with compute_in(network, None), compute_in(network, None):
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_run_under_autocast_is_that_of_its_precision(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    """Else the plan would say float32 of rows that are not, and a run from another program go on with others."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = extract(tiny, texts, tmp_path / "around", sites="layers.*")
        exact = extract(tiny, texts, tmp_path / "exact", sites="layers.*", precision="float32")
    asked = extract(tiny, texts, tmp_path / "asked", sites="layers.*", precision="bfloat16")
    plain = extract(tiny, texts, tmp_path / "plain", sites="layers.*")
    said = {
        store: json.loads((store.folder / "store.json").read_text())["fingerprint"]
        for store in (around, exact, asked, plain)
    }
    assert said[around] == said[asked] != said[plain] == said[exact]
    for site, ordinal in itertools.product(plain.sites, range(len(texts))):
        assert torch.equal(around[site][ordinal], asked[site][ordinal])
        assert torch.equal(exact[site][ordinal], plain[site][ordinal])
    with pytest.raises(PlanError, match=r"plan\.precision: 'bfloat16' there, None here"):
        extract(tiny, texts, tmp_path / "around", sites="layers.*")


def test_an_audit_elsewhere_gives_tf32_the_room_of_as_many_bits() -> None:
    made = torch.zeros(1)
    assert auditing._share_reordered(made, "tf32") == auditing._share_reordered(made, "float16")
    assert auditing._share_reordered(made, "tf32") > auditing._share_reordered(made, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_is_part_of_the_plan_and_near_float32(tiny_model_folder: Path, texts: list[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "cuda", "sites": "layers.2"}
    exact = extract(str(tiny_model_folder), texts, tmp_path / "exact", **options)
    rounded = extract(str(tiny_model_folder), texts, tmp_path / "rounded", precision="tf32", **options)
    for ordinal in range(len(texts)):
        # ten bits of mantissa in the operands
        torch.testing.assert_close(rounded["layers.2"][ordinal], exact["layers.2"][ordinal], rtol=1e-2, atol=1e-2)
    with pytest.raises(PlanError, match=r"plan\.precision: 'tf32' there, None here"):
        extract(str(tiny_model_folder), texts, tmp_path / "rounded", **options)
