"""Watching a training run: numbers against those of values kept in memory, and hooks that come and go."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.capture import watching
from layerprobe.capture.vitals import Vitals
from layerprobe.errors import CaptureError, OptionError, SiteError
from layerprobe.models import LoadedModel

SITES = ["embeddings", "layers.*", "layers.1.ffn.act", "layers.0.attention.context", "pooler"]


def test_what_load_model_gave_is_watched_as_the_model_in_it(tiny_bert: Any, batch: dict[str, Tensor]) -> None:
    seen: list[dict[int, dict[str, float]]] = [{}, {}]
    for model, log in zip((tiny_bert, LoadedModel("tiny", tiny_bert, None)), seen, strict=True):
        tiny_bert.zero_grad()
        with lp.watch(model, "layers.*", log=log.__setitem__):
            train(tiny_bert, batch)
    assert seen[0] == seen[1] != {}


def count_hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def train(model: Any, batch: dict[str, Tensor], steps: int = 1, optimizer: Any = None) -> None:
    for _ in range(steps):
        output = model(**batch)
        (output.last_hidden_state.square().mean() + output.pooler_output.sum()).backward()
        if optimizer is not None:
            optimizer.step()


def collect(model: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows of real tokens and whole gradients, from a probe that keeps them."""
    with lp.Probe(model, SITES, gradients=True) as probe:
        train(model, batch)
    mask = batch["attention_mask"].bool()
    rows = {}
    for site, value in probe.calls[0].items():
        assert isinstance(value, Tensor)
        rows[site] = (value[mask] if value.ndim == 3 else value).detach().double()
    return rows, dict(probe.gradients)


def test_numbers_are_those_of_the_values_and_their_gradients(tiny_bert: Any, batch: dict[str, Tensor]) -> None:
    rows, gradients = collect(tiny_bert, batch)
    seen: dict[int, dict[str, float]] = {}
    with lp.watch(tiny_bert, SITES, every=1, log=seen.__setitem__):
        train(tiny_bert, batch)
    assert list(seen) == [0]
    for site, rows_TD in rows.items():
        reach = rows_TD.amax(0) - rows_TD.amin(0)
        expected = {
            "norm": rows_TD.norm(dim=1).mean(),
            "dead": (reach <= 1e-3 * rows_TD.square().mean().sqrt()).double().mean(),
            "saturated": (rows_TD.abs().amin(0) >= 0.99 * rows_TD.abs().max()).double().mean(),
            "nonfinite": 0,
            "gradient_norm": gradients[site].norm(),
        }
        for name, value in expected.items():
            # sums in float32 within a row
            assert seen[0][f"{site}/{name}"] == pytest.approx(float(value), rel=1e-5), (site, name)


def test_the_mask_of_a_call_is_looked_at_once_for_all_sites(
    tiny_bert: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking waits for the device."""
    looks: list[int] = []
    select = watching.select_call
    monkeypatch.setattr(watching, "select_call", lambda *call: [looks.append(1), select(*call)][1])
    seen: dict[int, dict[str, float]] = {}
    shorter = {name: value[:, :-1] for name, value in batch.items()}
    with lp.watch(tiny_bert, SITES, every=1, log=seen.__setitem__):
        for given in (batch, shorter, batch):
            train(tiny_bert, given)
    assert len(looks) == 3
    assert seen[0]["layers.2/norm"] == seen[2]["layers.2/norm"] != seen[1]["layers.2/norm"]


def test_dead_and_saturated_units_are_counted(tiny_bert: Any, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        tiny_bert.encoder.layer[1].intermediate.dense.weight[:16] = 0  # of 64 units
        tiny_bert.encoder.layer[1].intermediate.dense.bias[:16] = -50
        tiny_bert.pooler.dense.weight[:8] = 0  # of 32
        tiny_bert.pooler.dense.bias[:8] = 50
    seen: dict[int, dict[str, float]] = {}
    with lp.watch(tiny_bert, ["layers.1.ffn.act", "pooler"], every=1, log=seen.__setitem__):
        train(tiny_bert, batch)
    assert seen[0]["layers.1.ffn.act/dead"] == 0.25 and seen[0]["layers.1.ffn.act/saturated"] == 0
    assert seen[0]["pooler/saturated"] >= 0.25


def test_rows_that_are_not_finite_are_counted(tiny_bert: Any, batch: dict[str, Tensor]) -> None:
    tiny_bert.encoder.layer[1].output.LayerNorm.bias.data[3] = float("nan")
    seen: dict[int, dict[str, float]] = {}
    with lp.watch(tiny_bert, "layers.*", every=1, log=seen.__setitem__):
        train(tiny_bert, batch)
    assert seen[0]["layers.0/nonfinite"] == 0 and "layers.0/norm" in seen[0]
    assert seen[0]["layers.1/nonfinite"] == int(batch["attention_mask"].sum()) and "layers.1/norm" not in seen[0]


def test_rows_whose_squares_leave_float32_are_finite() -> None:
    vitals = Vitals()
    vitals.add_rows(torch.full((2, 4), 3e19))
    said = vitals.read()
    assert said["nonfinite"] == 0 and said["norm"] == pytest.approx(6e19)


def test_hooks_are_there_only_in_watched_steps(tiny_bert: Any, batch: dict[str, Tensor]) -> None:
    counted, seen = [], []
    tiny_bert.encoder.layer[0].register_forward_hook(lambda *_: counted.append(count_hooks(tiny_bert)))
    with lp.watch(tiny_bert, "layers.*", every=3, log=lambda step, _: seen.append(step)) as watcher:
        train(tiny_bert, batch, 4)
        assert seen == [0]  # the step under way is logged as the next begins
        assert count_hooks(tiny_bert) == 3
        with torch.no_grad():
            tiny_bert(**batch)  # an evaluation is no step
        train(tiny_bert, batch, 3)
        with pytest.raises(CaptureError, match="open already"):
            watcher.__enter__()
    assert seen == [0, 3, 6]
    assert counted == [6, 3, 3, 6, 3, 3, 3, 6]
    assert count_hooks(tiny_bert) == 1


def test_training_goes_as_it_does_unwatched(make_bert: Any, batch: dict[str, Tensor]) -> None:
    """Dropout draws the same numbers; weights after some steps are bit-equal."""
    trained = []
    for every in (None, 2):
        model = make_bert(hidden_dropout_prob=0.1).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(7)
        if every is None:
            train(model, batch, 4, optimizer)
        else:
            with lp.watch(model, SITES, every=every, log=lambda *_: None):
                train(model, batch, 4, optimizer)
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_a_step_that_raises_leaves_no_hook_and_no_numbers(tiny_bert: Any, batch: dict[str, Tensor]) -> None:
    seen: list[int] = []
    with lp.watch(tiny_bert, "layers.*", every=1, log=lambda step, _: seen.append(step)):
        train(tiny_bert, batch)
        with pytest.raises(IndexError):
            tiny_bert(input_ids=torch.tensor([[500]]))
        assert count_hooks(tiny_bert) == 2
    assert seen == [0] and count_hooks(tiny_bert) == 0


def test_a_writer_of_scalars_and_a_head(make_bert: Any, batch: dict[str, Tensor]) -> None:
    class Writer:
        def __init__(self) -> None:
            self.said: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.said.append((tag, value, step))

    model, writer = make_bert("BertForMaskedLM"), Writer()
    with lp.watch(model, ["layers.2", "logits"], every=1, log=writer):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    tags = {tag for tag, _, step in writer.said if step == 0}
    assert {"layers.2/norm", "logits/gradient_norm", "logits/norm"} <= tags


@pytest.mark.parametrize("settings", [{"chunk_size_feed_forward": 2}, {}])
def test_chunks_of_a_feed_forward_are_one_value(make_bert: Any, batch: dict[str, Tensor], settings: Any) -> None:
    given = {name: tensor[:, :6] for name, tensor in batch.items()}
    plain, model = make_bert(), make_bert(**settings)
    rows, gradients = collect(plain, given)
    seen: dict[int, dict[str, float]] = {}
    by_name = "module:encoder.layer.1.intermediate"
    with lp.watch(model, [*SITES, by_name], every=1, log=seen.__setitem__):
        train(model, given)
    site = "layers.1.ffn.act"
    # products of other shapes
    assert seen[0][f"{site}/norm"] == pytest.approx(float(rows[site].norm(dim=1).mean()), rel=1e-5)
    assert seen[0][f"{site}/gradient_norm"] == pytest.approx(float(gradients[site].norm()), rel=1e-5)
    assert seen[0][f"{by_name}/norm"] == pytest.approx(seen[0][f"{site}/norm"], rel=1e-5)


def test_a_trainer_logs_watched_steps(make_bert: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = make_bert("BertForSequenceClassification")
    examples = [{"input_ids": torch.randint(1, 100, (5,)), "labels": number % 2} for number in range(24)]
    seen: dict[int, dict[str, float]] = {}
    callback: Any = lp.WatchCallback(["layers.*"], every=2, log=seen.__setitem__)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    counted: list[int] = []
    model.register_forward_hook(lambda *_: counted.append(count_hooks(model)))
    trainer: Any = Trainer
    trainer(model=model, args=arguments, train_dataset=examples, callbacks=[callback]).train()
    assert list(seen) == [0, 2, 4]
    assert all(said[f"layers.{layer}/gradient_norm"] > 0 for said in seen.values() for layer in range(3))
    assert len(counted) == 10 and count_hooks(model) == 1
    assert counted[1] == 1  # the second call of a watched step


def test_what_cannot_be_watched_is_refused(tiny_bert: Any) -> None:
    def ignore(*_: Any) -> None: ...

    with pytest.raises(OptionError, match="every is 0"):
        lp.watch(tiny_bert, "layers.*", every=0, log=ignore)
    with pytest.raises(OptionError, match="log=None: give a function"):
        lp.watch(tiny_bert, "layers.*", log=None)
    with pytest.raises(OptionError, match="every is 'x'"):
        lp.WatchCallback("layers.*", every="x", log=ignore)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="log=3"):
        lp.WatchCallback("layers.*", log=3)
    with pytest.raises(OptionError, match=r"attention.weights': it has no row"):
        lp.watch(tiny_bert, "layers.0.attention.weights", log=ignore)
    with pytest.raises(SiteError, match=r"layers.9"):
        lp.watch(tiny_bert, "layers.9", log=ignore)
    with pytest.raises(OptionError, match="watch of a compiled model"):
        lp.watch(torch.compile(tiny_bert), "layers.*", log=ignore)  # type: ignore[arg-type]


# the compiler looks at what a frame holds where it gives up, a tensor's history too
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_function_around_the_model_is_watched_as_if_it_were_not(
    tiny_bert: Any, batch: dict[str, Tensor]
) -> None:
    torch.compiler.reset()
    step = torch.compile(lambda: tiny_bert(**batch).last_hidden_state, backend="eager")
    step().sum().backward()
    seen: list[tuple[int, int]] = []
    with lp.watch(tiny_bert, "layers.*", every=2, log=lambda step, numbers: seen.append((step, len(numbers)))):
        for _ in range(3):
            step().sum().backward()
    layers = tiny_bert.config.num_hidden_layers
    assert seen == [(0, 5 * layers), (2, 5 * layers)]
    # and afterwards it is compiled again
    torch._dynamo.utils.counters.clear()
    step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def test_a_whole_graph_is_refused_under_a_watch(tiny_bert: Any, batch: dict[str, Tensor]) -> None:
    torch.compiler.reset()
    step = torch.compile(lambda: tiny_bert(**batch).last_hidden_state, backend="eager", fullgraph=True)
    step()
    with lp.watch(tiny_bert, "layers.*", every=2, log=lambda *_: None), pytest.raises(RuntimeError, match="is watched"):
        step()
    assert torch.equal(step(), tiny_bert(**batch).last_hidden_state)
    torch.compiler.reset()


def test_a_log_that_fails_at_the_end_does_not_hide_what_ended_the_block(
    tiny_bert: Any, batch: dict[str, Tensor]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no room for the log")

    def lose() -> None:
        with lp.watch(tiny_bert, "layers.*", every=1, log=fail):
            train(tiny_bert, batch)
            raise ValueError("the loss is gone")

    with pytest.raises(ValueError, match="the loss is gone"):
        lose()
    with pytest.raises(OSError, match="no room"), lp.watch(tiny_bert, "layers.*", every=1, log=fail):
        train(tiny_bert, batch)
