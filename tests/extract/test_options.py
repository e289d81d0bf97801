"""Arguments of another type than asked for are refused in words, before anything is done."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

import layerprobe as lp
from layerprobe.errors import OptionError, SiteError
from layerprobe.extract.options import ExtractOptions
from layerprobe.models import LoadedModel

extract: Any = lp.extract


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": 3}, "int is no site pattern: give a text such as 'layers.3', or a list of them."),
        ({"sites": {"layers.1": 1}}, "dict is no site pattern"),
        ({"sites": ["layers.1", None]}, "NoneType is no site pattern: give a text such as 'layers.*'"),
        ({"field": 3}, "field is 3: it must be the name of a field, a text such as 'text'"),
        ({"field": None}, "field is None"),
        ({"overwrite": "no"}, "overwrite is 'no': use True or False."),
        ({"overwrite": 1}, "overwrite is 1: use True or False."),
        ({"wait_for_space": "yes"}, "wait_for_space is 'yes': use True or False."),
        ({"progress": "no"}, "progress is 'no': use True or False, or None for only on a terminal."),
        ({"padding_free": "no"}, "padding_free is 'no': use True, False, or None"),
        ({"compile": 1}, "compile=1: no such backend. Use True, False"),
        ({"device": True}, "no device True here"),
    ],
)
def test_options_of_another_type_are_refused(
    tiny_model_folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    extract(str(tiny_model_folder), ["a"], tmp_path / "acts", device="cpu", sites="layers.0")
    before = sorted((file, file.stat().st_mtime_ns) for file in (tmp_path / "acts").rglob("*"))
    with pytest.raises((OptionError, SiteError), match=re.escape(message)):
        extract(str(tiny_model_folder), ["b"], tmp_path / "acts", **{"device": "cpu", **options})
    assert sorted((file, file.stat().st_mtime_ns) for file in (tmp_path / "acts").rglob("*")) == before


def test_numbers_of_numpy_ask_for_what_those_of_python_do(tiny: LoadedModel, tmp_path: Path) -> None:
    sizes = {"max_length": 5, "batch_tokens": 64, "shard_size": 3000, "writers": 2}
    for name, kind in (("numpy", np.int64), ("python", int)):
        options: dict[str, Any] = {option: kind(size) for option, size in sizes.items()}
        lp.extract(tiny, ["a b"] * 30, tmp_path / name, sites="layers.*", **options)
    one, other = (
        sorted(file for file in (tmp_path / name).iterdir() if file.is_file()) for name in ("numpy", "python")
    )
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (None, "to is None: give a path, a URL such as s3://bucket/acts, or a sink such as Moments()."),
        (5, "to is 5: give a path"),
        (["acts"], "to is ['acts']: give a path"),
        (b"acts", "to is b'acts': give a path"),
        ("", "'' names no store"),
        (len, "to is a function: functions go with layerprobe.Probe. Give a path, a URL"),
        (lp.Moments, "to is the class Moments: give one that is made, such as Moments(), a path or a URL."),
        (Path, "to is the class Path: give one that is made"),
    ],
)
def test_what_is_no_place_and_no_sink_is_refused(tiny: LoadedModel, to: Any, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        extract(tiny, ["a"], to)


@pytest.mark.parametrize("model", [3, None, ["demo"]])
def test_what_is_no_model_is_refused(tmp_path: Path, model: Any) -> None:
    for to in (tmp_path / "acts", lp.Moments()):
        with pytest.raises(OptionError, match=r"model is .*: give a model, what load_model gave, or a name"):
            extract(model, ["a"], to)
    assert not list(tmp_path.iterdir())


def test_a_class_of_models_is_refused(tmp_path: Path, tiny: LoadedModel) -> None:
    with pytest.raises(OptionError, match=r"model is the class BertModel: give a model"):
        extract(type(tiny.model), ["a"], tmp_path / "acts")


@pytest.mark.parametrize("sites", ["layers.1", ["layers.1"], ("layers.1",), {"layers.1"}])
def test_sites_may_be_one_pattern_or_several(sites: Any) -> None:
    assert ExtractOptions(sites=sites).sites == ("layers.1",)


def test_default_sites_are_those_that_the_model_has(tiny: LoadedModel, tmp_path: Path) -> None:
    # GPT-2 has no row, and no module that is called so makes its embeddings
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=len(tiny.tokenizer))
    decoder = GPT2LMHeadModel(config)
    layers = ["layers.0", "layers.1"]
    assert extract(decoder, ["a"], tmp_path / "acts", tokenizer=tiny.tokenizer).sites == layers
    counted = extract(decoder, ["a"], lp.Moments(), tokenizer=tiny.tokenizer)
    assert [line["site"] for line in counted.summary()] == layers
    with pytest.raises(SiteError, match="no site 'embeddings' in GPT2LMHeadModel"):
        extract(decoder, ["a"], tmp_path / "other", tokenizer=tiny.tokenizer, sites=["embeddings", "layers.*"])
    assert extract(tiny, ["a"], tmp_path / "both").sites[:2] == ["embeddings", "layers.0"]


def test_no_pattern_at_all_is_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="no site asked of BertModel"):
        extract(tiny, ["a"], tmp_path / "acts", sites=[])
