"""`layerprobe.check` finds what was planted: dead, outlying and rogue dimensions, constant rows, NaN."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.errors import InputError, SiteError
from layerprobe.models import LoadedModel
from planting import plant

# float64 sums in another order
CLOSE = 1e-9
LENGTHS = [3, 5, 1, 4, 7] * 8


def draw(width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(sum(LENGTHS), width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_mean_cosine(rows: np.ndarray) -> float:
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return float((units @ units.T)[~np.eye(len(rows), dtype=bool)].mean())


def test_cosines_raw_centred_and_zscored_are_those_of_all_pairs(tmp_path: Path) -> None:
    rows = draw() * torch.linspace(1, 5, 32) + torch.linspace(0, 3, 32)
    (site,) = lp.check(plant(tmp_path / "acts", {"layers.0": rows}, LENGTHS)).sites
    values = rows.numpy()
    centred = values - values.mean(0)
    assert site.cosine_raw == pytest.approx(slow_mean_cosine(values), rel=CLOSE)
    assert site.cosine_centred == pytest.approx(slow_mean_cosine(centred), rel=1e-6)
    assert site.cosine_zscored == pytest.approx(slow_mean_cosine(centred / values.std(0)), rel=1e-6)
    norms = np.linalg.norm(values, axis=1)
    assert site.mean_norm == pytest.approx(norms.mean(), rel=CLOSE)
    assert site.norm_deviation == pytest.approx(norms.std(), rel=1e-6)
    assert site.num_rows == len(values) and site.nonfinite_rows == 0


def test_planted_dimensions_are_found_and_named(tmp_path: Path) -> None:
    rows = draw()
    rows[:, 4] = 0.7
    rows[:, 9] = 0
    rows[:, 20] += 30
    found = lp.check(plant(tmp_path / "acts", {"layers.0": rows, "layers.1": draw(seed=1)}, LENGTHS))
    site, plain = found.sites
    assert site.dead == (4, 9) and site.outliers == (20,) and site.rogue == (20,)
    assert site.rogue_share > 0.99 and site.cosine_raw > 0.9 and abs(site.cosine_zscored) < 0.05
    assert (plain.dead, plain.outliers, plain.rogue) == ((), (), ())
    assert found.verdict == (
        "layers.0: 2 dimensions constant (4, 9): leave out of z-scores.",
        f"layers.0: 1 dimension (20) gives 100% of the mean cosine {site.cosine_raw:.2f}: a raw cosine is mostly about "
        "them; use centred or zscored.",
    )
    assert found.is_sound


def test_rows_of_a_million_dimensions_are_checked(tmp_path: Path) -> None:
    # every pair of dimensions would be 8 TB
    rows = torch.randn(6, 1 << 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, 7] = 0.5
    (site,) = lp.check(plant(tmp_path / "acts", {"layers.0": rows}, [2, 3, 1])).sites
    assert site.dead == (7,) and site.cosine_raw == pytest.approx(slow_mean_cosine(rows.numpy()), rel=CLOSE)


def test_lengths_that_hardly_differ_keep_their_deviation(tmp_path: Path) -> None:
    maker = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2000, 8, generator=maker), dim=1)
    rows *= 1e7 + 2 * torch.randn(2000, 1, generator=maker)
    site = lp.check(plant(tmp_path / "acts", {"layers.0": rows}, [2] * 1000)).sites[0]
    norms = np.linalg.norm(rows.numpy().astype(np.float64), axis=1)
    assert site.mean_norm == pytest.approx(norms.mean(), rel=1e-12)
    assert site.norm_deviation == pytest.approx(norms.std(), rel=1e-6)


def test_a_constant_dimension_in_any_dtype_is_dead(tmp_path: Path) -> None:
    rows = draw().float()
    rows[:, 3] = 0.1
    rows[:, 5] = 1e-9 * rows[:, 5]
    (site,) = lp.check(plant(tmp_path / "acts", {"layers.0": rows.half()}, LENGTHS)).sites
    assert site.dead == (3, 5)


def test_a_constant_first_row_is_told_apart_from_constant_rows(tmp_path: Path) -> None:
    first = draw()
    firsts = torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)
    first[firsts] = first[0].clone()
    layers = {"embeddings": first, "layers.0": draw(seed=1), "layers.1": draw(seed=2)[:1].expand(160, -1).contiguous()}
    found = lp.check(plant(tmp_path / "acts", layers, LENGTHS))
    assert [site.constant_first for site in found.sites] == [True, False, True]
    assert [site.constant for site in found.sites] == [False, False, True]
    assert not found.is_sound
    assert found.verdict[0].startswith("embeddings: the first row of every example is the same, so pool 'cls'")
    assert found.verdict[-1] == "layers.1: every row is the same: nothing can be read from it."


def test_rows_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    rows = draw()
    rows[7, 2], rows[90, 30] = float("nan"), float("inf")
    found = lp.check(plant(tmp_path / "acts", {"layers.0": rows}, LENGTHS))
    (site,) = found.sites
    keep = np.delete(rows.numpy(), [7, 90], axis=0)
    assert site.nonfinite_rows == 2 and site.num_rows == 158 and not found.is_sound
    assert site.cosine_raw == pytest.approx(slow_mean_cosine(keep), rel=CLOSE)
    assert found.verdict[0].startswith("layers.0: 2 rows of 160 not finite")


def test_high_cosines_without_a_rogue_dimension_get_a_sentence(tmp_path: Path) -> None:
    found = lp.check(plant(tmp_path / "acts", {"layers.0": draw() + 1}, LENGTHS))
    assert found.sites[0].rogue == () and "two rows have a mean cosine of 0.5" in found.verdict[0]
    fine = lp.check(plant(tmp_path / "fine", {"layers.0": draw()}, LENGTHS))
    assert fine.verdict == ("Nothing stands in the way of cosines.",)


def test_the_result_is_written(tmp_path: Path) -> None:
    rows = draw()
    rows[:, [1, 2]] = 0
    found = lp.check(plant(tmp_path / "acts", {"layers.0": rows, "layers.1": draw(seed=1)}, LENGTHS))
    assert "1, 2" in found.table() and found.table().endswith(found.verdict[-1])
    said = json.loads(found.to_json(tmp_path / "check.json").read_text())
    assert said["sites"][0]["dead"] == [1, 2] and said["verdict"] == list(found.verdict)
    assert found.to_csv(tmp_path / "check.csv").read_text().splitlines()[1].split(",")[7] == "1 2"
    found.plot(tmp_path / "check.svg")
    assert "<svg" in (tmp_path / "check.svg").read_text()


def test_the_demo_models_dead_dimensions_are_found(demo: LoadedModel, tmp_path: Path) -> None:
    texts = ["The kettle whistled.", "Who left the gate open?", "So it goes."]
    store = lp.extract(demo.model, texts, tmp_path / "acts", tokenizer=demo.tokenizer, progress=False)
    found = {site.site: site for site in lp.check(store).sites}
    assert found["embeddings"].constant_first is True and found["layers.0"].constant_first is False
    varying = torch.cat(list(store["layers.5"].rows())).double().std(0)
    assert set(found["layers.5"].dead) == set((varying < 1e-6 * varying.median()).nonzero().flatten().tolist())
    assert found["layers.5"].dead and found["layers.0"].dead == ()


def test_too_few_rows_and_no_such_site_are_refused(tmp_path: Path) -> None:
    folder = plant(tmp_path / "acts", {"layers.0": draw()[:1]}, [1], shards=1)
    with pytest.raises(InputError, match="it has 1 row; two are the least"):
        lp.check(folder)
    with pytest.raises(SiteError, match=r"layers\.5"):
        lp.check(folder, sites="layers.5")
