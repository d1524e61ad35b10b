"""Every step of the solvers against diffusers and k-diffusion: same start, same levels, same noise, same network.

diffusers keeps its levels, and in most schedulers its state, in float32: 1e-5, as it is shipped. Where its state can be
float64 the test lends it float64 levels as well, and the formulas agree to 1e-10. k-diffusion takes what it is given.

Where we hold to another formula than they do, a test says which, and shows that ours is the right one.
"""

import importlib.util
import sys
from itertools import cycle, pairwise
from math import inf, log, log2
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers.schedulers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
    scheduling_euler_ancestral_discrete,
)

from src.diffusion.continuous import Flow, Karras
from src.diffusion.densities import Uniform
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.objectives import Flow as FlowObjective
from src.diffusion.objectives import V
from src.diffusion.oracle import Mixture
from src.diffusion.samplers import DDIM
from src.diffusion.schedules import Cosine, Linear, Quadratic, ScaledLinear
from src.diffusion.solvers import DPMSolverPP, Heun, UniPC
from src.diffusion.weightings import Constant

SHAPE = (2, 3, 8, 8)
AS_SHIPPED = 1e-5
FORMULA = 1e-10
COUNTS = [10, 20, 50]  # diffusers treats fewer than 15 steps differently unless told not to


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_noise():
    raise AssertionError("a deterministic sampler drew noise")


def mixed(x):
    """Neighbours and channels of x."""
    return torch.nn.functional.conv2d(x, normal(3, 3, 3, 3, seed=1) / 5, padding=1)


def net(x, t):
    """Fixed and non-linear."""
    return 0.3 * x + 0.5 * torch.tanh(mixed(x) + t.double().view(-1, 1, 1, 1) / 500)


def worst(a, b):
    """The largest difference over all steps, as a share of states that are larger than 1."""
    return max(((x - y).abs() / y.abs().max().clamp(min=1)).max().item() for x, y in zip(a, b, strict=True))


def ours(sampler, schedule, objective, noise=no_noise):
    """The state after every step."""
    denoise = GaussianDiffusion(schedule, objective, Constant(), Uniform()).denoiser(net)
    return [step.x for step in sampler(denoise, schedule, normal(*SHAPE), noise)]


# diffusers -----------------------------------------------------------------------------------------------------------


def scheduler_of(cls, steps, **config):
    scheduler = cls(
        1000,
        1e-4,
        0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        **config,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def ladder(path):
    """sigma / alpha of a path, float64."""
    return torch.tensor([level.sigma / level.alpha if level.alpha else inf for level in path], dtype=torch.float64)


def theirs(scheduler, variance_noise=None):
    """The state after every step, of the schedulers whose state is variance preserving."""
    x, states = normal(*SHAPE), []
    for t in scheduler.timesteps:
        extra = {} if variance_noise is None else {"variance_noise": variance_noise()}
        x = scheduler.step(net(x, t.expand(len(x)).float()), t, x, **extra).prev_sample
        states.append(x)
    return states


def theirs_exploding(scheduler, path):
    """As `theirs`, of the schedulers whose state is x / alpha."""
    x, states = normal(*SHAPE) / path[0].alpha, []
    for t in scheduler.timesteps:
        F = net(scheduler.scale_model_input(x, t), t.expand(len(x)).float())
        x = scheduler.step(F, t, x).prev_sample
        states.append(x)
    if isinstance(scheduler, HeunDiscreteScheduler):
        states = [*states[1::2], states[-1]]  # without the halves of its steps
    return [x * level.alpha for x, level in zip(states, path[1:], strict=True)]


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize(("order", "solver_type"), [(1, "midpoint"), (2, "midpoint"), (2, "heun")])
@pytest.mark.parametrize(("algorithm", "eta"), [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
def test_dpm_solver_agrees_with_diffusers(steps, order, solver_type, algorithm, eta):
    """Catches a wrong weight of the previous x0, a wrong first or last step, and an SDE with another variance."""
    scheduler = scheduler_of(
        DPMSolverMultistepScheduler,
        steps,
        algorithm_type=algorithm,
        solver_order=order,
        solver_type=solver_type,
        lower_order_final=False,  # the last step, to sigma = 0, is of first order anyway
    )
    draws = normal(steps, *SHAPE, seed=2)
    sampler = DPMSolverPP(steps, "trailing", clip=False, order=order, solver_type=solver_type, eta=eta)
    states = ours(sampler, Linear(), V(), iter(draws).__next__ if eta else no_noise)
    assert worst(states, theirs(scheduler, iter(draws).__next__ if eta else None)) < AS_SHIPPED


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_agrees_with_diffusers(steps, order):
    """Catches a corrector that is left out, that counts its own step's x0 wrongly, or starts from the wrong state.

    With B(h) = e^h - 1, diffusers' default. For order 3 diffusers lowers the order of the last step but one, so that
    the last two states differ; the others are compared.
    """
    for lent, tolerance in ((False, AS_SHIPPED), (True, FORMULA)):
        scheduler = scheduler_of(UniPCMultistepScheduler, steps, solver_order=order, solver_type="bh2")
        sampler = UniPC(steps, "trailing", clip=False, order=order)
        if lent:
            scheduler.sigmas = ladder(sampler.path(Linear()))
        kept = steps - 2 if order == 3 else steps
        assert worst(ours(sampler, Linear(), V())[:kept], theirs(scheduler)[:kept]) < tolerance


@pytest.mark.parametrize("steps", COUNTS)
def test_heun_agrees_with_diffusers(steps):
    """Catches an average of slopes in another coordinate than sigma / alpha, and a last step that is not Euler's."""
    for lent, tolerance in ((False, AS_SHIPPED), (True, FORMULA)):
        scheduler = scheduler_of(HeunDiscreteScheduler, steps)
        sampler = Heun(steps, "trailing", clip=False)
        path = sampler.path(Linear())
        if lent:
            u = ladder(path)
            scheduler.sigmas = torch.cat([u[:1], u[1:-1].repeat_interleave(2), u[-1:]])
        assert worst(ours(sampler, Linear(), V()), theirs_exploding(scheduler, path)) < tolerance


@pytest.mark.parametrize("steps", COUNTS)
def test_euler_agrees_with_diffusers(monkeypatch, steps):
    """Catches a DDIM that is not Euler in sigma / alpha, and an eta = 1 that is not its ancestral form."""
    draws = normal(steps, *SHAPE, seed=2)
    noise = iter(draws)
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", lambda *_, **__: next(noise))
    for cls, eta in ((EulerDiscreteScheduler, 0.0), (EulerAncestralDiscreteScheduler, 1.0)):
        sampler = DDIM(steps, "trailing", clip=False, eta=eta)
        states = ours(sampler, Linear(), V(), iter(draws).__next__ if eta else no_noise)
        assert worst(states, theirs_exploding(scheduler_of(cls, steps), sampler.path(Linear()))) < AS_SHIPPED


@pytest.mark.parametrize("steps", [5, 10, 50])
def test_flow_euler_agrees_with_diffusers(steps):
    """Catches a velocity of the other sign, a time that runs backwards, and a network that is not told 1000 t."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    schedule, sampler = Flow(), DDIM(steps, "linspace", clip=False)
    path = sampler.path(schedule)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [level.sigma for level in path], rtol=0, atol=1e-7)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), [level.t for level in path[:-1]], rtol=0, atol=1e-4)
    assert worst(ours(sampler, schedule, FlowObjective()), theirs(scheduler)) < AS_SHIPPED


def test_shift_agrees_with_diffusers_where_it_is_applied_once():
    """Catches a shift to the other side, or applied to times that are shifted already.

    We hold to Eq. 23 of Esser et al. 2024, t = s t' / (1 + (s - 1) t'), of t' from 1 to t_min. diffusers does so for
    sigmas that are handed to it. Its own it spaces down to a sigma_min that was shifted before, and shifts them once
    more, so that its last step starts from t = 0.0089 instead of 0.0030.
    """
    steps, shift, t_min = 8, 3.0, 1e-3
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    times = [level.sigma for level in Flow(shift=shift, t_min=t_min).levels(steps, "linspace")]
    scheduler.set_timesteps(sigmas=np.linspace(1, t_min, steps))
    np.testing.assert_allclose(scheduler.sigmas.numpy(), times, rtol=0, atol=1e-7)
    scheduler.set_timesteps(steps)
    shifted = shift * t_min / (1 + (shift - 1) * t_min)
    assert times[-2] == pytest.approx(shifted, rel=1e-12)
    twice = shift * shifted / (1 + (shift - 1) * shifted)
    assert scheduler.sigmas[-2].item() == pytest.approx(twice, rel=1e-4)


# k-diffusion ---------------------------------------------------------------------------------------------------------


def samplers_of_k_diffusion():
    """Its module `sampling` alone: the package itself imports networks and scores that no sampler needs."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed: it is in requirements-peers.txt", allow_module_level=True)
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")


peer = samplers_of_k_diffusion()
PATHS = [(Karras(), "linspace"), (Linear(), "karras"), (Cosine(), "log_snr"), (Linear(), "trailing")]
IDS = [f"{type(schedule).__name__}-{spacing}" for schedule, spacing in PATHS]


def denoise(y, u):
    """x0 from y = x / alpha at u = sigma / alpha, (B,); as EDM's, and as non-linear."""
    u = u.view(-1, 1, 1, 1)
    return y / (1 + 4 * u**2) + u / (1 + 4 * u**2).sqrt() * torch.tanh(mixed(2 * y / (1 + 4 * u**2).sqrt()) + u.log())


def in_levels(x, level):
    return denoise(x / level.alpha, torch.full((len(x),), level.sigma / level.alpha, dtype=x.dtype))


def both(sampler, schedule, sample, noise=None, of="x", **settings):
    """The state (or with of="denoised" the x0) of every step, and the sample at last, ours and k-diffusion's."""
    path = sampler.path(schedule)
    draw = no_noise if noise is None else iter(noise).__next__
    steps = list(sampler(in_levels, schedule, normal(*SHAPE) * path[0].sigma, draw))
    seen = []
    last = sample(
        denoise,
        normal(*SHAPE) * path[0].sigma / path[0].alpha,
        ladder(path),
        callback=lambda step: seen.append(step[of]),
        disable=True,
        **settings,
    )
    if of == "denoised":
        return [*(step.x0 for step in steps), steps[-1].x], [*seen, last]
    return [step.x for step in steps], [x * s.alpha for x, s in zip([*seen[1:], last], path[1:], strict=True)]


@pytest.mark.parametrize(("schedule", "spacing"), PATHS, ids=IDS)
@pytest.mark.parametrize("steps", [1, 2, 18])
def test_euler_heun_and_2m_agree_with_k_diffusion(schedule, spacing, steps):
    """Catches any difference in a deterministic step, the first and the last included."""
    pairs = [
        (DDIM(steps, spacing, clip=False), peer.sample_euler),
        (Heun(steps, spacing, clip=False), peer.sample_heun),
    ]
    if steps > 1:
        pairs.append((DPMSolverPP(steps, spacing, clip=False), peer.sample_dpmpp_2m))
    for sampler, sample in pairs:
        mine, yours = both(sampler, schedule, sample)
        assert worst(mine, yours) < FORMULA, sampler


@pytest.mark.parametrize(("schedule", "spacing"), PATHS, ids=IDS)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_euler_agrees_with_k_diffusion(schedule, spacing, eta):
    """Catches sigma_up for sigma_down, and an eta that is squared."""
    noise = normal(18, *SHAPE, seed=2)
    given = iter(noise)
    sampler = DDIM(18, spacing, clip=False, eta=eta)
    mine, yours = both(
        sampler, schedule, peer.sample_euler_ancestral, noise, eta=eta, noise_sampler=lambda *_: next(given)
    )
    assert worst(mine, yours) < FORMULA


@pytest.mark.parametrize(("schedule", "spacing"), PATHS, ids=IDS)
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_2m_sde_agrees_with_k_diffusion(schedule, spacing, eta, solver_type):
    """Catches an exponent without its 1 + eta, in the weights, in the decay of x, or in the variance."""
    noise = normal(18, *SHAPE, seed=2)
    given = iter(noise)
    sampler = DPMSolverPP(18, spacing, clip=False, eta=eta, solver_type=solver_type)
    mine, yours = both(
        sampler,
        schedule,
        peer.sample_dpmpp_2m_sde,
        noise,
        eta=eta,
        solver_type=solver_type,
        noise_sampler=lambda *_: next(given),
    )
    assert worst(mine, yours) < FORMULA


@pytest.mark.parametrize(
    ("s_churn", "s_tmin", "s_tmax", "s_noise"),
    [(30.0, 0.01, 1.0, 1.007), (80.0, 0.05, 1.0, 1.007), (40.0, 0.05, 50.0, 1.003)],
)
@pytest.mark.parametrize("steps", [18, 256])
def test_churn_agrees_with_k_diffusion(monkeypatch, s_churn, s_tmin, s_tmax, s_noise, steps):
    """Catches a gamma that is not capped, a variance that is not sigma_hat^2 - sigma^2, or bounds on another sigma.

    With EDM's own settings (Table 5, Karras et al. 2022), which keep it below the noisiest level.
    """
    noise = normal(steps, *SHAPE, seed=2)
    above = int((ladder(Karras().levels(steps, "linspace")) > s_tmax).sum())  # they draw there, and drop it
    given = cycle([*noise[:above], *noise])
    monkeypatch.setattr(torch, "randn_like", lambda _: next(given))
    settings = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    sampler = Heun(steps, "linspace", clip=False, **settings)
    mine, yours = both(sampler, Karras(), peer.sample_heun, noise, of="denoised", **settings)
    assert worst(mine, yours) < FORMULA
    plain, _ = both(Heun(steps, "linspace", clip=False), Karras(), peer.sample_heun, of="denoised")
    assert worst(mine, plain) > 0.1


def test_churn_does_not_leave_the_schedule():
    """Catches a network that is asked of more noise than it was trained on.

    We hold to the levels of the path: EDM and k-diffusion, whose networks take any sigma, raise the first sigma to
    sqrt(2) sigma_max. A discrete schedule has no such level.
    """
    for schedule in (Karras(), Linear(), ScaledLinear(100), Quadratic(100), Cosine(zero_terminal_snr=True)):
        asked = []
        sampler = Heun(18, "trailing", clip=False, s_churn=1e3)
        path = sampler.path(schedule)

        def watched(x, level, asked=asked):
            asked.append(level)
            return 0 * x

        list(sampler(watched, schedule, normal(*SHAPE), lambda: normal(*SHAPE)))
        assert (ladder(asked) <= ladder(path)[0]).all()
        assert asked[0] == path[0]
        assert asked[2] != path[1]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_3m_agrees_with_k_diffusion_but_for_the_second_derivative(eta):
    """Catches a third-order step that is wrong elsewhere than in the term that the peers halve.

    With the quadratic p(v) = x0 + d1 v + d2 v^2 through three x0 its integral takes d2 times the second moment,
    m_2 = -2 phi_3. k-diffusion, diffusers and the solver's official code multiply the second divided difference d2,
    which is half of a second derivative, by -phi_3: half of it. One step from the same three x0 shows it.
    """
    path = DPMSolverPP(18, "karras").path(Linear())[4:8]
    lambdas = [(1 + eta) * log(level.alpha / level.sigma) for level in path]
    nodes, end = lambdas[:3], lambdas[3]
    weights = DPMSolverPP(order=3).weights(nodes, nodes[-1], end)
    h = end - nodes[-1]
    r0, r1 = (nodes[2] - nodes[1]) / h, (nodes[1] - nodes[0]) / h
    phi_2 = np.expm1(-h) / h + 1
    phi_3 = phi_2 / h - 0.5

    def peers(x0s, second):
        d1_0, d1_1 = (x0s[2] - x0s[1]) / r0, (x0s[1] - x0s[0]) / r1
        d1, d2 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1), (d1_0 - d1_1) / (r0 + r1)
        return -np.expm1(-h) * x0s[2] + phi_2 * d1 - second * phi_3 * d2

    for x0s in np.eye(3):
        assert np.dot(weights, x0s) == pytest.approx(peers(x0s, second=2), abs=1e-12)
        assert abs(np.dot(weights, x0s) - peers(x0s, second=1)) > 1e-3

    # and that it is k-diffusion's formula: its third step from ours, with the halved term
    sampler = DPMSolverPP(18, "karras", clip=False, order=3, eta=eta, solver_type="heun")
    noise = normal(18, *SHAPE, seed=2)
    given = iter(noise)
    path = sampler.path(Linear())
    mine, yours = both(
        sampler, Linear(), peer.sample_dpmpp_3m_sde, noise, eta=eta, noise_sampler=lambda *_: next(given)
    )
    assert worst(mine[:2], yours[:2]) < FORMULA
    start = normal(*SHAPE) * path[0].sigma
    x0s = [
        step.x0 for step, _ in zip(sampler(in_levels, Linear(), start, iter(noise).__next__), range(3), strict=False)
    ]
    lambdas = [(1 + eta) * log(level.alpha / level.sigma) for level in path[:4]]
    h = lambdas[3] - lambdas[2]
    r0, r1 = (lambdas[2] - lambdas[1]) / h, (lambdas[1] - lambdas[0]) / h
    phi_3 = ((np.expm1(-h) / h + 1) / h) - 0.5
    d2 = ((x0s[2] - x0s[1]) / r0 - (x0s[1] - x0s[0]) / r1) / (r0 + r1)
    torch.testing.assert_close(mine[2] + path[3].alpha * phi_3 * d2, yours[2], rtol=0, atol=FORMULA)


def exact(data, x, t, s):
    """The ODE keeps the quantiles of data in one dimension; by bisection."""

    def quantile(x, level):
        std = (level.alpha**2 * data.variance + level.sigma**2).sqrt()
        return (data.log_weights.exp() * torch.special.ndtr((x - level.alpha * data.means[:, 0]) / std)).sum(1)

    target, low, high = quantile(x, t), torch.full((len(x), 1), -20.0).double(), torch.full((len(x), 1), 20.0).double()
    for _ in range(80):
        middle = (low + high) / 2
        below = (quantile(middle, s) < target)[:, None]
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def test_ours_is_of_third_order_and_theirs_of_second():
    """Catches the same halving here: on a mixture of three Gaussians the slope would be 2."""
    data = Mixture(torch.tensor([[-0.7], [0.1], [0.6]]).double(), 0.25, torch.tensor([0.3, 0.5, 0.2]))
    counts = [65, 129, 257]
    errors = []
    for steps in counts:
        sampler = DPMSolverPP(steps, "log_snr", clip=False, order=3)
        path = sampler.path(Karras())
        start = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None] * path[0].sigma
        *_, before, _ = sampler(data, Karras(), start, no_noise)
        seen = []
        peer.sample_dpmpp_3m_sde(
            lambda x, sigma: data.denoise(x, torch.ones_like(sigma), sigma),
            start,
            ladder(path),
            callback=lambda step, seen=seen: seen.append(step["x"]),
            disable=True,
            eta=0.0,
            noise_sampler=no_noise,
        )
        truth = exact(data, start, path[0], path[-2])
        errors.append([(x - truth).abs().max().item() for x in (before.x, seen[-1])])
    for (ours_coarse, theirs_coarse), (ours_fine, theirs_fine) in pairwise(errors):
        assert log2(ours_coarse / ours_fine) == pytest.approx(3, abs=0.15)
        assert log2(theirs_coarse / theirs_fine) == pytest.approx(2, abs=0.15)
    assert errors[-1][0] < errors[-1][1] / 10


def test_a_solver_of_other_steps_is_another_solver():
    """Catches a comparison that would pass whatever the sampler did."""
    mine, yours = both(DPMSolverPP(18, "linspace", clip=False), Karras(), peer.sample_dpmpp_2m)
    other, _ = both(Heun(18, "linspace", clip=False), Karras(), peer.sample_dpmpp_2m)
    assert worst(mine, yours) < FORMULA
    assert worst(other, yours) > 1e-3
