"""Each formula against numpy in float64, written a second time and in another way, and against planted answers."""

import numpy as np
import pytest
import torch

from layerprobe.analysis.geometry import (
    count_effective_rank,
    count_participation,
    cut_cosines,
    find_neighbours,
    find_outliers,
    find_rogues,
    mean_cosine,
    neighbour_overlap,
    normalise,
    turn_onto,
    unbiased_hsic,
)

# float64 sums in another order
CLOSE = 1e-9


def draw(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(width: int) -> torch.Tensor:
    return torch.linalg.qr(draw(width, width, 9)).Q


def slow_hsic(one: np.ndarray, other: np.ndarray) -> float:
    """The U-statistic itself: every term of four different rows, Song et al. 2012, eq. 4 spelt out."""
    n = len(one)
    k, m = one @ one.T, other @ other.T
    total, count = 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
                        count += 1
    return total / count


def test_hsic_is_the_mean_over_all_fours_of_rows() -> None:
    one, other = draw(7, 3, 0) + 5, draw(7, 5, 1)
    other[:, 0] += one[:, 0]
    found = unbiased_hsic([one, other])
    for a, rows in enumerate((one, other)):
        for b, others in enumerate((one, other)):
            assert float(found[a, b]) == pytest.approx(slow_hsic(rows.numpy(), others.numpy()), rel=CLOSE)


def test_hsic_of_independent_rows_is_zero_on_average() -> None:
    found = [float(unbiased_hsic([draw(16, 8, seed), draw(16, 8, 500 + seed)])[0, 1]) for seed in range(400)]
    # four standard errors; the biased estimate would be about half of hsic(x, x)
    assert abs(np.mean(found)) < 4 * np.std(found) / 20


def test_mean_cosine_is_that_of_all_pairs() -> None:
    rows = draw(40, 6, 2) + 0.5
    rows[3] = 0
    cosines = [
        0.0 if i == 3 or j == 3 else float(rows[i] @ rows[j] / (rows[i].norm() * rows[j].norm()))
        for i in range(40)
        for j in range(40)
        if i != j
    ]
    units = normalise(rows)
    found = mean_cosine(units.sum(0), float(units.square().sum()), 40)
    assert found == pytest.approx(np.mean(cosines), rel=CLOSE)
    parts = cut_cosines(units.sum(0), units.square().sum(0), 40)
    assert float(parts.sum()) == pytest.approx(found, rel=CLOSE)
    slow = np.mean([units[i].numpy() * units[j].numpy() for i in range(40) for j in range(40) if i != j], axis=0)
    assert np.allclose(parts.numpy(), slow, rtol=CLOSE, atol=1e-12)
    assert np.isnan(mean_cosine(units[0], 1.0, 1))


def test_neighbour_overlap_counts_shared_neighbours() -> None:
    one, other = draw(30, 5, 3), draw(30, 5, 4)
    shared = []
    for i in range(30):
        found = []
        for rows in (one.numpy(), other.numpy()):
            cosines = rows @ rows[i] / np.linalg.norm(rows, axis=1) / np.linalg.norm(rows[i])
            cosines[i] = -2
            found.append(set(np.argsort(-cosines)[:4]))
        shared.append(len(found[0] & found[1]) / 4)
    assert neighbour_overlap(find_neighbours(one, 4), find_neighbours(other, 4)) == pytest.approx(np.mean(shared))
    assert neighbour_overlap(find_neighbours(one, 4), find_neighbours(one @ turn(5) * 3, 4)) == 1.0


def test_ranks_are_those_of_the_singular_values() -> None:
    rows = draw(200, 6, 5) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    centred = (rows - rows.mean(0)).numpy()
    singular = np.linalg.svd(centred, compute_uv=False)
    shares = singular / singular.sum()
    covariance = torch.from_numpy(centred.T @ centred / 200)
    assert count_effective_rank(covariance) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=CLOSE)
    assert count_participation(covariance) == pytest.approx((singular**2).sum() ** 2 / (singular**4).sum(), rel=CLOSE)


def test_rank_3_is_found_as_3() -> None:
    basis = turn(16)[:, :3]
    covariance = basis @ basis.T
    # the other 13 eigenvalues are rounding, 1e-16, whose roots still have a little entropy
    assert count_effective_rank(covariance) == pytest.approx(3, abs=1e-4)
    assert count_participation(covariance) == pytest.approx(3, rel=CLOSE)
    nothing = torch.zeros(4, 4)
    assert np.isnan(count_effective_rank(nothing)) and np.isnan(count_participation(nothing))


def test_outliers_are_far_and_large() -> None:
    rms = torch.ones(64) + 0.01 * draw(1, 64, 6)[0]
    assert find_outliers(rms) == []
    rms[5] = 1.2  # far beyond 3 sigma, and yet not large
    assert find_outliers(rms) == []
    rms[40], rms[7] = 8.0, 9.0
    assert find_outliers(rms) == [7, 40]


def test_rogues_give_much_of_a_mean_cosine_that_is_not_small() -> None:
    parts = torch.full((200,), 0.001)
    parts[17] = 0.3
    assert find_rogues(parts) == [17]
    assert find_rogues(parts / 100) == []
    assert find_rogues(torch.full((4,), 0.2)) == []  # an even share of four is no rogue


def test_turning_undoes_a_rotation_and_a_mirror() -> None:
    points = draw(50, 2, 7)
    mirrored = points @ turn(2) @ torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert torch.allclose(turn_onto(mirrored, points), points, atol=CLOSE)
    other = draw(50, 2, 8)
    turned = turn_onto(points, other)
    assert torch.allclose(turned.norm(dim=1), points.norm(dim=1))
    best = float((turned - other).square().sum())
    for angle in np.linspace(0, 2 * np.pi, 100):
        c, s = np.cos(angle), np.sin(angle)
        for matrix in ([[c, -s], [s, c]], [[c, s], [s, -c]]):
            tried = points @ torch.tensor(matrix, dtype=torch.float64)
            assert best <= float((tried - other).square().sum()) + CLOSE
