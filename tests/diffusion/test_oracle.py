"""Data whose denoiser is exact: the oracle, and on it every schedule, objective and sampler that fit together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from src.diffusion.continuous import VE, Flow, Karras
from src.diffusion.densities import Uniform
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.levels import CLEAN, Level
from src.diffusion.objectives import X0, Edm, Eps, V
from src.diffusion.objectives import Flow as FlowObjective
from src.diffusion.oracle import Mixture
from src.diffusion.samplers import DDIM, DDPM
from src.diffusion.schedules import Cosine, Laplace, Linear, Quadratic, ScaledLinear, Sigmoid
from src.diffusion.solvers import DPMSolverPP, Heun, Midpoint, UniPC
from src.diffusion.weightings import Constant

DISCRETE = {
    **{cls.__name__: cls() for cls in (Linear, ScaledLinear, Quadratic, Cosine, Sigmoid, Laplace)},
    "Linear_zero_terminal_snr": Linear(zero_terminal_snr=True),
}
SCHEDULES = {**DISCRETE, "karras": Karras(), "ve": VE(), "flow": Flow(), "flow_shift_3": Flow(shift=3.0)}
OBJECTIVES = {
    "eps": Eps(),
    "x0": X0(),
    "v": V(),
    "flow": FlowObjective(),
    "edm": Edm(),
    "edm_unit": Edm(sigma_data=1.0),
}
SAMPLERS = {
    "ddpm": DDPM(spacing="linspace"),
    "ddpm_beta": DDPM(spacing="linspace", variance="beta"),
    "ddim": DDIM(spacing="linspace"),
    "ddim_half": DDIM(spacing="linspace", eta=0.5),
    "euler_ancestral": DDIM(spacing="karras", eta=1.0),
    "heun": Heun(spacing="karras"),
    "heun_churn": Heun(spacing="karras", s_churn=5.0),
    "midpoint": Midpoint(spacing="linspace"),
    "dpmpp_2m": DPMSolverPP(spacing="log_snr"),
    "dpmpp_2m_heun": DPMSolverPP(spacing="log_snr", solver_type="heun"),
    "dpmpp_2m_sde": DPMSolverPP(spacing="log_snr", eta=1.0),
    "dpmpp_3m": DPMSolverPP(spacing="log_snr", order=3),
    "unipc": UniPC(spacing="log_snr"),
}
WEIGHTS = torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The oracle ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_denoiser_is_bayes_rule_by_quadrature(name):
    """Catches a posterior mean without its weights, or that is exact for one scale of a schedule only; to 1e-9.

    E[x0 | x] = integral of x0 p(x0) N(x; alpha x0, sigma^2) over that of p(x0) N(x; alpha x0, sigma^2)
    """
    means, std = torch.tensor([[-0.8], [0.1], [0.7]], dtype=torch.float64), 0.2
    data = Mixture(means, std, WEIGHTS)
    x0 = torch.linspace(-2.5, 2.5, 50001, dtype=torch.float64)
    log_prior = (-0.5 * ((x0 - means) / std) ** 2 + WEIGHTS.log()[:, None]).logsumexp(0)
    path = SCHEDULES[name].levels(12, "linspace")[:-1]
    for level in (*path, SCHEDULES[name].levels(3, "log_snr")[1]):
        x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None] * (level.alpha**2 + level.sigma**2) ** 0.5
        posterior = (log_prior - 0.5 * ((x - level.alpha * x0) / level.sigma) ** 2).softmax(1)
        torch.testing.assert_close(data(x, level), (posterior * x0).sum(1, keepdim=True), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "std", [0.3, torch.tensor([[[0.1, 0.5], [1.0, 0.2]]], dtype=torch.float64)], ids=["one", "each"]
)
def test_density_and_tweedies_formula(std):
    """Catches a normaliser that is missing, a std that broadcasts over components, and a denoiser of another density.

    The density by torch.distributions; E[x0 | x] = (x + sigma^2 grad ln p(x)) / alpha (Robbins 1956, Miyasawa 1961).
    """
    means = normal(3, 1, 2, 2)
    data = Mixture(means, std, WEIGHTS)
    for schedule in SCHEDULES.values():
        for level in schedule.levels(6, "trailing"):
            variance = (level.alpha * torch.ones(1, 2, 2, dtype=torch.float64) * std) ** 2 + level.sigma**2
            components = Independent(Normal(level.alpha * means, variance.sqrt().expand(3, 1, 2, 2)), 3)
            reference = MixtureSameFamily(Categorical(WEIGHTS / WEIGHTS.sum()), components)
            x = (0.7 * normal(7, 1, 2, 2, seed=1) * (level.alpha + level.sigma)).requires_grad_()
            log_density = reference.log_prob(x)
            torch.testing.assert_close(data.log_density(x, level), log_density, rtol=0, atol=1e-10)
            if level.alpha > 1e-4 and level is not CLEAN:
                (score,) = torch.autograd.grad(log_density.sum(), x)
                tweedie = (x + level.sigma**2 * score) / level.alpha
                torch.testing.assert_close(data(x, level), tweedie, rtol=0, atol=1e-9)


def test_a_finite_set_is_its_nearest_image_without_noise_and_its_mean_without_signal():
    """Catches an overflow where sigma is small, and a division by it; both ends, and the tie in the middle."""
    images = normal(5, 3, 8, 8)
    data = Mixture(images)
    tiny = Level(0.0, 1.0, 2e-4)
    torch.testing.assert_close(data(images + 0.01 * normal(5, 3, 8, 8, seed=1), tiny), images, rtol=0, atol=1e-12)
    pure = Level(0.0, 0.0, 1.0)
    torch.testing.assert_close(data(normal(4, 3, 8, 8), pure), images.mean(0).expand(4, -1, -1, -1), rtol=0, atol=1e-12)
    weighted = Mixture(images[:3], weights=WEIGHTS)
    mean = torch.einsum("k,kchw->chw", WEIGHTS / 8, images[:3])
    torch.testing.assert_close(weighted(normal(1, 3, 8, 8), pure)[0], mean, rtol=0, atol=1e-12)
    between = (images[:1] + images[1:2]) / 2
    torch.testing.assert_close(data(between, Level(0.0, 1.0, 0.1)), between, rtol=0, atol=1e-10)


@pytest.mark.parametrize("level", [Level(0.0, 0.9, 0.6), Level(0.0, 1.0, 2.0), Level(0.0, 0.3, 0.7)])
def test_a_finite_set_is_the_weighted_mean_of_its_images(level):
    """Eq. 3 and App. B.3 of Karras et al. 2022, written as its sum over images."""
    images, x = normal(6, 1, 2, 2), normal(4, 1, 2, 2, seed=1)
    expected = []
    for noisy in x:
        weights = [
            np.exp(-((noisy - level.alpha * image) ** 2).sum().item() / (2 * level.sigma**2)) for image in images
        ]
        expected.append(sum(w * image for w, image in zip(weights, images, strict=True)) / sum(weights))
    torch.testing.assert_close(Mixture(images)(x, level), torch.stack(expected), rtol=0, atol=1e-12)


def test_each_image_has_its_own_level_and_its_own_components():
    """Catches levels that are those of the first image, and labels that narrow the batch instead of each image."""
    data, x = Mixture(normal(3, 1, 2, 2), 0.3, WEIGHTS), normal(4, 1, 2, 2, seed=1)
    alpha = torch.tensor([1.0, 0.9, 0.5, 0.0], dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.4, 3.0, 1.0], dtype=torch.float64)
    together = data.denoise(x, alpha, sigma)
    for i in range(4):
        alone = data(x[i : i + 1], Level(0.0, alpha[i].item(), sigma[i].item()))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-13)
    among = torch.tensor([[True, False, True], [True, True, True], [False, False, True], [False, True, True]])
    labelled = data.denoise(x, alpha, sigma, among)
    for i in range(4):
        kept = Mixture(data.means.view(3, 1, 2, 2)[among[i]], 0.3, WEIGHTS[among[i]])
        alone = kept.denoise(x[i : i + 1], alpha[i : i + 1], sigma[i : i + 1])
        torch.testing.assert_close(labelled[i : i + 1], alone, rtol=0, atol=1e-12)


def test_float32_images_are_denoised_in_float64():
    """Catches a level that is rounded with the images: half-way between two of them those digits decide."""
    images = normal(2, 3, 8, 8)
    data = Mixture(images)
    for level in (Level(0.0, 0.99, 0.003), Level(0.0, 0.3, 0.01)):
        x = (level.alpha * images.mean(0, keepdim=True)).float()
        answer = data(x, level)
        assert answer.dtype == torch.float32
        torch.testing.assert_close(answer.double(), data(x.double(), level), rtol=0, atol=3e-7)
        torch.testing.assert_close(data.log_density(x, level), data.log_density(x.double(), level), rtol=0, atol=1e-12)


def test_samples_have_the_moments_of_the_mixture():
    """Catches weights that are ignored, or a variance for a standard deviation; to 4 standard errors."""
    means, std = normal(3, 1, 1, 2), torch.tensor([0.5, 0.1], dtype=torch.float64)
    n = 40000
    x = Mixture(means, std, WEIGHTS).sample(n, torch.Generator().manual_seed(0))
    assert x.shape == (n, 1, 1, 2)
    x, means, w = x.flatten(1), means.flatten(1), WEIGHTS / WEIGHTS.sum()
    mean = w @ means
    covariance = std.square().diag() + (w[:, None] * (means - mean)).T @ (means - mean)
    assert ((x.mean(0) - mean).abs() < 4 * (covariance.diag() / n).sqrt()).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None]
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / n**0.5).all()


# On the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_solves_back_at_a_thousand_levels_of_every_schedule(objective, schedule):
    """Catches a wrong d under schedules that do not preserve the variance; to 1e-10 in float64."""
    objective, (alpha, sigma) = OBJECTIVES[objective], SCHEDULES[schedule].table()
    assert len(alpha) == 1000
    if isinstance(objective, Eps):  # tells nothing where there is no signal
        alpha, sigma = alpha[alpha > 0], sigma[alpha > 0]
    alpha, sigma = alpha[:, None], sigma[:, None]
    x0, eps = normal(2, len(alpha), 8)
    x_t = alpha * x0 + sigma * eps
    F = objective.target(x0, eps, alpha, sigma)
    torch.testing.assert_close(objective.x0(x_t, F, alpha, sigma), x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(objective.eps(x_t, F, alpha, sigma), eps, rtol=0, atol=1e-10)
    for i in range(0, len(alpha), 37):
        level = (alpha[i].item(), sigma[i].item())
        torch.testing.assert_close(objective.x0(x_t[i], F[i], *level), x0[i], rtol=0, atol=1e-10)
        torch.testing.assert_close(objective.eps(x_t[i], F[i], *level), eps[i], rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_edm_with_unit_data_is_minus_v(schedule):
    """Table 1 of Karras et al. 2022 is v-prediction, up to the sign, where the data has the noise's variance."""
    alpha, sigma = (v[:, None] for v in SCHEDULES[schedule].table())
    x0, eps = normal(2, len(alpha), 8)
    torch.testing.assert_close(
        Edm(1.0).target(x0, eps, alpha, sigma), -V().target(x0, eps, alpha, sigma), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(Edm(1.0).input_scale(alpha, sigma), V().input_scale(alpha, sigma), rtol=1e-15, atol=0)
    if schedule in DISCRETE:  # variance preserving: v is the paper's own
        torch.testing.assert_close(V().target(x0, eps, alpha, sigma), alpha * eps - sigma * x0, rtol=0, atol=1e-12)


CORNERS = torch.tensor([[1, 1, -1, -1], [-1, 1, 1, -1], [-1, -1, -1, -1], [1, -1, 1, 1]], dtype=torch.float64)
FINITE = Mixture(CORNERS.view(4, 1, 2, 2))


def perfect(schedule, objective):
    """The network that has learned all there is of the finite set, as `GaussianDiffusion` calls it."""

    def net(x, t):
        alpha, sigma = schedule.told(t)
        level = [v.view(-1, 1, 1, 1) for v in (alpha, sigma)]
        x_t = x / objective.input_scale(*level)
        x0 = FINITE.denoise(x_t, alpha, sigma)
        return objective.target(x0, (x_t - level[0] * x0) / level[1], *level)

    return net


@pytest.fixture
def float64():
    """The network is told times in the default precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def walk(sampler, schedule, denoise):
    path = sampler.path(schedule)
    noise = iter(normal(len(path), 48, 1, 2, 2, seed=1))
    return [step.x for step in sampler(denoise, schedule, normal(48, 1, 2, 2) * path[0].sigma, lambda: next(noise))]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_reaches_the_data_with_every_schedule_and_objective(sampler, schedule):
    """Catches parts that do not fit: a level told wrongly, an input in another scale, a wrong inverse.

    Networks of all objectives give the trajectory of the oracle itself to 1e-8, and it ends at the images, at all four
    of them.
    """
    schedule, sampler = SCHEDULES[schedule], replace(SAMPLERS[sampler], steps=20, clip=False)
    states = walk(sampler, schedule, FINITE)
    distance = torch.cdist(states[-1].flatten(1), CORNERS)
    assert distance.min(1).values.max() < (1e-6 if not isinstance(sampler, Midpoint) else 1e-3)
    assert distance.argmin(1).unique().tolist() == [0, 1, 2, 3]
    for objective in OBJECTIVES.values():
        if isinstance(objective, Eps) and schedule.table()[0][-1] == 0:
            with pytest.raises(ValueError, match="Eps does not tell the image"):
                GaussianDiffusion(schedule, objective, Constant(), Uniform())
            continue
        diffusion = GaussianDiffusion(schedule, objective, Constant(), Uniform())
        for a, b in zip(walk(sampler, schedule, diffusion.denoiser(perfect(schedule, objective))), states, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
