"""Samplers against Bayes' rule, and against Gaussian data whose denoiser and ODE are known in closed form."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from src.diffusion.levels import CLEAN
from src.diffusion.samplers import DDIM, DDPM, beta, generate, tau, toward
from src.diffusion.schedules import Cosine, Linear

MEAN, STD = 0.2, 0.5  # of the Gaussian data


def gaussian_denoiser(x, level):
    """E[x0 | x_t] for x0 ~ N(MEAN, STD^2)."""
    gain = level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2)
    return MEAN + gain * (x - level.alpha * MEAN)


def gaussian_ode(x, level):
    """Where the probability flow ODE takes x, at this level, at time 0: it keeps the quantile."""
    return MEAN + STD * (x - level.alpha * MEAN) / math.sqrt(level.alpha**2 * STD**2 + level.sigma**2)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_noise():
    raise AssertionError("a deterministic sampler drew noise")


@pytest.mark.parametrize("make", [Linear, Cosine])
@pytest.mark.parametrize(("steps", "spacing"), [(1000, "trailing"), (50, "trailing"), (7, "quadratic")])
def test_a_ddpm_step_is_bayes_rule(make, steps, spacing):
    """Catches any error in tau or in the mean, between neighbours and between levels far apart.

    q(x_s | x_t, x0) is the product of N(x_s; alpha_s x0, sigma_s^2) and N(x_t; r x_s, b): its precision is the sum of
    theirs, its mean weighted by precision.
    """
    schedule = make(1000)
    betas = schedule.betas.numpy()
    x_t, x0 = normal(2, 64)
    for t, s in pairwise(schedule.levels(steps, spacing)[:-1]):
        low, high = int(s.t) + 1, int(t.t) + 1
        r2 = np.prod(1 - betas[low:high])  # alpha_t^2 / alpha_s^2
        b = 1 - r2
        abar_s = np.prod(1 - betas[:low])
        variance = 1 / (1 / (1 - abar_s) + r2 / b)
        mean = variance * (math.sqrt(abar_s) * x0 / (1 - abar_s) + math.sqrt(r2) * x_t / b)
        assert abs(tau(t, s) ** 2 - variance) < 1e-12
        assert abs(beta(t, s) - b) < 1e-12
        torch.testing.assert_close(toward(x_t, x0, t, s, tau(t, s)), mean, rtol=0, atol=1e-12)


def test_the_posterior_variance_is_tilde_beta():
    """Catches beta for tilde beta, and abar_t for abar_{t-1} (Eq. 7, Ho et al. 2020), to nine digits."""
    schedule = Linear(1000)
    abar = schedule.alphas_cumprod
    tilde = ((1 - abar[:-1]) / (1 - abar[1:]) * schedule.betas[1:]).flip(0).tolist()
    levels = schedule.levels(1000, "leading")
    for (t, s), expected in zip(pairwise(levels[:-1]), tilde, strict=True):
        assert tau(t, s) ** 2 == pytest.approx(expected, rel=1e-9)
        assert tau(t, s, eta=0.3) == pytest.approx(0.3 * tau(t, s), rel=1e-15)
    assert tau(levels[-2], CLEAN) == 0


def test_variance_beta_keeps_the_mean_and_adds_sqrt_beta():
    """Catches a mean that changes with the variance, and beta for its root ("fixedlarge")."""
    schedule = Linear(1000)
    x0, z = normal(2, 4)
    small, large = (
        list(DDPM(variance=v, clip=False)(lambda x, level: x0, schedule, x0.clone(), lambda: z))
        for v in ("posterior", "beta")
    )
    levels = schedule.levels(1000, "trailing")
    for k, (t, s) in enumerate(pairwise(levels[:-1])):
        for steps, std in ((small, tau(t, s)), (large, math.sqrt(schedule.betas[int(t.t)].item()))):
            before = steps[k - 1].x if k else x0
            expected = toward(before, x0, t, s, tau(t, s)) + std * z
            torch.testing.assert_close(steps[k].x, expected, rtol=0, atol=1e-12)
    assert (small[500].x - large[500].x).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", [DDPM(steps=5), DDPM(steps=5, variance="beta"), DDIM(steps=5, eta=0.5)])
def test_the_last_step_adds_no_noise(sampler):
    """Catches a sample that is not the last x0, and noise that is drawn for a step that needs none."""
    drawn = []

    def noise():
        drawn.append(normal(2, 3, seed=len(drawn)))
        return drawn[-1]

    steps = list(sampler(gaussian_denoiser, Linear(1000), normal(2, 3), noise))
    assert len(drawn) == 4
    assert torch.equal(steps[-1].x, steps[-1].x0)


def test_ddim_with_eta_0_draws_no_noise():
    """Catches noise that is drawn and multiplied by zero."""
    list(DDIM(steps=20, eta=0.0)(gaussian_denoiser, Linear(1000), normal(2, 3), no_noise))


@pytest.mark.parametrize(("steps", "spacing"), [(1000, "trailing"), (37, "linspace")])
def test_ddim_with_eta_1_is_ddpm(steps, spacing):
    """Catches an eta that is squared, or a noise that the two take in another order."""

    def run(sampler):
        g = torch.Generator().manual_seed(1)
        x = torch.randn(4, 8, generator=g)
        return [step.x for step in sampler(gaussian_denoiser, Linear(1000), x, lambda: torch.randn(4, 8, generator=g))]

    runs = run(DDPM(steps=steps, spacing=spacing)), run(DDIM(steps=steps, spacing=spacing, eta=1.0))
    assert len(runs[0]) == len(runs[1]) == steps
    for ddpm, ddim in zip(*runs, strict=True):
        torch.testing.assert_close(ddpm, ddim, rtol=0, atol=1e-6)


def test_clipping_derives_eps_from_the_clipped_x0():
    """Catches clipping x0 alone: x0 and eps then contradict each other, and x_s lies on no path through x_t."""
    schedule = Linear(1000)
    start, answer = normal(16), 3 * normal(16, seed=1)
    steps = list(DDIM(steps=10, clip=True)(lambda x, level: answer, schedule, start, no_noise))
    x, clipped = start, answer.clamp(-1, 1)
    for step, (t, s) in zip(steps, pairwise(schedule.levels(10, "trailing")), strict=True):
        eps = (x - t.alpha * clipped) / t.sigma
        torch.testing.assert_close(step.x, s.alpha * clipped + s.sigma * eps, rtol=0, atol=1e-12)
        assert torch.equal(step.x0, clipped)
        stale = s.alpha * clipped + s.sigma * (x - t.alpha * answer) / t.sigma
        assert s is CLEAN or (step.x - stale).abs().max() > 1e-2
        x = step.x
    free = list(DDIM(steps=10, clip=False)(lambda x, level: answer, schedule, start, no_noise))
    assert torch.equal(free[-1].x, answer)


@pytest.mark.parametrize("sampler", [DDPM(steps=12, spacing="linspace"), DDIM(steps=12, spacing="quadratic", eta=0.7)])
def test_every_step_is_yielded_in_order_and_stays_as_it_was(sampler):
    """Catches steps left out, a level that is the next one's, and states that later steps overwrite in place."""
    schedule = Cosine(1000)
    start = normal(2, 3)
    kept, copies = [], []
    for step in sampler(gaussian_denoiser, schedule, start, lambda: normal(2, 3, seed=5)):
        kept.append(step)
        copies.append((step.x.clone(), step.x0.clone()))
    assert [step.index for step in kept] == list(range(1, 13))
    assert [step.level for step in kept] == sampler.path(schedule)[:-1]
    assert all(a.level.t > b.level.t and a.level.sigma > b.level.sigma for a, b in pairwise(kept))
    x = start
    for step, (x_copy, x0_copy) in zip(kept, copies, strict=True):
        assert torch.equal(step.x, x_copy)
        assert torch.equal(step.x0, x0_copy)
        assert torch.equal(step.x0, gaussian_denoiser(x, step.level).clamp(-1, 1))
        x = step.x
    assert torch.equal(start, normal(2, 3))


def test_the_default_number_of_steps():
    """Catches a default that a short schedule cannot serve."""
    assert len(DDPM().path(Linear(1000))) == 1001
    assert len(DDIM().path(Linear(1000))) == 51
    assert len(DDIM().path(Linear(20))) == 21
    with pytest.raises(ValueError, match=r"steps=21.*num_timesteps=20"):
        DDIM(steps=21).path(Linear(20))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDPM(variance="small"), "variance='small'.*posterior.*beta.*learned"),
        (lambda: DDIM(eta=-0.1), "eta=-0.1"),
        (lambda: DDIM(eta=1.5), "eta=1.5"),
        (lambda: DDIM(eta=math.nan), "eta=nan"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(make, message):
    """Catches a typing error in a YAML that would sample with something else."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("variance", "bias"), [("posterior", -0.0078), ("beta", 0.0015)])
def test_ddpm_samples_gaussian_data(variance, bias):
    """Catches samples of another mean or spread than Algorithm 2's, to 5 standard errors.

    The chain is linear, so its exact mean and variance are computed alongside, from Eq. 7 of Ho et al. 2020. tilde beta
    takes x0 as known and loses 0.8 % of the data's spread in 1000 steps; beta gains 0.2 %.
    """
    schedule = Linear(1000)
    mean, var = 0.0, 1.0
    abar, betas = schedule.alphas_cumprod.tolist(), schedule.betas.tolist()
    for t in reversed(range(1000)):
        before = abar[t - 1] if t else 1.0
        of_x0 = math.sqrt(before) * betas[t] / (1 - abar[t])
        of_x_t = math.sqrt(1 - betas[t]) * (1 - before) / (1 - abar[t])
        gain = math.sqrt(abar[t]) * STD**2 / (abar[t] * STD**2 + 1 - abar[t])
        mean = of_x_t * mean + of_x0 * (MEAN + gain * (mean - math.sqrt(abar[t]) * MEAN))
        noise = 0.0 if t == 0 else betas[t] if variance == "beta" else betas[t] * (1 - before) / (1 - abar[t])
        var = (of_x_t + of_x0 * gain) ** 2 * var + noise
    assert mean == pytest.approx(MEAN, abs=1e-5)
    assert math.sqrt(var) == pytest.approx(STD * (1 + bias), abs=1e-4)

    g = torch.Generator().manual_seed(0)
    n = 60000
    x = torch.randn(n, generator=g)
    sampler = DDPM(variance=variance, clip=False)
    *_, last = sampler(gaussian_denoiser, schedule, x, lambda: torch.randn(n, generator=g))
    assert last.x.mean().item() == pytest.approx(mean, abs=5 * STD / math.sqrt(n))
    assert last.x.std().item() == pytest.approx(math.sqrt(var), abs=5 * STD / math.sqrt(2 * n))


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "quadratic"])
def test_ddim_is_a_first_order_solver_of_the_ode(spacing):
    """Catches a step that is consistent with another ODE (no convergence), or inconsistent in one place (slope 0)."""
    schedule = Linear(1000)
    x = normal(1000)
    steps = [50, 100, 200, 400]
    errors = []
    for n in [*steps, 1000]:
        sampler = DDIM(steps=n, spacing=spacing, clip=False)
        *_, last = sampler(gaussian_denoiser, schedule, x, no_noise)
        errors.append((last.x - gaussian_ode(x, sampler.path(schedule)[0])).abs().max().item())
    slope = -np.polyfit(np.log(steps), np.log(errors[:4]), 1)[0]
    assert 0.8 < slope < 1.3
    assert errors[-1] < 0.01


def test_a_sample_depends_on_its_seed_and_index_alone():
    """Catches noise that is shared by a batch, or drawn in the order of the batch."""

    def sample(indices, seed=3):
        sampler = DDPM(steps=9)
        *_, last = generate(gaussian_denoiser, sampler, Linear(1000), (2, 3, 5), seed, indices)
        return last.x

    together = sample(range(6))
    assert together.shape == (6, 2, 3, 5)
    for i in range(6):
        assert torch.equal(sample(range(i, i + 1))[0], together[i])
    assert torch.equal(sample(range(4, 1, -1)), together[[4, 3, 2]])
    assert not torch.equal(sample(range(6), seed=4), together)
    assert len(together.flatten(1).unique(dim=0)) == 6
