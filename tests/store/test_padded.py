"""States of stored examples with their mask, against the rows that were written and what a model makes of both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from layerprobe.errors import MissingExample, NonFiniteError, OptionError, SiteError
from planting import plant

WriteStore = Callable[..., Any]


def test_states_and_mask_are_the_stored_rows_padded_on_the_right(write_store: WriteStore) -> None:
    written = write_store(units=((3, 2, 5), (1, 4)))
    for examples in ([2, 0, 4], slice(1, 4), torch.tensor([3, 3]), 1):
        found = lp.open(written.folder).encoder_outputs("layers.0", examples)
        wanted = lp.open(written.folder)["layers.0"][examples if not isinstance(examples, int) else [examples]]
        assert found.states.shape[:2] == found.mask.shape == (len(wanted), max(map(len, wanted)))
        for rows, states, mask in zip(wanted, found.states, found.mask, strict=True):
            assert torch.equal(states[mask.bool()], rows.float())
            assert mask.tolist() == [1] * len(rows) + [0] * (len(mask) - len(rows))
            assert not states[~mask.bool()].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_rows_come_in_the_dtype_that_is_asked_for(write_store: WriteStore, dtype: torch.dtype) -> None:
    store = lp.open(write_store(units=((3, 2),), dtype=dtype).folder)
    assert store.encoder_outputs(0, [0]).states.dtype == torch.float32
    assert torch.equal(store.encoder_outputs(0, [0], dtype).states[0], store["layers.0"][0])


def test_scaled_rows_are_decoded(tiny: Any, texts: list[str], tmp_path: Path) -> None:
    store = lp.extract(tiny, texts, tmp_path / "acts", sites="layers.-1", dtype="int8")
    row = store["layers.2"][1]
    assert not isinstance(row, torch.Tensor)
    assert torch.equal(store.encoder_outputs(-1, 1).states[0], row.float())


def test_a_layer_is_a_number_or_a_site(tmp_path: Path) -> None:
    maker = torch.Generator().manual_seed(0)
    sites = {name: torch.randn(6, 4, generator=maker) for name in ("embeddings", "layers.0", "layers.3")}
    store = lp.open(plant(tmp_path / "acts", sites, [2, 2, 2]))
    for layer, site in ((-1, "layers.3"), (0, "layers.0"), ("layers.-1", "layers.3"), ("embeddings", "embeddings")):
        assert store.encoder_outputs(layer, 0).site == site
    for layer in ("layers.*", 7, 1, True, "pooler"):
        with pytest.raises(SiteError, match=r"2 sites|layers are 0 to 3|layers\.1|a layer is a number|pooler"):
            store.encoder_outputs(layer, 0)
    both = {"encoder.layers.1": sites["layers.0"], "decoder.layers.3": sites["layers.3"]}
    assert lp.open(plant(tmp_path / "both", both, [2, 2, 2])).encoder_outputs(-1, 0).site == "encoder.layers.1"


def test_what_no_decoder_can_read_is_refused(write_store: WriteStore, tmp_path: Path) -> None:
    store = lp.open(write_store().folder)
    with pytest.raises(OptionError, match="'pooler': it holds one vector per example"):
        store.encoder_outputs("pooler", 0)
    with pytest.raises(OptionError, match="example 1 of those asked for has no tokens"):
        store.encoder_outputs(0, [0, 1])
    with pytest.raises(OptionError, match="no example is asked for"):
        store.encoder_outputs(0, [])
    with pytest.raises(OptionError, match=r"as torch.int64: no such states"):
        store.encoder_outputs(0, 0, torch.int64)
    with pytest.raises(MissingExample):
        store.encoder_outputs(0, 9)
    rows = torch.ones(4, 2)
    rows[3] = 1e30
    wide = lp.open(plant(tmp_path / "wide", {"layers.0": rows}, [2, 2], shards=1))
    assert wide.encoder_outputs(0, [0, 1]).states.isfinite().all()
    with pytest.raises(NonFiniteError, match="as float16: example 1"):
        wide.encoder_outputs(0, [0, 1], torch.float16)


def test_a_decoder_that_is_given_both_sees_no_padding(tiny: Any, texts: list[str], tmp_path: Path) -> None:
    """The same example alone and beside a longer one: equal logits with the mask, others without it."""
    import transformers

    torch.manual_seed(0)
    config: Any = transformers.BertConfig(
        **{**tiny.model.config.to_dict(), "is_decoder": True, "add_cross_attention": True, "initializer_range": 0.3}
    )
    decoder: Any = transformers.BertLMHeadModel(config).eval()
    store = lp.extract(tiny, texts, tmp_path / "acts", sites="layers.-1")
    ids = torch.tensor([[2, 7, 9]])
    alone = decoder(input_ids=ids, **store.encoder_outputs(-1, [1]).cross_inputs()).logits
    beside = store.encoder_outputs(-1, [1, 10])
    assert beside.mask[0].sum() < beside.mask[1].sum()
    padded = decoder(input_ids=ids.repeat(2, 1), **beside.cross_inputs()).logits[:1]
    # other sizes of matrices, so other orders of sums
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)
    unmasked = decoder(input_ids=ids.repeat(2, 1), encoder_hidden_states=beside.states).logits[:1]
    assert (unmasked - alone).abs().max() > 1e-3
