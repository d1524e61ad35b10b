"""Every step of a chain against diffusers: same start, same noise, same network, each side following its own state.

diffusers keeps its tables in float32, in which 1 - alphas_cumprod near t = 0 has three good digits: that moves a
chain by up to 1e-3, as one test says. The others lend diffusers the float64 table; the formulas then agree to 1e-10.
"""

from itertools import pairwise

import pytest
import torch
from diffusers.schedulers import DDIMScheduler, DDPMScheduler, scheduling_ddpm

from src.diffusion.densities import Uniform
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.objectives import Eps, V
from src.diffusion.samplers import DDIM, DDPM
from src.diffusion.schedules import Cosine, Linear
from src.diffusion.weightings import Constant

SHAPE = (2, 3, 8, 8)
OBJECTIVES = {"epsilon": Eps(), "v_prediction": V()}
SCHEDULES = {"linear": Linear(1000, 1e-4, 0.02), "squaredcos_cap_v2": Cosine(1000)}
VARIANCES = {"fixed_small": "posterior", "fixed_large": "beta"}
SPACINGS = ["leading", "linspace", "trailing"]
TOLERANCE = 1e-10


def net(x, t):
    """Fixed and non-linear, mixes neighbours, channels and t, and tracks x enough for chains to stay of order 1."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 3, 3, 3, generator=g, dtype=torch.float64) / 5
    return 0.8 * x + 0.3 * torch.tanh(torch.nn.functional.conv2d(x, weight, padding=1) + t.view(-1, 1, 1, 1) / 500)


def fixed_noise():
    g = torch.Generator().manual_seed(0)
    return lambda: torch.randn(SHAPE, generator=g, dtype=torch.float64)


def ours(sampler, beta_schedule, prediction):
    """The state after every step."""
    schedule = SCHEDULES[beta_schedule]
    diffusion = GaussianDiffusion(schedule, OBJECTIVES[prediction], Constant(), Uniform())
    noise = fixed_noise()
    return [step.x for step in sampler(diffusion.denoiser(net), schedule, noise(), noise)]


def assert_every_step_agrees(a, b, tolerance=TOLERANCE):
    assert len(a) == len(b)
    differences = [(x - y).abs().max().item() for x, y in zip(a, b, strict=True)]
    assert max(differences) <= tolerance, f"step {differences.index(max(differences)) + 1}: {max(differences)}"


def their_ddpm(monkeypatch, steps, beta_schedule, prediction, float32_table=False, **config):
    scheduler = DDPMScheduler(1000, 1e-4, 0.02, beta_schedule=beta_schedule, prediction_type=prediction, **config)
    if not float32_table:
        scheduler.alphas_cumprod = SCHEDULES[beta_schedule].alphas_cumprod
    scheduler.set_timesteps(steps)
    noise = fixed_noise()
    x, states = noise(), []

    def randn_tensor(*_, **__):
        # diffusers makes a noisy sample of the last step where it leaves from t > 0, as "trailing" does.
        return noise() if len(states) < steps - 1 else torch.zeros(SHAPE, dtype=torch.float64)

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", randn_tensor)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.expand(len(x)).float()), int(t), x).prev_sample
        states.append(x)
    return states


def their_ddim(steps, prediction, spacing, clip, eta):
    scheduler = DDIMScheduler(
        1000, 1e-4, 0.02, "linear", clip_sample=clip, prediction_type=prediction, timestep_spacing=spacing
    )
    scheduler.alphas_cumprod = SCHEDULES["linear"].alphas_cumprod
    scheduler.set_timesteps(steps)
    noise = fixed_noise()
    x, states = noise(), []
    for t, s in pairwise([*scheduler.timesteps.tolist(), -1]):
        if spacing == "linspace":
            # diffusers goes down by T // steps whatever the spacing, and misses its own next time: tell it the gap.
            scheduler.num_inference_steps = 1000 // (t - s)
        z = noise() if eta and s >= 0 else torch.zeros(SHAPE, dtype=torch.float64)
        F = net(x, torch.full((len(x),), float(t)))
        # Once x0 is clipped, eps must follow it, as in Glide; left alone, the two contradict each other.
        x = scheduler.step(F, t, x, eta=eta, use_clipped_model_output=True, variance_noise=z).prev_sample
        states.append(x)
    return states


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_tables_are_those_of_diffusers_to_float32(beta_schedule):
    """Catches a schedule that is not the one that imported weights were trained on."""
    theirs, schedule = DDPMScheduler(1000, 1e-4, 0.02, beta_schedule=beta_schedule), SCHEDULES[beta_schedule]
    torch.testing.assert_close(theirs.betas.double(), schedule.betas, rtol=0, atol=1e-7)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spaced_times_are_those_of_diffusers(spacing):
    """Catches a spacing that is another's, or off by one; steps that divide T, where diffusers' own are sound."""
    scheduler = DDIMScheduler(1000, timestep_spacing=spacing)
    for steps in (2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500, 1000):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == Linear(1000).timesteps(steps, spacing), steps


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [True, False])
def test_ddpm_agrees_at_all_1000_steps(monkeypatch, beta_schedule, prediction, variance, clip):
    """Catches any difference in mean, variance, clipping, order of noise, or the objective's inverse."""
    theirs = their_ddpm(monkeypatch, 1000, beta_schedule, prediction, variance_type=variance, clip_sample=clip)
    assert len(theirs) == 1000
    assert_every_step_agrees(ours(DDPM(variance=VARIANCES[variance], clip=clip), beta_schedule, prediction), theirs)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_respaced_ddpm_agrees_at_every_step(monkeypatch, spacing, variance):
    """Catches a respaced chain that uses beta_t of the full chain, or tells the network another time."""
    theirs = their_ddpm(monkeypatch, 50, "linear", "epsilon", variance_type=variance, timestep_spacing=spacing)
    sampler = DDPM(steps=50, spacing=spacing, variance=VARIANCES[variance])
    assert_every_step_agrees(ours(sampler, "linear", "epsilon"), theirs)


def test_ddpm_agrees_with_diffusers_as_shipped(monkeypatch):
    """Catches a table lent above that hides a real difference: with float32 tables the chain still ends within 1e-3."""
    theirs = their_ddpm(monkeypatch, 1000, "linear", "epsilon", float32_table=True)
    states = ours(DDPM(), "linear", "epsilon")
    assert_every_step_agrees(states[:500], theirs[:500], tolerance=1e-5)  # t >= 500, where float32 holds sigma well
    assert_every_step_agrees(states, theirs, tolerance=1e-3)


@pytest.mark.parametrize(
    ("steps", "spacing"),
    [*((50, spacing) for spacing in SPACINGS), (1000, "trailing")],  # 1000 are all times in any
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_agrees_at_every_step(steps, spacing, prediction, eta, clip):
    """Catches any difference in Eq. 12 and 16 of Song et al. 2021, the path's end, or eps after clipping."""
    theirs = their_ddim(steps, prediction, spacing, clip, eta)
    sampler = DDIM(steps=steps, spacing=spacing, clip=clip, eta=eta)
    assert_every_step_agrees(ours(sampler, "linear", prediction), theirs)
