"""Patterns against a slow second reading of the grammar, and every way to get one wrong."""

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerprobe.errors import SiteError
from layerprobe.sites.grammar import expand_patterns, list_patterns, parse_pattern
from layerprobe.sites.resolve import map_model

TAILS = ("attention.query", "attention.out", "mid", "ffn.act")


def _names(num_layers: int) -> list[str]:
    blocks = [[*(f"layers.{i}.{tail}" for tail in TAILS), f"layers.{i}"] for i in range(num_layers)]
    return ["embeddings", *itertools.chain.from_iterable(blocks), "pooler"]


NAMES = _names(12)
MODULES = ["embeddings", "encoder.layer.0.output", "encoder.layer.1.output", "pooler.dense"]


def _expand(*patterns: str, num_layers: int = 12) -> list[str]:
    return expand_patterns(list(patterns), _names(num_layers), {"layers": num_layers}, "BertModel 'x'", MODULES)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("embeddings", ["embeddings"]),
        ("layers.3", ["layers.3"]),
        ("layers.-1", ["layers.11"]),
        ("layers.-12", ["layers.0"]),
        ("layers.*", [f"layers.{i}" for i in range(12)]),
        ("layers.8:12", [f"layers.{i}" for i in range(8, 12)]),
        ("layers.-4:", [f"layers.{i}" for i in range(8, 12)]),
        ("layers.:2", ["layers.0", "layers.1"]),
        ("layers.:", [f"layers.{i}" for i in range(12)]),
        ("layers.-2:12", ["layers.10", "layers.11"]),
        ("layers.0,6,11.ffn.act", ["layers.0.ffn.act", "layers.6.ffn.act", "layers.11.ffn.act"]),
        ("layers.6,0,-1,5:7", ["layers.0", "layers.5", "layers.6", "layers.11"]),
        ("layers.3,*", [f"layers.{i}" for i in range(12)]),
        ("layers.2.*", ["layers.2.mid"]),
        ("layers.2.attention.*", ["layers.2.attention.query", "layers.2.attention.out"]),
        ("*", ["embeddings", "pooler"]),
        ("*.*", [f"layers.{i}" for i in range(12)]),
        ("module:pooler.dense", ["module:pooler.dense"]),
        ("module:encoder.layer.*.output", ["module:encoder.layer.0.output", "module:encoder.layer.1.output"]),
        ("module:pooler.dense:input", ["module:pooler.dense:input"]),
    ],
)
def test_pattern_stands_for_names(pattern: str, names: list[str]) -> None:
    assert _expand(pattern) == names


def test_several_patterns_give_the_union_in_running_order_then_modules_as_asked() -> None:
    asked = ["module:pooler.dense", "pooler", "layers.1", "module:embeddings", "layers.0:2", "pooler"]
    assert _expand(*asked) == ["layers.0", "layers.1", "pooler", "module:pooler.dense", "module:embeddings"]


def test_one_pattern_needs_no_list() -> None:
    assert expand_patterns("layers.-1", NAMES, {"layers": 12}, "x") == ["layers.11"]


def test_nothing_is_no_pattern() -> None:
    with pytest.raises(SiteError, match=r"'' is not a site pattern: a pattern is a text such as 'layers\.\*'"):
        parse_pattern("")


@pytest.mark.parametrize("text", ["module:", "module::input"])
def test_module_pattern_without_a_name_is_refused(text: str) -> None:
    with pytest.raises(SiteError, match=r"names no module: write 'module:NAME' or 'module:NAME:input'"):
        parse_pattern(text)


@pytest.mark.parametrize(
    "text", ["Layers.3", "embeddings.3", "layers.3.4", "lay ers", ".", "layers.3.", "pooler,logits"]
)
def test_segment_that_is_neither_name_nor_star_is_refused(text: str) -> None:
    with pytest.raises(
        SiteError, match=r"is neither a name nor '\*'\. Indices, slices and lists stand after 'layers\.'"
    ):
        _expand(text)


@pytest.mark.parametrize("text", ["layers.x", "layers.", "layers.1,", "layers.1:2:3", "layers.1-3", "layers.--1"])
def test_selector_that_selects_nothing_is_refused(text: str) -> None:
    with pytest.raises(SiteError, match=r"selects no layer\. Use an index \(3, -1\), a slice \(8:12, -4:\), a list"):
        _expand(text)


@pytest.mark.parametrize("selector", ["12", "-13", "8:13", "-13:", "0,99"])
def test_layer_out_of_range_is_never_dropped(selector: str) -> None:
    wanted = rf"no site 'layers\.{selector}' in BertModel 'x': layers are 0 to 11\. Use 'layers\.11' or 'layers\.-1'\."
    with pytest.raises(SiteError, match=wanted):
        _expand(f"layers.{selector}")


def test_out_of_range_offers_the_same_place_in_the_last_layer() -> None:
    with pytest.raises(SiteError, match=r"Use 'layers\.11\.ffn\.act' or 'layers\.-1\.ffn\.act'\."):
        _expand("layers.12.ffn.act")


def test_empty_slice_is_refused() -> None:
    with pytest.raises(SiteError, match=r"'layers\.5:5' selects no layer of BertModel 'x': the slice is empty\."):
        _expand("layers.5:5")


def test_no_pattern_at_all_is_refused() -> None:
    with pytest.raises(SiteError, match=r"no site asked of BertModel 'x': pass at least one pattern"):
        _expand()


def test_unknown_stack_is_named() -> None:
    with pytest.raises(
        SiteError, match=r"no site 'encoder\.layers\.3' in BertModel 'x': it has no 'encoder\.layers'\."
    ):
        _expand("encoder.layers.3")


@pytest.mark.parametrize("text", ["layers.0", "layers.-2", "layers.0,2", "layers.2:3"])
def test_a_site_of_other_layers_is_not_offered_as_it_was_asked(text: str) -> None:
    with pytest.raises(SiteError, match=rf"no site '{text}' in acts\. It holds layers\.1, layers\.3\.$"):
        expand_patterns(text, ["embeddings", "layers.1", "layers.3", "layers.3.mid"], {"layers": 4}, "acts")


def test_misspelt_site_gets_the_nearest_with_the_layers_that_were_asked() -> None:
    with pytest.raises(SiteError, match=r"no site 'layers\.3\.ffn\.atc' .*Did you mean 'layers\.3\.ffn\.act'\?"):
        _expand("layers.3.ffn.atc")


def test_site_far_from_any_gets_the_list() -> None:
    with pytest.raises(
        SiteError, match=r"Its sites are embeddings, layers\.i\.attention\.query, .*, layers\.i, pooler\."
    ):
        _expand("zzz")


def test_layers_without_a_selector_is_no_site() -> None:
    with pytest.raises(SiteError, match=r"no site 'layers' in BertModel 'x'\."):
        _expand("layers")


def test_misspelt_module_gets_the_nearest() -> None:
    with pytest.raises(
        SiteError, match=r"no module 'pooler\.dens' in BertModel 'x'\. Did you mean 'module:pooler\.dense:input'"
    ):
        _expand("module:pooler.dens:input")


def test_module_far_from_any_gets_no_suggestion() -> None:
    with pytest.raises(SiteError, match=r"no module 'zzz' in BertModel 'x'\.$"):
        _expand("module:zzz")


def _read_slowly(selector: str, num_layers: int) -> set[int] | None:
    """Second reading of the selector: try each layer against each part; None where a part is out of range."""
    chosen: set[int] = set()
    for part in selector.split(","):
        bounds = [int(bound) for bound in part.split(":") if bound not in ("", "*")]
        most = num_layers if ":" in part else num_layers - 1
        if any(bound < -num_layers or bound > most for bound in bounds):
            return None
        if part == "*":
            matched = set(range(num_layers))
        elif ":" in part:
            start, stop = (int(bound) if bound else None for bound in part.split(":"))
            matched = set(list(range(num_layers))[start:stop])
        else:
            matched = {i for i in range(num_layers) if int(part) in (i, i - num_layers)}
        if not matched:
            return None
        chosen |= matched
    return chosen


_BOUND = st.integers(-30, 30)
_PART = st.one_of(
    st.just("*"),
    _BOUND.map(str),
    st.tuples(st.none() | _BOUND, st.none() | _BOUND).map(
        lambda pair: ":".join("" if bound is None else str(bound) for bound in pair)
    ),
)


@given(parts=st.lists(_PART, min_size=1, max_size=4), num_layers=st.integers(1, 24), tail=st.sampled_from(["", *TAILS]))
def test_selectors_agree_with_a_slow_reading(parts: list[str], num_layers: int, tail: str) -> None:
    selector = ",".join(parts)
    suffix = f".{tail}" if tail else ""
    chosen = _read_slowly(selector, num_layers)
    if chosen is None:
        with pytest.raises(SiteError, match=r"layers are 0 to|the slice is empty"):
            _expand(f"layers.{selector}{suffix}", num_layers=num_layers)
    else:
        expanded = _expand(f"layers.{selector}{suffix}", num_layers=num_layers)
        assert expanded == [f"layers.{i}{suffix}" for i in sorted(chosen)]


@given(st.text(alphabet="layers.embdings0123456789-:,*mo du", max_size=20))
def test_any_text_gives_known_names_or_a_site_error(text: str) -> None:
    try:
        found = _expand(text)
    except SiteError:
        return
    assert found
    assert set(found) <= {*NAMES, *(f"module:{name}{end}" for name in MODULES for end in ("", ":input"))}


@given(names=st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
def test_every_site_name_is_a_pattern_for_itself(names: list[str]) -> None:
    assert _expand(*names) == sorted(names, key=NAMES.index)


def test_negative_index_counts_from_the_end_of_each_stack() -> None:
    names = [f"{half}.layers.{index}" for half, count in (("encoder", 2), ("decoder", 3)) for index in range(count)]
    depths = {"encoder.layers": 2, "decoder.layers": 3}
    assert expand_patterns("*.layers.-1", names, depths, "M") == ["encoder.layers.1", "decoder.layers.2"]
    assert expand_patterns("*.layers.-2:", names, depths, "M") == [
        *("encoder.layers.0", "encoder.layers.1", "decoder.layers.1", "decoder.layers.2")
    ]


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ("layer.0", "layers.0"),
        ("Layers.-1.mid", "layers.-1.mid"),
        ("bert.encoder.layer.3", "layers.3"),
        ("layers[0]", "layers.0"),
        ("blocks[2:4].ffn.act", "layers.2:4.ffn.act"),
    ],
)
def test_a_layer_as_others_write_it_is_understood(text: str, guess: str) -> None:
    with pytest.raises(SiteError, match=rf"Did you mean '{re.escape(guess)}'\?$"):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (None, "NoneType is no site pattern: give a text such as 'layers.*', or a list of them."),
        (3, "int is no site pattern: give a text such as 'layers.3'"),
        (b"layers.0", "bytes is no site pattern"),
        ({"layers.0": 4.0}, "dict is no site pattern"),
        ([["layers.0"]], "list is no site pattern"),
        ([b"x"], "bytes is no site pattern"),
        (["layers.1", -1], "int is no site pattern: give a text such as 'layers.-1'"),
    ],
)
def test_patterns_that_are_no_texts_are_refused(patterns: Any, message: str, tiny_bert: Any) -> None:
    with pytest.raises(SiteError, match=f"^{re.escape(message)}"):
        list_patterns(patterns)
    with pytest.raises(SiteError, match=f"^{re.escape(message)}"):
        map_model(tiny_bert).select(patterns)


@pytest.mark.parametrize("text", ["layers.0.", "0", "layers..mid", "layer."])
def test_what_cannot_be_guessed_is_not(text: str) -> None:
    with pytest.raises(SiteError) as error:
        parse_pattern(text)
    assert "Did you mean" not in str(error.value)
