"""The bound against slow plain loops in float64 and exact probabilities; the ODE's density against closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import solve_ivp

from src.data.loader import normalize
from src.diffusion.continuous import VE, Flow, Karras
from src.diffusion.guidance import Guess
from src.diffusion.levels import CLEAN
from src.diffusion.likelihood import (
    A,
    C,
    E,
    dequantized,
    dequantized_bits,
    dormand_prince,
    ode_density,
    prior_bits,
    rademacher,
    stratified_times,
    unit_probes,
    vlb,
)
from src.diffusion.oracle import Mixture
from src.diffusion.schedules import Cosine, Linear

GREY = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1
SCHEDULES = {
    "linear": Linear(),
    "cosine": Cosine(),
    "linear, zero terminal SNR": Linear(zero_terminal_snr=True),
    "cosine, zero terminal SNR": Cosine(zero_terminal_snr=True),
    "karras": Karras(),
    "ve": VE(),
    "flow": Flow(),
    "flow, shifted": Flow(shift=3.0),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def a_denoiser(x, level):
    """Some smooth answer that is no model's, often beyond [-1, 1], with a v of its own."""
    return Guess(1.3 * torch.tanh(1.2 * x + 0.1 * level.t), v=torch.sin(3 * x))


def slow_vlb(betas, levels, noises, variance, clip):
    """Eq. 5, Ho et al. 2020, of one image: a number at a time, from the definition of each factor.

    Args:
        levels: grey levels, flat list of int.
        noises: one flat list a time.

    Returns:
        Bits per dimension: the terms from t = 0, and the prior term.
    """
    T, D = len(betas), len(levels)

    def posterior_variance(t):
        return (1 - np.prod(1 - betas[:t])) / (1 - np.prod(1 - betas[: t + 1])) * betas[t]

    terms = np.zeros(T)
    for t in range(T):
        for k, z in zip(levels, noises[t], strict=True):
            x0 = 2 * k / 255 - 1
            abar, before = np.prod(1 - betas[: t + 1]), np.prod(1 - betas[:t])
            x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * z
            guess, v = 1.3 * math.tanh(1.2 * x_t + 0.1 * t), math.sin(3 * x_t)
            if clip:
                guess = min(1.0, max(-1.0, guess))
            c0 = math.sqrt(before) * betas[t] / (1 - abar)
            ct = math.sqrt(1 - betas[t]) * (1 - before) / (1 - abar)
            small = posterior_variance(max(t, 1))
            if variance == "posterior":
                chosen = small
            elif variance == "beta":
                chosen = betas[t] if t > 0 else small
            else:
                chosen = math.exp((v + 1) / 2 * math.log(betas[t]) + (1 - v) / 2 * math.log(small))
            mean, std = c0 * guess + ct * x_t, math.sqrt(chosen)
            if t == 0:
                low = -np.inf if k == 0 else x0 - 1 / 255
                high = np.inf if k == 255 else x0 + 1 / 255
                if low > mean:  # in the tail where a difference has digits
                    mass = stats.norm.sf(low, mean, std) - stats.norm.sf(high, mean, std)
                else:
                    mass = stats.norm.cdf(high, mean, std) - stats.norm.cdf(low, mean, std)
                nats = -math.log(mass)
            else:
                truth = c0 * x0 + ct * x_t
                nats = math.log(std / math.sqrt(small)) + (small + (truth - mean) ** 2) / (2 * chosen) - 0.5
            terms[t] += nats / math.log(2) / D
    abar = np.prod(1 - betas)
    prior = sum(0.5 * (1 - abar + abar * (2 * k / 255 - 1) ** 2 - 1 - math.log(1 - abar)) for k in levels)
    return terms, prior / math.log(2) / D


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["posterior", "beta", "learned"])
def test_the_bound_is_that_of_plain_loops(variance, clip):
    """Every number of every factor, black and white ones included."""
    schedule = Linear(8, 0.02, 0.4)
    levels = torch.randint(0, 256, (3, 1, 2, 4), generator=seeded(1))
    levels[:, 0, 0, 0], levels[:, 0, 1, 1] = 0, 255
    noises = normal(8, 3, 1, 2, 4)
    stream = iter(noises)
    bound = vlb(a_denoiser, schedule, GREY[levels], lambda: next(stream), variance, clip)
    for i in range(3):
        numbers = [noise[i].flatten().tolist() for noise in noises]
        terms, prior = slow_vlb(schedule.betas.numpy(), levels[i].flatten().tolist(), numbers, variance, clip)
        np.testing.assert_allclose(bound.terms[i].numpy(), terms, rtol=1e-8)
        assert bound.prior[i].item() == pytest.approx(prior, rel=1e-9)
        assert bound.total[i].item() == pytest.approx(prior + terms.sum(), rel=1e-9)


def test_the_prior_term_is_the_divergence_of_torch():
    x0 = GREY[torch.randint(0, 256, (4, 3, 5, 5), generator=seeded())]
    schedule = Linear(50)  # a chain that leaves much of the image
    end = torch.distributions.Normal(schedule.alpha[-1] * x0, schedule.sigma[-1])
    standard = torch.distributions.Normal(torch.zeros_like(x0), 1.0)
    exact = torch.distributions.kl_divergence(end, standard).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(prior_bits(schedule, x0), exact, rtol=1e-12, atol=0)
    assert prior_bits(Linear(zero_terminal_snr=True), x0).tolist() == [0, 0, 0, 0]


class Rounded:
    """Images whose numbers are N(mean, std^2), rounded to grey levels, as a Gaussian that includes the rounding."""

    mean, std = 0.1, 0.2

    def __init__(self, levels=256):
        self.levels = levels
        self.grey = torch.arange(levels, dtype=torch.float64) * 2 / (levels - 1) - 1
        self.variance = self.std**2 + (2 / (levels - 1)) ** 2 / 12

    def images(self, *shape):
        x = self.mean + self.std * torch.randn(*shape, generator=seeded(3), dtype=torch.float64)
        return ((x + 1) * (self.levels - 1) / 2).round().clamp(0, self.levels - 1).long()

    def bits(self, k):
        """-log2 P(k) of each image, per dimension."""
        edges = torch.special.ndtr((self.grey[1:] + self.grey[:-1]).sub(2 * self.mean) / (2 * self.std))
        P = torch.diff(torch.cat([torch.zeros(1), edges, torch.ones(1)]).double())
        return -P[k].log2().flatten(1).mean(1)

    def denoiser(self, schedule):
        """E[x0 | x_t], and v such that the reverse variance is tilde beta + c0^2 Var(x0 | x_t): what is exact here."""

        def denoise(x, level):
            t = int(level.t)
            V = level.alpha**2 * self.variance + level.sigma**2
            x0 = (level.alpha * self.variance * x + level.sigma**2 * self.mean) / V
            beta, abar = schedule.betas[t].item(), schedule.alphas_cumprod[t].item()
            before = schedule.alphas_cumprod[t - 1].item() if t > 0 else 1.0
            tilde = beta * (1 - before) / (1 - abar)
            c0 = beta * math.sqrt(before) / (1 - abar)
            exact = tilde + c0**2 * self.variance * level.sigma**2 / V
            first = schedule.betas[max(t, 1)].item() * (1 - schedule.alphas_cumprod[max(t, 1) - 1].item())
            low = math.log(first / (1 - schedule.alphas_cumprod[max(t, 1)].item()))
            share = (math.log(exact) - low) / (math.log(beta) - low)
            return Guess(x0, v=torch.full_like(x, 2 * share - 1))

        return denoise


@pytest.mark.parametrize("levels", [256, 65536])
@pytest.mark.parametrize("schedule", [Linear(20, 1e-3, 0.6), Cosine(50)])
def test_the_bound_of_a_perfect_gaussian_model_is_the_exact_likelihood(schedule, levels):
    """Nothing is lost in any factor: the reverse steps of Gaussian data are Gaussian."""
    data = Rounded(levels)
    k = data.images(400, 1, 8, 8)
    g = seeded(4)
    bound = vlb(
        data.denoiser(schedule),
        schedule,
        data.grey[k],
        lambda: torch.randn(400, 1, 8, 8, generator=g, dtype=torch.float64),
        "learned",
        levels=levels,
    )
    difference = bound.total - data.bits(k)
    assert abs(difference.mean()) < 4 * difference.std() / 20
    assert difference.std() / 20 < 1e-2
    assert bound.prior.mean() < 1e-3


def test_the_bound_is_above_and_closes_in_as_the_chain_grows():
    """With the variance beta, whose loss a step is of the order of the step."""
    data = Rounded()
    k = data.images(100, 1, 8, 8)
    gaps = []
    for T in (4, 16, 64):
        schedule, g = Cosine(T), seeded(5)
        noise = lambda g=g: torch.randn(100, 1, 8, 8, generator=g, dtype=torch.float64)  # noqa: E731
        total = vlb(data.denoiser(schedule), schedule, GREY[k], noise, "beta").total
        gaps.append((total - data.bits(k)).mean().item())
    assert gaps[0] > gaps[1] > gaps[2] > 0.02
    assert gaps[2] < gaps[0] / 3


def test_fewer_times_estimate_the_sum_without_bias():
    T, n = 10, 4
    drawn = torch.zeros(T)
    for seed in range(4000):
        times = stratified_times(T, n, seeded(seed))
        assert len(times) == n
        assert all(i * T / n - 1 < t < (i + 1) * T / n for i, t in enumerate(times))
        drawn += torch.bincount(torch.tensor(times), minlength=T)
    torch.testing.assert_close(drawn / 4000, torch.full((T,), n / T), rtol=0, atol=0.04)
    assert stratified_times(T, T, seeded()) == list(range(T))
    for n in (0, 11):
        with pytest.raises(ValueError, match=f"num_times={n} is not between 1 and num_timesteps=10"):
            stratified_times(T, n, seeded())


def test_terms_count_as_often_as_their_times_were_left_out():
    schedule, x0 = Linear(9, 0.01, 0.3), GREY[torch.randint(0, 256, (2, 1, 4, 4), generator=seeded())]
    noise = normal(2, 1, 4, 4)
    whole = vlb(a_denoiser, schedule, x0, lambda: noise)
    part = vlb(a_denoiser, schedule, x0, lambda: noise, times=[1, 4, 8])
    assert torch.equal(part.terms, whole.terms[:, [1, 4, 8]])
    torch.testing.assert_close(part.total, part.prior + 3 * part.terms.sum(1))


def test_bounds_that_do_not_exist_are_refused():
    x0 = torch.zeros(1, 1, 2, 2)
    with pytest.raises(
        ValueError, match="chain of discrete steps, which Karras is not; take the likelihood of its ODE"
    ):
        vlb(a_denoiser, Karras(), x0, lambda: x0)
    with pytest.raises(ValueError, match="variance=learned needs a network that learns it"):
        vlb(lambda x, level: x, Linear(), x0, lambda: x0, "learned")


def gaussian(*shape):
    return Mixture(0.1 + 0.1 * normal(1, *shape, seed=8), 0.5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_density_of_gaussian_data_is_exact_to_a_thousandth_of_a_bit(name):
    """Whatever the schedule; what is left is the noise of its cleanest level, and its prior's ignorance of the mean."""
    data, schedule = gaussian(3, 8, 8), SCHEDULES[name]
    y = data.sample(8, seeded())
    density = ode_density(data, schedule, y, unit_probes((3, 8, 8)))
    bits = (density.log_p - data.log_density(y, CLEAN)) / 192 / math.log(2)
    assert bits.abs().max() < 1e-3


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_solver_follows_the_ode_to_its_tolerance(name):
    """The ODE of Gaussian data keeps quantiles: where it ends, and the model's own density, are known."""
    data, schedule = gaussian(1, 4, 4), SCHEDULES[name]
    y = data.sample(8, seeded())
    noisiest, cleanest, _ = schedule.levels(2, "linspace")
    start = math.sqrt(0.25 + (cleanest.sigma / cleanest.alpha) ** 2)
    end = math.sqrt(0.25 * noisiest.alpha**2 + noisiest.sigma**2)
    x = noisiest.alpha * data.means.view(1, 1, 4, 4) + end / start * (y - data.means.view(1, 1, 4, 4))
    prior = torch.distributions.Normal(0.0, schedule.prior_std(noisiest)).log_prob(x).flatten(1).sum(1)
    density = ode_density(data, schedule, y, unit_probes((1, 4, 4)), 1e-7, 1e-7)
    torch.testing.assert_close(density.x / end, x / end, rtol=0, atol=1e-5)
    torch.testing.assert_close(density.log_p / 16, prior / 16 + math.log(end / start), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_density_of_a_mixture(name):
    """Of images with the noise of the cleanest level; of signal that is left at the end the prior does not know."""
    means = torch.stack([torch.full((3, 4, 4), v, dtype=torch.float64) for v in (-0.5, 0.5)])
    data, schedule = Mixture(means + 0.2 * normal(2, 3, 4, 4, seed=2), 0.15), SCHEDULES[name]
    y = data.sample(32, seeded())
    density = ode_density(data, schedule, y, unit_probes((3, 4, 4)))
    _, cleanest, _ = schedule.levels(2, "linspace")
    exact = data.log_density(cleanest.alpha * y, cleanest) + 48 * math.log(cleanest.alpha)
    bits = (density.log_p - exact) / 48 / math.log(2)
    assert bits.mean().abs() < 1e-3
    assert bits.abs().max() < (1e-3 if schedule.levels(1, "trailing")[0].alpha == 0 else 1e-2)


def correlated(D):
    """A Gaussian with a full covariance, whose denoiser's Jacobian is not diagonal: probes then matter."""
    root = 0.4 * normal(D, D, seed=6) / D**0.5
    covariance = root @ root.T + 0.05 * torch.eye(D, dtype=torch.float64)

    def denoise(x, level):
        V = level.alpha**2 * covariance + level.sigma**2 * torch.eye(D, dtype=torch.float64)
        return (x.flatten(1) @ torch.linalg.solve(V, level.alpha * covariance)).view(x.shape)

    return denoise, torch.distributions.MultivariateNormal(torch.zeros(D, dtype=torch.float64), covariance)


def test_hutchinsons_estimate_is_unbiased_and_its_error_falls_with_the_root_of_the_probes():
    denoise, distribution = correlated(16)
    torch.manual_seed(0)
    y = distribution.sample((1,)).view(1, 1, 4, 4).expand(256, 1, 4, 4).contiguous()
    exact = ode_density(denoise, Flow(), y[:1], unit_probes((1, 4, 4)))
    assert exact.log_p.item() / 16 == pytest.approx(distribution.log_prob(y[0].flatten()).item() / 16, abs=1e-3)
    spread = []
    for n in (1, 4):
        probes = torch.stack([rademacher((1, 4, 4), n, seeded(i)) for i in range(256)], dim=1)
        estimates = ode_density(denoise, Flow(), y, probes).log_p
        assert abs(estimates.mean() - exact.log_p) < 4 * estimates.std() / 16
        spread.append(estimates.std().item())
    assert spread[0] > 0.1
    assert spread[0] / spread[1] == pytest.approx(2, rel=0.25)


def test_probes():
    probes = rademacher((3, 4, 4), 5, seeded())
    assert probes.shape == (5, 3, 4, 4)
    assert probes.unique().tolist() == [-1, 1]
    J = normal(8, 8)
    each = torch.stack([v.flatten().double() @ J @ v.flatten().double() for v in unit_probes((2, 2, 2))])
    torch.testing.assert_close(each.mean(), J.trace(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "karras", "flow"])
def test_the_density_of_any_network_integrates_to_one(name):
    """Catches any missing or wrong Jacobian, of coordinates too: this denoiser is that of no data."""

    def denoise(x, level):
        V = 0.25 * level.alpha**2 + level.sigma**2
        return (0.25 * level.alpha * x + 0.3 * level.sigma * torch.tanh(2 * x + 0.3)) / V

    y = torch.linspace(-5, 5, 1001, dtype=torch.float64).view(-1, 1, 1, 1)
    p = ode_density(denoise, SCHEDULES[name], y, unit_probes((1, 1, 1)), 1e-6, 1e-6).log_p.exp()
    assert torch.trapezoid(p, y.flatten()).item() == pytest.approx(1, abs=2e-3)


def test_a_tighter_tolerance_costs_evaluations_and_buys_digits():
    data, y = gaussian(1, 4, 4), gaussian(1, 4, 4).sample(8, seeded())
    best = ode_density(data, Flow(), y, unit_probes((1, 4, 4)), 1e-10, 1e-10).log_p
    runs = [ode_density(data, Flow(), y, unit_probes((1, 4, 4)), tol, tol) for tol in (1e-3, 1e-5, 1e-7)]
    counts = [run.evaluations for run in runs]
    errors = [((run.log_p - best).abs().max() / 16).item() for run in runs]
    assert counts[0] < counts[1] < counts[2]
    assert errors[0] > errors[1] > errors[2]
    assert all(error < 10 * tol for error, tol in zip(errors, (1e-3, 1e-5, 1e-7), strict=True))


def test_progress_rises_to_one():
    shares = []
    ode_density(gaussian(1, 2, 2), Flow(), torch.zeros(1, 1, 2, 2), unit_probes((1, 2, 2)), progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    shares.clear()
    x0 = torch.zeros(1, 1, 2, 2)
    vlb(lambda x, level: x, Linear(4, 0.1, 0.2), x0, lambda: x0, progress=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1]


def test_what_no_solver_can_follow_is_refused():
    y, probes = torch.zeros(1, 1, 2, 2), unit_probes((1, 2, 2))
    with pytest.raises(ValueError, match="NaN or infinity"):
        ode_density(lambda x, level: x * math.nan, Flow(), y, probes)
    with pytest.raises(ValueError, match="rtol=0 and atol=1e-05 must be positive"):
        ode_density(lambda x, level: x, Flow(), y, probes, rtol=0)
    with pytest.raises(ValueError, match="cannot be met; the network is not smooth enough"):
        ode_density(lambda x, level: x + 1e6 * torch.randn(x.shape), Flow(), y, probes, 1e-9, 1e-9)
    with pytest.raises(ValueError, match="cannot be met; the network is not smooth enough"):
        ode_density(lambda x, level: x.where(torch.tensor(level.sigma < 0.01), math.nan), Flow(), y, probes)
    with pytest.raises(ValueError, match="steps=2 is not between 1 and num_timesteps=1"):
        ode_density(lambda x, level: x, Linear(1), y, probes)


def test_the_pair_has_the_orders_of_dormand_and_prince():
    """sum b c^k = 1 / (k + 1) up to k = 4, and the difference of the two is 0 up to k = 3 and not at 4."""
    c = np.array([0, *C])
    for row, node in zip(A, C, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-14)
    for k in range(5):
        assert np.dot(A[-1], c[:6] ** k) == pytest.approx(1 / (k + 1), abs=1e-14)
        assert (abs(np.dot(E, c**k)) < 1e-14) == (k < 4)


def test_the_solver_does_what_scipys_does():
    """On van der Pol's equation: to the tolerance, with about as many evaluations."""

    def f(t, y):
        return torch.stack([y[:, 1], 5 * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], dim=1)

    count = 0

    def counted(t, y):
        nonlocal count
        count += 1
        return f(t, y)

    y0 = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    ours = dormand_prince(counted, y0, 0.0, 10.0, 1e-6, 1e-6)[0].numpy()
    flat = lambda t, y: f(t, torch.from_numpy(y)[None])[0].numpy()  # noqa: E731
    scipys = solve_ivp(flat, (0, 10), [2.0, 0.0], rtol=1e-6, atol=1e-6)
    exact = solve_ivp(flat, (0, 10), [2.0, 0.0], rtol=1e-12, atol=1e-12, method="DOP853").y[:, -1]
    np.testing.assert_allclose(ours, exact, rtol=1e-4)
    assert count < 1.3 * scipys.nfev


def test_the_hardest_image_of_a_batch_sets_the_step():
    """Catches an error that is averaged over the batch, in which one image would count for little."""
    rates = torch.ones(1000, 2, dtype=torch.float64)
    rates[0] = 30
    end = dormand_prince(lambda t, y: rates * torch.cos(rates * t), torch.zeros_like(rates), 0.0, 2.0, 1e-7, 1e-7)
    torch.testing.assert_close(end, torch.sin(2 * rates), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("levels", "dtype"), [(256, torch.uint8), (65536, torch.uint16)])
def test_dequantised_levels_lie_in_their_bins_and_their_middle_is_what_networks_see(levels, dtype):
    k = torch.arange(levels).to(dtype).view(-1, 1, 1, 1)
    middle = dequantized(k, torch.full(k.shape, 0.5), levels)
    torch.testing.assert_close(middle.float(), normalize(k), rtol=0, atol=2e-7)
    low, high = (dequantized(k, v, levels) for v in (torch.zeros(k.shape), torch.ones(k.shape)))
    torch.testing.assert_close(low[1:], high[:-1], rtol=0, atol=1e-12)
    width = torch.full(k.shape, 2 / (levels - 1), dtype=torch.float64)
    torch.testing.assert_close(high - low, width, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_uniform_density_has_as_many_bits_as_the_images(bits):
    """Catches a wrong constant: over all bins, whose width is 256 * 2 / 255."""
    log_p = torch.tensor([-192 * math.log(2**bits * 2 / (2**bits - 1))], dtype=torch.float64)
    assert dequantized_bits(log_p, 192, 2**bits).item() == pytest.approx(bits, abs=1e-12)


def test_dequantised_bits_bound_those_of_the_grey_levels():
    """And are near them where the density is flat over a bin; catches a shift of the bins, too."""
    data = Rounded()
    k = data.images(500, 1, 4, 4)
    y = dequantized(k.to(torch.uint8), torch.rand(k.shape, generator=seeded(), dtype=torch.float64))
    log_p = torch.distributions.Normal(data.mean, data.std).log_prob(y).flatten(1).sum(1)
    difference = dequantized_bits(log_p, 16) - data.bits(k)
    assert -3e-4 < difference.mean() < 2e-3
