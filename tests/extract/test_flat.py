"""Texts behind one another give the rows that each gives alone, where that is right, and are not tried elsewhere.

Letters: B sequences, H heads, S padded positions, T rows, d width of a head.
"""

import contextlib
import copy
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

import layerprobe as lp
from families import FAMILIES, IS_V5, PADDING, VOCABULARY, build, is_known
from layerprobe.errors import ArchitectureError, CaptureError, OptionError, PlanError
from layerprobe.extract import flat as flat_module
from layerprobe.extract import plan as planning
from layerprobe.extract.batching import Batch, FlatBatch, cut_flat_batches
from layerprobe.extract.flat import FlatForm, attending_flat, laying, refuse_flat
from layerprobe.extract.forward import REORDERED
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.extract.run import run_extraction
from layerprobe.extract.tokens import TokenizedUnit
from layerprobe.models import LoadedModel
from layerprobe.sites.anatomy import find_anatomy
from layerprobe.sites.resolve import map_model
from layerprobe.store.format import load_json
from layerprobe.store.places import find_place

extract: Any = lp.extract
needs_v5 = pytest.mark.skipif(not IS_V5, reason="attention by an interface came to these models with transformers 5")
FLAT_FAMILIES = [name for name, family in FAMILIES.items() if find_anatomy(family.model_type).flat]
IDS = [6, 7, 8, 9, 10, 11]


def make_flat(texts: Sequence[Sequence[int]]) -> FlatBatch:
    numbers = list(range(len(texts)))
    return FlatBatch(numbers, [len(text) for text in texts], numbers, torch.tensor([[one for t in texts for one in t]]))


def draw_texts(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def run_alone(model: nn.Module, names: list[str], texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The slow and simple way: each text by itself."""
    made: dict[str, list[Any]] = {name: [] for name in names}
    for text in texts:
        ids = torch.tensor([text])
        with lp.Probe(model, names) as probe, torch.inference_mode():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        for name in names:
            made[name].append(probe[name])
    return {name: torch.cat(values, dim=1) for name, values in made.items()}


def run_flat(model: nn.Module, names: list[str], texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    batch = make_flat(texts)
    with attending_flat(model), laying(batch), lp.Probe(model, names) as probe, torch.inference_mode():
        model(**FlatForm.of(model).arguments(batch))
    return {name: probe[name] for name in names}


def sites_of(model: nn.Module, patterns: Sequence[str] = ("embeddings", "layers.*")) -> Any:
    return map_model(model).select(list(patterns))


def reason_of(model: nn.Module, patterns: Sequence[str] = ("embeddings", "layers.*"), **how: Any) -> str | None:
    given: dict[str, Any] = {"precision": None, "is_compiled": False, **how}
    return refuse_flat(model, sites_of(model, patterns), IDS, given["precision"], given["is_compiled"])


# the model


@needs_v5
@pytest.mark.parametrize("name", FLAT_FAMILIES)
def test_every_site_of_tokens_has_the_rows_of_each_text_alone(name: str) -> None:
    if not is_known(name):
        pytest.skip("this transformers does not have it")
    model = build(name)
    patterns = ("embeddings", "layers.*", "layers.*.*", "layers.*.*.*")
    names = [site.name for site in sites_of(model, patterns) if site.kind == "token"]
    assert refuse_flat(model, sites_of(model, names), IDS, None, is_compiled=False) is None
    # as long as the model takes, alike in length, of one token; with padding ids inside, whose positions some skip
    texts = draw_texts([60, 31, 31, 31, 9, 8, 2, 1])
    for place in (3, 4, 17):
        texts[2][place] = PADDING
    alone, behind = run_alone(model, names, texts), run_flat(model, names, texts)
    for site in names:
        worst = (behind[site] - alone[site]).abs().max() / alone[site].abs().max()
        assert worst <= REORDERED[torch.float32] / 10, site  # sums in another order; another token gives 1e-2 at least


@needs_v5
@pytest.mark.parametrize("name", FLAT_FAMILIES)
def test_a_text_does_not_see_the_others(name: str) -> None:
    if not is_known(name):
        pytest.skip("this transformers does not have it")
    model = build(name)
    first, second, other = draw_texts([20, 7, 7])
    before, after = (run_flat(model, ["layers.-1"], [first, last])["layers.-1"] for last in (second, other))
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-2)


@needs_v5
def test_a_model_is_as_it_was_afterwards_and_other_threads_see_no_difference(make_bert: Any) -> None:
    model = make_bert()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]])
    padded = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    config = model.config.to_dict()
    with torch.inference_mode():
        expected = model(**padded).last_hidden_state
    found: list[Tensor] = []

    def call() -> None:
        with torch.inference_mode():
            found.append(model(**padded).last_hidden_state)

    def look_aside(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

    batch = make_flat([IDS, IDS[:2]])
    with contextlib.suppress(KeyboardInterrupt), attending_flat(model):
        call()
        with laying(batch), model.encoder.layer[1].register_forward_hook(look_aside), torch.inference_mode():
            model(**FlatForm.of(model).arguments(batch))
        raise KeyboardInterrupt
    assert model.config.to_dict() == config and model.config._attn_implementation == "sdpa"
    call()
    assert len(found) == 3 and all(torch.equal(one, expected) for one in found)


@needs_v5
def test_attention_that_is_asked_for_more_says_so(make_bert: Any) -> None:
    model = make_bert()
    batch = make_flat([IDS, IDS[:2]])
    arguments = FlatForm.of(model).arguments(batch)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    with attending_flat(model), laying(batch), torch.inference_mode():
        with pytest.raises(ArchitectureError, match=r"BertSelfAttention attends by a mask.*padding_free=False"):
            model(**arguments, attention_mask=mask)
        with pytest.raises(ArchitectureError, match="attends by sliding_window"):
            model(**arguments, sliding_window=2)


@needs_v5
def test_two_runs_on_one_config_do_not_end_each_other(make_bert: Any) -> None:
    from transformers import BertModel

    first = make_bert()
    second = BertModel(first.config).eval()
    texts = draw_texts([7, 4, 4])
    expected = run_flat(second, ["layers.2"], texts)["layers.2"]
    outer, inner = attending_flat(first), attending_flat(second)
    batch = make_flat(texts)
    with inner:
        # the one that began first ends first
        with outer:
            pass
        assert reason_of(second) is None  # a run may be planned meanwhile
        with laying(batch), lp.Probe(second, "layers.2") as probe, torch.inference_mode():
            second(**FlatForm.of(second).arguments(batch))
        assert torch.equal(probe["layers.2"], expected)  # type: ignore[arg-type]
    assert first.config._attn_implementation == "sdpa"


@needs_v5
def test_attention_that_is_set_anew_under_way_ends_the_run(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    config: Any = tiny.model.config

    def set_anew(rows: Tensor) -> Tensor:
        config._attn_implementation = "sdpa"
        return rows[0]

    with pytest.raises(CaptureError, match="was set to 'sdpa' while a run was under way: its texts would see each"):
        extract(tiny, texts, tmp_path / "acts", pool=set_anew, padding_free=True)
    assert config._attn_implementation == "sdpa" and not list((tmp_path / "acts").glob("shard-*"))


@needs_v5
def test_a_model_called_within_a_call_of_the_same_config_says_so(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    other = type(tiny.model)(tiny.model.config)

    def call(rows: Tensor) -> Tensor:
        return other(input_ids=torch.tensor([[5, 6]])).last_hidden_state[0, 0]

    with pytest.raises(CaptureError, match="which is no batch of the run: a sink or pool calls a model"):
        extract(tiny, texts, tmp_path / "acts", pool=call, sites=["layers.0"], padding_free=True)
    other = tiny.model
    with pytest.raises(CaptureError, match="the model was called once more than the run has called it"):
        extract(tiny, texts, tmp_path / "own", pool=call, sites=["layers.0"], padding_free=True)


# which models, sites and devices


class _Wrapper(nn.Module):
    """As those of PEFT, and of users who know how layerprobe looks under them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def get_base_model(self) -> nn.Module:
        return self.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


class _Mixing(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch has it
        return super().forward(input) + input.mean(1)


class _Strict(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch has it
        return super().forward(input[:, :8])


@needs_v5
def test_what_would_see_another_batch_is_refused_with_its_reason(make_bert: Any) -> None:
    from transformers import BertModel

    class Own(BertModel):
        pass

    assert reason_of(make_bert()) is None
    assert reason_of(make_bert("BertForMaskedLM"), ["layers.*", "logits"]) is None
    hooked, wrapped, moved = make_bert(), make_bert(), make_bert()
    hooked.encoder.layer[0].register_forward_hook(lambda *_: None)
    wrapped.pooler.forward = wrapped.pooler.forward
    compiled = make_bert()
    compiled.encoder.layer[0].compile(backend="eager")
    refused = {
        "hooks or edits": reason_of(hooked),
        "hooks or edits on": reason_of(wrapped),
        "compiled again": reason_of(moved, is_compiled=True),
        "a compiled model would": reason_of(compiled),
        "_Wrapper around BertModel": reason_of(_Wrapper(moved)),
        "chunk_size_feed_forward": reason_of(make_bert(chunk_size_feed_forward=1)),
        "Own is no class of transformers": reason_of(Own(moved.config).eval()),
        "'eager', not 'sdpa'": reason_of(build("bert", attention="eager")),
        "'bert' it is not known": reason_of(build("bert", is_decoder=True)),
        "'megatron-bert' it is not known": reason_of(build("megatron-bert")),
        "'layers.0.attention.weights' is not of tokens alone": reason_of(moved, ["layers.0.attention.weights"]),
        "'pooler' is not of tokens alone": reason_of(moved, ["layers.0", "pooler"]),
        "'module:encoder' is not of tokens alone": reason_of(moved, ["module:encoder"]),
        "'logits' is not of tokens alone": reason_of(make_bert("BertForSequenceClassification"), ["logits"]),
    }
    for expected, reason in refused.items():
        assert reason is not None and expected in reason, (expected, reason)
    with lp.edit(moved, {"layers.0": lp.steer(torch.ones(32), 1.0)}):
        assert "hooks or edits" in str(reason_of(moved))
    assert reason_of(moved) is None


@needs_v5
def test_a_model_that_was_asked_for_its_hidden_states_once_is_taken_all_the_same(make_bert: Any) -> None:
    model = make_bert()
    model(input_ids=torch.tensor([IDS]), output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in model.modules())  # transformers' own, left for good
    assert reason_of(model) is None


@needs_v5
def test_a_model_that_lets_tokens_see_each_other_is_found_out_by_the_trial(make_bert: Any) -> None:
    model = make_bert()
    for layer in model.encoder.layer:
        norm = layer.output.LayerNorm
        norm.__class__ = _Mixing
    assert reason_of(model) == "BertModel gives other rows then"


@needs_v5
def test_a_model_that_does_not_take_such_a_batch_is_left_alone(make_bert: Any) -> None:
    model = make_bert(max_position_embeddings=6)
    model.embeddings.word_embeddings.__class__ = _Strict
    assert "BertModel does not take such a batch" in str(reason_of(model))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "dtype", "reason"),
    [
        ("cuda", torch.float32, "on cuda in float32"),
        ("mps", torch.float16, "on mps in float16"),
        ("cuda", torch.bfloat16, None),
        ("cpu", torch.float32, None),
    ],
)
def test_only_kernels_that_there_are_are_asked_for(
    make_bert: Any, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, reason: str | None
) -> None:
    monkeypatch.setattr(flat_module, "find_device", lambda _: torch.device(kind))
    found = flat_module._refuse_kernel(map_model(make_bert().to(dtype)), None)
    has_kernel = flat_module.importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if reason is None:
        assert found is None or (kind == "cuda" and not has_kernel)
    else:
        assert found is not None and found.endswith(reason)


def test_the_kernel_for_many_lengths_is_given_each_text_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's kernel would be given, by a slow one of the same face; the kernel itself has not been run."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    lengths, heads, width = [5, 5, 3, 1], 4, 8
    seen: list[dict[str, Any]] = []

    def attend(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **more: Any
    ) -> Tensor:
        assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k) and (max_q, max_k) == (5, 5)
        assert all(one.is_contiguous() and one.shape[::2] == (14, width) for one in (query, key, value))
        seen.append(more)
        mixed = []
        for start, stop in itertools.pairwise(cu_q.tolist()):
            parts = (one[start:stop].transpose(0, 1).double() for one in (query, key, value))
            query_HTd, *others = parts
            key_HTd, value_HTd = (one.repeat_interleave(heads // len(one), 0) for one in others)
            scores = query_HTd @ key_HTd.mT * more.get("scale", width**-0.5)
            mixed.append((scores.softmax(-1) @ value_HTd).transpose(0, 1))
        return torch.cat(mixed).to(query.dtype)

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    layout = flat_module._Layout(lengths)
    query = torch.randn(1, heads, 14, width)
    for scaling, key_heads in ((None, heads), (width**-0.5, heads), (0.5, heads), (None, 2)):
        key, value = (torch.randn(1, key_heads, 14, width) for _ in range(2))
        by_kernel = flat_module._attend_by_kernel(query, key, value, scaling, layout)
        by_length = flat_module._attend_by_length(query, key, value, scaling, 0.0, layout)
        assert by_kernel.shape == by_length.shape == (1, 14, heads, width)
        torch.testing.assert_close(by_kernel, by_length, atol=1e-6, rtol=1e-5)  # float32 against float64
    assert seen == [{}, {}, {"scale": 0.5}, {"enable_gqa": True}]


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_the_kernel_for_many_lengths_takes_what_it_is_given(key_heads: int, scaling: float | None) -> None:
    """By its own checks, on tensors of no memory, which need no GPU."""
    pytest.importorskip("torch.nn.attention.varlen")
    query, key, value = (
        torch.empty(1, heads, 14, 8, dtype=torch.float16, device="meta") for heads in (4, key_heads, key_heads)
    )
    layout = flat_module._Layout([5, 5, 3, 1])
    # autocast leaves what a rotary embedding makes in float32
    for rotated in (lambda one: one, torch.Tensor.float):
        mixed = flat_module._attend_by_kernel(rotated(query), rotated(key), value, scaling, layout)
        assert mixed.shape == (1, 14, 4, 8) and mixed.dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_the_kernel_for_many_lengths_gives_the_rows_of_padded_batches(
    tiny_model_folder: Path, texts: list[str], tmp_path: Path, precision: str | None
) -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    loaded = lp.load_model(str(tiny_model_folder), "cuda")
    if precision is None:
        loaded.model.half()
    flat, padded = (
        lp.extract(loaded, texts, tmp_path / str(is_flat), sites="layers.*", padding_free=is_flat, precision=precision)
        for is_flat in (True, False)
    )
    for site, ordinal in itertools.product(flat.sites, range(len(texts))):
        rows, expected = (store[site][ordinal].float() for store in (flat, padded))
        torch.testing.assert_close(rows, expected, rtol=2e-2, atol=2e-2)  # eight bits of mantissa, three layers


# batches


@given(lengths=st.lists(st.integers(0, 30), max_size=60), budget=st.integers(1, 64), repeats=st.integers(1, 3))
def test_every_text_is_in_one_batch_under_the_budget(lengths: list[int], budget: int, repeats: int) -> None:
    ids = [list(range(number, number + length)) for number, length in enumerate(lengths)] * repeats
    unit = TokenizedUnit.of(ids)
    batches = list(cut_flat_batches(unit, budget, 0))
    assert sorted(member for batch in batches for member in batch.members) == list(range(len(ids)))
    laid = [length for batch in batches for length in batch.lengths]
    assert laid == sorted(laid, reverse=True)
    for batch in batches:
        assert batch.lengths == [len(ids[member]) for member in batch.members]
        if isinstance(batch, Batch):  # the text of no tokens
            assert not any(batch.lengths) and batch.input_ids.numel() == batch.num_padding == batch.num_sequences == 1
            continue
        assert all(batch.lengths)
        assert batch.num_padding == batch.num_filling == 0
        assert batch.input_ids.numel() <= budget or batch.num_sequences == 1
        assert len({tuple(ids[member]) for member in batch.members}) == batch.num_sequences
        parts = batch.input_ids[0].split(batch.own_lengths)
        for member, sequence in zip(batch.members, batch.sequences, strict=True):
            assert parts[sequence].tolist() == ids[member]
        if batch.num_sequences > 1:
            halves = batch.halves()
            assert torch.equal(torch.cat([half.input_ids for half in halves], dim=1), batch.input_ids)
            for name in ("members", "lengths", "own_lengths"):
                assert [one for half in halves for one in getattr(half, name)] == getattr(batch, name)
            assert all(half.sequences[:1] in ([], [0]) for half in halves)


def test_batches_are_about_as_large_as_each_other() -> None:
    ids = [[number % 90 + place for place in range(1 + number % 7)] for number in range(700)]
    sizes = [batch.input_ids.numel() for batch in cut_flat_batches(TokenizedUnit.of(ids), 64, 0)]
    assert len(sizes) > 5 and min(sizes[:-1]) >= 0.8 * max(sizes)


# runs


@needs_v5
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"pool": "mean"},
        {"pool": "cls"},
        {"pool": "last"},
        {"pool": "max"},
        {"pool": lambda rows: rows.amin(0)},
        {"keep": 0.4},
        {"tokens": "nonspecial"},
        {"dtype": "int8"},
        {"dtype": "bfloat16"},
        {"sites": ["layers.1.attention.context", "layers.*.ffn.*", "layers.2.mid"]},
        {"precision": "bfloat16"},
    ],
)
@pytest.mark.parametrize("batch_tokens", [None, 40])
def test_a_run_without_padding_gives_the_rows_of_one_with_it(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, how: dict[str, Any], batch_tokens: int | None
) -> None:
    how = {"batch_tokens": batch_tokens, "shard_size": 30_000, **how}
    texts = [*texts, *texts[::-1], "a dog", ""]  # many of the same tokens
    plain = extract(tiny, texts, tmp_path / "plain", padding_free=False, **how)
    store = extract(tiny, texts, tmp_path / "flat", padding_free=True, **how)
    config: Any = tiny.model.config
    assert config._attn_implementation == "sdpa"
    assert store.sites == plain.sites and len(store) == len(texts)
    loose = how.get("dtype") == "int8" or "precision" in how or how.get("dtype") == "bfloat16"
    tolerance = 0.05 if loose else 1e-5  # a step of the dtype; else sums in another order
    for ordinal in range(len(texts)):
        assert torch.equal(store.example(ordinal).input_ids, plain.example(ordinal).input_ids)
        assert store.example(ordinal).text == plain.example(ordinal).text
        for site in store.sites:
            one, other = (torch.as_tensor(s.example(ordinal)[site].float()) for s in (store, plain))
            torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    if not callable(how.get("pool")):
        assert lp.audit(tmp_path / "flat", tiny, num_examples=100).ok


@needs_v5
def test_a_report_says_that_nothing_was_padding(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    report = run_extraction(plan_extraction(tiny, texts, tmp_path / "acts"))
    assert report.num_padding == 0 and report.num_computed < report.num_tokens  # two texts are alike
    assert "padding 0.0%" in str(report)
    report = run_extraction(plan_extraction(tiny, texts, tmp_path / "padded", ExtractOptions(padding_free=False)))
    assert report.num_padding > 0


@needs_v5
def test_what_is_lost_is_made_again_byte_for_byte(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    store = extract(tiny, texts, folder, shard_size=10_000, batch_tokens=40, padding_free=True)
    assert store.num_shards > 3
    before = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    for name in sorted(before)[1::2]:
        (folder / name).unlink()
    extract(tiny, texts, folder, shard_size=10_000, batch_tokens=40)
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == before


@needs_v5
def test_a_run_goes_on_as_it_began(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    """One that was begun with padding, as every one of an older version was, or while a hook was on the model."""
    for began in (False, True):
        folder = tmp_path / str(began)
        extract(tiny, texts, folder, shard_size=10_000, padding_free=began)
        assert bool(load_json(find_place(folder), "store.json")["plan"].get("padding_free")) is began
        before = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
        (folder / "shard-000001.safetensors").unlink()
        extract(tiny, texts, folder, shard_size=10_000)
        assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == before
        with pytest.raises(PlanError, match=r"plan\.padding_free"):
            extract(tiny, texts, folder, shard_size=10_000, padding_free=not began)
    with lp.Probe(tiny.model, "layers.0", to=lambda *_: None):
        with pytest.raises(PlanError, match="was begun without padding and cannot go on so: hooks or edits on the"):
            extract(tiny, texts, tmp_path / "True", shard_size=10_000)
        store = extract(tiny, texts, tmp_path / "True", shard_size=10_000, overwrite=True)
    assert store.is_complete and "padding_free" not in load_json(find_place(tmp_path / "True"), "store.json")["plan"]


@needs_v5
def test_a_batch_that_does_not_fit_is_cut_between_texts(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = texts[:9] * 2
    plan = plan_extraction(tiny, texts, tmp_path / "acts", ExtractOptions(padding_free=True))
    sizes: list[int] = []

    def refuse(_: Any, args: Any, kwargs: Any) -> None:
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > 30 and kwargs["position_ids"].eq(0).sum() > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with tiny.model.register_forward_pre_hook(refuse, with_kwargs=True):
        report = run_extraction(plan)
    assert report.num_halved >= 2 and sizes[0] > 60
    assert "going on with" in capsys.readouterr().err
    whole = extract(tiny, texts, tmp_path / "whole", padding_free=True)
    halved = lp.open(tmp_path / "acts")
    for site, ordinal in ((site, ordinal) for site in whole.sites for ordinal in range(len(texts))):
        # a batch of another size reorders the sums of a forward
        torch.testing.assert_close(halved[site][ordinal], whole[site][ordinal], atol=1e-5, rtol=1e-5)


@needs_v5
def test_the_trial_is_made_of_several_tokens_however_short_the_first_text_is(
    make_bert: Any, tiny: LoadedModel, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    model = make_bert(vocab_size=len(tokenizer))
    for layer in model.encoder.layer:
        layer.output.LayerNorm.__class__ = _Mixing
    with pytest.raises(OptionError, match="gives other rows then"):
        extract(model, ["fox", "the dog over"], tmp_path / "acts", tokenizer=tokenizer, padding_free=True)


def test_ids_of_the_plan_serve_no_other_text(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes between the passes of a plan is another input, whose own ids are stored."""
    path = tmp_path / "texts.txt"
    path.write_text("the fox\na dog\n", encoding="utf-8")
    survey = planning.survey_input

    def rewrite(*given: Any) -> Any:
        path.write_text("the dog\na fox\n", encoding="utf-8")
        return survey(*given)

    monkeypatch.setattr(planning, "survey_input", rewrite)
    store = extract(tiny, path, tmp_path / "acts")
    assert [store.example(ordinal).text for ordinal in range(2)] == ["the dog", "a fox"]
    assert store.example(0).tokens == ["[CLS]", "the", "dog", "[SEP]"]
    assert lp.audit(tmp_path / "acts", tiny).ok


def test_a_run_that_cannot_do_without_padding_is_refused_only_where_asked(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    sites = ["layers.0", "pooler"]
    with pytest.raises(OptionError, match=r"padding_free=True: 'pooler' is not of tokens alone\. Leave it out\.|sdpa"):
        extract(tiny, texts, tmp_path / "acts", sites=sites, padding_free=True)
    assert not (tmp_path / "acts").exists()
    assert extract(tiny, texts, tmp_path / "acts", sites=sites).is_complete
    for value in ("yes", 0, 1):
        with pytest.raises(OptionError, match=f"padding_free is {value!r}: use True, False, or None"):
            extract(tiny, texts, tmp_path / "acts", padding_free=value)
    with pytest.raises(OptionError, match="padding_free concerns stores"):
        extract(tiny, texts, lp.Moments(), padding_free=True)


def test_texts_of_no_tokens_at_all_are_still_examples(tiny: LoadedModel, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    for number, texts in enumerate((["", "", ""], ["", "the fox", ""])):
        store = extract(tiny.model, texts, tmp_path / str(number), tokenizer=tokenizer, shard_size=1000)
        assert [len(store["layers.0"][ordinal]) for ordinal in range(3)] == [2 * bool(text) for text in texts]
        pooled = extract(tiny.model, texts, tmp_path / f"{number}-pooled", tokenizer=tokenizer, pool="mean")
        vectors = pooled["layers.0"].pooled()
        assert vectors.isnan().all(1).tolist() == [not text for text in texts]
