"""DDIM is Euler in (x / alpha, sigma / alpha), and eta = 1 is the ancestral Euler of k-diffusion."""

from itertools import pairwise
from math import sqrt

import pytest
import torch

from src.diffusion.samplers import DDIM
from src.diffusion.schedules import Cosine, Linear


def denoise(x, level):
    return torch.tanh(x * 0.7 + level.sigma)


def ancestral_euler(x, path, eta, noise):
    """sample_euler_ancestral in its own words: sigma_up, sigma_down, d = (x - x0) / sigma, in coordinates x / alpha."""
    y = x / path[0].alpha
    for t, s in pairwise(path):
        sigma, sigma_next = t.sigma / t.alpha, s.sigma / s.alpha
        x0 = denoise(y * t.alpha, t)
        up = min(sigma_next, eta * sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
        down = sqrt(sigma_next**2 - up**2)
        y = y + (y - x0) / sigma * (down - sigma)
        if sigma_next > 0:
            y = y + noise() * up
        yield y * s.alpha


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_the_whole_path_is_k_diffusions(schedule, eta):
    draws = torch.randn(30, 4, 1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = DDIM(steps=20, eta=eta, spacing="karras", clip=False)
    path = sampler.path(schedule)
    ours = [step.x for step in sampler(denoise, schedule, start, iter(draws).__next__)]
    theirs = list(ancestral_euler(start, path, eta, iter(draws).__next__))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
