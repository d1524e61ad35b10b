"""Weightings: the papers' values, and the same weight on x0 whatever the network learns."""

import pytest
import torch

from src.diffusion import weightings
from src.diffusion.continuous import VE, Karras
from src.diffusion.densities import Uniform
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.objectives import X0, Edm, Eps, Flow, V
from src.diffusion.schedules import Cosine, Linear
from src.diffusion.weightings import P2, Constant, MinSNR

OBJECTIVES = [Eps(), X0(), V(), Flow(), Edm()]


def snr_and_weight(weighting, objective):
    schedule = Linear()
    alpha, sigma = schedule.alpha, schedule.sigma
    return (alpha / sigma) ** 2, weighting(alpha, sigma, objective.determinant(alpha, sigma))


def test_min_snr_is_the_papers_for_eps_x0_and_v():
    """Hang et al. 2023: min(SNR, g) for x0, min(SNR, g) / SNR for eps, min(SNR, g) / (SNR + 1) for v."""
    for objective, divisor in ((X0(), lambda s: 1), (Eps(), lambda s: s), (V(), lambda s: s + 1)):
        snr, weight = snr_and_weight(MinSNR(gamma=5.0), objective)
        torch.testing.assert_close(weight, snr.clamp(max=5) / divisor(snr), atol=0, rtol=1e-10)


def test_p2_is_the_papers_for_eps():
    snr, weight = snr_and_weight(P2(gamma=0.5, k=1.0), Eps())
    torch.testing.assert_close(weight, (1 + snr) ** -0.5, atol=0, rtol=1e-10)
    assert torch.equal(snr_and_weight(P2(gamma=0.0), Eps())[1], torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("weighting", [MinSNR(), P2()], ids=["min_snr", "p2"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_one_guess_of_x0_has_one_loss_whatever_the_network_learns(weighting, objective):
    """The same wrong x0 at the same x_t, told as eps, v, ...: a weighting that forgets the objective differs here."""
    schedule = Linear()
    g = torch.Generator().manual_seed(0)
    x0, noise, guess = (torch.randn(64, 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    t = torch.arange(64) * 15 + 5

    def loss(objective):
        diffusion = GaussianDiffusion(schedule, objective, weighting, Uniform())
        alpha, sigma = (v.view(-1, 1, 1, 1).double() for v in schedule.level(t))
        x_t = alpha * x0 + sigma * noise
        F = objective.target(guess, (x_t - alpha * guess) / sigma, alpha, sigma)
        return diffusion.p_losses(lambda x, t: F, x0, t, noise)

    torch.testing.assert_close(loss(objective), loss(X0()), rtol=2e-3, atol=0)  # p_losses is float32


def test_constant_is_one():
    assert torch.equal(snr_and_weight(Constant(), Edm())[1], torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("arguments", [{"gamma": 0.0}, {"gamma": -1.0}])
def test_a_gamma_that_is_no_weight_is_refused(arguments):
    with pytest.raises(ValueError, match="gamma="):
        MinSNR(**arguments)


def test_edm_is_one_for_its_objective_and_table_1_for_x0():
    """Karras et al. 2022: lambda = (sigma^2 + sd^2) / (sigma sd)^2 on x0, made so that F counts the same everywhere."""
    sd = 0.7
    alpha, sigma = Karras().table()
    ours = weightings.Edm(sigma_data=sd)
    one = ours(alpha, sigma, Edm(sigma_data=sd).determinant(alpha, sigma))
    torch.testing.assert_close(one, torch.ones_like(one), rtol=1e-12, atol=0)
    x0 = ours(alpha, sigma, X0().determinant(alpha, sigma))
    torch.testing.assert_close(x0, (sigma**2 + sd**2) / (sigma * sd) ** 2, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="sigma_data=0"):
        weightings.Edm(sigma_data=0)


@pytest.mark.parametrize("schedule", [Linear(), Linear(4000), Cosine(), Karras(), VE()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_sigmoid_is_an_integral_over_log_snr_whatever_the_schedule(schedule, objective):
    """VDM++: catches a forgotten slope: an error of eps of 1 everywhere costs the integral of sigmoid(b - ln SNR)."""
    diffusion = GaussianDiffusion(schedule, objective, weightings.Sigmoid(bias=2.0), Uniform())
    u = (torch.arange(20_000) + 0.5) / 20_000
    t = schedule.time(u)
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in schedule.level(t))
    x0, noise = torch.zeros(20_000, 1, 1, 1), torch.ones(20_000, 1, 1, 1)
    # the network whose eps is off by one and which agrees with x_t
    wrong = objective.target(x0 - sigma / alpha, noise + 1, alpha, sigma)
    cost = diffusion.p_losses(lambda x, t: wrong, x0, t, noise).double()
    a, s = schedule.table()
    first, *_, last = 2 * (a / s).log()
    softplus = torch.nn.functional.softplus
    expected = softplus(2.0 - last) - softplus(2.0 - first)
    assert cost.mean().item() == pytest.approx(expected.item(), rel=0.02)
