"""Rows in shards against a forward of each call alone, read back by a stock safetensors reader."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import layerprobe as lp
from forks import run_each
from layerprobe.capture import probe as probe_module
from layerprobe.capture.identity import describe_pool
from layerprobe.capture.select import BatchSelection, take_ids
from layerprobe.errors import CaptureError, StoreError

SITES = ["embeddings", "layers.1.ffn.act", "layers.2", "pooler"]


def _read(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Every example of a store by its ordinal: its ids and its values at each site, shard by shard."""
    examples: dict[int, dict[str, Tensor]] = {}
    kinds = {name: site["kind"] for name, site in json.loads((folder / "store.json").read_text())["sites"].items()}
    for path in sorted(folder.glob("shard-*.safetensors")):
        with safe_open(path, "pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        offsets = tensors["offsets"].tolist()
        for place, ordinal in enumerate(tensors["example"].tolist()):
            assert ordinal not in examples
            rows = slice(offsets[place], offsets[place + 1])
            example = examples[ordinal] = {"input_ids": tensors["input_ids"][rows]}
            for name, kind in kinds.items():
                example[name] = tensors[name][rows if kind == "token" else place]
                if name + ":scale" in tensors:
                    example[name + ":scale"] = tensors[name + ":scale"][rows if kind == "token" else place]
    return examples


def _batches(num: int, seed: int = 3) -> list[dict[str, Tensor]]:
    """Batches that grow and shrink, padded right, left, or with holes."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number in range(num):
        size, length = 1 + number % 4, 2 + (number * 5) % 9
        lengths = torch.randint(1, length + 1, (size, 1), generator=generator)
        places = torch.arange(length) if number % 2 else torch.arange(length - 1, -1, -1)
        mask = (places < lengths).long()
        if number % 3 == 2:
            mask = torch.randint(0, 2, (size, length), generator=generator)
            mask[:, -1] = 1
        input_ids = torch.randint(1, 100, (size, length), generator=generator)
        batches.append({"input_ids": input_ids, "attention_mask": mask})
    return batches


def _expect(model: Any, batches: list[dict[str, Tensor]], sites: Any = SITES) -> list[dict[str, Tensor]]:
    """The same examples from memory, picked token by token."""
    expected = []
    with torch.no_grad(), lp.Probe(model, sites) as probe:
        for batch in batches:
            model(**batch)
    for call, batch in zip(probe.calls, batches, strict=True):
        for b, kept in enumerate(batch["attention_mask"].bool()):
            example = {"input_ids": batch["input_ids"][b][kept]}
            for site in probe.sites:
                value: Any = call[site.name]
                example[site.name] = value[b][kept] if site.kind == "token" else value[b]
            expected.append(example)
    return expected


def _same(got: dict[int, dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert sorted(got) == list(range(len(expected)))
    for ordinal, example in enumerate(expected):
        assert list(got[ordinal]) == list(example)
        for name, value in example.items():
            assert torch.equal(got[ordinal][name], value)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "DEFAULT_SHARD_BYTES", 6000)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_rows_are_what_the_model_made_without_padding(
    tiny_bert: Any, tmp_path: Path, small_shards: None, mode: Any
) -> None:
    batches = _batches(14)
    with mode(), lp.Probe(tiny_bert, SITES, to=tmp_path / "acts") as probe:
        for batch in batches:
            tiny_bert(**batch)
    assert [site.name for site in probe.sites] == SITES
    _same(_read(tmp_path / "acts"), _expect(tiny_bert, batches))
    store = lp.open(tmp_path / "acts")
    assert store.is_complete
    assert store.num_shards > 3
    assert torch.equal(store.example(3).input_ids, _expect(tiny_bert, batches)[3]["input_ids"])


def test_call_without_a_mask_keeps_every_token(tiny_bert: Any, tmp_path: Path) -> None:
    input_ids = torch.randint(1, 100, (2, 5))
    with lp.Probe(tiny_bert, SITES, to=tmp_path / "acts"):
        tiny_bert(input_ids)
    _same(_read(tmp_path / "acts"), _expect(tiny_bert, [{"input_ids": input_ids, "attention_mask": torch.ones(2, 5)}]))


def test_ids_of_half_the_width_are_stored_as_all_ids_are(tiny_bert: Any, tmp_path: Path) -> None:
    batches = _batches(6)[2::3]  # whose masks have holes
    with lp.Probe(tiny_bert, SITES, to=tmp_path / "acts"):
        for batch in batches:
            tiny_bert(input_ids=batch["input_ids"].int(), attention_mask=batch["attention_mask"])
    _same(_read(tmp_path / "acts"), _expect(tiny_bert, batches))


def test_value_of_fewer_positions_than_the_call_is_refused(tiny_bert: Any, tmp_path: Path, batch: Any) -> None:
    """In a later call: the first one's values are held against how they are to lie."""
    shortens = False

    def shorten(module: Any, args: Any, output: Any) -> Any:
        if not shortens:
            return None
        # a tuple before transformers 5
        return (output[0][:, :-1], *output[1:]) if isinstance(output, tuple) else output[:, :-1]

    handle = tiny_bert.encoder.layer[2].register_forward_hook(shorten)
    with lp.Probe(tiny_bert, ["layers.1", "layers.2"], to=tmp_path / "acts"):
        tiny_bert(**batch)
        shortens = True
        with pytest.raises(CaptureError, match="has no row per token"):
            tiny_bert(**batch)
    handle.remove()
    assert len(lp.open(tmp_path / "acts")) == len(batch["input_ids"])


def test_batch_that_a_model_would_pad_by_itself_is_to_be_padded_before(tmp_path: Path) -> None:
    from transformers import LongformerConfig, LongformerModel

    sizes: Any = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    config: Any = LongformerConfig(**sizes, vocab_size=11, max_position_embeddings=20, attention_window=[4, 4])
    model: Any = LongformerModel(config).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 5], [5, 6, 7, 8, 1, 1]])
    match = r"\(2, 8, 8\) has no row .* \(2, 6, 8\)\. .* If the model pads by itself, .* pad_to_multiple_of"
    with (
        torch.no_grad(),
        pytest.raises(CaptureError, match=match),
        lp.Probe(model, "layers.*", to=tmp_path / "refused"),
    ):
        model(ids, attention_mask=(ids != 1).long())
    padded = torch.nn.functional.pad(ids, (0, 2), value=1)
    with torch.no_grad(), lp.Probe(model, "layers.*", to=tmp_path / "acts"):
        output = model(padded, attention_mask=(padded != 1).long(), output_hidden_states=True)
    rows = lp.open(tmp_path / "acts")["layers.1"]
    assert torch.equal(rows[0], output.hidden_states[2][0, :6]) and torch.equal(rows[1], output.hidden_states[2][1, :4])


def test_ids_of_more_than_two_dimensions_are_refused() -> None:
    ids = torch.ones(2, 3, 4, dtype=torch.int64)
    selection = BatchSelection.from_mask(None, (2, 3), torch.device("cpu"))
    with pytest.raises(CaptureError, match=r"input_ids have shape \(2, 3, 4\)"):
        take_ids(ids, selection)


def test_embeddings_as_input_have_no_ids(tiny_bert: Any, tmp_path: Path, batch: Any) -> None:
    embeds = tiny_bert.embeddings.word_embeddings(batch["input_ids"])
    with lp.Probe(tiny_bert, SITES, to=tmp_path / "acts"):
        tiny_bert(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    got, expected = _read(tmp_path / "acts"), _expect(tiny_bert, [batch])
    for example in expected:
        example["input_ids"] = torch.full_like(example["input_ids"], -1)
    _same(got, expected)


def test_choices_are_examples_of_their_own(make_bert: Any, tmp_path: Path) -> None:
    model = make_bert("BertForMultipleChoice")
    flat = _batches(4)[3]
    given = {name: value.unflatten(0, (2, 2)) for name, value in flat.items()}
    with lp.Probe(model, [*SITES, "logits"], to=tmp_path / "acts"):
        model(**given)
    got = _read(tmp_path / "acts")
    logits = model(**given).logits.flatten()
    assert torch.equal(torch.stack([got[i].pop("logits") for i in range(4)])[:, 0], logits)
    _same(got, _expect(model.bert, [flat]))


@pytest.mark.parametrize("pool", ["cls", "mean", "max", "last"])
def test_pooled_store_holds_one_vector_per_example(
    tiny_bert: Any, tmp_path: Path, small_shards: None, pool: str
) -> None:
    batches = _batches(9)
    with torch.no_grad(), lp.Probe(tiny_bert, ["layers.2", "pooler"], to=tmp_path / "acts", pool=pool):
        for batch in batches:
            tiny_bert(**batch)
    got = _read(tmp_path / "acts")
    for ordinal, example in enumerate(_expect(tiny_bert, batches, ["layers.2", "pooler"])):
        rows = example["layers.2"].double()
        wanted = {"cls": rows[0], "last": rows[-1], "mean": rows.mean(0), "max": rows.amax(0)}[pool]
        # the mean of up to ten float32 rows near 1
        torch.testing.assert_close(got[ordinal]["layers.2"].double(), wanted, rtol=0, atol=1e-6)
        assert torch.equal(got[ordinal]["pooler"], example["pooler"])
    assert lp.open(tmp_path / "acts").pool == pool


def test_callable_pool_may_change_the_width(tiny_bert: Any, tmp_path: Path) -> None:
    def ends(rows: Tensor) -> Tensor:
        return torch.cat([rows[0], rows[-1]])

    batches = _batches(3)
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.2", to=tmp_path / "acts", pool=ends):
        for batch in batches:
            tiny_bert(**batch)
    got = _read(tmp_path / "acts")
    for ordinal, example in enumerate(_expect(tiny_bert, batches, "layers.2")):
        assert torch.equal(got[ordinal]["layers.2"], ends(example["layers.2"]))
    assert lp.open(tmp_path / "acts").pool == describe_pool(ends)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_rows_are_cast_on_the_way(tiny_bert: Any, tmp_path: Path, small_shards: None, name: str) -> None:
    batches = _batches(6)
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.*", to=tmp_path / "acts", dtype=name):
        for batch in batches:
            tiny_bert(**batch)
    expected = _expect(tiny_bert, batches, "layers.*")
    for example in expected:
        example.update({site: value.to(getattr(torch, name)) for site, value in example.items() if site != "input_ids"})
    _same(_read(tmp_path / "acts"), expected)


def test_float8_rows_are_those_of_a_cast(tiny_bert: Any, tmp_path: Path) -> None:
    batches = _batches(4)
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.2", to=tmp_path / "acts", dtype="float8_e4m3fn"):
        for batch in batches:
            tiny_bert(**batch)
    got = _read(tmp_path / "acts")
    for ordinal, example in enumerate(_expect(tiny_bert, batches, "layers.2")):
        cast = example["layers.2"].to(torch.float8_e4m3fn)
        assert torch.equal(got[ordinal]["layers.2"].view(torch.uint8), cast.view(torch.uint8))


@pytest.mark.parametrize("pool", [None, "cls"])
def test_int8_rows_come_with_a_scale_each(tiny_bert: Any, tmp_path: Path, small_shards: None, pool: str | None) -> None:
    batches = _batches(6)
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.2", to=tmp_path / "acts", dtype="int8", pool=pool):
        for batch in batches:
            tiny_bert(**batch)
    got = _read(tmp_path / "acts")
    for ordinal, example in enumerate(_expect(tiny_bert, batches, "layers.2")):
        rows = example["layers.2"] if pool is None else example["layers.2"][0]
        values, scale = got[ordinal]["layers.2"], got[ordinal]["layers.2:scale"]
        assert values.dtype == torch.int8
        assert scale.shape == rows.shape[:-1]
        step = rows.abs().amax(-1, keepdim=True) / 127
        assert ((values * scale[..., None] - rows).abs() <= step * 0.5001).all()  # half a step, and float32 rounding


@pytest.mark.parametrize(
    ("dtype", "bad", "count"), [("float16", 1e6, 2), ("float8_e4m3fn", 1e3, 2), ("int8", float("inf"), 1)]
)
def test_values_that_do_not_fit_are_counted_by_site(
    make_bert: Any, tmp_path: Path, dtype: str, bad: float, count: int
) -> None:
    model = make_bert()
    # two positions of one token; an int8 vector shows them in its one scale
    model.encoder.layer[1].output.LayerNorm.register_forward_hook(
        lambda _, __, output: output.index_fill(2, torch.tensor([3, 5]), bad)
    )
    with torch.no_grad(), lp.Probe(model, ["layers.0", "layers.1"], to=tmp_path / "acts", dtype=dtype):
        model(torch.tensor([[7]]))
        model(torch.tensor([[7]]), torch.tensor([[0]]))  # padding is not stored, so not counted
    index = json.loads((tmp_path / "acts" / "index.json").read_text())
    assert index["nonfinite"] == {"layers.1": count}


def test_attention_of_a_call_that_is_cut_short_is_not_stored(
    tiny_bert: Any, tmp_path: Path, small_shards: None
) -> None:
    batches = _batches(9)
    broken = {3, 5, 8}
    switch = {"on": False}

    def break_now(*_: Any) -> None:
        if switch["on"]:
            raise ValueError("cut short")

    tiny_bert.encoder.layer[2].attention.register_forward_hook(break_now)
    with torch.no_grad(), lp.Probe(tiny_bert, SITES, to=tmp_path / "acts"):
        for number, batch in enumerate(batches):
            switch["on"] = number in broken
            if switch["on"]:
                with pytest.raises(ValueError, match="cut short"):
                    tiny_bert(**batch)
            else:
                tiny_bert(**batch)
    switch["on"] = False
    whole = [batch for number, batch in enumerate(batches) if number not in broken]
    _same(_read(tmp_path / "acts"), _expect(tiny_bert, whole))


def test_block_that_raises_leaves_whole_calls_and_no_index(tiny_bert: Any, tmp_path: Path) -> None:
    batches = _batches(3)

    def run() -> None:
        with torch.no_grad(), lp.Probe(tiny_bert, SITES, to=tmp_path / "acts"):
            for batch in batches:
                tiny_bert(**batch)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    _same(_read(tmp_path / "acts"), _expect(tiny_bert, batches))
    assert not lp.open(tmp_path / "acts").is_complete


def test_unit_without_a_whole_call_makes_no_shard(tiny_bert: Any, tmp_path: Path) -> None:
    def odd(rows: Tensor) -> Tensor:
        return rows[:, 0]  # as wide as the example is long

    with torch.no_grad(), lp.Probe(tiny_bert, "layers.2", to=tmp_path / "acts", pool=odd):
        mask = torch.tensor([[1, 1, 0]])
        with pytest.raises(CaptureError, match=r"'layers\.2' gave \(1, 2\) vectors for 1 examples of width 3\."):
            tiny_bert(torch.tensor([[1, 2, 3]]), mask)
    assert not list((tmp_path / "acts").glob("shard-*"))


def test_threads_take_turns_and_no_row_is_lost(tiny_bert: Any, tmp_path: Path, small_shards: None) -> None:
    halves = _batches(8, seed=3), _batches(8, seed=4)

    def run(batches: list[dict[str, Tensor]]) -> None:
        with torch.no_grad():
            for batch in batches:
                tiny_bert(**batch)

    with lp.Probe(tiny_bert, SITES, to=tmp_path / "acts"):
        threads = [threading.Thread(target=run, args=(batches,)) for batches in halves]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    got = _read(tmp_path / "acts")
    expected = [example for batches in halves for example in _expect(tiny_bert, batches)]
    assert sorted(got) == list(range(len(expected)))

    def key(example: dict[str, Tensor]) -> bytes:
        return b"".join(value.contiguous().numpy().tobytes() for value in example.values())

    assert sorted(map(key, got.values())) == sorted(map(key, expected))


def test_failure_of_the_writer_is_raised_with_its_cause(tiny_bert: Any, tmp_path: Path, small_shards: None) -> None:
    batches = _batches(20)

    def run() -> None:
        with torch.no_grad(), lp.Probe(tiny_bert, SITES, to=tmp_path / "acts"):
            tiny_bert(**batches[0])
            (tmp_path / "acts" / "shard-000000.safetensors.tmp").mkdir()
            for batch in batches:
                tiny_bert(**batch)

    with pytest.raises(StoreError, match=r"shard-000000\.safetensors: cannot be written \(Is a directory") as caught:
        run()
    assert isinstance(caught.value.__cause__, IsADirectoryError)


def test_first_call_cut_short_makes_no_empty_shard(tiny_bert: Any, tmp_path: Path, small_shards: None) -> None:
    small, large = torch.ones(1, 1, dtype=torch.long), torch.ones(30, 8, dtype=torch.long)
    broken = tiny_bert.encoder.layer[2].attention.register_forward_hook(lambda *_: 1 / 0)
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.*", to=tmp_path / "acts"):
        for input_ids in (small, small):
            with pytest.raises(ZeroDivisionError):
                tiny_bert(input_ids)
        broken.remove()
        tiny_bert(small)
        tiny_bert(large)
    assert lp.open(tmp_path / "acts").num_shards == 2
    assert len(_read(tmp_path / "acts")) == 31


def test_no_thread_for_the_writer_leaves_no_lock(
    tiny_bert: Any, batch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "layerprobe-writer":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StoreError, match="no thread for writer 1"):
            lp.Probe(tiny_bert, "layers.0", to=tmp_path / "a").__enter__()
    assert not (tmp_path / "a").exists()
    with lp.Probe(tiny_bert, "layers.0", to=tmp_path / "a"):
        tiny_bert(**batch)
    assert len(lp.open(tmp_path / "a")) == len(batch["input_ids"])


def test_attention_of_texts_without_tokens(tiny_bert: Any, tmp_path: Path) -> None:
    ids = torch.ones(1, 3, dtype=torch.int64)
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.0.attention.weights", to=tmp_path / "acts"):
        tiny_bert(input_ids=ids, attention_mask=torch.zeros_like(ids))
        for _ in range(3):
            tiny_bert(input_ids=ids)
    store = lp.open(tmp_path / "acts")
    assert [tuple(weights.shape) for weights in store["layers.0.attention.weights"]] == [(4, 0, 0), *3 * [(4, 3, 3)]]
    assert len(list((tmp_path / "acts").glob("shard-*"))) == 1


@pytest.mark.parametrize("num_calls_before", [0, 1])
def test_a_pool_that_calls_the_model_is_refused(
    tiny_bert: Any, batch: dict[str, Tensor], tmp_path: Path, num_calls_before: int
) -> None:
    """The rows of its call would lie where those of the call around it do; nor may it wait for that one's end."""

    def pool(rows: Tensor) -> Tensor:
        if len(rows) > 1:
            tiny_bert(input_ids=torch.tensor([[5]]))
        return rows[0]

    probe = lp.Probe(tiny_bert, "layers.0", to=tmp_path / "acts", pool=pool)

    def run() -> None:
        with torch.no_grad(), probe:
            for _ in range(num_calls_before):
                tiny_bert(input_ids=torch.tensor([[5], [6]]))
            tiny_bert(**batch)

    with pytest.raises(CaptureError, match="another call of the model began inside this one, from a pool or a hook"):
        run()


def test_a_program_that_goes_elsewhere_within_the_block_fills_the_same_store(
    tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = _batches(3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with lp.Probe(tiny_bert, SITES, to="acts"):
        for batch in batches:
            tiny_bert(**batch)
            monkeypatch.chdir(tmp_path / "elsewhere")
    assert not list((tmp_path / "elsewhere").iterdir()) and lp.open(tmp_path / "acts").is_complete
    assert len(_read(tmp_path / "acts")) == sum(len(batch["input_ids"]) for batch in batches)


def test_a_process_forked_within_the_block_leaves_it_and_the_store_alone(tmp_path: Path) -> None:
    setup = """
import os
import torch
import layerprobe as lp
from transformers import BertConfig, BertModel
config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
model = BertModel(config).eval()
"""
    piece = """
torch.set_num_threads(1)
folder, leave, child = {folder!r}, {leave!r}, None
try:
    with lp.Probe(model, "layers.*", to=folder):
        model(input_ids=torch.tensor([[1, 2, 3]]))
        if (child := os.fork()) == 0:
            exec(leave)
        else:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            model(input_ids=torch.tensor([[4, 5]]))
except BaseException as error:
    print(type(error).__name__, error, flush=True)
if child == 0:
    os._exit(7)
assert lp.verify(folder).ok and len(lp.open(folder)) == 2
"""
    leaves = ["pass", "model(input_ids=torch.tensor([[1]]))", "1 / 0", "raise SystemExit(3)"]
    pieces = [piece.format(folder=str(tmp_path / str(place)), leave=leave) for place, leave in enumerate(leaves)]
    refused = "StoreError .*: only the process that opened it writes there, and this one was forked from that"
    says = [refused, refused, "ZeroDivisionError", "SystemExit 3"]
    for one, said in zip(run_each(setup, pieces), says, strict=True):
        assert one.status == 0 and re.match(said, one.said), one.said
