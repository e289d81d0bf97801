"""`layerprobe.differences` against numpy in float64 on planted stores, and what it must recover there."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.analysis.passes import CKA_ROWS
from layerprobe.errors import InputError, NonFiniteError, OptionError, SiteError, StoreError
from planting import plant

# float64 sums in another order
CLOSE = 1e-9
LENGTHS = [5, 1, 9, 4, 7, 3, 8, 6, 2, 5]


def draw(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def layers() -> dict[str, Tensor]:
    """Three layers of 50 rows, each a step from the one before, and not centred."""
    first = draw(50, 12) + 0.7
    second = first + 0.5 * draw(50, 12, 1)
    return {"embeddings": first, "layers.0": second, "layers.1": second @ draw(12, 12, 2) * 0.3}


def slow_cosines(rows: np.ndarray) -> np.ndarray:
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return units @ units.T


def prepare(rows: np.ndarray, cosine: str) -> np.ndarray:
    if cosine == "raw":
        return rows
    rows = rows - rows.mean(0)
    return rows if cosine == "centred" else rows / rows.std(0)


@pytest.mark.parametrize("cosine", ["raw", "centred", "zscored"])
def test_every_number_is_that_of_a_slow_reference(tmp_path: Path, layers: dict[str, Tensor], cosine: str) -> None:
    store = lp.open(plant(tmp_path / "acts", layers, LENGTHS))
    found = lp.differences(store, pairs="all", cosine=cosine, neighbours=5)
    assert [(pair.before, pair.after) for pair in found.pairs] == [
        ("embeddings", "layers.0"),
        ("embeddings", "layers.1"),
        ("layers.0", "layers.1"),
    ]
    assert found.num_rows == found.num_sampled == 50
    off_diagonal = ~np.eye(50, dtype=bool)
    ids = np.arange(50) % 7
    for site in found.sites:
        rows = layers[site.site].numpy()
        cosines = slow_cosines(prepare(rows, cosine))
        assert site.mean_norm == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=CLOSE)
        assert site.anisotropy == pytest.approx(cosines[off_diagonal].mean(), rel=CLOSE, abs=1e-12)
        same = [cosines[np.ix_(ids == one, ids == one)] for one in range(7)]
        of_words = [block[~np.eye(len(block), dtype=bool)].mean() for block in same]
        assert site.self_similarity == pytest.approx(np.mean(of_words), rel=CLOSE)
        singular = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
        shares = singular / singular.sum()
        assert site.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
        assert site.participation_ratio == pytest.approx((singular**2).sum() ** 2 / (singular**4).sum(), rel=CLOSE)
    for pair in found.pairs:
        before, after = layers[pair.before].numpy(), layers[pair.after].numpy()
        steps = np.linalg.norm(after - before, axis=1)
        assert pair.l2 == pytest.approx(steps.mean(), rel=CLOSE)
        assert pair.relative_l2 == pytest.approx((steps / np.linalg.norm(before, axis=1)).mean(), rel=CLOSE)
        one, other = prepare(before, cosine), prepare(after, cosine)
        turned = 1 - (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
        assert pair.cosine_distance == pytest.approx(turned.mean(), rel=CLOSE)
        neighbours = []
        for rows in (one, other):
            cosines = slow_cosines(rows)
            np.fill_diagonal(cosines, -2)
            neighbours.append(np.argsort(-cosines, axis=1)[:, :5])
        shared = [len(set(a) & set(b)) / 5 for a, b in zip(*neighbours, strict=True)]
        assert pair.neighbour_overlap == pytest.approx(np.mean(shared), rel=CLOSE)
        tokens = [move for move in found.tokens if (move.before, move.after) == (pair.before, pair.after)]
        means = {one: turned[ids == one].mean() for one in range(7)}
        assert [move.token_id for move in tokens] == sorted(means, key=lambda one: -means[one])
        assert [move.cosine_distance for move in tokens] == pytest.approx(sorted(means.values(), reverse=True))
        assert all(move.count == (ids == move.token_id).sum() and move.token is None for move in tokens)
        of_examples = [part.mean() for part in np.split(turned, np.cumsum(LENGTHS)[:-1])]
        examples = [move for move in found.examples if (move.before, move.after) == (pair.before, pair.after)]
        assert [move.example for move in examples] == np.argsort(of_examples)[::-1].tolist()
        assert [move.cosine_distance for move in examples] == pytest.approx(sorted(of_examples, reverse=True))
        assert [move.num_rows for move in examples] == [LENGTHS[move.example] for move in examples]


def slow_hsic(one: np.ndarray, other: np.ndarray) -> float:
    """Song et al. 2012, eq. 5, with matrices spelt out."""
    n, ones = len(one), np.ones(len(one))
    k, m = one @ one.T, other @ other.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    middle = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (ones @ k @ m @ ones)
    return (np.trace(k @ m) + middle) / (n * (n - 3))


def test_cka_is_the_ratio_of_means_over_minibatches_of_mixed_rows(tmp_path: Path) -> None:
    rows = draw(700, 6) + 1
    layers = {"layers.0": rows, "layers.1": rows + 2 * draw(700, 6, 1)}
    store = lp.open(plant(tmp_path / "acts", layers, [7] * 100))
    found = lp.differences(store, seed=4)
    batches = {name: [batch.numpy() for batch in store[name].rows(CKA_ROWS, shuffle=True, seed=4)] for name in layers}

    def average(a: str, b: str) -> float:
        pairs = zip(batches[a], batches[b], strict=True)
        return sum(slow_hsic(one, other) * len(one) for one, other in pairs) / 700

    expected = average("layers.0", "layers.1") / np.sqrt(average(*["layers.0"] * 2) * average(*["layers.1"] * 2))
    assert found.pairs[0].cka == pytest.approx(expected, rel=1e-7)
    assert found.cka[0][1] == found.cka[1][0] == found.pairs[0].cka
    whole = slow_hsic(rows.numpy(), layers["layers.1"].numpy()) / np.sqrt(
        slow_hsic(rows.numpy(), rows.numpy()) * slow_hsic(*[layers["layers.1"].numpy()] * 2)
    )
    # both are estimates of one number
    assert found.pairs[0].cka == pytest.approx(whole, abs=0.03)


def test_rotated_and_scaled_copies_have_cka_1_and_the_same_neighbours(tmp_path: Path) -> None:
    rows = draw(300, 10)
    turned = rows @ torch.linalg.qr(draw(10, 10, 1)).Q * 4
    store = lp.open(plant(tmp_path / "acts", {"layers.0": rows, "layers.1": turned}, [6] * 50))
    (pair,) = lp.differences(store).pairs
    assert pair.cka == pytest.approx(1, abs=CLOSE) and pair.neighbour_overlap == 1.0
    assert pair.cosine_distance is not None and pair.cosine_distance > 0.5
    independent = lp.open(plant(tmp_path / "other", {"layers.0": rows, "layers.1": draw(300, 10, 5)}, [6] * 50))
    assert abs(lp.differences(independent).pairs[0].cka) < 0.05  # debiased: 0 up to the noise of 300 rows


def test_a_rank_3_layer_has_effective_rank_3_and_a_planted_outlier_is_found(tmp_path: Path) -> None:
    flat = torch.linalg.qr(draw(200, 3) - draw(200, 3).mean(0)).Q
    flat = torch.linalg.qr(flat - flat.mean(0)).Q @ torch.linalg.qr(draw(32, 3, 1)).Q.T
    spiked = draw(200, 32, 2)
    spiked[:, 11] += 20
    layers = {"layers.0": flat * 10, "layers.1": spiked}
    found = lp.differences(plant(tmp_path / "acts", layers, [4] * 50))
    assert found.sites[0].effective_rank == pytest.approx(3, abs=1e-4)  # roots of rounding have a little entropy
    assert found.sites[0].participation_ratio == pytest.approx(3, abs=CLOSE)
    assert found.sites[1].outliers == (11,)
    assert found.sites[1].anisotropy > 0.9


def test_a_pooled_store_gives_what_needs_no_tokens(tmp_path: Path, layers: dict[str, Tensor]) -> None:
    folder = plant(tmp_path / "acts", layers, [1] * 50, pool="mean", fields=[{}] * 50)
    found = lp.differences(folder, neighbours=3)
    assert found.num_rows == 50 and found.tokens == () and found.num_words == 0
    steps = (layers["layers.0"] - layers["embeddings"]).norm(dim=1)
    assert found.pairs[0].l2 == pytest.approx(float(steps.mean()), rel=CLOSE)
    assert np.isnan(found.sites[0].self_similarity)
    assert found.examples[0].text == f"text {found.examples[0].example}"


def test_sites_of_other_widths_have_cka_but_no_distance(tmp_path: Path) -> None:
    rows = draw(60, 8)
    layers = {"embeddings": rows[:, :4].contiguous(), "layers.0": rows}
    found = lp.differences(plant(tmp_path / "acts", layers, [6] * 10))
    assert found.pairs[0].l2 is None and found.pairs[0].cosine_distance is None and found.pairs[0].cka > 0.3
    assert found.tokens == () and found.examples == ()


def test_max_rows_draws_by_the_seed_and_says_how_many(tmp_path: Path) -> None:
    layers = {"layers.0": draw(3000, 4), "layers.1": draw(3000, 4, 1)}
    folder = plant(tmp_path / "acts", layers, [3] * 1000)
    one, same, other = (lp.differences(folder, max_rows=600, sample=100, seed=seed) for seed in (1, 1, 2))
    assert one == same and one.pairs != other.pairs
    assert one.num_rows == other.num_rows == 600 and one.num_sampled == 100


def test_the_result_is_written_as_table_csv_json_and_picture(tmp_path: Path, layers: dict[str, Tensor]) -> None:
    folder = plant(tmp_path / "acts", layers, LENGTHS)
    found, half = lp.differences(folder, neighbours=60), lp.differences(folder, neighbours=(sum(LENGTHS) - 1) // 2)
    assert found.pairs == half.pairs and 0 < found.pairs[0].neighbour_overlap < 1
    note = f"neighbours: {half.neighbours} and not 60, since each row has {sum(LENGTHS) - 1} others to choose from"
    assert found.neighbours == half.neighbours and found.notes == (note,) and note in found.table() and not half.notes
    table = found.table()
    assert "50 rows; cosines raw" in table and "moves most from" in table and str(found) == table
    rows = list(csv.DictReader(found.to_csv(tmp_path / "found.csv").read_text().splitlines()))
    assert [float(row["l2"]) for row in rows] == [pair.l2 for pair in found.pairs]
    assert [float(row["neighbour_overlap"]) for row in rows] == [pair.neighbour_overlap for pair in found.pairs]
    said = json.loads(found.to_json(tmp_path / "found.json").read_text())
    assert said["pairs"][1]["cka"] == found.pairs[1].cka and said["notes"] == [note]
    assert said["sites"][0]["site"] == "embeddings" and len(said["examples"]) == 20
    figure = found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.get_label(): line.get_ydata().tolist() for axes in figure.axes for line in axes.get_lines()}
    assert lines["anisotropy"] == [site.anisotropy for site in found.sites]
    assert lines["cosine distance from layer before"] == [pair.cosine_distance for pair in found.pairs]
    with pytest.raises(StoreError, match="there is no folder"):
        found.to_csv(tmp_path / "none" / "found.csv")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pairs": "both"}, OptionError, "pairs='both': use adjacent or all"),
        ({"cosine": "whitened"}, OptionError, "cosine='whitened': use raw, centred, zscored"),
        ({"sample": 0}, OptionError, "sample is 0: it must be a whole number of at least 2"),
        ({"max_rows": 1}, OptionError, "max_rows is 1: it must be a whole number of at least 2"),
        ({"seed": -1}, OptionError, "seed is -1"),
        ({"sites": "layers.7"}, SiteError, "layers.7"),
        ({"sites": "layers.0"}, SiteError, "differences of 'layers.0' alone: it takes two sites"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, layers: dict[str, Tensor], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        lp.differences(plant(tmp_path / "acts", layers, LENGTHS), **options)


def test_one_row_is_refused(tmp_path: Path) -> None:
    layers = {"layers.0": draw(1, 4), "layers.1": draw(1, 4)}
    with pytest.raises(InputError, match="it has 1 row; two are the least"):
        lp.differences(plant(tmp_path / "acts", layers, [1], shards=1))


def test_a_row_that_is_not_finite_is_named(tmp_path: Path, layers: dict[str, Tensor]) -> None:
    layers["layers.1"][sum(LENGTHS[:4]) + 2, 3] = float("nan")
    folder = plant(tmp_path / "acts", layers, LENGTHS)
    with pytest.raises(NonFiniteError, match=r"'layers.1' in .*: row 2 of example 4 is not finite"):
        lp.differences(folder)


def test_the_callers_threads_are_left_as_they_were(tmp_path: Path, layers: dict[str, Tensor]) -> None:
    before = torch.get_num_threads()
    lp.differences(plant(tmp_path / "acts", layers, LENGTHS))
    assert torch.get_num_threads() == before
