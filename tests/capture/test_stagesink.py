"""Rows in a stage: those that memory holds, at the same address at every call, eager and compiled alike."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from families import build, is_known, make_batch
from layerprobe.errors import CaptureError, OptionError

pytestmark = pytest.mark.usefixtures("fresh_compiler")

LENGTHS = (5, 7, 16, 9, 33)
SITES = ["embeddings", "layers.*", "layers.*.attention.query", "layers.*.ffn.act", "pooler"]


@pytest.fixture
def model(make_bert: Any) -> Any:
    return make_bert(num_hidden_layers=2)


def _batch(length: int, size: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(1, 100, (size, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _compile(model: Any, backend: Any = "eager") -> Any:
    return torch.compile(model, fullgraph=True, dynamic=True, backend=backend)


def _count_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _pack(value: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """What a stage should hold of a value, in the slow and plain way."""
    mask = batch.get("attention_mask")
    if value.ndim == 2:
        return value
    kept = torch.ones(value.shape[:2]) if mask is None else mask
    return torch.stack([value[b, s] for b in range(len(kept)) for s in range(kept.shape[1]) if kept[b, s]])


@pytest.mark.slow
@pytest.mark.oldest
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_for_all_lengths_writes_rows_that_never_move(model: Any, backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a compiler")
    compiled, stage, made = _compile(model, backend), lp.Stage(max_tokens=128), []
    graphs, addresses = set(), set()
    with torch.no_grad(), lp.Probe(compiled, SITES, to=stage) as probe:
        for length in LENGTHS:
            batch = _batch(length)
            output = compiled(**batch)
            graphs.add(_count_graphs())
            addresses.add((*(stage[site.name].data_ptr() for site in probe.sites), stage.offsets.data_ptr()))
            assert stage.offsets.tolist() == [0, length, 2 * length, 2 * length + length // 2]
            assert torch.equal(stage["layers.-1"], _pack(output.last_hidden_state, batch))
            assert torch.equal(stage["pooler"], output.pooler_output)
            made.append({site.name: stage[site.name].clone() for site in probe.sites})
    assert len(addresses) == len(graphs) == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    # inductor fuses: rounding of float32 sums of 64 terms
    tolerance = 1e-5 if backend == "inductor" else 0.0
    for length, rows in zip(LENGTHS, made, strict=True):
        with torch.no_grad(), lp.Probe(model, SITES) as memory:
            model(**_batch(length))
        for site in rows:
            torch.testing.assert_close(rows[site], _pack(memory[site], _batch(length)), atol=tolerance, rtol=0.0)


@pytest.mark.slow
def test_gather_and_cast_are_in_the_graph_and_no_operator_cuts_it(model: Any) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    stage, batch = lp.Stage(max_tokens=64), _batch(9)
    with torch.no_grad(), lp.Probe(model, "layers.*", to=stage, dtype="float16"):
        output = _compile(model, keep)(**batch)
    assert torch.equal(stage["layers.1"], _pack(output.last_hidden_state, batch).half())
    (graph,) = [graph for graph in graphs if "linear" in str(graph.graph)]
    assert not any("layerprobe." in str(node.target) for one in graphs for node in one.graph.nodes)
    written = [node.args[0] for node in graph.graph.nodes if str(node.target) == "index_copy_"]
    # two sites and the offsets, each an input of which the compiler knows that it never moves
    assert len(written) == 3
    for node in written:
        assert node.op == "placeholder" and node.meta["tensor_dict"]["_dynamo_static_input_type"]
    assert sum(node.meta["example_value"].dtype == torch.float16 for node in written) == 2


def test_a_call_with_more_than_there_is_room_for_runs_unharmed_and_cannot_be_read(model: Any) -> None:
    compiled, stage = _compile(model), lp.Stage(max_tokens=20, max_examples=3)
    match = r"the last call had \d+ tokens in \d examples: the stage has room for 20 in 3\. Make a larger one"
    with torch.no_grad(), lp.Probe(model, ["layers.*", "pooler"], to=stage):
        for run in (model, compiled):
            for batch in (_batch(9), _batch(3, size=4)):
                assert torch.equal(run(**batch).last_hidden_state, model(**batch).last_hidden_state)
                with pytest.raises(CaptureError, match=match):
                    _ = stage["layers.0"]
                run(**_batch(7))
                assert stage["layers.0"].shape == (17, 32) and stage["pooler"].shape == (3, 32)
        graphs = _count_graphs()
        compiled(**_batch(9))
        assert _count_graphs() == graphs


@pytest.mark.slow
def test_a_graph_that_outlives_its_probe_writes_nothing(model: Any) -> None:
    compiled, stage = _compile(model), lp.Stage(max_tokens=64)
    with torch.no_grad():
        with lp.Probe(model, "layers.*", to=stage):
            compiled(**_batch(7))
        rows = stage["layers.1"].clone()
        for length in (7, 9):
            assert torch.equal(compiled(**_batch(length)).last_hidden_state, model(**_batch(length)).last_hidden_state)
        assert torch.equal(stage["layers.1"], rows)
        address = stage["layers.1"].data_ptr()
        with lp.Probe(model, "layers.*", to=stage):
            with pytest.raises(CaptureError, match=r"the stage holds no call: none of the model has ended"):
                _ = stage.offsets
            compiled(**_batch(9))
        assert stage["layers.1"].data_ptr() == address and stage.offsets[-1] == 22


@pytest.mark.slow
def test_a_training_step_has_the_gradients_that_it_has_without(make_bert: Any) -> None:
    model = make_bert("BertForSequenceClassification", num_hidden_layers=1)
    stage, given = lp.Stage(max_tokens=64), {**_batch(7), "labels": torch.tensor([0, 1, 0])}
    model(**given).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    for backend in (None, "aot_eager"):
        model.zero_grad()
        with lp.Probe(model, ["layers.*", "logits"], to=stage):
            output = (_compile(model, backend) if backend else model)(**given)
            output.loss.backward()
        assert torch.equal(stage["logits"], output.logits)
        assert all(torch.equal(p.grad, before) for p, before in zip(model.parameters(), expected, strict=True))


@pytest.mark.slow
@pytest.mark.oldest
@pytest.mark.parametrize("name", ["bert", "deberta", "distilbert", "albert-inner", "modernbert", "electra-small"])
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_stage_holds_the_real_rows_of_every_family(name: str, mode: str) -> None:
    if not is_known(name):
        pytest.skip("this transformers does not have it")
    if (name, mode) == ("deberta", "compiled"):
        pytest.skip("torch compiles no DeBERTa for all lengths, with a probe or without")
    model, batch, stage = build(name, chunk_size_feed_forward=5), make_batch(size=10), lp.Stage(max_tokens=32)
    sites = [site.name for site in lp.sites(model) if site.kind in ("token", "example")]
    with torch.no_grad(), lp.Probe(model, sites) as memory:
        model(**batch)
    with torch.no_grad(), lp.Probe(model, sites, to=stage):
        (_compile(model) if mode == "compiled" else model)(**batch)
    for site in sites:
        assert torch.equal(stage[site], _pack(memory[site], batch)), site


@pytest.mark.slow
def test_masks_of_any_shape_keep_what_is_real(make_bert: Any) -> None:
    model, batch, stage = make_bert(num_hidden_layers=1), _batch(9), lp.Stage(max_tokens=64)
    compiled = _compile(model)
    masks = [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 1, 0, 1], [0] * 9, None]
    with torch.no_grad(), lp.Probe(model, ["pooler", "layers.*"], to=stage):
        for mask in masks:
            if mask is None:
                del batch["attention_mask"]
            else:
                batch["attention_mask"][0] = torch.tensor(mask)
            for run in (model, compiled):
                output = run(**batch)
                assert torch.equal(stage["layers.0"], _pack(output.last_hidden_state, batch))
                assert torch.equal(stage["pooler"], output.pooler_output)
        with torch.inference_mode():
            output = compiled(**batch)
            assert torch.equal(stage["layers.0"], _pack(output.last_hidden_state, batch))


@pytest.mark.slow
@pytest.mark.oldest
def test_each_half_of_a_pair_has_a_stage_of_its_own() -> None:
    from transformers import EncoderDecoderModel

    pair = EncoderDecoderModel(
        encoder=build("bert", num_hidden_layers=1),
        decoder=build("bert", "BertLMHeadModel", num_hidden_layers=1, is_decoder=True, add_cross_attention=True),
    ).eval()
    encoder, decoder = lp.Stage(max_tokens=32), lp.Stage(max_tokens=32)
    batch = {**make_batch(), "decoder_input_ids": make_batch(size=5)["input_ids"]}
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    for run in (pair, _compile(pair)):
        with (
            torch.no_grad(),
            lp.Probe(pair, "encoder.layers.*", to=encoder),
            lp.Probe(pair, ["decoder.layers.*", "logits"], to=decoder),
        ):
            output = run(**batch)
        assert torch.equal(encoder["encoder.layers.-1"], _pack(output.encoder_last_hidden_state, batch))
        assert torch.equal(decoder["logits"], _pack(output.logits, {"attention_mask": batch["decoder_attention_mask"]}))
        assert decoder.offsets.tolist() == [0, 5, 7]
    with pytest.raises(OptionError, match=r"in one stage: they are of two stacks, whose tokens differ"):
        lp.Probe(pair, ["encoder.layers.0", "decoder.layers.0"], to=lp.Stage(8)).__enter__()


def test_an_early_end_fills_the_stage(model: Any) -> None:
    stage = lp.Stage(max_tokens=64)
    with torch.no_grad(), lp.Probe(model, "layers.0", to=stage, stop=True):
        assert model(**_batch(7)) is None
    with torch.no_grad(), lp.Probe(model, "layers.0") as memory:
        model(**_batch(7))
    assert torch.equal(stage["layers.0"], _pack(memory["layers.0"], _batch(7)))


def test_what_a_stage_cannot_do_is_refused_before_a_hook_exists(model: Any) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ("layers.0.attention.weights", {}, r"'layers\.0\.attention\.weights' in a stage: only vectors per token or"),
        ("layers.0", {"pool": "mean"}, r"pool='mean' and a stage: a stage holds rows as they are"),
        ("layers.0", {"dtype": "int8"}, r"dtype='int8' of a stage: rows there are cast and no more"),
        ("layers.0", {"gradients": True}, r"gradients=True keeps values in memory as they are"),
    ]
    for site, options, match in cases:
        with pytest.raises(OptionError, match=match):
            lp.Probe(model, site, to=lp.Stage(8), **options).__enter__()
    with pytest.raises(OptionError, match=r"stop=True, a stage and a compiled model: nothing in the graph asks"):
        lp.Probe(_compile(model), "layers.0", to=lp.Stage(8), stop=True)
    for most in (0, 2.5, True):
        with pytest.raises(OptionError, match=rf"max_tokens of a stage is {most}: it must be a whole number"):
            lp.Stage(most)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"max_examples of a stage is 0"):
        lp.Stage(8, max_examples=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_stage_belongs_to_one_open_probe(model: Any) -> None:
    stage = lp.Stage(8)
    with lp.Probe(model, "layers.0", to=stage):
        with pytest.raises(CaptureError, match=r"the stage belongs to another open probe"):
            lp.Probe(model, "layers.0", to=stage).__enter__()
        model(torch.tensor([[1, 2]]))
        assert len(stage["layers.0"]) == 2


def test_a_second_thread_is_refused(model: Any) -> None:
    stage, errors = lp.Stage(max_tokens=64), []

    def run() -> None:
        try:
            model(**_batch(5))
        except BaseException as error:
            errors.append(error)

    def meet(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

    with torch.no_grad(), lp.Probe(model, "layers.*", to=stage):
        handle = model.encoder.layer[1].register_forward_pre_hook(meet)
        output = model(**_batch(7))
        handle.remove()
    assert [str(error) for error in errors] == [
        "a stage holds one call at a time: call the model from one thread, or use memory."
    ]
    assert torch.equal(stage["layers.1"], _pack(output.last_hidden_state, _batch(7)))


def test_a_call_within_a_call_is_refused(model: Any) -> None:
    stage = lp.Stage(max_tokens=64)

    def call_again(*_: Any) -> None:
        handle.remove()
        model(**_batch(5))

    handle = model.encoder.layer[1].register_forward_pre_hook(call_again)
    with (
        torch.no_grad(),
        pytest.raises(CaptureError, match=r"'layers\.1' was made after another call of the model began inside this"),
        lp.Probe(model, "layers.*", to=stage),
    ):
        model(**_batch(7))


def test_layers_compiled_one_by_one_run_eagerly_or_are_refused(model: Any) -> None:
    stage = lp.Stage(64)
    for layer in model.encoder.layer:
        layer.compile(backend="eager")
    with torch.no_grad(), lp.Probe(model, ["layers.*", "layers.*.ffn.act"], to=stage):
        output = model(**_batch(7))
        assert torch.equal(stage["layers.1"], _pack(output.last_hidden_state, _batch(7)))
        torch.compiler.reset()
        for layer in model.encoder.layer:
            layer.compile(backend="eager", fullgraph=True)
        with pytest.raises(RuntimeError, match=r"layers of the model are compiled one by one: a stage needs the call"):
            model(**_batch(9))


def test_values_that_are_no_rows_are_refused(make_bert: Any) -> None:
    model, batch = make_bert(), _batch(5)
    with torch.no_grad(), lp.Probe(model, "layers.0", to=lp.Stage(64)):
        with pytest.raises(
            CaptureError, match=r"attention_mask has shape \(3, 5, 5\): rows need one of shape \(3, 5\)"
        ):
            model(batch["input_ids"], torch.ones(3, 5, 5, dtype=torch.int64))

        def cut(_module: Any, _args: Any, made: Any) -> Any:
            return made[:1] if isinstance(made, torch.Tensor) else (made[0][:1], *made[1:])

        model.encoder.layer[0].register_forward_hook(cut, prepend=True)
        match = r"'layers\.0' gave a value of shape \(1, 5, 32\): a stage has room for one row per token, of width 32"
        with pytest.raises(CaptureError, match=match):
            model(**batch)


def test_a_call_that_was_cut_short_cannot_be_read(model: Any) -> None:
    stage = lp.Stage(max_tokens=64)
    with torch.no_grad(), lp.Probe(model, "layers.*", to=stage):
        model(**_batch(7))
        handle = model.encoder.layer[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**_batch(5))
        with pytest.raises(CaptureError, match=r"or the last was cut short"):
            _ = stage["layers.0"]
        handle.remove()
        model(**_batch(5))
        assert stage.offsets[-1] == 12


@pytest.mark.parametrize("site", ["layers.0", "pooler"])
def test_a_mask_for_one_of_several_sequences_is_refused(make_bert: Any, tmp_path: Path, site: str) -> None:
    model, ids, mask = make_bert(), torch.ones(2, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64)
    for to in (lp.Stage(64), tmp_path / "acts"):
        with (
            torch.no_grad(),
            pytest.raises(CaptureError, match=r"attention_mask has shape \(1, 5\): rows need one of shape \(2, 5\)"),
            lp.Probe(model, site, to=to),
        ):
            model(input_ids=ids, attention_mask=mask)
