"""The distribution that samplers draw from, on data whose denoiser is exact.

For Gaussian data a chain is affine in its start and its noises. Impulses tell the coefficients, and with them the mean
and the variance of the samples without a sampling error: they are compared to 1e-11 with the papers' recursions,
written here in y = x / alpha and u = sigma / alpha, and with the data's own, from which a finite number of steps
deviates by a bias that is stated. For a mixture moments are counted, within their standard error.
"""

from dataclasses import replace
from itertools import pairwise
from math import exp, expm1, inf, log, sqrt

import pytest
import torch

from src.diffusion.continuous import VE, Flow, Karras
from src.diffusion.oracle import Mixture
from src.diffusion.samplers import DDIM, DDPM
from src.diffusion.schedules import Cosine, Laplace, Linear, Quadratic, ScaledLinear, Sigmoid
from src.diffusion.solvers import DPMSolverPP, Heun, Midpoint, UniPC

MEAN, STD = 0.3, 0.5
GAUSSIAN = Mixture(torch.tensor([[MEAN]], dtype=torch.float64), STD)
SCHEDULES = {
    "linear": (Linear(), "log_snr"),
    "scaled_linear": (ScaledLinear(), "log_snr"),
    "quadratic": (Quadratic(), "log_snr"),
    "cosine": (Cosine(), "log_snr"),
    "sigmoid": (Sigmoid(), "log_snr"),
    "laplace": (Laplace(), "log_snr"),
    "karras": (Karras(), "linspace"),
    "ve": (VE(), "linspace"),
    "flow": (Flow(), "linspace"),
}
SOLVERS = {
    "heun": (Heun(clip=False), 1e-5),
    "dpmpp_2m": (DPMSolverPP(clip=False), 1e-5),
    "dpmpp_3m": (DPMSolverPP(clip=False, order=3), 5e-6),
    "unipc": (UniPC(clip=False), 3e-6),
    "midpoint": (Midpoint(clip=False), 1e-8),
}


def no_noise():
    raise AssertionError("a deterministic sampler drew noise")


def exact(x, t, s):
    """The ODE carries (x - alpha MEAN) / std unchanged."""
    std_t, std_s = (sqrt(level.alpha**2 * STD**2 + level.sigma**2) for level in (t, s))
    return s.alpha * MEAN + (x - t.alpha * MEAN) * std_s / std_t


def error(sampler, schedule):
    """The largest at the cleanest level, of latents within one standard deviation."""
    path = sampler.path(schedule)
    start = torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None] * path[0].sigma
    *_, before, last = sampler(GAUSSIAN, schedule, start, no_noise)
    torch.testing.assert_close(last.x, last.x0, rtol=0, atol=1e-14)
    return float((before.x - exact(start, path[0], path[-2])).abs().max())


# The ODE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_thousand_steps_reach_the_exact_solution(name, schedule):
    """Catches a solver that converges, of the right order even, to something else."""
    solver, tolerance = SOLVERS[name]
    schedule, spacing = SCHEDULES[schedule]
    if name == "heun" and isinstance(schedule, Cosine):
        spacing = "linspace"  # in lambda Cosine's path is long: 1.4e-5
    assert error(replace(solver, steps=1000, spacing=spacing), schedule) < tolerance


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_euler_comes_near_within_its_order(schedule):
    """Catches an error of DDIM that does not fall as 1 / steps. In one coordinate or another, DDIM is Euler."""
    schedule, spacing = SCHEDULES[schedule]
    coarse, fine = (error(DDIM(steps, spacing, clip=False), schedule) for steps in (500, 1000))
    assert fine < 2e-3
    assert coarse / fine == pytest.approx(2, abs=0.1)


# Stochastic samplers -------------------------------------------------------------------------------------------------


def moments(sampler, schedule):
    """Mean and standard deviation of the samples, without a sampling error."""
    path = sampler.path(schedule)
    rows = len(path) + 1  # nothing; the start alone; each noise alone
    start = torch.zeros(rows, 1, dtype=torch.float64)
    start[1] = schedule.prior_std(path[0])
    drawn = iter(range(2, rows))

    def impulse():
        z = torch.zeros(rows, 1, dtype=torch.float64)
        z[next(drawn)] = 1
        return z

    *_, last = sampler(GAUSSIAN, schedule, start, impulse)
    response = last.x[:, 0] - last.x[0, 0]
    return float(last.x[0, 0]), float(response.square().sum().sqrt())


def gain(u):
    """Of the denoiser: x0 - MEAN = gain (y - MEAN)."""
    return STD**2 / (STD**2 + u**2)


def step_rule(eta=1.0, beta=False):
    """Eq. 6 and 7 of Ho et al. 2020 (eta = 1), Eq. 12 and 16 of Song et al. 2021."""

    def step(t, s, u_t, u_s, state):
        variance = eta**2 * u_s**2 * (1 - u_s**2 / u_t**2)
        keep = sqrt(u_s**2 - variance) / u_t
        if beta:  # beta_t of x_t, in the scale of x_s
            variance = (t.alpha / s.alpha) ** 2 * (u_t**2 - u_s**2) if u_s > 0 else 0.0
        (mean, var) = state
        factor = keep + (1 - keep) * gain(u_t)
        return factor * mean, factor**2 * var + variance

    return step


def churn_rule(gamma, s_tmin=0.0, s_tmax=inf, s_noise=1.0, most=inf):
    """Algorithm 2 of Karras et al. 2022."""

    def step(t, s, u_t, u_s, state):
        mean, var = state
        u = min(u_t * (1 + gamma), most) if s_tmin <= u_t <= s_tmax else u_t
        var = var + s_noise**2 * (u**2 - u_t**2)
        slope = (1 - gain(u)) / u
        factor = 1 + (u_s - u) * slope
        if u_s > 0:
            factor = 1 + (u_s - u) * (slope + factor * (1 - gain(u_s)) / u_s) / 2
        return factor * mean, factor**2 * var

    return step


def recursion(rule, path, prior_std):
    """Mean and standard deviation under a rule that keeps one state."""
    state = (-MEAN, (prior_std / path[0].alpha) ** 2)  # of y - MEAN
    for t, s in pairwise(path):
        state = rule(t, s, t.sigma / t.alpha, s.sigma / s.alpha, state)
    return MEAN + state[0], sqrt(state[1])


def sde_recursion(eta, order, path, prior_std):
    """SDE-DPM-Solver++ of first and second order (Eq. 17 and Algorithm 4, Lu et al. 2022b), with k-diffusion's eta.

    A step uses the x0 before, so that the covariance is that of (y, the x0 before).
    """
    mean = torch.tensor([-MEAN, 0.0], dtype=torch.float64)
    cov = torch.zeros(2, 2, dtype=torch.float64)
    cov[0, 0] = (prior_std / path[0].alpha) ** 2
    h_before = None
    for t, s in pairwise(path):
        g = gain(t.sigma / t.alpha)
        A = torch.tensor([[g, 0.0], [g, 0.0]], dtype=torch.float64)
        variance = 0.0
        if s.sigma > 0:
            h = log(s.alpha / s.sigma) - log(t.alpha / t.sigma)
            whole = -expm1(-(1 + eta) * h)
            ratio = 0.0 if h_before is None or order == 1 else h / (2 * h_before)
            A[0] = torch.tensor([exp(-(1 + eta) * h) + whole * (1 + ratio) * g, -whole * ratio], dtype=torch.float64)
            variance = (s.sigma / s.alpha) ** 2 * -expm1(-2 * eta * h)
            h_before = h
        mean, cov = A @ mean, A @ cov @ A.T
        cov[0, 0] += variance
    return MEAN + float(mean[0]), float(cov[0, 0].sqrt())


def churned(schedule, spacing):
    first = Heun(10, spacing).path(schedule)[0]
    return churn_rule(min(30 / 400, sqrt(2) - 1), most=first.sigma / first.alpha)


STOCHASTIC = {
    "ddpm": (DDPM(clip=False), step_rule()),
    "ddpm_beta": (DDPM(clip=False, variance="beta"), step_rule(beta=True)),
    "ddim_half": (DDIM(clip=False, eta=0.5), step_rule(0.5)),
    "ddim_full": (DDIM(clip=False, eta=1.0), step_rule(1.0)),
    "heun_churn": (Heun(clip=False, s_churn=30.0), churned),
    "dpmpp_1_sde": (DPMSolverPP(clip=False, order=1, eta=1.0), (1.0, 1)),
    "dpmpp_2m_sde": (DPMSolverPP(clip=False, eta=1.0), (1.0, 2)),
    "dpmpp_2m_sde_half": (DPMSolverPP(clip=False, eta=0.5), (0.5, 2)),
}
PATHS = {
    "linear": (Linear(), "trailing"),
    "euler": (Linear(), "karras"),  # conf/sampler/euler_ancestral.yaml
    "cosine": (Cosine(), "log_snr"),
    "karras": (Karras(), "linspace"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_mean_and_variance_are_those_of_the_papers_recursion(name, path):
    """Catches a noise of the wrong size in a single step, drawn twice, or left out."""
    schedule, spacing = PATHS[path]
    sampler, rule = STOCHASTIC[name]
    sampler = replace(sampler, steps=400, spacing=spacing)
    levels, prior_std = sampler.path(schedule), schedule.prior_std(sampler.path(schedule)[0])
    if isinstance(rule, tuple):
        expected = sde_recursion(*rule, levels, prior_std)
    else:
        expected = recursion(rule(schedule, spacing) if rule is churned else rule, levels, prior_std)
    assert moments(sampler, schedule) == pytest.approx(expected, abs=1e-11)


def test_churn_has_its_bounds_and_its_noise():
    """Catches s_tmin and s_tmax that are ignored or measured in another sigma, and s_noise for its square."""
    settings = {"s_tmin": 0.01, "s_tmax": 1.0, "s_noise": 1.007}
    for schedule, spacing in PATHS.values():
        sampler = Heun(100, spacing, clip=False, s_churn=30.0, **settings)
        path = sampler.path(schedule)
        expected = recursion(churn_rule(0.3, **settings), path, schedule.prior_std(path[0]))
        assert moments(sampler, schedule) == pytest.approx(expected, abs=1e-11)
        assert moments(replace(sampler, s_noise=1.0), schedule)[1] < expected[1] - 1e-4


@pytest.mark.parametrize(
    ("name", "order", "bias"),
    [
        ("ddpm", 1, -6.1e-3),
        ("ddpm_beta", 1, 5.3e-3),
        ("ddim_half", 1, -3.6e-3),
        ("ddim_full", 1, -6.1e-3),
        ("dpmpp_1_sde", 1, -6.1e-3),
        ("heun_churn", 2, 9.99e-5),
        ("dpmpp_2m_sde", 2, 3.80e-5),
        ("dpmpp_2m_sde_half", 2, 2.49e-5),
    ],
)
def test_mean_and_spread_are_the_datas_but_for_a_bias_that_falls_with_the_steps(name, order, bias):
    """Catches noise that belongs to no reverse SDE of the data: its bias does not fall.

    On EDM's levels, without the 8e-6 by which the last step, which returns a mean, narrows them. The posterior's
    variance takes x0 as known, and samples are 0.6 % too narrow after 1000 steps; beta's are 0.5 % too wide. The start,
    which holds none of the mean, is felt by the mean: the more the less noise a sampler adds.
    """
    schedule, spacing = PATHS["karras"]
    sampler, _ = STOCHASTIC[name]
    biases = []
    for steps in (250, 500, 1000):
        mean, std = moments(replace(sampler, steps=steps, spacing=spacing), schedule)
        assert mean == pytest.approx(MEAN, abs=6e-4)
        biases.append(std / (STD**2 / sqrt(STD**2 + schedule.sigma_min**2)) - 1)
    assert biases[-1] == pytest.approx(bias, rel=0.03)
    assert biases[0] / biases[1] == pytest.approx(2**order, rel=0.1)
    assert biases[1] / biases[2] == pytest.approx(2**order, rel=0.1)


WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([[-0.6, 0.5], [0.2, -0.4], [0.7, 0.6]], dtype=torch.float64)
STDS = torch.tensor([0.2, 0.3], dtype=torch.float64)
MIXTURE = Mixture(MEANS, STDS, WEIGHTS)
COUNTED = {
    "ddpm": (DDPM(1000, clip=False), Linear()),
    "ddpm_beta": (DDPM(1000, clip=False, variance="beta"), Linear()),
    "ddpm_cosine": (DDPM(1000, clip=False), Cosine()),
    "ddim_half": (DDIM(1000, clip=False, eta=0.5), Linear()),
    "euler_ancestral": (DDIM(1000, "karras", clip=False, eta=1.0), Linear()),
    "heun_churn": (Heun(200, "linspace", clip=False, s_churn=30.0), Karras()),
    "heun_churn_edm": (
        Heun(200, "linspace", clip=False, s_churn=30.0, s_tmin=0.01, s_tmax=1.0, s_noise=1.0),
        Karras(),
    ),
    "dpmpp_2m_sde": (DPMSolverPP(200, "log_snr", clip=False, eta=1.0), Linear()),
    "dpmpp_2m_sde_half": (DPMSolverPP(200, "linspace", clip=False, eta=0.5), Karras()),
    "dpmpp_2m_sde_flow": (DPMSolverPP(400, "linspace", clip=False, eta=1.0), Flow()),
    "ddim_flow": (DDIM(1000, "linspace", clip=False, eta=1.0), Flow()),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_mixtures_mean_covariance_and_weights(name):
    """Catches noise that two pixels or two images share, and modes that are dropped; to 4 standard errors."""
    sampler, schedule = COUNTED[name]
    n, g = 8000, torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(n, 2, generator=g, dtype=torch.float64)

    *_, last = sampler(MIXTURE, schedule, noise() * schedule.prior_std(sampler.path(schedule)[0]), noise)
    mean = WEIGHTS @ MEANS
    covariance = STDS.square().diag() + (WEIGHTS[:, None] * (MEANS - mean)).T @ (MEANS - mean)
    centred = last.x - mean
    assert (centred.mean(0).abs() < 4 * (covariance.diag() / n).sqrt()).all()
    products = centred[:, :, None] * centred[:, None]
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / n**0.5).all()
    assert (
        (nearest(last.x) - nearest(MIXTURE.sample(10**6, g))).abs() < 4 * (WEIGHTS * (1 - WEIGHTS) / n).sqrt()
    ).all()


def nearest(x):
    """How many of x are nearest to each mean, as shares."""
    index = torch.cdist(x, MEANS).argmin(1)
    return torch.bincount(index, minlength=3) / len(x)
