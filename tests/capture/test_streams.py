"""Values from a device to a store: the same on a GPU as on the CPU, in every dtype, from any stream and any device.

What is asked of a store here is asked on the CPU too, so that the questions are known to be right without a GPU.
"""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.capture.casting import DTYPES, cast_into
from layerprobe.capture.streams import CudaStreams, PlainCopies
from layerprobe.capture.target import Target
from layerprobe.store.shards import ScaledRows

extract: Any = lp.extract
HAS_CUDA = torch.cuda.is_available()
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")]
NEEDS_TWO = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


def assert_cast(got: Any, rows: Tensor, dtype: torch.dtype) -> None:
    """Hold stored rows against the model's own, cast on the CPU."""
    rows = rows.float().cpu()
    if dtype == torch.int8:
        assert isinstance(got, ScaledRows)
        wanted = Target(torch.empty(rows.shape, dtype=dtype), torch.empty(rows.shape[:-1]))
        cast_into(wanted, rows)
        assert wanted.scale is not None
        torch.testing.assert_close(got.scale, wanted.scale, rtol=1e-6, atol=0)  # one division
        # what lies between two steps may be rounded to either where the division is another
        assert (got.values.int() - wanted.values.int()).abs().max() <= 1
    else:
        assert got.dtype == dtype and torch.equal(got.float(), rows.to(dtype).float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", DTYPES)
def test_rows_of_a_store_are_the_models_hidden_states_in_every_dtype(
    make_bert: Any, tmp_path: Path, device: str, name: str
) -> None:
    model = make_bert().to(device)
    torch.manual_seed(0)
    batches = []
    for number in range(6):  # stages and buffers take turns, and grow
        mask = (torch.arange(9 + number) < torch.tensor([9 + number, 5, 1 + number])[:, None]).long()
        batches.append((torch.randint(1, 100, mask.shape), mask))
    states: list[Tensor] = []
    with torch.no_grad(), lp.Probe(model, ["embeddings", "layers.*"], to=tmp_path / "acts", dtype=name):
        for ids, mask in batches:
            made = model(ids.to(device), mask.to(device), output_hidden_states=True).hidden_states
            stacked = torch.stack(made, dim=2)
            states += [stacked[row, :length] for row, length in enumerate(mask.sum(1).tolist())]
    store = lp.open(tmp_path / "acts")
    assert len(store) == len(states)
    for number, site in enumerate(["embeddings", "layers.0", "layers.1", "layers.2"]):
        for ordinal, state in enumerate(states):
            assert_cast(store[site][ordinal], state[:, number], DTYPES[name])
    ids = [row[: int(real.sum())] for batch, mask in batches for row, real in zip(batch, mask, strict=True)]
    assert all(store.example(n).input_ids.tolist() == one.tolist() for n, one in enumerate(ids))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("options", [{"pool": "mean"}, {"pool": "cls"}, {"keep": 0.4}], ids=str)
def test_a_run_that_pools_or_keeps_a_part_stores_what_the_cpu_does(
    tiny: Any, texts: list[str], tmp_path: Path, device: str, name: str, options: dict[str, Any]
) -> None:
    model = copy.deepcopy(tiny.model).to(device)
    how: dict[str, Any] = {"tokenizer": tiny.tokenizer, "sites": "layers.*", "padding_free": False, **options}
    store = extract(model, texts, tmp_path / device, dtype=name, **how)
    exact = extract(tiny.model, texts, tmp_path / "exact", **how)
    assert store.sites == exact.sites and len(store) == len(exact)
    # a step of the dtype, and of int8 one of 127 from nought to values of up to 4
    step = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 1e-2, "float8_e4m3fn": 7e-2, "int8": 1e-4}[name]
    least = {"float8_e4m3fn": 2e-3, "int8": 4 / 127}.get(name, 1e-4)
    for site in exact.sites:
        for ordinal in range(len(texts)):
            got, wanted = store[site][ordinal], exact[site][ordinal]
            assert store.example(ordinal).input_ids.tolist() == exact.example(ordinal).input_ids.tolist()
            torch.testing.assert_close(got.float(), wanted, rtol=step, atol=least)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_a_call_in_a_side_stream_is_stored_whole(make_bert: Any, tmp_path: Path) -> None:
    model, side = make_bert().cuda(), torch.cuda.Stream()
    ids = [torch.randint(1, 100, (4, 16), device="cuda") for _ in range(8)]
    large = torch.ones(4096, 4096, device="cuda")
    states: list[Tensor] = []
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side), lp.Probe(model, "layers.2", to=tmp_path / "acts"):
        for one in ids:
            large = large @ large  # the stream has something to do before each call
            states.append(model(one).last_hidden_state)
        assert torch.cuda.current_stream() == side
    torch.cuda.synchronize()
    rows = torch.cat(states).cpu()
    store = lp.open(tmp_path / "acts")
    assert all(torch.equal(store["layers.2"][ordinal], rows[ordinal]) for ordinal in range(32))  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_what_float8_clips_is_counted_over_calls_in_streams_that_wait_for_nobody(
    make_bert: Any, tmp_path: Path, device: str
) -> None:
    model = make_bert()
    model.embeddings.LayerNorm.weight.data.mul_(400)
    model.to(device)
    batches = [torch.randint(1, 100, (2, 16)).to(device) for _ in range(8)]
    large = torch.ones(1024, 1024, device=device)
    with torch.no_grad():
        states = torch.stack([model.embeddings(ids) for ids in batches])
    wanted = int((states.abs() > torch.finfo(torch.float8_e4m3fn).max).sum())
    with torch.no_grad(), lp.Probe(model, "embeddings", to=tmp_path / "acts", dtype="float8_e4m3fn"):
        for ids in batches:
            with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext():
                _ = large @ large  # the stream has something to do before each call
                model(ids)
    assert wanted and json.loads((tmp_path / "acts" / "index.json").read_text())["nonfinite"] == {"embeddings": wanted}


@pytest.mark.parametrize("device", [pytest.param("cuda:1", marks=NEEDS_TWO)])
def test_a_model_on_another_device_than_the_current_one(
    tiny: Any, texts: list[str], tmp_path: Path, device: str
) -> None:
    model, before = copy.deepcopy(tiny.model).to(device), torch.cuda.current_device()
    assert before == 0
    ids = torch.randint(1, 40, (3, 8), device=device)
    with torch.no_grad(), lp.Probe(model, ["layers.*"], to=tmp_path / "probe", dtype="float16"):
        output = model(ids)
        assert torch.cuda.current_device() == before
    store = lp.open(tmp_path / "probe")
    for ordinal in range(3):
        assert_cast(store["layers.2"][ordinal], output.last_hidden_state[ordinal], torch.float16)
    made = extract(model, texts, tmp_path / "made", tokenizer=tiny.tokenizer, sites="layers.*")
    exact = extract(tiny, texts, tmp_path / "exact", sites="layers.*")
    assert torch.cuda.current_device() == before
    for ordinal in range(len(texts)):
        # two kinds of devices, whose sums go in other orders
        torch.testing.assert_close(made["layers.2"][ordinal], exact["layers.2"][ordinal], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_an_event_of_cuda_has_passed_once_what_came_before_it_is_done() -> None:
    streams = CudaStreams(torch.device("cuda", torch.cuda.current_device()))
    large = torch.ones(8192, 8192, device="cuda")
    large = large @ large
    torch.cuda.synchronize()
    for _ in range(20):
        large = large @ large
    made = streams.record()
    assert not streams.has_passed(made)
    host = torch.empty(large.shape, pin_memory=True)
    streams.wait(streams.copy(host, large, made))
    assert streams.has_passed(made) and torch.equal(host, large.cpu())


def test_copies_that_wait_by_themselves_have_passed_when_they_return() -> None:
    streams, target = PlainCopies(), torch.zeros(3)
    made = streams.record()
    copied = streams.copy(target, torch.ones(3), made)
    assert streams.has_passed(made) and streams.has_passed(copied)
    assert torch.equal(target, torch.ones(3))
