"""The Fréchet distance between two sets of feature vectors, each taken as a Gaussian.

Sums are taken in blocks of one size, each in one thread: no bit depends on the number of cores, and a block of float64
is all the memory that a large set needs beside its covariance.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from src.threads import in_threads

ROWS = 4096  # vectors that are float64 at a time
COLUMNS = 512  # of the covariance that one thread computes
CPU = torch.device("cpu")


class Moments(NamedTuple):
    """What the distance knows of a set.

    Attributes:
        number: of vectors.
        mean: (D,) float64.
        covariance: (D, D) float64, divided by number - 1.
    """

    number: int
    mean: Tensor
    covariance: Tensor


class Distance(NamedTuple):
    """The square of the Fréchet distance, which everybody calls the distance, and its two parts."""

    value: float
    of_means: float
    of_covariances: float


def moments(x: Tensor) -> Moments:
    """Of features, (N, D), whatever their type; one vector alone has a covariance of zeros.

    Raises:
        ValueError: for no vectors.
    """
    if x.ndim != 2 or not len(x):
        raise ValueError(f"features of {tuple(x.shape)} have no moments; one vector (N, D) is the least")
    n, d = x.shape
    mean = torch.zeros(d, dtype=torch.float64)
    for block in _blocks(x):
        mean += block.sum(0)
    mean /= n
    products = torch.zeros(d, d, dtype=torch.float64)

    def fill(low: int, _: object) -> None:
        columns = slice(low, low + COLUMNS)
        for block in _blocks(x):
            block -= mean
            products[columns].addmm_(block[:, columns].T, block)

    in_threads(fill, range(0, d, COLUMNS), CPU)
    products /= max(1, n - 1)
    return Moments(n, mean, products.add_(products.T.clone()).mul_(0.5))


def merged(a: Moments, b: Moments) -> Moments:
    """Those of both sets together (Chan, Golub & LeVeque 1983)."""
    n = a.number + b.number
    step = b.mean - a.mean
    products = (a.number - 1) * a.covariance + (b.number - 1) * b.covariance
    products.addr_(step, step, alpha=a.number * b.number / n)
    return Moments(n, a.mean + step * (b.number / n), products / (n - 1))


def distance(a: Moments, b: Moments) -> Distance:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Dowson & Landau 1982; Eq. 6, Heusel et al. 2017).

    With factors S = F F^T the trace of the root is the sum of the singular values of F_a^T F_b: no root is taken of an
    eigenvalue that is only rounding noise, so a singular covariance needs no added epsilon.

    Raises:
        ValueError: for features of different sizes, of a single vector, or that hold NaN or infinity.
    """
    if min(a.number, b.number) < 2:
        raise ValueError("a single feature vector has no covariance and no Fréchet distance")
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions have no Fréchet distance")
    if not all(torch.isfinite(v).all() for v in (a.mean, a.covariance, b.mean, b.covariance)):
        raise ValueError("features that hold NaN or infinity have no Fréchet distance")
    first, second = in_threads(lambda s, _: _factor(s), [a.covariance, b.covariance], CPU)
    (cross,) = in_threads(lambda f, _: float(torch.linalg.svdvals(f).sum()), [first.T @ second], CPU)
    of_means = float((a.mean - b.mean).square().sum())
    of_covariances = float(a.covariance.trace() + b.covariance.trace()) - 2 * cross
    return Distance(of_means + of_covariances, of_means, of_covariances)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """`distance` of two sets of features.

    Args:
        x, y: (N, D) and (M, D).

    Raises:
        ValueError: for fewer than two vectors, or sizes that differ.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features of {tuple(x.shape)} and {tuple(y.shape)} have no Fréchet distance")
    return distance(moments(x), moments(y)).value


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Copies in float64, ROWS vectors at a time."""
    return (block.to(torch.float64, copy=True) for block in x.split(ROWS))


def _factor(covariance: Tensor) -> Tensor:
    """F with F F^T = S: Cholesky's where S has full rank, which takes a tenth of the time, or else the root."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
