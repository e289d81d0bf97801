"""What a probe leaves behind: nothing, and no copy of a model under a probe takes anything of it along."""

import contextlib
import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import layerprobe as lp
from traces import list_hooks, look_at

ALL = ["*", "layers.*", "layers.*.*", "layers.*.*.*"]


def save_whole(model: nn.Module) -> Any:
    """Through `torch.save` and back."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": save_whole,
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=list(COPIES))
@pytest.mark.parametrize("class_name", ["BertModel", "BertForMaskedLM"])
@pytest.mark.parametrize("stop", [False, True])
def test_copy_of_a_model_under_a_probe_carries_no_hook(
    make_bert: Any, batch: Any, make_copy: Any, class_name: str, stop: bool
) -> None:
    model = make_bert(class_name)
    expected = model(**batch)[0]
    with lp.Probe(model, ALL, stop=stop) as probe, lp.Probe(model, "layers.1") as other:
        model(**batch)
        copied = make_copy(model)
        assert not list_hooks(copied)
        assert torch.equal(copied(**batch)[0], expected)
        model(**batch)
    assert len(probe.calls) == len(other.calls) == 2
    assert list(copied.state_dict()) == list(model.state_dict())
    with lp.Probe(copied, "layers.*") as probe:
        copied(**batch)
    assert len(probe.calls) == 1
    assert not list_hooks(copied)


def test_shallow_copy_carries_no_hook_of_its_own(tiny_bert: Any, batch: Any) -> None:
    layer = tiny_bert.encoder.layer[0]
    with lp.Probe(tiny_bert, ["layers.0", "embeddings"], stop=True):
        copied = copy.copy(layer)
        whole = copy.copy(tiny_bert)
        assert not copied._forward_hooks
        assert not whole._forward_pre_hooks
        assert "forward" not in vars(whole)
    assert not list_hooks(tiny_bert)


def test_copy_keeps_what_others_have_put_on(tiny_bert: Any, batch: Any) -> None:
    layer = tiny_bert.encoder.layer[0]
    layer.register_forward_hook(add_one, with_kwargs=True, always_call=True)
    layer.register_forward_pre_hook(pass_on)
    tiny_bert.note = {"by": "the user"}
    expected = tiny_bert(**batch)[0]
    with lp.Probe(tiny_bert, ["layers.0", "layers.2"], stop=True):
        copied = pickle.loads(pickle.dumps(tiny_bert))
    copied_layer = copied.encoder.layer[0]
    assert list(copied_layer._forward_hooks.values()) == [add_one]
    assert list(copied_layer._forward_pre_hooks.values()) == [pass_on]
    assert list(copied_layer._forward_hooks_with_kwargs) == list(copied_layer._forward_hooks)
    assert list(copied_layer._forward_hooks_always_called) == list(copied_layer._forward_hooks)
    assert copied.note == tiny_bert.note
    assert torch.equal(copied(**batch)[0], expected)


def add_one(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """A hook of the user's that can be pickled."""
    return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1


def pass_on(module: nn.Module, args: Any) -> None:
    """Another, that changes nothing."""


def forward_of_the_user(*args: Any, **kwargs: Any) -> str:
    """An override of `forward` that can be pickled."""
    return "the user's"


def test_copy_keeps_the_forward_that_the_user_put_on(tiny_bert: Any, batch: Any) -> None:
    tiny_bert.forward = forward_of_the_user
    with lp.Probe(tiny_bert, "layers.0", stop=True):
        copied = copy.deepcopy(tiny_bert)
    assert vars(copied)["forward"] is vars(tiny_bert)["forward"] is forward_of_the_user


class Stateful(nn.Linear):
    """A module that decides itself what a copy holds."""

    def __getstate__(self) -> Any:
        return {**vars(self), "copied": True}


def test_state_that_a_module_gives_itself_is_kept(tiny_bert: Any) -> None:
    dense = tiny_bert.encoder.layer[0].output.dense = Stateful(64, 32)
    with lp.Probe(tiny_bert, "layers.0.ffn.*"):
        copied = copy.deepcopy(dense)
    assert copied.copied
    assert not list_hooks(copied)


def test_model_under_a_probe_is_saved_as_without(make_bert: Any, batch: Any, tmp_path: Any) -> None:
    import transformers

    model = make_bert("BertForMaskedLM")
    model.save_pretrained(tmp_path / "before")
    before = look_at(model)
    with lp.Probe(model, ALL, stop=True) as probe:
        model.save_pretrained(tmp_path / "under")
        model(**batch)
        loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "under").eval()
        assert not list_hooks(loaded)
    assert look_at(model) == before
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "under" / path.name).read_bytes()
    assert torch.equal(loaded(**batch).logits, probe["logits"])


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0], [0, 2, 1], [2, 0, 1]])
@pytest.mark.parametrize("stops", [(True, True, True), (True, False, True), (False, True, False)])
def test_probes_close_in_any_order_and_leave_nothing(
    tiny_bert: Any, batch: Any, order: list[int], stops: tuple[bool, ...]
) -> None:
    before = look_at(tiny_bert)
    stacks = [contextlib.ExitStack() for _ in stops]
    probes = []
    for stack, stop in zip(stacks, stops, strict=True):
        probes.append(stack.enter_context(lp.Probe(tiny_bert, ["layers.0", "layers.1.attention.weights"], stop=stop)))
    for number in order:
        tiny_bert(**batch)
        stacks[number].close()
    assert look_at(tiny_bert) == before
    assert sorted(len(probe.calls) for probe in probes) == [1, 2, 3]
    assert not copy.deepcopy(tiny_bert).__dict__.get("forward")


def test_forward_put_on_within_a_probe_stays(tiny_bert: Any, batch: Any) -> None:
    expected = tiny_bert(**batch)[0]
    with lp.Probe(tiny_bert, "layers.0", stop=True):
        inner = tiny_bert.forward
        tiny_bert.forward = own = lambda *args, **kwargs: inner(*args, **kwargs)
        assert tiny_bert(**batch) is None
    assert tiny_bert.forward is own
    assert torch.equal(tiny_bert(**batch)[0], expected)


def _compiled_call(model: Any, batch: Any) -> None:
    compiled = torch.compile(model, backend="eager", dynamic=True)
    compiled(**batch)


def _checkpointed_call(model: Any, batch: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    if not model.training:  # once: each time leaves other functions
        enable({"use_reentrant": True})
        model.train()
    model(**batch)[0].sum().backward()


def _generate(model: Any, batch: Any) -> None:
    model.generate(**batch, max_new_tokens=2, do_sample=False, pad_token_id=0)


WAYS: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any]]] = {
    "compiled": ("BertModel", {}, _compiled_call, {}),
    "compiled, history": ("BertModel", {}, _compiled_call, {"gradients": True}),
    "checkpointed": ("BertModel", {}, _checkpointed_call, {"gradients": True}),
    "generate": ("BertLMHeadModel", {"is_decoder": True}, _generate, {}),
    "pooled": ("BertModel", {}, lambda model, batch: model(**batch), {"pool": "mean", "dtype": "int8"}),
}


@pytest.mark.slow
@pytest.mark.oldest
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left_after_any_way_to_run(make_bert: Any, batch: Any, way: str) -> None:
    class_name, changes, run, options = WAYS[way]
    model = make_bert(class_name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)
    run(model, batch)  # what running it so leaves by itself
    model.zero_grad()
    before = look_at(model)
    with lp.Probe(model, ["embeddings", "layers.*"], **options) as probe:
        run(model, batch)
    model.zero_grad()
    assert look_at(model) == before
    assert probe.calls
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()
