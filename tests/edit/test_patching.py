"""Sweeps of patches: against one patch at a time, against clean's own metric, against a trained model's logic."""

import csv
import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMultipleChoice

import layerprobe as lp
from families import build
from layerprobe.analysis.figures import GREY
from layerprobe.edit.effects import Effects
from layerprobe.errors import CaptureError, OptionError, SiteError, StoreError
from sizes import TINY
from traces import look_at

CLEAN = {"input_ids": torch.tensor([[2, 10, 11, 12, 13, 3]])}
CORRUPT = {"input_ids": torch.tensor([[2, 10, 40, 12, 13, 3]])}


def metric(output: Any) -> Tensor:
    return output.last_hidden_state[:, 4, 7]


def patch_one(model: Any, site: str, places: list[int], columns: slice = slice(None)) -> float:
    """A slow second way: one forward with a plain hook of torch's own."""
    with torch.no_grad(), lp.Probe(model, site) as probe:
        model(**CLEAN)
    clean, found = probe[site], lp.sites(model, site)[0]

    def put(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, places, columns] = clean[:, places, columns]
        return value

    module = model.get_submodule(found.module)
    if found.takes == "input":
        handle = module.register_forward_pre_hook(lambda _, args: (put(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(
            lambda _, __, output: (put(output[0]), *output[1:]) if isinstance(output, tuple) else put(output)
        )
    with handle, torch.no_grad():
        return float(metric(model(**CORRUPT)))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_position_of_every_site_is_what_one_patch_at_a_time_gives(tiny_bert: Any, batch_size: int) -> None:
    before = look_at(tiny_bert)
    found = lp.patching(
        tiny_bert, CLEAN, CORRUPT, metric, ["embeddings", "layers.*", "layers.*.ffn.act"], batch_size=batch_size
    )
    assert look_at(tiny_bert) == before
    assert found.positions == tuple(range(6)) and found.effects.shape == (len(found.sites), 6)
    for row, site in enumerate(found.sites):
        for place in range(6):
            expected = patch_one(tiny_bert, site, [place]) - found.corrupt
            # another batch is another matrix product: the last bits of float32
            assert float(found.effects[row, place]) == pytest.approx(expected, abs=1e-5), (site, place)


def test_every_head_is_what_one_patch_at_a_time_gives(tiny_bert: Any) -> None:
    sites = ["layers.*.attention.context", "layers.1.attention.query"]
    whole = lp.patching(tiny_bert, CLEAN, CORRUPT, metric, sites, positions=False, heads=True, batch_size=5)
    positions: Any = np.array([2, -1])
    each = lp.patching(tiny_bert, CLEAN, CORRUPT, metric, sites, positions=positions, heads=True)
    assert whole.effects.shape == (4, 4) and each.effects.shape == (4, 2, 4) and each.positions == (2, 5)
    for row, site in enumerate(whole.sites):
        for head in range(4):
            columns = slice(8 * head, 8 * head + 8)
            expected = patch_one(tiny_bert, site, list(range(6)), columns) - whole.corrupt
            assert float(whole.effects[row, head]) == pytest.approx(expected, abs=1e-5)
            expected = patch_one(tiny_bert, site, [5], columns) - each.corrupt
            assert float(each.effects[row, 1, head]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "path"), [("modernbert", "layers.1.attn.Wqkv"), ("deberta", "encoder.layer.1.attention.self.in_proj")]
)
def test_heads_of_a_fused_projection_are_patched_one_by_one(name: str, path: str) -> None:
    model = build(name)
    module = model.get_submodule(path)
    sites = [f"layers.1.attention.{third}" for third in ("query", "key", "value")]
    found = lp.patching(model, CLEAN, CORRUPT, metric, sites, positions=[2, 4], heads=True)
    kept: list[Tensor] = []
    with torch.no_grad(), module.register_forward_hook(lambda _, __, output: kept.append(output)):
        model(**CLEAN)
    for third, place, head in product(range(3), (2, 4), range(4)):
        # ModernBERT lays out all queries, keys and values behind one another, DeBERTa those of a head
        first = 32 * third + 8 * head if name == "modernbert" else 24 * head + 8 * third

        def put(_: Any, __: Any, output: Tensor, place: int = place, first: int = first) -> Tensor:
            output = output.clone()
            output[:, place, first : first + 8] = kept[0][:, place, first : first + 8]
            return output

        with torch.no_grad(), module.register_forward_hook(put):
            expected = float(metric(model(**CORRUPT))) - found.corrupt
        # another batch is another matrix product: the last bits of float32
        assert float(found.effects[third, (2, 4).index(place), head]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", ["exact", "attribution"])
def test_of_a_sentence_transformer_the_model_in_it_is_swept(tiny_model_folder: Any, method: str) -> None:
    library = pytest.importorskip("sentence_transformers")
    sentences = library.SentenceTransformer(str(tiny_model_folder), device="cpu")
    found = lp.patching(sentences, CLEAN, CORRUPT, metric, method=method)
    expected = lp.patching(sentences[0].auto_model, CLEAN, CORRUPT, metric, method=method)
    assert found.clean != found.corrupt
    assert torch.equal(found.effects, expected.effects)


def test_patching_all_of_a_layer_gives_cleans_metric(tiny_bert: Any) -> None:
    found = lp.patching(tiny_bert, CLEAN, CORRUPT, metric, ["embeddings", "layers.*"], positions=False)
    assert found.clean != found.corrupt
    # a batch of copies is another matrix product: the last bits of float32
    assert found.normalised.tolist() == pytest.approx([1.0] * 4, abs=1e-4)
    assert float(found.effects[-1]) == pytest.approx(found.clean - found.corrupt, abs=1e-6)


def test_before_the_changed_word_is_read_only_its_place_matters(tiny_bert: Any) -> None:
    found = lp.patching(tiny_bert, CLEAN, CORRUPT, metric, ["embeddings", "layers.2"])
    assert found.effects[0].nonzero().tolist() == [[2]]
    assert found.effects[1].abs().argmax() == 4


@pytest.fixture(scope="module")
def trained() -> Any:
    """A small masked model, trained to copy the second token to the mask at the end."""
    import transformers

    torch.manual_seed(0)
    sizes = TINY | {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model: Any = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        ids = torch.randint(10, 40, (32, 6))
        wanted = ids[:, 1].clone()
        ids[:, 5] = 4
        loss = nn.functional.cross_entropy(model(input_ids=ids).logits[:, 5], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_attribution_correlates_with_exact_patching_on_a_trained_model(trained: Any) -> None:
    clean, corrupt = ({"input_ids": torch.tensor([[20, token, 30, 31, 32, 4]])} for token in (15, 25))

    def difference(output: Any) -> Tensor:
        return output.logits[:, 5, 15] - output.logits[:, 5, 25]

    options: Any = {"sites": ["embeddings", "layers.*"]}
    before = [parameter.grad for parameter in trained.parameters()]
    exact = lp.patching(trained, clean, corrupt, difference, **options)
    estimate = lp.patching(trained, clean, corrupt, difference, **options, method="attribution")
    assert exact.clean > 5 > -5 > exact.corrupt  # it has learnt to copy
    # the word is at its place before the last layer, and at the mask after it
    assert exact.normalised[0].argmax() == 1 and exact.normalised[-1].argmax() == 5
    joined = torch.stack([exact.effects.flatten(), estimate.effects.flatten()])
    assert float(torch.corrcoef(joined)[0, 1]) > 0.8
    assert (estimate.clean, estimate.corrupt) == (exact.clean, exact.corrupt)
    assert all(one is other.grad for one, other in zip(before, trained.parameters(), strict=True))


@pytest.mark.parametrize("sites", ["layers.*", "layers.*.attention.value"])
def test_attribution_of_a_small_change_is_the_exact_effect(tiny_bert: Any, sites: str) -> None:
    """A first-order term is exact in the limit: two texts a hair apart, in float64, without a weight that learns."""
    model = tiny_bert.double().requires_grad_(False)
    embeds = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = embeds + 1e-6 * torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    clean, corrupt = {"inputs_embeds": other}, {"inputs_embeds": embeds}
    heads = sites != "layers.*"
    exact = lp.patching(model, clean, corrupt, metric, sites, heads=heads)
    estimate = lp.patching(model, clean, corrupt, metric, sites, heads=heads, method="attribution")
    assert exact.effects.shape == estimate.effects.shape
    # what is left is of second order: a millionth of the effect
    torch.testing.assert_close(estimate.effects, exact.effects, rtol=1e-3, atol=1e-10)


def test_attribution_takes_two_forwards_and_one_backward(tiny_bert: Any) -> None:
    calls: list[str] = []
    handles = [
        tiny_bert.register_forward_hook(lambda *_: calls.append("forward")),
        tiny_bert.encoder.layer[0].register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    embeds = [torch.randn(1, 6, 32, requires_grad=True) for _ in range(2)]
    clean, corrupt = ({"inputs_embeds": one} for one in embeds)
    lp.patching(tiny_bert, clean, corrupt, metric, ["embeddings", "layers.*"], method="attribution")
    for handle in handles:
        handle.remove()
    assert calls == ["forward", "forward", "backward"]


def test_a_sweep_takes_as_many_forwards_as_batches(tiny_bert: Any) -> None:
    sizes: list[int] = []
    handle = tiny_bert.register_forward_hook(lambda _, __, output: sizes.append(len(output[0])))
    lp.patching(tiny_bert, CLEAN, CORRUPT, metric, batch_size=8)
    handle.remove()
    assert sizes == [1, 1, 8, 8, 2]


def test_padding_is_not_patched(tiny_bert: Any) -> None:
    mask = {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}
    found = lp.patching(tiny_bert, {**CLEAN, **mask}, {**CORRUPT, **mask}, metric)
    assert found.positions == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("scale", "cells"),
    [(1.0, ["1.5", "0.0", "-1.235"]), (1e-4, ["0.00015", "0.0", "-0.000123"]), (0.0, ["0.0", "0.0", "0.0"])],
)
def test_a_table_of_small_effects_has_as_many_digits(scale: float, cells: list[str]) -> None:
    effects = torch.tensor([[1.5, -2e-7, -1.23456]], dtype=torch.float64) * scale
    found = Effects(("layers.0",), (0, 1, 2), None, effects, clean=1.0, corrupt=0.0, method="exact")
    assert str(found).splitlines()[2].split()[1:] == cells


def test_effects_that_are_no_numbers_are_empty_cells_and_nulls() -> None:
    effects = torch.tensor([[1.5, float("nan"), float("inf")]], dtype=torch.float64)
    found = Effects(("layers.0",), (0, 1, 2), None, effects, clean=float("nan"), corrupt=0.0, method="exact")
    assert found.to_csv().splitlines()[1] == "layers.0,1.5,,"
    document = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert document["effects"] == [[1.5, None, None]] and document["clean"] is None


def test_effects_print_save_and_plot(tiny_bert: Any, tiny: Any, tmp_path: Path) -> None:
    found = lp.patching(tiny_bert, CLEAN, CORRUPT, metric, tokenizer=tiny.tokenizer)
    assert found.tokens is not None
    words = tiny.tokenizer.convert_ids_to_tokens(CLEAN["input_ids"][0].tolist())
    other = tiny.tokenizer.convert_ids_to_tokens([40])[0]
    assert found.tokens == (*words[:2], f"{words[2]}/{other}", *words[3:])
    lines = str(found).splitlines()
    assert lines[0].split() == ["site", *found.tokens] and [line.split()[0] for line in lines[2:5]] == list(found.sites)
    assert lines[-1].startswith(f"metric: clean {found.clean:.4g}, corrupt {found.corrupt:.4g}")
    rows = list(csv.reader(found.to_csv(tmp_path / "effects.csv").splitlines()))
    assert [[float(cell) for cell in row[1:]] for row in rows[1:]] == found.effects.tolist()
    assert (tmp_path / "effects.csv").read_text(encoding="utf-8") == found.to_csv()
    document = json.loads(found.to_json(tmp_path / "effects.json"))
    assert torch.equal(torch.tensor(document["effects"], dtype=torch.float64), found.effects)
    assert document["sites"] == list(found.sites) and document["clean"] == found.clean
    for write in (found.to_csv, found.to_json):
        with pytest.raises(StoreError, match="there is no folder"):
            write(tmp_path / "nowhere" / "effects")
    pytest.importorskip("matplotlib")
    with pytest.raises(OptionError, match=r"effects\.xyz"):
        found.plot(tmp_path / "effects.xyz")
    found.plot(tmp_path / "effects.png")
    assert (tmp_path / "effects.png").read_bytes().startswith(b"\x89PNG")
    (image,) = found.plot().axes[0].images
    assert torch.equal(torch.as_tensor(image.get_array().data), found.effects)
    heads = lp.patching(tiny_bert, CLEAN, CORRUPT, metric, "layers.*.attention.context", positions=False, heads=True)
    assert str(heads).splitlines()[0].split()[1:3] == ["head", "0"]
    assert heads.plot().axes[0].get_xlabel() == "head"


def make_effects(*sizes: int, site: str = "layers", token: str = "word") -> Effects:
    """Effects of sites, positions and heads as many as `sizes` says, 0 for all at once."""
    num_sites, num_positions, num_heads = sizes
    values = torch.linspace(-2, 1, num_sites * max(1, num_positions) * max(1, num_heads), dtype=torch.float64)
    return Effects(
        tuple(f"{site}.{number}" for number in range(num_sites)),
        tuple(range(num_positions)) if num_positions else None,
        tuple(range(num_heads)) if num_heads else None,
        values.reshape([size for size in sizes if size]),
        1.0,
        0.0,
        "exact",
        tuple(f"{token}{number}" for number in range(num_positions)) if num_positions else None,
    )


@pytest.mark.parametrize(
    "found",
    [
        make_effects(1, 0, 0),
        make_effects(6, 512, 0),
        make_effects(40, 12, 0, token="w"),
        make_effects(24, 3, 16),
        make_effects(2, 0, 24),
        make_effects(3, 4, 0, site="module:bert.encoder.layer.0.attention.self.query", token="a long word " * 9),
    ],
)
def test_a_picture_of_any_sweep_fits_a_page_and_its_names_can_be_read(found: Effects) -> None:
    pytest.importorskip("matplotlib")
    figure = found.plot()
    figure.draw_without_rendering()
    assert max(figure.get_size_inches()) < 16
    axes = figure.axes[0]
    marks, labels = axes.get_xticklabels(), axes.get_yticklabels()
    box = axes.get_tightbbox()
    assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
    line = marks[0].get_size() * figure.dpi / 72
    down = [label.get_window_extent() for label in labels]
    assert all(after.y0 >= before.y1 for before, after in pairwise(down))
    across = [mark.get_window_extent() for mark in marks]
    if marks[0].get_rotation():
        assert all(after.x1 - before.x1 >= line for before, after in pairwise(across))
    else:
        assert all(after.x0 > before.x1 for before, after in pairwise(across))
    if len(marks) < axes.images[0].get_array().shape[1]:
        assert f"one in {int(marks[1].get_position()[0])} is named" in axes.get_xlabel()


def test_an_effect_that_is_no_number_leaves_the_colours_of_the_others() -> None:
    colors = pytest.importorskip("matplotlib.colors")
    found = make_effects(2, 3, 0)
    found.effects[0, 1], found.effects[1, 2] = float("nan"), float("inf")
    axes = found.plot().axes[0]
    assert axes.images[0].get_clim() == (-2, 2)
    assert colors.to_hex(axes.get_facecolor()).upper() == GREY  # what shows where there is no colour


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"metric": 3}, OptionError, "metric=3 is no function"),
        (
            {"metric": lambda output: output.last_hidden_state},
            CaptureError,
            r"the metric gave \(1, 6, 32\) for 1 row: ",
        ),
        ({"metric": lambda _: 3.0}, CaptureError, "the metric gave float for 1 row: "),
        ({"clean": {"input_ids": torch.ones(1, 5, dtype=torch.long)}}, OptionError, "of the same number of tokens"),
        ({"clean": 3}, OptionError, "clean is int: give what the model is called with"),
        ({"clean": {"x": torch.ones(1, 6)}, "corrupt": {"x": torch.ones(1, 6)}}, OptionError, r"clean has \['x'\]"),
        ({"sites": "pooler"}, OptionError, "'pooler': it has no row per token"),
        ({"sites": "layers.0.attention.weights"}, SiteError, "Edit 'layers.0.attention.context'"),
        ({"heads": True}, OptionError, "'layers.0' by heads: it has none"),
        ({"positions": [6]}, OptionError, r"positions=\[6\]: the texts have 6"),
        ({"positions": []}, OptionError, r"positions=\[\]"),
        ({"method": "guess"}, OptionError, "no method 'guess': use 'exact' or 'attribution'"),
        ({"batch_size": 0}, OptionError, "batch_size is 0"),
    ],
)
def test_what_cannot_be_swept_is_refused(tiny_bert: Any, changes: Any, error: type[Exception], message: str) -> None:
    options: Any = {"clean": CLEAN, "corrupt": CORRUPT, "metric": metric} | changes
    with pytest.raises(error, match=message):
        lp.patching(tiny_bert, **options)


def test_masks_and_modes_that_do_not_fit_are_refused(tiny_bert: Any) -> None:
    masks = [{"attention_mask": torch.tensor([[1, 1, 1, 1, 1, last]])} for last in (0, 1)]
    with pytest.raises(OptionError, match="have other attention masks"):
        lp.patching(tiny_bert, {**CLEAN, **masks[0]}, {**CORRUPT, **masks[1]}, metric)
    with pytest.raises(OptionError, match="in training mode"):
        lp.patching(tiny_bert.train(), CLEAN, CORRUPT, metric)


def test_shares_of_no_difference_are_refused(tiny_bert: Any) -> None:
    found = lp.patching(tiny_bert, CLEAN, CLEAN, metric, "layers.0")
    with pytest.raises(OptionError, match="clean and corrupt both give"):
        _ = found.normalised


# pairs of an encoder and a decoder


@pytest.fixture(scope="module")
def pair() -> Any:
    import transformers

    torch.manual_seed(0)
    decoder = transformers.BertConfig(**TINY, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(transformers.BertConfig(**TINY), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config).eval()


def last_logit(output: Any) -> Tensor:
    return output.logits[:, -1, 7]


def make_pair_batch(third: int, **given: Any) -> dict[str, Any]:
    return {"input_ids": torch.tensor([[5, third]]), "use_cache": False, **given}


@pytest.mark.parametrize("method", ["exact", "attribution"])
def test_sites_of_a_decoder_are_patched_at_its_own_tokens(pair: Any, tiny: Any, method: str) -> None:
    clean, corrupt = (make_pair_batch(9, decoder_input_ids=torch.tensor([[1, 20, token, 22]])) for token in (30, 40))
    sites = ["decoder.embeddings", "decoder.layers.*", "logits"]
    found = lp.patching(pair, clean, corrupt, last_logit, sites, method=method, tokenizer=tiny.tokenizer)
    assert found.positions == (0, 1, 2, 3) and found.tokens is not None
    names = tiny.tokenizer.convert_ids_to_tokens([1, 20, 30, 22, 40])
    assert found.tokens == (names[0], names[1], f"{names[2]}/{names[4]}", names[3])
    # the texts differ at one token, and the last one's logits are the metric; a batch of copies rounds otherwise
    reaches = found.effects.abs() > 1e-6
    assert reaches[0].nonzero().tolist() == [[2]] and reaches[-1].nonzero().tolist() == [[3]]
    if method == "exact":
        assert float(found.effects[-1, 3]) == pytest.approx(found.clean - found.corrupt, abs=1e-6)


def test_sites_of_an_encoder_are_patched_at_its_own_tokens(pair: Any) -> None:
    target = torch.tensor([[1, 20, 30, 22]])
    clean, corrupt = (make_pair_batch(third, decoder_input_ids=target) for third in (9, 8))
    found = lp.patching(pair, clean, corrupt, last_logit, ["encoder.embeddings", "encoder.layers.*"])
    assert found.positions == (0, 1) and (found.effects[0].abs() > 1e-6).nonzero().tolist() == [[1]]
    both = ["encoder.embeddings", "decoder.layers.2"]
    with pytest.raises(OptionError, match="sites of the encoder and of the decoder have other tokens"):
        lp.patching(pair, clean, corrupt, last_logit, both)
    whole = lp.patching(pair, clean, corrupt, last_logit, both, positions=False)
    # all of the last layer, or of the only text that differs, is clean's metric, to the last bits of float32
    assert whole.normalised.tolist() == pytest.approx([1.0, 1.0], abs=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of what transformers does with labels
def test_labels_and_masks_of_a_decoder_tell_its_tokens(pair: Any, tiny: Any) -> None:
    labels = torch.tensor([[20, 30, 22, -100, -100]])
    clean, corrupt = (make_pair_batch(third, labels=labels) for third in (9, 8))
    found = lp.patching(pair, clean, corrupt, last_logit, "decoder.layers.*", tokenizer=tiny.tokenizer)
    # shifted by one: the start token, and the labels as far as there are any
    assert found.positions == (0, 1, 2, 3)
    assert found.tokens == tuple(tiny.tokenizer.convert_ids_to_tokens([1, 20, 30, 22]))
    given = {
        "decoder_input_ids": torch.tensor([[1, 20, 30, 22]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 0]]),
    }
    clean, corrupt = (make_pair_batch(third, **given) for third in (9, 8))
    assert lp.patching(pair, clean, corrupt, last_logit, "decoder.layers.*").positions == (0, 1, 2)
    corrupt["decoder_attention_mask"] = torch.tensor([[1, 1, 0, 0]])
    with pytest.raises(OptionError, match="have other attention masks"):
        lp.patching(pair, clean, corrupt, last_logit, "decoder.layers.*")
    nothing = make_pair_batch(9)
    with pytest.raises(OptionError, match=r"give decoder_input_ids, decoder_inputs_embeds or labels"):
        lp.patching(pair, nothing, nothing, last_logit, "decoder.layers.*")


def test_several_choices_are_refused() -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = BertForMultipleChoice(config).eval()
    batch = {"input_ids": torch.arange(12).reshape(1, 2, 6)}
    with pytest.raises(OptionError, match=r"input_ids of shape \(1, 2, 6\): a text with several choices"):
        lp.patching(model, batch, batch, lambda out: out.logits[:, 0])
