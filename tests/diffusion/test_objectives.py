"""Rows of the objective table: what the network learns, and the way back."""

import pytest
import torch

from src.diffusion.objectives import X0, Edm, Eps, Flow, V
from src.diffusion.schedules import Cosine, Laplace, Linear, Quadratic, ScaledLinear, Sigmoid


@pytest.mark.parametrize(
    ("objective", "row"),
    [
        (Eps(), lambda alpha, sigma: (0, 1)),
        (X0(), lambda alpha, sigma: (1, 0)),
        (V(), lambda alpha, sigma: (-sigma, alpha)),
        (Flow(), lambda alpha, sigma: (-1, 1)),
        (Edm(sigma_data=1.0), lambda alpha, sigma: (sigma, -alpha)),  # alpha^2 + sigma^2 = 1 here
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


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), ScaledLinear(), Quadratic(), Sigmoid(), Laplace()])
@pytest.mark.parametrize("objective", [Eps(), X0(), V(), Flow(), Edm(), Edm(sigma_data=1.3)])
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


@pytest.mark.parametrize("objective", [Eps(), X0(), V(), Flow(), Edm(), Edm(sigma_data=1.3)])
def test_solving_back_leaves_its_inputs_alone(objective):
    """Catches arithmetic in place on the sampler's state or on the network's output."""
    x_t, F = torch.full((2, 3), 0.5), torch.full((2, 3), 0.25)
    objective.x0(x_t, F, 0.6, 0.8)
    objective.eps(x_t, F, 0.6, 0.8)
    assert torch.equal(x_t, torch.full((2, 3), 0.5))
    assert torch.equal(F, torch.full((2, 3), 0.25))


def test_edm_with_unit_data_is_minus_v_under_a_variance_preserving_schedule():
    schedule = Linear()
    x0, eps = torch.randn(2, 1000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = schedule.alpha[:, None], schedule.sigma[:, None]
    edm, v = Edm(sigma_data=1.0).target(x0, eps, alpha, sigma), V().target(x0, eps, alpha, sigma)
    torch.testing.assert_close(edm, -v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 80.0])
def test_edm_is_table_1_of_its_paper(sigma):
    """Karras et al. 2022 at alpha = 1: D = c_skip x + c_out F(c_in x), and F's target has unit variance."""
    sd = 0.5
    x, F = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2) ** 0.5
    objective = Edm(sigma_data=sd)
    torch.testing.assert_close(objective.x0(x, F, 1.0, sigma), c_skip * x + c_out * F, rtol=0, atol=1e-12)
    torch.testing.assert_close(x * objective.input_scale(1.0, sigma), x / (sigma**2 + sd**2) ** 0.5, rtol=1e-12, atol=0)
    a, b = objective.row(1.0, sigma)
    assert a**2 * sd**2 + b**2 == pytest.approx(1, rel=1e-12)


def test_flow_is_the_derivative_of_the_straight_path():
    x0, eps = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-6
    difference = ((1 - (0.3 + step)) * x0 + (0.3 + step) * eps) - ((1 - 0.3) * x0 + 0.3 * eps)
    alpha, sigma = torch.tensor(0.7), torch.tensor(0.3)
    torch.testing.assert_close(Flow().target(x0, eps, alpha, sigma), difference / step, rtol=1e-8, atol=1e-8)
