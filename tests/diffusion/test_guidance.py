"""Classifier-free guidance: a scale of 1 is the conditional model and 0 the unconditional one, to the bit."""

import pytest
import torch

from src.diffusion.guidance import CFGPP, Autoguidance, ClassifierFree, Guess
from src.diffusion.samplers import DDIM
from src.diffusion.schedules import Linear

LEVELS = Linear().levels(10, "trailing")


def conditional(x, level):
    return (x * 0.3 + 0.1).cos()


def unconditional(x, level):
    return (x * 0.7 - 0.2).sin()


def refuse(x, level):
    raise AssertionError("a model was asked that has no say")


X = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))


def test_scale_one_is_the_conditional_model_and_asks_no_other():
    assert torch.equal(ClassifierFree(scale=1.0)(conditional, refuse)(X, LEVELS[0]), conditional(X, LEVELS[0]))


def test_scale_zero_is_the_unconditional_model_and_asks_no_other():
    assert torch.equal(ClassifierFree(scale=0.0)(refuse, unconditional)(X, LEVELS[0]).x0, unconditional(X, LEVELS[0]))


@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5])
def test_guiding_x0_is_guiding_eps(scale):
    """Eq. 6 of Ho & Salimans 2022 is stated for eps: (1 + w) eps_c - w eps_u with w = scale - 1."""
    level = LEVELS[4]
    x = X.double()

    def eps_of(x0):
        return (x - level.alpha * x0) / level.sigma

    guided = ClassifierFree(scale=scale)(conditional, unconditional)(x, level).x0
    expected = scale * eps_of(conditional(x, level)) - (scale - 1) * eps_of(unconditional(x, level))
    torch.testing.assert_close(eps_of(guided), expected, rtol=0, atol=1e-10)


def test_outside_its_interval_the_conditional_model_is_alone():
    level = LEVELS[5]
    ratio = level.sigma / level.alpha
    inside = ClassifierFree(scale=3.0, interval=(ratio * 0.9, ratio * 1.1))(conditional, unconditional)
    assert torch.equal(inside(X, level).x0, ClassifierFree(scale=3.0)(conditional, unconditional)(X, level).x0)
    for other in (LEVELS[0], LEVELS[9]):
        assert torch.equal(inside(X, other).x0, conditional(X, other))


def test_full_rescale_keeps_the_conditional_standard_deviation():
    level = LEVELS[3]
    guided = ClassifierFree(scale=5.0, rescale=1.0)(conditional, unconditional)(X, level).x0
    expected = conditional(X, level).flatten(1).std(1)
    torch.testing.assert_close(guided.flatten(1).std(1), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "arguments", [{"scale": -1.0}, {"interval": (2.0, 1.0)}, {"rescale": 1.5}], ids=["scale", "interval", "rescale"]
)
def test_settings_that_mean_nothing_are_refused(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        ClassifierFree(**arguments)


def test_cfg_pp_guides_the_image_and_leaves_the_noise_unconditional():
    """Algorithm 2 of Chung et al. 2024: x_s = alpha_s x0_guided + sigma_s eps_unconditional, also at a scale of 1."""
    t, s = LEVELS[4], LEVELS[5]
    x = X.double()
    for scale in (0.0, 0.6, 1.0):
        denoise = CFGPP(scale=scale)(conditional, unconditional)
        x_s, _ = DDIM(clip=False).step(denoise, x, t, s, lambda: x)
        x0 = (1 - scale) * unconditional(x, t) + scale * conditional(x, t)
        eps = (x - t.alpha * unconditional(x, t)) / t.sigma
        torch.testing.assert_close(x_s, s.alpha * x0 + s.sigma * eps, rtol=0, atol=1e-12)
    assert CFGPP(scale=1.0).active
    with pytest.raises(ValueError, match=r"scale=1\.5 of CFG\+\+ must lie between 0 and 1"):
        CFGPP(scale=1.5)


def test_cfg_pp_clips_both_guesses():
    t, s = LEVELS[4], LEVELS[5]
    big = lambda x, level: 5 * x  # noqa: E731
    x_s, x0 = DDIM(clip=True).step(CFGPP(scale=0.5)(big, lambda x, level: -5 * x), X.double(), t, s, lambda: X)
    eps = (X.double() - t.alpha * (-5 * X.double()).clamp(-1, 1)) / t.sigma
    torch.testing.assert_close(x_s, s.alpha * x0 + s.sigma * eps, rtol=0, atol=1e-12)


def test_autoguidance_is_the_same_line_through_two_models():
    level = LEVELS[4]
    guided = Autoguidance(scale=2.5, guide="weak.ckpt")(conditional, unconditional)(X, level).x0
    expected = unconditional(X, level) + 2.5 * (conditional(X, level) - unconditional(X, level))
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="guide= must name the weaker model"):
        Autoguidance(scale=2.0)


def test_guidance_keeps_the_strong_models_variance():
    v = torch.zeros(1)
    strong = lambda x, level: Guess(x, v=v)  # noqa: E731
    assert ClassifierFree(scale=2.0)(strong, unconditional)(X, LEVELS[3]).v is v
