"""Formulas on rows and on their moments: how alike two clouds are, and what shape one has.

Each is a function of tensors and names the paper and the equation it follows; computed in float64 whatever comes in.
What a store is, and how its rows are gone through, is decided elsewhere.

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

# A dimension is an outlier when its root mean square is this many standard deviations above the mean of all dimensions
# and this many times their median: the first alone would find some among dimensions that are all alike.
_OUTLIER_SIGMAS = 3.0
_OUTLIER_TIMES = 2.0
# A dimension is rogue when it alone gives this share of the mean cosine, and this many times the share of an even one.
_ROGUE_SHARE = 0.05
_ROGUE_TIMES = 5.0
# Below this mean cosine there is nothing to share.
_LEAST_COSINE = 0.05


def normalise(rows_nD: Tensor) -> Tensor:
    """Scale each row to length 1, in float64; a row of zeros stays one.

    Returns:
        float64 `[n, D]`.
    """
    rows = rows_nD.double()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def unbiased_hsic(values_SnD: list[Tensor]) -> Tensor:
    """Estimate the Hilbert-Schmidt independence criterion of each pair of sites, linear kernel, without bias.

    Args:
        values_SnD: The same n rows at each site, n at least 4; widths may differ.

    Returns:
        float64 `[S, S]`. Linear CKA of a and b is `hsic[a, b] / sqrt(hsic[a, a] * hsic[b, b])`; over minibatches each
        of the three is averaged first.

    Source: Song et al. 2012, Feature Selection via Dependence Maximization, eq. 5; Nguyen et al. 2021, Do Wide and Deep
    Networks Learn the Same Things?, eq. 2 and 3, for the minibatches; Kornblith et al. 2019 for CKA.
    """
    n = len(values_SnD[0])
    grams = []
    for values in values_SnD:
        # the estimate does not depend on the mean; without it the products keep more digits
        centred = values.double() - values.double().mean(0)
        grams.append((centred @ centred.T).fill_diagonal_(0.0))
    grams_Snn = torch.stack(grams)
    flat, sums = grams_Snn.flatten(1), grams_Snn.sum(2)
    totals = sums.sum(1)
    pairs = flat @ flat.T + torch.outer(totals, totals) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums @ sums.T)
    return pairs / (n * (n - 3))


def find_neighbours(rows_nD: Tensor, k: int) -> Tensor:
    """Find each row's k nearest neighbours by cosine, itself left out.

    Returns:
        bool `[n, n]`. Among rows equally near, the one that comes first is taken.
    """
    units = normalise(rows_nD)
    cosines = (units @ units.T).fill_diagonal_(-torch.inf)
    order = cosines.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros(len(units), len(units), dtype=torch.bool, device="cpu").scatter_(1, order, True)


def neighbour_overlap(one_nn: Tensor, other_nn: Tensor) -> float:
    """Measure how many of a row's nearest neighbours are the same at two sites.

    Args:
        one_nn, other_nn: From `find_neighbours`, with one k.

    Returns:
        The mean share over rows, 0 to 1.

    Source: Huh et al. 2024, The Platonic Representation Hypothesis, appendix A, mutual nearest neighbours.
    """
    return int((one_nn & other_nn).sum()) / int(one_nn.sum())


def mean_cosine(unit_sum_D: Tensor, num_units: float, num_rows: int) -> float:
    """Give the mean cosine over all pairs of different rows, from the sum of the rows scaled to length 1.

    Args:
        unit_sum_D: That sum.
        num_units: Sum of their squared lengths: the rows that are not zero. One of zeros has cosine 0 with any other.
        num_rows: Rows in all.

    Source: Ethayarajh 2019, How Contextual are Contextualized Word Representations?, section 3.3, anisotropy; the mean
    over random pairs is here that over all pairs, `(|sum u|^2 - sum |u|^2) / (n (n - 1))`. With the rows of one word
    alone it is that paper's self-similarity, definition 1.
    """
    if num_rows < 2:
        return float("nan")
    return float((unit_sum_D.double().square().sum() - num_units) / (num_rows * (num_rows - 1)))


def cut_cosines(unit_sum_D: Tensor, square_sum_D: Tensor, num_rows: int) -> Tensor:
    """Cut the mean cosine into what each dimension gives to it.

    Args:
        unit_sum_D: Sum of the rows scaled to length 1.
        square_sum_D: Sum of their squares, dimension by dimension.
        num_rows: Rows in all, at least 2.

    Returns:
        float64 `[D]`, which adds up to `mean_cosine`.

    Source: Timkey and van Schijndel 2021, All Bark and No Bite, eq. 3 and 4, over all pairs of different rows.
    """
    return (unit_sum_D.double().square() - square_sum_D.double()) / (num_rows * (num_rows - 1))


def count_effective_rank(covariance_DD: Tensor) -> float:
    """Give the effective rank of centred rows: the exponential of the entropy of their singular values.

    Args:
        covariance_DD: Their covariance; its eigenvalues are the squares of the singular values, up to a factor.

    Returns:
        1 to D; NaN where all rows are the same.

    Source: Roy and Vetterli 2007, The Effective Rank, definition 1.
    """
    singular = torch.linalg.eigvalsh(covariance_DD.double()).clamp_min(0).sqrt()
    shares = singular / singular.sum()
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))


def count_participation(covariance_DD: Tensor) -> float:
    """Give the participation ratio, `(sum l)^2 / sum l^2` over the eigenvalues of the covariance.

    Returns:
        1 to D; NaN where all rows are the same.

    Source: Gao et al. 2017, A Theory of Multineuronal Dimensionality, eq. 5.
    """
    covariance = covariance_DD.double()
    return float(covariance.trace().square() / covariance.square().sum())


def find_outliers(rms_D: Tensor) -> list[int]:
    """Find outlier dimensions: root mean square over 3 standard deviations above the mean, and twice the median.

    Args:
        rms_D: Root mean square of each dimension over all rows.

    Returns:
        The dimensions, the largest first.

    Source: the three-sigma rule of Kovaleva et al. 2021, BERT Busters, section 3, there on weights of layer norms.
    """
    rms = rms_D.double()
    is_far = rms > rms.mean() + _OUTLIER_SIGMAS * rms.std(correction=0)
    is_large = rms > _OUTLIER_TIMES * rms.median()
    order = rms.argsort(descending=True)
    return order[(is_far & is_large)[order]].tolist()


def find_rogues(parts_D: Tensor) -> list[int]:
    """Find rogue dimensions: each alone gives 5 % of the mean cosine, and five times what an even share would be.

    Args:
        parts_D: What each dimension gives to the mean cosine, from `cut_cosines`.

    Returns:
        The dimensions, the largest share first; none where the mean cosine is below 0.05.

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
    """Turn and mirror centred points so that they lie nearest to others, row by row.

    Returns:
        float64 `[n, K]`: the points times the orthogonal matrix that makes the sum of squared distances least.

    Source: Schoenemann 1966, A Generalized Solution of the Orthogonal Procrustes Problem, eq. 1.10.
    """
    points, onto = points_nK.double(), onto_nK.double()
    left, _, right = torch.linalg.svd(points.T @ onto)
    return points @ (left @ right)
