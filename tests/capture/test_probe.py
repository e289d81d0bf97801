"""The probe in memory: every site against an oracle, early stop, casts, gradients, threads, and its errors."""

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

import layerprobe as lp
from layerprobe.capture.casting import DTYPES
from layerprobe.capture.identity import describe_pool
from layerprobe.errors import CaptureError, OptionError, SiteError

ALL = ["*", "layers.*", "layers.*.*", "layers.*.*.*"]


def _apply(projection: Any, value: Any) -> Tensor:
    return linear(value, projection.weight, projection.bias)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_site_is_what_the_model_made(make_bert: Any, batch: Any, attention: str, dtype: torch.dtype) -> None:
    model = make_bert(attn_implementation=attention).to(dtype)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        with lp.Probe(model, ALL) as probe:
            output = model(**batch, output_hidden_states=True)
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(output.pooler_output, expected.pooler_output)
        assert torch.equal(probe["embeddings"], expected.hidden_states[0])
        for index, layer in enumerate(model.encoder.layer):
            entering = expected.hidden_states[index]
            made: Any = {site.removeprefix(f"layers.{index}."): value for site, value in probe.calls[0].items()}
            attending, output_layer = layer.attention.self, layer.output
            assert torch.equal(made["attention.query"], _apply(attending.query, entering))
            assert torch.equal(made["attention.key"], _apply(attending.key, entering))
            assert torch.equal(made["attention.value"], _apply(attending.value, entering))
            _check_context(made, batch["attention_mask"], dtype)
            assert torch.equal(made["attention.out"], _apply(layer.attention.output.dense, made["attention.context"]))
            assert torch.equal(made["mid"], layer.attention.output.LayerNorm(made["attention.out"] + entering))
            assert torch.equal(made["ffn.act"], gelu(_apply(layer.intermediate.dense, made["mid"])))
            assert torch.equal(made["ffn.out"], _apply(output_layer.dense, made["ffn.act"]))
            assert torch.equal(probe[f"layers.{index}"], expected.hidden_states[index + 1])
            assert torch.equal(probe[f"layers.{index}"], output_layer.LayerNorm(made["ffn.out"] + made["mid"]))
        assert torch.equal(probe["pooler"], expected.pooler_output)


def _check_context(made: Any, mask: Tensor, dtype: torch.dtype) -> None:
    """Redo the heads' mix in float64."""
    query, key, value = (
        made[f"attention.{name}"].double().unflatten(-1, (4, 8)).transpose(1, 2) for name in ("query", "key", "value")
    )
    scores = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(mask[:, None, None] == 0, float("-inf"))
    context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    atol = 1e-6 if dtype == torch.float32 else 0.02  # rounding of sums of 8 values near 1: 24 bits, or bfloat16's 8
    torch.testing.assert_close(made["attention.context"].double(), context, rtol=0, atol=atol)


def test_memory_holds_the_very_tensors_of_the_model(tiny_bert: Any, batch: Any) -> None:
    with torch.inference_mode(), lp.Probe(tiny_bert, "layers.*") as probe:
        output = tiny_bert(**batch)
    assert probe["layers.2"].data_ptr() == output.last_hidden_state.data_ptr()


def test_demo_model_layers_are_its_hidden_states(demo: Any) -> None:
    encoding = demo.tokenizer(["A short text.", "", "Ein längerer Text, 混合 🎉"], padding=True, return_tensors="pt")
    with torch.no_grad():
        with lp.Probe(demo.model, ["embeddings", "layers.*"]) as probe:
            demo.model(**encoding)
        hidden = demo.model(**encoding, output_hidden_states=True).hidden_states
    assert len(probe.calls[0]) == len(hidden) == 7
    for value, expected in zip(probe.calls[0].values(), hidden, strict=True):
        assert torch.equal(value, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunked_ffn_is_joined(make_bert: Any, chunk: int) -> None:
    input_ids = torch.randint(1, 100, (2, 6))
    model = make_bert(chunk_size_feed_forward=chunk)
    module = "module:encoder.layer.1.intermediate"
    with lp.Probe(model, ["layers.*.ffn.*", "layers.*", "layers.*.mid", module, "pooler"]) as probe:
        output = model(input_ids)
    for index, layer in enumerate(model.encoder.layer):
        act = layer.intermediate(probe[f"layers.{index}.mid"])
        # a matrix product of fewer rows may sum in another order: the last of float32's 24 bits
        torch.testing.assert_close(probe[f"layers.{index}.ffn.act"], act, rtol=0, atol=1e-6)
        down = _apply(layer.output.dense, probe[f"layers.{index}.ffn.act"])
        torch.testing.assert_close(probe[f"layers.{index}.ffn.out"], down, rtol=0, atol=1e-6)  # as above
    assert torch.equal(probe["layers.2"], output.last_hidden_state)
    assert torch.equal(probe[module], probe["layers.1.ffn.act"])
    assert probe["pooler"].shape == (2, 32)


# early stop


@pytest.mark.parametrize("class_name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
@pytest.mark.parametrize("site", ["embeddings", "layers.0.attention.context", "layers.1"])
def test_stop_ends_the_forward_after_the_last_site(make_bert: Any, batch: Any, class_name: str, site: str) -> None:
    model = make_bert(class_name)
    shorter = {name: value[:2] for name, value in batch.items()}
    with lp.Probe(model, site) as probe:
        model(**batch)
        model(**shorter)
    expected: list[Any] = [call[site] for call in probe.calls]
    ran: list[int] = []
    for index, layer in enumerate(model.base_model.encoder.layer):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    with lp.Probe(model, site, stop=True) as probe:
        assert model(**batch) is None
        assert model(**shorter) is None
        assert model.base_model(**batch) is None
    assert max(ran, default=-1) <= (1 if site == "layers.1" else -1)
    made: list[Any] = [call[site] for call in probe.calls]
    assert len(made) == 3
    for value, one in zip(made, [*expected, expected[0]], strict=True):
        assert torch.equal(value, one)
    assert model(**batch) is not None


def test_stop_after_logits_makes_them(make_bert: Any, batch: Any) -> None:
    model = make_bert("BertForSequenceClassification")
    expected = model(**batch).logits
    with lp.Probe(model, ["logits", "layers.0"], stop=True) as probe:
        assert model(**batch) is None
    assert torch.equal(probe["logits"], expected)


def test_stop_keeps_a_forward_that_the_user_put_on(tiny_bert: Any, batch: Any) -> None:
    inner = tiny_bert.forward
    tiny_bert.forward = own = lambda *args, **kwargs: inner(*args, **kwargs)
    with lp.Probe(tiny_bert, "layers.0", stop=True) as probe:
        assert tiny_bert(**batch) is None
    assert tiny_bert.forward is own
    assert len(probe.calls) == 1


# calls


def test_each_call_is_kept_with_its_ids_and_mask(tiny_bert: Any, batch: Any) -> None:
    with lp.Probe(tiny_bert, ["embeddings", "layers.*"]) as probe:
        first = tiny_bert(**batch)
        second = tiny_bert(batch["input_ids"][:1])
    assert len(probe.calls) == 2
    assert torch.equal(probe.calls[0]["layers.2"], first.last_hidden_state)  # type: ignore[arg-type]
    assert torch.equal(probe.calls[1]["layers.2"], second.last_hidden_state)  # type: ignore[arg-type]
    assert probe.calls[0].input_ids is batch["input_ids"]
    assert probe.calls[0].attention_mask is batch["attention_mask"]
    assert probe.calls[1].attention_mask is None
    with pytest.raises(CaptureError, match=r"the model was called 2 times in the probe: use probe\.calls, one entry"):
        _ = probe["layers.2"]


def test_negative_layers_count_from_the_last_of_the_model(tiny_bert: Any, batch: Any) -> None:
    with lp.Probe(tiny_bert, ["layers.0", "layers.1"]) as probe:
        tiny_bert(**batch)
    assert torch.equal(probe["layers.-2"], probe["layers.1"])
    with pytest.raises(SiteError, match=r"no site 'layers\.-1' in what was captured"):
        _ = probe["layers.-1"]


def test_a_probe_has_its_sites_before_and_after_the_call(tiny_bert: Any, batch: Any) -> None:
    with lp.Probe(tiny_bert, ["embeddings", "layers.1:"]) as probe:
        assert list(probe) == ["embeddings", "layers.1", "layers.2"] and len(probe) == 3
        tiny_bert(**batch)
    assert "layers.1" in probe and "layers.-1" in probe
    assert not any(site in probe for site in ("layers.0", "layers.*", "norm", 1, None))
    assert all(probe[site].shape == (3, 7, 32) for site in probe)


def test_probe_that_was_not_called_says_so(tiny_bert: Any) -> None:
    with lp.Probe(tiny_bert, "layers.0") as probe:
        pass
    with pytest.raises(CaptureError, match=r"the model was not called in the probe .*call model\(\.\.\.\) inside"):
        _ = probe["layers.0"]


def test_threads_are_kept_apart(tiny_bert: Any) -> None:
    inputs = [torch.randint(1, 100, (2, 3 + number)) for number in range(6)]
    with torch.no_grad():
        expected = [tiny_bert(ids).last_hidden_state for ids in inputs]

    def run(ids: Tensor) -> None:
        with torch.no_grad():
            tiny_bert(ids)

    with lp.Probe(tiny_bert, ["embeddings", "layers.*"]) as probe:
        threads = [threading.Thread(target=run, args=(ids,)) for ids in inputs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    made = {call.input_ids.shape: call["layers.2"] for call in probe.calls if call.input_ids is not None}
    for ids, hidden in zip(inputs, expected, strict=True):
        assert torch.equal(made[ids.shape], hidden)  # type: ignore[arg-type]


# gradients


def test_gradients_are_those_of_autograd(tiny_bert: Any, batch: Any) -> None:
    output = tiny_bert(**batch, output_hidden_states=True)
    loss = output.last_hidden_state.pow(2).sum()
    expected = torch.autograd.grad(loss, output.hidden_states[:3])
    with lp.Probe(tiny_bert, ["embeddings", "layers.*", "pooler"], gradients=True) as probe:
        tiny_bert(**batch).last_hidden_state.pow(2).sum().backward()
    for site, gradient in zip(["embeddings", "layers.0", "layers.1"], expected, strict=True):
        assert torch.equal(probe.gradients[site], gradient)
    assert torch.equal(probe.gradients["layers.-1"], 2 * probe["layers.2"])
    assert list(probe.gradients) == ["layers.2", "layers.1", "layers.0", "embeddings"]
    assert len(probe.gradients) == 4
    with pytest.raises(CaptureError, match=r"no gradient reached 'pooler': call backward on a loss that depends on it"):
        _ = probe.gradients["pooler"]


def test_gradients_leave_those_of_the_parameters_bit_equal(make_bert: Any, batch: Any) -> None:
    plain, probed = make_bert(), make_bert()
    plain(**batch).last_hidden_state.sum().backward()
    with lp.Probe(probed, ALL, gradients=True):
        probed(**batch).last_hidden_state.sum().backward()
    for one, other in zip(plain.parameters(), probed.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            assert torch.equal(one.grad, other.grad)


def test_a_loss_of_captured_values_reaches_the_parameters(make_bert: Any, batch: Any) -> None:
    plain, probed = make_bert(), make_bert()
    plain(**batch, output_hidden_states=True).hidden_states[2].pow(2).sum().backward()
    with lp.Probe(probed, "layers.1", gradients=True) as probe:
        probed(**batch)
    probe["layers.1"].pow(2).sum().backward()
    for one, other in zip(plain.parameters(), probed.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_gradients_that_were_not_asked_for_are_not_there(tiny_bert: Any, batch: Any) -> None:
    with lp.Probe(tiny_bert, "layers.0") as probe:
        tiny_bert(**batch)
    assert not probe["layers.0"].requires_grad
    with pytest.raises(CaptureError, match=r"no gradients were kept: pass gradients=True to the probe\."):
        _ = probe.gradients


# options


@pytest.mark.parametrize("option", [{"to": "acts"}, {"pool": "mean"}, {"dtype": "float16"}])
def test_gradients_go_with_no_other_option(tiny_bert: Any, option: Any) -> None:
    with pytest.raises(
        OptionError, match=r"gradients=True keeps values in memory as they are: leave out to, pool and d"
    ):
        lp.Probe(tiny_bert, "layers.0", gradients=True, **option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"pool": "median"}, "no pool 'median'"),
        ({"dtype": "int4"}, "no dtype 'int4'"),
        ({"stop": "no"}, "stop is 'no': use True or False"),
        ({"gradients": "no"}, "gradients is 'no': use True or False"),
        ({"this_thread": None}, "this_thread is None: use True or False"),
    ],
)
def test_unknown_option_is_refused_before_anything_is_made(
    tiny_bert: Any, tmp_path: Any, option: Any, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        lp.Probe(tiny_bert, "layers.0", to=tmp_path / "acts", **option)
    assert not (tmp_path / "acts").exists()


def test_unknown_site_is_refused_before_a_folder_is_made(tiny_bert: Any, tmp_path: Any) -> None:
    with pytest.raises(SiteError, match=r"no site 'layers\.9'"):
        lp.Probe(tiny_bert, "layers.9", to=tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def test_destination_that_is_none_is_refused(tiny_bert: Any) -> None:
    with pytest.raises(
        OptionError, match=r"to=3: give a path, a function of \(site, value\), a Sink, a Stage, or None for memory"
    ):
        lp.Probe(tiny_bert, "layers.0", to=3)  # type: ignore[arg-type]


def test_url_of_another_kind_is_refused(tiny_bert: Any) -> None:
    with pytest.raises(OptionError, match="ftp://bucket/acts: stores do not lie under ftp://"):
        lp.Probe(tiny_bert, "layers.0", to="ftp://bucket/acts")


def test_probe_is_for_one_with_block(tiny_bert: Any) -> None:
    probe = lp.Probe(tiny_bert, "layers.0")
    with probe, pytest.raises(CaptureError, match=r"this probe is open: make a new one for another with block\."):
        probe.__enter__()
    with pytest.raises(CaptureError, match=r"this probe is closed: make a new one for another with block\."):
        probe.__enter__()


def test_probe_elsewhere_keeps_nothing_in_memory(tiny_bert: Any, batch: Any) -> None:
    with lp.Probe(tiny_bert, "layers.0", to=lambda *_: None) as probe:
        tiny_bert(**batch)
    for ask in (lambda: probe.calls, lambda: probe["layers.0"], lambda: probe.gradients):
        with pytest.raises(
            CaptureError, match=r"this probe keeps nothing in memory: its values went where 'to' says\."
        ):
            ask()


def test_sites_of_a_probe_are_in_running_order(tiny_bert: Any) -> None:
    probe = lp.Probe(tiny_bert, ["pooler", "layers.-1", "embeddings"])
    assert [site.name for site in probe.sites] == ["embeddings", "layers.2", "pooler"]


def test_pool_is_described_by_its_name_and_its_content() -> None:
    assert describe_pool(None) is None
    assert describe_pool("mean") == "mean"
    said = describe_pool(_apply)  # type: ignore[arg-type]
    assert said is not None and said.startswith(f"{__name__}._apply#") and said == describe_pool(_apply)  # type: ignore[arg-type]
    flat, flatter = describe_pool(torch.nn.Flatten(0)), describe_pool(torch.nn.Flatten(0, 1))
    assert flat is not None and flat.startswith("torch.nn.modules.flatten.Flatten#")
    assert flat == describe_pool(torch.nn.Flatten(0)) != flatter


def test_pools_of_one_name_are_told_apart() -> None:
    def make(scale: float, offset: int = 0) -> Any:
        return lambda rows, _=offset: rows.mean(0) * scale

    pools = [lambda rows: rows[0], lambda rows: rows[-1], lambda rows: rows.mean(0), lambda rows: rows.amax(0)]
    pools += [make(1.0), make(2.0), make(1.0, 3)]
    assert len({describe_pool(pool) for pool in pools}) == len(pools)
    assert describe_pool(make(2.0)) == describe_pool(make(2.0))


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_is_that_of_a_cast(tiny_bert: Any, batch: Any, name: str) -> None:
    with lp.Probe(tiny_bert, "layers.*") as plain:
        tiny_bert(**batch)
    with torch.inference_mode(), lp.Probe(tiny_bert, "layers.*", dtype=name) as probe:
        tiny_bert(**batch)
    for site in probe.calls[0]:
        value = plain[site]
        if name == "int8":
            scale = value.abs().amax(-1) / 127
            torch.testing.assert_close(probe[site].scale, scale, rtol=1e-6, atol=0)  # one float32 division
            assert torch.equal(probe[site].values, (value / scale[..., None]).round().to(torch.int8))
        else:
            assert torch.equal(probe[site].float(), value.to(DTYPES[name]).float())


@pytest.mark.slow
def test_a_closed_probe_keeps_no_model_alive(make_bert: Any, batch: dict[str, Tensor], tmp_path: Path) -> None:
    places: list[Any] = [None, tmp_path / "acts", lp.Stage(64), lambda *_: None]
    for to in places:
        model = make_bert()
        with torch.no_grad(), lp.Probe(model, "layers.*", to=to) as p:
            model(**batch)
        left = weakref.ref(model)
        del model
        gc.collect()
        assert left() is None, to
        assert [site.name for site in p.sites][:1]
        if to is None:
            assert p["layers.-1"].shape == (3, 7, 32)


def test_a_store_of_no_call_leaves_nothing_that_was_not_there(tiny_bert: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with lp.Probe(tiny_bert, "layers.*", to=tmp_path / "acts"):
        assert (tmp_path / "acts").exists()
    with lp.Probe(tiny_bert, "layers.*", to=tmp_path / "mine"):
        pass
    with pytest.raises(ZeroDivisionError), lp.Probe(tiny_bert, "layers.*", to=tmp_path / "raised"):
        _ = 1 / 0
    with lp.Probe(tiny_bert, "layers.*", to=tmp_path / "with a guest"):
        (tmp_path / "with a guest" / "notes.txt").write_text("mine")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["mine", "with a guest", "with a guest/notes.txt"]


def test_a_probe_and_its_calls_say_in_a_line_what_they_hold(
    tiny_bert: Any, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    probe = lp.Probe(tiny_bert, ["embeddings", "layers.0"])
    assert repr(probe) == "Probe(2 sites, new, 0 calls)"
    with torch.no_grad(), probe:
        tiny_bert(**batch)
        assert repr(probe) == "Probe(2 sites, open, 1 call)"
    assert repr(probe) == "Probe(2 sites, closed, 1 call)"
    assert repr(probe.calls) == (
        "[CapturedCall({'embeddings': Tensor[3, 7, 32] float32, 'layers.0': Tensor[3, 7, 32] float32})]"
    )
    assert repr(lp.Probe(tiny_bert, "layers.0", to=tmp_path / "acts")) == "Probe(1 site, new)"
