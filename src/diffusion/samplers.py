"""From noise to images: iterators that yield every step.

A sampler sees a denoiser, x_t -> E[x0 | x_t], and a path of levels; it knows neither network nor objective. One step
goes from the level t to the cleaner level s with noise z (Eq. 12 and 16, Song et al. 2021):

    x_s = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps + tau z,    eps = (x_t - alpha_t x0) / sigma_t
    tau^2 = eta^2 sigma_s^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)

eta = 1 is the posterior q(x_s | x_t, x0) of Ho et al. 2020 (Eq. 6 and 7), eta = 0 is DDIM. As eps is derived from x0
after x0 was clipped, clipping cannot leave the two in contradiction.

New sampler: one frozen dataclass with `__call__`, one YAML in conf/sampler.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from src.diffusion.schedules import DiscreteSchedule, Level, Spacing
from src.randomness import NoiseStream

Denoiser = Callable[[Tensor, Level], Tensor]


class Step(NamedTuple):
    """What a sampler yields: the state after the step, and the x0 that it saw.

    Attributes:
        index: 1 to steps.
        level: where the denoiser was asked.
        x: (B, C, H, W) at the next, cleaner level; the sample itself after the last step.
        x0: (B, C, H, W) the denoiser's answer, clipped if the sampler clips.
    """

    index: int  # type: ignore[assignment]
    level: Level
    x: Tensor
    x0: Tensor


def tau(t: Level, s: Level, eta: float = 1.0) -> float:
    """Standard deviation of the noise that the step t -> s adds."""
    return eta * s.sigma * sqrt(max(0.0, 1 - (t.alpha * s.sigma / (s.alpha * t.sigma)) ** 2))


def beta(t: Level, s: Level) -> float:
    """beta of the step s -> t of the forward process, also between levels that are not neighbours."""
    return 1 - (t.alpha / s.alpha) ** 2


def toward(x: Tensor, x0: Tensor, t: Level, s: Level, tau: float) -> Tensor:
    """The mean of the step: alpha_s x0 + sqrt(sigma_s^2 - tau^2) (x - alpha_t x0) / sigma_t, as one sum of x0 and x."""
    keep = sqrt(max(0.0, s.sigma**2 - tau**2)) / t.sigma
    return (x0 * (s.alpha - keep * t.alpha)).add_(x, alpha=keep)


@dataclass(frozen=True)
class Sampler:
    """What all samplers have in common: the path, and how they ask the denoiser.

    Args:
        steps: network evaluations, 1 to T; None for the sampler's own default.
        spacing: see `DiscreteSchedule.timesteps`.
        clip: clip x0 to [-1, 1] before the step.
    """

    steps: int | None = None
    spacing: Spacing = "trailing"
    clip: bool = True

    def path(self, schedule: DiscreteSchedule) -> list[Level]:
        """The `steps + 1` levels that this sampler visits, noisiest first.

        Raises:
            ValueError: when the schedule has fewer than `steps` times.
        """
        return schedule.levels(self.default_steps(schedule) if self.steps is None else self.steps, self.spacing)

    def default_steps(self, schedule: DiscreteSchedule) -> int:
        """Network evaluations where none were asked for."""
        return schedule.num_timesteps

    def guess(self, denoise: Denoiser, x: Tensor, level: Level) -> Tensor:
        """E[x0 | x], clipped if the sampler clips."""
        x0 = denoise(x, level)
        return x0.clamp(-1, 1) if self.clip else x0

    def __call__(
        self, denoise: Denoiser, schedule: DiscreteSchedule, x: Tensor, noise: Callable[[], Tensor]
    ) -> Iterator[Step]:
        """Walks from `x`, (B, C, H, W) at the noisiest level, to images; `noise` gives a fresh z like `x` a call."""
        raise NotImplementedError


@dataclass(frozen=True)
class StepSampler(Sampler):
    """A sampler whose every step is `toward` plus noise; subclasses say how much noise."""

    def stds(self, t: Level, s: Level) -> tuple[float, float]:
        """(tau of the step's mean, standard deviation of the noise that is added)."""
        raise NotImplementedError

    def __call__(
        self, denoise: Denoiser, schedule: DiscreteSchedule, x: Tensor, noise: Callable[[], Tensor]
    ) -> Iterator[Step]:
        for index, (t, s) in enumerate(pairwise(self.path(schedule)), 1):
            x0 = self.guess(denoise, x, t)
            tau_mean, std = self.stds(t, s)
            x = toward(x, x0, t, s, tau_mean)
            if std > 0 and s.sigma > 0:  # the last step returns the mean
                x.add_(noise(), alpha=std)
            yield Step(index, t, x, x0)


@dataclass(frozen=True)
class DDPM(StepSampler):
    """Ancestral sampling (Algorithm 2, Ho et al. 2020); fewer steps respace the chain (Sec. 4, Nichol & Dhariwal 2021).

    Args:
        variance: "posterior" (tilde beta_t, "fixedsmall") or "beta" (beta_t, "fixedlarge").
    """

    variance: Literal["posterior", "beta"] = "posterior"

    def __post_init__(self) -> None:
        if self.variance not in ("posterior", "beta"):
            raise ValueError(f"variance={self.variance!r} is not one of posterior, beta")

    def stds(self, t: Level, s: Level) -> tuple[float, float]:
        posterior = tau(t, s)
        return posterior, posterior if self.variance == "posterior" else sqrt(beta(t, s))


@dataclass(frozen=True)
class DDIM(StepSampler):
    """Denoising diffusion implicit models (Song et al. 2021).

    Args:
        eta: share of the posterior's noise: 0 is deterministic, 1 is ancestral.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must lie between 0 (deterministic) and 1 (ancestral)")

    def default_steps(self, schedule: DiscreteSchedule) -> int:
        return min(50, schedule.num_timesteps)

    def stds(self, t: Level, s: Level) -> tuple[float, float]:
        std = tau(t, s, self.eta)
        return std, std


def generate(
    denoise: Denoiser,
    sampler: Sampler,
    schedule: DiscreteSchedule,
    shape: tuple[int, int, int],
    seed: int,
    indices: range,
    device: torch.device | str = "cpu",
) -> Iterator[Step]:
    """The steps of the samples with these indices, each of `shape` (C, H, W); `NoiseStream` says what fixes them."""
    noise = NoiseStream(seed, indices, shape, device)
    yield from sampler(denoise, schedule, noise.first * schedule.prior_std, noise)
