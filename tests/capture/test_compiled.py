"""Under `torch.compile`: one graph for the forward, one for all lengths, and nothing missed.

`eager` and `aot_eager` generate no code, so their values are bit-equal to those of Python; `inductor` fuses, and its
values are compared with its own outputs.
"""

import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerprobe as lp
from families import CACHE
from layerprobe.errors import CaptureError, OptionError
from traces import list_hooks

pytestmark = pytest.mark.usefixtures("fresh_compiler")

LENGTHS = (5, 7, 16, 9, 33)
ALL_SITES = ["embeddings", "layers.*", "layers.*.*.*", "layers.*.mid", "pooler"]


@pytest.fixture
def tiny_bert(make_bert: Any) -> Any:
    """Two layers: a compiler traces each of them anew in every test."""
    return make_bert(num_hidden_layers=2)


def _batch(length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 100, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _compile(model: Any, backend: Any = "eager", fullgraph: bool = True) -> Any:
    return torch.compile(model, fullgraph=fullgraph, dynamic=True, backend=backend)


def _num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _eager_values(model: Any, sites: Any, length: int) -> Any:
    with torch.no_grad(), lp.Probe(model, sites) as probe:
        model(**_batch(length))
    return probe.calls[0]


@pytest.mark.slow
@pytest.mark.oldest
def test_every_site_of_a_compiled_model_is_captured_in_one_graph_for_all_lengths(tiny_bert: Any) -> None:
    compiled = _compile(tiny_bert)
    graphs = set()
    with torch.no_grad(), lp.Probe(compiled, ALL_SITES) as probe:
        for length in LENGTHS:
            compiled(**_batch(length))
            graphs.add(_num_graphs())
    assert len(graphs) == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    for call, length in zip(probe.calls, LENGTHS, strict=True):
        expected = _eager_values(tiny_bert, ALL_SITES, length)
        assert list(call) == list(expected)
        for site in expected:
            assert torch.equal(call[site], expected[site]), site  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_values_are_those_of_the_compiled_model_itself(tiny_bert: Any) -> None:
    compiled = _compile(tiny_bert, "inductor")
    with torch.no_grad():
        expected = [compiled(**_batch(length)) for length in LENGTHS]
        with lp.Probe(compiled, ["layers.*", "pooler"]) as probe:
            outputs = [compiled(**_batch(length)) for length in LENGTHS]
    for call, output, before in zip(probe.calls, outputs, expected, strict=True):
        assert torch.equal(call["layers.-1"], output.last_hidden_state)  # type: ignore[arg-type]
        assert torch.equal(call["pooler"], output.pooler_output)  # type: ignore[arg-type]
        # another graph may fuse otherwise: rounding of float32 sums of 64 terms
        assert torch.allclose(output.last_hidden_state, before.last_hidden_state, atol=1e-5)


@pytest.mark.slow
def test_hooks_put_on_after_the_first_compiled_call_fire(tiny_bert: Any) -> None:
    compiled = _compile(tiny_bert)
    with torch.no_grad():
        compiled(**_batch(5))
        for given in (compiled, tiny_bert):
            with lp.Probe(given, "layers.*") as probe:
                output = compiled(**_batch(7))
            assert torch.equal(probe["layers.-1"], output.last_hidden_state)
            compiled(**_batch(9))
            assert len(probe.calls) == 1


@pytest.mark.slow
@pytest.mark.oldest
def test_model_compiled_in_place_is_captured(make_bert: Any) -> None:
    model = make_bert("BertForMaskedLM", num_hidden_layers=1)
    expected = _eager_values(model, ["layers.*", "logits"], 7)
    model.compile(fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        model(**_batch(5))
        for _ in range(2):
            with lp.Probe(model, ["layers.*", "logits"]) as probe:
                model(**_batch(7))
            assert all(torch.equal(probe[site], expected[site]) for site in expected)


@pytest.mark.slow
def test_layers_compiled_one_by_one_are_captured(tiny_bert: Any) -> None:
    expected = _eager_values(tiny_bert, ALL_SITES, 7)
    for layer in tiny_bert.encoder.layer:
        layer.compile(dynamic=True, backend="eager")
    with torch.no_grad():
        tiny_bert(**_batch(5))
        with lp.Probe(tiny_bert, ALL_SITES) as probe:
            tiny_bert(**_batch(7))
    assert all(torch.equal(probe[site], expected[site]) for site in expected)


@pytest.mark.parametrize("site", ["layers.*", "layers.-1.attention.query", "layers.-1.ffn.act"])
def test_without_fullgraph_a_store_takes_every_layer_and_cuts_no_graph(
    tiny_bert: Any, tmp_path: Path, site: str
) -> None:
    compiled = _compile(tiny_bert, fullgraph=False)
    with torch.no_grad(), lp.Probe(compiled, site, to=tmp_path / "acts"):
        for length in LENGTHS[:2]:
            compiled(**_batch(length))
    assert not torch._dynamo.utils.counters["graph_break"]
    store = lp.open(tmp_path / "acts")
    for number, length in enumerate(LENGTHS[:2]):
        expected = _eager_values(tiny_bert, site, length)
        for name in expected:
            assert torch.equal(store[name][3 * number], expected[name][0])
            assert torch.equal(store[name][3 * number + 2], expected[name][2, : length // 2])


@pytest.mark.slow
@pytest.mark.oldest
def test_compiled_model_is_streamed_to_a_store(tiny_bert: Any, tmp_path: Path) -> None:
    compiled = _compile(tiny_bert)
    with torch.no_grad(), lp.Probe(compiled, "layers.*", to=tmp_path / "acts", dtype="float16"):
        for length in LENGTHS:
            compiled(**_batch(length))
    store = lp.open(tmp_path / "acts")
    assert len(store) == 3 * len(LENGTHS)
    for number, length in enumerate(LENGTHS):
        expected = _eager_values(tiny_bert, "layers.*", length)
        for site in expected:
            assert torch.equal(store[site][3 * number], expected[site][0].half())
            assert torch.equal(store[site][3 * number + 2], expected[site][2, : length // 2].half())


def test_rows_for_a_store_are_gathered_and_cast_inside_the_one_graph(tiny_bert: Any, tmp_path: Path) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = _compile(tiny_bert, keep)
    with torch.no_grad(), lp.Probe(compiled, "layers.*", to=tmp_path / "acts", dtype="float16"):
        for length in LENGTHS:
            compiled(**_batch(length))
    # hooks of the outermost module are compiled beside its forward
    (graph,) = [graph for graph in graphs if "receive_packed" in str(graph.graph)]
    assert len(graphs) == 3
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("layerprobe.receive_packed") == targets.count("index_select") == 2
    assert "layerprobe.receive" not in targets
    for node in graph.graph.nodes:
        if str(node.target) == "layerprobe.receive_packed":
            assert node.args[1].meta["example_value"].dtype == torch.float16
            assert node.args[1].args[0].target == "index_select"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_store_of_a_fused_graph_holds_the_rows_of_its_own_output(tiny_bert: Any, tmp_path: Path) -> None:
    compiled, outputs = _compile(tiny_bert, "inductor"), []
    with torch.no_grad(), lp.Probe(compiled, ["layers.*", "pooler"], to=tmp_path / "acts", dtype="bfloat16"):
        for length in LENGTHS:
            outputs.append(compiled(**_batch(length)))
    store = lp.open(tmp_path / "acts")
    for number, (length, output) in enumerate(zip(LENGTHS, outputs, strict=True)):
        last = output.last_hidden_state.bfloat16()
        assert torch.equal(store["layers.1"][3 * number + 1], last[1])
        assert torch.equal(store["layers.1"][3 * number + 2], last[2, : length // 2])
        assert torch.equal(store["pooler"][3 * number], output.pooler_output[0].bfloat16())


@pytest.mark.slow
def test_forward_broken_into_several_graphs_is_streamed_whole(tiny_bert: Any, tmp_path: Path) -> None:
    tiny_bert.encoder.layer[1].register_forward_pre_hook(torch._dynamo.disable(lambda *_: None))
    compiled = _compile(tiny_bert, fullgraph=False)
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.*", to=tmp_path / "acts"):
        for length in LENGTHS:
            compiled(**_batch(length))
    store = lp.open(tmp_path / "acts")
    assert torch._dynamo.utils.counters["graph_break"]
    for number, length in enumerate(LENGTHS):
        expected = _eager_values(tiny_bert, "layers.*", length)
        assert all(torch.equal(store[site][3 * number + 1], expected[site][1]) for site in expected)


def test_threads_of_a_compiled_model_fill_a_store(tiny_bert: Any, tmp_path: Path) -> None:
    compiled = _compile(tiny_bert)
    with torch.no_grad(), lp.Probe(compiled, "layers.*", to=tmp_path / "acts"):
        compiled(**_batch(5))  # compiled once, in one thread
        errors: list[BaseException] = []

        def run() -> None:
            try:
                with torch.no_grad():
                    for _ in range(4):
                        for length in LENGTHS:
                            compiled(**_batch(length))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    store = lp.open(tmp_path / "acts")
    assert len(store) == 3 * (1 + 3 * 4 * len(LENGTHS))
    expected = {length: _eager_values(tiny_bert, "layers.*", length) for length in LENGTHS}
    for number in range(0, len(store), 3):
        example = store.example(number)
        assert torch.equal(example["layers.1"], expected[len(example.input_ids)]["layers.1"][0])  # type: ignore[arg-type]


@pytest.mark.parametrize(("side", "dtype"), [("left", "float16"), ("holes", "int8"), ("none", "float16")])
def test_masks_of_any_shape_keep_the_rows_that_eager_keeps(
    tiny_bert: Any, tmp_path: Path, side: str, dtype: str
) -> None:
    batch = _batch(9)
    batch["attention_mask"][0] = torch.tensor(
        [0, 0, 1, 1, 1, 1, 1, 1, 1] if side == "left" else [1, 0, 1, 1, 0, 1, 1, 0, 1]
    )
    if side == "none":
        del batch["attention_mask"]
    compiled = _compile(tiny_bert)
    for run, place in ((tiny_bert, "eager"), (compiled, "compiled")):
        with torch.no_grad(), lp.Probe(run, ["embeddings", "layers.*"], to=tmp_path / place, dtype=dtype):
            run(**batch)
    eager, graph = lp.open(tmp_path / "eager"), lp.open(tmp_path / "compiled")
    for site in eager.sites:
        for one, other in zip(eager[site], graph[site], strict=True):
            assert torch.equal(one.float(), other.float())


@pytest.mark.slow
@pytest.mark.oldest
def test_model_that_is_given_neither_ids_nor_embeddings_loses_nothing(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    images = torch.rand(2, 3, 8, 8)
    compiled = _compile(model, fullgraph=False)
    for run, place in ((model, "eager"), (compiled, "compiled")):
        with torch.no_grad(), lp.Probe(run, "layers.*", to=tmp_path / place):
            run(images)
    eager, graph = lp.open(tmp_path / "eager"), lp.open(tmp_path / "compiled")
    assert len(graph) == len(eager) == 2
    assert all(torch.equal(graph["layers.1"][i], eager["layers.1"][i]) for i in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["function", "wrapper"])
def test_early_end_that_nothing_around_a_graph_takes_lets_it_run_on(tiny_bert: Any, way: str) -> None:
    run = _compile(tiny_bert) if way == "wrapper" else WAYS[way](tiny_bert)
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.0", stop=True) as probe:
        outputs = [run(**_batch(length)) for length in LENGTHS]
    for call, output, length in zip(probe.calls, outputs, LENGTHS, strict=True):
        assert output.last_hidden_state.shape == (3, length, 32)
        assert torch.equal(call["layers.0"], _eager_values(tiny_bert, "layers.0", length)["layers.0"])  # type: ignore[arg-type]


def test_early_end_asked_of_a_compile_wrapper_lets_the_model_under_it_run_on(tiny_bert: Any) -> None:
    expected = tiny_bert(**_batch(5)).last_hidden_state
    with lp.Probe(_compile(tiny_bert), "layers.0", stop=True) as probe:
        output = tiny_bert(**_batch(5))
    assert torch.equal(output.last_hidden_state, expected)
    assert torch.equal(probe["layers.0"], _eager_values(tiny_bert, "layers.0", 5)["layers.0"])


@pytest.mark.slow
def test_compiled_forward_is_stopped_after_the_last_asked_site(tiny_bert: Any) -> None:
    compiled = _compile(tiny_bert)
    expected = [_eager_values(tiny_bert, "layers.0", length) for length in LENGTHS]
    with torch.no_grad():
        with lp.Probe(compiled, "layers.0", stop=True) as probe:
            assert [compiled(**_batch(length)) for length in LENGTHS] == [None] * len(LENGTHS)
        assert compiled(**_batch(5)) is not None
    for call, eager in zip(probe.calls, expected, strict=True):
        assert torch.equal(call["layers.0"], eager["layers.0"])  # type: ignore[arg-type]
    assert "forward" not in tiny_bert.__dict__


def test_stop_of_a_model_compiled_in_place_is_refused_and_leaves_nothing(tiny_bert: Any, tmp_path: Path) -> None:
    match = r"stop=True does not go with model\.compile\(\): use torch\.compile\(model\), or leave it out\."
    early = lp.Probe(tiny_bert, "layers.0", stop=True)
    tiny_bert.compile(backend="eager")
    with pytest.raises(OptionError, match=match):
        lp.Probe(tiny_bert, "layers.0", to=tmp_path / "acts", stop=True)
    assert not (tmp_path / "acts").exists()
    with pytest.raises(OptionError, match=match):
        early.__enter__()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_bert.modules())


class _Outer(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)


def _compile_forward(model: Any) -> Any:
    model.forward = _compile(model.forward)
    return model


WAYS: dict[str, Any] = {
    "function": lambda model: _compile(lambda **batch: model(**batch)),
    "outer module": lambda model: _compile(_Outer(model)),
    "forward": _compile_forward,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_hooks_put_on_after_a_graph_around_the_model_ran_fire(tiny_bert: Any, way: str) -> None:
    """What was compiled cannot be found from the model."""
    run = WAYS[way](tiny_bert)
    with torch.no_grad():
        run(**_batch(5))
        for length in (7, 9):
            with lp.Probe(tiny_bert, ["embeddings", "layers.*"]) as probe:
                output = run(**_batch(length))
            assert torch.equal(probe["layers.-1"], output.last_hidden_state)
            assert torch.equal(probe.calls[0].input_ids, _batch(length)["input_ids"])  # type: ignore[arg-type]


DISTILLED = ["layers.*", "layers.*.attention.query", "layers.*.attention.key", "layers.*.attention.value"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_distillation_through_captured_states_under_one_graph(make_bert: Any, backend: str) -> None:
    """What pytorch/pytorch#173452 asks for: hidden states, queries, keys and values in a loss, under fullgraph."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a compiler")
    teacher, student = make_bert(num_hidden_layers=2), make_bert(num_hidden_layers=2)
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(0.9)

    def distil(run_teacher: Any, run_student: Any) -> list[list[Tensor]]:
        gradients = []
        with lp.Probe(teacher, DISTILLED) as wanted, lp.Probe(student, DISTILLED, gradients=True) as made:
            for length in LENGTHS:
                with torch.no_grad():
                    run_teacher(**_batch(length))
                run_student(**_batch(length))
                states: Any = made.calls[-1]
                targets: Any = wanted.calls[-1]
                losses = [nn.functional.mse_loss(value, targets[site]) for site, value in states.items()]
                assert len(losses) == 8
                torch.stack(losses).sum().backward()
                gradients.append([p.grad.clone() for p in student.encoder.parameters() if p.grad is not None])
                student.zero_grad()
        return gradients

    expected = distil(teacher, student)
    graphs = []

    def run_compiled(**batch: Tensor) -> None:
        compiled(**batch)
        graphs.append(_num_graphs())

    compiled = _compile(student, backend)
    for got, eager in zip(distil(_compile(teacher, backend), run_compiled), expected, strict=True):
        # a compiler sums in another order: rounding of float32 gradients of at most a few thousandths
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(got, eager, strict=True))
    assert all(gradient.any() for gradient in expected[0])
    assert len(set(graphs)) == 1 and not torch._dynamo.utils.counters["graph_break"]


def test_what_backward_sends_inside_a_graph_is_not_made_up(tiny_bert: Any) -> None:
    compiled = _compile(tiny_bert)
    with lp.Probe(compiled, "layers.*", gradients=True) as probe:
        compiled(**_batch(7)).last_hidden_state.sum().backward()
    assert probe["layers.1"].requires_grad
    with pytest.raises(CaptureError, match=r"what backward sends to a site inside a compiled graph is not seen"):
        _ = probe.gradients


def test_history_of_another_call_is_refused(tiny_bert: Any) -> None:
    compiled = _compile(tiny_bert)
    with lp.Probe(compiled, "layers.*", gradients=True) as probe:
        compiled(**_batch(7))
        probe._registry._port._attached[1] = torch.zeros(3, 7, 32)  # type: ignore[index] # what another thread made
        with pytest.raises(CaptureError, match=r"'layers\.1' is of another call than the last: with gradients=True"):
            _ = probe.calls


@pytest.mark.slow
def test_history_is_kept_whatever_call_comes_next(tiny_bert: Any) -> None:
    compiled = _compile(tiny_bert)
    with lp.Probe(tiny_bert, "layers.*", gradients=True) as probe:
        compiled(**_batch(7))
        tiny_bert(**_batch(5))
        refused = tiny_bert.encoder.layer[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny_bert(**_batch(9))
        refused.remove()
        compiled(**_batch(9))
    assert [call["layers.1"].requires_grad for call in probe.calls] == [True, True, True]  # type: ignore[union-attr]
    with torch.no_grad():
        tiny_bert.embeddings.LayerNorm.bias[0] = float("nan")
    with lp.Probe(compiled, "layers.*", gradients=True) as probe:
        compiled(**_batch(7))
    assert probe["layers.0"].requires_grad and probe["layers.0"].isnan().any()


@pytest.mark.slow
def test_history_of_a_module_that_runs_several_times_is_refused(make_bert: Any) -> None:
    compiled = _compile(make_bert(chunk_size_feed_forward=2, num_hidden_layers=1), fullgraph=False)
    with (
        pytest.raises(OptionError, match=r"gradients=True of 'layers\.0\.ffn\.out' in a compiled model: its module"),
        lp.Probe(compiled, "layers.0.ffn.out", gradients=True),
    ):
        compiled(**_batch(6))


@pytest.mark.slow
@pytest.mark.oldest
def test_positions_of_a_compiled_decoder_with_a_cache_are_not_guessed(make_bert: Any) -> None:
    from transformers import DynamicCache

    model, batch = make_bert("BertLMHeadModel", is_decoder=True, num_hidden_layers=1), _batch(5)
    compiled = _compile(model, fullgraph=False)
    with torch.no_grad(), lp.Probe(compiled, "layers.*") as probe:
        compiled(**batch, use_cache=False)
        cache = compiled(**batch, **{CACHE: DynamicCache(config=model.config)})[CACHE]
        mask = torch.ones(3, 6, dtype=torch.int64)
        compiled(input_ids=batch["input_ids"][:, :1], attention_mask=mask, **{CACHE: cache})
    assert probe.calls[0].positions == range(5)
    for call in probe.calls[1:]:
        with pytest.raises(CaptureError, match=r"positions are not known: the model was compiled and called with a"):
            _ = call.positions
    assert probe.calls[2]["layers.0"].shape == (3, 1, 32)


@pytest.mark.slow
@pytest.mark.oldest
def test_steps_of_a_compiled_decoder_with_a_cache_give_the_rows_of_their_own_tokens(
    make_bert: Any, tmp_path: Path
) -> None:
    from transformers import DynamicCache

    model, stage = make_bert("BertLMHeadModel", is_decoder=True, num_hidden_layers=1), lp.Stage(max_tokens=64)
    compiled = _compile(model, fullgraph=False)
    ids, mask = torch.randint(1, 100, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, :2] = mask[1, 7:] = 0
    with (
        torch.no_grad(),
        lp.Probe(compiled, "layers.0") as probe,
        lp.Probe(compiled, "layers.0", to=tmp_path / "acts"),
        lp.Probe(compiled, "layers.0", to=stage),
    ):
        cache = compiled(ids[:, :5], attention_mask=mask[:, :5], **{CACHE: DynamicCache(config=model.config)})[CACHE]
        compiled(ids[:, 5:], attention_mask=mask, **{CACHE: cache})
    made: Any = probe.calls
    whole = [(made[0]["layers.0"], mask[:, :5]), (made[1]["layers.0"], mask[:, 5:])]
    texts = [value[number, kept[number].bool()] for value, kept in whole for number in range(3)]
    stored: Any = lp.open(tmp_path / "acts")["layers.0"]
    assert all(torch.equal(stored[number], rows) for number, rows in enumerate(texts))
    assert torch.equal(stage["layers.0"], torch.cat(texts[3:]))


@pytest.mark.slow
def test_compiled_training_step_has_the_same_gradients_with_a_probe(make_bert: Any) -> None:
    model = make_bert("BertForSequenceClassification", num_hidden_layers=1)
    compiled = _compile(model)
    given = {**_batch(7), "labels": torch.tensor([0, 1, 0])}
    compiled(**given).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with lp.Probe(compiled, ["layers.*", "logits"]) as probe:
        output = compiled(**given)
        output.loss.backward()
    assert torch.equal(probe["logits"], output.logits)
    assert all(torch.equal(p.grad, before) for p, before in zip(model.parameters(), expected, strict=True))


@pytest.mark.slow
def test_graph_that_outlives_its_probe_runs_on(tiny_bert: Any) -> None:
    compiled = _compile(tiny_bert)
    with torch.no_grad():
        with lp.Probe(tiny_bert, "layers.*") as probe:
            inside = compiled(**_batch(7)).last_hidden_state
        assert torch.equal(compiled(**_batch(7)).last_hidden_state, inside)
    assert len(probe.calls) == 1


def test_error_in_a_sink_comes_out_of_the_compiled_model(tiny_bert: Any) -> None:
    compiled = _compile(tiny_bert)

    def refuse(site: str, value: Tensor) -> None:
        raise RuntimeError(f"no room for {site}")

    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"no room for layers\.0"),
        lp.Probe(compiled, "layers.*", to=refuse),
    ):
        compiled(**_batch(7))
    assert not any(module._forward_hooks for module in tiny_bert.modules())


@pytest.mark.slow
def test_threads_of_a_compiled_model_are_kept_apart(tiny_bert: Any) -> None:
    compiled = _compile(tiny_bert)
    with torch.no_grad(), lp.Probe(compiled, "layers.*") as probe:
        compiled(**_batch(5))  # compiled once, in one thread

        def run() -> None:
            with torch.no_grad():
                for length in LENGTHS:
                    compiled(**_batch(length))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(probe.calls) == 1 + 2 * len(LENGTHS)
    call: Any
    for call in probe.calls:
        assert torch.equal(call["layers.-1"], _eager_values(tiny_bert, "layers.*", call.input_ids.shape[1])["layers.1"])


@pytest.mark.parametrize(
    "watch", [lambda model: lp.Probe(model, "*"), lambda model: lp.edit(model, {"*": lp.scale(2.0)})]
)
def test_ctrl_c_while_graphs_are_forgotten_at_the_beginning_leaves_no_hook(tiny_bert: Any, watch: Any) -> None:
    torch.compile(torch.square, backend="eager")(torch.ones(2))  # now there are graphs to forget

    def interrupt(frame: Any, event: str, _: object) -> None:
        if frame.f_code is torch.compiler.reset.__code__:
            raise KeyboardInterrupt

    watched, tracer = watch(tiny_bert), sys.gettrace()
    sys.settrace(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), watched:
            raise AssertionError("unreachable")
    finally:
        sys.settrace(tracer)
    assert not list_hooks(tiny_bert)
