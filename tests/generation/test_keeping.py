"""Decoders that are kept: what comes back is what was fitted, and a damaged or hostile folder is one error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import layerprobe as lp
from layerprobe.errors import FormatError, OptionError, SiteError, StoreError
from planting import plant

SMALL: dict[str, Any] = {
    "width": 32,
    "num_layers": 1,
    "max_length": 8,
    "batch_size": 16,
    "epochs": 2,
    "progress": False,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Texts of three random tokens, which layer 0 says and layer 1 does not."""
    maker = torch.Generator().manual_seed(0)
    ids = torch.cartesian_prod(*[torch.arange(5)] * 3).flatten()
    sites = {
        "layers.0": torch.nn.functional.one_hot(ids, 5) * 9.0,
        "layers.1": torch.randn(len(ids), 6, generator=maker),
    }
    return lp.open(plant(tmp_path_factory.mktemp("planted") / "acts", sites, [3] * (len(ids) // 3), ids=ids + 10))


@pytest.fixture(scope="module")
def found(store: Any) -> Any:
    return lp.fit_decoder(store, **SMALL)


@pytest.fixture
def folder(found: Any, tmp_path: Path) -> Path:
    return found.save(tmp_path / "reader")


def test_what_is_loaded_reads_and_says_what_was_kept(found: Any, store: Any, folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == ["decoders.json", "decoders.safetensors"]
    state = torch.random.get_rng_state()
    again = lp.load_decoder(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.as_dict() == found.as_dict() and again.table() == found.table()
    for site, decoder in found.decoders.items():
        own, other = decoder.state_dict(), again.decoders[site].state_dict()
        assert set(own) == set(other) and all(torch.equal(own[name], other[name]) for name in own)
        assert again.decoders[site].types == decoder.types
        assert again.read(store, site).sequences == found.read(store, site).sequences
    assert again.read(store, -1, 3).site == "layers.1" and again.read(store, 0, 3).site == "layers.0"
    with pytest.raises(SiteError, match=r"layers are 0 to 1"):
        again.read(store, 4, 3)


def test_the_states_of_another_model_are_refused(found: Any, folder: Path, store: Any) -> None:
    said = json.loads((folder / "decoders.json").read_text())
    said["model"] = {"class": "BertModel", "weights_hash": "0" * 32}
    (folder / "decoders.json").write_text(json.dumps(said))
    with pytest.raises(OptionError, match=r"fitted on another model's states \(class 'BertModel' there, None here\)"):
        lp.load_decoder(folder).read(store, "layers.0", 0)


def test_a_damaged_or_hostile_folder_is_one_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no decoders in .*: it has no decoders\.json"):
        lp.load_decoder(tmp_path / "nothing")
    said = json.loads((folder / "decoders.json").read_text())
    spoilt = [
        {"format": "other/1"},
        {"shape": {**said["shape"], "width": 1 << 40}},
        {"shape": {**said["shape"], "max_length": 1 << 40}},
        {"shape": {**said["shape"], "num_layers": 1 << 40}},
        {"shape": {**said["shape"], "num_heads": 0}},
        {"shape": {**said["shape"], "depth": 1}},
        {"types": said["types"][1:]},
        {"types": ["a"] * len(said["types"])},
        {"sites": ["layers.0"]},
        {"sites": ["layers.0", "layers.7"]},
        {"layers": said["layers"][:1]},
        {"baseline": None},
        {"num_train": "many"},
    ]
    for change in spoilt:
        (folder / "decoders.json").write_text(json.dumps({**said, **change}))
        with pytest.raises(FormatError, match=r"holds no whole (decoders|readings)"):
            lp.load_decoder(folder)
    (folder / "decoders.json").write_text(json.dumps(said))
    tensors = load_file(folder / "decoders.safetensors")
    for name in ("layers.0:mean", "layers.1:project.weight"):
        for other in (tensors[name].double(), torch.zeros(2, 2)):
            save_file({**tensors, name: other}, folder / "decoders.safetensors")
            with pytest.raises(FormatError, match="holds no whole decoders"):
                lp.load_decoder(folder)
    save_file({**tensors, "extra": torch.zeros(1)}, folder / "decoders.safetensors")
    with pytest.raises(FormatError, match="tensors are not those of 2 sites"):
        lp.load_decoder(folder)
    whole = (folder / "decoders.safetensors").read_bytes()
    (folder / "decoders.safetensors").write_bytes(whole[:-7])
    with pytest.raises(FormatError, match="holds no whole decoders"):
        lp.load_decoder(folder)


def test_a_folder_that_cannot_be_written_is_one_error(found: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"file is a file\. Choose another folder"):
        found.save(tmp_path / "file")
    (tmp_path / "reader" / "decoders.json").mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot be written"):
        found.save(tmp_path / "reader")


def test_decoders_are_not_kept_in_a_store(found: Any, tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"fingerprint": "f"}')
    for folder in (tmp_path, tmp_path / "below"):
        with pytest.raises(OptionError, match=r"lies in the store .*Choose another folder"):
            found.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]
