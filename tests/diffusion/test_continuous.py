"""Schedules in continuous time, the paths of all schedules, and samplers at the edges: one step, or few."""

import shutil
from dataclasses import replace
from itertools import pairwise
from math import log, sqrt

import numpy as np
import pytest
import torch

from src.diffusion.continuous import VE, Flow, Karras
from src.diffusion.guidance import Guess
from src.diffusion.levels import BELOW_ONE, CLEAN, LEAST_ALPHA, Level
from src.diffusion.samplers import DDIM, DDPM, generate
from src.diffusion.schedules import Cosine, DiscreteSchedule, Laplace, Linear, Quadratic, ScaledLinear, Sigmoid
from src.diffusion.solvers import DPMSolverPP, Heun, Midpoint, UniPC

CONTINUOUS = {
    "karras": Karras(),
    "karras_rho_3": Karras(0.01, 50.0, 3.0),
    "ve": VE(),
    "flow": Flow(),
    "flow_shift_3": Flow(shift=3.0),
    "flow_shift_0.3": Flow(shift=0.3, t_min=1e-4),
}
DISCRETE = {
    **{cls.__name__: cls() for cls in (Linear, ScaledLinear, Quadratic, Cosine, Sigmoid, Laplace)},
    **{f"{cls.__name__}_zero": cls(zero_terminal_snr=True) for cls in (Linear, Quadratic, Cosine, Sigmoid, Laplace)},
    "Linear_4000": Linear(4000, 2.5e-5, 0.005),
}
ALL = {**CONTINUOUS, **DISCRETE}
SPACINGS = ["leading", "linspace", "trailing", "quadratic", "log_snr", "karras"]


def u_of(level):
    return level.sigma / level.alpha if level.alpha > 0 else float("inf")


def shares(n=1001):
    return torch.linspace(0, 1, n, dtype=torch.float64)


# Times, levels and what the network is told --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTINUOUS)
def test_what_the_network_is_told_tells_the_level(name):
    """Catches a condition that is not the inverse of `told`: likelihoods and the oracle ask for the level by it."""
    schedule = CONTINUOUS[name]
    t = schedule.time(shares())
    alpha, sigma = schedule.level(t)
    told_alpha, told_sigma = schedule.told(schedule.condition(t))
    torch.testing.assert_close(told_alpha, alpha, rtol=0, atol=1e-12)
    torch.testing.assert_close(told_sigma, sigma, rtol=1e-12, atol=0)
    told_alpha, told_sigma = schedule.told(schedule.condition(t.float()))
    torch.testing.assert_close(told_sigma, sigma, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_share_is_the_inverse_of_time(name):
    """Catches a density over ln SNR, such as EDM's, that draws other levels than it says."""
    schedule = CONTINUOUS[name]
    u = shares()[1:-1]
    alpha, sigma = schedule.level(schedule.time(u))
    torch.testing.assert_close(schedule.share((alpha / sigma).log()), u, rtol=0, atol=1e-9)
    far = torch.tensor([1e3, -1e3, 1e1, -1e1], dtype=torch.float64)
    ends = schedule.share(far)
    assert ends[0] == 0
    assert BELOW_ONE - 1e-6 < ends[1] <= BELOW_ONE
    assert ((ends >= 0) & (ends < 1)).all()
    assert schedule.share(far.float()).dtype == torch.float32


@pytest.mark.parametrize("name", CONTINUOUS)
def test_slope_is_the_derivative_of_ln_snr(name):
    """Catches a loss over ln SNR whose change of variables is wrong: against central differences over the share."""
    schedule = CONTINUOUS[name]
    u, d = shares()[1:-1], 1e-6

    def log_snr(u):
        alpha, sigma = schedule.level(schedule.time(u))
        return 2 * (alpha.log() - sigma.log())

    numeric = (log_snr(u - d) - log_snr(u + d)) / (2 * d)
    torch.testing.assert_close(schedule.slope(schedule.time(u)), numeric, rtol=1e-5, atol=0)


def test_times_are_the_papers():
    """Eq. 5 of Karras et al. 2022 backwards, Sec. 3.4 of Song et al. 2021, and Eq. 23 of Esser et al. 2024."""
    u = shares(11)
    karras = (0.002 ** (1 / 7) + u * (80.0 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    torch.testing.assert_close(Karras().time(u), karras, rtol=1e-13, atol=0)
    torch.testing.assert_close(VE().time(u), 0.02 * 5000**u, rtol=1e-13, atol=0)
    t = 1e-3 + (1 - 1e-3) * u
    torch.testing.assert_close(Flow().time(u), t, rtol=1e-13, atol=0)
    torch.testing.assert_close(Flow(shift=3.0).time(u), 3 * t / (1 + 2 * t), rtol=1e-13, atol=0)
    assert Karras().condition(torch.tensor([1.0, 80.0]).double()).tolist() == [0.0, log(80) / 4]
    assert Flow().condition(torch.tensor([0.25]).double()).tolist() == [250.0]


def test_shift_keeps_what_is_seen_of_more_pixels():
    """Catches a shift by m where sqrt(m) is meant: u = sigma / alpha grows by the shift at every time."""
    plain, shifted = (Flow(shift=s).level(Flow(shift=s).time(shares()[:-1])) for s in (1.0, 3.0))
    torch.testing.assert_close(shifted[1] / shifted[0], 3 * plain[1] / plain[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [0.01, 0.1, 0.3, 0.37, 1.0, 1.15, 3.0, 3.1, sqrt(3), 7.94, 12.0])
def test_the_straight_path_begins_with_pure_noise_whatever_the_shift(shift):
    """Catches an alpha of 2e-16 or below 0 at t = 1, at which solvers in lambda start from -36, or fail."""
    schedule = Flow(shift=shift)
    for spacing in ("linspace", "trailing", "quadratic", "log_snr", "karras"):
        path = schedule.levels(10, spacing)
        assert path[0] == Level(1000.0, 0.0, 1.0)
        assert path[1].alpha > 1e-3
    t = schedule.time(torch.tensor([0.0, BELOW_ONE, 1.0]))
    assert t.dtype == torch.float32
    assert t[-1] == 1
    assert t[0].item() == pytest.approx(schedule.levels(3, "linspace")[2].sigma, rel=1e-6)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_level_at_and_levels_agree_with_level(name):
    """Catches a path whose levels are not the schedule's, or that tells the network another time."""
    schedule = CONTINUOUS[name]
    for spacing in SPACINGS:
        for level in schedule.levels(18, spacing)[:-1]:
            alpha, sigma = (float(v) for v in schedule.told(torch.tensor([level.t], dtype=torch.float64)))
            assert level.alpha == pytest.approx(alpha, abs=1e-12)
            assert level.sigma == pytest.approx(sigma, rel=1e-12)
            if level.alpha > 0:
                again = schedule.level_at(log(level.alpha / level.sigma))
                assert again == pytest.approx(level, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_table_runs_from_the_cleanest_to_the_noisiest(name):
    """Catches a table that is reversed, or misses an end, by which a model's objective is checked."""
    schedule = CONTINUOUS[name]
    alpha, sigma = schedule.table()
    assert len(alpha) == len(sigma) == schedule.chain_length == 1000
    assert alpha.dtype == sigma.dtype == torch.float64
    assert (sigma[1:] > sigma[:-1]).all()
    first, *_, last, _ = schedule.levels(1000, "linspace")
    assert (alpha[-1].item(), sigma[-1].item()) == pytest.approx((first.alpha, first.sigma), rel=1e-14)
    assert (alpha[0].item(), sigma[0].item()) == pytest.approx((last.alpha, last.sigma), rel=1e-14)
    assert schedule.cleanest_share == pytest.approx(last.sigma / (last.alpha + last.sigma), rel=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Karras(sigma_min=0.0), "sigma_min=0.0"),
        (lambda: Karras(sigma_min=2.0, sigma_max=1.0), "sigma_min=2.0, sigma_max=1.0"),
        (lambda: Karras(rho=0.0), "rho=0.0 must be positive"),
        (lambda: VE(sigma_max=0.01), "sigma_max=0.01"),
        (lambda: Flow(shift=0.0), "shift=0.0 must be positive"),
        (lambda: Flow(t_min=0.0), "t_min=0.0"),
        (lambda: Flow(t_min=1.0), "t_min=1.0"),
        (lambda: Karras().levels(0, "linspace"), "steps=0 must be at least 1"),
        (lambda: Flow().levels(3, "cosine"), "spacing='cosine' is not one of leading"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Paths ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 18, 40, 256])
def test_karras_with_linspace_are_the_levels_of_edm(steps):
    """Eq. 5 of Karras et al. 2022, sigma_i from i = 0 to N - 1 and sigma_N = 0; to 1e-12."""
    i = np.arange(steps)
    ends = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
    expected = (ends[0] + i / max(1, steps - 1) * (ends[1] - ends[0])) ** 7
    path = Karras().levels(steps, "linspace")
    np.testing.assert_allclose([level.sigma for level in path[:-1]], expected, rtol=1e-12, atol=0)
    assert all(level.alpha == 1 for level in path)
    assert path[-1] == CLEAN
    np.testing.assert_allclose([level.t for level in path[:-1]], np.log(expected) / 4, rtol=0, atol=1e-12)
    if steps > 1:  # that spacing is Eq. 5 itself, between the ends of any schedule
        for schedule in (Karras(), VE(0.002, 80.0), VE(0.02, 100.0), Linear()):
            by_spacing = [u_of(level) for level in schedule.levels(steps, "karras")[:-1]]
            top, bottom = (u ** (1 / 7) for u in (by_spacing[0], by_spacing[-1]))
            np.testing.assert_allclose(by_spacing, (top + i / (steps - 1) * (bottom - top)) ** 7, rtol=1e-11)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 18, 1000])
def test_every_path_falls_from_the_noisiest_level_to_the_clean_image(name, spacing, steps):
    """Catches levels that repeat, rise, leave the schedule or miss its ends, with and without signal at the start."""
    schedule = ALL[name]
    path = schedule.levels(steps, spacing)
    assert len(path) == steps + 1
    assert path[-1] == CLEAN
    us = [u_of(level) for level in path]
    assert all(a > b for a, b in pairwise(us))
    ts = [level.t for level in path[:-1]]
    assert all(a > b for a, b in pairwise(ts))
    alpha, sigma = schedule.table()
    assert us[0] <= (sigma[-1] / alpha[-1]).item() * (1 + 1e-12)
    assert us[-2] >= (sigma[0] / alpha[0]).item() * (1 - 1e-12)
    noisiest = alpha[-1].item(), sigma[-1].item()
    if spacing in ("log_snr", "karras") and 0 < noisiest[0] < LEAST_ALPHA:
        noisiest = LEAST_ALPHA, sqrt(1 - LEAST_ALPHA**2)
    if spacing != "leading":
        assert (path[0].alpha, path[0].sigma) == pytest.approx(noisiest, rel=1e-13)
    if spacing in ("linspace", "log_snr", "karras") and (steps > 2 or (steps == 2 and path[0].alpha > 0)):
        assert (path[-2].alpha, path[-2].sigma) == pytest.approx((alpha[0].item(), sigma[0].item()), rel=1e-14)
    for level in path:
        assert all(type(v) is float for v in level)
        if name in DISCRETE:
            assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_log_snr_is_even(name):
    """Catches a path that is even in another clock, or that counts a start without signal."""
    path = [level for level in ALL[name].levels(19, "log_snr")[:-1] if level.alpha > 0]
    assert len(path) in (18, 19)
    steps = np.diff([log(level.alpha / level.sigma) for level in path])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)


def test_spacings_in_time_are_their_formulas():
    """Catches a continuous path that is spaced by another rule than the discrete one of the same name."""
    schedule, i = Flow(t_min=1e-12), np.arange(5)[::-1]
    for spacing, u in {
        "leading": i / 5,
        "linspace": i / 4,
        "trailing": (i + 1) / 5,
        "quadratic": (i / 4) ** 2,
    }.items():
        times = [level.sigma for level in schedule.levels(5, spacing)[:-1]]
        np.testing.assert_allclose(times, u, rtol=0, atol=2e-12)


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
def test_no_step_is_spent_where_nothing_of_the_image_is_left(spacing):
    """Catches half of EDM's 18 steps between sigma / alpha = 20,000, where cosine ends, and 80."""
    for schedule in (Cosine(), Linear(beta_end=0.04), Linear(beta_end=0.2)):
        path = schedule.levels(10, spacing)
        assert path[0].alpha == pytest.approx(LEAST_ALPHA, rel=1e-9)
        assert path[0].alpha ** 2 + path[0].sigma ** 2 == pytest.approx(1, rel=1e-12)
        assert path[0].t < schedule.num_timesteps - 1
        assert path[-2] == schedule.levels(10, "linspace")[-2]
    assert Linear().levels(10, spacing)[0].t == 999  # alpha = 0.0064
    assert VE(sigma_max=1000.0).levels(10, spacing)[0].sigma == pytest.approx(1000, rel=1e-12)


def test_the_spacing_karras_has_the_rho_of_the_schedule():
    schedule = Karras(rho=3.0)
    found, expected = ([level.sigma for level in schedule.levels(9, s)] for s in ("karras", "linspace"))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_the_start_has_the_spread_of_the_noise_at_its_level(name):
    """Catches images of EDM that start from unit noise at sigma = 80."""
    schedule = ALL[name]
    for spacing in ("trailing", "leading"):
        first = schedule.levels(10, spacing)[0]
        preserving = isinstance(schedule, DiscreteSchedule)
        assert schedule.prior_std(first) == (1 if preserving else first.sigma)
    asked = []

    def denoise(x, level):
        asked.append((x.clone(), level))
        return 0 * x

    list(generate(denoise, DDIM(3), schedule, (1, 4, 4), 5, range(64)))
    x, level = asked[0]
    assert x.std().item() == pytest.approx(schedule.prior_std(level), rel=0.1)


# Samplers at the edges -----------------------------------------------------------------------------------------------

EDGES = {
    "ddpm": (DDPM(), 1),
    "ddim": (DDIM(eta=0.5), 1),
    "heun": (Heun(), 1),
    "heun_churn": (Heun(s_churn=30.0), 1),
    "midpoint": (Midpoint(), 1),
    "dpmpp_1": (DPMSolverPP(order=1), 1),
    "dpmpp_2m": (DPMSolverPP(), 2),
    "dpmpp_3m": (DPMSolverPP(order=3), 3),
    "dpmpp_3m_sde": (DPMSolverPP(order=3, eta=1.0), 3),
    "unipc_1": (UniPC(order=1), 1),
    "unipc_3": (UniPC(order=3), 3),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sampler", EDGES)
def test_few_steps_are_no_edge(sampler, name):
    """Catches divisions by zero and indices out of range; every walk but the midpoint rule's ends at the last x0."""
    sampler, order = EDGES[sampler]
    schedule = ALL[name]
    for spacing in ("linspace", "trailing", "log_snr", "karras"):
        for steps in sorted({order, order + 1, 18}):
            walk = replace(sampler, steps=steps, spacing=spacing, clip=False)
            path = walk.path(schedule)
            start = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            noise = torch.Generator().manual_seed(1)
            done = list(
                walk(
                    lambda x, level: torch.tanh(x / (level.alpha + level.sigma)),
                    schedule,
                    start * schedule.prior_std(path[0]),
                    lambda noise=noise: torch.randn(2, 1, 2, 2, generator=noise, dtype=torch.float64),
                )
            )
            assert [step.index for step in done] == list(range(1, steps + 1))
            assert all(torch.isfinite(step.x).all() for step in done)
            if not isinstance(walk, Midpoint):
                torch.testing.assert_close(done[-1].x, done[-1].x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "sampler", [DDPM(), DDIM(eta=0.7), Heun(), Midpoint(), DPMSolverPP(), DPMSolverPP(eta=1.0), UniPC()]
)
def test_skipping_the_noisy_end_leaves_the_others_alone(sampler):
    """Catches a skip that changes the levels, as edits need: they start from an image in the middle of a path."""
    for schedule in (Linear(), Karras(), Flow()):
        walk = replace(sampler, steps=12, clip=False, spacing="linspace")
        path = walk.path(schedule)
        start = torch.full((2, 1, 2, 2), 0.3, dtype=torch.float64)
        asked = []

        def denoise(x, level, asked=asked):
            asked.append(level)
            return 0.5 * x

        steps = list(walk(denoise, schedule, start, lambda: torch.ones(2, 1, 2, 2, dtype=torch.float64), skip=4))
        assert [step.index for step in steps] == list(range(1, 9))
        assert asked[0] == path[4]
        assert [step.level for step in steps] == path[4:-1]


def dynamic(x0, percentile):
    """Sec. 2.3 of Saharia et al. 2022, image by image."""
    images = []
    for image in x0:
        ordered = sorted(abs(v) for v in image.flatten().tolist())
        s = max(1.0, ordered[max(1, round(percentile * len(ordered))) - 1])
        images.append(image.clamp(-s, s) / s)
    return torch.stack(images)


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0, 1e-6])
def test_dynamic_clipping(percentile):
    """Catches a threshold below 1, of the whole batch, or of signed values; and an x0 that is not divided by it."""
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(5, 3, 7, 5, generator=g, dtype=torch.float64) * torch.tensor([0.1, 0.9, 2, 5, 30]).view(
        -1, 1, 1, 1
    )
    x0[4] -= 40
    kept = x0.clone()
    sampler = DDIM(5, clip="dynamic", percentile=percentile)
    level = Linear().levels(5, "trailing")[0]
    answer = sampler.ask(lambda x, level: x0, x0, level).x0
    torch.testing.assert_close(answer, dynamic(x0, percentile), rtol=0, atol=1e-12)
    assert answer.abs().max() <= 1
    assert torch.equal(x0, kept)
    pair = sampler.ask(lambda x, level: Guess(x0.clone(), eps_from=2 * x0), x0, level)
    torch.testing.assert_close(pair.eps_from, dynamic(2 * x0, percentile), rtol=0, atol=1e-12)
    if percentile == 1e-6:  # no more than plain clipping
        assert torch.equal(answer[:2], x0[:2].clamp(-1, 1))


# Compiled ------------------------------------------------------------------------------------------------------------


def compiled_denoise(x, level):
    return torch.tanh(0.8 * x + level.sigma) * level.alpha


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize(
    "sampler", [DDIM(6), DDIM(6, clip="dynamic"), DDPM(6, variance="beta")], ids=["ddim", "dynamic", "ddpm"]
)
def test_a_step_compiles_to_one_graph(sampler):
    """Catches Python in a step that breaks the graph, or whose meaning changes when it is traced."""
    t, s = sampler.path(Cosine())[2:4]
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    z = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    step = torch.compile(lambda x, z: sampler.step(compiled_denoise, x, t, s, lambda: z), fullgraph=True)
    for a, b in zip(step(x, z), sampler.step(compiled_denoise, x, t, s, lambda: z), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


class Known:
    """A schedule whose path was made outside of what is traced."""

    def __init__(self, schedule, path):
        self.path, self.level_at, self.cleanest_share = path, schedule.level_at, schedule.cleanest_share

    def levels(self, steps, spacing):
        return self.path


@pytest.mark.parametrize(
    "sampler",
    [DPMSolverPP(4), DPMSolverPP(4, order=3, eta=1.0), UniPC(4), Heun(4), Midpoint(4)],
    ids=["dpmpp_2m", "dpmpp_3m_sde", "unipc", "heun", "midpoint"],
)
def test_a_whole_walk_traces_to_one_graph(sampler):
    """Catches a coefficient that is a tensor, or data-dependent control flow, in the samplers that are not one step."""
    schedule = Flow()
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    z = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    known = Known(schedule, sampler.path(schedule))

    def walk(x, z):
        return [step.x for step in sampler(compiled_denoise, known, x, lambda: z)]

    for a, b in zip(torch.compile(walk, fullgraph=True, backend="eager")(x, z), walk(x, z), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
