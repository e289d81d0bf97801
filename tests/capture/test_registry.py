"""Hooks: all or none, gone whatever is raised, and a model that never knows they were there."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerprobe as lp
from layerprobe.capture.registry import Call
from layerprobe.errors import CaptureError, SiteError
from layerprobe.sites.resolve import Site

ALL = ["*", "layers.*", "layers.*.*", "layers.*.*.*"]


class RecordingSink:
    """Keep what happened, in order; raise at one event if asked."""

    def __init__(self, raises_at: str | None = None, error: BaseException | None = None) -> None:
        self.events: list[str] = []
        self.calls: list[Call] = []
        self._raises_at, self._error = raises_at, error or RuntimeError("the sink is full")

    def _note(self, event: str) -> None:
        self.events.append(event)
        if event == self._raises_at:
            raise self._error

    def open(self, sites: Sequence[Site]) -> None:
        self._note("open")

    def begin(self, call: Call) -> None:
        self.calls.append(call)
        self._note("begin")

    def receive(self, call: Call, index: int, value: Tensor) -> None:
        assert call is self.calls[-1]
        self._note(f"receive {index}")

    def finish(self, call: Call) -> None:
        self._note("finish")

    def abandon(self, call: Call) -> None:
        self._note("abandon")

    def close(self, error: BaseException | None) -> None:
        self._note(f"close {type(error).__name__}")


def _look(model: nn.Module) -> dict[str, Any]:
    """Everything a probe might leave behind: attributes and hooks of every module, bytes and flags of every tensor."""
    look: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key not in ("_parameters", "_buffers", "_modules"):
                look[f"{name}/{key}"] = dict(value) if isinstance(value, dict) else value
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        look[name] = (id(tensor), tensor.requires_grad, tensor._version, tensor.detach().clone().numpy().tobytes())
    return look


class Refusing(nn.Linear):
    """A module that takes no hook of one kind."""

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no hook here")


@pytest.mark.parametrize("stop", [False, True])
def test_failed_registration_leaves_no_hook(tiny_bert: Any, stop: bool) -> None:
    tiny_bert.encoder.layer[2].output.dense = Refusing(64, 32)
    before = _look(tiny_bert)
    registry = lp.ProbeRegistry(tiny_bert, ALL, RecordingSink(), stop=stop)
    with pytest.raises(RuntimeError, match="no hook here"):
        registry.attach()
    assert _look(tiny_bert) == before


def test_failed_registration_closes_the_sink_of_a_probe(tiny_bert: Any) -> None:
    tiny_bert.encoder.layer[2].output.dense = Refusing(64, 32)
    sink = RecordingSink()
    with pytest.raises(RuntimeError, match="no hook here"), lp.Probe(tiny_bert, ALL, to=sink):
        raise AssertionError("unreachable")
    assert sink.events == ["open", "close RuntimeError"]


def test_unknown_site_touches_nothing(tiny_bert: Any) -> None:
    before = _look(tiny_bert)
    with pytest.raises(SiteError, match=r"no site 'layers\.7'"):
        lp.ProbeRegistry(tiny_bert, ["layers.0", "layers.7"], RecordingSink())
    assert _look(tiny_bert) == before


def test_registry_attaches_once_at_a_time(tiny_bert: Any) -> None:
    registry = lp.ProbeRegistry(tiny_bert, "layers.0", RecordingSink())
    with (
        registry,
        pytest.raises(CaptureError, match=r"the probe is already attached to BertModel\. Leave its with block"),
    ):
        registry.attach()
    with registry:
        pass
    registry.detach()


@pytest.mark.parametrize("class_name", ["BertModel", "BertForSequenceClassification"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stop", [False, True])
def test_model_is_as_before(make_bert: Any, batch: Any, class_name: str, training: bool, stop: bool) -> None:
    model = make_bert(class_name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(training)
    model(**batch)
    before = _look(model)
    with lp.Probe(model, "layers.0", stop=stop):
        model(**batch)
    assert _look(model) == before


def test_outputs_are_bit_equal_and_dropout_draws_the_same_numbers(make_bert: Any, batch: Any) -> None:
    model = make_bert("BertForMaskedLM").train()
    torch.manual_seed(5)
    expected = model(**batch, output_hidden_states=True)
    torch.manual_seed(5)
    with lp.Probe(model, ALL):
        output = model(**batch, output_hidden_states=True)
    assert torch.equal(output.logits, expected.logits)
    assert all(map(torch.equal, output.hidden_states, expected.hidden_states))


def test_hooks_of_the_user_stay_and_what_they_change_is_seen(tiny_bert: Any, batch: Any) -> None:
    seen: list[str] = []
    tiny_bert.encoder.layer[0].attention.output.dense.register_forward_hook(lambda _, __, output: output + 1)
    tiny_bert.encoder.layer[1].register_forward_pre_hook(lambda *_: seen.append("pre"))
    expected = tiny_bert(**batch, output_hidden_states=True)
    before = _look(tiny_bert)
    with lp.Probe(tiny_bert, ["layers.*", "layers.0.attention.out", "layers.0.attention.context"]) as probe:
        output = tiny_bert(**batch)
    assert _look(tiny_bert) == before
    assert seen == ["pre", "pre"]
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    for index in range(3):
        assert torch.equal(probe[f"layers.{index}"], expected.hidden_states[index + 1])
    dense = tiny_bert.encoder.layer[0].attention.output.dense
    edited = torch.nn.functional.linear(probe["layers.0.attention.context"], dense.weight, dense.bias) + 1
    assert torch.equal(probe["layers.0.attention.out"], edited)


def test_two_probes_at_once_see_the_same(tiny_bert: Any, batch: Any) -> None:
    before = _look(tiny_bert)
    with lp.Probe(tiny_bert, "layers.1") as outer, lp.Probe(tiny_bert, "layers.1") as inner:
        tiny_bert(**batch)
    assert torch.equal(outer["layers.1"], inner["layers.1"])
    assert _look(tiny_bert) == before


class Failing(nn.Module):
    """Stand in for a module and raise when it is run."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error: BaseException | None = error

    def forward(self, hidden: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return hidden


@pytest.mark.parametrize("error", [ValueError("model broke"), KeyboardInterrupt("pressed"), SystemExit("left")])
@pytest.mark.parametrize("class_name", ["BertModel", "BertForSequenceClassification"])
@pytest.mark.parametrize("stop", [False, True])
def test_hooks_are_gone_whatever_a_forward_raises(
    make_bert: Any, batch: Any, error: BaseException, class_name: str, stop: bool
) -> None:
    model = make_bert(class_name)
    model.base_model.encoder.layer[1].attention.output.dropout = Failing(error)
    before, sink = _look(model), RecordingSink()
    with pytest.raises(type(error), match=str(error)), lp.Probe(model, "layers.*", to=sink, stop=stop):
        model(**batch)
    assert _look(model) == before
    assert sink.events == ["open", "begin", "receive 0", "abandon", f"close {type(error).__name__}"]


@pytest.mark.parametrize("error", [ValueError("model broke"), KeyboardInterrupt("pressed")])
@pytest.mark.parametrize("class_name", ["BertModel", "BertForSequenceClassification"])
def test_call_after_one_that_was_cut_short_is_captured(
    make_bert: Any, batch: Any, error: BaseException, class_name: str
) -> None:
    model = make_bert(class_name)
    failing = model.base_model.encoder.layer[1].attention.output.dropout = Failing(error)
    with lp.Probe(model, "layers.*") as probe:
        with pytest.raises(type(error)):
            model(**batch)
        failing.error = None
        model(**batch)
        output = model.base_model(**batch)
    assert len(probe.calls) == 2
    assert torch.equal(probe.calls[0]["layers.2"], output.last_hidden_state)  # type: ignore[arg-type]
    assert torch.equal(probe.calls[1]["layers.2"], output.last_hidden_state)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ValueError("in the block"), KeyboardInterrupt("pressed")])
def test_hooks_are_gone_when_the_block_raises(tiny_bert: Any, batch: Any, error: BaseException) -> None:
    before, sink = _look(tiny_bert), RecordingSink()

    def run() -> None:
        with lp.Probe(tiny_bert, "layers.0", to=sink):
            tiny_bert(**batch)
            raise error

    with pytest.raises(type(error), match=str(error)):
        run()
    assert _look(tiny_bert) == before
    assert sink.events == ["open", "begin", "receive 0", "finish", f"close {type(error).__name__}"]


@pytest.mark.parametrize("event", ["begin", "receive 0", "receive 2", "finish", "close NoneType"])
@pytest.mark.parametrize("class_name", ["BertModel", "BertForMaskedLM"])
def test_hooks_are_gone_when_the_sink_raises(make_bert: Any, batch: Any, event: str, class_name: str) -> None:
    model, sink = make_bert(class_name), RecordingSink(raises_at=event)
    before = _look(model)
    with pytest.raises(RuntimeError, match="the sink is full"), lp.Probe(model, "layers.*", to=sink):
        model(**batch)
    assert _look(model) == before
    assert sink.events[-1].startswith("close")


def test_sink_that_raises_as_it_opens_gets_no_hook(tiny_bert: Any) -> None:
    before, sink = _look(tiny_bert), RecordingSink(raises_at="open")
    with pytest.raises(RuntimeError, match="the sink is full"), lp.Probe(tiny_bert, "layers.*", to=sink):
        raise AssertionError("unreachable")
    assert _look(tiny_bert) == before


@pytest.mark.parametrize("event", ["abandon", "close KeyboardInterrupt"])
def test_sink_that_raises_at_the_end_is_closed_and_hides_nothing(tiny_bert: Any, batch: Any, event: str) -> None:
    tiny_bert.encoder.layer[1].attention.output.dropout = Failing(KeyboardInterrupt("pressed"))
    before, sink = _look(tiny_bert), RecordingSink(raises_at=event)
    with pytest.raises(KeyboardInterrupt, match="pressed"), lp.Probe(tiny_bert, "layers.*", to=sink):
        tiny_bert(**batch)
    assert _look(tiny_bert) == before
    assert sink.events[-2:] == ["abandon", "close KeyboardInterrupt"]


def test_call_tells_the_sink_ids_mask_and_shape(make_bert: Any, batch: Any) -> None:
    model, sink = make_bert("BertForMaskedLM"), RecordingSink()
    with lp.Probe(model, "embeddings", to=sink):
        model(batch["input_ids"], batch["attention_mask"])
        model(inputs_embeds=torch.zeros(2, 3, 32))
    first, second = (call.context(0) for call in sink.calls)
    assert first.input_ids is batch["input_ids"]
    assert first.attention_mask is batch["attention_mask"]
    assert (first.shape, second.shape) == ((3, 7), (2, 3))
    assert second.input_ids is second.attention_mask is None


def test_module_run_outside_a_call_of_the_model_is_not_captured(tiny_bert: Any, batch: Any) -> None:
    with lp.Probe(tiny_bert, "layers.0.mid") as probe:
        hidden = tiny_bert.embeddings(batch["input_ids"])
        tiny_bert.encoder.layer[0](hidden)
        assert probe.calls == []
        tiny_bert(**batch)
    assert len(probe.calls) == 1


class TwoPasses(nn.Module):
    """A task model that runs its base twice, and its head on the sum."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.bert, self.base_model, self.config = base, base, base.config
        self.classifier = nn.Linear(32, 2)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.classifier(self.bert(first).pooler_output + self.bert(second).pooler_output)


def test_task_model_that_runs_its_base_twice_makes_two_calls(tiny_bert: Any) -> None:
    model = TwoPasses(tiny_bert).eval()
    first, second = torch.randint(1, 100, (2, 3)), torch.randint(1, 100, (2, 5))
    with lp.Probe(model, ["layers.2"]) as probe:
        model(first, second)
    assert len(probe.calls) == 2
    for call, ids in zip(probe.calls, (first, second), strict=True):
        assert torch.equal(call["layers.2"], tiny_bert(ids).last_hidden_state)  # type: ignore[arg-type]


def test_site_that_is_not_run_is_an_error_that_names_it(make_bert: Any, batch: Any) -> None:
    model, sink = make_bert("BertForSequenceClassification"), RecordingSink()
    with lp.Probe(model, ["layers.0", "logits"], to=sink):
        with pytest.raises(
            CaptureError, match=r"ran without making 'logits': the modules behind these sites were not c"
        ):
            model.bert(**batch)
        model(**batch)
    assert sink.events[1:4] == ["begin", "receive 0", "abandon"]
    assert sink.events[-2:] == ["finish", "close NoneType"]


class Mapping(nn.Module):
    def forward(self, hidden: Tensor) -> Any:
        return {"hidden": hidden}


class Task(TwoPasses):
    """A task model with a part that gives no tensor, and one that gives an output object of transformers."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.part = Mapping()

    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        return self.part(self.bert(input_ids).last_hidden_state)


def test_module_that_gives_no_tensor_cannot_be_read(tiny_bert: Any, batch: Any) -> None:
    model = Task(tiny_bert)
    with (
        lp.Probe(model, "module:part"),
        pytest.raises(
            CaptureError, match=r"'module:part' of Task gave dict, not a tensor: only modules that pass tensors"
        ),
    ):
        model(batch["input_ids"])


def test_module_that_gives_an_output_object_is_read_by_its_last_hidden_state(tiny_bert: Any, batch: Any) -> None:
    model = Task(tiny_bert)
    with lp.Probe(model, ["module:bert.encoder", "layers.-1"]) as probe:
        model(batch["input_ids"])
    assert torch.equal(probe["module:bert.encoder"], probe["layers.2"])
