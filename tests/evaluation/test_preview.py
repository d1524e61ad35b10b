"""The closed forms of a preview against sampling, simulation and integrals; the words against the schedules."""

import math
from itertools import product
from pathlib import Path

import pytest
import torch

from src.data.loader import normalize
from src.data.sources import Digits
from src.diffusion.continuous import VE, Flow, Karras
from src.diffusion.densities import LogNormal, Uniform
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.levels import Level
from src.diffusion.objectives import X0, Edm, Eps, V
from src.diffusion.objectives import Flow as FlowObjective
from src.diffusion.oracle import Mixture
from src.diffusion.schedules import Cosine, Laplace, Linear, Quadratic, ScaledLinear, Sigmoid
from src.diffusion.solvers import Heun
from src.diffusion.weightings import P2, Constant, MinSNR
from src.diffusion.weightings import Edm as EdmWeighting
from src.diffusion.weightings import Sigmoid as SigmoidWeighting
from src.evaluation.preview import (
    BINS,
    DRAWS,
    Spectrum,
    columns,
    dissolve,
    finite_loss,
    measure,
    percent,
    spend,
    time,
    words,
)

OBJECTIVES = [Eps(), X0(), V(), FlowObjective(), Edm()]
MEAN = torch.tensor([0.5, -0.3, 0.0, 0.2, -0.6, 0.1], dtype=torch.float64)
STD = torch.tensor([1.0, 0.8, 0.5, 0.3, 0.1, 0.02], dtype=torch.float64)


def images_of(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Images, (2 D, 1, 1, D), with exactly this mean and this diagonal covariance: one pair of them a direction."""
    D = len(std)
    steps = torch.diag(std) * math.sqrt((2 * D - 1) / 2)
    return torch.cat([mean + steps, mean - steps])[:, None, None, :]


@pytest.fixture(scope="module")
def gaussian() -> Spectrum:
    return Spectrum(images_of(MEAN, STD))


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    return normalize(Digits().load(Path())[0].images)


def diffusion_of(schedule, objective=None, weighting=None, density=None) -> GaussianDiffusion:
    return GaussianDiffusion(schedule, objective or V(), weighting or Constant(), density or Uniform())


def test_a_spectrum_is_the_covariances(gaussian):
    order = STD.argsort()
    torch.testing.assert_close(gaussian.lambdas, STD[order] ** 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(gaussian.means.abs(), MEAN[order].abs(), rtol=1e-10, atol=1e-12)


def test_fewer_images_than_numbers_in_one_have_the_same_spectrum(digits):
    few = digits[:40]
    spectrum = Spectrum(few)
    covariance = torch.cov(few.flatten(1).double().T)
    lambdas, directions = torch.linalg.eigh(covariance)
    torch.testing.assert_close(spectrum.lambdas, lambdas.clamp_min(0), rtol=1e-9, atol=1e-12)
    means = (directions.T @ few.flatten(1).double().mean(0)) ** 2
    torch.testing.assert_close(spectrum.means[-39:] ** 2, means[-39:], rtol=1e-6, atol=1e-9)
    assert (spectrum.means[:-39] == 0).all()


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.05), (0.9, 0.4), (0.3, 0.95), (0.01, 1.0), (1.0, 40.0)])
def test_the_mmse_is_that_of_the_exact_denoiser(gaussian, alpha, sigma):
    mixture = Mixture(MEAN[None], STD)
    x0 = mixture.sample(40_000, torch.Generator().manual_seed(0))
    x_t = alpha * x0 + sigma * torch.randn_like(x0)
    error = (mixture(x_t, Level(0.0, alpha, sigma)) - x0).square().mean(1)
    standard_error = float(error.std()) / 200
    assert standard_error < 0.01 * gaussian.mmse(alpha, sigma)
    assert abs(float(error.mean()) - gaussian.mmse(alpha, sigma)) < 4 * standard_error


@pytest.mark.parametrize("weighting", [Constant(), MinSNR(), P2(), EdmWeighting(), SigmoidWeighting()])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("schedule", [Linear(), Karras(), Flow()], ids=lambda s: type(s).__name__)
def test_the_least_loss_is_what_p_losses_gives_a_perfect_network(gaussian, schedule, objective, weighting):
    if isinstance(schedule, Flow) and isinstance(objective, Eps):
        pytest.skip("refused")
    diffusion = diffusion_of(schedule, objective, weighting)
    curves = measure(diffusion, gaussian)
    mixture = Mixture(MEAN[None], STD)
    row = 400
    t = schedule.time(curves.u[row : row + 1])
    alpha, sigma = curves.alpha[row], curves.sigma[row]
    a, b = objective.row(alpha, sigma)

    def perfect(x, condition):
        x_t = x.double() / objective.input_scale(alpha, sigma) if diffusion.scaled else x.double()
        x0 = mixture(x_t.flatten(1), Level(0.0, float(alpha), float(sigma))).view(x.shape)
        return a * x0 + b * (x_t - alpha * x0) / sigma

    N = 20_000
    x0 = mixture.sample(N, torch.Generator().manual_seed(0)).view(N, 1, 1, -1)
    noise = torch.randn(x0.shape, dtype=torch.float64)
    times = t.repeat(N) if t.dtype == torch.int64 else t.float().repeat(N)
    losses = diffusion.p_losses(perfect, x0, times, noise).double()
    standard_error = float(losses.std()) / math.sqrt(N)
    assert standard_error < 0.01 * curves.loss[row]
    assert abs(float(losses.mean() - curves.loss[row])) < 4 * standard_error


@pytest.mark.parametrize(
    ("schedule", "skip"),
    [(Linear(beta_end=0.002), 0), (Linear(beta_end=0.01), 0), (Linear(), 600), (Karras(sigma_max=3.0), 0)],
)
def test_miss_is_where_a_perfect_sampler_ends(gaussian, schedule, skip):
    """The sampler is linear in x, so that the images of 0 and of 1 tell its mean and its variance."""
    mixture = Mixture(MEAN[None], STD)
    sampler = Heun(steps=1000, spacing="linspace", clip=False)
    first = sampler.path(schedule)[skip]
    start = torch.stack([torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)])
    for step in sampler(mixture, schedule, start, lambda: torch.zeros(0), skip):
        end = step.x
    noise = schedule.prior_std(first)
    std, mean = (end[1] - end[0]).abs() * noise, end[0]
    missed = ((std - STD) ** 2 + (mean - MEAN) ** 2).sum() / (STD**2).sum()
    assert gaussian.miss(first.alpha, first.sigma, noise) == pytest.approx(float(missed), rel=0.01)


def test_a_perfect_start_misses_nothing(gaussian):
    assert gaussian.miss(0.0, 1.0, 1.0) == 0
    assert gaussian.miss(1e-4, 1.0, 1.0) < 1e-7


def test_the_finite_sets_loss_is_the_integral_for_two_points():
    """x0 = -1 or 1: mmse = 1 - E tanh(snr + sqrt(snr) z)."""
    diffusion = diffusion_of(Cosine(), X0())
    images = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    curves = measure(diffusion, Spectrum(images))
    finite = finite_loss(diffusion, images, curves, torch.Generator().manual_seed(0))
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = (-(z**2) / 2).exp() / math.sqrt(2 * math.pi) * 1e-3
    compared = 0
    for row, loss, error in zip(finite.rows, finite.loss, finite.standard_error, strict=True):
        snr = float(curves.alpha[row] / curves.sigma[row]) ** 2
        exact = 1 - float((density * (snr + math.sqrt(snr) * z).tanh()).sum())
        if exact > 0.01:  # below, the error is rare large errors, which so few draws do not see
            assert abs(loss - exact) < 4 * error + 1e-6
            compared += 1
        else:
            assert loss < 0.02
    assert compared > 15


def test_the_finite_set_lies_below_the_gaussian_and_meets_it_in_noise(digits):
    diffusion = diffusion_of(Cosine(), Eps())
    curves = measure(diffusion, Spectrum(digits))
    finite = finite_loss(diffusion, digits, curves, torch.Generator().manual_seed(0))
    gaussian = curves.loss[finite.rows]
    loss, error = torch.tensor(finite.loss), torch.tensor(finite.standard_error)
    assert (loss < gaussian + 4 * error).all()
    assert (loss[:8] < 0.2 * gaussian[:8]).all()  # one image is nearer than the others
    assert abs(loss[-2] / gaussian[-2] - 1) < 4 * error[-2] / gaussian[-2]
    assert error[-2] < 0.03 * gaussian[-2]


def test_uniform_draws_spend_the_same_on_each_bin(gaussian):
    diffusion = diffusion_of(Linear(), Eps())
    training = spend(diffusion, measure(diffusion, gaussian))
    four_errors = 4 * math.sqrt(1 / BINS / DRAWS)
    for shares in (training.draws, training.weighted):
        torch.testing.assert_close(shares, torch.full((BINS,), 1 / BINS).double(), rtol=0, atol=four_errors)


def test_log_normal_draws_are_where_edm_puts_them(gaussian):
    diffusion = diffusion_of(Karras(), Edm(), density=LogNormal())
    training = spend(diffusion, measure(diffusion, gaussian))
    edges = Karras().time(torch.linspace(0, 1, BINS + 1, dtype=torch.float64))
    below = torch.special.ndtr((edges.log() + 1.2) / 1.2)
    below[0], below[-1] = 0, 1
    torch.testing.assert_close(training.draws, below.diff(), rtol=0, atol=4 * math.sqrt(0.1 / DRAWS))


@pytest.mark.parametrize("weighting", [MinSNR(), P2(), SigmoidWeighting()])
def test_weighted_and_remaining_shares_are_sums_over_the_chain(gaussian, weighting):
    schedule = Linear()
    diffusion = diffusion_of(schedule, V(), weighting)
    curves = measure(diffusion, gaussian)
    training = spend(diffusion, curves)
    w = curves.loss / curves.mmse / (curves.alpha**2 + curves.sigma**2) * curves.sigma**2  # d = 1 for v
    for values, shares in ((w, training.weighted), (curves.loss, training.loss)):
        exact = values.view(BINS, -1).sum(1) / values.sum()
        torch.testing.assert_close(shares, exact, rtol=0.04, atol=2e-4)
    wasted = float(w[curves.wasted].sum() / w.sum())
    assert training.wasted[1] == pytest.approx(wasted, rel=0.02, abs=1e-4)
    assert training.wasted[0] == pytest.approx(float(curves.wasted.double().mean()), abs=0.002)


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="Sigmoid has no finite weight at t=99"):
        diffusion_of(Linear(zero_terminal_snr=True), V(), SigmoidWeighting())


def test_images_that_are_all_the_same_are_refused():
    with pytest.raises(ValueError, match="all the same"):
        Spectrum(torch.full((9, 1, 2, 2), 0.3))


SCHEDULES = [
    (Linear(), {"destroyed_too_early"}),
    (Linear(beta_end=0.2), {"destroyed_too_early"}),
    (Linear(zero_terminal_snr=True), {"destroyed_too_early"}),
    (Linear(beta_end=0.002), {"terminal_snr_too_high", "gentle"}),
    (Linear(beta_end=0.01), {"terminal_snr_too_high"}),
    (Linear(num_timesteps=100), {"terminal_snr_too_high", "gentle"}),
    (Linear(num_timesteps=10_000), {"destroyed_too_early", "gentle_steps"}),
    (ScaledLinear(), {"terminal_snr_too_high"}),
    (Quadratic(), {"terminal_snr_too_high"}),
    (Laplace(), {"terminal_snr_too_high"}),
    (Laplace(zero_terminal_snr=True), {"nothing_wrong"}),
    (Cosine(), {"nothing_wrong"}),
    (Cosine(num_timesteps=50), {"nothing_wrong"}),
    (Cosine(num_timesteps=10_000), {"gentle_steps"}),
    (Sigmoid(), {"nothing_wrong"}),
    (Sigmoid(start=-9.0), {"gentle"}),
    (Flow(), {"nothing_wrong"}),
    (Karras(), {"destroyed_too_early"}),
    (Karras(sigma_max=80.0, sigma_min=1e-5), {"destroyed_too_early", "gentle"}),
    (Karras(sigma_max=20.0), {"terminal_snr_too_high"}),
    (VE(), {"destroyed_too_early"}),
    (VE(sigma_min=1e-4), {"gentle"}),
]


@pytest.mark.parametrize(("schedule", "names"), SCHEDULES)
def test_each_schedule_gets_the_words_it_deserves(digits, schedule, names):
    diffusion = diffusion_of(schedule)
    spectrum = Spectrum(digits)
    curves = measure(diffusion, spectrum)
    sentences = words(diffusion, spectrum, curves, spend(diffusion, curves))
    assert {s["name"] for s in sentences} == names
    for s in sentences:
        assert s["sentence"].endswith(".")
        assert all(math.isfinite(v) for v in s["numbers"].values())


def test_the_numbers_behind_the_words(digits):
    def numbers(schedule):
        diffusion = diffusion_of(schedule)
        curves = measure(diffusion, spectrum)
        return words(diffusion, spectrum, curves, spend(diffusion, curves))[0]

    spectrum = Spectrum(digits)
    early = numbers(Linear())
    assert early["numbers"]["share"] == pytest.approx(0.447, abs=0.003)
    assert early["numbers"]["from_t"] == round(1000 * (1 - early["numbers"]["share"]))
    assert early["numbers"]["share_of_draws"] == pytest.approx(early["numbers"]["share"], abs=0.003)
    assert "The last 45% of the steps are wasted" in early["sentence"]
    terminal = numbers(Linear(beta_end=0.002))
    abar = float(Linear(beta_end=0.002).alphas_cumprod[-1])
    assert terminal["numbers"]["alpha_over_sigma"] == pytest.approx(math.sqrt(abar / (1 - abar)), rel=1e-12)
    assert terminal["numbers"]["missed"] == pytest.approx(0.104, abs=0.003)
    assert "alpha / sigma = 0.733" in terminal["sentence"]
    good = numbers(Cosine())["numbers"]
    assert good["wasted"] == pytest.approx(0.14, abs=0.01)
    assert good["intact"] == pytest.approx(0.032, abs=0.003)


@pytest.mark.parametrize(
    ("schedule", "objective"),
    list(product([Linear(), Cosine(), Sigmoid(), Laplace(), Karras(), VE(), Flow()], OBJECTIVES)),
    ids=lambda part: type(part).__name__,
)
def test_every_schedule_with_every_objective_has_finite_curves(digits, schedule, objective):
    if isinstance(schedule, Flow) and isinstance(objective, Eps):
        with pytest.raises(ValueError, match="does not tell the image"):
            diffusion_of(schedule, objective)
        return
    curves = measure(diffusion_of(schedule, objective), Spectrum(digits))
    assert torch.isfinite(curves.loss).all()
    assert (curves.loss > 0).all()
    assert (curves.known.diff() <= 1e-12).all()
    assert float(curves.known[0]) > 0.9


def test_dissolving_images_go_from_image_to_noise(digits):
    curves = measure(diffusion_of(Karras()), Spectrum(digits))
    noise = torch.randn(2, 1, 8, 8)
    strip = dissolve(digits[:2], noise, curves)
    assert (strip.shape, strip.dtype) == ((2, 11, 1, 8, 8), torch.uint8)
    clean = (digits[:2] + 1) * 127.5
    assert (strip[:, 0].float() - clean).abs().max() <= 2  # sigma 0.002
    pure = ((noise + 1) * 127.5).clamp(0, 255)
    assert (strip[:, -1].float() - pure).abs().max() <= 3  # 1 / 80 of the image


def test_a_short_chain_fills_all_columns(digits):
    curves = measure(diffusion_of(Linear(num_timesteps=3)), Spectrum(digits))
    assert columns(curves) == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]


def test_numbers_read_well():
    assert [percent(v) for v in (0, 1, 0.447, 0.01, 0.0034, 1e-4, 1e-6)] == [
        *("0%", "100%", "45%", "1%", "0.3%", "0.01%", "<0.01%"),
    ]
    assert [time(v) for v in (1719, 100, 0.06206, 0)] == ["1,719", "100", "0.0621", "0"]
