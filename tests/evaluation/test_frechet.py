"""The Fréchet distance against closed forms, and against scipy's matrix root."""

import numpy as np
import pytest
import scipy.linalg
import torch

from src.evaluation.frechet import frechet_distance


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n, d, seed):
    """Features with a mean and a full covariance."""
    return normal(n, d, seed) @ normal(d, d, seed + 100) + normal(1, d, seed + 200)


def test_one_dimension_is_the_closed_form():
    """Catches a covariance divided by n, a variance for its root, a missing square: (m - m')^2 + (s - s')^2."""
    x, y = 2 * normal(40, 1) + 1, 0.5 * normal(30, 1, seed=1)
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-10)


def test_diagonal_gaussians_are_the_sum_of_their_dimensions():
    """Catches a trace taken of the wrong matrix; Hadamard's columns are exactly uncorrelated and of mean 0."""
    columns = torch.from_numpy(scipy.linalg.hadamard(64).astype(np.float64))
    x = columns[:, 1:9] * torch.arange(1, 9) + torch.arange(8)
    y = columns[:, 20:28] * torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6]) - 1
    expected = (x.mean(0) - y.mean(0)).square().sum() + (x.std(0) - y.std(0)).square().sum()
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("d", [2, 16, 64])
def test_agrees_with_scipys_matrix_root(d):
    """Catches an error in the root of full covariances that do not commute."""
    x, y = correlated(500, d, 1), correlated(300, d, 2)
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    difference = (x.mean(0) - y.mean(0)).numpy()
    expected = difference @ difference + np.trace(cov_x + cov_y - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_is_symmetric_and_invariant_under_rotation_and_shift():
    """Catches an order of the factors that matters, and a root taken entry by entry."""
    x, y = correlated(500, 16, 1), correlated(300, 16, 2)
    distance = frechet_distance(x, y)
    rotation, _ = torch.linalg.qr(normal(16, 16, 3))
    assert distance > 1
    assert frechet_distance(y, x) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(x @ rotation + 5, y @ rotation + 5) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * distance, rel=1e-9)
    assert frechet_distance(x.flip(0), y) == pytest.approx(distance, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(1000, 16), (1000, 64), (100, 512)])
def test_a_set_is_at_no_distance_from_itself(n, d):
    """Catches roots that lose half of the digits; also with fewer vectors than dimensions, a singular covariance."""
    x = normal(n, d)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-8)


def test_float32_features_have_float64_moments():
    """Catches moments in float32, which lose a small distance between features far from 0."""
    x = normal(1000, 8).float() + 1000
    y = x + 0.01
    exact = frechet_distance(x.double(), y.double())
    assert exact == pytest.approx(8 * 0.01**2, rel=0.01)
    assert frechet_distance(x, y) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(
    ("x", "y"), [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5, 3), (1, 3)), ((5,), (5,)), ((5, 3, 1), (5, 3, 1))]
)
def test_sizes_that_do_not_fit_are_refused(x, y):
    """Catches a covariance of one vector, which is nan."""
    with pytest.raises(ValueError, match="no Fréchet distance"):
        frechet_distance(torch.zeros(x), torch.zeros(y))
