"""Solvers on Gaussian data, whose denoiser and whose probability-flow ODE have closed forms."""

from math import exp, log, sqrt

import numpy as np
import pytest
import torch

from src.diffusion.samplers import DDIM
from src.diffusion.schedules import Cosine, Laplace, Linear, Sigmoid
from src.diffusion.solvers import DPMSolverPP, Heun, multistep_weights

MEAN, STD = 0.3, 0.5
SOLVERS = {
    "ddim": (DDIM(clip=False), 1),
    "heun": (Heun(clip=False), 2),
    "dpmpp_1": (DPMSolverPP(clip=False, order=1), 1),
    "dpmpp_2m": (DPMSolverPP(clip=False, order=2), 2),
    "dpmpp_3m": (DPMSolverPP(clip=False, order=3), 3),
}


def denoise(x, level):
    """E[x0 | x] for x0 ~ N(MEAN, STD^2): the posterior mean of two Gaussians."""
    variance = level.alpha**2 * STD**2 + level.sigma**2
    return MEAN + level.alpha * STD**2 / variance * (x - level.alpha * MEAN)


def exact(x, t, s):
    """The ODE carries (x - alpha MEAN) / std unchanged, std^2 = alpha^2 STD^2 + sigma^2."""
    std_t, std_s = (sqrt(level.alpha**2 * STD**2 + level.sigma**2) for level in (t, s))
    return s.alpha * MEAN + (x - t.alpha * MEAN) * std_s / std_t


def refuse_noise():
    raise AssertionError("a deterministic solver asked for noise")


def error_at_last_level(solver, schedule, steps, reach=3.0) -> float:
    """Largest error at t = 0, before the last step to sigma = 0, in float64, of latents from -reach to reach."""
    object.__setattr__(solver, "steps", steps)
    object.__setattr__(solver, "spacing", "log_snr")
    path = solver.path(schedule)
    start = torch.linspace(-reach, reach, 25, dtype=torch.float64)
    states = list(solver(denoise, schedule, start, refuse_noise))
    assert [step.index for step in states] == list(range(1, steps + 1))
    return float((states[-2].x - exact(start, path[0], path[-2])).abs().max())


@pytest.mark.parametrize("name", SOLVERS)
def test_the_order_of_convergence_is_that_of_the_paper(name):
    """Catches a wrong coefficient: it costs at least one order. With this many times, rounding them is no error."""
    solver, order = SOLVERS[name]
    schedule = Linear(num_timesteps=100_001, beta_start=1e-6, beta_end=2e-4)
    steps = np.array([51, 101, 201, 401])
    errors = [error_at_last_level(solver, schedule, int(n)) for n in steps]
    slope = -np.polyfit(np.log(steps - 1), np.log(errors), 1)[0]
    assert order - 0.25 < slope < order + 1.25, errors


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "dpmpp_3m"])
def test_a_thousand_steps_reach_the_exact_solution(name):
    """From latents within one standard deviation; the error grows in proportion with the latent."""
    solver, _ = SOLVERS[name]
    assert error_at_last_level(solver, Linear(), 1000, reach=1.0) < 1e-5


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Sigmoid(), Laplace()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "dpmpp_3m"])
def test_few_steps_are_nearer_to_the_solution_than_ddims(name, schedule):
    solver, _ = SOLVERS[name]
    assert error_at_last_level(solver, schedule, 51) < error_at_last_level(SOLVERS["ddim"][0], schedule, 51) / 4


def test_first_order_dpm_solver_is_ddim():
    schedule, start = Linear(), torch.linspace(-3, 3, 25, dtype=torch.float64)
    ddim = list(DDIM(steps=20, clip=True)(denoise, schedule, start, refuse_noise))
    first = list(DPMSolverPP(steps=20, order=1, clip=True)(denoise, schedule, start, refuse_noise))
    for a, b in zip(ddim, first, strict=True):
        torch.testing.assert_close(a.x, b.x, atol=1e-12, rtol=0)


def test_the_last_step_lands_on_the_denoiser():
    for solver in (Heun(steps=5, clip=False), DPMSolverPP(steps=5, order=3, clip=False)):
        *_, last = solver(denoise, Linear(), torch.linspace(-3, 3, 5, dtype=torch.float64), refuse_noise)
        torch.testing.assert_close(last.x, last.x0, atol=1e-12, rtol=0)


def test_no_signal_at_the_start_is_no_obstacle():
    """Zero terminal SNR: alpha = 0 has no finite lambda."""
    schedule = Linear(zero_terminal_snr=True)
    for solver in (Heun(steps=10, clip=False), DPMSolverPP(steps=10, order=2, clip=False)):
        path = solver.path(schedule)
        assert path[0].alpha == 0
        states = list(solver(denoise, schedule, torch.linspace(-3, 3, 5, dtype=torch.float64), refuse_noise))
        assert all(torch.isfinite(step.x).all() for step in states)


@pytest.mark.parametrize("nodes", [[0.3], [-0.2, 0.3], [-1.0, -0.2, 0.3]])
def test_the_multistep_weights_integrate_polynomials_exactly(nodes):
    """sum w_j f(nodes_j) against numerical quadrature of e^(v - end) p(v) for every monomial the nodes determine."""
    end = 0.9
    v = np.linspace(nodes[-1], end, 20001)
    weights = multistep_weights(nodes, nodes[-1], end)
    for power in range(len(nodes)):
        expected = np.trapezoid(np.exp(v - end) * v**power, v)
        assert sum(w * n**power for w, n in zip(weights, nodes, strict=True)) == pytest.approx(expected, abs=1e-8)


def test_two_step_weights_are_algorithm_2_of_the_paper():
    """D = (1 + 1 / (2 r)) x0_t - 1 / (2 r) x0_prev, x_s = ... - alpha_s (e^-h - 1) D."""
    h_prev, h = 0.011, 0.01
    r = h_prev / h
    old, new = DPMSolverPP().weights([-h_prev, 0.0], 0.0, h)
    factor = 1 - exp(-h)
    assert new == pytest.approx(factor * (1 + 1 / (2 * r)), rel=1e-12)
    assert old == pytest.approx(-factor / (2 * r), rel=1e-12)


def test_fewer_steps_than_the_order_are_refused():
    with pytest.raises(ValueError, match="steps=2 are fewer than order=3 needs; take at least 3"):
        DPMSolverPP(steps=2, order=3)


def test_lambda_of_the_nodes_grows_towards_the_image():
    path = Heun(steps=10).path(Linear())
    lambdas = [log(level.alpha / level.sigma) for level in path[:-1]]
    assert lambdas == sorted(lambdas)
