"""Layers that checkpointing runs again after the block of their edit: the right gradient, or an error in words."""

from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.errors import CaptureError

INSIDE = "layers.1.ffn.out"


def build_checkpointed(make_bert: Any, use_reentrant: bool | None) -> Any:
    model = make_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    if use_reentrant is not None:
        checkpoint(model, use_reentrant)
    return model


def checkpoint(model: Any, use_reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def run_edited(model: Any, edits: Any, mask: Tensor | None) -> Tensor:
    embeds = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with lp.edit(model, edits):
        return model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state.square().sum()


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_backward_after_the_block_is_refused_where_an_edited_module_runs_again(
    make_bert: Any, batch: Any, use_reentrant: bool, has_mask: bool
) -> None:
    model, vector = build_checkpointed(make_bert, use_reentrant), torch.ones(32, requires_grad=True)
    loss = run_edited(model, {INSIDE: [lp.steer(vector), lp.scale(3.0)]}, batch["attention_mask"] if has_mask else None)
    with pytest.raises(
        CaptureError, match=r"a checkpointed layer runs again in backward.*Call backward inside the with block"
    ):
        loss.backward()
    # another block does not help: its edits are others
    with lp.edit(model, {INSIDE: lp.ablate()}):
        loss = run_edited(model, {INSIDE: lp.scale(3.0)}, None)
        with pytest.raises(CaptureError, match=r"Call backward inside the with block"):
            loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("site", ["embeddings", "module:pooler.dense"])
def test_backward_after_the_block_is_right_where_no_edited_module_runs_again(
    make_bert: Any, use_reentrant: bool, site: str
) -> None:
    grads = []
    for reentrant in (None, use_reentrant):
        model = build_checkpointed(make_bert, reentrant)
        run_edited(model, {site: lp.scale(3.0, where="all")}, None).backward()
        grads.append([weight.grad for weight in model.encoder.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of what breaks the graph
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_backward_of_a_compiled_model_after_the_block_is_refused(make_bert: Any, use_reentrant: bool) -> None:
    model = build_checkpointed(make_bert, use_reentrant)
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    with lp.edit(model, {INSIDE: lp.scale(3.0, where="all")}):
        loss = compiled(inputs_embeds=torch.randn(3, 7, 32, requires_grad=True)).last_hidden_state.sum()
    with pytest.raises(CaptureError, match=r"Call backward inside the with block"):
        loss.backward()


def test_probe_alone_lets_backward_come_when_it_will(make_bert: Any) -> None:
    grads = []
    for reentrant in (None, False, True):
        model = build_checkpointed(make_bert, reentrant)
        embeds = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with lp.Probe(model, "layers.*.ffn.out", gradients=True):
            loss = model(inputs_embeds=embeds).last_hidden_state.square().sum()
        loss.backward()
        grads.append([weight.grad for weight in model.encoder.parameters()])
    for other in grads[1:]:
        assert all(torch.equal(one, two) for one, two in zip(grads[0], other, strict=True))
