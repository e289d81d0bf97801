"""Units that the caller opens and ends, a writer that fails, and calls that no store can take."""

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

import layerprobe as lp
from layerprobe.capture import packing, sinks
from layerprobe.capture import probe as probe_module
from layerprobe.capture.packing import StoreSink
from layerprobe.capture.staging import HostBuffer, Room
from layerprobe.capture.units import AnnouncedBatch, OpenUnit, encode_record
from layerprobe.errors import CaptureError, NonFiniteError, StoreError
from layerprobe.store import headers
from layerprobe.store.description import StoredSite
from layerprobe.store.writer import ShardWriter


def _announced_sink(model: Any, folder: Path, shard_bytes: int = 1, **options: Any) -> tuple[StoreSink, ShardWriter]:
    writer = ShardWriter(folder, **options)
    sink = StoreSink(
        folder,
        writer,
        pool=None,
        dtype=None,
        device=torch.device("cpu"),
        shard_bytes=shard_bytes,
        fingerprint="0" * 32,
        stored=[StoredSite("layers.2", "token", torch.float32, 32)],
    )
    return sink, writer


def test_announced_batches_go_where_they_are_told(tiny_bert: Any, tmp_path: Path) -> None:
    sink, writer = _announced_sink(tiny_bert, tmp_path)
    ids = torch.randint(1, 100, (2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.2", to=sink, stop=True):
        sink.begin_unit(4, 10, Room(0, 0), num_truncated=1)
        for ordinals in ([11, 10], [13, 12]):  # the second outgrows the buffer
            real_ids = ids.flatten()[mask.flatten().bool()]
            records = [encode_record({"text": f"text {ordinal}"}) for ordinal in ordinals]
            sink.announce(AnnouncedBatch(ordinals, [4, 2], 4, real_ids, records))
            tiny_bert(ids, mask)
        sink.end_unit()
    assert [(header.unit, header.num_examples, header.num_truncated) for header in writer.committed] == [(4, 4, 1)]
    with safe_open(tmp_path / "shard-000004.safetensors", "pt") as shard:
        assert shard.get_tensor("example").tolist() == [11, 10, 13, 12]
        assert shard.get_tensor("offsets").tolist() == [0, 4, 6, 10, 12]
        first, last = shard.get_tensor("record_offsets")[2:4].tolist()
        assert json.loads(shard.get_tensor("records")[first:last].numpy().tobytes()) == {"text": "text 13"}
        rows = shard.get_tensor("layers.2")
    hidden = tiny_bert(ids, mask).last_hidden_state[mask.bool()]
    assert torch.equal(rows, torch.cat([hidden, hidden]))


def test_unit_that_is_not_ended_is_not_written(tiny_bert: Any, tmp_path: Path) -> None:
    sink, writer = _announced_sink(tiny_bert, tmp_path)
    with lp.Probe(tiny_bert, "layers.2", to=sink):
        sink.begin_unit(0, 0, Room(4, 1))
    assert writer.committed == []
    assert not list(tmp_path.iterdir())


def test_failed_writer_does_not_keep_another_thread_waiting(tiny_bert: Any, tmp_path: Path) -> None:
    sink, writer = _announced_sink(tiny_bert, tmp_path, nonfinite="error")
    raised: list[BaseException] = []

    def call() -> None:
        try:
            tiny_bert(torch.tensor([[1]]))
        except NonFiniteError as error:
            raised.append(error)

    def run() -> None:
        with torch.no_grad(), lp.Probe(tiny_bert, "layers.2", to=sink):
            sink.begin_unit(0, 0, Room(1, 1))
            sink.announce(AnnouncedBatch([0], [1], 1, torch.tensor([1])))
            tiny_bert(torch.tensor([[1]]))
            sink.end_unit()
            writer.close()  # so that the failure is known before the next calls
            for _ in range(2):
                thread = threading.Thread(target=call)
                thread.start()
                thread.join(30)

    tiny_bert.encoder.layer[2].output.LayerNorm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        run()
    assert len(raised) == 2


@pytest.mark.parametrize("wrong", [lambda rows: rows.sum(), lambda rows: rows, lambda _: 1.0])
def test_pool_that_gives_no_vector_is_refused(tiny_bert: Any, tmp_path: Path, wrong: Any) -> None:
    with (
        lp.Probe(tiny_bert, "layers.2", to=tmp_path / "acts", pool=wrong),
        pytest.raises(
            CaptureError, match=r"the pool callable gave .*: it must turn \[T, D\] rows into one vector of floats\."
        ),
    ):
        tiny_bert(torch.tensor([[1, 2, 3]]))


def test_site_of_another_shape_is_refused(make_bert: Any, tmp_path: Path) -> None:
    model = make_bert()
    model.embeddings.register_forward_hook(lambda _, __, output: [model.extra(output[:, None]), None][1])
    model.extra = torch.nn.Identity()
    with (
        lp.Probe(model, "module:extra", to=tmp_path / "acts"),
        pytest.raises(
            CaptureError, match=r"has shape \(1, 1, 3, 32\): a store takes \[batch, positions, width\] or \[batch, wid"
        ),
    ):
        model(torch.tensor([[1, 2, 3]]))


def test_model_called_inside_its_own_call_is_refused(tiny_bert: Any, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])

    def call_again(*_: Any) -> None:
        handle.remove()
        tiny_bert(ids)

    handle = tiny_bert.encoder.layer[1].register_forward_hook(call_again)
    with (
        lp.Probe(tiny_bert, "layers.*", to=tmp_path / "acts"),
        pytest.raises(
            CaptureError, match=r"was made after another call of the model began inside this one: a store takes"
        ),
    ):
        tiny_bert(ids)


def test_folder_that_holds_something_is_refused(tiny_bert: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    probe = lp.Probe(tiny_bert, "layers.2", to=tmp_path)
    with (
        pytest.raises(StoreError, match=r"is not a store: it holds 'notes\.txt'\. Choose an empty or new folder\."),
        probe,
    ):
        raise AssertionError("unreachable")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_units_are_cut_alike_whichever_buffer_comes_free(
    tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "DEFAULT_SHARD_BYTES", 1)  # room for the first call and no more
    lengths = [4, 40, *[4] * 20]
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.0", to=tmp_path / "acts"):
        for length in lengths:
            tiny_bert(torch.ones(1, length, dtype=torch.int64))
    rows = [load_file(path)["layers.0"].shape[0] for path in sorted((tmp_path / "acts").glob("shard-*"))]
    assert rows == lengths


def test_float8_overflow_of_a_call_that_is_cut_short_is_not_counted(make_bert: Any, tmp_path: Path) -> None:
    model = make_bert()
    switch = {"on": False}

    def break_now(*_: Any) -> None:
        if switch["on"]:
            raise ValueError("cut short")

    # one value per token beyond the range of float8
    model.encoder.layer[0].output.LayerNorm.register_forward_hook(
        lambda _, __, output: output.index_fill(2, torch.tensor([3]), 1e3)
    )
    model.encoder.layer[2].register_forward_hook(break_now)
    with torch.no_grad(), lp.Probe(model, ["layers.0", "layers.2"], to=tmp_path / "acts", dtype="float8_e4m3fn"):
        for broken in (False, True, False, True):
            switch["on"] = broken
            if broken:
                with pytest.raises(ValueError, match="cut short"):
                    model(torch.tensor([[7, 8, 9]]))
            else:
                model(torch.tensor([[7, 8, 9]]))
    store = lp.open(tmp_path / "acts")
    assert store.index is not None
    assert store.num_tokens == 6 and store.index["nonfinite"] == {"layers.0": 6}


class _Numbers(TorchDispatchMode):
    """Count how often a device is asked for a number, and so waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.num_asked = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_asked += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_counts_of_all_sites_come_from_the_device_at_once() -> None:
    stored = [StoredSite(f"layers.{number}", "token", torch.float8_e4m3fn, 3) for number in range(4)]
    unit = OpenUnit(0, 0, HostBuffer(stored, Room(1, 1), pinned=False))
    with _Numbers() as numbers:
        assert unit.count_clipped(stored) == {}
        unit.overflow = {index: torch.tensor(count) for index, count in {3: 5, 0: 0, 2: 7}.items()}
        assert unit.count_clipped(stored) == {"layers.3": 5, "layers.2": 7}
    assert numbers.num_asked == 0
    with numbers:
        int(torch.tensor(1))
    assert numbers.num_asked == 1  # it would have been seen


@pytest.mark.parametrize("has_mask", [True, False])
def test_mask_and_ids_of_a_call_are_fetched_together(
    tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_mask: bool
) -> None:
    ids, mask = torch.randint(1, 100, (2, 4)), torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]])
    fetched: list[int] = []
    fetch = sinks.fetch
    monkeypatch.setattr(sinks, "fetch", lambda tensors: [fetched.append(len(tensors)), fetch(tensors)][1])
    with torch.no_grad(), lp.Probe(tiny_bert, ["layers.*"], to=tmp_path / "acts"):
        output = tiny_bert(ids, mask if has_mask else None)
    assert fetched == [1 + has_mask]
    real = mask.bool() if has_mask else torch.ones_like(mask).bool()
    store = lp.open(tmp_path / "acts")
    for ordinal in range(2):
        example = store.example(ordinal)
        assert example.input_ids.tolist() == ids[ordinal][real[ordinal]].tolist()
        rows_TD = example["layers.2"]
        assert isinstance(rows_TD, torch.Tensor)
        assert torch.equal(rows_TD, output.last_hidden_state[ordinal][real[ordinal]])


@pytest.mark.parametrize(("most_examples", "most_tokens"), [(128, 1 << 31), (1 << 24, 300)])
def test_shards_of_a_very_narrow_site_stay_within_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_examples: int, most_tokens: int
) -> None:
    # four bytes an example: what is read is reached before a shard is full
    monkeypatch.setattr(probe_module, "DEFAULT_SHARD_BYTES", 4096)
    for module in (headers, packing):
        monkeypatch.setattr(module, "MOST_EXAMPLES", most_examples)
        monkeypatch.setattr(module, "MOST_TOKENS", most_tokens)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    config.num_labels = 1
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(1, 100, (200, 5))
    with torch.no_grad(), lp.Probe(model, "module:classifier", to=tmp_path / "acts"):
        wanted = torch.cat([model(input_ids=part).logits for part in ids.split(4)])
    store = lp.open(tmp_path / "acts")
    assert len(store) == 200 and store.num_shards > 1
    assert torch.equal(store["module:classifier"].pooled(), wanted)


def test_shards_of_a_very_narrow_site_per_token_stay_within_the_examples_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a token an example, of four bytes: no site has room for examples to tell of
    monkeypatch.setattr(probe_module, "DEFAULT_SHARD_BYTES", 4096)
    for module in (headers, packing):
        monkeypatch.setattr(module, "MOST_EXAMPLES", 128)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    config.num_labels = 1
    model = BertForTokenClassification(config).eval()
    with torch.no_grad(), lp.Probe(model, "module:classifier", to=tmp_path / "acts"):
        wanted = torch.cat([model(input_ids=part).logits for part in torch.randint(1, 100, (400, 1)).split(4)])
    store = lp.open(tmp_path / "acts")
    assert len(store) == 400 and store.num_shards == 4
    values = store["module:classifier"]
    assert torch.equal(torch.cat([values[place] for place in range(400)]), wanted[:, 0])


def test_a_probe_whose_store_was_moved_writes_nothing_into_the_next_one_of_its_name(
    tiny_bert: Any, tmp_path: Path
) -> None:
    folder, ids = tmp_path / "acts", torch.arange(1, 9)[None]
    first, second = tiny_bert, copy.deepcopy(tiny_bert)
    probe = lp.Probe(first, "layers.0", to=folder).__enter__()
    first(input_ids=ids)
    folder.rename(tmp_path / "moved")
    with lp.Probe(second, "layers.0", to=folder):
        second(input_ids=ids[:, :5])
    with pytest.raises(StoreError, match="acts: was moved, replaced or removed while the run was under way"):
        probe.__exit__(None, None, None)
    store = lp.open(folder)
    assert [len(store["layers.0"][0]), len(store)] == [5, 1] and lp.verify(folder).ok
