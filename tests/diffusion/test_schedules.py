"""Noise schedules against plain float64 numpy, and the times a sampler visits against lists written by hand."""

import math
from fractions import Fraction
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from src.diffusion.densities import Uniform
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.levels import CLEAN, Level, TimeSpacing
from src.diffusion.objectives import X0, Edm, Eps, Flow, V
from src.diffusion.schedules import Cosine, DiscreteSchedule, Laplace, Linear, Quadratic, ScaledLinear, Sigmoid
from src.diffusion.weightings import Constant as ConstantWeight

SPACINGS = get_args(TimeSpacing)


def test_linear_tables_equal_the_paper():
    """Catches float32 tables, a shifted cumulative product, and sigma taken for sigma^2."""
    schedule = Linear(1000, 1e-4, 0.02)
    betas = np.array([1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)])
    alphas_cumprod = np.exp(np.cumsum(np.log1p(-betas)))
    expected = {
        "betas": betas,
        "alphas": 1 - betas,
        "alphas_cumprod": alphas_cumprod,
        "alpha": np.sqrt(alphas_cumprod),
        "sigma": np.sqrt(1 - alphas_cumprod),
    }
    for name, values in expected.items():
        table = getattr(schedule, name)
        assert table.dtype == torch.float64, name
        np.testing.assert_allclose(table.numpy(), values, rtol=1e-12, atol=1e-13, err_msg=name)
    assert schedule.num_timesteps == 1000
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(4.035829765e-05, rel=1e-9)


@pytest.mark.parametrize("max_beta", [0.999, 0.3])
def test_cosine_follows_equation_17_and_clips(max_beta):
    """Catches a missing s, f without its square, an off-by-one in t, and a clip that is absent or not from above."""
    T, s = 1000, 0.008

    def f(t):
        return math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2

    betas = Cosine(T, s, max_beta).betas.numpy()
    expected = np.array([min(1 - f(t + 1) / f(t), max_beta) for t in range(T)])
    np.testing.assert_allclose(betas, expected, rtol=0, atol=1e-12)
    clipped = np.flatnonzero(expected == max_beta)
    assert clipped[-1] == T - 1
    assert len(clipped) == (1 if max_beta == 0.999 else 6)
    free = int(clipped[0])
    alphas_cumprod = Cosine(T, s, max_beta).alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod[:free], [f(t + 1) / f(0) for t in range(free)], rtol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(num_timesteps=0), "num_timesteps=0"),
        (lambda: Linear(beta_start=0.0), "beta_start=0.0"),
        (lambda: Linear(beta_start=-1e-4), "beta_start=-0.0001"),
        (lambda: Linear(beta_start=math.nan), "beta_start=nan"),
        (lambda: Linear(beta_end=1.0), "beta_end=1.0"),
        (lambda: Linear(beta_start=0.02, beta_end=1e-4), "beta_end=0.0001.*beta_start=0.02"),
        (lambda: Linear(beta_start=0.02, beta_end=0.02), "beta_end=0.02.*beta_start=0.02"),
        (lambda: Cosine(num_timesteps=-3), "num_timesteps=-3"),
        (lambda: Cosine(s=-0.5), "s=-0.5"),
        (lambda: Cosine(max_beta=1.0), "max_beta=1.0"),
        (lambda: Cosine(max_beta=0.0), "max_beta=0.0"),
        (lambda: DiscreteSchedule(torch.tensor([1.0, 0.1])), "betas"),
        (lambda: DiscreteSchedule(torch.tensor([0.0, 0.1])), "betas"),
        (lambda: DiscreteSchedule(torch.tensor([math.nan])), "betas"),
        (lambda: DiscreteSchedule(torch.tensor([])), "betas"),
        (lambda: Linear(1000).timesteps(1001, "trailing"), "steps=1001.*num_timesteps=1000"),
        (lambda: Linear(1000).timesteps(0, "trailing"), "steps=0"),
        (lambda: Linear(1000).levels(10, "even"), "spacing='even'.*leading.*linspace.*trailing.*quadratic"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_value(make, message):
    """Catches a missing check, and a message that does not say what was given."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("spacing", "steps", "times"),
    [
        ("leading", 1, [0]),
        ("leading", 3, [6, 3, 0]),
        ("leading", 4, [6, 4, 2, 0]),
        ("linspace", 1, [9]),
        ("linspace", 3, [9, 4, 0]),
        ("linspace", 4, [9, 6, 3, 0]),
        ("trailing", 1, [9]),
        ("trailing", 4, [9, 7, 4, 1]),
        ("trailing", 5, [9, 7, 5, 3, 1]),
        ("quadratic", 1, [9]),
        ("quadratic", 3, [9, 2, 0]),
        ("quadratic", 4, [9, 4, 1, 0]),
    ],
)
def test_times_of_ten_are_exact(spacing, steps, times):
    """Catches a spacing that is another's, or off by one."""
    assert Linear(10).timesteps(steps, spacing) == times


@pytest.mark.parametrize("spacing", SPACINGS)
def test_times_are_distinct_in_range_and_as_many_as_asked(spacing):
    """Catches times that rounding repeats, drops or pushes out of [0, T)."""
    for T, every in [(1, 1), (2, 1), (7, 1), (50, 1), (100, 1), (999, 37), (1000, 7), (4000, 401)]:
        schedule = Linear(T)
        for steps in [*range(1, T + 1, every), max(1, T - 1), T]:
            times = schedule.timesteps(steps, spacing)
            assert len(times) == steps
            assert all(type(t) is int for t in times)
            assert all(t > s for t, s in pairwise(times)), (T, steps)
            assert times[0] <= T - 1, (T, steps)
            assert times[-1] >= 0, (T, steps)
            if spacing == "leading":
                assert times == [i * (T // steps) for i in range(steps)][::-1]
            else:
                assert times[0] == T - 1, (T, steps)
        assert schedule.timesteps(T, spacing) == list(range(T))[::-1]


@pytest.mark.parametrize("T", [10, 100, 1000])
def test_linspace_and_trailing_are_nearest_to_the_exact_fractions(T):
    """Catches float steps that add up to one time too many or to t = -1, as numpy's arange does for 61 of 1000."""
    schedule = Linear(T)
    for steps in range(2, T + 1, 1 if T < 1000 else 5):
        exact = {
            "linspace": [Fraction(i * (T - 1), steps - 1) for i in range(steps)][::-1],
            "trailing": [T - 1 - Fraction(i * T, steps) for i in range(steps)],
        }
        for spacing, fractions in exact.items():
            times = schedule.timesteps(steps, spacing)
            assert all(abs(2 * (t - x)) <= 1 for t, x in zip(times, fractions, strict=True)), (steps, spacing)


def test_levels_are_the_table_and_end_clean():
    """Catches a path whose levels are float32, shifted by one, or that stops before the clean image."""
    schedule = Cosine(1000)
    path = schedule.levels(4, "linspace")
    assert path[-1] == CLEAN == Level(-1.0, 1.0, 0.0)
    assert [level.t for level in path[:-1]] == [999.0, 666.0, 333.0, 0.0]
    for level in path[:-1]:
        alphas_cumprod = schedule.alphas_cumprod[int(level.t)].item()
        assert level.alpha == math.sqrt(alphas_cumprod)
        assert level.sigma == math.sqrt(1 - alphas_cumprod)


def test_level_is_the_float32_of_the_float64_table():
    """Catches sigma computed in float32 from alpha, which near t = 0 is wrong in the third digit."""
    schedule = Linear(1000)
    t = torch.tensor([0, 1, 500, 999, 0])
    alpha, sigma = schedule.level(t)
    assert alpha.dtype == sigma.dtype == torch.float32
    assert torch.equal(alpha, schedule.alpha[t].float())
    assert torch.equal(sigma, schedule.sigma[t].float())


def test_casting_a_module_leaves_its_schedule_alone():
    """Catches tables that are buffers: bfloat16 would round alpha to two digits, and checkpoints would carry them."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.schedule = Linear(1000)
            self.linear = nn.Linear(1, 1)

    t = torch.arange(1000)
    model = Model()
    before = model.schedule.level(t)
    model.to(torch.bfloat16)
    for table in (before, model.schedule.level(t), Model().to(torch.bfloat16).schedule.level(t)):
        assert torch.equal(table[0], Linear(1000).alpha.float())
        assert torch.equal(table[1], Linear(1000).sigma.float())
    assert model.schedule.betas.dtype == torch.float64
    assert set(model.state_dict()) == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize("T", [1, 7, 513, 1000, 4096])
def test_time_covers_every_step_evenly_and_never_reaches_T(T):
    """Catches rounding instead of flooring, which halves the share of t = 0, and u near 1 mapped to T."""
    u = (torch.arange(4 * T, dtype=torch.float64) + 0.5) / (4 * T)
    times = Linear(T).time(u.float())
    assert torch.equal(times, torch.arange(T).repeat_interleave(4))
    assert Linear(T).time(torch.tensor([0.0, 1 - 2**-24, 1.0])).tolist() == [0, T - 1, T - 1]


def test_scaled_linear_and_quadratic_are_their_formulas():
    k = np.arange(1000) / 999
    scaled = (np.sqrt(8.5e-4) + (np.sqrt(0.012) - np.sqrt(8.5e-4)) * k) ** 2
    np.testing.assert_allclose(ScaledLinear(1000, 8.5e-4, 0.012).betas.numpy(), scaled, rtol=1e-12)
    np.testing.assert_allclose(Quadratic(1000, 1e-4, 0.02).betas.numpy(), 1e-4 + (0.02 - 1e-4) * k**2, rtol=1e-12)


def test_sigmoid_is_algorithm_1_of_jabri_et_al():
    """gamma(t) = (S(end) - S(start + t (end - start))) / (S(end) - S(start)); clipping moves only the last steps."""

    def S(x):
        return 1 / (1 + np.exp(-x))

    u = np.arange(1, 1001) / 1000
    gamma = (S(3.0) - S(-3.0 + 6.0 * u)) / (S(3.0) - S(-3.0))
    np.testing.assert_allclose(Sigmoid().alphas_cumprod[:-1].numpy(), gamma[:-1], rtol=1e-9)


def test_laplace_has_a_laplace_distribution_of_log_snr():
    """A share u of the times has ln SNR above the (1 - u) quantile of Laplace(mu, b)."""
    schedule = Laplace(mu=0.4, b=0.7)
    log_snr = (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).log()
    u = (torch.arange(1, 1001, dtype=torch.float64) / 1000)[:-1]
    quantile = torch.distributions.Laplace(*torch.tensor([0.4, 0.7], dtype=torch.float64)).icdf(1 - u)
    torch.testing.assert_close(log_snr[:-1], quantile, rtol=0, atol=1e-9)
    narrow = Laplace(100, mu=-1.0, b=0.1).alphas_cumprod[49]  # at u = 1/2
    assert torch.special.logit(narrow).item() == pytest.approx(-1.0, abs=1e-9)


@pytest.mark.parametrize("make", [Linear, ScaledLinear, Quadratic, Cosine, Sigmoid, Laplace])
def test_zero_terminal_snr_shifts_and_scales_the_roots(make):
    """Algorithm 1 of Lin et al. 2023: nothing left at T - 1, the first alpha kept, one straight map in between."""
    plain, zero = make(), make(zero_terminal_snr=True)
    assert zero.alpha[-1] == 0
    assert zero.alpha[0].item() == pytest.approx(plain.alpha[0].item(), rel=1e-9)
    slope = plain.alpha[0] / (plain.alpha[0] - plain.alpha[-1])
    torch.testing.assert_close(zero.alpha, (plain.alpha - plain.alpha[-1]) * slope, rtol=0, atol=1e-9)


def test_noise_prediction_without_signal_is_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"Eps does not tell the image at t=999 of 1000, where alpha is 0\.0e\+00 and sigma"
    ):
        GaussianDiffusion(Linear(zero_terminal_snr=True), Eps(), ConstantWeight(), Uniform())
    for objective in (X0(), V(), Flow(), Edm()):
        GaussianDiffusion(Linear(zero_terminal_snr=True), objective, ConstantWeight(), Uniform())


def test_a_schedule_that_leaves_nothing_of_the_image_early_is_refused():
    with pytest.raises(ValueError, match="nothing of the image is left from t="):
        Linear(1000, 1e-4, 0.99)
