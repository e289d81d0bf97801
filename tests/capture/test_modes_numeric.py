"""Every way to run a model in numbers: gradients on or off, autocast, half precision, int8, tied, offloaded."""

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from families import IS_V5
from traces import list_hooks, look_at

SITES = ["embeddings", "layers.*", "layers.*.attention.value", "layers.1.ffn.*"]
Prepare = Callable[[Any], Any]


def quantise(model: Any) -> Any:
    """Let every linear layer multiply in int8, as `torch.ao` does it dynamically."""
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def offload(model: Any) -> Any:
    """Keep the weights elsewhere until a module needs them, by accelerate's hooks."""
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, torch.device("cpu"))


def keep(model: Any) -> Any:
    return model


MODES: dict[str, tuple[Prepare, Callable[[], Any]]] = {
    "eval": (keep, contextlib.nullcontext),
    "train": (lambda model: model.train(), contextlib.nullcontext),
    "no_grad": (keep, torch.no_grad),
    "inference_mode": (keep, torch.inference_mode),
    "frozen": (lambda model: model.requires_grad_(False), contextlib.nullcontext),
    "autocast": (keep, lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast train": (lambda model: model.train(), lambda: torch.autocast("cpu", torch.bfloat16)),
    "bfloat16": (lambda model: model.bfloat16(), torch.no_grad),
    "float16": (lambda model: model.half(), torch.no_grad),
    "float64": (lambda model: model.double(), torch.no_grad),
    "int8": (quantise, torch.no_grad),
    "offloaded": (offload, torch.no_grad),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*(TypedStorage|torch.quint8|qint8).*:UserWarning"),
]


@pytest.fixture(params=MODES, ids=list(MODES))
def mode(request: pytest.FixtureRequest) -> tuple[Prepare, Callable[[], Any]]:
    return MODES[request.param]


def _run(model: Any, batch: Any, context: Callable[[], Any], **options: Any) -> Any:
    """Run with the same random numbers each time."""
    torch.manual_seed(7)
    with context():
        return model(**batch, **options)


def test_values_are_hidden_states_and_outputs_stay(make_bert: Any, batch: Any, mode: Any) -> None:
    prepare, context = mode
    model = prepare(make_bert("BertForMaskedLM"))
    expected = _run(model, batch, context, output_hidden_states=True)
    with lp.Probe(model, [*SITES, "logits"]) as probe:
        output = _run(model, batch, context)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(probe["logits"], expected.logits)
    assert torch.equal(probe["embeddings"], expected.hidden_states[0])
    for index, hidden in enumerate(expected.hidden_states[1:]):
        assert torch.equal(probe[f"layers.{index}"], hidden)
        assert probe[f"layers.{index}"].dtype == hidden.dtype
        assert probe[f"layers.{index}"].is_inference() == hidden.is_inference()


def test_early_end_makes_the_same_values(make_bert: Any, batch: Any, mode: Any) -> None:
    prepare, context = mode
    model = prepare(make_bert("BertForMaskedLM"))
    sites = ["embeddings", "layers.0", "layers.1.attention.context"]
    with lp.Probe(model, sites) as expected:
        _run(model, batch, context)
    with lp.Probe(model, sites, stop=True) as probe:
        assert _run(model, batch, context) is None
    for site in expected.calls[0]:
        assert torch.equal(probe[site], expected[site])
    output = _run(model, batch, context)
    assert torch.equal(_run(model, batch, context).logits, output.logits)


def test_store_holds_what_memory_holds(make_bert: Any, batch: Any, mode: Any, tmp_path: Path) -> None:
    prepare, context = mode
    model = prepare(make_bert())
    with lp.Probe(model, SITES) as memory:
        _run(model, batch, context)
    dtype = "float32" if memory["layers.1"].dtype == torch.float64 else None
    with lp.Probe(model, SITES, to=tmp_path / "acts", dtype=dtype):
        _run(model, batch, context)
        _run(model, batch, context)
    store = lp.open(tmp_path / "acts")
    lengths = batch["attention_mask"].sum(1).tolist()
    for site in memory.calls[0]:
        for number in range(6):
            value = memory[site][number % 3, : lengths[number % 3]]
            stored: Any = store[site][number]
            assert torch.equal(stored, value.to(stored.dtype)), site
            assert stored.dtype == (torch.float32 if dtype else value.dtype)


@pytest.mark.parametrize("stop", [False, True])
def test_nothing_is_left_and_the_model_can_be_copied(make_bert: Any, batch: Any, mode: Any, stop: bool) -> None:
    prepare, context = mode
    model = prepare(make_bert("BertForMaskedLM"))
    expected = _run(model, batch, context).logits
    _run(model, batch, context)
    before, hooks = look_at(model), list_hooks(model)
    with lp.Probe(model, [*SITES, "layers.*.attention.weights"], stop=stop):
        assert (_run(model, batch, context) is None) == stop
        under = copy.deepcopy(model)
    assert look_at(model) == before
    assert list_hooks(model) == hooks
    for copied in (under, copy.deepcopy(model)):
        assert len(list_hooks(copied)) == len(hooks)
        assert torch.equal(_run(copied, batch, context).logits, expected)


@pytest.mark.parametrize("name", [name for name in MODES if name not in ("offloaded",)])
def test_model_can_be_pickled_under_a_probe_and_after(make_bert: Any, batch: Any, name: str) -> None:
    prepare, context = MODES[name]
    model = prepare(make_bert("BertForMaskedLM"))
    expected = _run(model, batch, context).logits
    with lp.Probe(model, SITES, stop=True):
        _run(model, batch, context)
        under = pickle.dumps(model)
    for data in (under, pickle.dumps(model)):
        copied = pickle.loads(data)
        assert not list_hooks(copied)
        assert torch.equal(_run(copied, batch, context).logits, expected)


def test_autocast_values_have_the_types_of_autocast(make_bert: Any, batch: Any) -> None:
    model = make_bert()
    with torch.autocast("cpu", torch.bfloat16), lp.Probe(model, ["layers.0", "layers.0.attention.query"]) as probe:
        model(**batch)
    assert probe["layers.0.attention.query"].dtype == torch.bfloat16  # a matrix product
    assert probe["layers.0"].dtype == torch.float32  # a norm


ELSEWHERE = pytest.param(
    "meta", marks=pytest.mark.skipif(not IS_V5, reason="the model's own masks are made on the default device there")
)


@pytest.fixture(params=[ELSEWHERE, torch.float64], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Let torch make tensors on a device, or in a dtype, that nothing here is of."""

    def choose() -> None:
        if isinstance(request.param, str):
            torch.set_default_device(request.param)
        else:
            torch.set_default_dtype(request.param)

    yield choose
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_defaults_of_torch_change_no_store(
    make_bert: Any, batch: Any, default: Any, dtype: str | None, tmp_path: Path
) -> None:
    sites = ["layers.*", "layers.0.attention.weights"] if dtype is None else ["layers.*"]
    model = make_bert()

    def read(folder: Path) -> list[torch.Tensor]:
        with torch.no_grad(), lp.Probe(model, sites, to=folder, dtype=dtype):
            model(**batch)
        store = lp.open(folder)
        view: Any = store["layers.1"]
        mixed = view.rows(batch_size=4, shuffle=True, seed=0)
        single = [one if dtype is None else one.float() for one in (view[0], *view[[2, 1]])]
        found = [*single, *view.rows(batch_size=4), *mixed, store.where(id=[1]).rows("layers.1")]
        found += [view.pooled(pool) for pool in ("mean", "max", "cls", "last")] + [store.input_ids(0)]
        return found + list(store["layers.0.attention.weights"] if dtype is None else [])

    expected = read(tmp_path / "before")
    default()
    for one, other in zip(read(tmp_path / "acts"), expected, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


def test_defaults_of_torch_change_no_edit(make_bert: Any, batch: Any, default: Any) -> None:
    model = make_bert()
    edits = {
        "embeddings": [lp.noise(0.1, seed=3, where=[0, -1]), lp.project_out(torch.ones(model.config.hidden_size))],
        "layers.0": [lp.ablate("resample", seed=1), lp.ablate("mean", where=lp.token_ids(7))],
        "layers.0.attention.context": lp.ablate(heads=[0]),
        "layers.1": [lp.clamp(-1.0, 1.0), lp.scale(0.5, where=slice(1, None))],
    }
    with torch.no_grad(), lp.edit(model, edits):
        expected = model(**batch).last_hidden_state
    default()
    with torch.no_grad(), lp.edit(model, edits):
        assert torch.equal(model(**batch).last_hidden_state, expected)


def test_defaults_of_torch_change_no_summary(make_bert: Any, batch: Any, default: Any) -> None:
    model = make_bert()

    def summarise() -> tuple[torch.Tensor, torch.Tensor]:
        moments, top = lp.Moments(), lp.TopK(2)
        for sink in (moments, top):
            with torch.no_grad(), lp.Probe(model, "layers.1", to=sink):
                model(**batch)
        return moments["layers.1"].mean, top["layers.1"].values

    expected = summarise()
    default()
    assert all(torch.equal(*pair) for pair in zip(summarise(), expected, strict=True))


def test_tied_weights_stay_tied(make_bert: Any, batch: Any, tmp_path: Path) -> None:
    model = make_bert("BertForMaskedLM")
    embedding = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is embedding
    with lp.Probe(model, ["module:bert.embeddings.word_embeddings", "logits"], gradients=True) as probe:
        model(**batch).logits.sum().backward()
        copied = copy.deepcopy(model)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight is embedding
    assert copied.cls.predictions.decoder.weight is copied.bert.embeddings.word_embeddings.weight
    made = torch.nn.functional.embedding(batch["input_ids"], embedding)
    assert torch.equal(probe["module:bert.embeddings.word_embeddings"], made)


def test_hooks_of_accelerate_keep_their_order(make_bert: Any, batch: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_bert()
    expected = model(**batch, output_hidden_states=True)
    ran: list[str] = []

    class Noting(accelerate.hooks.ModelHook):
        def __init__(self, name: str) -> None:
            self.name = name

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            ran.append(f"{self.name} before")
            return args, kwargs

        def post_forward(self, module: Any, output: Any) -> Any:
            ran.append(f"{self.name} after")
            return output

    layer = model.encoder.layer[0]
    layer.register_forward_hook(lambda *_: ran.append("torch"))
    for name in ("first", "second"):
        accelerate.hooks.add_hook_to_module(layer, Noting(name), append=True)
    accelerate.cpu_offload(model.encoder.layer[1], torch.device("cpu"))
    model(**batch)
    wanted, before = list(ran), look_at(model)
    ran.clear()
    with lp.Probe(model, ["layers.*", "layers.*.attention.query"]) as probe:
        model(**batch)
        assert ran == wanted
    assert look_at(model) == before
    for index in range(3):
        assert torch.equal(probe[f"layers.{index}"], expected.hidden_states[index + 1])
    assert all(parameter.device.type == "meta" for parameter in model.encoder.layer[1].parameters())


def test_early_end_leaves_offloaded_weights_where_they_were(make_bert: Any, batch: Any) -> None:
    model = offload(make_bert("BertForMaskedLM"))
    places = {name: parameter.device for name, parameter in model.named_parameters()}
    with torch.no_grad(), lp.Probe(model, "layers.1.ffn.out", stop=True) as probe:
        model(**batch)
    assert {name: parameter.device for name, parameter in model.named_parameters()} == places
    assert len(probe.calls) == 1
