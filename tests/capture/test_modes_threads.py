"""One model in several threads at once, and the wrapper that runs copies of it."""

import copy
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerprobe as lp
from layerprobe.errors import ArchitectureError, CaptureError, OptionError
from traces import list_hooks, look_at

SITES = ["embeddings", "layers.*", "layers.*.attention.query"]
NUM_CALLS = 40


def make_inputs() -> list[Tensor]:
    """Forty inputs of sizes of their own, each beginning with its number."""
    generator = torch.Generator().manual_seed(3)
    inputs = []
    for number in range(NUM_CALLS):
        ids = torch.randint(1, 100, (1 + number % 3, 2 + number % 7), generator=generator)
        ids[:, 0] = number + 1
        inputs.append(ids)
    return inputs


def run_in_threads(num_threads: int, jobs: list[Callable[[], object]]) -> None:
    """Let the threads take the jobs as they come; an error in one is raised here."""
    waiting, lock, errors = iter(jobs), threading.Lock(), []
    start = threading.Barrier(num_threads)

    def work() -> None:
        start.wait()
        while True:
            with lock:
                job = next(waiting, None)
            if job is None:
                return
            try:
                job()
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def call(model: Any, ids: Tensor) -> Any:
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize("num_threads", [2, 4])
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("class_name", ["BertModel", "BertForMaskedLM"])
def test_forty_calls_from_threads_are_kept_apart(make_bert: Any, num_threads: int, stop: bool, class_name: str) -> None:
    model, inputs = make_bert(class_name), make_inputs()
    with torch.no_grad():
        expected = [model(ids, output_hidden_states=True).hidden_states for ids in inputs]
    before = look_at(model)
    with lp.Probe(model, SITES, stop=stop) as probe:
        run_in_threads(num_threads, [lambda ids=ids: call(model, ids) for ids in inputs])
    assert look_at(model) == before
    made: dict[int, Any] = {int(call.input_ids[0, 0]): call for call in probe.calls if call.input_ids is not None}
    assert len(probe.calls) == len(made) == NUM_CALLS
    for number, hidden in enumerate(expected):
        for site, value in zip(["embeddings", "layers.0", "layers.1", "layers.2"], hidden, strict=True):
            assert torch.equal(made[number + 1][site], value)


@pytest.mark.parametrize("num_threads", [2, 4])
def test_forty_calls_from_threads_are_whole_in_a_store(tiny_bert: Any, tmp_path: Path, num_threads: int) -> None:
    inputs = make_inputs()
    with torch.no_grad():
        expected = [tiny_bert(ids).last_hidden_state for ids in inputs]
    with lp.Probe(tiny_bert, ["layers.2"], to=tmp_path / "acts"):
        run_in_threads(num_threads, [lambda ids=ids: call(tiny_bert, ids) for ids in inputs])
    store = lp.open(tmp_path / "acts")
    examples = [store.example(number) for number in range(len(store))]
    assert len(examples) == sum(len(ids) for ids in inputs)
    # the examples of one call lie together, whatever the order of the calls
    for first, together in itertools.groupby(examples, key=lambda example: int(example.input_ids[0])):
        for place, example in enumerate(together):
            assert example.input_ids.tolist() == inputs[first - 1][place].tolist()
            rows: Any = example["layers.2"]
            assert torch.equal(rows, expected[first - 1][place])


def test_call_that_fails_in_one_thread_is_not_another_ones(tiny_bert: Any) -> None:
    inputs = make_inputs()
    bad = torch.full((2, 3), 1000)  # no such ids

    def fail() -> None:
        with pytest.raises(IndexError):
            call(tiny_bert, bad)

    jobs: list[Callable[[], object]] = []
    for ids in inputs:
        jobs += [lambda ids=ids: call(tiny_bert, ids), fail]
    with lp.Probe(tiny_bert, "layers.*") as probe:
        run_in_threads(3, jobs)
    assert len(probe.calls) == NUM_CALLS
    with torch.no_grad():
        for made in probe.calls:
            expected = tiny_bert(made.input_ids).last_hidden_state
            assert torch.equal(made["layers.2"], expected)  # type: ignore[arg-type]


def test_probes_of_threads_on_one_model_leave_nothing(tiny_bert: Any) -> None:
    inputs, before = make_inputs(), look_at(tiny_bert)

    def probe_once(ids: Tensor) -> None:
        with lp.Probe(tiny_bert, "layers.2") as probe:
            call(tiny_bert, ids)
        assert any(torch.equal(made.input_ids, ids) for made in probe.calls if made.input_ids is not None)

    run_in_threads(3, [lambda ids=ids: probe_once(ids) for ids in inputs])
    assert look_at(tiny_bert) == before


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Let threads take turns within a line, where races are."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("class_name", ["BertModel", "BertForSequenceClassification"])
def test_probe_that_opens_and_closes_disturbs_no_other_thread(
    make_bert: Any, eager_switching: None, class_name: str
) -> None:
    model, inputs = make_bert(class_name), make_inputs()[:12]
    before, expected = look_at(model), [call(model, ids)[0] for ids in inputs]

    def run_beside(number: int) -> None:
        assert torch.equal(call(model, inputs[number])[0], expected[number])

    def probe_once(number: int) -> None:
        with lp.Probe(model, [*SITES, "layers.*.attention.weights", "layers.*.ffn.act"]) as probe:
            run_beside(number)
        assert len(probe.calls) >= 1

    def take_turns(number: int) -> None:
        (probe_once if number % 2 else run_beside)(number)

    run_in_threads(3, [lambda number=number: take_turns(number) for number in [*range(12)] * 4])
    assert look_at(model) == before


class Waiting:
    """A sink whose first value of a call waits until the probe has been closed, and then finds itself without room."""

    def __init__(self) -> None:
        self.came, self.closed = threading.Event(), threading.Event()

    def open(self, sites: Any) -> None: ...
    def begin(self, call: Any) -> None: ...
    def finish(self, call: Any) -> None: ...
    def abandon(self, call: Any) -> None: ...
    def close(self, error: Any) -> None: ...

    def receive(self, call: Any, index: int, value: Tensor) -> None:
        self.came.set()
        if self.closed.wait(20):
            raise ValueError("no room")


@pytest.mark.parametrize("site", ["layers.0", "layers.1.attention.weights", "embeddings"])
def test_call_of_another_thread_outlives_a_probe_that_is_closed_under_it(tiny_bert: Any, site: str) -> None:
    sink, ids = Waiting(), make_inputs()[3]
    expected, outputs = call(tiny_bert, ids)[0], []
    with lp.Probe(tiny_bert, site, to=sink):
        thread = threading.Thread(target=lambda: outputs.append(call(tiny_bert, ids)[0]))
        thread.start()
        assert sink.came.wait(20)
    sink.closed.set()
    thread.join()
    assert torch.equal(outputs[0], expected)


def test_data_parallel_is_refused(tiny_bert: Any) -> None:
    with pytest.raises(ArchitectureError, match=r"nn\.DataParallel runs copies of the model at once, and their rows"):
        lp.Probe(nn.DataParallel(tiny_bert), "layers.0")
    assert not list_hooks(tiny_bert)


def test_replica_of_a_probed_model_is_refused(tiny_bert: Any, batch: Any) -> None:
    """What DataParallel runs when the model inside it is under a probe."""
    with lp.Probe(tiny_bert, "layers.0") as probe:
        replica = tiny_bert._replicate_for_data_parallel()
        with pytest.raises(CaptureError, match=r"a copy of BertModel runs with the hooks of this probe: nn\.DataPar"):
            replica(**batch)
        tiny_bert(**batch)
    assert len(probe.calls) == 1


def test_a_probe_of_one_thread_leaves_the_calls_of_others_alone(make_bert: Any) -> None:
    model, inputs = make_bert("BertForMaskedLM"), make_inputs()
    expected = [call(model, ids).logits for ids in inputs]
    made: list[Any] = []

    def work() -> None:
        with lp.Probe(model, "layers.0", stop=True, this_thread=True) as own:
            assert call(model, inputs[1]) is None
        made.extend(
            [torch.equal(call(model, ids).logits, logits) for ids, logits in zip(inputs, expected, strict=True)]
        )
        made.append(torch.equal(own["layers.0"], probe["layers.0"]))

    with lp.Probe(model, "layers.0", stop=True, this_thread=True) as probe:
        assert call(model, inputs[1]) is None
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert made == [True] * (NUM_CALLS + 1) and len(probe.calls) == 1


def test_a_stage_takes_no_one_thread(make_bert: Any) -> None:
    with pytest.raises(OptionError, match="this_thread=True and a stage"):
        lp.Probe(make_bert(), "layers.0", to=lp.Stage(16), this_thread=True)


def serve(model: Any, others: list[Any]) -> Callable[..., None]:
    """Give a hook that has another thread call the model, in the midst of a call of this one."""
    own = threading.get_ident()

    def hook(*_: Any) -> None:
        if threading.get_ident() == own:
            thread = threading.Thread(target=lambda: others.append(call(model, torch.tensor([[2, 3, 4]]))))
            thread.start()
            thread.join()

    return hook


@pytest.mark.parametrize("moment", ["before", "within"])
@pytest.mark.parametrize("to", ["store", "sink"])
def test_a_run_takes_none_of_what_other_threads_call(
    tiny: Any, texts: list[str], tmp_path: Path, moment: str, to: str
) -> None:
    model, others = tiny.model, []
    alone = call(model, torch.tensor([[2, 3, 4]]))

    def run(folder: str) -> Any:
        if to == "sink":
            return lp.extract(tiny, texts, lp.Moments(), sites="layers.1")
        return lp.extract(tiny, texts, tmp_path / folder, sites="layers.1", padding_free=False)

    expected = run("alone")
    place = model if moment == "before" else model.encoder.layer[0]
    # a hook from before the run is called before the run's own: the batch is announced, and its call not begun
    handle = place.register_forward_pre_hook(serve(model, others))
    try:
        found = run("beside")
    finally:
        handle.remove()
    assert others and all(torch.equal(other[0], alone[0]) for other in others)
    if to == "store":
        pairs = zip(found["layers.1"], expected["layers.1"], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        assert lp.verify(found.folder).ok
    else:
        assert found["layers.1"].count == expected["layers.1"].count
        assert torch.equal(found["layers.1"].mean, expected["layers.1"].mean)


@pytest.mark.parametrize("trains", [False, True])
def test_two_runs_of_one_model_at_once(tiny: Any, texts: list[str], tmp_path: Path, trains: bool) -> None:
    model = copy.deepcopy(tiny.model).train(trains)

    def run(folder: str, site: str) -> None:
        options: dict[str, Any] = {"tokenizer": tiny.tokenizer, "shard_size": 10_000, "padding_free": False}
        lp.extract(model, texts * 4, tmp_path / folder, sites=site, **options)

    run("first", "layers.0")
    run("second", "layers.2")
    jobs: list[Any] = [lambda: run("first beside", "layers.0"), lambda: run("second beside", "layers.2")]
    run_in_threads(2, jobs)
    for folder in ("first", "second"):
        pairs = zip(*(sorted((tmp_path / name).glob("shard-*")) for name in (folder, f"{folder} beside")), strict=True)
        assert all(one.read_bytes() == other.read_bytes() for one, other in pairs)
    assert model.training == trains


def test_a_call_that_was_cut_short_keeps_no_other_thread_waiting(make_bert: Any, batch: Any, tmp_path: Path) -> None:
    model = make_bert()

    class Cut(BaseException):
        """As Ctrl-C is: torch tells hooks nothing of it."""

    def cut(*_: Any) -> None:
        raise Cut

    handle = model.encoder.layer[1].register_forward_hook(cut)
    with lp.Probe(model, "layers.0", to=tmp_path / "acts"):
        with pytest.raises(Cut):
            model(**batch)
        handle.remove()
        thread = threading.Thread(target=lambda: model(**batch), daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    assert len(lp.open(tmp_path / "acts")) == len(batch["input_ids"])
