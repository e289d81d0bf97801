"""Edits on models of every family: what they change, what they leave, and what is left of them."""

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from families import FAMILIES, PLAIN, build, is_known, list_heads, make_batch
from layerprobe.errors import ArchitectureError, CaptureError, OptionError, SiteError
from layerprobe.sites.resolve import Site
from oracles import build_head, make_head_batch
from sizes import TINY
from traces import list_hooks, look_at


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    if not is_known(request.param):
        pytest.skip(f"this transformers has no {FAMILIES[request.param].model_type}")
    return request.param


def is_editable(site: Site) -> bool:
    return site.takes != "weights" and not (site.name.endswith(".mid") and site.takes == "input")


def run_probed(model: Any, batch: Mapping[str, Any], site: str, edits: Any = None) -> Any:
    """Read a site, with edits or without."""
    with torch.no_grad():
        if edits is None:
            with lp.Probe(model, site) as probe:
                model(**batch)
        else:
            with lp.edit(model, edits), lp.Probe(model, site) as probe:
                model(**batch)
    return probe[site]


def check_steering(model: Any, batch: dict[str, Tensor], real: Tensor) -> None:
    """Steer at every editable site: it moves by the vector at real tokens, and stays to the bit everywhere else."""
    maker = torch.Generator().manual_seed(3)
    sites = [site for site in lp.sites(model) if is_editable(site)]
    assert len(sites) > 5
    for site in sites:
        before = run_probed(model, batch, site.name)
        vector = torch.randn(before.shape[-1], generator=maker)
        after = run_probed(model, batch, site.name, {site.name: lp.steer(vector, 2.0)})
        moved = real[..., None] if before.ndim == 3 else torch.ones(len(before), 1, dtype=torch.bool)
        expected = torch.where(moved, before + 2.0 * vector, before)
        if site.part is None or site.part.bias is None:
            assert torch.equal(after, expected), site.name
        else:
            # the model adds a bias to what is put there: two more roundings, of values of a few units
            torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
            assert torch.equal(after[~real], before[~real]), site.name


def test_steering_moves_every_editable_site_by_the_vector_at_real_tokens_and_nowhere_else(name: str) -> None:
    batch = make_batch()
    check_steering(build(name), batch, batch["attention_mask"].bool())


@pytest.mark.parametrize("family", sorted(PLAIN))
def test_steering_moves_every_site_of_every_head(family: str) -> None:
    if not is_known(PLAIN[family]):
        pytest.skip(f"this transformers has no {family}")
    for head in list_heads(PLAIN[family]):
        batch = make_head_batch(head)
        options = {} if not head.endswith(("CausalLM", "LMHeadModel", "Decoder")) else {"use_cache": False}
        real = batch["attention_mask"].bool()
        model = build_head(PLAIN[family], head)
        sites = [s for s in lp.sites(model) if s.name in ("layers.1", "layers.0.attention.context", "logits")]
        for site in sites:
            before = run_probed(model, {**batch, **options}, site.name)
            vector = torch.ones(before.shape[-1])
            after = run_probed(model, {**batch, **options}, site.name, {site.name: lp.steer(vector)})
            flat = real.flatten(0, -2)
            moved = flat[..., None] if before.shape[:2] == flat.shape else torch.ones_like(before, dtype=torch.bool)
            assert torch.equal(after, torch.where(moved, before + vector, before)), (head, site.name)


def test_change_at_every_site_reaches_the_output(name: str) -> None:
    """A site that is edited and not used would move by the vector all the same."""
    model, batch = build(name), make_batch()
    with torch.no_grad():
        bare = model(**batch).last_hidden_state
        for site in lp.sites(model, ["embeddings", "layers.*", "layers.*.*.*"]):
            if is_editable(site) and not site.name.endswith(".key"):  # softmax knows no constant in the keys
                with lp.edit(model, {site.name: lp.noise(1.0)}):
                    assert not torch.allclose(model(**batch).last_hidden_state, bare), site.name


def test_edits_that_change_nothing_are_bit_identical_to_none(name: str) -> None:
    model, batch = build(name), make_batch()
    hooks = list_hooks(model)
    sites = [site.name for site in lp.sites(model) if is_editable(site)]
    nothing = torch.zeros(2, 11, dtype=torch.bool)
    with torch.no_grad():
        bare = model(**batch)
        widths = {site.name: site.width or 32 for site in lp.sites(model)}
        by_token = [site for site in sites if site != "pooler"]
        for edits in (
            {site: lp.steer(torch.ones(widths[site]), 0.0) for site in sites},
            {site: [lp.scale(1.0), lp.noise(0.0)] for site in sites},
            {site: [lp.ablate(where=nothing), lp.noise(1.0, where=nothing)] for site in by_token},
        ):
            with lp.edit(model, edits):
                edited = model(**batch)
            for one, other in zip(bare.to_tuple(), edited.to_tuple(), strict=True):
                assert torch.equal(one, other)
    assert list_hooks(model) == hooks


def test_ablating_a_head_equals_zeroing_its_columns_of_the_output_projection(name: str) -> None:
    model, batch = build(name), make_batch()
    site = lp.sites(model, "layers.0.attention.context")[0]
    num_heads = lp.sites(model, "layers.0.attention.weights")[0].width or 0
    width = (lp.sites(model, "layers.0.attention.query")[0].width or 0) // num_heads
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule(site.module).weight[:, width : 2 * width] = 0
        with lp.Probe(other, "layers.0.attention.out") as probe:
            other(**batch)
        with lp.edit(model, {site.name: lp.ablate(heads=[1], where="all")}):
            made = run_probed(model, batch, "layers.0.attention.out")
    # a product with zeros on the other side: the same sums, in another order for kernels that skip nothing
    torch.testing.assert_close(made, probe["layers.0.attention.out"], rtol=0, atol=1e-6)


def test_every_head_makes_its_own_columns(name: str) -> None:
    """A head's query ablated moves the context in that head's columns alone."""
    model, batch = build(name), make_batch()
    query = f"layers.0.attention.{'query' if name != 'convbert' else 'value'}"
    before = run_probed(model, batch, "layers.0.attention.context")
    after = run_probed(model, batch, "layers.0.attention.context", {query: lp.ablate(heads=[0], where="all")})
    num_heads = lp.sites(model, "layers.0.attention.weights")[0].width or 0
    width = (lp.sites(model, "layers.0.attention.query")[0].width or 0) // num_heads
    moved = (before != after).flatten(0, 1).any(0).nonzero()[:, 0]
    assert moved.numel() and int(moved.max()) < width


def test_several_edits_at_a_site_run_as_written(tiny_bert: Any, batch: Any) -> None:
    value = run_probed(tiny_bert, batch, "layers.1")
    edits = [lp.scale(3.0, where="all"), lp.steer(torch.ones(32), where="all"), lp.clamp(-2.0, 2.0, where="all")]
    assert torch.equal(
        run_probed(tiny_bert, batch, "layers.1", {"layers.1": edits}), (value * 3.0 + torch.ones(32)).clamp(-2.0, 2.0)
    )


def test_patterns_in_several_keys_run_in_their_order(tiny_bert: Any, batch: Any) -> None:
    value = run_probed(tiny_bert, batch, "layers.0")
    edits = {"layers.*": lp.scale(3.0, where="all"), "layers.0": lp.steer(torch.ones(32), where="all")}
    assert torch.equal(run_probed(tiny_bert, batch, "layers.0", edits), value * 3.0 + 1.0)


def test_edits_within_edits_run_outermost_first_and_before_every_read(tiny_bert: Any, batch: Any) -> None:
    value = run_probed(tiny_bert, batch, "layers.1")
    with (
        torch.no_grad(),
        lp.Probe(tiny_bert, "layers.1") as before,
        lp.edit(tiny_bert, {"layers.1": lp.scale(3.0, where="all")}),
        lp.edit(tiny_bert, {"layers.1": lp.steer(torch.ones(32), where="all")}),
        lp.Probe(tiny_bert, "layers.1") as after,
    ):
        tiny_bert(**batch)
    assert torch.equal(after["layers.1"], value * 3.0 + 1.0)
    assert torch.equal(before["layers.1"], after["layers.1"])


def test_model_is_left_as_it_was_whatever_is_raised(tiny_bert: Any, batch: Any) -> None:
    tiny_bert(**batch)
    before = look_at(tiny_bert)
    edits: Any = {"layers.*": lp.noise(1.0), "layers.*.attention.context": lp.ablate("resample", heads=[0])}
    with lp.edit(tiny_bert, edits), torch.no_grad():
        tiny_bert(**batch)
        assert not list_hooks(copy.deepcopy(tiny_bert))

    def fail(value: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), lp.edit(tiny_bert, {"layers.1": lp.replace(fail)}):
        tiny_bert(**batch)
    assert look_at(tiny_bert) == before


def test_values_of_the_model_are_not_written_into(tiny_bert: Any, batch: Any) -> None:
    held: list[Tensor] = []
    tiny_bert.encoder.layer[1].output.register_forward_hook(lambda *all_: held.append(all_[2]))
    with torch.no_grad(), lp.edit(tiny_bert, {"layers.1": [lp.ablate(), lp.clamp(0.0, 1.0)]}):
        tiny_bert(**batch)
    with torch.no_grad():
        tiny_bert(**batch)
    assert torch.equal(held[0], held[1])


def test_gradients_flow_to_vector_scale_factor_and_values(tiny_bert: Any, batch: Any) -> None:
    tiny_bert.requires_grad_(False)
    vector, scale = torch.zeros(32, requires_grad=True), torch.ones((), requires_grad=True)
    factor, values = torch.ones(32, requires_grad=True), torch.zeros(32, requires_grad=True)
    directions = torch.randn(2, 32, requires_grad=True)
    edits: Any = {
        "layers.0": lp.steer(vector, scale),
        "layers.0.attention.query": lp.scale(factor),
        "layers.1": [lp.patch(values, where=-1), lp.project_out(directions)],
    }
    with lp.edit(tiny_bert, edits):
        tiny_bert(**batch).last_hidden_state[:, 0].square().sum().backward()
    assert all(bool(t.grad.isfinite().all()) for t in (vector, scale, factor, values, directions) if t.grad is not None)
    assert vector.grad is not None and factor.grad is not None and vector.grad.abs().sum() > 0


def test_gradient_to_a_vector_is_the_sum_of_those_at_the_site(tiny_bert: Any, batch: Any) -> None:
    vector = torch.zeros(32, requires_grad=True)
    with lp.edit(tiny_bert, {"layers.1": lp.steer(vector)}), lp.Probe(tiny_bert, "layers.1", gradients=True) as probe:
        tiny_bert(**batch).last_hidden_state.square().sum().backward()
    real = batch["attention_mask"].bool()
    # two ways to add up a dozen numbers of a few units in float32
    torch.testing.assert_close(vector.grad, probe.gradients["layers.1"][real].sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_are_edited_when_they_run_again(make_bert: Any, batch: Any, use_reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        model = make_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
        edits: Any = {"layers.*.ffn.out": [lp.scale(3.0), lp.noise(0.5, seed=2)], "layers.1": lp.steer(torch.ones(32))}
        embeds = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with lp.edit(model, edits):
            model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).last_hidden_state.sum().backward()
        grads.append(model.encoder.layer[0].output.dense.weight.grad)
    assert torch.equal(grads[0], grads[1])


def test_autocast_keeps_the_types_it_gave(tiny_bert: Any, batch: Any) -> None:
    kinds: list[torch.dtype] = []

    def note(value: Tensor) -> Tensor:
        kinds.append(value.dtype)
        return value

    edits: Any = {"layers.*.*.*": [lp.steer(torch.ones(32)), lp.replace(note)]}
    edits = {f"layers.0.attention.{part}": edits["layers.*.*.*"] for part in ("query", "context", "out")}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), lp.edit(tiny_bert, edits):
        tiny_bert(**batch)
    assert set(kinds) == {torch.bfloat16}


def test_inference_mode_and_half_precision(tiny_bert: Any, batch: Any) -> None:
    model = tiny_bert.to(torch.bfloat16)
    with torch.inference_mode():
        for edit in (lp.ablate("mean"), lp.ablate("resample"), lp.noise(0.1), lp.project_out(torch.eye(32)[0])):
            with lp.edit(model, {"layers.1": edit}), lp.Probe(model, "layers.1") as probe:
                assert model(**batch).last_hidden_state.isfinite().all()
            assert probe["layers.1"].dtype == torch.bfloat16


def test_chunks_of_the_ffn_are_edited_like_the_whole(make_bert: Any) -> None:
    batch = make_batch(size=10)
    rows = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(0))
    edits: Any = {
        "layers.*.ffn.act": [lp.patch(rows, where=[1, -1]), lp.scale(2.0, where=slice(2, 5)), lp.clamp(-1.0, 1.0)],
        "layers.*.ffn.out": lp.steer(torch.ones(32), where=[0, 6]),
    }
    made = []
    for size in (0, 5):
        model = make_bert(chunk_size_feed_forward=size)
        with torch.no_grad(), lp.edit(model, edits), lp.Probe(model, ["layers.*.ffn.*", "layers.*"]) as probe:
            model(**batch)
        made.append(probe.calls[0])
    for site in made[0]:
        # a product of fewer rows sums in another order; values are a few units
        torch.testing.assert_close(made[1][site], made[0][site], atol=1e-4, rtol=1e-5)
    with pytest.raises(
        OptionError, match=r"lp.ablate at 'layers.0.ffn.act': chunk_size_feed_forward makes its value in"
    ):
        lp.edit(make_bert(chunk_size_feed_forward=5), {"layers.0.ffn.act": lp.ablate("mean")})


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_edited_step_by_step_with_a_cache_or_without(use_cache: bool) -> None:
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.BertLMHeadModel(transformers.BertConfig(**TINY, is_decoder=True)).eval()
    ids = torch.randint(1, 100, (2, 5))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options: Any = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    edits: Any = {
        "layers.1": [lp.steer(torch.ones(32), 3.0, where=[2, 3, 5]), lp.patch(torch.zeros(2, 5, 32), where=1)]
    }
    if not use_cache:
        edits = {"layers.1": edits["layers.1"][0]}
    with lp.edit(model, edits), lp.Probe(model, "layers.1") as probe, torch.no_grad():
        made = model.generate(ids, attention_mask=mask, use_cache=use_cache, **options)
    whole = torch.cat([mask, torch.ones(2, made.shape[1] - 5, dtype=torch.long)], 1)[:, :-1]
    first = edits["layers.1"] if not use_cache else edits["layers.1"][0]
    with lp.edit(model, {"layers.1": first}), lp.Probe(model, "layers.1") as once, torch.no_grad():
        # a cache or none, generate() numbers positions within the text
        places = (whole.cumsum(1) - 1).clamp(min=0)
        model(made[:, :-1], attention_mask=whole, position_ids=places, use_cache=False)
    if use_cache:
        joined = torch.cat([call["layers.1"] for call in probe.calls], 1)  # type: ignore[misc]
        assert torch.equal(joined[0, 1], torch.zeros(32)) and torch.equal(joined[1, 3], torch.zeros(32))
        assert [call.positions for call in probe.calls][1:] == [range(n, n + 1) for n in range(5, 8)]
        seen = torch.ones(2, 8, dtype=torch.bool)
        seen[0, 1:] = seen[1, 3:] = False  # what looks back at a patched token is another
        seen[1, :2] = False
        torch.testing.assert_close(joined[seen], once["layers.1"][seen], rtol=0, atol=1e-5)
    else:
        real = whole.bool()  # padding has other positions in transformers 4
        last: Any = probe.calls[-1]["layers.1"]
        torch.testing.assert_close(last[real], once["layers.1"][real], rtol=0, atol=1e-5)


def test_threads_are_kept_apart(tiny_bert: Any) -> None:
    """Each thread's call has lengths of its own; masks that got mixed up would move padding."""
    batches = [make_batch(num_padded=number % 5, size=6 + number, seed=number) for number in range(8)]
    expected = []
    with torch.no_grad(), lp.edit(tiny_bert, {"layers.*": [lp.scale(2.0), lp.ablate("mean", units=[3])]}):
        expected = [tiny_bert(**batch).last_hidden_state for batch in batches]
        made: list[Any] = [None] * len(batches)

        def work(number: int) -> None:
            with torch.no_grad():
                for _ in range(5):
                    made[number] = tiny_bert(**batches[number]).last_hidden_state

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(one, other) for one, other in zip(expected, made, strict=True))


def test_cross_attention_is_edited_by_the_tokens_of_the_encoder() -> None:
    import transformers

    torch.manual_seed(0)
    decoder = transformers.BertConfig(**TINY, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(transformers.BertConfig(**TINY), decoder)
    model: Any = transformers.EncoderDecoderModel(config).eval()
    batch = {**make_batch(), "decoder_input_ids": torch.randint(6, 100, (2, 4)), "use_cache": False}
    site = "decoder.layers.1.cross_attention.value"
    before, vector = run_probed(model, batch, site), torch.ones(32)
    after = run_probed(model, batch, site, {site: lp.steer(vector)})
    real = batch["attention_mask"].bool()[..., None]
    assert torch.equal(after, torch.where(real, before + vector, before))
    alone = transformers.BertLMHeadModel(decoder).eval()
    states = torch.randn(2, 11, 32)
    with (
        lp.edit(alone, {"layers.1.cross_attention.value": lp.steer(vector)}),
        pytest.raises(CaptureError, match="padding this call does not tell"),
    ):
        alone(input_ids=batch["decoder_input_ids"], encoder_hidden_states=states, use_cache=False)


def test_probe_that_ends_the_forward_early_reads_the_edited_value(tiny_bert: Any, batch: Any) -> None:
    value = run_probed(tiny_bert, batch, "layers.0")
    with (
        torch.no_grad(),
        lp.edit(tiny_bert, {"layers.0": lp.scale(2.0, where="all"), "layers.2": lp.ablate()}),
        lp.Probe(tiny_bert, "layers.0", stop=True) as probe,
    ):
        for _ in range(2):
            assert tiny_bert(**batch) is None
    assert all(torch.equal(call["layers.0"], value * 2.0) for call in probe.calls)  # type: ignore[arg-type]


def test_modules_by_their_own_name_are_edited(tiny_bert: Any, batch: Any) -> None:
    for site in ("module:encoder.layer.1.attention", "module:encoder.layer.1.output.dense:input"):
        before = run_probed(tiny_bert, batch, site)
        after = run_probed(tiny_bert, batch, site, {site: lp.scale(2.0)})
        real = batch["attention_mask"].bool()[..., None]
        assert torch.equal(after, torch.where(real, before * 2.0, before))
    with (
        lp.edit(tiny_bert, {"module:embeddings.word_embeddings:input": lp.scale(2.0, where="all")}),
        pytest.raises(CaptureError, match=r"gave values of torch.int64: only modules that pass floating tensors"),
    ):
        tiny_bert(**batch)


# what is refused


def test_weights_are_refused_by_name_and_context_is_proposed(tiny_bert: Any) -> None:
    with pytest.raises(
        SiteError, match=r"'layers.1.attention.weights' of BertModel.*Edit 'layers.1.attention.context'"
    ):
        lp.edit(tiny_bert, {"layers.1.attention.weights": lp.ablate()})


@pytest.mark.parametrize("family", ["modernbert", "eurobert"])
def test_residual_stream_that_passes_no_module_is_refused(family: str) -> None:
    if not is_known(family):
        pytest.skip("this transformers has no such family")
    with pytest.raises(SiteError, match=r"Edit 'layers.1.attention.out', which is added to it, or 'layers.1'"):
        lp.edit(build(family), {"layers.1.mid": lp.ablate()})


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        ({}, OptionError, "is no edit: give them by site"),
        ({"layers.1": 3}, OptionError, "lp.edit at 'layers.1': 3 is no edit"),
        ({"layers.1": torch.ones(4, 8)}, OptionError, r"lp.edit at 'layers.1': a tensor \(4, 8\) is no edit"),
        ({"layers.9": lp.ablate()}, SiteError, "layers are 0 to 2"),
        ({"layers.1": lp.steer(torch.ones(31))}, OptionError, "its vector has 31 values, the site 32"),
        ({"layers.1": lp.scale(torch.ones(31))}, OptionError, "its factor has 31 values, the site 32"),
        ({"layers.1": lp.project_out(torch.ones(31))}, OptionError, "its direction has 31 values, the site 32"),
        ({"layers.1": lp.patch(torch.ones(3, 31))}, OptionError, "its last dimension has 31 values, the site 32"),
        ({"layers.1": lp.patch({"layers.0": torch.ones(32)})}, OptionError, "the values have no 'layers.1'"),
        ({"layers.1": lp.ablate(heads=[0])}, OptionError, "it has no heads: they are told apart at attention.query"),
        ({"layers.1.attention.context": lp.ablate(heads=[4])}, OptionError, "no heads 4: they are 0 to 3"),
        ({"layers.1": lp.ablate(units=[32])}, OptionError, "no units 32: they are 0 to 31"),
        ({"layers.1": lp.ablate(where="[SEP]")}, OptionError, r"asks for tokens: pass tokenizer="),
        ({"pooler": lp.ablate(where=0)}, OptionError, "it has one vector per text: leave out where"),
        ({"pooler": lp.patch(torch.ones(1, 2, 32))}, OptionError, r"values \(1, 2, 32\) are no \[B, D\]"),
        ({"layers.1": lp.steer(torch.ones(32, device="meta"))}, OptionError, r"its vector is on meta, the site on cpu"),
        (
            {"module:encoder.layer.0.attention": lp.ablate(units=[1])},
            OptionError,
            "its width is not known before it runs",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_a_hook_exists(
    tiny_bert: Any, edits: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        lp.edit(tiny_bert, edits)
    assert not list_hooks(tiny_bert)


def test_an_edit_is_for_one_block(tiny_bert: Any) -> None:
    edit = lp.edit(tiny_bert, {"layers.1": lp.ablate()})
    with edit, pytest.raises(CaptureError, match="this edit is open: make a new one"):
        edit.__enter__()
    with pytest.raises(CaptureError, match="this edit is closed"):
        edit.__enter__()


def test_site_that_was_not_made_is_an_error(make_bert: Any, batch: Any) -> None:
    model = make_bert("BertForMaskedLM")
    edit = lp.edit(model, {"layers.2.ffn.out": lp.scale(2.0, where="all")})
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    with edit, pytest.raises(CaptureError, match=r"ran without making 'layers.2.ffn.out'"):
        model(**batch)


# wrappers


def test_sentence_transformer_is_edited_as_its_model(tiny_model_folder: Path) -> None:
    """It runs the model's `forward`, past the hooks on the model."""
    library = pytest.importorskip("sentence_transformers")
    sentences: Any = library.SentenceTransformer(str(tiny_model_folder), device="cpu")
    bare = sentences.encode(["the quick fox"], convert_to_tensor=True)
    vector = torch.ones(32)
    with lp.edit(sentences, {"layers.2": lp.steer(vector)}):
        steered = sentences.encode(["the quick fox"], convert_to_tensor=True)
    # a mean of five tokens, each moved by the vector, in float32
    torch.testing.assert_close(steered, bare + vector, rtol=0, atol=1e-5)
    assert torch.equal(sentences.encode(["the quick fox"], convert_to_tensor=True), bare)


def test_copies_that_run_with_the_hooks_of_an_edit_are_refused(tiny_bert: Any, batch: Any) -> None:
    with pytest.raises(ArchitectureError, match="DataParallel runs copies of the model at once"):
        lp.edit(torch.nn.DataParallel(tiny_bert), {"layers.1": lp.ablate()})
    with lp.edit(tiny_bert, {"layers.1": lp.ablate()}):
        replica = tiny_bert._replicate_for_data_parallel()
        with pytest.raises(CaptureError, match=r"nn.DataParallel makes such copies"):
            replica(**batch)
