"""What each edit does to a value, against its formula in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.errors import CaptureError, OptionError

SITE = "layers.1"
# what types forbid is refused all the same
loose: Any = lp


@pytest.fixture
def values(tiny_bert: Any, batch: Any) -> Tensor:
    return read(tiny_bert, batch)


def read(model: Any, batch: Any, *edits: Any, site: str = SITE) -> Tensor:
    with torch.no_grad(), lp.Probe(model, site) as probe:
        if edits:
            with lp.edit(model, {site: list(edits)}):
                model(**batch)
        else:
            model(**batch)
    return probe[site]


def real_of(batch: Any) -> Tensor:
    return batch["attention_mask"].bool()


def test_directions_are_projected_out(tiny_bert: Any, batch: Any, values: Tensor) -> None:
    directions = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [10.0], [0.1]])
    after = read(tiny_bert, batch, lp.project_out(directions))
    rows, d = values.double().numpy(), directions.double().numpy()
    expected = rows - rows @ d.T @ np.linalg.inv(d @ d.T) @ d
    real = real_of(batch)
    # one product and its inverse in float32, of values of a few units
    np.testing.assert_allclose(after[real].numpy(), expected[real.numpy()], rtol=0, atol=1e-5)
    assert torch.equal(after[~real], values[~real])
    assert (after[real] @ directions.T).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_directions_that_follow_from_the_others_but_for_rounding_are_refused(dtype: torch.dtype) -> None:
    """Class means less their mean add up to zero; what rounding leaves of it is a direction that means nothing."""
    noise = torch.Generator().manual_seed(0)
    means = (torch.randn(4, 384, generator=noise, dtype=torch.float64) + 2).to(dtype)
    apart = means - means.mean(0)
    with pytest.raises(OptionError, match="the rank of 4 directions is 3: "):
        lp.project_out(apart)
    # short beside the others is not nothing, and near to another is not the same
    lengths = torch.tensor([[1.0], [1e-4], [1e4]], dtype=dtype)
    lp.project_out(apart[:3] * lengths)
    lp.project_out(torch.stack([apart[0], apart[0] + apart[1] / 8]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_directions_that_have_most_in_common_are_taken(dtype: torch.dtype) -> None:
    """Class means as they are: the longest that they add up to is long, and says nothing of what tells them apart."""
    noise = torch.Generator().manual_seed(0)
    common = 10 * torch.randn(384, generator=noise, dtype=torch.float64)
    means = (torch.randn(100, 384, generator=noise, dtype=torch.float64) + common).to(dtype)
    units = means.double() / means.double().norm(dim=1, keepdim=True)
    lengths = torch.linalg.svdvals(units)
    assert lengths[0] > 9 and lengths[-1] > 0.04
    lp.project_out(means)


@pytest.mark.parametrize("num_classes", [20, 100])
def test_what_a_mean_of_many_rows_rounds_away_is_no_direction(num_classes: int) -> None:
    noise = torch.Generator().manual_seed(0)
    means = torch.randn(num_classes, 384, generator=noise) + 5 * torch.randn(384, generator=noise)
    with pytest.raises(OptionError, match=f"the rank of {num_classes} directions is {num_classes - 1}: "):
        lp.project_out(means - means.mean(0))


def test_a_learned_direction_is_projected_out_like_a_given_one(tiny_bert: Any, batch: Any) -> None:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    fixed = read(tiny_bert, batch, lp.project_out(direction))
    learned = read(tiny_bert, batch, lp.project_out(direction.requires_grad_()))
    assert torch.equal(fixed, learned)


def test_mean_is_over_the_tokens_that_are_meant(tiny_bert: Any, batch: Any, values: Tensor) -> None:
    real = real_of(batch)
    after = read(tiny_bert, batch, lp.ablate("mean"))
    expected = values[real].double().mean(0)
    # float32 sums of a dozen numbers
    torch.testing.assert_close(after[real].double(), expected.expand(int(real.sum()), -1), rtol=0, atol=1e-6)
    assert torch.equal(after[~real], values[~real])
    everywhere = read(tiny_bert, batch, lp.ablate("mean", where="all", units=[5]))
    torch.testing.assert_close(everywhere[..., 5], values[..., 5].mean().expand(3, 7), rtol=0, atol=1e-6)
    assert torch.equal(everywhere[..., 6:], values[..., 6:])
    one = torch.zeros(1, 7, dtype=torch.bool)
    one[0, 0] = True
    first = read(tiny_bert, batch, lp.ablate("mean", where=one))
    torch.testing.assert_close(first[:, 0], values[:, 0].mean(0).expand(3, -1), rtol=0, atol=1e-6)


def test_mean_of_single_values_is_theirs(tiny_bert: Any, batch: Any, values: Tensor) -> None:
    mask = torch.zeros(3, 7, 32, dtype=torch.bool)
    mask[0, :2, 4] = mask[1, 3, 9] = True
    after = read(tiny_bert, batch, lp.ablate("mean", where=mask))
    expected = values.clone()
    expected[0, :2, 4] = values[0, :2, 4].mean()
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


def test_resampling_puts_the_same_vectors_in_another_order(tiny_bert: Any, batch: Any, values: Tensor) -> None:
    real = real_of(batch)
    after = read(tiny_bert, batch, lp.ablate("resample", seed=3))
    assert not torch.equal(after, values)
    assert torch.equal(after[~real], values[~real])

    def sort(rows: Tensor) -> list[list[float]]:
        return sorted(rows.tolist())

    assert sort(after[real]) == sort(values[real])
    assert torch.equal(after, read(tiny_bert, batch, lp.ablate("resample", seed=3)))
    assert not torch.equal(after, read(tiny_bert, batch, lp.ablate("resample", seed=4)))


def test_noise_has_its_size_its_seed_and_leaves_the_models_random_numbers(tiny_bert: Any) -> None:
    ids = torch.randint(1, 100, (16, 60), generator=torch.Generator().manual_seed(0))
    values = read(tiny_bert, {"input_ids": ids})
    before = torch.get_rng_state()
    after = read(tiny_bert, {"input_ids": ids}, lp.noise(0.5, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    drawn = after - values
    # 30,720 numbers: five standard errors of a mean are 0.015, of a deviation 0.01
    assert abs(float(drawn.mean())) < 0.015 and abs(float(drawn.std()) - 0.5) < 0.011
    assert torch.equal(after, read(tiny_bert, {"input_ids": ids}, lp.noise(0.5, seed=1)))
    assert not torch.equal(after, read(tiny_bert, {"input_ids": ids}, lp.noise(0.5, seed=2)))


def test_each_call_and_each_site_draws_anew(tiny_bert: Any, batch: Any) -> None:
    made = []
    for _ in range(2):
        edits = {"layers.*": [lp.ablate(where="all"), lp.noise(1.0, where="all")]}
        with torch.no_grad(), lp.edit(tiny_bert, edits), lp.Probe(tiny_bert, "layers.*") as probe:
            tiny_bert(**batch)
            tiny_bert(**batch)
        made.append([call[site] for call in probe.calls for site in ("layers.0", "layers.1")])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    assert len({float(value.sum()) for value in made[0]}) == 4


def test_patching_every_layer_from_a_probe_gives_that_calls_output(tiny_bert: Any, batch: Any) -> None:
    other = {**batch, "input_ids": batch["input_ids"].flip(1)}
    with torch.no_grad():
        with lp.Probe(tiny_bert, "layers.*") as probe:
            clean = tiny_bert(**batch).last_hidden_state
        for values in (probe, probe.calls[0], {"layers.2": probe["layers.2"]}):
            with lp.edit(tiny_bert, {"layers.2": lp.patch(values, where="all")}):
                assert torch.equal(tiny_bert(**other).last_hidden_state, clean)


def test_rows_of_one_text_are_laid_on_its_real_tokens_whichever_side_is_padded(tiny_bert: Any) -> None:
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long), "attention_mask": mask}
    before, after = read(tiny_bert, batch), read(tiny_bert, batch, lp.patch(rows))
    assert torch.equal(after[0, :4], rows) and torch.equal(after[1, 2:], rows)
    assert torch.equal(after[mask == 0], before[mask == 0])
    with pytest.raises(CaptureError, match=r"4 rows for texts of \[4, 3\] real tokens"):
        read(
            tiny_bert, {**batch, "attention_mask": mask - torch.eye(6, dtype=torch.long)[[5, 2]] * mask}, lp.patch(rows)
        )


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_example_of_a_store_is_patched_in(tiny: Any, tmp_path: Any, dtype: str | None) -> None:
    texts = ["the quick fox", "the lazy dog over ."]
    store = lp.extract(tiny.model, texts, tmp_path / "acts", tokenizer=tiny.tokenizer, sites="layers.1", dtype=dtype)
    batch = dict(tiny.tokenizer("the dog", return_tensors="pt"))
    example = store.example(0)
    length = len(example.input_ids)
    ids = torch.full((1, length), 7)
    after = read(tiny.model, {"input_ids": ids}, lp.patch(example))
    assert torch.equal(after[0], example["layers.1"].float())
    assert batch["input_ids"].shape[1] != length


def test_a_batch_of_another_shape_is_refused(tiny_bert: Any, batch: Any) -> None:
    with pytest.raises(CaptureError, match=r"values of shape \(2, 7, 32\) do not fit \(3, 7, 32\)"):
        read(tiny_bert, batch, lp.patch(torch.zeros(2, 7, 32)))
    one = torch.randn(1, 7, 32)
    assert torch.equal(read(tiny_bert, batch, lp.patch(one, where="all")), one.expand(3, -1, -1))


def test_vectors_of_texts_are_patched_scaled_and_ablated(tiny_bert: Any, batch: Any) -> None:
    pooled = read(tiny_bert, batch, site="pooler")
    rows = torch.randn(3, 32)
    assert torch.equal(read(tiny_bert, batch, lp.patch(rows), site="pooler"), rows)
    assert torch.equal(read(tiny_bert, batch, lp.patch(rows[0]), site="pooler"), rows[0].expand(3, -1))
    assert torch.equal(read(tiny_bert, batch, lp.scale(0.5), site="pooler"), pooled * 0.5)
    shuffled = read(tiny_bert, batch, lp.ablate("resample", seed=1), site="pooler")
    assert sorted(shuffled.tolist()) == sorted(pooled.tolist())


def test_heads_and_units_are_columns(tiny_bert: Any, batch: Any) -> None:
    site = "layers.0.attention.context"
    before = read(tiny_bert, batch, site=site)
    after = read(tiny_bert, batch, lp.ablate(heads=[-1], where="all"), site=site)
    assert torch.equal(after[..., :24], before[..., :24]) and not after[..., 24:].any()
    after = read(tiny_bert, batch, lp.scale(2.0, units=[3, -1], where="all"), site=site)
    factor = torch.ones(32)
    factor[[3, 31]] = 2.0
    assert torch.equal(after, before * factor)


def test_a_function_that_writes_into_what_it_gets_changes_only_what_is_meant(
    tiny_bert: Any, batch: Any, values: Tensor
) -> None:
    seen: list[Tensor] = []
    keep = tiny_bert.encoder.layer[1].output.register_forward_hook(lambda *given: seen.append(given[2]))
    after = read(tiny_bert, batch, lp.replace(lambda value: value.mul_(2), where=0))
    keep.remove()
    real = real_of(batch)
    first = real & (real.cumsum(1) == 1)
    assert torch.equal(after, torch.where(first[..., None], values * 2, values))
    assert torch.equal(seen[0], values)


def test_a_function_replaces_values_where_it_is_asked(tiny_bert: Any, batch: Any, values: Tensor) -> None:
    after = read(tiny_bert, batch, lp.replace(torch.tanh, where=0))
    assert torch.equal(after[:, 0], values[:, 0].tanh()) and torch.equal(after[:, 1:], values[:, 1:])
    for function, got in ((lambda value: value[:1], r"torch.float32 \(1, 7, 32\)"), (lambda _: 3, "int")):
        with pytest.raises(CaptureError, match=f"the function of lp.replace gave {got}: it must give torch.float32"):
            read(tiny_bert, batch, loose.replace(function))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loose.steer([1.0]), "lp.steer: vector is list: give a floating tensor"),
        (lambda: loose.steer(torch.ones(2, 3)), r"vector is torch.float32 \(2, 3\)"),
        (lambda: loose.steer(torch.ones(3), float("nan")), "lp.steer: scale=nan: give a finite number"),
        (lambda: loose.ablate("median"), "no kind 'median': use 'zero', 'mean' or 'resample'"),
        (lambda: loose.ablate("mean", seed=1), "kind 'mean' draws nothing"),
        (lambda: loose.ablate("resample", seed=-1), "seed is -1: it must be a whole number of at least 0"),
        (lambda: loose.ablate(heads=[]), r"lp\.ablate: heads is \[\]: give a list of whole numbers, as in \[0, 3\]"),
        (lambda: loose.ablate(heads=3), r"lp\.ablate: heads is 3: give a list of whole numbers"),
        (lambda: loose.ablate(heads="12"), r"lp\.ablate: heads is '12': give a list of whole numbers"),
        (lambda: loose.scale(2.0, units=[0, 1.9]), r"lp\.scale: units is \[0, 1\.9\]: give a list of whole numbers"),
        (lambda: loose.ablate(heads=[1], units=[2]), "heads and units do not go together"),
        (lambda: loose.patch(3), "lp.patch: values are int"),
        (lambda: loose.project_out(torch.zeros(4)), "the rank of 1 direction is 0: "),
        (lambda: loose.project_out(torch.ones(2, 4)), "the rank of 2 directions is 1: "),
        (lambda: loose.project_out(torch.tensor([1.0, float("nan")])), "directions are not finite: give finite ones"),
        (lambda: loose.project_out(torch.tensor([[1.0, float("inf")]])), "directions are not finite: give finite ones"),
        (lambda: loose.noise(-1.0), "std=-1.0: give a finite number from 0 on"),
        (lambda: loose.noise(float("nan")), "std=nan: give a finite number from 0 on"),
        (lambda: loose.noise(torch.ones(())), r"lp\.noise: std=tensor\(1\.\): give a finite number from 0 on"),
        (lambda: loose.clamp(), "low=None, high=None: give one number or both"),
        (lambda: loose.clamp(2.0, 1.0), "low=2.0 is above high=1.0"),
        (lambda: loose.scale("2"), "factor='2': give a finite number or a tensor"),
        (lambda: loose.replace(3), "3 is no function"),
    ],
)
def test_an_edit_is_checked_as_it_is_made(make: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_patch_of_what_is_no_value_is_refused(tiny_bert: Any) -> None:
    with pytest.raises(OptionError, match=r"lp.patch at 'layers.1': values of torch.int64 and shape \(3, 32\)"):
        lp.edit(tiny_bert, {SITE: lp.patch(torch.ones(3, 32, dtype=torch.int64))})
    for values, kind in ((np.ones(32), "ndarray"), ([1.0], "list"), ({SITE: [1.0]}, "dict with list")):
        with pytest.raises(OptionError, match=f"lp.patch: values are {kind}: give a tensor"):
            lp.edit(tiny_bert, {SITE: lp.patch(values)})
