"""Denoisers made of denoisers: guidance by what one model says and another does not.

    x0 = x0_weak + scale (x0_strong - x0_weak)

As x0 and eps are linear in one another at a given x_t, guiding x0 is guiding eps. A scale of 1 means none, everywhere.

New guidance: one subclass, one YAML in conf/guidance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from src.diffusion.levels import Level


class Guess(NamedTuple):
    """What a denoiser says of a noisy image. Its x0 are the asker's to write into.

    Attributes:
        x0: (B, C, H, W) E[x0 | x_t].
        eps_from: the x0 from which the noise is derived, where it is another one (CFG++).
        v: (B, C, H, W) share of the reverse variance, of a network that learns it; see `posterior.between`.
    """

    x0: Tensor
    eps_from: Tensor | None = None
    v: Tensor | None = None


Denoiser = Callable[[Tensor, Level], Guess | Tensor]  # a Tensor is x0 alone, and stays as it is


def as_guess(answer: Guess | Tensor) -> Guess:
    """A denoiser's answer with all its parts."""
    return answer if isinstance(answer, Guess) else Guess(answer.clone())


@dataclass(frozen=True)
class Guidance:
    """Base of all guidance: a strong model, guided away from a weak one.

    Args:
        scale: 1 is the strong model and 0 the weak one, exactly and with one evaluation; above 1 guides.
        interval: guide only where sigma / alpha lies within these bounds (Kynkaanniemi et al. 2024); None for always.
        rescale: share, 0 to 1, of bringing each image's standard deviation back to that of the strong model's x0
            (Sec. 3.4, Lin et al. 2023).

    Raises:
        ValueError: for a negative scale, an interval whose bounds do not rise, or a rescale outside [0, 1].
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0

    needs_labels = True  # it guides towards a label
    needs_steps = False  # it derives the noise from another x0, which only `samplers.StepSampler` can

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"scale={self.scale} must not be negative; 1 means no guidance")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"interval={list(self.interval)} must be two rising numbers, of sigma / alpha")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale={self.rescale} must lie between 0 (off) and 1")

    def __call__(self, strong: Denoiser, weak: Denoiser) -> Denoiser:
        """The guided denoiser."""
        if self.scale == 1:
            return strong

        def guided(x_t: Tensor, level: Level) -> Guess:
            if not self._applies(level):
                return as_guess(strong(x_t, level))
            if self.scale == 0:
                return as_guess(weak(x_t, level))
            return self._guide(as_guess(strong(x_t, level)), as_guess(weak(x_t, level)))

        return guided

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return self.scale != 1

    def _guide(self, strong: Guess, weak: Guess) -> Guess:
        x0 = weak.x0.lerp(strong.x0, self.scale)
        if self.rescale:
            ratio = strong.x0.flatten(1).std(1) / x0.flatten(1).std(1)
            x0 = x0 * (self.rescale * ratio + 1 - self.rescale).view(-1, *[1] * (x0.ndim - 1))
        return Guess(x0, v=strong.v)

    def _applies(self, level: Level) -> bool:
        if self.interval is None:
            return True
        low, high = self.interval
        return low * level.alpha <= level.sigma <= high * level.alpha


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """A conditional model, guided away from itself without labels (Eq. 6, Ho & Salimans 2022; their w is scale - 1)."""


@dataclass(frozen=True)
class CFGPP(Guidance):
    """CFG++: x0 is guided with a scale between 0 and 1, and the noise stays the unconditional model's.

    A step then leaves the manifold of noisy images less (Algorithm 2, Chung et al. 2024, whose lambda is the scale).
    Unlike elsewhere a scale of 1 is not the conditional model: its x0 goes with the unconditional noise.

    Raises:
        ValueError: for a scale outside [0, 1].
    """

    scale: float = 0.6

    needs_steps = True
    active = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale > 1:
            raise ValueError(f"scale={self.scale} of CFG++ must lie between 0 and 1; Chung et al. use 0.2 to 1")

    def __call__(self, strong: Denoiser, weak: Denoiser) -> Denoiser:
        def guided(x_t: Tensor, level: Level) -> Guess:
            if not self._applies(level):
                return as_guess(strong(x_t, level))
            conditional, unconditional = as_guess(strong(x_t, level)), as_guess(weak(x_t, level))
            return self._guide(conditional, unconditional)._replace(eps_from=unconditional.x0)

        return guided


@dataclass(frozen=True)
class Autoguidance(Guidance):
    """A model, guided away from a weaker one of the same kind (Eq. 3, Karras et al. 2024, "Guiding a Diffusion Model").

    Args:
        guide: the weaker model, as `run=` names one: an earlier checkpoint of the same run, a smaller or a less trained
            model with the same schedule.
    """

    guide: str = ""

    needs_labels = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.guide:
            raise ValueError(
                "guide= must name the weaker model: a run folder or a .ckpt, such as checkpoints/step=<n>.ckpt"
            )
