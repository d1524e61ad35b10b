"""What an average keeps of itself: the decay of each update.

After optimiser step n, counted from 1, with weights w_n:  a_n = decay_n a_(n-1) + (1 - decay_n) w_n.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from src.training.units import Images

SHORTEST = 1e-6
LONGEST = 1 / math.sqrt(12)  # the relative width of the plain mean, gamma = 0


@runtime_checkable
class Average(Protocol):
    """One exponential moving average."""

    def decay_at(self, step: int, images_per_step: int) -> float:
        """The decay, in [0, 1], of the update that follows optimiser step `step`, counted from 1.

        Args:
            images_per_step: of all devices and accumulated batches together.
        """
        ...


@dataclass(frozen=True)
class Constant:
    """The same decay at each step.

    Args:
        decay: in [0, 1); Ho et al. 2020 use 0.9999.
        warmup: use min(decay, (1 + n) / (10 + n)) after n steps, so that the average forgets the initial weights.

    Raises:
        ValueError: when decay is outside [0, 1).
    """

    decay: float = 0.9999
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must lie in [0, 1)")

    def decay_at(self, step: int, images_per_step: int) -> float:
        return min(self.decay, step / (9 + step)) if self.warmup else self.decay


@dataclass(frozen=True)
class HalfLife:
    """A half-life counted in images, which devices and batch sizes leave alone (EDM, Karras et al. 2022).

    The decay is 0.5^(images_per_step / h), with h = min(half_life, ramp * images seen before this step): so theirs.

    Args:
        half_life: images, a number or a text such as 500kimg, after which the past counts half.
        ramp: the half-life is at most this share of the images seen, so that the average forgets the initial weights
            (ema_rampup_ratio); None for no ramp.

    Raises:
        ValueError: when half_life is less than 1 image, or ramp is not positive.
    """

    half_life: int | Images
    ramp: float | None = 0.05

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"half_life={self.half_life} must be at least 1 image")
        if self.ramp is not None and self.ramp <= 0:
            raise ValueError(f"ramp={self.ramp} must be positive, or null for no ramp")

    @property
    def images(self) -> int:
        return self.half_life if isinstance(self.half_life, int) else Images(self.half_life).number

    def decay_at(self, step: int, images_per_step: int) -> float:
        h: float = self.images
        if self.ramp is not None:
            h = min(h, self.ramp * (step - 1) * images_per_step)
        return 0.5 ** (images_per_step / h) if h else 0.0


@dataclass(frozen=True)
class Power:
    """An average whose length is a share of the training so far (EDM2, Karras et al. 2024, Sec. 3.1 and App. C).

    At time t the weights of time tau <= t count in proportion to tau^gamma. The decay (1 - 1/n)^(gamma + 1) of step n
    gives w_i the share (i^(gamma+1) - (i-1)^(gamma+1)) / n^(gamma+1) after step n, which is the integral of that
    profile from i-1 to i: nothing is approximated, and the initial weights do not count.

    Args:
        length: sigma_rel, the standard deviation of the profile as a share of t, from 1e-6 to less than
            1 / sqrt(12) = 0.2887, where the profile is flat.

    Raises:
        ValueError: when length is outside this range.
    """

    length: float

    def __post_init__(self) -> None:
        if not SHORTEST <= self.length < LONGEST:
            raise ValueError(
                f"length={self.length} must be at least {SHORTEST:g} and less than 1 / sqrt(12) = {LONGEST:.4f}, which "
                "is the plain mean of all steps; 0.05 to 0.1 is usual"
            )

    @property
    def gamma(self) -> float:
        """The exponent, from sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2) (App. C.1).

        With u = gamma + 2 and s = sigma_rel^(-2) this is u^3 + u^2 - s u + s = 0. It has three real roots, of which
        the largest, in Viète's trigonometric form, is the one with gamma > 0.
        """
        s = self.length**-2
        p, q = -(s + 1 / 3), 2 / 27 + 4 * s / 3  # y^3 + p y + q = 0, y = u + 1/3
        y = 2 * math.sqrt(-p / 3) * math.cos(math.acos(1.5 * q / p * math.sqrt(-3 / p)) / 3)
        return y - 1 / 3 - 2

    def decay_at(self, step: int, images_per_step: int) -> float:
        return (1 - 1 / step) ** (self.gamma + 1)
