"""Models wrapped for several processes: two of them, each records the rows of its own batch."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import layerprobe as lp

SITES = ["embeddings", "layers.*", "layers.*.attention.query"]


def make_model() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertForSequenceClassification(BertConfig(**sizes)).eval()


def make_ids(rank: int) -> Tensor:
    return torch.randint(1, 100, (2 + rank, 5 + rank), generator=torch.Generator().manual_seed(rank))


def wrap_ddp(model: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def wrap_fsdp1(model: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def wrap_fsdp2(model: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {"ddp": wrap_ddp, "fsdp": wrap_fsdp1, "fully_shard": wrap_fsdp2}


def run_rank(rank: int, folder: Path) -> None:
    """What one process does: wrap the model in each way and check it."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"  # whatever the machine is called
    # they find each other by a file: a port that was free may be another's by now
    meeting = (folder / "ranks").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        for name, wrap in WRAPPERS.items():
            check_rank(rank, wrap, folder / f"{name}-{rank}")
    finally:
        torch.distributed.destroy_process_group()
    # threads of gloo may still hold tensors; freed as the interpreter ends, they abort it (pytorch pull 179291)
    os._exit(0)


def check_rank(rank: int, wrap: Callable[[Any], nn.Module], folder: Path) -> None:
    """Probe the calls of this process, into memory and into a store of its own, end early, and follow gradients."""
    ids = make_ids(rank)
    plain, model = make_model(), wrap(make_model())
    with lp.Probe(plain, [*SITES, "layers.*.ffn.act"], gradients=True) as expected:
        logits = plain(ids).logits
        logits.sum().backward()
    with torch.no_grad():
        with lp.Probe(model, [*SITES, "logits"]) as probe:
            assert torch.equal(model(ids).logits, logits)
        for site in expected.calls[0]:
            assert site not in probe.calls[0] or torch.equal(probe[site], expected[site])
        assert torch.equal(probe["logits"], logits)
        with lp.Probe(model, "layers.*", to=folder):
            model(ids)
        assert torch.equal(lp.open(folder)["layers.1"][1], expected["layers.1"][1])  # type: ignore[arg-type]
        with lp.Probe(model, "layers.0", stop=True) as probe:
            assert model(ids) is None
        assert torch.equal(probe["layers.0"], expected["layers.0"])
        assert torch.equal(model(ids).logits, logits)
    with lp.Probe(model, [*SITES, "layers.*.ffn.act"], gradients=True) as probe:
        model(ids).logits.sum().backward()
    for site in expected.gradients:
        assert torch.equal(probe.gradients[site], expected.gradients[site])


@pytest.mark.slow
def test_each_rank_records_its_own_rows(tmp_path: Path) -> None:
    spawn(run_rank, (tmp_path,), nprocs=2)
    for name in WRAPPERS:
        for rank in (0, 1):
            assert len(lp.open(tmp_path / f"{name}-{rank}")) == len(make_ids(rank))
