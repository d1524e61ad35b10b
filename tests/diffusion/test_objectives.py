"""Rows of the objective table: what the network learns, and the way back."""

import pytest
import torch

from src.diffusion.objectives import X0, Eps, V
from src.diffusion.schedules import Cosine, Linear


@pytest.mark.parametrize(
    ("objective", "row"),
    [
        (Eps(), lambda alpha, sigma: (0, 1)),
        (X0(), lambda alpha, sigma: (1, 0)),
        (V(), lambda alpha, sigma: (-sigma, alpha)),
    ],
)
def test_rows_and_targets_equal_the_papers(objective, row):
    """Catches a wrong sign of v, or a and b the wrong way round."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, 4, 4, generator=g, dtype=torch.float64)
    alpha = torch.tensor([1.0, 0.8, 0.6, 0.28, 0.0], dtype=torch.float64).view(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    assert objective.row(0.6, 0.8) == row(0.6, 0.8)
    a, b = row(alpha, sigma)
    torch.testing.assert_close(objective.target(x0, eps, alpha, sigma), a * x0 + b * eps, rtol=0, atol=1e-15)


@pytest.mark.parametrize("schedule", [Linear(1000), Cosine(1000)])
@pytest.mark.parametrize("objective", [Eps(), X0(), V()])
def test_every_level_solves_back_to_x0_and_eps(objective, schedule):
    """Catches a wrong d, and a float branch that differs from the tensor branch."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1000, 8, generator=g, dtype=torch.float64)
    alpha, sigma = schedule.alpha[:, None], schedule.sigma[:, None]
    x_t = alpha * x0 + sigma * eps
    F = objective.target(x0, eps, alpha, sigma)
    torch.testing.assert_close(objective.x0(x_t, F, alpha, sigma), x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(objective.eps(x_t, F, alpha, sigma), eps, rtol=0, atol=1e-10)
    for t in range(1000):
        level = (schedule.alpha[t].item(), schedule.sigma[t].item())
        torch.testing.assert_close(objective.x0(x_t[t], F[t], *level), x0[t], rtol=0, atol=1e-10)
        torch.testing.assert_close(objective.eps(x_t[t], F[t], *level), eps[t], rtol=0, atol=1e-10)


@pytest.mark.parametrize("objective", [Eps(), X0(), V()])
def test_solving_back_leaves_its_inputs_alone(objective):
    """Catches arithmetic in place on the sampler's state or on the network's output."""
    x_t, F = torch.full((2, 3), 0.5), torch.full((2, 3), 0.25)
    objective.x0(x_t, F, 0.6, 0.8)
    objective.eps(x_t, F, 0.6, 0.8)
    assert torch.equal(x_t, torch.full((2, 3), 0.5))
    assert torch.equal(F, torch.full((2, 3), 0.25))
