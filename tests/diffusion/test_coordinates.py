"""A trajectory does not depend on the scale of a schedule: variance preserving, exploding, or the straight path.

The same levels u = sigma / alpha may be written with alpha^2 + sigma^2 = 1, with alpha = 1, or with alpha + sigma = 1.
Images then differ by a factor alone, and so must every state of every sampler: its formulas are right in all of them,
or in none. States are compared as x / (alpha + sigma), which is finite at both ends, to 1e-10.
"""

from dataclasses import replace
from itertools import pairwise
from math import sqrt

import pytest
import torch

from src.diffusion.continuous import VE, Flow, Karras
from src.diffusion.densities import Uniform
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.levels import CLEAN, Level, Schedule
from src.diffusion.objectives import X0, Edm, Eps, V
from src.diffusion.objectives import Flow as FlowObjective
from src.diffusion.samplers import DDIM, DDPM
from src.diffusion.schedules import Cosine, Linear
from src.diffusion.solvers import DPMSolverPP, Heun, Midpoint, UniPC
from src.diffusion.weightings import Constant

SCALES = {
    "preserving": lambda alpha, sigma: (alpha**2 + sigma**2) ** -0.5,
    "exploding": lambda alpha, sigma: 1 / alpha,
    "straight": lambda alpha, sigma: 1 / (alpha + sigma),
}
SCHEDULES = {
    "linear": Linear(),
    "cosine": Cosine(),
    "zero_terminal_snr": Linear(zero_terminal_snr=True),
    "karras": Karras(),
    "ve": VE(),
    "flow": Flow(shift=2.0),
}
DETERMINISTIC = {
    "ddim": DDIM(),
    "heun": Heun(),
    "midpoint": Midpoint(),
    "dpmpp_1": DPMSolverPP(order=1),
    "dpmpp_2m": DPMSolverPP(),
    "dpmpp_2m_heun": DPMSolverPP(solver_type="heun"),
    "dpmpp_3m": DPMSolverPP(order=3),
    "unipc_1": UniPC(order=1),
    "unipc_2": UniPC(),
    "unipc_3": UniPC(order=3),
}
STOCHASTIC = {
    "ddpm": DDPM(),
    "ddim_half": DDIM(eta=0.5),
    "ddim_full": DDIM(eta=1.0),
    "heun_churn": Heun(s_churn=5.0, s_tmin=0.01, s_noise=1.01),
    "dpmpp_2m_sde": DPMSolverPP(eta=1.0),
    "dpmpp_3m_sde": DPMSolverPP(order=3, eta=0.5),
}


class Rescaled(Schedule):
    """The levels of a schedule, told alike, in another scale."""

    def __init__(self, base, scale):
        self.base, self.scale, self.chain_length = base, SCALES[scale], base.chain_length

    def _scaled(self, level):
        factor = self.scale(level.alpha, level.sigma)
        return Level(level.t, level.alpha * factor, level.sigma * factor)

    def levels(self, steps, spacing):
        return [self._scaled(level) for level in self.base.levels(steps, spacing)]

    def level_at(self, log_snr):
        return self._scaled(self.base.level_at(log_snr))

    def table(self):
        alpha, sigma = self.base.table()
        factor = self.scale(alpha, sigma)
        return alpha * factor, sigma * factor

    def time(self, u):
        return self.base.time(u)

    def level(self, t):
        alpha, sigma = self.base.level(t)
        factor = self.scale(alpha, sigma)
        return alpha * factor, sigma * factor


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def denoise(x, level):
    """Not linear, and a function of what the scale leaves alone."""
    total = level.alpha + level.sigma
    return 1.5 * torch.tanh(0.9 * x / total + x.roll(1, -1) / total + level.sigma / total)


def total(level):
    return level.alpha + level.sigma


def trajectory(sampler, schedule, ask=denoise):
    """x / (alpha + sigma) after every step."""
    path = sampler.path(schedule)
    noise = iter(normal(len(path), 4, 1, 2, 3, seed=1))
    steps = sampler(ask, schedule, normal(4, 1, 2, 3) * path[0].sigma, lambda: next(noise))
    return [step.x / total(s) for step, s in zip(steps, path[1:], strict=True)]


def assert_same(sampler, base, ask=lambda schedule: denoise):
    expected = trajectory(sampler, base, ask(base))
    for scale in SCALES:
        if scale == "exploding" and sampler.path(base)[0].alpha == 0:
            continue  # no signal at all has no u
        schedule = Rescaled(base, scale)
        for a, b in zip(trajectory(sampler, schedule, ask(schedule)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_deterministic_trajectories_are_the_same_in_every_scale(sampler, schedule):
    """Catches an alpha that is taken for 1, a sigma taken for u, and a step to or from alpha = 0 of another rule."""
    for spacing in ("trailing", "log_snr", "karras"):
        for clip in (False, True, "dynamic"):
            sampler_ = replace(DETERMINISTIC[sampler], steps=11, spacing=spacing, clip=clip)
            assert_same(sampler_, SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_stochastic_trajectories_are_the_same_in_every_scale(sampler, schedule):
    """Catches noise whose size does not scale with the image: tau, the SDE's, and churn's."""
    for spacing in ("trailing", "log_snr", "karras"):
        assert_same(replace(STOCHASTIC[sampler], steps=11, spacing=spacing, clip=False), SCHEDULES[schedule])


def test_the_larger_variance_of_ddpm_belongs_to_its_schedule():
    """Catches a beta that is meant to be the same in every scale: beta_t is what a step adds to x, not to x / alpha.

    From u_t to u_s it is alpha_t^2 (u_t^2 - u_s^2), at s by the factor alpha_t / alpha_s less than where alpha = 1.
    """
    sampler, base = DDPM(11, variance="beta", clip=False), Linear()
    exploding = Rescaled(base, "exploding")
    for (t, s), (t_ve, s_ve) in zip(
        pairwise(sampler.path(base)[:-1]), pairwise(sampler.path(exploding)[:-1]), strict=True
    ):
        std, std_ve = sampler.stds(t, s)[1] / s.alpha, sampler.stds(t_ve, s_ve)[1]
        assert std_ve == pytest.approx(sqrt(t_ve.sigma**2 - s_ve.sigma**2), rel=1e-12)
        assert std == pytest.approx(std_ve * t.alpha / s.alpha, rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "karras", "flow"])
@pytest.mark.parametrize("objective", [Eps(), X0(), V(), FlowObjective(), Edm(), Edm(sigma_data=1.3)], ids=str)
def test_one_network_is_one_model_in_every_scale(objective, schedule):
    """Catches an input scale that leaves some of the schedule's scale in what the network sees, or in its answer."""
    base = SCHEDULES[schedule]
    if schedule == "flow" and isinstance(objective, Eps):
        base = Linear(1000, 1e-4, 0.01)  # noise tells nothing where there is no signal

    def net(x, t):
        return torch.tanh(x + x.roll(1, -1) + t.double().view(-1, 1, 1, 1) / 1000)

    def ask(schedule):
        return GaussianDiffusion(schedule, objective, Constant(), Uniform()).denoiser(net)

    for sampler in (DDIM(11), Heun(11), DPMSolverPP(11, "log_snr"), UniPC(11, "log_snr"), Midpoint(11)):
        assert_same(sampler, base, ask)


def test_every_path_ends_at_the_same_clean_image():
    """Catches a comparison above that leaves out the end."""
    for base in SCHEDULES.values():
        for scale in SCALES:
            if scale != "exploding":
                assert Rescaled(base, scale).levels(5, "trailing")[-1] == CLEAN
