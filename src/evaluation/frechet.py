"""The Fréchet distance between two sets of feature vectors, each taken as a Gaussian."""

import torch
from torch import Tensor


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) (Dowson & Landau 1982; Eq. 6, Heusel et al. 2017).

    Means and covariances (divided by n - 1) in float64. The trace of the root is the sum of the singular values of
    S_x^(1/2) S_y^(1/2): no root is taken of an eigenvalue that is only rounding noise, so a singular covariance needs
    no added epsilon.

    Args:
        x, y: (N, D) and (M, D) features.

    Raises:
        ValueError: for fewer than two vectors, or sizes that differ.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features of {tuple(x.shape)} and {tuple(y.shape)} have no Fréchet distance")
    x, y = x.double(), y.double()
    cov_x, cov_y = torch.atleast_2d(torch.cov(x.T)), torch.atleast_2d(torch.cov(y.T))
    cross = torch.linalg.svdvals(_root(cov_x) @ _root(cov_y)).sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross
    return float(distance)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
