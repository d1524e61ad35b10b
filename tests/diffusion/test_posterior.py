"""The reverse step and its terms of the bound, against Bayes' rule, SciPy and torch.distributions, in float64."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from src.diffusion.posterior import Posterior, between, discretized_log_likelihood, log_ndtr, normal_kl
from src.diffusion.schedules import Cosine, Linear

GREY = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1
HALF = 1 / 255  # of the distance of two levels


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def log_probability(k: int, mean: float, std: float) -> float:
    """ln of the mass between the middles of neighbouring grey levels, in whichever tail has digits."""
    middle = 2 * k / 255 - 1
    low = -np.inf if k == 0 else (middle - 1 / 255 - mean) / std
    high = np.inf if k == 255 else (middle + 1 / 255 - mean) / std
    if low > 0:
        low, high = -high, -low
    log_high, log_low = stats.norm.logcdf(high), stats.norm.logcdf(low)
    return float(log_high + np.log(-np.expm1(log_low - log_high)))


@pytest.mark.parametrize("schedule", [Linear(50, 1e-3, 0.3), Cosine(20), Cosine(20, zero_terminal_snr=True)])
def test_mean_and_variance_are_bayes_rule(schedule):
    """Of x_{t-1} ~ N(sqrt(abar) x0, 1 - abar), seen through x_t ~ N(sqrt(alpha) x_{t-1}, beta)."""
    posterior = Posterior(schedule)
    x0, x_t = normal(2, 1, 1, 4, 4)
    betas = schedule.betas.numpy()
    for t in range(1, len(betas)):
        abar = np.prod(1 - betas[:t])
        precision = 1 / (1 - abar) + (1 - betas[t]) / betas[t]
        mean = (math.sqrt(abar) * x0 / (1 - abar) + math.sqrt(1 - betas[t]) * x_t / betas[t]) / precision
        at = torch.tensor([t])
        torch.testing.assert_close(posterior.mean(x0, x_t, at), mean, rtol=0, atol=1e-12)
        assert posterior.log_variance[t].item() == pytest.approx(-math.log(precision), abs=1e-10)
        assert posterior.log_beta[t].item() == pytest.approx(math.log(betas[t]), abs=1e-12)
    torch.testing.assert_close(posterior.mean(x0, x_t, torch.tensor([0])), x0, rtol=0, atol=1e-12)


def test_the_log_variance_at_0_is_taken_from_1():
    posterior = Posterior(Linear())
    t, like = torch.tensor([0, 1, 999]), torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    assert posterior.log_variance[0] == posterior.log_variance[1]
    assert posterior.log_variance.isfinite().all()
    small, large = (posterior.fixed_log_variance(t, like, beta).flatten() for beta in (False, True))
    assert torch.equal(small, posterior.log_variance[t])
    assert torch.equal(large, torch.stack([small[0], *posterior.log_beta[[1, 999]]]))


def test_a_chain_of_one_step_is_a_bound_too():
    """Nothing to take tilde beta from: beta itself."""
    posterior = Posterior(Linear(1, 0.5, 0.6))
    assert posterior.log_variance.item() == posterior.log_beta.item() == math.log(0.5)


def test_a_learned_log_variance_runs_from_tilde_beta_to_beta():
    posterior = Posterior(Linear())
    t = torch.tensor([0, 3, 700])
    v = torch.ones(3, 1, 2, 2, dtype=torch.float64)
    for share, expected in ((-1, posterior.log_variance), (1, posterior.log_beta)):
        torch.testing.assert_close(
            posterior.learned_log_variance(share * v, t), expected[t].view(3, 1, 1, 1).expand(3, 1, 2, 2)
        )
    middle = (posterior.log_variance[700] + posterior.log_beta[700]) / 2
    assert posterior.learned_log_variance(0 * v, t)[2, 0, 0, 0] == middle
    assert between(2.0, 4.0, torch.tensor(0.5)).item() == 3.5


def test_the_divergence_is_that_of_torch():
    m1, m2, l1, l2 = normal(4, 1000)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(m1, (l1 / 2).exp()), torch.distributions.Normal(m2, (l2 / 2).exp())
    )
    torch.testing.assert_close(normal_kl(m1, l1, m2, l2), exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(normal_kl(m1, l1, m1, l1), torch.zeros(1000, dtype=torch.float64))


@pytest.mark.parametrize("std", [3.0, 0.3, 0.01, 1e-3, 1e-5])
@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.1234, 1.0, 1.004])
def test_every_grey_level_has_the_probability_that_scipy_says(mean, std):
    log_variance = torch.tensor(2 * math.log(std), dtype=torch.float64)
    ours = discretized_log_likelihood(GREY, torch.tensor(mean, dtype=torch.float64), log_variance)
    exact = torch.tensor([log_probability(k, mean, std) for k in range(256)], dtype=torch.float64)
    torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-9)
    assert ours.logsumexp(0).item() == pytest.approx(0, abs=1e-9)


def test_the_first_and_the_last_grey_level_reach_to_infinity():
    """Catches densities at the edges: the mean may be anything beyond them."""
    ends, mean = torch.tensor([-1.0, 1.0]), torch.tensor([-50.0, 50.0])
    assert discretized_log_likelihood(ends, mean, torch.tensor(-9.0)).tolist() == [0, 0]
    # of grey levels in float32, as the loader makes them
    from src.data.loader import normalize

    ends = normalize(torch.tensor([0, 255], dtype=torch.uint8))
    half = discretized_log_likelihood(ends, torch.tensor([-1 + HALF, 1 - HALF]), torch.tensor(-9.0)).exp()
    torch.testing.assert_close(half, torch.tensor([0.5, 0.5]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_however_small_the_variance(dtype):
    """Catches a difference of two equal distribution functions, ln 0, and 0 times infinity in the backward pass."""
    mean = torch.linspace(-1.5, 1.5, 31, dtype=dtype).requires_grad_()
    log_variance = torch.linspace(-40, 4, 12, dtype=dtype)[:, None].requires_grad_()
    for x0 in (-1.0, -0.99216, 0.0, 0.99216, 1.0):
        value = discretized_log_likelihood(torch.tensor(x0, dtype=dtype), mean, log_variance)
        assert value.isfinite().all()
        assert (value <= 0).all()
        for gradient in torch.autograd.grad(value.sum(), [mean, log_variance]):
            assert gradient.isfinite().all()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_the_normal_distribution_function_and_its_gradient_keep_their_digits(dtype, rtol):
    """ln Phi' is the inverse of Mills' ratio, -z - 1 / z + 2 / z^3 far out, where torch's own gradient is lost."""
    z = torch.tensor([-1e9, -1e6, -1e3, -37.0, -3.0, -1.0, -0.5, 0.0, 2.0, 6.0], dtype=dtype, requires_grad=True)
    exact = z.detach().double().numpy()
    value = log_ndtr(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    far = -exact[:3] - 1 / exact[:3] + 2 / exact[:3] ** 3
    near = np.exp(stats.norm.logpdf(exact[3:]) - stats.norm.logcdf(exact[3:]))
    np.testing.assert_allclose(value.detach().numpy(), stats.norm.logcdf(exact), rtol=rtol)
    np.testing.assert_allclose(slope.numpy(), [*far, *near], rtol=10 * rtol)


def test_the_gradient_is_that_of_the_value():
    mean = torch.tensor([-0.97, 0.3, 0.301, 0.5], dtype=torch.float64, requires_grad=True)
    log_variance = torch.tensor([-9.0, -11.0, -2.0, -7.0], dtype=torch.float64, requires_grad=True)
    x0 = GREY[[0, 166, 166, 255]]
    assert torch.autograd.gradcheck(lambda m, v: discretized_log_likelihood(x0, m, v), (mean, log_variance))


@pytest.mark.parametrize(("levels", "atol"), [(256, 1e-3), (65536, 1e-2)])
def test_float32_is_near_float64(levels, atol):
    """As far as training needs it: 1e-3 nats, or 1e-4 of larger ones; of 16 bits 1e-2."""
    mean, log_variance = 0.7 * normal(4096), -5 + 2 * normal(4096, seed=1)
    x0 = torch.randint(0, levels, (4096,), generator=torch.Generator().manual_seed(2)).double() * 2 / (levels - 1) - 1
    exact = discretized_log_likelihood(x0, mean, log_variance, levels)
    single = discretized_log_likelihood(x0.float(), mean.float(), log_variance.float(), levels)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=atol)


def test_the_term_of_an_image_is_its_likelihood_at_0_and_a_divergence_elsewhere():
    posterior, t = Posterior(Linear(10, 1e-3, 0.2)), torch.tensor([0, 1, 9])
    levels = torch.randint(0, 256, (3, 2, 3, 3), generator=torch.Generator().manual_seed(0))
    x0, x_t, guess = GREY[levels], normal(3, 2, 3, 3), 0.4 * normal(3, 2, 3, 3, seed=1)
    log_variance = -4 + 0.5 * normal(3, 2, 3, 3, seed=2)
    bits = posterior.bits(x0, x_t, guess, log_variance, t)
    expected = []
    for i, time in enumerate(t.tolist()):
        truth, mean = (posterior.mean(x[i : i + 1], x_t[i : i + 1], t[i : i + 1])[0] for x in (x0, guess))
        std = (log_variance[i] / 2).exp()
        if time == 0:
            numbers = zip(levels[i].flatten(), mean.flatten(), std.flatten(), strict=True)
            nats = -np.mean([log_probability(int(k), float(m), float(s)) for k, m, s in numbers])
        else:
            true = torch.distributions.Normal(truth, (posterior.log_variance[time] / 2).exp())
            nats = torch.distributions.kl_divergence(true, torch.distributions.Normal(mean, std)).mean().item()
        expected.append(nats / math.log(2))
    torch.testing.assert_close(bits, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_a_divergence_in_float32_keeps_its_digits_where_the_means_are_close():
    """At large t the means differ by 1e-4 of themselves: their difference is c0 (x0 - x0_hat), not one of two sums."""
    posterior, t = Posterior(Cosine()), torch.tensor([900])
    x0, x_t = 0.5 * normal(1, 3, 16, 16), normal(1, 3, 16, 16, seed=1)
    guess = x0 + 0.01 * normal(1, 3, 16, 16, seed=2)
    exact = posterior.bits(x0, x_t, guess, posterior.fixed_log_variance(t, x0, beta=False), t)
    x0, x_t, guess = x0.float(), x_t.float(), guess.float()
    single = posterior.bits(x0, x_t, guess, posterior.fixed_log_variance(t, x0, beta=False), t)
    assert exact.item() > 0
    assert single.item() == pytest.approx(exact.item(), rel=1e-4)
