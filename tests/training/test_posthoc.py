"""Averages of other lengths out of stored ones: the closed forms by quadrature, the fit by tracking what was wanted."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from src.training.averages import Power
from src.training.posthoc import coefficients, inner_products

LENGTHS = (0.05, 0.1)  # stored


def gammas(lengths) -> Tensor:
    return torch.tensor([Power(length).gamma for length in lengths], dtype=torch.float64)


def stored(times) -> tuple[Tensor, Tensor]:
    """Exponents and times of snapshots of both lengths at each time."""
    times = torch.tensor(times, dtype=torch.float64)
    return gammas(LENGTHS).repeat(len(times)), times.repeat_interleave(2)


def profile(gamma: float, t: float, tau: np.ndarray) -> np.ndarray:
    return np.where(tau <= t, (gamma + 1) * (tau / t) ** gamma / t, 0.0)


def quadrature(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """200 Gauss-Legendre nodes and weights in s = tau^(1/4), which is smooth at 0 also for small gamma."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    a, b = low**0.25, high**0.25
    s = (a + b) / 2 + (b - a) / 2 * nodes
    return s**4, weights * (b - a) / 2 * 4 * s**3


@pytest.mark.parametrize("t", [(10.0, 10.0), (3.0, 10.0), (10.0, 3.0)])
def test_inner_products_are_the_integrals(t):
    """Float64 quadrature of 200 nodes up to where the earlier one ends; nearly a flat one (0.288) among them."""
    lengths = (0.02, 0.05, 0.1, 0.2, 0.288)
    g, (t_a, t_b) = gammas(lengths), t
    exact = inner_products(g, torch.full_like(g, t_a), g, torch.full_like(g, t_b))
    tau, weights = quadrature(0, min(t))
    for i, a in enumerate(g.tolist()):
        for j, b in enumerate(g.tolist()):
            integral = (profile(a, t_a, tau) * profile(b, t_b, tau) * weights).sum()
            assert exact[i, j].item() == pytest.approx(integral, rel=1e-10)


def test_inner_products_of_long_trainings_are_finite():
    """tau^gamma overflows float64 at gamma = 100 and a million steps; ratios do not."""
    g, t = gammas([0.01, 0.28]), torch.tensor([1e6, 3e4], dtype=torch.float64)
    assert torch.isfinite(inner_products(g, t, g, t)).all()


@pytest.mark.parametrize("k", [0, 1, 30, 63])
def test_a_stored_average_is_itself(k):
    """64 profiles, of which the condition is 1e4: float64 leaves 1e-12."""
    g, t = stored([1000 * (i + 1) / 32 for i in range(32)])
    until = t <= t[k]
    x, residual = coefficients(g[until], t[until], g[k : k + 1], t[k].item())
    expected = torch.zeros(int(until.sum()), 1, dtype=torch.float64)
    expected[k] = 1
    torch.testing.assert_close(x, expected, atol=1e-10, rtol=0)
    assert residual.item() < 1e-7  # the root of float64's rounding


def test_the_residual_is_the_distance_of_the_profiles():
    """By quadrature between the snapshots, where the sum is smooth."""
    times = [2.0, 4.0, 6.0, 8.0]
    g, t = stored(times)
    wanted = gammas([0.03, 0.15])
    x, residual = coefficients(g, t, wanted, 8.0)
    for j in range(2):
        squared = norm = 0.0
        for low, high in zip([0.0, *times], times, strict=False):
            tau, weights = quadrature(low, high)
            q = profile(wanted[j].item(), 8.0, tau)
            total = sum(
                c * profile(a, b, tau) for c, a, b in zip(x[:, j].tolist(), g.tolist(), t.tolist(), strict=True)
            )
            squared += ((total - q) ** 2 * weights).sum()
            norm += (q**2 * weights).sum()
        assert residual[j].item() == pytest.approx(math.sqrt(squared / norm), rel=1e-6)


@pytest.mark.parametrize(
    ("snapshots", "residuals"),
    [(8, (0.100, 0.0125, 0.0329)), (32, (0.0111, 0.000895, 0.00230)), (256, (1.83e-4, 1.41e-5, 3.62e-5))],
)
def test_more_snapshots_come_nearer(snapshots, residuals):
    """Of the lengths 0.03, 0.075 and 0.15; what conf/averages/edm2.yaml says of 32 is here."""
    g, t = stored([(i + 1) / snapshots for i in range(snapshots)])
    _, residual = coefficients(g, t, gammas([0.03, 0.075, 0.15]), 1.0)
    assert all(r <= limit * 1.01 for r, limit in zip(residual.tolist(), residuals, strict=True)), residual


def test_the_coefficients_are_the_nearest_that_add_up_to_one():
    """The gradient A x - b is the same in each coefficient, so that no exchange between two of them comes nearer."""
    g, t = stored([1.0, 2.0, 3.0])
    wanted = gammas([0.2])
    x, residual = coefficients(g, t, wanted, 3.0)
    assert x.sum().item() == pytest.approx(1, abs=1e-13)
    A, q = inner_products(g, t, g, t), (wanted, torch.tensor([3.0], dtype=torch.float64))
    b, qq = inner_products(g, t, *q), inner_products(*q, *q)
    gradient = A @ x - b
    torch.testing.assert_close(gradient, gradient.mean().expand_as(gradient), atol=1e-12, rtol=0)
    for i in range(len(g)):
        moved = x.clone()
        moved[i] += 1e-3
        moved[i - 1] -= 1e-3
        squared = (qq - 2 * moved.T @ b + moved.T @ A @ moved) / qq
        assert squared.sqrt().item() > residual.item()


@pytest.mark.parametrize(("snapshots", "most"), [(8, 1.1), (32, 1.022), (128, 1.006)])
def test_adding_up_to_one_costs_little(snapshots, most):
    """Beside EDM2's A x = b, whose coefficients add up to 0.87, 0.974 and 0.995 at the longest of these lengths."""
    g, t = stored([(i + 1) / snapshots for i in range(snapshots)])
    wanted, time = gammas([0.02, 0.05, 0.075, 0.15, 0.28]), torch.ones(5, dtype=torch.float64)
    A, b, qq = (
        inner_products(g, t, g, t),
        inner_products(g, t, wanted, time),
        inner_products(wanted, time, wanted, time),
    )
    free = torch.linalg.solve(A, b)
    least = (1 - (free * b).sum(0) / qq.diagonal()).clamp(min=0).sqrt()
    _, residual = coefficients(g, t, wanted, 1.0)
    assert (residual <= most * least + 1e-7).all()


def test_two_stored_averages_of_the_same_length_do_no_harm():
    g, t = stored([1.0, 2.0, 3.0])
    once = coefficients(g, t, gammas([0.075]), 3.0)[1]
    twice = coefficients(g.repeat(2), t.repeat(2), gammas([0.075]), 3.0)[1]
    torch.testing.assert_close(once, twice, atol=1e-9, rtol=0)


@pytest.mark.parametrize("length", [0.03, 0.075, 0.15])
def test_a_rebuilt_average_is_the_one_that_was_not_tracked(length):
    """A random walk of 2000 steps with 32 snapshots of each of two lengths, in float64.

    What the residual r allows is, by Cauchy and Schwarz, r ||q|| ||w||, q the wanted profile; profiles are constant
    over a step here and not there, which adds less than a hundredth. The weights of a walk, which change slowly, come
    far nearer, as those of a training do: a profile's error has both signs.
    """
    n, every, size = 2000, 2000 / 32, 64
    torch.manual_seed(0)
    history = torch.randn(n, size, dtype=torch.float64).cumsum(0) / n**0.5 + torch.randn(size, dtype=torch.float64)
    snapshots = [round(every * (i + 1)) for i in range(32)]
    averages = {name: torch.zeros(size, dtype=torch.float64) for name in (*LENGTHS, length)}
    kept = []
    for step, w in enumerate(history, start=1):
        for name, average in averages.items():
            average.lerp_(w, 1 - Power(name).decay_at(step, 1))
        if step in snapshots:
            kept += [averages[name].clone() for name in LENGTHS]
    x, residual = coefficients(*stored(snapshots), gammas([length]), n)
    rebuilt = (x * torch.stack(kept)).sum(0)

    error = (rebuilt - averages[length]).norm()
    gamma = Power(length).gamma
    q = math.sqrt((gamma + 1) ** 2 / (2 * gamma + 1) / n)
    assert error <= 1.01 * residual.item() * q * history.norm()
    assert error / averages[length].norm() < {0.03: 3e-4, 0.075: 2e-5, 0.15: 7e-5}[length]  # twice what is measured
