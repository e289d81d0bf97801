"""What a name means in a store: the same to every function that takes one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from layerprobe.errors import SiteError
from layerprobe.models import LoadedModel
from layerprobe.store.naming import is_stored, match_sites, need_name

STORED = ["embeddings", "layers.0", "layers.1", "layers.1.attention.weights"]
# one layer fewer than the model has: what counts is what is stored
LAST = "layers.1"


@pytest.fixture(scope="module")
def store(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    texts = ["the quick fox", "the lazy dog", "over the fox"]
    return lp.extract(tiny, texts, tmp_path_factory.mktemp("naming") / "acts", sites=STORED)


def test_a_negative_layer_is_the_last_that_is_stored_to_every_function(store: Any, tmp_path: Path) -> None:
    rows: list[torch.Tensor] = list(store[LAST])
    same: list[Callable[[], Any]] = [
        lambda: list(store["layers.-1"]),
        lambda: [example["layers.-1"] for example in store],
        lambda: list(store.where(id=[0, 1, 2]).rows("layers.-1").split([len(one) for one in rows])),
        lambda: list(next(store.rows(sites="layers.-1"))[LAST].split([len(one) for one in rows])),
        lambda: [store.encoder_outputs("layers.-1", k).states[0] for k in range(3)],
        lambda: [one + store["layers.-2"][k] for k, one in enumerate(store.difference("layers.-1", "layers.0"))],
    ]
    for read in same:
        # a difference and its sum are rounded twice in float32
        assert all(torch.allclose(one, other, rtol=0, atol=1e-5) for one, other in zip(read(), rows, strict=True))
    assert lp.export(store, tmp_path / "a.parquet", sites="layers.-1").sites == (LAST,)
    assert [site.site for site in lp.differences(store, sites=["embeddings", "layers.-1"]).sites] == [
        "embeddings",
        LAST,
    ]
    assert store["layers.-1"] is store[LAST]


def test_a_site_that_is_named_twice_comes_once(store: Any) -> None:
    assert list(next(store.rows(sites=["layers.1", "layers.-1"]))) == [LAST]


def test_a_store_has_the_sites_that_it_gives(store: Any) -> None:
    assert all(site in store for site in (*STORED, "layers.-1"))
    assert not any(site in store for site in ("layers.2", "layers.-3", "norm", "layers.*", "", 0, None, ["layers.0"]))


def test_a_site_that_an_example_lacks_is_named_with_those_that_it_has(store: Any) -> None:
    with pytest.raises(SiteError, match=r"no site 'layers\.2' in example 1: it holds embeddings, layers\.0, layers\.1"):
        store.example(1)["layers.2"]


def test_layers_are_counted_by_stack() -> None:
    names = ["encoder.layers.0", "encoder.layers.5", "decoder.layers.2", "decoder.layers.2.cross_attention.out"]
    assert need_name("encoder.layers.-1", names, "acts") == "encoder.layers.5"
    assert need_name("decoder.layers.-1.cross_attention.out", names, "acts") == names[-1]
    # the fifth of six is not stored, and none is taken in its place
    assert not is_stored("encoder.layers.-2", names)


@pytest.mark.parametrize("sites", [3, b"layers.0", 1.5, [["layers.0"]], [None]])
def test_sites_that_are_no_texts_are_refused(sites: Any) -> None:
    with pytest.raises(SiteError, match="site pattern"):
        match_sites(sites, STORED, "acts")


def test_a_store_of_modules_alone_says_how_they_are_named() -> None:
    names = ["module:encoder.layer.0", "module:encoder.layer.0:input"]
    with pytest.raises(
        SiteError, match=r"no site '\*' in it\. Its sites are modules alone: ask for them as 'module:NAME'"
    ):
        match_sites("*", names, "it")
    assert match_sites("module:encoder.layer.*", names, "it") == names[:1]
