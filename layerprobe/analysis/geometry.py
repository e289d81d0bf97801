"""Formulas on rows and on their moments: how similar two point clouds are, and the geometry of one.

Each is a function of tensors that cites its paper and equation, and computes in float64 whatever the input dtype.
Stores, and reading their rows, belong to other modules.

Letters: n rows, D width, S sites. Must never know of stores or files.
"""

import torch
from torch import Tensor

__all__ = [
    "count_effective_rank",
    "count_participation",
    "cut_cosines",
    "find_neighbours",
    "find_outliers",
    "find_rogues",
    "mean_cosine",
    "neighbour_overlap",
    "normalise",
    "turn_onto",
    "unbiased_hsic",
]

# A dimension is an outlier if its root mean square is this many standard deviations above the mean of all dimensions
# and this many times their median; the first rule alone would find outliers among nearly equal dimensions.
_OUTLIER_SIGMAS = 3.0
_OUTLIER_TIMES = 2.0
# A dimension is rogue if it alone contributes this share of the mean cosine, and this many times an even share.
_ROGUE_SHARE = 0.05
_ROGUE_TIMES = 5.0
# Below this mean cosine, shares mean nothing.
_LEAST_COSINE = 0.05


def normalise(rows_nD: Tensor) -> Tensor:
    """Scale each row to length 1, in float64; a row of zeros stays zero.

    Returns:
        float64 `[n, D]`.
    """
    rows = rows_nD.double()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def unbiased_hsic(values_SnD: list[Tensor]) -> Tensor:
    """Compute the unbiased Hilbert-Schmidt independence criterion of each pair of sites, with a linear kernel.

    Args:
        values_SnD: The same n rows at each site, n at least 4; widths may differ.

    Returns:
        float64 `[S, S]`. Linear CKA of a and b is `hsic[a, b] / sqrt(hsic[a, a] * hsic[b, b])`; with minibatches, each
        of the three is averaged over them first.

    Source: Song et al. 2012, Feature Selection via Dependence Maximization, eq. 5; Nguyen et al. 2021, Do Wide and Deep
    Networks Learn the Same Things?, eq. 2 and 3, for the minibatches; Kornblith et al. 2019 for CKA.
    """
    n = len(values_SnD[0])
    grams = []
    for values in values_SnD:
        # the estimate does not depend on the mean; subtracting it keeps more digits in the products
        centred = values.double() - values.double().mean(0)
        grams.append((centred @ centred.T).fill_diagonal_(0.0))
    grams_Snn = torch.stack(grams)
    flat, sums = grams_Snn.flatten(1), grams_Snn.sum(2)
    totals = sums.sum(1)
    pairs = flat @ flat.T + torch.outer(totals, totals) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums @ sums.T)
    return pairs / (n * (n - 3))


def find_neighbours(rows_nD: Tensor, k: int) -> Tensor:
    """Find each row's k nearest neighbours by cosine, without the row itself.

    Returns:
        bool `[n, n]`. Ties go to the row that comes first.
    """
    units = normalise(rows_nD)
    cosines = (units @ units.T).fill_diagonal_(-torch.inf)
    order = cosines.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros(len(units), len(units), dtype=torch.bool, device="cpu").scatter_(1, order, True)


def neighbour_overlap(one_nn: Tensor, other_nn: Tensor) -> float:
    """Measure the share of a row's nearest neighbours that are the same at two sites.

    Args:
        one_nn, other_nn: From `find_neighbours`, with the same k.

    Returns:
        The mean share over rows, 0 to 1.

    Source: Huh et al. 2024, The Platonic Representation Hypothesis, appendix A, mutual nearest neighbours.
    """
    return int((one_nn & other_nn).sum()) / int(one_nn.sum())


def mean_cosine(unit_sum_D: Tensor, num_units: float, num_rows: int) -> float:
    """Compute the mean cosine over all pairs of different rows from the sum of the unit rows.

    Args:
        unit_sum_D: Sum of the rows scaled to length 1.
        num_units: Sum of their squared lengths, which is the number of nonzero rows. A row of zeros has cosine 0 with
            any other.
        num_rows: Number of all rows.

    Source: Ethayarajh 2019, How Contextual are Contextualized Word Representations?, section 3.3, anisotropy, with all
    pairs in place of random ones: `(|sum u|^2 - sum |u|^2) / (n (n - 1))`. For the rows of one word it is that paper's
    self-similarity, definition 1.
    """
    if num_rows < 2:
        return float("nan")
    return float((unit_sum_D.double().square().sum() - num_units) / (num_rows * (num_rows - 1)))


def cut_cosines(unit_sum_D: Tensor, square_sum_D: Tensor, num_rows: int) -> Tensor:
    """Split the mean cosine into the contributions of each dimension.

    Args:
        unit_sum_D: Sum of the rows scaled to length 1.
        square_sum_D: Sum of their squares, dimension by dimension.
        num_rows: Number of all rows, at least 2.

    Returns:
        float64 `[D]`, which sums to `mean_cosine`.

    Source: Timkey and van Schijndel 2021, All Bark and No Bite, eq. 3 and 4, over all pairs of different rows.
    """
    return (unit_sum_D.double().square() - square_sum_D.double()) / (num_rows * (num_rows - 1))


def count_effective_rank(covariance_DD: Tensor) -> float:
    """Compute the effective rank of centred rows: the exponential of the entropy of their singular values.

    Args:
        covariance_DD: Their covariance; its eigenvalues are the squared singular values, up to a factor.

    Returns:
        1 to D; NaN if all rows are the same.

    Source: Roy and Vetterli 2007, The Effective Rank, definition 1.
    """
    singular = torch.linalg.eigvalsh(covariance_DD.double()).clamp_min(0).sqrt()
    shares = singular / singular.sum()
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))


def count_participation(covariance_DD: Tensor) -> float:
    """Compute the participation ratio, `(sum l)^2 / sum l^2` over the eigenvalues of the covariance.

    Returns:
        1 to D; NaN if all rows are the same.

    Source: Gao et al. 2017, A Theory of Multineuronal Dimensionality, eq. 5.
    """
    covariance = covariance_DD.double()
    return float(covariance.trace().square() / covariance.square().sum())


def find_outliers(rms_D: Tensor) -> list[int]:
    """Find outlier dimensions: root mean square over 3 standard deviations above the mean, and over twice the median.

    Args:
        rms_D: Root mean square of each dimension over all rows.

    Returns:
        The dimensions, the largest first.

    Source: the three-sigma rule of Kovaleva et al. 2021, BERT Busters, section 3, who apply it to layer norm weights.
    """
    rms = rms_D.double()
    is_far = rms > rms.mean() + _OUTLIER_SIGMAS * rms.std(correction=0)
    is_large = rms > _OUTLIER_TIMES * rms.median()
    order = rms.argsort(descending=True)
    return order[(is_far & is_large)[order]].tolist()


def find_rogues(parts_D: Tensor) -> list[int]:
    """Find rogue dimensions: each alone contributes 5 % of the mean cosine, and five times an even share.

    Args:
        parts_D: Contribution of each dimension to the mean cosine, from `cut_cosines`.

    Returns:
        The dimensions, the largest share first; none if the mean cosine is below 0.05.

    Source: Timkey and van Schijndel 2021, section 3, who report the dimensions with the largest contributions.
    """
    parts = parts_D.double()
    total = float(parts.sum())
    if total < _LEAST_COSINE:
        return []
    shares = parts / total
    order = shares.argsort(descending=True)
    return order[(shares >= max(_ROGUE_SHARE, _ROGUE_TIMES / len(parts)))[order]].tolist()


def turn_onto(points_nK: Tensor, onto_nK: Tensor) -> Tensor:
    """Rotate and reflect centred points to lie as close as possible to other points, row by row.

    Returns:
        float64 `[n, K]`: the points times the orthogonal matrix that minimises the sum of squared distances.

    Source: Schoenemann 1966, A Generalized Solution of the Orthogonal Procrustes Problem, eq. 1.10.
    """
    points, onto = points_nK.double(), onto_nK.double()
    left, _, right = torch.linalg.svd(points.T @ onto)
    return points @ (left @ right)
