"""Edits with denoisers that are known in closed form, under schedules of every kind."""

from math import hypot, sqrt

import numpy as np
import pytest
import torch

from src.diffusion.continuous import Flow, Karras
from src.diffusion.editing import adds_noise, inpaint, invert, no_noise, noised, slerp
from src.diffusion.guidance import CFGPP
from src.diffusion.oracle import Mixture
from src.diffusion.samplers import DDIM, DDPM
from src.diffusion.schedules import Cosine, Linear
from src.diffusion.solvers import DPMSolverPP, Heun, UniPC

SCHEDULES = {"linear": (Linear(), "trailing"), "karras": (Karras(), "karras"), "flow": (Flow(), "linspace")}
SHAPE = (1, 2, 2)  # of an image


def two_modes(std: float = 0.3) -> Mixture:
    """Images of four numbers, all near -0.6 or all near 0.6: one half tells the other."""
    return Mixture(torch.tensor([-0.6, 0.6], dtype=torch.float64)[:, None, None, None].expand(2, *SHAPE), std)


def draws(n: int, seed: int = 0):
    """A source of noise, (n, *SHAPE) float64."""
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(n, *SHAPE, generator=g, dtype=torch.float64)


def painted(denoise, sampler, schedule, known, mask, n, **settings):
    noise = draws(n)
    x = noise() * schedule.prior_std(sampler.path(schedule)[0])
    return list(inpaint(denoise, sampler, schedule, x, known, mask, noise, **settings))


RIGHT = torch.tensor([False, True]).expand(SHAPE)  # to be painted


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", [DDIM, DDPM], ids=lambda s: s.__name__)
def test_what_is_kept_is_kept_to_the_bit(name, sampler):
    schedule, spacing = SCHEDULES[name]
    known = two_modes().sample(8, torch.Generator().manual_seed(1))
    last = painted(two_modes(), sampler(steps=10, spacing=spacing), schedule, known, RIGHT, 8, resample=2)[-1].x
    assert torch.equal(last[..., 0], known[..., 0])
    assert not torch.isclose(last[..., 1], known[..., 1]).any()


@pytest.mark.parametrize("name", SCHEDULES)
def test_of_a_finite_set_the_image_is_completed_that_has_the_kept_part(name):
    schedule, spacing = SCHEDULES[name]
    images = torch.randint(0, 2, (12, 1, 4, 4), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, 2:, 2:] = True
    kept = (images * ~mask).flatten(1)
    assert len(kept.unique(dim=0)) == 12
    g = torch.Generator().manual_seed(2)

    def noise():
        return torch.randn(12, 1, 4, 4, generator=g, dtype=torch.float64)

    sampler = DDIM(steps=50, spacing=spacing, eta=1.0)
    x = noise() * schedule.prior_std(sampler.path(schedule)[0])
    known = torch.where(mask, 0.0, images)
    *_, last = inpaint(Mixture(images), sampler, schedule, x, known, mask, noise, resample=5, jump=5)
    torch.testing.assert_close(last.x, images, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_painted_part_comes_to_its_conditional_distribution(name):
    """A kept half at 0.1 makes the upper mode likelier by e^(2 * 2 * 0.1 * 0.6 / 0.3^2). A single pass knows nothing of
    that; resampling, which makes a Markov chain of each stretch, comes to it."""
    schedule, spacing = SCHEDULES[name]
    upper = 1 / (1 + np.exp(-2 * 2 * 0.1 * 0.6 / 0.3**2))
    n, mean = 1000, 0.6 * (2 * upper - 1)  # 0.522
    std = sqrt(0.6**2 + 0.3**2 - mean**2)  # 0.421
    known = torch.full((n, *SHAPE), 0.1, dtype=torch.float64)
    sampler = DDIM(steps=50, spacing=spacing, eta=1.0, clip=False)

    def painted_half(resample):
        return painted(two_modes(), sampler, schedule, known, RIGHT, n, resample=resample)[-1].x[..., 1]

    assert float(painted_half(1).mean()) < 0.15
    assert 0.25 < float(painted_half(10).mean()) < 0.4
    often = painted_half(50)
    assert abs(float(often.mean()) - mean) < 0.1
    assert abs(float(often.std()) - std) < 0.06


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("jump", [1, 3])
def test_going_up_and_down_again_leaves_the_noise_level(name, jump):
    """With nothing kept and a single image for data, for which ancestral steps are exact, x_s is alpha_s x0 + sigma_s z
    after every step, also of the walks that follow q(x_t | x_s)."""
    schedule, spacing = SCHEDULES[name]
    image = torch.full((1, *SHAPE), 0.2, dtype=torch.float64)
    sampler = DDIM(steps=20, spacing=spacing, eta=1.0)
    path, everything = sampler.path(schedule), torch.ones(SHAPE, dtype=torch.bool)
    n = 2000
    for step in painted(Mixture(image), sampler, schedule, torch.zeros(1), everything, n, resample=3, jump=jump):
        s = path[path.index(step.level) + 1]
        if s.sigma > 0:
            z = (step.x - s.alpha * 0.2) / s.sigma
            assert abs(float(z.mean())) < 5 / sqrt(4 * n)
            assert abs(float(z.std()) - 1) < 5 / sqrt(8 * n)


def test_a_stretch_is_walked_as_often_as_asked():
    schedule, sampler = Linear(), DDIM(steps=5)
    path = sampler.path(schedule)
    steps = painted(two_modes(), sampler, schedule, torch.zeros(1), RIGHT, 1, resample=2, jump=2)
    assert [path.index(step.level) for step in steps] == [0, 1, 0, 1, 2, 3, 2, 3, 4, 4]
    assert [step.index for step in steps] == list(range(1, 11))


def test_painting_everything_once_is_sampling():
    schedule, sampler = Linear(), DDIM(steps=10)
    everything = torch.ones(SHAPE, dtype=torch.bool)
    steps = painted(two_modes(), sampler, schedule, torch.zeros(1), everything, 4)
    sampled = list(sampler(two_modes(), schedule, draws(4)(), no_noise))
    assert torch.equal(steps[-1].x, sampled[-1].x)


@pytest.mark.parametrize("settings", [{"resample": 0}, {"jump": 0}])
def test_inpainting_refuses(settings):
    with pytest.raises(ValueError, match="must be at least 1"):
        painted(two_modes(), DDIM(steps=5), Linear(), torch.zeros(1), RIGHT, 1, **settings)


def translated(name: str, strength: float) -> float:
    """Root mean square of the change."""
    schedule, spacing = SCHEDULES[name]
    sampler, noise = DDIM(steps=50, spacing=spacing), draws(500, seed=3)
    x0 = two_modes().sample(500, torch.Generator().manual_seed(1)).clamp(-1, 1)
    x, skip = noised(sampler.path(schedule), x0, noise(), strength)
    *_, last = sampler(two_modes(), schedule, x, noise, skip)
    return float((last.x - x0).square().mean().sqrt())


@pytest.mark.parametrize("name", SCHEDULES)
def test_strength_goes_from_the_image_to_an_independent_one(name):
    changes = [translated(name, strength) for strength in (0.02, 0.3, 0.6, 1.0)]
    assert changes[0] < 0.1
    assert changes == sorted(changes)
    assert abs(changes[-1] - sqrt(2 * (0.36 + 0.09))) < 0.05  # two independent images


@pytest.mark.parametrize(("strength", "skip"), [(1.0, 0), (0.75, 5), (0.5, 10), (0.04, 19), (1e-9, 19)])
def test_strength_is_the_share_of_the_steps(strength, skip):
    path = DDIM(steps=20).path(Linear())
    x0, z = torch.full(SHAPE, 0.5), torch.full(SHAPE, -2.0)
    x, skipped = noised(path, x0, z, strength)
    assert skipped == skip
    torch.testing.assert_close(x, path[skip].alpha * x0 + path[skip].sigma * z)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01])
def test_strength_outside_its_range(strength):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        noised(DDIM(steps=20).path(Linear()), torch.zeros(SHAPE), torch.zeros(SHAPE), strength)


def test_slerp_keeps_the_length_and_divides_the_angle():
    a, b = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = b * a.norm() / b.norm()
    arc = slerp(a, b, torch.linspace(0, 1, 9, dtype=torch.float64))
    torch.testing.assert_close(arc.flatten(1).norm(dim=1), a.norm().expand(9))
    unit = arc.flatten(1) / a.norm()
    angles = (unit[1:] * unit[:-1]).sum(1).arccos()
    torch.testing.assert_close(angles, angles[:1].expand(8))


def test_the_ends_of_slerp_are_the_ends_to_the_bit():
    a, b = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    arc = slerp(a, b, torch.tensor([0, 0.3, 1], dtype=torch.float64))
    assert torch.equal(arc[0], a)
    assert torch.equal(arc[2], b)
    assert arc.dtype == torch.float32


def test_slerp_between_parallel_latents_is_the_line():
    a = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(a, 3 * a, torch.tensor([0.5], dtype=torch.float64))[0], 2 * a)


def round_trip(schedule, spacing, steps, iterations, denoise=None) -> float:
    """The largest error of reconstructions, in float64."""
    denoise = denoise or two_modes()
    sampler = DDIM(steps=steps, spacing=spacing, clip=False)
    x0 = two_modes().sample(64, torch.Generator().manual_seed(1))
    *_, inverted = invert(denoise, sampler, schedule, x0, iterations)
    *_, last = sampler(denoise, schedule, inverted.x, no_noise)
    return float((last.x - x0).abs().max())


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_error_of_a_reconstruction_falls_with_the_square_of_the_steps(name):
    steps = np.array([40, 80, 160, 320])
    errors = [round_trip(*SCHEDULES[name], int(n), iterations=1) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 1.6 < slope < 2.6, errors


@pytest.mark.parametrize("name", SCHEDULES)
def test_with_iterations_a_reconstruction_is_exact(name):
    errors = [round_trip(*SCHEDULES[name], 40, iterations) for iterations in (1, 2, 5, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 1e-3
    assert errors[3] < 1e-6


@pytest.mark.parametrize(
    "schedule", [Linear(zero_terminal_snr=True), Cosine(), Flow()], ids=["linear", "cosine", "flow"]
)
def test_inversion_reaches_levels_without_signal(schedule):
    """Where alpha is 0, or nearly, x0 does not depend on x_t; the fixed-point iteration of eps would not move."""
    assert round_trip(schedule, "trailing", 40, iterations=20) < 1e-6


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_inversion_of_a_sample_is_its_latent(name):
    schedule, spacing = SCHEDULES[name]
    sampler = DDIM(steps=40, spacing=spacing, clip=False)
    latent = draws(64)() * schedule.prior_std(sampler.path(schedule)[0])
    *_, sampled = sampler(two_modes(), schedule, latent, no_noise)
    *_, inverted = invert(two_modes(), sampler, schedule, sampled.x, iterations=30)
    torch.testing.assert_close(inverted.x / latent.std(), latent / latent.std(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_inversion_is_the_transport_of_the_ode(name):
    """For a Gaussian it multiplies by the ratio of the standard deviations (Sec. 4.3, Song et al. 2021)."""
    schedule, _ = SCHEDULES[name]
    gaussian = Mixture(torch.full((1, *SHAPE), 0.2, dtype=torch.float64), 0.5)
    x0 = torch.linspace(-0.8, 1.2, 11, dtype=torch.float64)[:, None, None, None].expand(11, *SHAPE)
    sampler = DDIM(steps=200, spacing="log_snr" if name != "flow" else "linspace", clip=False)
    first = sampler.path(schedule)[0]
    *_, inverted = invert(gaussian, sampler, schedule, x0)
    exact = first.alpha * 0.2 + (x0 - 0.2) / 0.5 * hypot(first.alpha * 0.5, first.sigma)
    torch.testing.assert_close(inverted.x / exact.std(), exact / exact.std(), atol=0.06, rtol=0)


def test_inversion_asks_every_noisy_level_once_and_none_that_is_clean():
    asked, mixture = [], two_modes()

    def denoise(x, level):
        asked.append(level)
        return mixture(x, level)

    sampler = DDIM(steps=12)
    steps = list(invert(denoise, sampler, Linear(), torch.zeros(1, *SHAPE, dtype=torch.float64)))
    assert asked == [step.level for step in steps] == sampler.path(Linear())[-2::-1]


def test_guidance_that_keeps_another_models_noise_is_inverted_too():
    upper, lower = (Mixture(torch.full((1, *SHAPE), v, dtype=torch.float64), 0.5) for v in (0.4, -0.4))
    assert round_trip(Linear(), "trailing", 40, iterations=30, denoise=CFGPP(scale=0.6)(upper, lower)) < 1e-6


@pytest.mark.parametrize(
    ("sampler", "iterations", "sentence"),
    [
        (DDIM(steps=5, eta=0.5), 1, "adds noise"),
        (DDPM(steps=5), 1, "adds noise"),
        (DDIM(steps=5), 0, "iterations=0 must be at least 1"),
        (DDIM(steps=1), 1, "choose more steps"),
    ],
    ids=str,
)
def test_inversion_refuses(sampler, iterations, sentence):
    with pytest.raises(ValueError, match=sentence):
        list(invert(two_modes(), sampler, Linear(), torch.zeros(1, *SHAPE), iterations))


@pytest.mark.parametrize(
    ("sampler", "noisy"),
    [
        (DDIM(), False),
        (DDIM(eta=0.1), True),
        (DDPM(steps=4), True),
        (Heun(), False),
        (Heun(s_churn=30.0, s_tmin=0.01, s_tmax=1.0), True),
        (DPMSolverPP(), False),
        (DPMSolverPP(eta=1.0), True),
        (UniPC(order=3), False),
    ],
    ids=str,
)
def test_samplers_that_add_noise_are_found_out(sampler, noisy):
    assert adds_noise(sampler, Linear()) is noisy
