"""What is known of a lesson's images before anything is trained, in closed form."""

from typing import Any

import torch
from torch import Tensor

from src.build import build
from src.data.loader import normalize
from src.diffusion.levels import Level
from src.diffusion.oracle import Mixture
from src.diffusion.schedules import DiscreteSchedule
from src.evaluation.preview import Spectrum, measure
from src.randomness import generator
from src.runs import build_diffusion

CANDIDATES = 200  # times that a noisy image may be of
IMAGES = 64  # that are made noisy at each time


def training_images(config: dict[str, Any]) -> Tensor:
    """(N, C, H, W) in [-1, 1]."""
    data = build(config["data"], "data")
    data.setup()
    return normalize(data.train.images)


def of_schedule(config: dict[str, Any], images: Tensor) -> dict[str, float]:
    """Of a run's schedule: alpha at its end; the share of steps that are wasted, and what the wrong start misses.

    Both shares are those of src.preview, which says how they are defined.
    """
    diffusion = build_diffusion(config)
    spectrum = Spectrum(images)
    curves = measure(diffusion, spectrum)
    alpha, sigma = float(curves.alpha[-1]), float(curves.sigma[-1])
    return {
        "alpha": alpha,
        "wasted": float(curves.wasted.double().mean()),
        "missed": spectrum.miss(alpha, sigma, 1.0),
    }


def guess_of_time(schedule: DiscreteSchedule, images: Tensor, times: list[int]) -> list[float]:
    """How well x_t alone tells t: at each of the times, the root mean square error of the best guess, in steps.

    The images are taken as all there are, so that the density p(x | t) of noisy ones is known (`Mixture`). With all t
    equally likely beforehand, the best guess is the mean of p(t | x).
    """
    oracle = Mixture(images.double())
    shape = (IMAGES, *images.shape[1:])
    x0 = images[torch.randint(len(images), (IMAGES,), generator=generator(1, 0))].double()
    noise = torch.randn(shape, generator=generator(2, 0), dtype=torch.float64)
    x = torch.cat([float(schedule.alpha[t]) * x0 + float(schedule.sigma[t]) * noise for t in times])
    T = schedule.num_timesteps
    candidates = ((torch.arange(CANDIDATES) + 0.5) * T / CANDIDATES).long().unique()
    levels = [Level(float(t), float(schedule.alpha[t]), float(schedule.sigma[t])) for t in candidates]
    log_p = torch.stack([oracle.log_density(x, level) for level in levels], dim=1)  # (times * IMAGES, CANDIDATES)
    guess = log_p.softmax(1) @ candidates.double()
    error = guess.view(len(times), IMAGES) - torch.tensor(times, dtype=torch.float64)[:, None]
    return error.square().mean(1).sqrt().tolist()
