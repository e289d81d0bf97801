"""Attention weights beside any kernel: equal to eager `attentions`, or refused; the model computes what it did.

The rows that are promised are those of real queries. A padding query may see no key under a window: sdpa and flash give
it zeros there, eager attention the mean, and neither is stored.

Letters: B sequences, S positions, H heads.
"""

import copy
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import layerprobe as lp
from families import FAMILIES, IS_V5, build, is_known, make_batch
from layerprobe.capture import frames
from layerprobe.errors import CaptureError, OptionError
from layerprobe.extract.forward import compute_in
from layerprobe.sites import weights as twins
from layerprobe.sites.anatomy import Fused, find_anatomy
from layerprobe.sites.weights import EagerTwin
from oracles import TOLERANCE, expected_attentions, real_queries

WEIGHTS = "layers.*.attention.weights"
KNOWN = [name for name in FAMILIES if is_known(name)]
FUSED = [name for name in KNOWN if build(name).config._attn_implementation == "sdpa"]
# LayoutLM makes its mask itself, of four dimensions whatever the kernel; flash attention takes none such
FLASH = [name for name in FUSED if name != "layoutlm"]


def read(model: Any, batch: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """Give the weights of every layer, in order, and the model's output."""
    with torch.no_grad(), lp.Probe(model, WEIGHTS) as probe:
        output = model(**batch)
    call: Any = probe.calls[0]
    return [call[site] for site in call], output


def assert_like_eager(got: list[Tensor], name: str, batch: dict[str, Tensor], num_padded: int) -> None:
    expected = expected_attentions(name, num_padded)
    assert len(got) == len(expected)
    for made, eager in zip(got, expected, strict=True):
        assert made.shape == eager.shape
        rows, eager_rows = (real_queries(weights, batch["attention_mask"]) for weights in (made, eager))
        torch.testing.assert_close(rows, eager_rows, atol=TOLERANCE, rtol=0)  # two kernels, weights are at most 1


@pytest.mark.parametrize("num_padded", [0, 4])
@pytest.mark.parametrize("name", KNOWN)
def test_weights_under_the_default_kernel_are_eager_attentions(name: str, num_padded: int) -> None:
    batch = make_batch(num_padded)
    got, _ = read(build(name), batch)
    assert_like_eager(got, name, batch, num_padded)
    for weights in got:
        rows = real_queries(weights, batch["attention_mask"])
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]), atol=TOLERANCE, rtol=0)  # float32 sums
        assert not weights[1, :, : 11 - num_padded, 11 - num_padded :].any()


@pytest.mark.parametrize("name", KNOWN)
def test_weights_under_the_eager_kernel_are_the_models_own_bits(name: str) -> None:
    got, _ = read(build(name, attention="eager"), make_batch())
    for made, eager in zip(got, expected_attentions(name), strict=True):
        assert torch.equal(made, eager)


@pytest.mark.parametrize("name", FUSED)
def test_batch_without_a_mask_is_a_batch_without_padding(name: str) -> None:
    batch = make_batch(0)
    got, _ = read(build(name), {"input_ids": batch["input_ids"]})
    assert_like_eager(got, name, batch, 0)


@pytest.mark.skipif(not IS_V5, reason="in transformers 4 T5 shows no weights unless it is asked for them")
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("num_padded", [0, 2])
def test_weights_of_a_registered_t5_are_not_its_position_bias(
    kernel: str, num_padded: int, restored_rows: None
) -> None:
    """It gives the bias before the weights, both of four dimensions, and calls its mask by another name."""
    places: Any = {name: f"layer.0.SelfAttention.{name[0]}" for name in ("query", "key", "value", "out")}
    places |= {"layers": "encoder.block", "attention": "layer.0.SelfAttention", "mid": "layer.0", "pooler": None}
    lp.register_architecture("t5", lp.Anatomy(down="layer.1.DenseReluDense.wo", **places))
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    ids, mask = torch.arange(2, 16).view(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, 7 - num_padded :] = 0
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation(kernel)
    with torch.no_grad(), lp.Probe(model, "layers.*.attention.weights") as probe:
        model(input_ids=ids, attention_mask=mask)
    for layer, weights in enumerate(expected):
        found = probe[f"layers.{layer}.attention.weights"]
        # two kernels add up in different orders
        torch.testing.assert_close(found, weights, rtol=0, atol=0 if kernel == "eager" else 1e-5)


@pytest.mark.parametrize("name", KNOWN)
def test_training_draws_the_same_numbers_and_gives_weights_before_dropout(name: str) -> None:
    model, batch = build(name).train(), make_batch()
    torch.manual_seed(7)
    with torch.no_grad():
        bare = model(**batch)[0]
    after = torch.get_rng_state()
    torch.manual_seed(7)
    got, output = read(model, batch)
    assert torch.equal(bare, output[0])
    assert torch.equal(after, torch.get_rng_state())
    for weights in got:
        rows = real_queries(weights, batch["attention_mask"])
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]), atol=TOLERANCE, rtol=0)  # float32 sums


@pytest.mark.parametrize("name", FUSED)
def test_weights_of_a_model_in_float64_are_eager_attentions(name: str) -> None:
    """The eager code of some families takes its softmax in float32, which rounds the context that is compared."""
    batch, expected = make_batch(), build(name, attention="eager").double()
    got, _ = read(build(name).double(), batch)
    own, _ = read(expected, batch)
    assert [made.dtype for made in got] == [eager.dtype for eager in own]
    # layer 0 only: later ones have the rounding of those before
    rows, eager_rows = (real_queries(weights[0], batch["attention_mask"]) for weights in (got, own))
    torch.testing.assert_close(rows, eager_rows, atol=TOLERANCE, rtol=0)  # two kernels, weights are at most 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("is_left", [False, True])
def test_padding_beyond_every_window_speaks_against_no_weights(dtype: torch.dtype, is_left: bool) -> None:
    """transformers 4 adds the lowest number to all scores of such a query: kernels round or overflow as they will."""
    batch, model = make_batch(8), build("modernbert").to(dtype)
    if is_left:
        batch = {name: value.flip(1) for name, value in batch.items()}
    got, _ = read(model, batch)
    own, _ = read(build("modernbert", attention="eager").to(dtype), batch)
    rows, eager_rows = (real_queries(weights[0], batch["attention_mask"]).float() for weights in (got, own))
    atol = 1e-2 if dtype == torch.float16 else TOLERANCE  # two kernels, in the rounding of a half type
    torch.testing.assert_close(rows, eager_rows, atol=atol, rtol=0)


@pytest.mark.parametrize("name", FUSED)
def test_edit_of_the_query_is_seen_and_no_projection_runs_twice(name: str) -> None:
    place = find_anatomy(FAMILIES[name].model_type).query
    path = place.path if isinstance(place, Fused) else place
    made: list[list[Tensor]] = []
    for attention in (None, "eager"):
        model, calls = build(name, attention=attention), []
        layer = model.get_submodule(lp.sites(model, "layers.0")[0].module)

        def double(module: nn.Module, args: Any, output: Tensor, calls: list[nn.Module] = calls) -> Tensor:
            calls.append(module)
            return output * 2

        layer.get_submodule(path).register_forward_hook(double)
        got, _ = read(model, make_batch())
        made.append(got)
        shared = sum(site.module == lp.sites(model, "layers.0")[0].module for site in lp.sites(model, "layers.*"))
        assert len(calls) == shared
    mask = make_batch()["attention_mask"]
    for fused, eager in zip(*made, strict=True):
        rows, eager_rows = real_queries(fused, mask), real_queries(eager, mask)
        torch.testing.assert_close(rows, eager_rows, atol=TOLERANCE, rtol=0)  # two kernels
    assert not torch.allclose(made[0][0], read(build(name), make_batch())[0][0])


def test_only_asked_layers_are_watched() -> None:
    model = build("bert")
    with lp.Probe(model, "layers.1.attention.weights"):
        hooked = [name for name, module in model.named_modules() if module._forward_hooks and name]
    assert hooked and all(name.startswith("encoder.layer.1.attention.self") for name in hooked)


def test_weights_are_the_same_alone_and_beside_other_sites() -> None:
    model, batch = build("modernbert"), make_batch()
    alone, _ = read(model, batch)
    with torch.no_grad(), lp.Probe(model, ["layers.*.attention.*", "layers.*"]) as probe:
        model(**batch)
    for index, weights in enumerate(alone):
        assert torch.equal(probe[f"layers.{index}.attention.weights"], weights)


# kernels that take other masks, or do more than they say


def packed_kernel(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Flash attention in slow motion: each sequence alone without its padding, window and causality in the kernel."""
    assert attention_mask is None or attention_mask.ndim == 2
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = torch.zeros_like(query)
    for b in range(len(query)):
        kept = torch.arange(query.shape[2]) if attention_mask is None else attention_mask[b].nonzero()[:, 0]
        scores = query[b][:, kept] @ key[b][:, kept].transpose(1, 2) * scale
        ahead = kept[None] - kept[:, None]
        if module.is_causal if is_causal is None else is_causal:
            scores = scores.masked_fill(ahead > 0, -torch.inf)
        if sliding_window is not None:
            scores = scores.masked_fill(ahead.abs() >= sliding_window, -torch.inf)
        mixed[b][:, kept] = scores.softmax(-1) @ value[b][:, kept]
    return mixed.transpose(1, 2).contiguous(), None


def hot_kernel(module: Any, query: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, None]:
    """A kernel whose temperature no argument shows."""
    key, value, mask = rest
    return packed_kernel(module, query * 3, key, value, mask, **options)


def warm_kernel(module: Any, query: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, None]:
    """A kernel with a temperature half as far off."""
    key, value, mask = rest
    return packed_kernel(module, query * 1.5, key, value, mask, **options)


@pytest.fixture
def kernels() -> Iterator[None]:
    """The kernels under their names, in the registry of transformers 5."""
    if not IS_V5:
        pytest.skip("transformers 4 has a class per kernel")
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    for kernel in (packed_kernel, hot_kernel, warm_kernel):
        AttentionInterface.register(kernel.__name__, kernel)
        AttentionMaskInterface.register(kernel.__name__, flash_attention_mask)
    yield
    for kernel in (packed_kernel, hot_kernel, warm_kernel):
        AttentionInterface._global_mapping.pop(kernel.__name__)
        AttentionMaskInterface._global_mapping.pop(kernel.__name__)


@pytest.mark.parametrize("num_padded", [0, 4])
@pytest.mark.parametrize("name", FLASH)
def test_weights_under_a_kernel_that_masks_as_flash_does(name: str, num_padded: int, kernels: None) -> None:
    batch, model = make_batch(num_padded), build(name)
    model.set_attn_implementation("packed_kernel")
    with torch.no_grad():
        bare = model(**batch)[0]
    got, output = read(model, batch)
    assert torch.equal(output[0], bare)
    assert_like_eager(got, name, batch, num_padded)


@pytest.mark.skipif(IS_V5, reason="transformers 5 has one class for all kernels")
@pytest.mark.parametrize("num_padded", [0, 4])
def test_weights_of_the_flash_class_of_distilbert(num_padded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.distilbert import modeling_distilbert as file

    def flash(query: Tensor, key: Tensor, value: Tensor, mask: Any, *_: Any, **__: Any) -> Tensor:
        module = type("Module", (), {"is_causal": False})
        by_head = [states.transpose(1, 2) for states in (query, key, value)]
        return packed_kernel(module, by_head[0], by_head[1], by_head[2], mask)[0]

    monkeypatch.setattr(file, "_flash_attention_forward", flash, raising=False)
    model: Any = build("distilbert")
    for layer in model.transformer.layer:
        layer.attention.__class__ = file.DistilBertFlashAttention2  # type: ignore[attr-defined]
        layer.attention._flash_attn_uses_top_left_mask = False
    model._use_flash_attention_2, model._use_sdpa = True, False
    model.config._attn_implementation = "flash_attention_2"
    batch = make_batch(num_padded)
    got, _ = read(model, batch)
    assert_like_eager(got, "distilbert", batch, num_padded)


@pytest.mark.slow
@pytest.mark.skipif(not IS_V5, reason="encoders of transformers 4 have no flex attention")
@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # transformers sets it
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")  # as it is on a CPU
def test_weights_under_flex_attention(name: str) -> None:
    batch, model = make_batch(), build(name)
    model.set_attn_implementation("flex_attention")
    got, _ = read(model, batch)
    assert_like_eager(got, name, batch, 4)


def test_causal_decoder_without_a_mask_has_its_triangle() -> None:
    model = build("bert", is_decoder=True)
    got, _ = read(model, {"input_ids": make_batch(0)["input_ids"], "use_cache": False})
    for weights in got:
        assert torch.equal(weights, weights.tril())
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 11), atol=TOLERANCE, rtol=0)  # float32 sums


# refusals: an error, never a wrong number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["hot_kernel", "warm_kernel"])
def test_kernel_that_does_more_than_its_arguments_say_is_refused(kernels: None, kernel: str, dtype: Any) -> None:
    model = build("bert").to(dtype)
    model.set_attn_implementation(kernel)
    match = rf"eager attention gives another context than {kernel} did: off by .* Load the model with attn_impl"
    with pytest.raises(CaptureError, match=match):
        read(model, make_batch())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("stop", [False, True])
def test_weights_of_a_call_are_looked_at_once_and_none_are_kept_that_are_refused(
    kernels: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, stop: bool
) -> None:
    """Each look waits for the device. A function is given values as they are made: there each layer is looked at."""
    looks: list[int] = []
    look = twins.require_same_contexts
    watching = lambda compared: [looks.append(len(compared)), look(compared)][1]  # noqa: E731
    monkeypatch.setattr(frames, "require_same_contexts", watching)
    monkeypatch.setattr(twins, "require_same_contexts", watching)
    model, batch, given = build("bert"), make_batch(), []
    with torch.no_grad(), lp.Probe(model, WEIGHTS, stop=stop):
        model(**batch)
    assert len(looks) == 1 and looks[0] >= model.config.num_hidden_layers
    model.set_attn_implementation("hot_kernel")
    match = "eager attention gives another context than hot_kernel did"
    for to in (None, tmp_path / "acts", lambda *made: given.append(made)):
        with torch.no_grad(), lp.Probe(model, WEIGHTS, to=to, stop=stop) as probe:
            with pytest.raises(CaptureError, match=match):
                model(**batch)
            assert to is not None or not probe.calls
    assert not given and not list(tmp_path.glob("acts/shard-*"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_more_is_rounding_where_cuda_rounds_the_operands_of_float32_products(dtype: torch.dtype) -> None:
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert twins._rounding_of(dtype, is_cuda=False, is_rounded=True) == eps
    rounded = twins._rounding_of(dtype, is_cuda=True, is_rounded=True)
    plain = twins._rounding_of(dtype, is_cuda=True, is_rounded=False)
    if dtype == torch.float32:
        # as many bits of mantissa as float16; another formula is told all the same: 24 eps of bfloat16
        assert rounded == torch.finfo(torch.float16).eps and plain == 4 * eps
        assert 8 * rounded < 24 * torch.finfo(torch.bfloat16).eps
    else:
        assert rounded == plain == eps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_weights_on_cuda_pass_their_check_in_every_precision(demo: Any, precision: str) -> None:
    texts = ["fox", "the quick brown fox jumps over the lazy dog. " * 12]
    batch = demo.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    expected, _ = read(copy.deepcopy(demo.model), batch)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = copy.deepcopy(demo.model).to("cuda", dtype)
    with compute_in(model, "tf32" if precision == "tf32" else None):
        got, _ = read(model, {name: value.cuda() for name, value in batch.items()})
    # layer 0 only: later ones have the rounding of those before
    rows, wanted = (real_queries(made[0].float().cpu(), batch["attention_mask"]) for made in (got, expected))
    # scores are some tens, so that float32 of another order of sums is off by a few hundred eps at most
    tolerance = {"float32": 1e-4, "tf32": 2**-7, "bfloat16": 2**-4}[precision]
    torch.testing.assert_close(rows, wanted, atol=tolerance, rtol=0)


def test_packed_batch_is_refused() -> None:
    starts = torch.tensor([0, 11, 18])
    model, match = build("modernbert"), r"Attention: the batch is packed, several sequences in a row\. Load"
    if IS_V5:
        with pytest.raises(CaptureError, match=match):
            read(model, make_batch() | {"cu_seq_lens_q": starts})
        return
    states = torch.zeros(18, 32)  # transformers 4 packs under flash attention only, which is not here
    with pytest.raises(CaptureError, match=match):
        EagerTwin(model.layers[0].attn).finish((states,), {"cu_seqlens": starts}, (states,))


class _Attention(nn.Module):
    """Attention of somebody's own, without a dropout child and without weights in its output."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = inner.query, inner.key, inner.value

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return self.query(hidden_states) + self.key(hidden_states) + self.value(hidden_states), None


def test_attention_that_shows_no_weights_is_refused() -> None:
    model = build("bert")
    model.encoder.layer[1].attention.self = _Attention(model.encoder.layer[1].attention.self)
    with pytest.raises(CaptureError, match=r"_Attention: its eager code returns no weights\. Load the model with"):
        read(model, make_batch())


@pytest.mark.parametrize("options", [{"pool": "mean"}, {"dtype": "int8"}])
@pytest.mark.parametrize("to_store", [False, True])
def test_pool_and_int8_of_weights_are_refused(options: Any, to_store: bool, tmp_path: Any) -> None:
    if options == {"dtype": "int8"} and not to_store:
        pytest.skip("in memory int8 has a scale per row of weights")
    model, to = build("bert"), tmp_path / "acts" if to_store else None
    with (
        pytest.raises(OptionError, match=r"'layers\.0\.attention\.weights' is one matrix per head[:,] (it takes|int8)"),
        lp.Probe(model, WEIGHTS, to=to, **options),
    ):
        pass
    assert not (tmp_path / "acts").exists()


# stores


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_stored_weights_are_those_among_real_tokens(side: str, dtype: str | None, tmp_path: Any) -> None:
    model, batch = build("bert"), make_batch(0)
    mask = batch["attention_mask"]
    mask[1, {"right": slice(7, None), "left": slice(None, 4), "holes": slice(2, 9, 2)}[side]] = 0
    got, _ = read(model, batch)
    with torch.no_grad(), lp.Probe(model, [WEIGHTS, "layers.0"], to=tmp_path / "acts", dtype=dtype):
        model(**batch)
    store = lp.open(tmp_path / "acts")
    for index, weights in enumerate(got):
        view = store[f"layers.{index}.attention.weights"]
        assert (view.kind, view.width) == ("attention", 4)
        for example, keep in enumerate(mask.bool()):
            kept: Any = weights[example][:, keep][:, :, keep].to(getattr(torch, dtype or "float32"))
            assert torch.equal(view[example], kept)  # type: ignore[arg-type]
            assert view[example].shape == (4, int(keep.sum()), int(keep.sum()))


# other ways to run


@pytest.mark.parametrize("name", FUSED)
def test_half_precision_passes_its_own_check(name: str) -> None:
    batch = make_batch()
    got, _ = read(build(name).to(torch.bfloat16), batch)
    eager, _ = read(build(name, attention="eager").to(torch.bfloat16), batch)
    for index, (weights, expected) in enumerate(zip(got, eager, strict=True)):
        rows, eager_rows = (real_queries(value, batch["attention_mask"]) for value in (weights, expected))
        # the first layer is given the same, later ones what two kernels made: off by two roundings to 8 bits on average
        assert torch.equal(rows, eager_rows) if index == 0 else (rows - eager_rows).abs().mean() < 2**-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_the_demo_model_pass_their_check_in_every_type(demo: Any, dtype: torch.dtype) -> None:
    texts = ["fox", "the quick brown fox jumps over the lazy dog. " * 12]
    batch = demo.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        expected, _ = read(copy.deepcopy(demo.model), batch)
    got, _ = read(copy.deepcopy(demo.model).to(dtype), batch)
    # layer 0 only: later ones have the rounding of those before; the scores of bfloat16 are off by 2**-9 of some units
    rows, wanted = (real_queries(weights[0].float(), batch["attention_mask"]) for weights in (got, expected))
    torch.testing.assert_close(rows, wanted, atol=8 * torch.finfo(dtype).eps, rtol=0)


def test_weights_under_autocast_and_inference_mode() -> None:
    model, batch = build("bert"), make_batch()
    with torch.inference_mode():
        plain, _ = read(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = read(model, batch)
    assert_like_eager(plain, "bert", batch, 4)
    for one, other in zip(cast, plain, strict=True):
        torch.testing.assert_close(one.float(), other.clone(), atol=0.1, rtol=0)  # bfloat16 has 8 bits


def test_threads_keep_their_weights_apart() -> None:
    model = build("bert")
    batches = [make_batch(seed % 5, seed=seed) for seed in range(8)]
    alone = [read(model, batch)[0] for batch in batches]
    got: dict[int, list[Tensor]] = defaultdict(list)

    def run(batch: dict[str, Tensor]) -> list[Tensor]:
        got[threading.get_ident()].clear()
        with torch.no_grad():
            model(**batch)
        return list(got[threading.get_ident()])

    with (
        lp.Probe(model, WEIGHTS, to=lambda _, weights: got[threading.get_ident()].append(weights)),
        ThreadPoolExecutor(4) as pool,
    ):
        together = list(pool.map(run, batches))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_stop_after_weights_ends_the_call() -> None:
    model, batch = build("modernbert"), make_batch()
    expected, _ = read(model, batch)
    with torch.no_grad(), lp.Probe(model, "layers.1.attention.weights", stop=True) as probe:
        assert model(**batch) is None
    assert torch.equal(probe["layers.1.attention.weights"], expected[1])
