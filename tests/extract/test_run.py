"""From texts to shards: what is on disk is what the model makes of each text alone."""

import copy
import itertools
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

import layerprobe
import memory
from families import IS_V5
from layerprobe.capture.packing import StoreSink
from layerprobe.errors import InputError, NonFiniteError, StoreError
from layerprobe.extract import calling
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.extract.reports import RunReport
from layerprobe.extract.run import run_extraction
from layerprobe.models import LoadedModel
from layerprobe.store.shards import ScaledRows

extract: Any = layerprobe.extract
NUMPY = {"F32": "<f4", "I64": "<i8", "U8": "u1"}


def read_plainly(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Read a safetensors file with nothing but json and struct."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__")
    arrays = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        piece = raw[8 + length + start : 8 + length + stop]
        arrays[name] = np.frombuffer(piece, NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return metadata, arrays


def forward_alone(loaded: LoadedModel, text: str, max_length: int) -> tuple[list[int], list[torch.Tensor]]:
    """Run one text by itself, as the model's own documentation does."""
    encoded = loaded.tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        states = loaded.model(**encoded, output_hidden_states=True).hidden_states
    return encoded["input_ids"][0].tolist(), [state[0] for state in states]


def mixed_texts() -> list[str]:
    words = Path(layerprobe.__file__).with_name("errors.py").read_text(encoding="utf-8").split()
    texts = [
        "",
        "a",
        "深層学習 和 中文 的 句子 。",
        "emoji 😀 👩‍👩‍👧 🇫🇷 end",
        "word " * 2000,
        " ",
        "\t tab",
        "ÀÉÎ õü ß",
    ]
    texts += [" ".join(words[start : start + 1 + start * 7 % 23]) for start in range(139)]
    return [*texts, *texts[:10]]


def test_every_layer_of_the_demo_model_for_157_mixed_texts(demo: LoadedModel, tmp_path: Path) -> None:
    texts = mixed_texts()
    assert len(texts) == 157
    store = extract(demo, texts, tmp_path / "acts", shard_size=16 << 20)
    assert store.is_complete and store.num_shards > 1
    sites = ["embeddings", *(f"layers.{layer}" for layer in range(6))]
    limit = demo.tokenizer.model_max_length
    seen = []
    for path in sorted((tmp_path / "acts").glob("shard-*")):
        metadata, arrays = read_plainly(path)
        assert metadata["format"] == "layerprobe/1"
        for position, ordinal in enumerate(arrays["example"].tolist()):
            start, stop = arrays["offsets"][position : position + 2]
            ids, states = forward_alone(demo, texts[ordinal], limit)
            assert arrays["input_ids"][start:stop].tolist() == ids
            for site, state in zip(sites, states, strict=True):
                lost = np.abs(arrays[site][start:stop] - state.numpy()).max()
                assert lost < 1e-4  # values reach 10; batching reorders float32 sums, 1.6e-5 measured
            first, last = arrays["record_offsets"][position : position + 2]
            assert json.loads(arrays["records"][first:last].tobytes()) == {"text": texts[ordinal]}
            seen.append(ordinal)
        with safetensors.safe_open(path, "pt") as file:
            assert set(file.keys()) == set(arrays)
            assert all(np.array_equal(file.get_tensor(name).numpy(), arrays[name]) for name in arrays)
    assert sorted(seen) == list(range(157))
    # one text of 2,000 words, twice
    assert store.index["truncated"] == 2 and len(store.example(4).input_ids) == limit
    assert store.example(0).tokens == ["[CLS]", "[SEP]"] and store.example(0).text == ""


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "int8"])
def test_each_dtype_reads_back_as_the_cast_of_what_the_model_made(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, dtype: str
) -> None:
    exact = extract(tiny, texts, tmp_path / "exact")
    store = extract(tiny, texts, tmp_path / "cast", dtype=dtype)
    for site in store.sites:
        for ordinal in range(len(texts)):
            value, rows = store[site][ordinal], exact[site][ordinal]
            if dtype == "int8":
                assert isinstance(value, ScaledRows) and value.values.dtype == torch.int8
                scale = rows.abs().amax(1) / 127
                assert torch.equal(value.scale, scale)
                lost = (value.float() - rows).abs().amax(1)
                assert bool((lost <= scale * 0.5001).all())  # half a step of rounding, and the division's last bit
            else:
                assert value.dtype == getattr(torch, dtype)
                assert torch.equal(value.float(), rows.to(value.dtype).float())
        rows = torch.cat(list(store[site].rows(5)))
        assert len(rows) == store.num_tokens


@pytest.mark.parametrize("pool", ["cls", "mean", "max", "last"])
def test_pooling_while_extracting_is_pooling_what_was_extracted(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, pool: str
) -> None:
    rows = extract(tiny, texts, tmp_path / "rows")["layers.2"]
    store = extract(tiny, texts, tmp_path / "pooled", pool=pool, sites=["layers.2", "pooler"])
    expected = rows.pooled(pool)
    assert store.pool == pool and store["layers.2"].kind == "example"
    torch.testing.assert_close(
        store["layers.2"].pooled(pool), expected, rtol=0, atol=1e-5
    )  # float32 sums in another order
    assert store["pooler"].pooled(pool).shape == (len(texts), 32)
    assert store["layers.2"][3].shape == (32,)


def test_a_callable_pools_by_rows(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    rows = extract(tiny, texts, tmp_path / "rows")["layers.2"]
    store = extract(tiny, texts, tmp_path / "acts", sites="layers.2", pool=lambda rows: rows[0, :5])
    assert store["layers.2"].width == 5
    for ordinal in range(len(texts)):
        expected = rows[ordinal][0, :5]
        torch.testing.assert_close(store["layers.2"][ordinal], expected, rtol=0, atol=1e-5)  # other batches, other sums


def test_other_fields_travel_with_the_example(tiny: LoadedModel, tmp_path: Path) -> None:
    records = [{"text": "the dog", "id": 7, "tags": ["中"]}, {"text": "", "id": None, "tags": {}}]
    store = extract(tiny, records, tmp_path / "acts")
    assert [example.text for example in store] == ["the dog", ""]
    assert [example.fields for example in store] == [{"id": 7, "tags": ["中"]}, {"id": None, "tags": {}}]


def test_fields_of_numpy_are_found_as_the_numbers_they_are(tiny: LoadedModel, tmp_path: Path) -> None:
    records = [
        {"text": "the dog", "o": np.int64(3), "is_odd": np.bool_(True)},
        {"text": "fox", "o": 4, "is_odd": False},
    ]
    store = extract(tiny, records, tmp_path / "acts")
    assert list(store.where(o=3)) == list(store.where(is_odd=True)) == [0]
    with pytest.raises(InputError, match="text 0: field 'o' is object, which cannot be kept as JSON"):
        extract(tiny, [{"text": "a", "o": object()}], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_text_without_any_token_keeps_its_place(tiny: LoadedModel, tmp_path: Path) -> None:
    class Bare:
        """The tokenizer without special tokens."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tiny.tokenizer(*args, add_special_tokens=False, **kwargs)

        def num_special_tokens_to_add(self) -> int:
            return 0

        def __getattr__(self, name: str) -> Any:
            return getattr(tiny.tokenizer, name)

    store = extract(tiny, ["the dog", "", "fox"], tmp_path / "acts", tokenizer=Bare())
    assert [len(example.input_ids) for example in store] == [2, 0, 1]
    assert store["layers.0"][1].shape == (0, 32)
    pooled = store["layers.0"].pooled("mean")
    assert pooled.isnan().any(1).tolist() == [False, True, False]


def test_the_model_is_left_as_it_was(tiny: LoadedModel, texts: list[str], tmp_path: Path, make_bert: Any) -> None:
    model = make_bert(vocab_size=len(tiny.tokenizer)).train()
    model.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    store = extract(model, texts, tmp_path / "acts", tokenizer=tiny.tokenizer)
    again = extract(model, texts, tmp_path / "again", tokenizer=tiny.tokenizer)
    assert torch.equal(store["layers.2"][3], again["layers.2"][3])  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in model.modules()]
    assert not any(hooks) and "forward" not in model.__dict__


def broken_model(make_bert: Any, tokenizer: Any, value: float) -> Any:
    """A model whose middle layer makes one value of each row `value`."""
    model = make_bert(vocab_size=len(tokenizer))
    with torch.no_grad():
        model.encoder.layer[1].output.LayerNorm.bias[3] = value
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float16"},
        {"dtype": "int8", "keep": 0.5},
        {"pool": "mean"},
        {"padding_free": False},
        {"precision": "bfloat16"},
        {"sites": ["layers.1.ffn.act", "pooler"], "dtype": "float16"},
    ],
)
def test_the_values_that_a_model_hands_over_are_counted(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, options: dict[str, Any]
) -> None:
    plan = plan_extraction(tiny, texts, tmp_path / "acts", ExtractOptions(**options))
    seen: list[int] = []
    modules = dict(tiny.model.named_modules())
    handles = []
    for site in plan.sites:
        module = modules[site.module]
        if site.takes == "output":
            handles.append(module.register_forward_hook(lambda _, __, value: seen.append(_find(value).nbytes)))
        else:
            handles.append(module.register_forward_pre_hook(lambda _, args: seen.append(args[0].nbytes)))
    try:
        report = run_extraction(plan)
    finally:
        for handle in handles:
            handle.remove()
    assert report.value_bytes == sum(seen) > 0


def _find(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value[0]


@pytest.mark.parametrize(
    "options", [{"sites": ["layers.0.attention.weights"]}, {"precision": "bfloat16", "dtype": "float16"}]
)
def test_values_whose_size_the_plan_does_not_say_are_not_guessed(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, options: dict[str, Any]
) -> None:
    report = run_extraction(plan_extraction(tiny, texts, tmp_path / "acts", ExtractOptions(**options)))
    assert report.value_bytes is None and "B/s in" not in str(report) and "B/s out" in str(report)


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("float8_e4m3fn", 1e4), ("float32", float("inf"))])
def test_values_that_do_not_fit_are_counted_per_site_and_reported(
    tiny: LoadedModel, make_bert: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, value: float
) -> None:
    model = broken_model(make_bert, tiny.tokenizer, value)
    options: dict[str, Any] = {"tokenizer": tiny.tokenizer, "sites": ["layers.0", "layers.1"], "dtype": dtype}
    store = extract(model, ["the dog", "fox"], tmp_path / "acts", **options)
    assert store.index["nonfinite"] == {"layers.1": store.num_tokens}
    said = capsys.readouterr().err
    assert f"{store.num_tokens} values not finite or beyond the dtype ({store.num_tokens} at layers.1)" in said
    assert said.count("\n") == 1
    with pytest.raises(NonFiniteError, match=rf"{store.num_tokens} at 'layers\.1'.*wider dtype"):
        extract(model, ["the dog", "fox"], tmp_path / "error", nonfinite="error", **options)
    assert not list((tmp_path / "error").glob("shard-*"))
    wider = {**options, "dtype": "bfloat16"}
    if value != float("inf"):
        assert extract(model, ["the dog"], tmp_path / "wide", nonfinite="error", **wider).index["nonfinite"] == {}


def test_the_report_counts_what_was_done(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    plan = plan_extraction(tiny, texts, tmp_path / "acts", ExtractOptions(shard_bytes=20_000))
    report = run_extraction(plan)
    lengths = [len(tiny.tokenizer(text, truncation=True)["input_ids"]) for text in texts]
    assert (report.num_examples, report.num_tokens, report.num_truncated) == (12, sum(lengths), 1)
    assert report.num_bytes == sum(file.stat().st_size for file in (tmp_path / "acts").glob("shard-*"))
    assert report.num_computed - report.num_padding == sum(lengths)
    assert report.padding == report.num_padding / report.num_computed and report.stalled_s >= 0
    line = str(report)
    for part in (
        "12 examples",
        f"{sum(lengths)} tokens",
        "tokens/s",
        "B/s in",
        "B/s out",
        "written",
        "padding",
        "1 truncated",
        "stalled",
    ):
        assert part in line
    assert "\n" not in line
    assert str(RunReport()) == "nothing to do: every shard is there already"


def test_progress_goes_to_stderr_only_when_asked(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(tiny, texts, tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    extract(tiny, texts, tmp_path / "loud", progress=True)
    printed = capsys.readouterr()
    assert printed.out == "" and "12 examples" in printed.err and "\r" not in printed.err


def test_a_disk_that_refuses_is_a_store_error(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    plan = plan_extraction(tiny, texts, tmp_path / "acts")
    (tmp_path / "acts").touch()
    with pytest.raises(StoreError, match="acts: cannot be written"):
        run_extraction(plan)


PEAKS = """
import sys, torch, layerprobe
from layerprobe.extract import preparing
from memory import measure_peak

torch.set_num_threads(1)
loaded = layerprobe.load_model(sys.argv[1], "cpu")
texts = [f"the quick brown fox {number}" for number in range(16_000)]
encode_record, kept = preparing.encode_record, []

def measure(count):
    run = lambda: layerprobe.extract(loaded, texts[:count], sys.argv[2], shard_size=1 << 20, overwrite=True)
    return measure_peak(run)

def leak(record):
    kept.append(torch.ones(32))
    return encode_record(record)

measure(4000)
print(measure(3999), measure(16_000))
preparing.encode_record = leak
print(measure(15_999))
assert len(kept) == 15_999
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_examples(tiny_model_folder: Path, tmp_path: Path) -> None:
    """And a row that were kept of each would show."""
    few, many, leaky = map(int, memory.run_measured(PEAKS, tiny_model_folder, tmp_path / "acts").split())
    # of 16 shards and of 60
    assert many - few < 10_000 < leaky - few, f"kB for 4,000 and 16,000 examples, and with a leak: {few, many, leaky}"


@pytest.mark.parametrize("options", [{}, {"pool": "mean"}, {"dtype": "int8"}, {"sites": ["pooler", "layers.0"]}])
@pytest.mark.parametrize("sites", [["layers.*"], ["layers.1.attention.weights"]])
def test_texts_of_the_same_tokens_are_computed_once_and_stored_for_each(
    tiny: LoadedModel, tmp_path: Path, options: Any, sites: list[str]
) -> None:
    if "attention" in sites[0] and options:
        pytest.skip("weights take neither")
    texts = ["the fox", "a lazy dog", "THE FOX", "", "the fox", "a quick brown dog", "", "the  fox"]
    seen: list[int] = []
    handle = tiny.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    asked = {"sites": sites, "tokenizer": tiny.tokenizer, **options}
    store = extract(tiny.model, texts, tmp_path / "acts", **asked)
    handle.remove()
    # the plan has run a text for the widths of its sites, and three to see whether padding is seen
    assert sum(seen) - 4 == len({tuple(store.example(i).input_ids.tolist()) for i in range(len(texts))})
    for number, text in enumerate(texts):
        alone = extract(tiny.model, [text], tmp_path / f"alone-{number}", **asked)
        assert store.example(number).text == text
        for site in store.sites:
            # a batch of another shape reorders the sums of a forward; int8 then rounds to a neighbour
            tolerance = 0.03 if options.get("dtype") == "int8" else 1e-5
            assert torch.allclose(store[site][number].float(), alone[site][0].float(), atol=tolerance)
            assert torch.equal(store[site][0].float(), store[site][4].float())


def test_a_batch_that_does_not_fit_is_run_in_halves_with_the_same_rows(
    tiny: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is halved, which is said, and no later batch of that size is tried again; rows and order stay."""
    shrunk: list[StoreSink] = []
    monkeypatch.setattr(StoreSink, "shrink", lambda sink: shrunk.append(sink))
    texts = ["the quick brown fox", "a dog", "the fox", "a dog", "lazy", "the lazy dog", "", "brown"] * 6
    texts = [text + " ." * (number // 8) for number, text in enumerate(texts)]
    options = ExtractOptions(shard_bytes=25_000, padding_free=False)
    whole = plan_extraction(tiny.model, texts, tmp_path / "whole", options, tokenizer=tiny.tokenizer)
    asked: list[tuple[int, bool]] = []
    refuses = False

    def refuse(_: Any, args: Any, kwargs: Any) -> None:
        num_tokens = kwargs["input_ids"].numel()
        asked.append((num_tokens, len(kwargs["input_ids"]) > 1 and num_tokens > 24))
        if refuses and asked[-1][1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = tiny.model.register_forward_pre_hook(refuse, with_kwargs=True)
    run_extraction(whole)
    tried_whole = sum(too_large for _, too_large in asked)
    plan = plan_extraction(tiny.model, texts, tmp_path / "halved", options, tokenizer=tiny.tokenizer)
    asked.clear()
    refuses = True
    report = run_extraction(plan)
    handle.remove()
    refused = [num_tokens for num_tokens, too_large in asked if too_large]
    # each refusal halves what is tried, so there are fewer than batches that are too large
    assert report.num_halved == len(refused) < tried_whole
    # what lies on the device between calls is given back first
    assert len(shrunk) == report.num_halved
    assert all(later <= earlier // 2 for earlier, later in itertools.pairwise(refused))
    assert f"batches halved for want of memory: {len(refused)}; ask" in str(report)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" tokens")[0] for line in said] == [
        f"layerprobe: cpu: no memory for {num_tokens}" for num_tokens in refused
    ]
    assert said[-1].endswith(f"at once, going on with {refused[-1] // 2}.")
    first, second = layerprobe.open(tmp_path / "whole"), layerprobe.open(tmp_path / "halved")
    for number in range(len(texts)):
        assert torch.equal(second.example(number).input_ids, first.example(number).input_ids)
        for site in first.sites:
            # a batch of another size reorders the sums of a forward
            assert torch.allclose(second[site][number], first[site][number], atol=1e-5)
    for name in ("example", "offsets"):
        for path in (tmp_path / "whole").glob("shard-*"):
            there, here = (read_plainly(place)[1][name] for place in (path, tmp_path / "halved" / path.name))
            assert np.array_equal(there, here)


@pytest.mark.parametrize(("sites", "ran"), [(["layers.0"], 1), (["embeddings"], 0), (["layers.1.ffn.act"], 2), ([], 3)])
def test_a_run_ends_each_forward_after_the_last_asked_site(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, sites: list[str], ran: int
) -> None:
    plan = plan_extraction(tiny, texts, tmp_path / "acts", ExtractOptions(sites=sites or ["layers.*"]))
    counts = [0, 0, 0]

    def count(layer: int) -> Any:
        return lambda *_: counts.__setitem__(layer, counts[layer] + 1)

    encoder: Any = tiny.model.encoder
    handles = [encoder.layer[layer].register_forward_hook(count(layer)) for layer in range(3)]
    run_extraction(plan)
    for handle in handles:
        handle.remove()
    # a hook on the layer itself is not reached where the forward ends inside of it
    finished = ran - 1 if "ffn.act" in str(sites) else ran
    assert [count > 0 for count in counts] == [layer < finished for layer in range(3)]


def test_a_text_that_fits_once_all_else_is_given_back_goes_through(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrunk: list[StoreSink] = []
    monkeypatch.setattr(StoreSink, "shrink", lambda sink: shrunk.append(sink))
    plan = plan_extraction(tiny.model, ["the fox"], tmp_path / "acts", tokenizer=tiny.tokenizer)
    handle = tiny.model.register_forward_pre_hook(lambda *_: None if shrunk else _refuse_memory())
    report = run_extraction(plan)
    handle.remove()
    assert report.is_complete and len(shrunk) == 1 and not report.num_halved
    assert len(layerprobe.open(tmp_path / "acts")) == 1


def test_a_text_that_does_not_fit_alone_is_an_error_of_torch(tiny: LoadedModel, tmp_path: Path) -> None:
    plan = plan_extraction(tiny.model, ["the fox", "a dog"], tmp_path / "acts", tokenizer=tiny.tokenizer)
    handle = tiny.model.register_forward_pre_hook(lambda *_: _refuse_memory())
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        run_extraction(plan)
    handle.remove()


@pytest.mark.parametrize("how", ["cause", "context", "other"])
def test_memory_that_gives_out_behind_another_error_is_known(tiny: LoadedModel, tmp_path: Path, how: str) -> None:
    """While a CUDA graph is recorded it may come so."""
    texts = ["the quick brown fox", "a dog", "the fox", "lazy"]
    plan = plan_extraction(
        tiny.model, texts, tmp_path / "acts", ExtractOptions(padding_free=False), tokenizer=tiny.tokenizer
    )

    def refuse(_: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) == 1:
            return
        try:
            _refuse_memory()
        except torch.OutOfMemoryError as error:
            if how == "context":
                raise RuntimeError("recording failed")  # noqa: B904 - so does what cleans up
            raise RuntimeError("recording failed") from (error if how == "cause" else None)

    handle = tiny.model.register_forward_pre_hook(refuse, with_kwargs=True)
    if how == "other":  # it says that the one has nothing to do with the other
        with pytest.raises(RuntimeError, match="recording failed"):
            run_extraction(plan)
    else:
        assert run_extraction(plan).num_halved
        assert len(layerprobe.open(tmp_path / "acts")) == len(texts)
    handle.remove()


@pytest.mark.parametrize("padding_free", [False, True] if IS_V5 else [False])
def test_no_more_sequences_are_sent_at_once_than_the_kernels_of_a_device_take(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padding_free: bool
) -> None:
    """As many texts as a shard may hold are one more than CUDA's attention takes."""
    texts = [f"{word} {number}" for number in range(12) for word in ("the", "fox", "dog", "the")]
    options = ExtractOptions(sites="layers.*", padding_free=padding_free)
    whole = extract(tiny, texts, tmp_path / "whole", sites="layers.*", padding_free=padding_free)
    plan = plan_extraction(tiny, texts, tmp_path / "cut", options)
    monkeypatch.setitem(calling.MOST_SEQUENCES, "cpu", 5)
    sent: list[int] = []

    def count(_: Any, args: Any, kwargs: Any) -> None:
        sent.append(int(kwargs["position_ids"].eq(0).sum()) if padding_free else len(kwargs["input_ids"]))

    with tiny.model.register_forward_pre_hook(count, with_kwargs=True):
        report = run_extraction(plan)
    # of texts that are the same one is sent
    assert 3 <= max(sent) <= 5 and sum(sent) == 36 and not report.num_halved
    cut = layerprobe.open(tmp_path / "cut")
    for site, number in itertools.product(whole.sites, range(len(texts))):
        torch.testing.assert_close(
            cut[site][number], whole[site][number], atol=1e-5, rtol=1e-5
        )  # batches of other sizes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_that_the_gpu_has_no_memory_for_is_run_in_halves(demo: LoadedModel, tmp_path: Path) -> None:
    model, device = copy.deepcopy(demo.model).cuda(), torch.device("cuda", torch.cuda.current_device())
    texts = [f"the quick brown fox jumps over {number} lazy dogs . " * 8 for number in range(64)]
    options: dict[str, Any] = {"sites": "layers.*", "dtype": "float16", "padding_free": False, "batch_tokens": 8192}
    whole = extract(model, texts, tmp_path / "whole", tokenizer=demo.tokenizer, **options)
    plan = plan_extraction(model, texts, tmp_path / "halved", ExtractOptions(**options), tokenizer=demo.tokenizer)
    torch.cuda.empty_cache()
    held, total = torch.cuda.memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    # room for a few hundred tokens and not for five thousand, for which an FFN takes twice 1,536 numbers each
    torch.cuda.set_per_process_memory_fraction((held + (60 << 20)) / total, device)
    try:
        report = run_extraction(plan)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert report.is_complete and report.num_halved
    halved = layerprobe.open(tmp_path / "halved")
    for site, number in itertools.product(whole.sites, range(len(texts))):
        one, other = halved[site][number].float(), whole[site][number].float()
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)  # float16 of batches of other shapes


def _refuse_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_many_texts_of_the_same_tokens_are_pooled_once(tiny: LoadedModel, tmp_path: Path) -> None:
    pooled: list[int] = []

    def pool(rows: torch.Tensor) -> torch.Tensor:
        pooled.append(len(rows))
        return rows.sum(0)

    texts = ["the fox", "a dog"] * 100
    store = extract(tiny.model, texts, tmp_path / "acts", sites="layers.0", pool=pool, tokenizer=tiny.tokenizer)
    assert len(pooled) <= 4  # two, and what the plan and the sink look at first
    vectors = store["layers.0"].pooled()
    assert len(vectors) == 200
    assert torch.equal(vectors, vectors[:2].repeat(100, 1))


@pytest.mark.slow
def test_a_model_compiled_in_place_and_a_sentence_transformer_are_extracted_too(
    tiny: LoadedModel, tiny_model_folder: Path, tmp_path: Path
) -> None:
    texts = ["the quick brown fox", "a dog"]
    expected = extract(tiny.model, texts, tmp_path / "plain", sites="layers.*", tokenizer=tiny.tokenizer)
    compiled: Any = layerprobe.load_model(str(tiny_model_folder), "cpu").model
    compiled.compile(backend="eager", dynamic=True)
    found = [extract(compiled, texts, tmp_path / "compiled", sites="layers.*", tokenizer=tiny.tokenizer)]
    torch.compiler.reset()
    library = pytest.importorskip("sentence_transformers")
    sentences = library.SentenceTransformer(str(tiny_model_folder), device="cpu")
    found.append(extract(sentences, texts, tmp_path / "sentences", sites="layers.*"))
    for store in found:
        for site in expected.sites:
            for number in range(2):
                # one of the two was saved and loaded, and both may be fused otherwise
                assert torch.allclose(store[site][number], expected[site][number], atol=1e-5)


def test_a_program_that_goes_elsewhere_during_a_run_gets_its_store_where_it_asked(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    away = str(tmp_path / "elsewhere")

    def pool(rows: torch.Tensor) -> torch.Tensor:
        os.chdir(away)
        return rows.mean(0)

    store = extract(tiny, texts, "acts", sites="layers.-1", pool=pool, shard_size=4000)
    assert store.folder == tmp_path / "acts" and str(store.place) == "acts" and store.num_shards > 1
    assert not list((tmp_path / "elsewhere").iterdir())
    assert layerprobe.verify(tmp_path / "acts").ok
