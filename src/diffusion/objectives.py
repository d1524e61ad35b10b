"""What the network learns: one linear mix of the clean image and the noise, F = a x0 + b eps.

With x_t = alpha x0 + sigma eps and d = alpha b - sigma a, the mix is undone by

    x0 = (b x_t - sigma F) / d        eps = (alpha F - a x_t) / d

so an objective is its row (a, b) and an input scale. Rows take floats or tensors and broadcast.

The network sees x_t times `input_scale`, the coordinates in which its objective is at home: the unit circle
alpha^2 + sigma^2 = 1 of variance-preserving schedules, for flow the line alpha + sigma = 1. There the scale is 1; under
another schedule it makes the network the same function of the same images, whatever the schedule's own scale.

New objective: one subclass with its row, one YAML in conf/objective.
"""

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Scalar = TypeVar("Scalar", float, Tensor)


@dataclass(frozen=True)
class Objective:
    """Base of all rows."""

    def row(self, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar]:
        """The coefficients (a, b) of F = a x0 + b eps at the level (alpha, sigma)."""
        raise NotImplementedError

    def determinant(self, alpha: Scalar, sigma: Scalar) -> Scalar:
        """d = alpha b - sigma a; where it is 0, F does not tell x0 and eps apart."""
        a, b = self.row(alpha, sigma)
        return alpha * b - sigma * a

    def input_scale(self, alpha: Scalar, sigma: Scalar) -> Scalar:
        """What x_t is multiplied by for the network."""
        return _inverse_norm(alpha, sigma)

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """F itself, (B, C, H, W), for images and noise (B, C, H, W) at levels that broadcast, (B, 1, 1, 1)."""
        a, b = self.row(alpha, sigma)
        return a * x0 + b * noise

    def x0(self, x_t: Tensor, F: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """The clean image that F means, at a level where alpha b != sigma a."""
        _, b = self.row(alpha, sigma)
        d = self.determinant(alpha, sigma)
        if isinstance(d, Tensor):
            return (b * x_t - sigma * F) / d
        return (x_t * (b / d)).add_(F, alpha=-sigma / d)

    def eps(self, x_t: Tensor, F: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """The noise that F means, at a level where alpha b != sigma a."""
        a, _ = self.row(alpha, sigma)
        return (alpha * F - a * x_t) / self.determinant(alpha, sigma)


class Eps(Objective):
    """The noise: F = eps (Eq. 14, Ho et al. 2020)."""

    def row(self, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar]:
        return 0 * alpha, 0 * alpha + 1


class X0(Objective):
    """The clean image: F = x0."""

    def row(self, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar]:
        return 0 * alpha + 1, 0 * alpha


class V(Objective):
    """The velocity: F = alpha eps - sigma x0, over sqrt(alpha^2 + sigma^2) (Sec. 4, Salimans & Ho 2022)."""

    def row(self, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar]:
        scale = _inverse_norm(alpha, sigma)
        return -sigma * scale, alpha * scale


class Flow(Objective):
    """The straight path's velocity: F = eps - x0 (Eq. 5, Liu et al. 2023; Lipman et al. 2023 run time backwards)."""

    def row(self, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar]:
        return 0 * alpha - 1, 0 * alpha + 1

    def input_scale(self, alpha: Scalar, sigma: Scalar) -> Scalar:
        return 1 / (alpha + sigma)


@dataclass(frozen=True)
class Edm(Objective):
    """EDM's preconditioned network: unit variance in and out at every level (Table 1 and Eq. 7, Karras et al. 2022).

    With S^2 = sigma^2 + alpha^2 sigma_data^2 the network sees x_t / S and learns
    F = sigma / (sigma_data S) x0 - alpha sigma_data / S eps. For sigma_data = 1 under a variance-preserving schedule
    this is -v.

    Args:
        sigma_data: standard deviation of the images in [-1, 1]; EDM uses 0.5.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.sigma_data <= 0:
            raise ValueError(f"sigma_data={self.sigma_data} must be positive; EDM uses 0.5")

    def row(self, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar]:
        scale = self.input_scale(alpha, sigma)
        return sigma / self.sigma_data * scale, -alpha * self.sigma_data * scale

    def input_scale(self, alpha: Scalar, sigma: Scalar) -> Scalar:
        return _inverse_norm(alpha * self.sigma_data, sigma)


def _inverse_norm(alpha: Scalar, sigma: Scalar) -> Scalar:
    return (alpha**2 + sigma**2) ** -0.5
