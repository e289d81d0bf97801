"""Sinks that keep sums: each against numpy in float64, in two passes over all rows at once."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

import layerprobe as lp
from layerprobe.capture.statistics import RowSink
from layerprobe.errors import CaptureError, OptionError, SiteError

SITES = ["embeddings", "layers.*", "layers.1.ffn.act", "pooler"]
# of float64 sums in another order, and of one pass instead of two
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-9}
SINKS: dict[str, Callable[[], RowSink[Any]]] = {
    "moments": lp.Moments,
    "histogram": lambda: lp.Histogram(-2, 2, 40),
    "covariance": lp.Covariance,
    "cross": lambda: lp.CrossCovariance("consecutive"),
    "top": lambda: lp.TopK(4, context=2),
}


def make_batches(num: int = 5) -> list[dict[str, Tensor]]:
    """Batches of other shapes, padded on either side, with a mask with holes, without a mask."""
    maker = torch.Generator().manual_seed(3)
    batches = []
    for number in range(num):
        length = 4 + 2 * number
        ids = torch.randint(1, 100, (3, length), generator=maker)
        lengths = torch.tensor([length, length // 2, 1])
        mask = (torch.arange(length) < lengths[:, None]).long()
        mask = [mask, mask.flip(1), torch.ones_like(mask), mask][number % 4]
        if number == 3:
            mask[0, 2] = 0
        batches.append({"input_ids": ids, **({} if number == 2 else {"attention_mask": mask})})
    return batches


def run(model: Any, sink: Any, batches: Sequence[dict[str, Tensor]], sites: Any = SITES) -> None:
    with torch.no_grad(), lp.Probe(model, sites, to=sink):
        for batch in batches:
            model(**batch)


def collect(model: Any, batches: Sequence[dict[str, Tensor]], sites: Any = SITES) -> dict[str, np.ndarray]:
    """Every row of real tokens, by site, from values kept in memory."""
    with torch.no_grad(), lp.Probe(model, sites) as probe:
        for batch in batches:
            model(**batch)
    rows: dict[str, list[Tensor]] = {}
    for call, batch in zip(probe.calls, batches, strict=True):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for site, value in call.items():
            assert isinstance(value, Tensor)
            rows.setdefault(site, []).append(value[mask] if value.ndim == 3 else value)
    return {site: torch.cat(parts).double().numpy() for site, parts in rows.items()}


@pytest.fixture
def model(make_bert: Callable[..., Any]) -> Any:
    """Values far from zero in one dimension, so that a sum of squares would lose digits."""
    made = make_bert()
    with torch.no_grad():
        made.encoder.layer[1].output.LayerNorm.bias[3] = 1e4
    return made


def test_moments_are_those_of_all_rows_at_once(model: Any) -> None:
    batches, moments = make_batches(), lp.Moments()
    run(model, moments, batches)
    for site, rows in collect(model, batches).items():
        found = moments[site]
        mean = rows.mean(0)
        centred = rows - mean
        variance = (centred**2).mean(0)
        norms = np.linalg.norm(rows, axis=1)
        assert (found.count, found.nonfinite) == (len(rows), 0)
        np.testing.assert_allclose(found.mean, mean, **CLOSE)
        np.testing.assert_allclose(found.variance, variance, **CLOSE)
        np.testing.assert_allclose(found.skewness, (centred**3).mean(0) / variance**1.5, **CLOSE)
        np.testing.assert_allclose(found.kurtosis, (centred**4).mean(0) / variance**2, **CLOSE)
        assert np.array_equal(found.min, rows.min(0)) and np.array_equal(found.max, rows.max(0))
        np.testing.assert_allclose(
            [found.norm_mean, found.norm_std, found.norm_min, found.norm_max],
            [norms.mean(), norms.std(), norms.min(), norms.max()],
            **CLOSE,
        )
    assert "layers.1.ffn.act" in str(moments)


def test_covariance_is_that_of_all_rows_at_once(model: Any) -> None:
    batches, covariance = make_batches(), lp.Covariance()
    run(model, covariance, batches)
    for site, rows in collect(model, batches).items():
        found = covariance[site]
        assert found.count == len(rows)
        np.testing.assert_allclose(found.mean, rows.mean(0), **CLOSE)
        np.testing.assert_allclose(found.covariance, np.cov(rows.T, bias=True), **CLOSE)
        np.testing.assert_allclose(found.correlation, np.corrcoef(rows.T), rtol=1e-6, atol=1e-6)


def linear_cka(one: np.ndarray, other: np.ndarray) -> float:
    """By the kernels of the rows, n x n, and not by covariances."""
    kernels = [rows @ rows.T for rows in (one - one.mean(0), other - other.mean(0))]
    return float((kernels[0] * kernels[1]).sum() / np.linalg.norm(kernels[0]) / np.linalg.norm(kernels[1]))


def test_cross_covariance_gives_the_cka_of_the_rows(model: Any) -> None:
    sites = ["embeddings", "layers.0", "layers.1.ffn.act", "layers.2"]
    batches, between = make_batches(), lp.CrossCovariance()
    run(model, between, batches, sites)
    rows = collect(model, batches, sites)
    assert between.sites == list(rows) and len(between.pairs) == 6
    for one in rows:
        for other in rows:
            if one != other:
                centred = [rows[site] - rows[site].mean(0) for site in (one, other)]
                expected = centred[0].T @ centred[1] / len(centred[0])
                np.testing.assert_allclose(between.cross(one, other), expected, **CLOSE)
            assert between.cka(one, other) == pytest.approx(linear_cka(rows[one], rows[other]), rel=1e-6)
    assert str(between).count("\n") == 5


@pytest.mark.parametrize(
    ("pairs", "kept"),
    [
        ("consecutive", [("layers.0", "layers.1"), ("layers.1", "layers.2")]),
        ([("layers.2", "layers.0")], [("layers.2", "layers.0")]),
    ],
)
def test_only_asked_pairs_are_kept(model: Any, pairs: Any, kept: list[tuple[str, str]]) -> None:
    between = lp.CrossCovariance(pairs)
    run(model, between, make_batches(), "layers.*")
    assert between.pairs == kept
    assert 0 < between.cka(*kept[0]) == pytest.approx(between.cka(*reversed(kept[0])))
    with pytest.raises(SiteError, match=r"layers.1 layers.1"):
        between.cross("layers.1", "layers.1")
    assert "1.0" in str(between)


def test_histogram_counts_as_numpy_does(model: Any) -> None:
    batches, histogram = make_batches(), lp.Histogram(-1.5, 1.5, 30)
    run(model, histogram, batches)
    for site, rows in collect(model, batches).items():
        found = histogram[site]
        counts, _ = np.histogram(rows, found.edges.numpy())
        assert np.array_equal(found.counts, counts)
        assert (found.below, found.above) == ((rows < -1.5).sum(), (rows > 1.5).sum())


def test_quantiles_are_within_a_bin(model: Any) -> None:
    batches, histogram = make_batches(), lp.Histogram(-8, 8, 1600)
    run(model, histogram, batches, "layers.0")
    rows = collect(model, batches, "layers.0")["layers.0"].flatten()
    for share in (0.0, 0.01, 0.25, 0.5, 0.9, 1.0):
        assert histogram["layers.0"].quantile(share) == pytest.approx(np.quantile(rows, share), abs=0.011)
    narrow = lp.Histogram(0, 0.001, 1)
    run(model, narrow, batches, "layers.0")
    assert narrow["layers.0"].quantile(0.01) == float("-inf") and narrow["layers.0"].quantile(0.99) == float("inf")
    with pytest.raises(OptionError, match=r"quantile 1.5"):
        narrow["layers.0"].quantile(1.5)


def test_an_edge_belongs_where_numpy_puts_it() -> None:
    values = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, -1.5]]).T
    histogram = feed(lp.Histogram(-1, 1, 4), values)
    assert histogram["site"].counts.tolist() == np.histogram(values, np.linspace(-1, 1, 5))[0].tolist()
    assert (histogram["site"].below, histogram["site"].above) == (1, 1)
    assert np.isnan(feed(lp.Histogram(), torch.tensor([[float("nan")]]))["site"].quantile(0.5))


def feed(sink: Any, *batches: Tensor) -> Any:
    """Give rows to a sink as a call of a model would, one row per text."""
    from layerprobe.capture.calls import Call, Context
    from layerprobe.sites.resolve import Site

    sink.open([Site("site", "", "output", "example", batches[0].shape[1])])
    for values in batches:
        call = Call([0], {0: Context(None, None, (len(values), 1))})
        sink.begin(call)
        sink.receive(call, 0, values)
        sink.finish(call)
    sink.close(None)
    return sink


def expect_top(rows: np.ndarray, unit: int, k: int, magnitude: bool) -> list[float]:
    column = rows[:, unit]
    order = np.argsort(-(np.abs(column) if magnitude else column), kind="stable")[:k]
    return column[order].tolist()


@pytest.mark.parametrize("magnitude", [False, True])
def test_top_tokens_are_those_of_a_sort_over_everything(model: Any, magnitude: bool) -> None:
    site, batches, top = "layers.1.ffn.act", make_batches(), lp.TopK(7, context=2, magnitude=magnitude)
    run(model, top, batches, site)
    rows = collect(model, batches, site)[site]
    texts = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(
            batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"])), strict=True
        )
    ]
    starts = np.cumsum([0, *map(len, texts)])
    for unit in range(64):
        found = top[site].unit(unit)
        assert [entry.value for entry in found] == expect_top(rows, unit, 7, magnitude)
        for entry in found:
            ids = texts[entry.example]
            assert rows[starts[entry.example] + entry.position, unit] == entry.value
            assert ids[entry.position] == entry.token_id
            assert list(entry.before) == ids[max(0, entry.position - 2) : entry.position]
            assert list(entry.after) == ids[entry.position + 1 : entry.position + 3]


def test_fewer_tokens_than_are_kept() -> None:
    top = feed(lp.TopK(5), torch.tensor([[1.0, -1.0], [3.0, float("inf")]]), torch.tensor([[2.0, 0.0]]))
    assert [(entry.value, entry.example) for entry in top["site"].unit(0)] == [(2.0, 2), (1.0, 0)]
    assert [entry.token_id for entry in top["site"].unit(-1)] == [-1, -1]
    with pytest.raises(OptionError, match="no unit 2"):
        top["site"].unit(2)


def test_rows_that_are_not_finite_are_counted_and_left_out() -> None:
    good = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    bad = good.clone()
    bad[2, 1], bad[5, 3] = float("nan"), float("-inf")
    kept = bad[[0, 1, 3, 4, 6, 7, 8]]
    moments = feed(lp.Moments(), bad, bad[2:3])
    assert (moments["site"].count, moments["site"].nonfinite) == (7, 3)
    np.testing.assert_allclose(moments["site"].variance, kept.double().var(0, correction=0), **CLOSE)
    assert torch.equal(moments["site"].max, kept.double().amax(0))
    np.testing.assert_allclose(moments["site"].norm_min, kept.double().norm(dim=1).min(), **CLOSE)
    covariance = feed(lp.Covariance(), bad)
    np.testing.assert_allclose(covariance["site"].covariance, np.cov(kept.double().T, bias=True), **CLOSE)
    histogram = feed(lp.Histogram(), bad)
    assert int(histogram["site"].counts.sum()) == kept.numel() and histogram["site"].nonfinite == 2


def same(one: Any, other: Any) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", SINKS)
def test_parts_merge_into_the_whole(model: Any, name: str) -> None:
    batches = make_batches(6)
    whole, first, second = SINKS[name](), SINKS[name](), SINKS[name]()
    run(model, whole, batches, "layers.*")
    run(model, first, batches[:2], "layers.*")
    run(model, second, batches[2:], "layers.*")
    first.merge(second)
    one, other = first.state_dict(), whole.state_dict()
    assert list(one) == list(other)
    for key in other:
        np.testing.assert_allclose(one[key], other[key], **CLOSE)


@pytest.mark.parametrize("name", SINKS)
def test_state_goes_through_a_file_and_on(model: Any, name: str, tmp_path: Path) -> None:
    batches = make_batches(6)
    whole, saved, loaded = SINKS[name](), SINKS[name](), SINKS[name]()
    run(model, whole, batches, "layers.*")
    run(model, saved, batches[:3], "layers.*")
    safetensors.torch.save_file(saved.state_dict(), tmp_path / "state.safetensors")
    loaded.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
    assert loaded.sites == saved.sites and same(loaded, saved)
    run(model, loaded, batches[3:], "layers.*")
    run(model, saved, batches[3:], "layers.*")
    assert same(loaded, whole) and same(saved, whole)


def test_what_does_not_fit_is_refused_and_changes_nothing(model: Any) -> None:
    batches = make_batches(2)
    sinks = {name: make() for name, make in SINKS.items()}
    for sink in sinks.values():
        run(model, sink, batches, "layers.*")
    moments, top = sinks["moments"], sinks["top"]
    before = moments.state_dict()
    with pytest.raises(OptionError, match="a Covariance cannot be merged into a Moments"):
        moments.merge(sinks["covariance"])
    with pytest.raises(OptionError, match="Load it into a sink of the kind"):
        moments.load_state_dict(sinks["covariance"].state_dict())
    other = lp.Moments()
    run(model, other, batches, ["layers.0"])
    feed(other, torch.zeros(2, 3))
    moments.merge(other)
    third = feed(lp.Moments(), torch.zeros(2, 5))
    run(model, third, batches, ["layers.0"])
    before = moments.state_dict()
    with pytest.raises(OptionError, match=r"'site' is \(3,\) here and \(5,\) there"):
        moments.merge(third)
    assert all(torch.equal(tensor, before[name]) for name, tensor in moments.state_dict().items())
    with pytest.raises(OptionError, match="other options"):
        top.merge(lp.TopK(5, context=2))
    with pytest.raises(OptionError, match="other options"):
        sinks["histogram"].load_state_dict(lp.Histogram(-2, 2, 41).state_dict())
    with pytest.raises(SiteError, match=r"no 'layers.7' in this Moments: it has layers.0"):
        moments["layers.7"]
    assert "layers.1" in moments and "layers.7" not in moments


def test_options_that_do_not_exist_are_refused(make_bert: Callable[..., Any], model: Any) -> None:
    with pytest.raises(OptionError, match="of 0 bins"):
        lp.Histogram(bins=0)
    with pytest.raises(OptionError, match="from -inf to 1"):
        lp.Histogram(float("-inf"), 1)
    with pytest.raises(OptionError, match="from 1 to 1"):
        lp.Histogram(1, 1)
    with pytest.raises(OptionError, match="the top 0"):
        lp.TopK(0)
    three: Any = np.int64(3)
    for sink in (lp.Histogram(bins=three), lp.TopK(three, context=three)):  # a whole number of numpy is one
        run(model, sink, make_batches(1), "layers.1")
    no_flag: Any = "no"
    with pytest.raises(OptionError, match="magnitude is 'no': use True or False"):
        lp.TopK(magnitude=no_flag)
    with pytest.raises(OptionError, match="pairs='some'"):
        lp.CrossCovariance("some")
    with pytest.raises(OptionError, match="is one matrix per head"):
        run(model, lp.Moments(), make_batches(1), "layers.0.attention.weights")
    decoder = make_bert("BertModel", is_decoder=True, add_cross_attention=True)
    with pytest.raises(OptionError, match="rows of the other half's tokens"):
        run(decoder, lp.Moments(), make_batches(1), "layers.0.cross_attention.key")
    with pytest.raises(OptionError, match="leave out pool and dtype"):
        lp.Probe(model, "layers.0", to=lp.Moments(), pool="mean")
    with pytest.raises(CaptureError, match="sites with different rows"):
        run(model, lp.CrossCovariance(), make_batches(1), ["layers.0", "module:pooler"])
    with pytest.raises(OptionError, match=r"between 'layers\.0' and 'pooler' has no meaning"):
        run(model, lp.CrossCovariance(), make_batches(1), ["layers.0", "pooler"])
    with pytest.raises(OptionError, match=r"pairs ask for 'layers\.2'"):
        run(model, lp.CrossCovariance([("layers.0", "layers.2")]), make_batches(1), "layers.0")


def test_stacks_are_not_compared(pair: Any) -> None:
    with (
        pytest.raises(OptionError, match=r"between 'encoder\.layers\.0' and 'decoder\.layers\.0' has no meaning"),
        lp.Probe(pair, ["encoder.layers.0", "decoder.layers.0"], to=lp.CrossCovariance()),
    ):
        pass


@pytest.fixture
def pair() -> Any:
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**shape), BertConfig(**shape))
    return EncoderDecoderModel(config).eval()


def test_a_call_that_does_not_fit_at_a_later_site_counts_at_none(make_bert: Callable[..., Any], model: Any) -> None:
    moments, batches = lp.Moments(), make_batches(2)
    run(model, moments, batches, ["layers.0", "layers.1.ffn.act"])
    before = moments.state_dict()
    with pytest.raises(OptionError, match="only sums of the same width"):
        run(make_bert(intermediate_size=48), moments, batches, ["layers.0", "layers.1.ffn.act"])
    after = moments.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_sink_is_in_one_probe_at_a_time(model: Any) -> None:
    moments = lp.Moments()
    with (
        lp.Probe(model, "layers.0", to=moments),
        pytest.raises(CaptureError, match="open in another probe"),
        lp.Probe(model, "layers.1", to=moments),
    ):
        pass
    run(model, moments, make_batches(2), "layers.0")
    assert moments["layers.0"].count == sum(int(batch["attention_mask"].sum()) for batch in make_batches(5)[:2])


def test_a_call_that_raises_counts_for_nothing(model: Any) -> None:
    batches, moments, top = make_batches(), lp.Moments(), lp.TopK(2)
    for sink in (moments, top):
        with torch.no_grad(), lp.Probe(model, "layers.*", to=sink):
            model(**batches[0])
            handle = model.encoder.layer[2].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**batches[1])
            handle.remove()
            model(**batches[2])
    expected = lp.Moments()
    run(model, expected, [batches[0], batches[2]], "layers.*")
    assert same(moments, expected)
    assert top["layers.0"].example.max() <= 5


def test_memory_does_not_grow_with_the_rows(model: Any) -> None:
    """By all that a sink holds on to, under whatever name, and not only by what it gives as its state."""
    for make in SINKS.values():
        few, many = make(), make()
        # the same last, of which it may keep the mask
        run(model, few, make_batches(5)[-1:], "layers.*")
        run(model, many, make_batches(5), "layers.*")
        sizes = [sum(t.numel() for t in sink.state_dict().values()) for sink in (few, many)]
        assert sizes[0] == sizes[1] > 0
        held = [measure_held(sink) for sink in (few, many)]
        # a row of a site has 128 bytes; what is left of the last call's numbers varies by some
        assert 0 < held[1] < held[0] + 128, held


def measure_held(root: object) -> int:
    """Give the bytes of the tensors that an object leads to."""
    seen: dict[int, object] = {}
    storages: dict[int, int] = {}
    waiting = [root]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, (type, ModuleType, FunctionType)):
            continue
        seen[id(one)] = one
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        waiting += gc.get_referents(one)
    return sum(storages.values())


def test_half_precision_and_gradients_and_inference_mode(make_bert: Callable[..., Any]) -> None:
    """Values in bfloat16 are summed in float64; a value with a history, or made in inference mode, is only read."""
    model, batches = make_bert().bfloat16(), make_batches(3)
    moments = lp.Moments()
    with lp.Probe(model, "layers.*", to=moments):
        model(**batches[0]).last_hidden_state.sum().backward()
        with torch.inference_mode():
            model(**batches[1])
        model(**batches[2])
    rows = collect(model, batches, "layers.*")["layers.2"]
    np.testing.assert_allclose(moments["layers.2"].variance, rows.var(0), **CLOSE)
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in moments.state_dict().values())


def test_a_module_and_the_logits_are_measured(make_bert: Callable[..., Any]) -> None:
    model, batches = make_bert("BertForMaskedLM"), make_batches(2)
    sites = ["logits", "module:bert.encoder.layer.0.intermediate"]
    moments = lp.Moments()
    run(model, moments, batches, sites)
    rows = collect(model, batches, sites)
    for site in rows:
        np.testing.assert_allclose(moments[site].mean, rows[site].mean(0), **CLOSE)
    with pytest.raises(CaptureError, match="a row per token or per text"):
        feed(lp.Moments(), torch.zeros(2, 3, 4))
