"""Denoisers made of denoisers: guidance of a conditional by an unconditional model.

As x0 and eps are linear in one another at a given x_t, guiding x0 is guiding eps. A scale of 1 means none, everywhere.
"""

from dataclasses import dataclass

from torch import Tensor

from src.diffusion.samplers import Denoiser
from src.diffusion.schedules import Level


@dataclass(frozen=True)
class ClassifierFree:
    """x0 = x0_u + scale (x0_c - x0_u) (Eq. 6, Ho & Salimans 2022, whose w is scale - 1).

    Args:
        scale: 1 is the conditional model and 0 the unconditional one, exactly and with one evaluation; above 1 guides.
        interval: guide only where sigma / alpha lies within these bounds (Kynkaanniemi et al. 2024); None for always.
        rescale: share, 0 to 1, of bringing each image's standard deviation back to that of the conditional x0
            (Sec. 3.4, Lin et al. 2023).

    Raises:
        ValueError: for a negative scale, an interval whose bounds do not rise, or a rescale outside [0, 1].
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"scale={self.scale} must not be negative; 1 means no guidance")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"interval={list(self.interval)} must be two rising numbers, of sigma / alpha")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale={self.rescale} must lie between 0 (off) and 1")

    def __call__(self, conditional: Denoiser, unconditional: Denoiser) -> Denoiser:
        """The guided denoiser."""
        if self.scale == 1:
            return conditional

        def guided(x_t: Tensor, level: Level) -> Tensor:
            if not self._applies(level):
                return conditional(x_t, level)
            x0_u = unconditional(x_t, level)
            if self.scale == 0:
                return x0_u
            x0_c = conditional(x_t, level)
            x0 = x0_u.lerp(x0_c, self.scale)
            if self.rescale:
                ratio = x0_c.flatten(1).std(1) / x0.flatten(1).std(1)
                x0 = x0 * (self.rescale * ratio + 1 - self.rescale).view(-1, *[1] * (x0.ndim - 1))
            return x0

        return guided

    def _applies(self, level: Level) -> bool:
        if self.interval is None:
            return True
        low, high = self.interval
        return low * level.alpha <= level.sigma <= high * level.alpha
