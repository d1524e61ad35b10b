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
from math import log, sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from src.diffusion.guidance import Denoiser, Guess
from src.diffusion.levels import Level, Schedule, Spacing
from src.diffusion.posterior import between
from src.randomness import NoiseStream

Noise = Callable[[], Tensor]  # a fresh z like x a call


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
    """Variance that the step s -> t of the forward process adds, also between levels that are not neighbours."""
    return t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2


def toward(x: Tensor, x0: Tensor, t: Level, s: Level, tau: float = 0.0) -> Tensor:
    """The mean of the step: alpha_s x0 + sqrt(sigma_s^2 - tau^2) (x - alpha_t x0) / sigma_t, as one sum of x0 and x."""
    keep = sqrt(max(0.0, s.sigma**2 - tau**2)) / t.sigma
    return (x * keep).add_(x0, alpha=s.alpha - keep * t.alpha)  # in the precision of x


@dataclass(frozen=True)
class Sampler:
    """What all samplers have in common: the path, and how they ask the denoiser.

    Args:
        steps: steps of the path, 1 to T; None for the sampler's own default.
        spacing: see `Schedule.levels`.
        clip: what happens to x0 before the step: true clips it to [-1, 1]; dynamic to [-s, s] and divides by s, where s
            is the larger of 1 and the image's `percentile` of |x0| (Sec. 2.3, Saharia et al. 2022).
        percentile: of dynamic clipping, in (0, 1].
        double: keep the state in float64, as EDM does; the network sees its own precision.

    Raises:
        ValueError: for a percentile outside (0, 1].
    """

    steps: int | None = None
    spacing: Spacing = "trailing"
    clip: bool | Literal["dynamic"] = True
    percentile: float = 0.995
    double: bool = False

    learned_variance = False  # whether the denoiser must give v

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 1:
            raise ValueError(f"percentile={self.percentile} must lie in (0, 1]; Saharia et al. use 0.995")

    def path(self, schedule: Schedule) -> list[Level]:
        """The `steps + 1` levels that this sampler visits, noisiest first.

        Raises:
            ValueError: when the schedule has fewer than `steps` times.
        """
        return schedule.levels(self.default_steps(schedule) if self.steps is None else self.steps, self.spacing)

    def check(self, net: object) -> None:
        """Compares the sampler with the network that it will ask.

        Raises:
            ValueError: when it needs a variance that the network does not learn.
        """
        if self.learned_variance and not getattr(net, "learned_variance", False):
            raise ValueError(
                "variance=learned needs a network that learns the variance, which this one does not; train with "
                "model.learned_variance=true loss=hybrid, or choose variance=posterior or beta"
            )

    def default_steps(self, schedule: Schedule) -> int:
        """Steps where none were asked for."""
        return schedule.chain_length

    def ask(self, denoise: Denoiser, x: Tensor, level: Level) -> Guess:
        """The denoiser's guess, clipped if the sampler clips."""
        answer = denoise(x, level)
        if isinstance(answer, Tensor):
            return Guess(self._clipped(answer, torch.empty_like(answer)) if self.clip else answer)
        if not self.clip:
            return answer
        x0, eps_from, v = answer
        return Guess(self._clipped(x0, x0), None if eps_from is None else self._clipped(eps_from, eps_from), v)

    def _clipped(self, x0: Tensor, out: Tensor) -> Tensor:
        if self.clip != "dynamic":
            return torch.clamp(x0, -1, 1, out=out)
        rank = max(1, round(self.percentile * x0[0].numel()))
        s = x0.abs().flatten(1).kthvalue(rank, dim=1).values.clamp_min(1).view(-1, *[1] * (x0.ndim - 1))
        return torch.clamp(x0, -s, s, out=out).div_(s)

    def __call__(self, denoise: Denoiser, schedule: Schedule, x: Tensor, noise: Noise, skip: int = 0) -> Iterator[Step]:
        """Walks from `x`, (B, C, H, W) at a level of the path, to images; `noise` gives a fresh z like `x` a call.

        Args:
            skip: levels at the noisy end that are left out; `x` is at the first of the others.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class StepSampler(Sampler):
    """A sampler whose every step is `toward` plus noise; subclasses say how much noise."""

    def stds(self, t: Level, s: Level) -> tuple[float, float]:
        """(tau of the step's mean, standard deviation of the noise that is added)."""
        raise NotImplementedError

    def step(self, denoise: Denoiser, x: Tensor, t: Level, s: Level, noise: Noise) -> tuple[Tensor, Tensor]:
        """(x at s, the x0 that was seen), from x at t."""
        guess = self.ask(denoise, x, t)
        tau_mean, std = self.stds(t, s)
        if guess.eps_from is None:
            x = toward(x, guess.x0, t, s, tau_mean)
        else:  # the difference of the two guesses goes into the image and not into the noise
            x = toward(x, guess.eps_from, t, s, tau_mean).add_(guess.x0 - guess.eps_from, alpha=s.alpha)
        if s.sigma > 0:  # the last step returns the mean
            if self.learned_variance and guess.v is not None:
                x.add_(noise() * (between(log(std**2), log(beta(t, s)), guess.v) / 2).exp())
            elif std > 0:
                x.add_(noise(), alpha=std)
        return x, guess.x0

    def __call__(self, denoise: Denoiser, schedule: Schedule, x: Tensor, noise: Noise, skip: int = 0) -> Iterator[Step]:
        for index, (t, s) in enumerate(pairwise(self.path(schedule)[skip:]), 1):
            x, x0 = self.step(denoise, x, t, s, noise)
            yield Step(index, t, x, x0)


@dataclass(frozen=True)
class DDPM(StepSampler):
    """Ancestral sampling (Algorithm 2, Ho et al. 2020); fewer steps respace the chain (Sec. 4, Nichol & Dhariwal 2021).

    Args:
        variance: "posterior" (tilde beta_t, "fixedsmall"), "beta" (beta_t, "fixedlarge"), or "learned" between the two,
            of a network that learns it (Eq. 15, Nichol & Dhariwal 2021).
    """

    variance: Literal["posterior", "beta", "learned"] = "posterior"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance not in ("posterior", "beta", "learned"):
            raise ValueError(f"variance={self.variance!r} is not one of posterior, beta, learned")

    @property
    def learned_variance(self) -> bool:  # type: ignore[override]
        return self.variance == "learned"

    def stds(self, t: Level, s: Level) -> tuple[float, float]:
        posterior = tau(t, s)
        return posterior, sqrt(beta(t, s)) if self.variance == "beta" else posterior


@dataclass(frozen=True)
class DDIM(StepSampler):
    """Denoising diffusion implicit models (Song et al. 2021).

    Args:
        eta: share of the posterior's noise: 0 is deterministic, 1 is ancestral.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must lie between 0 (deterministic) and 1 (ancestral)")

    def default_steps(self, schedule: Schedule) -> int:
        return min(50, schedule.chain_length)

    def stds(self, t: Level, s: Level) -> tuple[float, float]:
        std = tau(t, s, self.eta)
        return std, std


def state_dtype(sampler: Sampler, device: torch.device | str) -> torch.dtype:
    """float64 where the sampler keeps it and the device has it."""
    return torch.float64 if sampler.double and torch.device(device).type != "mps" else torch.float32


def generate(
    denoise: Denoiser,
    sampler: Sampler,
    schedule: Schedule,
    shape: tuple[int, int, int],
    seed: int,
    indices: range,
    device: torch.device | str = "cpu",
) -> Iterator[Step]:
    """The steps of the samples with these indices, each of `shape` (C, H, W); `NoiseStream` says what fixes them."""
    noise = NoiseStream(seed, indices, shape, device)
    first = sampler.path(schedule)[0]
    x = noise.first.to(state_dtype(sampler, device)) * schedule.prior_std(first)
    yield from sampler(denoise, schedule, x, noise)
