"""Gradients at every site against autograd's own, with layers that run once, twice, in chunks or for several layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerprobe as lp
from layerprobe.errors import CaptureError, OptionError
from layerprobe.sites.resolve import Site
from sizes import TINY

ALL = ["*", "layers.*", "layers.*.*", "layers.*.*.*"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "albert": ("Albert", {"embedding_size": 16, "num_hidden_groups": 2, "num_hidden_layers": 4}),
    "deberta": ("Deberta", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": ("DebertaV2", {"relative_attention": True, "share_att_key": True, "pos_att_type": ["c2p", "p2c"]}),
    "modernbert": ("ModernBert", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}),
}


def make_model(family: str, attention: str = "eager", **changes: Any) -> Any:
    import transformers

    name, more = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(TINY | more | changes), attn_implementation=attention)
    return getattr(transformers, f"{name}Model")(config).eval()


def checkpoint_layers(model: Any, reentrant: bool) -> None:
    """Let the layers run again in backward; 5.x calls what does it by another name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.train()


def loss_of(output: Any, batch: Any) -> Tensor:
    """A loss that depends on every real token."""
    return (output[0] * batch["attention_mask"][..., None]).pow(2).sum()


def grads_by_autograd(model: Any, batch: Any, sites: list[Site]) -> dict[str, Tensor]:
    """Watch every module with plain hooks, run once, and ask autograd for the gradients of the very tensors."""
    runs: dict[tuple[str, str], list[Tensor]] = {}
    shown: list[tuple[str, str]] = []

    def watch(name: str, module: nn.Module) -> list[Any]:
        def first(value: Any) -> Any:
            return value if isinstance(value, Tensor) else value[0]

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if args and isinstance(args[0], Tensor):
                runs.setdefault((name, "input"), []).append(args[0])
                if (
                    isinstance(module, nn.Dropout) and args[0].ndim == 4
                ):  # older classes show their weights nowhere else
                    shown.append((name.rpartition(".")[0], "weights"))
                    runs.setdefault(shown[-1], []).append(args[0])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            runs.setdefault((name, "output"), []).append(first(output))
            last = output[-1] if isinstance(output, tuple) else None
            if isinstance(last, Tensor) and last.ndim == 4 and (name, "weights") not in shown:
                runs.setdefault((name, "weights"), []).append(last)

        return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]

    handles = [handle for name, module in model.named_modules() for handle in watch(name, module)]
    output = model(**batch)
    for handle in handles:
        handle.remove()
    tensors = {}
    for site in sites:
        made = runs.get((site.module, site.takes), [])
        tensors[site.name] = made[site.call_index or 0] if site.call_index is not None or len(made) == 1 else None
    asked = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    found = torch.autograd.grad(loss_of(output, batch), list(asked.values()), allow_unused=True)
    grads = {name: grad for name, grad in zip(asked, found, strict=True) if grad is not None}
    for site in sites:
        if site.part is not None and site.name in grads:
            grads[site.name] = cut_third(grads[site.name], site.part.index, site.part.num_heads)
    return grads


def cut_third(fused: Tensor, index: int, num_heads: int | None) -> Tensor:
    """Query, key or value out of a fused projection, by plain indexing."""
    width = fused.shape[-1] // 3
    if num_heads is None:
        return fused[..., index * width : (index + 1) * width]
    size = width // num_heads
    starts = [head * 3 * size + index * size for head in range(num_heads)]
    return torch.cat([fused[..., start : start + size] for start in starts], dim=-1)


def check_gradients(gradients: Any, expected: dict[str, Tensor]) -> None:
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_every_site_is_autograds_own(family: str, batch: Any) -> None:
    model = make_model(family)
    with lp.Probe(model, ALL, gradients=True) as probe:
        loss_of(model(**batch), batch).backward()
    expected = grads_by_autograd(model, batch, list(probe.sites))
    without = {site.name for site in probe.sites} - {"pooler"} - set(expected)
    assert without <= {"embeddings", *(f"layers.{i}.attention.weights" for i in range(4))}
    check_gradients(probe.gradients, expected)


def test_weights_have_gradients_under_eager_attention_only(batch: Any) -> None:
    model = make_model("bert", "sdpa")
    with lp.Probe(model, ["layers.0.attention.weights", "layers.0"], gradients=True) as probe:
        loss_of(model(**batch), batch).backward()
    assert list(probe.gradients) == ["layers.0"]
    with pytest.raises(CaptureError, match=r"no gradient reached 'layers\.0\.attention\.weights': call backward on"):
        _ = probe.gradients["layers.0.attention.weights"]


@pytest.mark.parametrize("family", ["bert", "deberta"])
def test_gradient_of_a_module_site_is_autograds_own(family: str, batch: Any) -> None:
    model = make_model(family)
    sites = [
        "module:encoder.layer.1.intermediate",
        "module:encoder.layer.1:input",
        "module:encoder.layer.*.output.dense",
    ]
    with lp.Probe(model, sites, gradients=True) as probe:
        loss_of(model(**batch), batch).backward()
    assert len(probe.sites) == 5
    check_gradients(probe.gradients, grads_by_autograd(model, batch, list(probe.sites)))


@pytest.mark.parametrize("chunk", [1, 3])
def test_gradient_of_joined_chunks_is_that_of_the_whole(batch: Any, chunk: int) -> None:
    ids = {name: value[:, :6] for name, value in batch.items()}
    whole, chunked = make_model("bert"), make_model("bert", chunk_size_feed_forward=chunk)
    with lp.Probe(chunked, ALL, gradients=True) as probe:
        loss_of(chunked(**ids), ids).backward()
    with lp.Probe(whole, ALL, gradients=True) as expected:
        loss_of(whole(**ids), ids).backward()
    assert set(probe.gradients) == set(expected.gradients)
    for name in expected.gradients:
        # a matrix product of fewer rows may sum in another order: the last bits of float32 values near 10
        torch.testing.assert_close(probe.gradients[name], expected.gradients[name], rtol=1e-5, atol=1e-5)


# checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["bert", "deberta", "modernbert"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_layer_that_runs_twice_is_recorded_once_with_its_gradient(family: str, reentrant: bool, batch: Any) -> None:
    model = make_model(family, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with lp.Probe(model, ALL, gradients=True) as expected:
        loss_of(model(**batch), batch).backward()
    model.zero_grad()
    checkpoint_layers(model, reentrant)
    ran: list[int] = []
    counted = next(site for site in expected.sites if site.name == "layers.0.attention.out").module
    model.get_submodule(counted).register_forward_hook(lambda *_: ran.append(1))
    with lp.Probe(model, ALL, gradients=True) as probe:
        loss_of(model(**batch), batch).backward()
    assert len(ran) == 2  # it was run again
    assert len(probe.calls) == 1
    for name in probe.calls[0]:
        assert torch.equal(probe[name], expected[name]), name
    # attention dropout of nothing makes another tensor in training: weights have a gradient in evaluation only
    wanted = {name for name in expected.gradients if not name.endswith("weights")}
    assert {name for name in probe.gradients if not name.endswith("weights")} == wanted
    for name in wanted:
        assert torch.equal(probe.gradients[name], expected.gradients[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_checkpointed_calls_keep_their_own_gradients(batch: Any, reentrant: bool) -> None:
    model = make_model("bert", "sdpa", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batches = [{name: value[:size] for name, value in batch.items()} for size in (3, 2, 1)]
    sites = ["embeddings", "layers.*", "layers.*.attention.query", "layers.*.ffn.act"]
    expected = []
    for inputs in batches:
        with lp.Probe(model, sites, gradients=True) as alone:
            loss_of(model(**inputs), inputs).backward()
        expected.append(dict(alone.gradients))
    checkpoint_layers(model, reentrant)
    with lp.Probe(model, sites, gradients=True) as probe:
        losses = [loss_of(model(**inputs), inputs) for inputs in batches]
        for loss in (losses[1], losses[2], losses[0]):  # in another order than they ran
            loss.backward()
    assert len(probe.calls) == 3
    for call, wanted in zip(probe.calls, expected, strict=True):
        check_gradients(call.gradients, wanted)


# calls


def test_each_call_has_its_own_gradients(batch: Any) -> None:
    model = make_model("bert")
    other = {name: value[:2, :5] for name, value in batch.items()}
    sites = ["embeddings", "layers.*", "layers.*.attention.*"]
    with lp.Probe(model, sites, gradients=True) as probe:
        (loss_of(model(**batch), batch) + loss_of(model(**other), other)).backward()
    for call, inputs in zip(probe.calls, (batch, other), strict=True):
        check_gradients(call.gradients, grads_by_autograd(model, inputs, list(probe.sites)))
    with pytest.raises(CaptureError, match=r"called 2 times in the probe: use probe\.calls, one entry"):
        _ = probe.gradients


def test_last_backward_counts(batch: Any) -> None:
    model = make_model("bert")
    with lp.Probe(model, "layers.1", gradients=True) as probe:
        loss = loss_of(model(**batch), batch)
        loss.backward(retain_graph=True)
        first = probe.gradients["layers.1"].clone()
        (2 * loss).backward()
    assert torch.equal(probe.gradients["layers.1"], 2 * first)


def test_backward_may_come_after_the_probe(batch: Any) -> None:
    model = make_model("bert")
    with lp.Probe(model, "layers.*.attention.value", gradients=True) as probe:
        loss = loss_of(model(**batch), batch)
    assert not list(probe.gradients)
    loss.backward()
    check_gradients(probe.gradients, grads_by_autograd(model, batch, list(probe.sites)))


def test_call_without_gradients_says_so(batch: Any) -> None:
    model = make_model("bert")
    with lp.Probe(model, "layers.0") as probe:
        model(**batch)
    with pytest.raises(CaptureError, match=r"no gradients were kept: pass gradients=True to the probe\."):
        _ = probe.calls[0].gradients


def test_gradients_and_an_early_end_do_not_go_together() -> None:
    with pytest.raises(OptionError, match=r"a forward that stop=True ends early has no output to call backward on"):
        lp.Probe(make_model("bert"), "layers.0", stop=True, gradients=True)


def test_gradients_under_no_grad_are_none(batch: Any) -> None:
    model = make_model("bert")
    with torch.no_grad(), lp.Probe(model, "layers.0", gradients=True) as probe:
        model(**batch)
    assert not list(probe.gradients)
    assert len(probe.calls) == 1
