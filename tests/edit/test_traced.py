"""Edits under `torch.compile`: in one graph for all lengths, equal to those without, or refused in words."""

from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from families import build
from layerprobe.errors import CaptureError

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def tiny_bert(make_bert: Any) -> Any:
    """Two layers: a compiler traces each of them anew in every test."""
    return make_bert(num_hidden_layers=2)


def compile_model(model: Any, **options: Any) -> Any:
    return torch.compile(model, **options)


def make_batch(length: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 100, (3, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model: Any, called: Any, edits: Any, lengths: tuple[int, ...] = (5, 9, 16)) -> list[Tensor]:
    with torch.no_grad(), lp.edit(model, edits):
        return [called(**make_batch(length)).last_hidden_state for length in lengths]


def make_edits() -> dict[str, Any]:
    return {
        "layers.0": [lp.steer(torch.ones(32), 2.0), lp.noise(0.5, seed=3, where=slice(1, -1))],
        "layers.0.attention.context": [lp.ablate(heads=[1]), lp.ablate("resample", units=[3, 4])],
        "layers.1.ffn.act": [lp.scale(torch.full((64,), 0.5), where=[0, -1]), lp.clamp(-0.5, 0.5)],
        "layers.1": [lp.project_out(torch.ones(32)), lp.ablate("mean", where=lp.token_ids(*range(50)))],
        "layers.1.attention.value": [lp.replace(torch.tanh), lp.patch(torch.ones(32), where=0)],
        "pooler": lp.scale(2.0),
    }


@pytest.mark.slow
@pytest.mark.oldest
def test_every_edit_joins_one_graph_for_all_lengths(tiny_bert: Any) -> None:
    expected = run(tiny_bert, tiny_bert, make_edits())
    compiled = compile_model(tiny_bert, fullgraph=True, dynamic=True, backend="aot_eager")
    made = run(tiny_bert, compiled, make_edits())
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_edits_enter_a_graph_that_ran_before_and_are_gone_from_it_with_the_block(make_bert: Any) -> None:
    model = make_bert(num_hidden_layers=1)
    edits = {"layers.0": lp.steer(torch.ones(32), 2.0), "layers.0.ffn.act": lp.scale(2.0)}
    bare, edited = model(**make_batch(5)).last_hidden_state, run(model, model, edits, (5, 9))
    compiled = compile_model(model, fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(compiled(**make_batch(5)).last_hidden_state, bare)
    made = run(model, compiled, edits, (5, 9))
    assert all(torch.equal(one, other) for one, other in zip(made, edited, strict=True))
    assert torch.equal(compiled(**make_batch(5)).last_hidden_state, bare)


@pytest.mark.parametrize("name", ["albert", "modernbert"])
def test_shared_and_fused_modules_are_edited_in_the_graph(name: str) -> None:
    model = build(name)
    edits = {
        "layers.1.attention.value": lp.steer(torch.ones(32)),
        "layers.2.attention.query": lp.scale(2.0, where=[0, 3]),
        "layers.0": lp.ablate(units=[1]),
    }
    expected = run(model, model, edits, (5,))
    compiled = compile_model(model, fullgraph=True, dynamic=False, backend="eager")
    assert all(torch.equal(*pair) for pair in zip(run(compiled, compiled, edits, (5,)), expected, strict=True))


@pytest.mark.slow
@pytest.mark.oldest
def test_layers_that_share_a_piece_of_a_broken_graph_are_never_edited_for_one_another() -> None:
    """DeBERTa's own code breaks the graph, and the compiler may take the piece of one layer for another's."""
    model = build("deberta", num_hidden_layers=2)
    compiled = compile_model(model, dynamic=False, backend="eager")
    first, second = ({f"layers.{layer}.attention.value": lp.steer(torch.ones(32))} for layer in (0, 1))
    for edits in (first, second):
        assert torch.equal(run(compiled, compiled, edits, (5,))[0], run(model, model, edits, (5,))[0])


def test_chunks_are_edited_in_the_graph(make_bert: Any) -> None:
    model = make_bert(chunk_size_feed_forward=4)
    rows = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0))
    edits = {"layers.*.ffn.act": [lp.scale(2.0, where=[1, 6]), lp.patch(rows, where=[2, 5])]}
    expected = run(model, model, edits, (8,))
    compiled = compile_model(model, fullgraph=True, dynamic=False, backend="eager")
    assert all(torch.equal(*pair) for pair in zip(run(compiled, compiled, edits, (8,)), expected, strict=True))


@pytest.mark.slow
def test_values_of_a_probe_are_patched_in_the_graph(tiny_bert: Any) -> None:
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.*") as probe:
        clean = tiny_bert(**make_batch(9)).last_hidden_state
    compiled = compile_model(tiny_bert, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad(), lp.edit(compiled, {"layers.1": lp.patch(probe, where="all")}):
        assert torch.equal(compiled(**{**make_batch(9), "input_ids": torch.full((3, 9), 4)}).last_hidden_state, clean)
        with pytest.raises(CaptureError, match="do not fit"):
            compiled(**make_batch(7))


@pytest.mark.slow
def test_gradients_flow_through_the_graph(tiny_bert: Any) -> None:
    grads = []
    for compiles in (False, True):
        vector = torch.zeros(32, requires_grad=True)
        called = compile_model(tiny_bert, fullgraph=True, dynamic=True, backend="aot_eager") if compiles else tiny_bert
        with lp.edit(called, {"layers.1": lp.steer(vector)}):
            called(**make_batch(6)).last_hidden_state.square().sum().backward()
        grads.append(vector.grad)
    # backward of a graph adds up in another order: float32 sums of a few hundred
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_layers_compiled_one_by_one_are_edited(tiny_bert: Any) -> None:
    expected = run(tiny_bert, tiny_bert, make_edits())
    for layer in tiny_bert.encoder.layer:
        layer.compile(dynamic=True, backend="eager")
    assert all(torch.equal(*pair) for pair in zip(run(tiny_bert, tiny_bert, make_edits()), expected, strict=True))


@pytest.mark.slow
def test_probe_beside_an_edit_reads_the_edited_value_in_the_graph(tiny_bert: Any) -> None:
    compiled = compile_model(tiny_bert, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad(), lp.Probe(compiled, "layers.1") as plain:
        compiled(**make_batch(6))
    with (
        torch.no_grad(),
        lp.edit(compiled, {"layers.1": lp.scale(2.0, where="all")}),
        lp.Probe(compiled, "layers.1") as p,
    ):
        compiled(**make_batch(6))
    assert torch.equal(p["layers.1"], plain["layers.1"] * 2.0)


@pytest.mark.slow
def test_what_a_graph_cannot_do_is_refused_in_words(tiny_bert: Any) -> None:
    compiled = compile_model(tiny_bert, fullgraph=True, dynamic=True, backend="eager")
    mask = torch.zeros(3, 6, 32, dtype=torch.bool)
    rows = torch.zeros(3, 6, 32, requires_grad=True)
    for edit, message in (
        (lp.ablate(where=mask), r"a mask \[B, S, D\] is for models that are not compiled"),
        (lp.patch(rows), "no gradient flows to rows in a compiled model"),
    ):
        with lp.edit(compiled, {"layers.1": edit}), pytest.raises(CaptureError, match=message):
            compiled(**make_batch(6))


@pytest.mark.slow
@pytest.mark.oldest
def test_a_model_that_breaks_its_graph_is_edited_inside_its_last_layer() -> None:
    model = build("deberta", num_hidden_layers=2)
    ids = torch.arange(1, 13).view(2, 6)
    edits = {"layers.1.attention.query": lp.scale(3.0)}
    with torch.no_grad():
        with lp.edit(model, edits):
            expected = model(input_ids=ids).last_hidden_state
        compiled: Any = torch.compile(model, backend="eager", dynamic=True)
        plain = compiled(input_ids=ids).last_hidden_state
        with lp.edit(compiled, edits):
            edited = compiled(input_ids=ids).last_hidden_state
    assert torch.equal(edited, expected) and not torch.equal(edited, plain)
    assert torch._dynamo.config.skip_nnmodule_hook_guards
