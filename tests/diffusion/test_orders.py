"""The order of every deterministic sampler, measured on data whose probability-flow ODE has an exact solution.

In one dimension the ODE is monotone and carries p_t to p_s, so it keeps quantiles: x_s = P_s^-1(P_t(x_t)), with P_t the
distribution function of a noisy mixture of Gaussians. Its denoiser is not linear, which a Gaussian's is: there some
error terms vanish (the midpoint rule's, on the straight path), and a method looks better than it is.

An error in one coefficient costs at least one order, and a slope is asserted to 0.15.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from src.diffusion.continuous import VE, Flow, Karras
from src.diffusion.oracle import Mixture
from src.diffusion.samplers import DDIM
from src.diffusion.schedules import Linear
from src.diffusion.solvers import DPMSolverPP, Heun, Midpoint, UniPC

DATA = Mixture(torch.tensor([[-0.7], [0.1], [0.6]]).double(), 0.25, torch.tensor([0.3, 0.5, 0.2]))
LATENTS = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]  # in standard deviations of the noise
INTERVALS = np.array([32, 64, 128, 256])
# the spacing at which a path has no corners; with so many times, interpolating between them is no error
PATHS = {
    "linear": (Linear(num_timesteps=100_001, beta_start=1e-6, beta_end=2e-4), "log_snr"),
    "karras": (Karras(), "linspace"),
    "ve": (VE(), "linspace"),
}
SOLVERS = {
    "ddim": (DDIM(clip=False), 1),
    "heun": (Heun(clip=False), 2),
    "midpoint": (Midpoint(clip=False), 2),
    "dpmpp_1": (DPMSolverPP(clip=False, order=1), 1),
    "dpmpp_2m": (DPMSolverPP(clip=False), 2),
    "dpmpp_2m_heun": (DPMSolverPP(clip=False, solver_type="heun"), 2),
    "dpmpp_3m": (DPMSolverPP(clip=False, order=3), 3),
    "unipc_1": (UniPC(clip=False, order=1), 2),  # Theorem 3.1 of Zhao et al. 2023: the corrector adds one
    "unipc_2": (UniPC(clip=False), 3),
    "unipc_2_heun": (UniPC(clip=False, solver_type="heun"), 3),
    "unipc_3": (UniPC(clip=False, order=3), 4),
}


def no_noise():
    raise AssertionError("a deterministic solver asked for noise")


def quantile(x, level):
    """P(x) of the noisy data at a level."""
    std = (level.alpha**2 * DATA.variance + level.sigma**2).sqrt()
    return (DATA.log_weights.exp() * torch.special.ndtr((x - level.alpha * DATA.means[:, 0]) / std)).sum(
        1, keepdim=True
    )


def exact(x, t, s):
    """Where the ODE carries x, (N, 1), from the level t to s; by bisection to the last bits."""
    target = quantile(x, t)
    low, high = torch.full_like(x, -5 - 5 * s.sigma), torch.full_like(x, 5 + 5 * s.sigma)
    for _ in range(70):
        middle = (low + high) / 2
        below = quantile(middle, s) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def error(solver, schedule, spacing, intervals):
    """The largest error at the cleanest level of a path with so many intervals, before the last step to sigma = 0."""
    solver = replace(solver, steps=intervals + 1, spacing=spacing)
    path = solver.path(schedule)
    start = LATENTS * path[0].sigma
    *_, before, _ = solver(DATA, schedule, start, no_noise)
    return float((before.x - exact(start, path[0], path[-2])).abs().max())


def slope(solver, schedule, spacing):
    errors = [error(solver, schedule, spacing, int(n)) for n in INTERVALS]
    return -np.polyfit(np.log(INTERVALS), np.log(errors), 1)[0]


def test_the_exact_solution_solves_the_ode():
    """Catches a reference that is wrong itself: dy / du = (y - x0) / u, by central differences."""
    path = Karras().levels(40, "linspace")
    x = exact(LATENTS * path[0].sigma, path[0], path[20])
    level, u = path[20], path[20].sigma
    step = 1e-4 * u
    ahead, behind = (exact(x, level, level._replace(sigma=u + d)) for d in (step, -step))
    torch.testing.assert_close((ahead - behind) / (2 * step), (x - DATA(x, level)) / u, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_order_is_the_papers(name, path):
    """Catches a wrong weight, a stale x0, a wrong step beside the right ones, a time that is off by one."""
    solver, order = SOLVERS[name]
    measured = slope(solver, *PATHS[path])
    assert measured == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    ("name", "shift"),
    [("ddim", 1.0), ("ddim", 3.0), ("heun", 1.0), ("heun", 3.0), ("midpoint", 1.0), ("midpoint", 3.0)],
)
def test_the_order_on_the_straight_path_from_pure_noise(name, shift):
    """Catches a rule that is not the midpoint's in the time of flow matching, and a first step that costs an order."""
    solver, order = SOLVERS[name]
    assert slope(solver, Flow(shift=shift), "linspace") == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_heun", "dpmpp_3m", "unipc_2", "unipc_3"])
@pytest.mark.parametrize("spacing", ["linspace", "log_snr"])
def test_solvers_in_lambda_keep_second_order_from_pure_noise(name, spacing):
    """Catches a first step from alpha = 0 that costs more than it must.

    There lambda is minus infinity, its step the first-order one, and no path in lambda is long enough: an order above
    2 cannot be kept, whatever the method, and log(steps) slows the second a little.
    """
    assert slope(SOLVERS[name][0], Flow(), spacing) > 1.8


@pytest.mark.parametrize("path", PATHS)
def test_the_corrector_pays_without_an_evaluation(path):
    """Catches a corrector whose result is thrown away: the predictor alone is DPM-Solver++."""
    schedule, spacing = PATHS[path]
    for order, gain in ((1, 5), (2, 4), (3, 2)):
        with_it = error(UniPC(clip=False, order=order), schedule, spacing, 64)
        without = error(DPMSolverPP(clip=False, order=order), schedule, spacing, 64)
        assert with_it < without / gain, order


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (DDIM(), 20),
        (Heun(), 39),
        (Midpoint(), 39),
        (DPMSolverPP(), 20),
        (DPMSolverPP(order=3, eta=1.0), 20),
        (UniPC(), 20),
        (UniPC(order=3), 20),
    ],
)
@pytest.mark.parametrize("schedule", [Linear(), Karras(), VE(), Flow()], ids=lambda s: type(s).__name__)
def test_evaluations_are_as_many_as_the_papers_say(solver, expected, schedule):
    """Catches an evaluation whose answer is thrown away, as the corrector's or at sigma = 0."""
    asked = []

    def denoise(x, level):
        asked.append(level)
        return DATA(x, level)

    list(replace(solver, steps=20, spacing="linspace")(denoise, schedule, LATENTS.clone(), lambda: LATENTS.clone()))
    pure_noise = isinstance(solver, Heun) and isinstance(schedule, Flow)  # its first step is Euler's
    assert len(asked) == expected - pure_noise
    assert all(level.sigma > 0 for level in asked)
