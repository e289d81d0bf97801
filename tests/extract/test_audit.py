"""An honest store passes an audit; one that is whole and wrong does not, and the audit says where."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe
from layerprobe.errors import FormatError, OptionError, PlanError, StoreError
from layerprobe.extract import audit as audit_module
from layerprobe.extract.audit import AuditReport, audit
from layerprobe.extract.forward import REORDERED
from layerprobe.models import LoadedModel, load_model
from layerprobe.store.format import commit_shard, read_header
from layerprobe.store.index import ShardInfo
from layerprobe.store.shards import MappedShard, ScaledRows, span_of
from layerprobe.store.verify import verify

extract: Any = layerprobe.extract
ALL = ["embeddings", "layers.*", "layers.1.attention.weights", "layers.0.ffn.act", "pooler"]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor], MappedShard], object]) -> None:
    """Write every shard anew with other tensors, and with checksums that are right."""
    for path in sorted(folder.glob("shard-*")):
        header = read_header(path)
        info = ShardInfo(header.file, header.first_example, header.num_examples, header.num_tokens)
        shard = MappedShard(path, info, header.fingerprint, True)
        tensors = {name: shard.tensor(name).clone() for name in header.tensors}
        change(tensors, shard)
        commit_shard(folder, replace(header), list(tensors.items()))
    assert verify(folder).ok


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", None])
def test_an_honest_store_of_every_kind_of_site_passes(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, dtype: str | None
) -> None:
    extract(tiny, texts, tmp_path / "acts", sites=ALL, dtype=dtype, shard_size=30_000)
    report = audit(tmp_path / "acts", tiny, num_examples=100)
    assert report.ok and report.examples == tuple(range(len(texts))) and report.largest <= 1, report
    assert report.num_values > 10_000 and "12 examples run again" in str(report) and "all as the model" in str(report)


def test_a_store_of_int8_passes(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    extract(tiny, texts, tmp_path / "acts", sites=["layers.*", "pooler"], dtype="int8")
    report = audit(tmp_path / "acts", tiny, num_examples=100)
    assert report.ok, report


@pytest.mark.parametrize("option", [{"split_special_tokens": True}, {"truncation_side": "left"}, {}])
def test_a_tokenizer_set_otherwise_cuts_the_texts_as_it_did(tmp_path: Path, option: dict[str, Any]) -> None:
    model = load_model("demo")
    for name, value in option.items():
        setattr(model.tokenizer, name, value)
    texts = ["It ends with [SEP] here, and then the rain fell on the roof.", "So it goes."]
    store = extract(model, texts, tmp_path / "acts", sites="layers.0", max_length=12)
    assert audit(tmp_path / "acts", model, num_examples=2).ok
    for ordinal, text in enumerate(texts):
        example = store.example(ordinal)
        said = model.tokenizer(text, truncation=True, max_length=12, return_offsets_mapping=True)
        assert store.token_offsets(ordinal) == said["offset_mapping"] and len(example.tokens) == len(said["input_ids"])


@pytest.mark.parametrize("pool", ["cls", "mean", "max", "last"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_pooled_store_passes(tiny: LoadedModel, texts: list[str], tmp_path: Path, pool: str, dtype: str) -> None:
    extract(tiny, texts, tmp_path / "acts", pool=pool, dtype=dtype)
    report = audit(tmp_path / "acts", tiny, num_examples=100)
    assert report.ok, report


def test_the_demo_model_by_the_name_in_the_store_passes(demo: LoadedModel, tmp_path: Path) -> None:
    lines = [f"the {number} " + "quick fox jumps " * (number % 7) for number in range(40)]
    extract(demo, [*lines, "word " * 900], tmp_path / "acts", max_length=60, dtype="float16")
    report = audit(tmp_path / "acts", num_examples=41, device="cpu")
    assert report.ok and len(report.examples) == 41, report


def test_the_examples_are_a_function_of_the_seed(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    extract(tiny, texts, tmp_path / "acts", sites="layers.0", shard_size=5_000)
    chosen = [audit(tmp_path / "acts", tiny, 4, seed).examples for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and all(len(set(examples)) == 4 for examples in chosen)
    # of an unfinished store those that are there
    (tmp_path / "acts" / "index.json").unlink()
    header = read_header(tmp_path / "acts" / "shard-000000.safetensors")
    (tmp_path / "acts" / "shard-000000.safetensors").unlink()
    left = audit(tmp_path / "acts", tiny, 100)
    assert left.ok and left.examples == tuple(range(header.num_examples, len(texts)))


def test_swapped_rows_of_two_examples_are_named(tiny: LoadedModel, tmp_path: Path) -> None:
    extract(tiny, ["the dog", "the fox", "lazy dog .", "brown"], tmp_path / "acts", dtype="float16")

    def swap(tensors: dict[str, Tensor], shard: MappedShard) -> None:
        (_, a, b), (_, c, d) = span_of(shard, 0), span_of(shard, 1)
        rows = tensors["layers.1"].clone()
        tensors["layers.1"][a:b], tensors["layers.1"][c:d] = rows[c:d], rows[a:b]

    rewrite(tmp_path / "acts", swap)
    report = audit(tmp_path / "acts", tiny)
    assert [(problem.example, problem.site) for problem in report.problems] == [(0, "layers.1"), (1, "layers.1")]
    assert "differs by " in report.problems[0].what and "2 examples not as the model makes them" in str(report)


def test_ids_of_another_text_are_named(tiny: LoadedModel, tmp_path: Path) -> None:
    extract(tiny, ["the dog", "the fox", "brown"], tmp_path / "acts", sites="layers.0")

    def swap(tensors: dict[str, Tensor], shard: MappedShard) -> None:
        (_, a, b), (_, c, d) = span_of(shard, 0), span_of(shard, 1)
        for name in ("input_ids", "layers.0"):
            values = tensors[name].clone()
            tensors[name][a:b], tensors[name][c:d] = values[c:d], values[a:b]

    rewrite(tmp_path / "acts", swap)
    problems = audit(tmp_path / "acts", tiny).problems
    assert [(example, site) for example, site, _ in problems] == [
        (0, "input_ids"), (0, "layers.0"), (1, "input_ids"), (1, "layers.0")
    ]  # fmt: skip
    fox = tiny.tokenizer.convert_tokens_to_ids("fox")
    assert problems[0].what.startswith(f"{fox} is stored at 2, the tokenizer makes ")


def test_an_example_cut_elsewhere_is_named(tiny: LoadedModel, tmp_path: Path) -> None:
    extract(tiny, ["the dog", "the quick fox", "brown"], tmp_path / "acts", sites="layers.0")

    def swap(tensors: dict[str, Tensor], shard: MappedShard) -> None:
        order = tensors["example"]
        first, second = shard.position[0], shard.position[1]
        order[first], order[second] = 1, 0
        # the records stay with their ordinals
        texts = {0: b'{"text":"the dog"}', 1: b'{"text":"the quick fox"}', 2: b'{"text":"brown"}'}
        records = [texts[int(ordinal)] for ordinal in order]
        tensors["records"] = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)
        tensors["record_offsets"] = torch.tensor([0, *map(len, records)]).cumsum(0)

    rewrite(tmp_path / "acts", swap)
    assert audit(tmp_path / "acts", tiny).problems == (
        (0, "input_ids", "5 are stored, the tokenizer makes 4 of the text"),
        (1, "input_ids", "4 are stored, the tokenizer makes 5 of the text"),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_layers_off_by_one_are_named_with_the_layer_that_they_are(
    tiny: LoadedModel, tmp_path: Path, dtype: str
) -> None:
    extract(tiny, ["the dog", "the lazy fox"], tmp_path / "acts", dtype=dtype)

    def shift(tensors: dict[str, Tensor], shard: MappedShard) -> None:
        for end in ("", ":scale") if dtype == "int8" else ("",):
            tensors[f"layers.2{end}"] = tensors[f"layers.1{end}"].clone()
            tensors[f"layers.1{end}"] = tensors[f"layers.0{end}"].clone()

    rewrite(tmp_path / "acts", shift)
    problems = audit(tmp_path / "acts", tiny).problems
    assert [(example, site) for example, site, _ in problems] == [
        (0, "layers.1"), (0, "layers.2"), (1, "layers.1"), (1, "layers.2")
    ]  # fmt: skip
    assert problems[0].what.endswith("; it holds what the model makes at layers.0")
    assert problems[1].what.endswith("; it holds what the model makes at layers.1")


def test_a_text_without_tokens_is_compared_by_its_ids(tiny: LoadedModel, tmp_path: Path) -> None:
    extract(tiny, ["", "the"], tmp_path / "acts")
    assert audit(tmp_path / "acts", tiny).ok


def test_values_that_are_not_finite_must_be_where_they_were(tiny: LoadedModel, make_bert: Any, tmp_path: Path) -> None:
    model = make_bert(vocab_size=len(tiny.tokenizer))
    with torch.no_grad():
        model.encoder.layer[1].output.LayerNorm.bias[3] = float("inf")
        model.encoder.layer[0].output.LayerNorm.weight[4] = 1e9
    extract(model, ["the dog"], tmp_path / "acts", tokenizer=tiny.tokenizer, dtype="float16", sites="layers.*")
    assert audit(tmp_path / "acts", model).ok
    rewrite(tmp_path / "acts", lambda tensors, _: tensors["layers.1"][:, 3].fill_(7.0))
    (problem,) = audit(tmp_path / "acts", model).problems
    assert problem.site == "layers.1" and "differs by inf" in problem.what


def test_the_tolerance_is_a_step_of_the_dtype_and_a_share_of_the_largest() -> None:
    made = torch.tensor([[8.0, 1.0, 0.0]])
    allowed = 8 * REORDERED[torch.float32] + 2**-23
    for off, is_right in ((0.9, True), (1.1, False)):
        stored = made + torch.tensor([[0, off * allowed, 0]])
        assert (audit_module._measure(stored, made) <= 1) is is_right
    for dtype, step in ((torch.float16, 2**-10), (torch.bfloat16, 2**-7), (torch.float8_e4m3fn, 2**-3)):
        for steps, is_right in ((1, True), (3, False)):
            stored = (made + torch.tensor([[0, steps * step, 0]])).to(dtype)
            assert (audit_module._measure(stored, made) <= 1) is is_right
    stored = ScaledRows(torch.tensor([[127, 17, 0]], dtype=torch.int8), torch.tensor([8 / 127]))
    assert audit_module._measure(stored, made) <= 1  # 1.0 is 15.875 steps: 16 there, 17 here is one step off
    stored = ScaledRows(torch.tensor([[127, 18, 0]], dtype=torch.int8), torch.tensor([8 / 127]))
    assert audit_module._measure(stored, made) > 1
    assert audit_module._measure(torch.zeros(1, 2), made) == float("inf")


def test_another_model_is_refused_with_the_fields_that_differ(
    tiny: LoadedModel, make_bert: Any, tmp_path: Path
) -> None:
    model = make_bert(vocab_size=len(tiny.tokenizer))
    extract(model, ["the dog"], tmp_path / "acts", tokenizer=tiny.tokenizer)
    other = make_bert(vocab_size=len(tiny.tokenizer))
    with torch.no_grad():
        other.embeddings.word_embeddings.weight[5, 5] += 1e-3
    with pytest.raises(PlanError, match=r"made with another model \(weights_hash: '\w+' there, '\w+' here\)"):
        audit(tmp_path / "acts", other)
    deeper = make_bert(vocab_size=len(tiny.tokenizer), num_hidden_layers=4)
    with pytest.raises(PlanError, match=r"config_hash: .*; weights_hash: "):
        audit(tmp_path / "acts", deeper)
    with pytest.raises(PlanError, match="class: 'BertModel' there, 'BertForMaskedLM' here"):
        audit(tmp_path / "acts", make_bert("BertForMaskedLM", vocab_size=len(tiny.tokenizer)))


def test_a_store_that_names_no_model_asks_for_it(tiny: LoadedModel, make_bert: Any, tmp_path: Path) -> None:
    model = make_bert(vocab_size=len(tiny.tokenizer))
    extract(model, ["the dog"], tmp_path / "acts", tokenizer=tiny.tokenizer)
    with pytest.raises(PlanError, match=r"does not name its model\. Pass the model \(--model\)"):
        audit(tmp_path / "acts")
    assert audit(tmp_path / "acts", model).ok


def test_another_tokenizer_in_the_store_is_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    extract(tiny, ["the dog"], tmp_path / "acts")
    path = tmp_path / "acts" / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"dog"', '"cat"'))
    with pytest.raises(FormatError, match=r"tokenizer\.json: its hash is \w+, store\.json says"):
        audit(tmp_path / "acts", tiny)


def test_what_cannot_be_repeated_is_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    with layerprobe.Probe(tiny.model, "layers.0", to=tmp_path / "probe"):
        tiny.model(**tiny.tokenizer("the dog", return_tensors="pt"))
    with pytest.raises(StoreError, match="a Probe filled it, and nothing in it tells the texts or how the model was"):
        audit(tmp_path / "probe", tiny)
    extract(tiny, ["the dog"], tmp_path / "acts", pool=lambda rows: rows[0])
    with pytest.raises(StoreError, match=r"was pooled by the function '.*', which no store holds"):
        audit(tmp_path / "acts", tiny)
    with pytest.raises(OptionError, match="num_examples is 0: it must be a whole number of at least 1"):
        audit(tmp_path / "acts", tiny, 0)
    extract(tiny, ["the dog"], tmp_path / "rows")
    with pytest.raises(OptionError, match="device goes with a model's name"):
        audit(tmp_path / "rows", tiny, device="cpu")
    model: Any = 3
    with pytest.raises(OptionError, match=r"the model is of type int: .* lp\.load_model"):
        audit(tmp_path / "rows", model)


def test_a_store_without_texts_is_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    extract(tiny, ["the dog"], tmp_path / "acts")

    def forget(tensors: dict[str, Tensor], _: MappedShard) -> None:
        del tensors["records"], tensors["record_offsets"]

    rewrite(tmp_path / "acts", forget)
    with pytest.raises(StoreError, match=r"keeps no text of example 0\. Only its checksums can be checked"):
        audit(tmp_path / "acts", tiny)


def test_a_store_without_examples_proves_nothing(tiny: LoadedModel, tmp_path: Path) -> None:
    extract(tiny, ["the fox"], tmp_path / "acts", sites="layers.0")
    for file in ("index.json", "shard-000000.safetensors"):
        (tmp_path / "acts" / file).unlink()
    with pytest.raises(StoreError, match="has no examples, and nothing is proved of it"):
        audit(tmp_path / "acts", tiny)


def test_the_model_is_left_as_it_was(tiny: LoadedModel, make_bert: Any, tmp_path: Path) -> None:
    model = make_bert(vocab_size=len(tiny.tokenizer)).train()
    extract(model, ["the dog"], tmp_path / "acts", tokenizer=tiny.tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert audit(tmp_path / "acts", model).ok  # no dropout
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_that_was_compiled_in_place_is_audited(tiny: LoadedModel, make_bert: Any, tmp_path: Path) -> None:
    model = make_bert(vocab_size=len(tiny.tokenizer), num_hidden_layers=1)
    model.compile(backend="eager")
    extract(model, ["the dog"], tmp_path / "acts", tokenizer=tiny.tokenizer, sites="layers.0")
    assert audit(tmp_path / "acts", model).ok


@pytest.mark.parametrize("given", [{"num_examples": 0}, {"num_examples": "3"}, {"seed": 1.5}])
def test_what_is_no_count_is_refused(tiny: LoadedModel, tmp_path: Path, given: dict[str, Any]) -> None:
    extract(tiny, ["the dog"], tmp_path / "acts")
    with pytest.raises(OptionError, match="it must be a whole number of at least"):
        audit(tmp_path / "acts", tiny, **given)


def test_a_store_under_a_url_is_audited(tiny: LoadedModel, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    extract(tiny, ["the dog", "the fox"], "memory://audit/acts", dtype="float16")
    report = audit("memory://audit/acts", tiny)
    assert report.ok and len(report.examples) == 2


def test_an_empty_report_counts_in_the_singular() -> None:
    report = AuditReport("acts", (3,), 64, (), 0.02)
    said = "acts: 1 example run again, 64 values compared: all as the model makes them, the largest difference 2.0% of "
    assert str(report).startswith(said)


def test_of_the_tokenizer_in_a_store_only_its_rules_are_read(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    extract(tiny, texts, tmp_path / "acts")
    rules = tmp_path / "acts" / "tokenizer"
    for file in rules.iterdir():
        if file.name != "tokenizer.json":
            file.unlink()
    (rules / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name in ("tokenizer_config.json", "config.json"):
        (rules / name).write_text('{"auto_map": {"AutoTokenizer": ["code.Spy", "code.Spy"]}, "model_type": "none"}')
    assert audit(tmp_path / "acts", tiny, num_examples=100).ok
    assert not (tmp_path / "ran").exists()


def test_the_model_that_a_store_names_is_told_before_it_is_loaded(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(tiny, texts, tmp_path / "acts")
    assert audit(tmp_path / "acts", tiny).ok and not capsys.readouterr().err
    assert audit(tmp_path / "acts").ok
    said = f"layerprobe: loading the model {tiny.name!r}, as {tmp_path / 'acts'} says\n"
    assert capsys.readouterr().err == said
