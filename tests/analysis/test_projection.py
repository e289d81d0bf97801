"""Two components: PCA against numpy's SVD, panels that follow each other, trustworthiness against its definition."""

import sys
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from layerprobe.analysis.projection import project
from layerprobe.errors import OptionError

# float64 sums in another order
CLOSE = 1e-8


def draw(count: int = 60, width: int = 8, seed: int = 0) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows * torch.linspace(3, 0.5, width)


def distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def test_pca_keeps_the_plane_of_the_two_largest_singular_values() -> None:
    rows = draw() + 4
    (panel,) = project({"layers.0": rows}, "pca", shared=False, seed=0)
    centred = (rows - rows.mean(0)).numpy()
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    assert panel.variance == pytest.approx((singular[:2] ** 2).sum() / (singular**2).sum(), rel=CLOSE)
    expected = left[:, :2] * singular[:2]
    expected /= np.sqrt((expected**2).sum(1).mean())
    assert np.allclose(distances(panel.points.numpy()), distances(expected), atol=CLOSE)


def test_turning_changes_no_distance_and_brings_points_near() -> None:
    first = draw()
    turned = first @ torch.linalg.qr(draw(8, 8, 1)).Q + 0.1 * draw(seed=2)
    alone = project({"layers.1": turned}, "pca", shared=False, seed=0)[0]
    before, after = project({"layers.0": first, "layers.1": turned}, "pca", shared=False, seed=0)
    assert np.allclose(distances(after.points.numpy()), distances(alone.points.numpy()), atol=CLOSE)
    jump = float((after.points - before.points).norm(dim=1).mean())
    assert jump < 0.2
    # no turn and no mirror brings them nearer
    for angle in np.linspace(0, 2 * np.pi, 60):
        c, s = np.cos(angle), np.sin(angle)
        for matrix in ([[c, -s], [s, c]], [[c, s], [s, -c]]):
            tried = alone.points @ torch.tensor(matrix, dtype=torch.float64)
            least = float((after.points - before.points).square().sum())
            assert least <= float((tried - before.points).square().sum()) + CLOSE


def test_a_shared_basis_is_one_projection_for_all() -> None:
    first, second = draw(), 2 * draw(seed=1)
    panels = project({"layers.0": first, "layers.1": second}, "pca", shared=True, seed=0)
    centred = [(rows - rows.mean(0)).numpy() for rows in (first, second)]
    _, _, right = np.linalg.svd(np.concatenate(centred), full_matrices=False)
    expected = [rows @ right[:2].T for rows in centred]
    scale = np.sqrt((np.concatenate(expected) ** 2).sum(1).mean())
    for panel, points, rows in zip(panels, expected, centred, strict=True):
        assert np.allclose(distances(panel.points.numpy()), distances(points / scale), atol=CLOSE)
        assert panel.variance == pytest.approx((points**2).sum() / (rows**2).sum(), rel=CLOSE)


def test_trustworthiness_is_that_of_its_definition() -> None:
    rows = draw()
    (panel,) = project({"layers.0": rows}, "pca", shared=False, seed=0)
    n, k = 60, 10
    true, drawn = distances(rows.numpy()), distances(panel.points.numpy())
    penalty = 0
    for i in range(n):
        ranks = {j: rank for rank, j in enumerate(np.argsort(true[i])[1:], 1)}
        penalty += sum(ranks[j] - k for j in np.argsort(drawn[i])[1 : k + 1] if ranks[j] > k)
    assert panel.trust == pytest.approx(1 - 2 / (n * k * (2 * n - 3 * k - 1)) * penalty, rel=CLOSE)
    assert project({"layers.0": rows[:21]}, "pca", shared=False, seed=0)[0].trust is None


def test_tsne_is_the_same_for_one_seed_and_starts_from_the_layer_before() -> None:
    rows = torch.cat([draw(40), draw(40, seed=1) + 20])
    values = {"layers.0": rows, "layers.1": rows + 0.05 * draw(80, seed=2)}
    one, same = (project(values, "tsne", shared=False, seed=0) for _ in range(2))
    assert all(torch.equal(a.points, b.points) for a, b in zip(one, same, strict=True))
    assert one[0].variance is None and one[0].trust is not None and one[0].trust > 0.9
    warm = float((one[1].points - one[0].points).norm(dim=1).mean())
    # points that hardly moved stay near their places, of a cloud of size 1
    assert warm < 0.4
    halves = one[0].points[:40].mean(0), one[0].points[40:].mean(0)
    assert float((halves[0] - halves[1]).norm()) > 1


def test_umap_is_the_same_for_one_seed_and_starts_from_the_layer_before() -> None:
    pytest.importorskip("umap")
    rows = torch.cat([draw(40), draw(40, seed=1) + 20])
    values = {"layers.0": rows, "layers.1": rows + 0.05 * draw(80, seed=2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        one, same = (project(values, "umap", shared=False, seed=0) for _ in range(2))
    assert all(torch.equal(a.points, b.points) for a, b in zip(one, same, strict=True))
    assert one[0].variance is None and one[0].trust is not None and one[0].trust > 0.9
    halves = one[0].points[:40].mean(0), one[0].points[40:].mean(0)
    assert float((halves[0] - halves[1]).norm()) > 1
    warm = float((one[1].points - one[0].points).norm(dim=1).mean())
    assert warm < 0.6  # points that hardly moved stay near their places, of a cloud of size 1


def test_what_cannot_be_projected_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"layers.0": draw(), "layers.1": draw(width=5)}
    with pytest.raises(OptionError, match="method='lda': use pca, tsne, umap"):
        project(values, "lda", shared=False, seed=0)
    with pytest.raises(OptionError, match=r"shared=True: the sites are \[5, 8\] wide"):
        project(values, "pca", shared=True, seed=0)
    with pytest.raises(OptionError, match="only PCA has a basis to share"):
        project(values, "tsne", shared=True, seed=0)
    with pytest.raises(OptionError, match="2 components of vectors 1 wide"):
        project({"layers.0": draw(width=1)}, "pca", shared=False, seed=0)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(
        OptionError, match=r"method='umap' needs umap-learn, which is not installed. Run pip install 'umap-l"
    ):
        project(values, "umap", shared=False, seed=0)
