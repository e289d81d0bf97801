"""Many calls: generation, probes within probes, the model called from a sink, an early end with others about."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from families import CACHE
from layerprobe.errors import CaptureError
from sizes import TINY


@pytest.fixture
def decoder() -> Any:
    import transformers

    torch.manual_seed(0)
    return transformers.BertLMHeadModel(transformers.BertConfig(**TINY, is_decoder=True)).eval()


@pytest.fixture
def pair() -> Any:
    """An encoder and a decoder that looks at it."""
    import transformers

    torch.manual_seed(0)
    halves = (
        transformers.BertConfig(**TINY),
        transformers.BertConfig(**TINY, is_decoder=True, add_cross_attention=True),
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*halves)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config).eval()


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_one_call_per_step_with_its_positions(decoder: Any, use_cache: bool) -> None:
    ids = torch.randint(1, 100, (2, 5))
    options: Any = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"use_cache": use_cache, "attention_mask": torch.ones_like(ids)}
    expected = decoder.generate(ids, **options)
    with lp.Probe(decoder, ["embeddings", "layers.*", "logits"]) as probe:
        made = decoder.generate(ids, **options)
    assert torch.equal(made, expected)
    steps = [range(5), *(range(start, start + 1) for start in range(5, 8))]
    assert [call.positions for call in probe.calls] == (steps if use_cache else [range(5 + n) for n in range(4)])
    whole = decoder(made[:, :-1], output_hidden_states=True)
    if use_cache:
        joined: Any = torch.cat([call["layers.2"] for call in probe.calls], dim=1)  # type: ignore[arg-type]
    else:
        joined = probe.calls[-1]["layers.2"]
    # a step at a time is another matrix product than all at once: the last bits of float32
    torch.testing.assert_close(joined, whole.hidden_states[-1], rtol=0, atol=1e-5)
    for call, step in zip(probe.calls, range(5, 9), strict=True):
        logits: Any = call["logits"]
        assert torch.equal(logits[:, -1].argmax(-1), made[:, step])


def test_steps_with_a_cache_and_a_mask_give_the_rows_of_their_own_tokens_to_every_sink(
    decoder: Any, tmp_path: Any
) -> None:
    """The mask of a step has columns for what lies in the cache too; here each step has padding, on another side."""
    ids, mask = torch.randint(1, 100, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[0, :2] = mask[1, 7] = 0
    pooled, moments, stage = [], lp.Moments(), lp.Stage(max_tokens=16)
    with (
        torch.no_grad(),
        lp.Probe(decoder, "layers.2") as probe,
        lp.Probe(decoder, "layers.2", pool="last") as last,
        lp.Probe(decoder, "layers.2", to=lambda _, vectors: pooled.append(vectors), pool="mean"),
        lp.Probe(decoder, "layers.2", to=moments),
        lp.Probe(decoder, "layers.2", to=tmp_path / "acts"),
        lp.Probe(decoder, "layers.2", to=stage),
    ):
        cache = decoder(ids[:, :5], attention_mask=mask[:, :5])[CACHE]
        decoder(ids[:, 5:], attention_mask=mask, **{CACHE: cache})
    made: Any = probe.calls
    whole = [(made[0]["layers.2"], mask[:, :5]), (made[1]["layers.2"], mask[:, 5:])]
    texts = [value[number, kept[number].bool()] for value, kept in whole for number in range(2)]
    stored: Any = lp.open(tmp_path / "acts")
    assert torch.equal(torch.cat([call["layers.2"] for call in last.calls]), torch.stack([rows[-1] for rows in texts]))  # type: ignore[misc]
    # a mean of up to five float32 values, summed in another order
    torch.testing.assert_close(torch.cat(pooled), torch.stack([rows.mean(0) for rows in texts]), rtol=0, atol=1e-6)
    assert moments["layers.2"].count == sum(map(len, texts)) == 13
    assert all(torch.equal(stored["layers.2"][number], rows) for number, rows in enumerate(texts))
    assert [row.tolist() for row in (stored.example(0).input_ids, stored.example(3).input_ids)] == [
        ids[0, 2:5].tolist(),
        ids[1, 5:7].tolist(),
    ]
    assert torch.equal(stage["layers.2"], torch.cat(texts[2:]))


def test_generation_with_a_cache_and_a_mask_is_pooled_step_by_step(decoder: Any) -> None:
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
    options: Any = {"max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": 0, "attention_mask": ids.ne(0).long()}
    with lp.Probe(decoder, "layers.2") as probe, lp.Probe(decoder, "layers.2", pool="last") as last:
        decoder.generate(ids, **options)
    assert len(last.calls) == 3
    for pooled, whole in zip(last.calls, probe.calls, strict=True):
        assert torch.equal(pooled["layers.2"], whole["layers.2"][:, -1])  # type: ignore[arg-type,index]


def test_mask_that_does_not_end_with_the_tokens_of_a_step_is_refused(decoder: Any) -> None:
    ids, mask = torch.randint(1, 100, (2, 5)), torch.ones(2, 9, dtype=torch.long)
    with (
        lp.Probe(decoder, "layers.2", pool="last"),
        pytest.raises(CaptureError, match=r"attention_mask has shape \(2, 9\): rows need one of shape \(2, 1\)"),
    ):
        decoder.bert(ids[:, :1], attention_mask=mask, **{CACHE: decoder(ids)[CACHE]})


def test_generation_of_a_pair_calls_the_encoder_once(pair: Any) -> None:
    ids = torch.randint(1, 100, (2, 5))
    options: Any = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    expected = pair.generate(ids, **options)
    with lp.Probe(pair, ["encoder.layers.2", "decoder.layers.2"]) as probe:
        made = pair.generate(ids, **options)
    assert torch.equal(made, expected)
    assert [list(call) for call in probe.calls] == [["encoder.layers.2"], *[["decoder.layers.2"]] * 3]


@pytest.mark.parametrize("stop", [False, True])
def test_module_between_the_halves_of_a_pair_is_of_their_call(stop: bool) -> None:
    import transformers

    torch.manual_seed(0)
    sizes: Any = TINY | {"hidden_size": 16}
    narrow, wide = (
        transformers.BertConfig(**sizes),
        transformers.BertConfig(**TINY, is_decoder=True, add_cross_attention=True),
    )
    halves: Any = {"encoder": transformers.BertModel(narrow), "decoder": transformers.BertLMHeadModel(wide)}
    pair: Any = transformers.EncoderDecoderModel(**halves).eval()
    given = {"input_ids": torch.randint(1, 100, (2, 5)), "decoder_input_ids": torch.randint(1, 100, (2, 3))}
    sites = ["encoder.layers.2", "module:enc_to_dec_proj", "decoder.layers.0"]
    hidden = pair(**given, output_hidden_states=True)
    with lp.Probe(pair, sites, stop=stop) as probe:
        assert (pair(**given) is None) == stop
    assert torch.equal(probe[sites[0]], hidden.encoder_hidden_states[3])
    assert torch.equal(probe[sites[1]], pair.enc_to_dec_proj(hidden.encoder_last_hidden_state))
    assert torch.equal(probe[sites[2]], hidden.decoder_hidden_states[1])


def test_encoder_alone_is_no_call_for_sites_of_the_decoder(pair: Any, tmp_path: Any) -> None:
    ids, options = torch.randint(2, 100, (2, 5)), {"max_new_tokens": 3, "min_new_tokens": 3, "use_cache": False}
    pair.generation_config.decoder_start_token_id, pair.generation_config.pad_token_id = 1, 0
    with lp.Probe(pair, "decoder.layers.*") as probe:
        pair.generate(ids, **options)
    assert [call.positions for call in probe.calls] == [range(1), range(2), range(3)]
    with lp.Probe(pair, "decoder.layers.*", to=tmp_path / "acts"):
        pair.generate(ids, **options)
    rows: list[Any] = [row for call in probe.calls for row in cast(Tensor, call["decoder.layers.1"])]
    stored: Any = lp.open(tmp_path / "acts")["decoder.layers.1"]
    assert all(torch.equal(one, other) for one, other in zip(stored, rows, strict=True))


def test_early_end_of_a_pair_waits_for_the_decoder(pair: Any) -> None:
    inputs = {"input_ids": torch.randint(1, 100, (2, 5)), "decoder_input_ids": torch.randint(1, 100, (2, 3))}
    sites = ["encoder.layers.1", "decoder.layers.1"]
    with lp.Probe(pair, sites) as expected:
        pair(**inputs)
    with lp.Probe(pair, sites, stop=True) as probe:
        assert pair(**inputs) is None
    for site in sites:
        assert torch.equal(probe[site], expected[site])
    with lp.Probe(pair, sites[0], stop=True) as probe:
        assert pair(**inputs) is None
    assert torch.equal(probe[sites[0]], expected[sites[0]])


# several probes


def test_early_end_waits_for_every_probe_on_the_model(make_bert: Any, batch: Any) -> None:
    model = make_bert("BertForMaskedLM")
    ran: list[int] = []
    for index, layer in enumerate(model.bert.encoder.layer):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    expected = model(**batch, output_hidden_states=True).hidden_states
    for first_stops, second_stops in ((True, True), (True, False), (False, True)):
        ran.clear()
        with (
            lp.Probe(model, "layers.0", stop=first_stops) as first,
            lp.Probe(model, "layers.1", stop=second_stops) as second,
        ):
            assert model(**batch) is None
        assert ran[-1] == 1
        assert torch.equal(first["layers.0"], expected[1])
        assert torch.equal(second["layers.1"], expected[2])
    with lp.Probe(model, "logits") as first, lp.Probe(model, "layers.0", stop=True) as second:
        assert model(**batch) is None
    assert torch.equal(second["layers.0"], expected[1])
    assert len(first.calls) == 1


@pytest.mark.parametrize("site", ["layers.0", "layers.2", "logits"])
@pytest.mark.parametrize("outer_stops", [True, False])
@pytest.mark.parametrize("outer_first", [True, False])
def test_early_end_of_a_base_comes_out_of_the_model_around_it_or_not_at_all(
    make_bert: Any, batch: Any, site: str, outer_stops: bool, outer_first: bool
) -> None:
    """A head is given what its base makes, or ends with it; what the probes ask is recorded either way."""
    model = make_bert("BertForMaskedLM")
    bare = model(**batch, output_hidden_states=True)
    inner = lp.Probe(model.bert, "layers.0", stop=True)
    outer = lp.Probe(model, site, stop=outer_stops)
    with outer if outer_first else inner, inner if outer_first else outer:
        for _ in range(2):
            output = model(**batch)
            assert output is None if outer_stops else torch.equal(output.logits, bare.logits)
    expected: Any = {"logits": bare.logits, **{f"layers.{index}": bare.hidden_states[index + 1] for index in range(3)}}
    for probe, name in ((inner, "layers.0"), (outer, site)):
        assert all(torch.equal(call[name], expected[name]) for call in probe.calls)  # type: ignore[arg-type]
        assert len(probe.calls) == 2


def test_probes_on_a_model_and_on_its_base_see_the_same(make_bert: Any, batch: Any) -> None:
    model = make_bert("BertForMaskedLM")
    with lp.Probe(model, "layers.1") as outer, lp.Probe(model.bert, ["layers.1", "layers.2"]) as inner:
        model(**batch)
        model.bert(**batch)
    assert len(outer.calls) == len(inner.calls) == 2
    for one, other in zip(outer.calls, inner.calls, strict=True):
        assert torch.equal(one["layers.1"], other["layers.1"])  # type: ignore[arg-type]


def test_probe_opened_within_a_block_sees_only_its_own_calls(tiny_bert: Any, batch: Any) -> None:
    with lp.Probe(tiny_bert, "layers.*") as outer:
        tiny_bert(**batch)
        with lp.Probe(tiny_bert, "layers.0", stop=False) as inner:
            tiny_bert(**batch)
        tiny_bert(**batch)
    assert (len(outer.calls), len(inner.calls)) == (3, 1)
    assert torch.equal(inner["layers.0"], outer.calls[1]["layers.0"])  # type: ignore[arg-type]


# within a callable


def test_probe_within_a_callable_reads_the_rest_of_the_call(tiny_bert: Any, batch: Any) -> None:
    """One opened in the middle of a call has no call of its own; a call that it makes itself is its own."""
    inner_calls: list[Any] = []
    given: list[str] = []

    def function(site: str, value: Tensor) -> None:
        given.append(site)
        if len(given) == 1:
            with lp.Probe(tiny_bert, ["embeddings", "layers.1"]) as inner:
                tiny_bert(batch["input_ids"][:1])
            inner_calls.extend(inner.calls)

    expected = tiny_bert(**batch)[0]
    with lp.Probe(tiny_bert, "layers.*", to=function):
        output = tiny_bert(**batch)
    assert torch.equal(output[0], expected)
    assert given == ["layers.0", "layers.0", "layers.1", "layers.2", "layers.1", "layers.2"]
    wanted = tiny_bert(batch["input_ids"][:1], output_hidden_states=True).hidden_states
    assert torch.equal(inner_calls[0]["layers.1"], wanted[2])
    assert len(inner_calls) == 1


@pytest.mark.parametrize("class_name", ["BertModel", "BertForMaskedLM"])
def test_model_called_within_a_callable_keeps_the_calls_apart(make_bert: Any, batch: Any, class_name: str) -> None:
    model = make_bert(class_name)
    kept: dict[tuple[int, str], Tensor] = {}

    def function(site: str, value: Tensor) -> None:
        kept[len(value), site] = value
        if site == "layers.0" and len(value) == 3:
            model(batch["input_ids"][:2])

    with lp.Probe(model, "layers.*", to=function), lp.Probe(model, "layers.*") as memory:
        model(**batch)
    assert len(memory.calls) == 2
    for size, inputs in ((3, batch), (2, {"input_ids": batch["input_ids"][:2]})):
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        call = next(call for call in memory.calls if call.input_ids is not None and len(call.input_ids) == size)
        for index in range(3):
            assert torch.equal(kept[size, f"layers.{index}"], hidden[index + 1])
            assert torch.equal(call[f"layers.{index}"], hidden[index + 1])  # type: ignore[arg-type]


def test_base_called_within_a_callable_that_gets_the_logits_is_a_call_of_its_own(make_bert: Any, batch: Any) -> None:
    model = make_bert("BertForSequenceClassification")
    kept: list[tuple[str, int, Tensor]] = []

    def function(site: str, value: Tensor) -> None:
        kept.append((site, len(value), value))
        if site == "logits":
            model.bert(batch["input_ids"][:2])

    bare = model(**batch, output_hidden_states=True)
    with lp.Probe(model, ["layers.1", "logits"], to=function):
        output = model(**batch)
    inner = model.bert(batch["input_ids"][:2], output_hidden_states=True)
    assert torch.equal(output.logits, bare.logits)
    assert [(site, size) for site, size, _ in kept] == [("layers.1", 3), ("logits", 3), ("layers.1", 2)]
    for (_, _, value), expected in zip(kept, (bare.hidden_states[2], bare.logits, inner.hidden_states[2]), strict=True):
        assert torch.equal(value, expected)


def test_model_called_within_a_call_into_a_store_is_refused(tiny_bert: Any, batch: Any, tmp_path: Any) -> None:
    def again(module: Any, args: Any, output: Any) -> None:
        handle.remove()
        tiny_bert(**batch)

    handle = tiny_bert.encoder.layer[1].register_forward_hook(again)
    with (
        pytest.raises(CaptureError, match=r"was made after another call of the model began inside this one: a store"),
        lp.Probe(tiny_bert, "layers.*", to=tmp_path / "acts"),
    ):
        tiny_bert(**batch)


def test_early_end_within_a_callable(tiny_bert: Any, batch: Any) -> None:
    inner: list[Any] = []

    def function(site: str, value: Tensor) -> None:
        if not inner:
            inner.append(None)
            with lp.Probe(tiny_bert, "layers.1", stop=True) as probe:
                inner.append(tiny_bert(batch["input_ids"][:1]))
            inner.append(probe["layers.1"])

    expected = tiny_bert(**batch)[0]
    with lp.Probe(tiny_bert, ["layers.0"], to=function):
        output = tiny_bert(**batch)
    assert inner[1] is None
    wanted = tiny_bert(batch["input_ids"][:1], output_hidden_states=True).hidden_states
    assert torch.equal(inner[2], wanted[2])
    assert torch.equal(output[0], expected)


def test_shared_layer_is_read_by_its_call(batch: Any) -> None:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {**TINY, "num_hidden_layers": 4, "embedding_size": 16, "num_hidden_groups": 2}
    config = transformers.AlbertConfig(**sizes)
    model = transformers.AlbertModel(config).eval()
    hidden = model(**batch, output_hidden_states=True).hidden_states
    with lp.Probe(model, ["layers.*", "layers.*.attention.query"]) as probe:
        model(**batch)
        model(batch["input_ids"][:1])
    for index in range(4):
        assert torch.equal(probe.calls[0][f"layers.{index}"], hidden[index + 1])  # type: ignore[arg-type]
    with lp.Probe(model, "layers.2", stop=True) as probe:
        assert model(**batch) is None
    assert torch.equal(probe["layers.2"], hidden[3])


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_of_a_call_are_joined_with_an_early_end(make_bert: Any, chunk: int) -> None:
    ids = torch.randint(1, 100, (2, 6))
    model = make_bert(chunk_size_feed_forward=chunk)
    with lp.Probe(model, ["layers.*.ffn.act"]) as expected:
        model(ids)
    with lp.Probe(model, "layers.1.ffn.act", stop=True) as probe:
        assert model(ids) is None
        assert model(ids) is None
    for call in probe.calls:
        assert torch.equal(call["layers.1.ffn.act"], expected["layers.1.ffn.act"])  # type: ignore[arg-type]
        assert call["layers.1.ffn.act"].shape == (2, 6, 64)  # type: ignore[union-attr]


def test_call_within_a_call_that_never_begins_leaves_the_outer_one_whole(tiny_bert: Any, batch: Any) -> None:
    """torch tells always-called hooks of a call whose first hook, of the user, has raised."""
    refuses = False

    def refuse(*_: Any) -> None:
        if refuses:
            raise ValueError("not now")

    tiny_bert.register_forward_pre_hook(refuse)

    def call_again(*_: Any) -> None:
        nonlocal refuses
        refuses = True
        with pytest.raises(ValueError, match="not now"):
            tiny_bert(**batch)
        refuses = False

    tiny_bert.encoder.layer[1].register_forward_hook(call_again)
    with torch.no_grad(), lp.Probe(tiny_bert, ["embeddings", "layers.*"]) as probe:
        hidden = tiny_bert(**batch, output_hidden_states=True).hidden_states
    assert all(torch.equal(probe[site], value) for site, value in zip(probe.calls[0], hidden, strict=True))


def test_forward_called_past_the_hooks_is_not_taken_for_a_call(tiny_bert: Any, batch: Any) -> None:
    with torch.no_grad(), lp.Probe(tiny_bert, "layers.*") as probe:
        tiny_bert.forward(**batch)
    with pytest.raises(CaptureError, match=r"was not called in the probe \(model\.forward\(\) goes past its hooks"):
        _ = probe["layers.0"]


@pytest.mark.parametrize("is_passing", [False, True])
def test_padding_of_a_class_that_calls_its_ids_otherwise_is_not_taken_for_tokens(
    tiny_bert: Any, batch: dict[str, Tensor], tmp_path: Any, is_passing: bool
) -> None:
    kind: Any = type(tiny_bert)

    class Renaming(kind):
        def forward(self, tokens: Tensor, mask: Tensor) -> Any:
            return super().forward(input_ids=tokens, attention_mask=mask)

    class Passing(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = (Passing if is_passing else Renaming)(tiny_bert.config).eval()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    match = r"neither input_ids nor inputs_embeds by name: padding is not known\. Call the arguments of its forward"
    wanting: list[Any] = [{"to": tmp_path / "acts"}, {"pool": "mean"}]
    for options in wanting:
        with torch.no_grad(), pytest.raises(CaptureError, match=match), lp.Probe(model, "layers.*", **options):
            model(ids, mask)
    with torch.no_grad(), lp.Probe(model, "layers.*") as probe:
        output = model(ids, mask)
    made: Any = probe["layers.-1"]
    assert torch.equal(made, output.last_hidden_state)
    if is_passing:
        with torch.no_grad(), lp.Probe(model, "layers.*", to=tmp_path / "named"):
            model(input_ids=ids, attention_mask=mask)
        assert torch.equal(lp.open(tmp_path / "named")["layers.-1"][1], made[1][mask[1].bool()])
