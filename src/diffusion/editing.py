"""Editing with a denoiser and without training: inpainting, image to image, interpolation, inversion.

All of it on levels x = alpha x0 + sigma eps, and so the same under every schedule. What makes a sampler usable for an
edit is how it walks: inpainting and inversion go step by step (`StepSampler`); interpolation and inversion need a
sampler that adds no noise, for images to be a function of latents.
"""

from collections.abc import Iterator
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor

from src.diffusion.guidance import Denoiser
from src.diffusion.levels import Level, Schedule
from src.diffusion.samplers import Noise, Sampler, Step, StepSampler, beta, toward


def inpaint(
    denoise: Denoiser,
    sampler: StepSampler,
    schedule: Schedule,
    x: Tensor,
    known: Tensor,
    mask: Tensor,
    noise: Noise,
    resample: int = 1,
    jump: int = 1,
) -> Iterator[Step]:
    """RePaint (Algorithm 1, Lugmayr et al. 2022): after every step what is known takes its place, noised as far.

    A stretch of the path is walked `resample` times, going back up by q(x_t | x_s) in between, so that what is painted
    and what is known come to agree. At the end the known part is `known` itself.

    Args:
        x: (B, C, H, W) noise, at the first level of the sampler's path.
        known: (B, C, H, W) in [-1, 1].
        mask: bool, broadcasts to x: true where to paint anew.
        noise: gives a fresh z like x a call.
        resample: their U, at least 1, which is none.
        jump: steps of a stretch, at least 1; their j (App. B).

    Yields:
        resample steps for each of the path's.

    Raises:
        ValueError: when resample or jump is less than 1.
    """
    if resample < 1 or jump < 1:
        raise ValueError(f"resample={resample} and jump={jump} must be at least 1; Lugmayr et al. use 10 and 10")
    path, index = sampler.path(schedule), 0
    for start in range(0, len(path) - 1, jump):
        stretch = path[start : start + jump + 1]
        for again in range(resample):
            if again:
                t, s = stretch[0], stretch[-1]
                x = (x * (t.alpha / s.alpha)).add_(noise(), alpha=sqrt(beta(t, s)))
            for t, s in pairwise(stretch):
                x, x0 = sampler.step(denoise, x, t, s, noise)
                x = torch.where(mask, x, known * s.alpha + noise() * s.sigma)
                index += 1
                yield Step(index, t, x, x0)


def noised(path: list[Level], x0: Tensor, z: Tensor, strength: float) -> tuple[Tensor, int]:
    """Where SDEdit starts (Algorithm 1, Meng et al. 2022): images with the noise of a level in the middle of the path.

    Args:
        path: a sampler's levels, noisiest first.
        x0: (B, C, H, W) in [-1, 1].
        z: like x0, standard normal.
        strength: share of the path's steps that are walked, in (0, 1]; at least one step is.

    Returns:
        x, (B, C, H, W), and the number of levels before it: `skip` of `Sampler.__call__`.

    Raises:
        ValueError: for a strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must lie in (0, 1]: small keeps the image, 1 starts from noise")
    steps = len(path) - 1
    skip = min(round((1 - strength) * steps), steps - 1)
    return x0 * path[skip].alpha + z * path[skip].sigma, skip


def slerp(a: Tensor, b: Tensor, shares: Tensor) -> Tensor:
    """Points on the arc from a to b (Shoemake 1985): sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b.

    Between independent latents, which have nearly the same length, a straight line would pass too near to zero.

    Args:
        a, b: (C, H, W); parallel ones, which have no arc, are joined by the line.
        shares: (N,) float64, w in [0, 1]; 0 is a and 1 is b, to the bit.

    Returns:
        (N, C, H, W).
    """
    u, v = (end.cpu().double().flatten() for end in (a, b))
    theta = torch.nn.functional.cosine_similarity(u, v, dim=0).clamp(-1, 1).arccos()
    straight = torch.stack([1 - shares, shares]).cpu()
    weights = straight if theta.sin() < 1e-6 else (straight * theta).sin() / theta.sin()
    of_a, of_b = weights.to(a).view(2, -1, *[1] * a.ndim)
    return of_a * a + of_b * b


def invert(
    denoise: Denoiser, sampler: StepSampler, schedule: Schedule, x: Tensor, iterations: int = 1
) -> Iterator[Step]:
    """DDIM inversion: the latents from which a sampler without noise walks to the images x.

    The ODE that DDIM's steps follow (Eq. 14, Song et al. 2021) is walked from clean to noisy. From x_s an Euler step
    with the last x0 guesses x_t. What is sought solves step(x_t) = x_s, so `iterations` times, an evaluation each,

        x_t <- x_t + g,    g = (x_s - step(x_t)) / J,    J = sigma_s / sigma_t + (alpha_s - alpha_t sigma_s / sigma_t) D

    J is the slope of the step, for which D stands in for dx0 / dx_t = alpha_t Cov[x0 | x_t] / sigma_t^2. That is at
    most alpha_t d / sigma_t^2 for d numbers in [-1, 1], and about 1 / alpha_t where there is little noise; D is the
    smaller of the two. With D = 1 / alpha_t throughout this is the fixed-point iteration of eps, which stands still
    where alpha_t is 0. From the second on, Anderson's acceleration combines the last two, of each image by itself
    (Pan et al. 2023, "AIDI"). The denoiser is never asked at sigma = 0.

    Args:
        x: (B, C, H, W) images in [-1, 1].
        iterations: at least 1, with which the error of a reconstruction falls with the square of the steps; with more
            it falls to rounding, where steps are small.

    Yields:
        one step a level, from the cleanest of the path to its first; `x` is at `level`.

    Raises:
        ValueError: when iterations is less than 1, or the sampler adds noise or takes a single step.
    """
    path = sampler.path(schedule)
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1; 5 are nearly exact with 50 steps")
    if len(path) < 3:
        raise ValueError("a single step takes all noise to nearly the same image; choose more steps")
    x0, d = x, x[0].numel()
    for index, (s, t) in enumerate(pairwise(reversed(path)), 1):
        keep = s.sigma / t.sigma
        D = min(t.alpha * d / t.sigma**2, 1 / t.alpha) if t.alpha > 0 else 0.0
        J = keep + (s.alpha - keep * t.alpha) * D
        x_t = toward(x, x0, s, t) if s.sigma > 0 else x * t.alpha
        before: tuple[Tensor, Tensor] | None = None
        for _ in range(iterations):
            x_s, x0 = sampler.step(denoise, x_t, t, s, no_noise)
            g = (x - x_s) / J
            before, x_t = (x_t, g), x_t + g - (0.0 if before is None else _anderson(x_t, g, *before))
        x = x_t
        yield Step(index, t, x, x0)


def _anderson(x: Tensor, g: Tensor, x_before: Tensor, g_before: Tensor) -> Tensor:
    """What Anderson's acceleration with one step of memory takes from x + g: theta (dx + dg).

    theta, of each image, makes |g - theta dg| least.
    """
    dx, dg = x - x_before, g - g_before
    theta = (dg * g).flatten(1).sum(1) / dg.square().flatten(1).sum(1).clamp_min(1e-30)
    return theta.view(-1, *[1] * (x.ndim - 1)) * (dx + dg)


def no_noise() -> Tensor:
    """Stands for the noise of a sampler that adds none.

    Raises:
        ValueError: always.
    """
    raise ValueError("the sampler adds noise, and images are then no function of latents; choose sampler=ddim")


def adds_noise(sampler: Sampler, schedule: Schedule) -> bool:
    """Whether a sampler asks for noise on its path, which it walks here with a single number."""
    asked = []

    def noise() -> Tensor:
        asked.append(True)
        return torch.zeros(1, 1, 1, 1)

    steps = sampler(lambda x, _: torch.zeros_like(x), schedule, torch.zeros(1, 1, 1, 1), noise)
    return any(asked for _ in steps)
