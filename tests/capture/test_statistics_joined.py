"""Sums of several calls, inputs and processes joined: whose example is whose, and what fails halfway."""

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.capture.calls import Call, Context
from layerprobe.errors import CaptureError, OptionError
from layerprobe.sites.resolve import Site

SITE = "layers.1.ffn.act"


def make_batch(seed: int, num: int = 3, length: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(1, 100, (num, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run(model: Any, sink: Any, batches: Sequence[dict[str, Tensor]], sites: Any = SITE) -> None:
    with torch.no_grad(), lp.Probe(model, sites, to=sink):
        for batch in batches:
            model(**batch)


def list_tops(top: lp.TopK) -> list[list[Any]]:
    found = top[SITE]
    return [found.unit(unit) for unit in range(found.values.shape[1])]


def test_merged_tops_name_the_examples_of_both(tiny_bert: Any) -> None:
    batches = [make_batch(seed) for seed in range(4)]
    whole, first, second = (lp.TopK(5, context=2) for _ in range(3))
    run(tiny_bert, whole, batches)
    run(tiny_bert, first, batches[:2])
    run(tiny_bert, second, batches[2:])
    first.merge(second)
    assert list_tops(first) == list_tops(whole)
    assert max(entry.example for tops in list_tops(first) for entry in tops) > 5
    # a sink that has seen nothing takes the other's as they are
    empty = lp.TopK(5, context=2)
    empty.merge(first)
    run(tiny_bert, whole, batches[:1])
    run(tiny_bert, empty, batches[:1])
    assert list_tops(empty) == list_tops(whole)


def test_two_inputs_of_one_sink_are_counted_on() -> None:
    demo = lp.load_model("demo", "cpu")
    texts = ["The kettle whistled.", "Who left the door open?", "Nobody did.", "It rained all day on the roof."]
    whole, parts = (lp.TopK(2, context=1) for _ in range(2))
    # a text a batch: products of other shapes differ in their last bits
    lp.extract(demo, texts, whole, sites="layers.0", batch_tokens=1)
    for part in (texts[:3], texts[3:]):
        lp.extract(demo, part, parts, sites="layers.0", batch_tokens=1)
    one, other = whole["layers.0"], parts["layers.0"]
    assert set(other.example.flatten().tolist()) == {0, 1, 2, 3}
    assert torch.equal(one.example, other.example) and torch.equal(one.position, other.position)


def feed(sink: Any, *calls: Sequence[Tensor]) -> Any:
    """Give rows of the sites `a`, `b`, ... to a sink, a call after another."""
    sink.open([Site("abc"[place], "", "output", "example", None) for place in range(len(calls[0]))])
    for values in calls:
        call = Call([0] * len(values), {0: Context(None, None, (len(values[0]), 1))})
        sink.begin(call)
        try:
            for place, value in enumerate(values):
                sink.receive(call, place, value)
            sink.finish(call)
        except Exception:
            sink.abandon(call)
            sink.close(None)
            raise
    sink.close(None)
    return sink


@pytest.mark.parametrize("make", [lp.Moments, lp.TopK, lp.CrossCovariance])
def test_a_call_that_cannot_be_joined_at_a_later_site_counts_at_none(make: Callable[[], Any]) -> None:
    sink = feed(make(), [torch.ones(2, 3), torch.ones(2, 4)])
    before = sink.state_dict()
    with pytest.raises(OptionError, match=r"of 'b' is \((\d+, )*\d+,?\) here"):
        feed(sink, [torch.zeros(2, 3), torch.zeros(2, 5)])
    after = sink.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_sites_without_common_rows_have_no_covariance(make_bert: Callable[..., Any]) -> None:
    from transformers import EncoderDecoderModel

    model: Any = EncoderDecoderModel(
        encoder=make_bert(), decoder=make_bert("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    ).eval()
    ids = torch.randint(3, 50, (2, 5))
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    with pytest.raises(OptionError, match=r"'encoder\.layers\.0' and 'decoder\.layers\.0'"):
        run(model, lp.CrossCovariance(), [batch], ["encoder.layers.0", "decoder.layers.0"])
    between = lp.CrossCovariance()
    run(model, between, [batch], ["decoder.layers.0", "logits"])
    assert between.pairs == [("decoder.layers.0", "logits")]
    with pytest.raises(OptionError, match=r"'encoder\.layers\.0' and 'logits'"):
        run(model, lp.CrossCovariance(), [batch], ["encoder.layers.0", "logits"])
    bert = make_bert()
    with pytest.raises(OptionError, match=r"'layers\.0' and 'pooler'"):
        run(bert, lp.CrossCovariance(), [make_batch(0)], ["layers.0", "pooler"])
    masked, tied = make_bert("BertForMaskedLM"), lp.CrossCovariance()
    run(masked, tied, [make_batch(0)], ["layers.0", "logits"])
    assert tied.pairs == [("layers.0", "logits")]
    # what a module makes is known only as it runs
    with pytest.raises(CaptureError, match="sites with different rows"):
        run(bert, lp.CrossCovariance(), [make_batch(0)], ["layers.0", "module:pooler.dense"])


def test_pairs_are_looked_for_before_the_model_runs(tiny_bert: Any) -> None:
    calls: list[object] = []
    tiny_bert.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(OptionError, match=r"pairs ask for 'layers\.2'"):
        run(tiny_bert, lp.CrossCovariance([("layers.0", "layers.2")]), [make_batch(0)], "layers.0")
    assert not calls


def test_pairs_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(OptionError, match="pairs=5"):
        lp.CrossCovariance(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda sink: pickle.loads(pickle.dumps(sink))])
@pytest.mark.parametrize("make", [lp.Moments, lp.Histogram, lp.Covariance, lp.CrossCovariance, lp.TopK])
def test_a_copy_counts_on_by_itself(tiny_bert: Any, make: Callable[[], Any], copied: Callable[[Any], Any]) -> None:
    sites = ["layers.0", "layers.1"]
    whole, before, sink = make(), make(), make()
    run(tiny_bert, whole, [make_batch(1), make_batch(2)], sites)
    run(tiny_bert, before, [make_batch(1)], sites)
    with torch.no_grad(), lp.Probe(tiny_bert, sites, to=sink):
        tiny_bert(**make_batch(1))
        # also while its sink is open in a probe
        other = copied(sink)
    run(tiny_bert, other, [make_batch(2)], sites)
    for one, expected in ((sink, before), (other, whole)):
        state = expected.state_dict()
        assert one.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
