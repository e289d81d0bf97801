"""What a model may be wrapped in: the sites are those of the model inside, and calls of the wrapper are seen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerprobe as lp
from families import build, make_batch
from layerprobe.errors import ArchitectureError, CaptureError, OptionError
from layerprobe.models import LoadedModel
from layerprobe.sites.stacks import find_sum_device, is_compile_wrapper, is_compiled, is_compiled_in_place, unwrap


@pytest.mark.parametrize(
    ("device", "where"), [("cpu", "cpu"), ("cuda:1", "cuda:1"), ("meta", "meta"), ("mps", "cpu"), ("mps:0", "cpu")]
)
def test_sums_are_kept_where_there_is_float64(device: str, where: str) -> None:
    assert find_sum_device(torch.device(device)) == torch.device(where)


class _Named(nn.Module):
    """What a wrapper is to a state dict: the model under one more name."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self._inner = name
        self.add_module(name, model)

    def forward(self, **given: Any) -> Any:
        return self._modules[self._inner](**given)  # type: ignore[misc]


class _Adapter(_Named):
    """What PEFT is to a model: a module with a `get_base_model`."""

    def get_base_model(self) -> nn.Module:
        return self.base.model  # type: ignore[return-value,union-attr]


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    store: Any = vars(torch.distributed)["HashStore"]()  # not among the names that torch exports
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("names", [("_orig_mod",), ("_fsdp_wrapped_module",), ("_orig_mod", "_fsdp_wrapped_module")])
def test_name_of_a_wrapper_makes_no_difference(names: tuple[str, ...]) -> None:
    model, batch = build("distilbert", "DistilBertForSequenceClassification"), make_batch()
    wrapped: Any = model
    for name in names:
        wrapped = _Named(wrapped, name)
    assert unwrap(wrapped) is model
    assert lp.sites(wrapped).rows == lp.sites(model).rows
    patterns = ["layers.*", "module:distilbert.transformer.layer.0.ffn"]
    with torch.no_grad(), lp.Probe(wrapped, patterns) as probe:
        hidden = wrapped(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(probe["layers.2"], hidden[3])


def test_compiled_model_has_the_sites_of_the_model() -> None:
    model = build("bert")
    compiled: Any = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    assert lp.sites(compiled).rows == lp.sites(model).rows


def test_distributed_model_has_the_sites_of_the_model(process_group: None) -> None:
    model, batch = build("bert", "BertForMaskedLM"), make_batch()
    parallel = nn.parallel.DistributedDataParallel(model)
    assert lp.sites(parallel).rows == lp.sites(model).rows
    with torch.no_grad(), lp.Probe(parallel, ["layers.-1", "logits"]) as probe:
        output = parallel(**batch, output_hidden_states=True)
    assert torch.equal(probe["layers.-1"], output.hidden_states[-1])
    assert torch.equal(probe["logits"], output.logits)


def test_adapter_has_the_sites_of_the_model_inside() -> None:
    model = build("bert")
    wrapped = _Adapter(_Named(model, "model"), "base")
    assert unwrap(wrapped) is model
    assert lp.sites(wrapped, "layers.*").rows == lp.sites(model, "layers.*").rows


def test_models_of_transformers_are_not_looked_under() -> None:
    for model in (build("bert"), build("bert", "BertForMaskedLM")):
        assert unwrap(model) is model


def test_data_parallel_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"nn\.DataParallel runs copies .* pass model\.module\."):
        lp.sites(nn.DataParallel(build("bert")))


@pytest.fixture
def sentences(tiny_model_folder: Path) -> Any:
    """A SentenceTransformer with the default pooling, the mean over real tokens."""
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(tiny_model_folder), device="cpu")


TEXTS = ["over the lazy dog.", "the quick brown fox", "fox"]


def test_sentence_transformer_is_probed_as_its_model(sentences: Any) -> None:
    """It runs the model's `forward`, past the hooks on the model."""
    model = sentences[0].auto_model
    assert unwrap(sentences) is model
    assert lp.sites(sentences).rows == lp.sites(model).rows
    bare = sentences.encode(TEXTS)
    asked = [site.name for site in lp.sites(sentences)]
    with lp.Probe(sentences, asked) as probe:
        vectors = sentences.encode(TEXTS)
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([[2, 5, 3]])).last_hidden_state
    assert (vectors == bare).all()
    assert "forward" not in vars(model)
    encoded, called = probe.calls
    assert list(encoded) == asked and encoded.input_ids is not None
    assert torch.equal(called["layers.-1"], alone)  # type: ignore[arg-type]


def test_pooled_layer_of_a_sentence_transformer_is_its_vector(sentences: Any) -> None:
    with lp.Probe(sentences, "layers.*", pool="mean") as probe:
        vectors = torch.from_numpy(sentences.encode(TEXTS))
    made: Any = probe["layers.-1"]
    assert made.shape == vectors.shape
    for vector in vectors:  # encode goes from the longest text down, and its means are summed in another order
        assert (made - vector).abs().amax(dim=1).min() < 1e-5


def test_sentence_transformer_fills_a_store(sentences: Any, tmp_path: Path) -> None:
    with lp.Probe(sentences, "layers.*", to=tmp_path / "acts"):
        sentences.encode(TEXTS, batch_size=2)
    assert len(lp.open(tmp_path / "acts")) == 3


def test_error_within_a_sentence_transformer_leaves_nothing(sentences: Any) -> None:
    probe = lp.Probe(sentences, "layers.*", to=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), probe:
        sentences.encode(TEXTS)
    assert "forward" not in vars(sentences[0].auto_model)
    with lp.Probe(sentences, "layers.*") as after:
        sentences.encode(TEXTS)
    assert len(after.calls) == 1


def test_sentence_transformer_cannot_be_stopped(sentences: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nothing to pool: pass and call model\[0\]\.auto_model\."):
        lp.Probe(sentences, "layers.0", to=tmp_path / "acts", stop=True)
    assert not (tmp_path / "acts").exists()
    assert not any(module._forward_hooks for module in sentences.modules())


class _Pipeline(nn.Sequential):
    """A first module that runs the forward of a task model, as a CrossEncoder does."""

    def __init__(self, model: nn.Module) -> None:
        first: Any = _Named(model, "model")
        first.auto_model = model
        super().__init__(first)

    def forward(self, input: dict[str, Any]) -> Any:  # noqa: A002, the name that Sequential gave it
        first: Any = self[0]
        return first.auto_model.forward(**input)


def test_task_model_within_a_pipeline_gives_its_logits() -> None:
    model, batch = build("bert", "BertForSequenceClassification"), make_batch()
    pipeline = _Pipeline(model)
    with torch.no_grad(), lp.Probe(pipeline, ["layers.-1", "logits"]) as probe:
        output = pipeline(batch)
    assert torch.equal(probe["logits"], output.logits)


def test_modules_are_named_without_what_wraps_them(make_bert: Any) -> None:
    model, wrapped = make_bert(), make_bert()
    for index, layer in enumerate(wrapped.encoder.layer):
        wrapped.encoder.layer[index] = torch.compile(layer, backend="eager")
    patterns = ["module:encoder.layer.*.attention.self.query", "module:encoder.layer.1", "module:encoder.layer.1:input"]
    named = [site.name for site in lp.sites(model, patterns)]
    assert [site.name for site in lp.sites(wrapped, patterns)] == named
    assert [site.name for site in lp.sites(wrapped, "module:encoder.layer.1._orig_mod.output")] == [
        "module:encoder.layer.1.output"
    ]
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), lp.Probe(model, ["layers.*", *patterns]) as expected:
        model(ids)
    with torch.no_grad(), lp.Probe(wrapped, ["layers.*", *patterns]) as probe:
        wrapped(ids)
    call = probe.calls[0]
    assert list(call) == list(expected.calls[0])
    assert all(torch.equal(probe[site], expected[site]) for site in call)


@pytest.mark.parametrize(
    ("encoder", "is_refused"), [(1, True), ("cuda:1", True), (0, False), ("cuda:0", False), ("cpu", False)]
)
def test_a_model_that_is_spread_over_devices_fills_no_store(
    make_bert: Any, batch: Any, tmp_path: Path, encoder: Any, is_refused: bool
) -> None:
    model = make_bert("BertModel")
    # what accelerate leaves on a model: places by module; weights on the CPU or on disk are computed on the GPU
    model.hf_device_map = {"embeddings": 0, "encoder": encoder, "pooler": "disk"}
    if not is_refused:
        with lp.Probe(model, "layers.0", to=tmp_path / "acts"):
            model(**batch)
        return
    with pytest.raises(OptionError, match=r"BertModel is spread over the devices 0, 1: a store takes"):
        lp.Probe(model, "layers.0", to=tmp_path / "acts")
    with lp.Probe(model, "layers.0") as probe:
        model(**batch)
    assert probe["layers.0"] is not None and not list(tmp_path.iterdir())


def test_model_that_calls_a_part_of_its_base_is_refused_and_that_part_is_taken(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes: Any = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 8, "vocab_size": 11}
    torch.manual_seed(0)
    model: Any = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=8, max_position_embeddings=16)).eval()
    ids = torch.arange(3, 8)[None]
    blocks: list[Any] = [
        lp.Probe(model, "layers.*"),
        lp.Probe(model, "layers.0", stop=True),
        lp.Probe(model, "layers.*", to=tmp_path / "acts"),
        lp.edit(model, {"layers.0": lp.scale(0.0)}),
    ]
    for block in blocks:
        with pytest.raises(CaptureError, match=r"OPTForCausalLM ran without calling its base model"), block:
            model(input_ids=ids)
    part = model.model.decoder
    with torch.no_grad(), lp.Probe(part, "layers.0") as probe:
        output = model(input_ids=ids, output_hidden_states=True)
    assert torch.equal(probe["layers.0"], output.hidden_states[1])
    with torch.no_grad(), lp.edit(part, {"layers.*": lp.scale(0.0)}):
        assert not torch.equal(model(input_ids=ids).logits, output.logits)


def test_call_that_needs_no_layer_is_no_call_of_the_base(tmp_path: Path) -> None:
    """As of a task model that is given vectors which an earlier call has made."""
    import transformers

    base: Any = transformers.BertForSequenceClassification

    class Cached(base):
        def forward(self, vectors: Any = None, **batch: Any) -> Any:
            return self.classifier(vectors) if vectors is not None else super().forward(**batch)

    model: Any = Cached(build("bert").config).eval()
    vectors, batch = torch.ones(2, model.config.hidden_size), make_batch()
    with torch.no_grad(), lp.Probe(model, "layers.0") as probe, lp.edit(model, {"layers.1": lp.scale(2.0)}):
        expected = model.classifier(vectors)
        assert torch.equal(model(vectors), expected)
        model(**batch)
        assert torch.equal(model(vectors=vectors), expected)
    assert len(probe.calls) == 1
    with torch.no_grad(), lp.Probe(model, "layers.0", to=tmp_path / "acts"):
        model(vectors)
        model(**batch)
    assert len(lp.open(tmp_path / "acts")) == len(batch["input_ids"])
    with pytest.raises(CaptureError, match="ran without calling its base model"), lp.Probe(model, "logits"):
        model(vectors)


def test_what_load_model_gave_is_taken_as_its_model(tiny: LoadedModel, batch: Any) -> None:
    assert unwrap(tiny) is unwrap(tiny.model)
    assert lp.sites(tiny) == lp.sites(tiny.model)
    with torch.no_grad(), lp.Probe(tiny, "layers.1") as probe, lp.edit(tiny, {"layers.1": lp.scale(0.0)}):
        tiny.model(**batch)
    real = batch["attention_mask"].bool()
    assert not probe["layers.1"][real].any()
    one = {name: value[:1] for name, value in batch.items()}
    found = lp.patching(tiny, one, one, lambda out: out.last_hidden_state[:, 0, 0], "layers.1")
    assert found.sites == ("layers.1",)


@pytest.mark.parametrize("model", ["demo", None, 3])
def test_what_is_no_model_is_refused(model: Any) -> None:
    calls: list[Any] = [
        lambda: lp.sites(model),
        lambda: lp.Probe(model, "layers.*"),
        lambda: lp.edit(model, {"layers.0": lp.scale(2.0)}),
        lambda: lp.patching(model, {}, {}, lambda out: out),
        lambda: lp.find_nonfinite(model, {}),
        lambda: lp.profile(model, {}),
        lambda: lp.watch(model, "layers.*", log=print),
    ]
    for call in calls:
        with pytest.raises(OptionError, match=rf"the model is of type {type(model).__name__}: .* lp\.load_model"):
            call()


def test_a_compiled_model_is_known_in_whichever_way_it_was_compiled(make_bert: Any) -> None:
    plain, in_part = make_bert(), make_bert()
    wrapper: Any = torch.compile(plain)
    holder = nn.ModuleList([wrapper])
    in_part.encoder.compile()
    asked = (is_compile_wrapper, is_compiled_in_place, is_compiled)
    assert [ask(plain) for ask in asked] == [False, False, False]
    assert [ask(wrapper) for ask in asked] == [True, False, True]
    assert [ask(holder) for ask in asked] == [False, False, True]
    assert [ask(in_part) for ask in asked] == [False, True, True]
