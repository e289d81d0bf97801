"""Others on the model: hooks of the user, transformers' own capture; and whatever is raised, wherever."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerprobe as lp
from traces import list_hooks, look_at

SITES = ["embeddings", "layers.*", "layers.*.attention.query", "layers.*.ffn.act"]
ERRORS = [ValueError("broke"), KeyboardInterrupt("pressed"), SystemExit("left")]


# hooks of the user


@pytest.mark.parametrize("stop", [False, True])
def test_hooks_of_the_user_keep_their_order(tiny_bert: Any, batch: Any, stop: bool) -> None:
    ran: list[str] = []
    layer = tiny_bert.encoder.layer[0]
    layer.register_forward_hook(lambda *_: ran.append("after 1"))
    layer.register_forward_pre_hook(lambda *_: ran.append("before 1"))
    layer.register_forward_hook(lambda *_: ran.append("after first"), prepend=True)
    layer.register_forward_hook(lambda *_: ran.append("after 2"), always_call=True)
    layer.register_forward_pre_hook(lambda *_: ran.append("before 2"), with_kwargs=True)
    tiny_bert(**batch)
    wanted = list(ran)
    ran.clear()
    with lp.Probe(tiny_bert, ["layers.0", "layers.1", "module:encoder.layer.0:input"], stop=stop):
        late = layer.register_forward_hook(lambda *_: ran.append("late"))
        tiny_bert(**batch)
        assert ran == [*wanted, "late"]
    ran.clear()
    tiny_bert(**batch)
    assert ran == [*wanted, "late"]
    late.remove()


def test_hook_that_the_user_takes_off_within_a_probe_is_gone(tiny_bert: Any, batch: Any) -> None:
    layer = tiny_bert.encoder.layer[0]
    before = list_hooks(tiny_bert)
    handle = layer.register_forward_hook(lambda _, __, output: output)
    with lp.Probe(tiny_bert, SITES, stop=True):
        handle.remove()
        tiny_bert(**batch)
    assert list_hooks(tiny_bert) == before


@pytest.mark.parametrize("place", ["input", "output"])
def test_what_a_hook_changes_is_what_is_read(tiny_bert: Any, batch: Any, place: str) -> None:
    dense = tiny_bert.encoder.layer[1].output.dense
    if place == "input":
        dense.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    else:
        dense.register_forward_hook(lambda _, __, output: output * 2)
    kept: list[Tensor] = []
    dense.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    dense.register_forward_hook(lambda _, __, output: kept.append(output))
    with lp.Probe(tiny_bert, ["layers.1.ffn.*", "layers.*"]) as probe:
        hidden = tiny_bert(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(probe["layers.1.ffn.act"], kept[0])
    assert torch.equal(probe["layers.1.ffn.out"], kept[1])
    assert torch.equal(probe["layers.2"], hidden[3])


# transformers' own capture


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("class_name", ["BertModel", "BertForSequenceClassification"])
def test_hidden_states_beside_a_probe_are_the_same_tensors(
    make_bert: Any, batch: Any, attention: str, class_name: str
) -> None:
    asked = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    model = make_bert(class_name, attn_implementation=attention)
    before = model(**batch, **asked)
    left = list_hooks(model)  # 5.x leaves hooks of its own from the first such call on
    with lp.Probe(model, ["embeddings", "layers.*", "layers.*.attention.weights"]) as probe:
        during = model(**batch, **asked)
    assert list_hooks(model) == left
    after = model(**batch, **asked)
    for output in (before, during, after):
        for site, hidden in zip(["embeddings", "layers.0", "layers.1", "layers.2"], output.hidden_states, strict=True):
            assert torch.equal(probe[site], hidden)
        for index, weights in enumerate(output.attentions or ()):
            assert torch.equal(probe[f"layers.{index}.attention.weights"], weights)
    assert probe["layers.1"].data_ptr() == during.hidden_states[2].data_ptr()


def test_hidden_states_first_asked_within_a_probe(make_bert: Any, batch: Any) -> None:
    """What transformers puts on then stays its own, after the probe's hooks have gone."""
    model, plain = make_bert(), make_bert()
    expected = plain(**batch, output_hidden_states=True).hidden_states
    with lp.Probe(model, ["embeddings", "layers.*"]) as probe:
        during = model(**batch, output_hidden_states=True).hidden_states
    assert len(list_hooks(model)) == len(list_hooks(plain))
    after = model(**batch, output_hidden_states=True).hidden_states
    for site, *hidden in zip(["embeddings", "layers.0", "layers.1", "layers.2"], expected, during, after, strict=True):
        assert all(torch.equal(probe[site], one) for one in hidden)


def test_early_end_within_transformers_own_capture(tiny_bert: Any, batch: Any) -> None:
    expected = tiny_bert(**batch, output_hidden_states=True).hidden_states
    with lp.Probe(tiny_bert, "layers.0", stop=True) as probe:
        assert tiny_bert(**batch, output_hidden_states=True) is None
    after = tiny_bert(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(probe["layers.0"], expected[1])
    assert len(after) == len(expected)
    assert all(map(torch.equal, after, expected))
    assert tiny_bert(**batch).hidden_states is None


# whatever is raised


def _call(model: Any, batch: Any, times: int) -> None:
    for _ in range(times):
        model(**batch)


class Fuse:
    """Raise the error at the nth time it is passed."""

    def __init__(self, error: BaseException, at: int = 1) -> None:
        self.error, self.left = error, at

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


def _in_the_model(model: Any, fuse: Fuse) -> Callable[..., Any] | None:
    inner = model.encoder.layer[1].output.dense

    class Breaking(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            fuse()
            return inner(hidden)

    model.encoder.layer[1].output.dense = Breaking()
    return None


def _in_a_hook(model: Any, fuse: Fuse) -> Callable[..., Any] | None:
    model.encoder.layer[1].register_forward_hook(fuse)
    return None


def _in_a_pre_hook(model: Any, fuse: Fuse) -> Callable[..., Any] | None:
    model.encoder.layer[1].attention.register_forward_pre_hook(fuse)
    return None


def _in_the_sink(model: Any, fuse: Fuse) -> Callable[..., Any] | None:
    return lambda site, _: fuse() if site == "layers.1" else None


PLACES = {"model": _in_the_model, "hook": _in_a_hook, "pre-hook": _in_a_pre_hook, "sink": _in_the_sink}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
@pytest.mark.parametrize("stop", [False, True])
def test_error_is_unchanged_and_leaves_nothing(
    make_bert: Any, batch: Any, error: BaseException, place: Any, stop: bool
) -> None:
    model = make_bert()
    to = place(model, Fuse(error, at=2))
    before, hooks = look_at(model), list_hooks(model)
    with pytest.raises(type(error)) as caught, lp.Probe(model, ["layers.*"], to=to, stop=stop):
        _call(model, batch, times=2)
    assert caught.value is error
    assert error.__cause__ is None
    assert look_at(model) == before
    model(**batch)
    assert list_hooks(copy.deepcopy(model)) == hooks


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", [name for name in PLACES if name != "sink"])
@pytest.mark.parametrize("stop", [False, True])
def test_what_was_finished_before_an_error_is_in_the_store(
    make_bert: Any, batch: Any, tmp_path: Path, error: BaseException, place: str, stop: bool
) -> None:
    model = make_bert()
    expected = model(**batch, output_hidden_states=True).hidden_states
    PLACES[place](model, Fuse(error, at=3))
    before = look_at(model)
    with pytest.raises(type(error)) as caught, lp.Probe(model, ["layers.1"], to=tmp_path / "acts", stop=stop):
        _call(model, batch, times=4)
    assert caught.value is error
    assert look_at(model) == before
    assert not (tmp_path / "acts" / "index.json").exists()
    store = lp.open(tmp_path / "acts")
    assert len(store) == 6
    for number in range(6):
        length = int(batch["attention_mask"][number % 3].sum())
        assert torch.equal(store["layers.1"][number], expected[2][number % 3, :length])  # type: ignore[arg-type]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_call_after_a_caught_error_goes_on_in_the_store(
    make_bert: Any, batch: Any, tmp_path: Path, error: BaseException
) -> None:
    model = make_bert()
    _in_the_model(model, Fuse(error, at=2))
    hooks = list_hooks(model)
    with lp.Probe(model, ["layers.1"], to=tmp_path / "acts"):
        for _ in range(3):
            try:
                model(**batch)
            except type(error):
                continue
    assert (tmp_path / "acts" / "index.json").exists()
    assert len(lp.open(tmp_path / "acts")) == 6
    assert list_hooks(copy.deepcopy(model)) == hooks == []


ENDINGS = [ValueError("broke"), KeyboardInterrupt("pressed")]


def _break_late(model: Any, fuse: Fuse) -> None:
    """Raise in layer 2, which `layers.0` does not need."""
    model.base_model.encoder.layer[2].attention.register_forward_pre_hook(fuse)


@pytest.mark.parametrize("error", ENDINGS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("class_name", ["BertModel", "BertForSequenceClassification"])
def test_call_that_raises_after_its_last_site_is_not_recorded(
    make_bert: Any, batch: Any, error: BaseException, class_name: str
) -> None:
    model = make_bert(class_name)
    expected = model(**batch, output_hidden_states=True).hidden_states
    _break_late(model, Fuse(error))
    with lp.Probe(model, "layers.0") as probe, lp.Probe(model.base_model, ["layers.*"]) as other:
        with pytest.raises(type(error)) as caught:
            model(**batch)
        assert caught.value is error
        model(**batch)
    assert len(probe.calls) == len(other.calls) == 1
    assert torch.equal(probe["layers.0"], expected[1])
    assert torch.equal(other["layers.0"], expected[1])


@pytest.mark.parametrize("error", ENDINGS, ids=lambda error: type(error).__name__)
def test_rows_of_a_call_that_raises_after_its_last_site_are_not_stored(
    make_bert: Any, batch: Any, tmp_path: Path, error: BaseException
) -> None:
    model, other = make_bert(), {name: value.flip(0) for name, value in batch.items()}
    expected = model(**other, output_hidden_states=True).hidden_states[1]
    _break_late(model, Fuse(error))
    with lp.Probe(model, "layers.0", to=tmp_path / "acts"):
        with pytest.raises(type(error)):
            model(**batch)
        model(**other)
    rows = lp.open(tmp_path / "acts")["layers.0"]
    assert len(rows) == len(expected)
    for made, hidden, mask in zip(rows, expected, other["attention_mask"], strict=True):
        assert torch.equal(made, hidden[mask.bool()])  # type: ignore[arg-type]


@pytest.mark.parametrize("class_name", ["BertModel", "BertForSequenceClassification"])
def test_early_end_is_recorded_by_every_probe_on_the_model(make_bert: Any, batch: Any, class_name: str) -> None:
    model = make_bert(class_name)
    hidden = model(**batch, output_hidden_states=True).hidden_states
    _break_late(model, Fuse(ValueError("layer 2 was reached")))
    with (
        lp.Probe(model, "layers.0", stop=True) as first,
        lp.Probe(model.base_model, "layers.1") as second,
        lp.Probe(model, ["layers.0", "layers.1"], stop=True) as third,
    ):
        assert model(**batch) is None
        assert model(**batch) is None
    for probe, index in ((first, 0), (second, 1), (third, 0), (third, 1)):
        assert len(probe.calls) == 2
        assert all(torch.equal(made[f"layers.{index}"], hidden[index + 1]) for made in probe.calls)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["layer", "embeddings", "base", "attention"])
@pytest.mark.parametrize("before", [True, False])
def test_probe_closed_by_a_hook_of_the_user_within_a_call_raises_nothing(
    make_bert: Any, batch: Any, place: str, before: bool
) -> None:
    model = make_bert()
    expected, hooks = model(**batch).last_hidden_state, list_hooks(model)
    layer = model.encoder.layer[1]
    places = {"layer": layer, "embeddings": model.embeddings, "base": model, "attention": layer.attention.self}
    sites = ["layers.*", "module:encoder.layer.1:input", "layers.*.attention.weights", "layers.*.attention.query"]
    probe = lp.Probe(model, sites)

    def close(*_: Any) -> None:
        probe.__exit__(None, None, None)

    register = places[place].register_forward_pre_hook if before else places[place].register_forward_hook
    with register(close, prepend=True):
        probe.__enter__()
        output = model(**batch).last_hidden_state
    assert torch.equal(output, expected)
    assert len(probe.calls) == 0
    assert list_hooks(model) == hooks
