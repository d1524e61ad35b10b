"""What the network learns: one linear mix of the clean image and the noise, F = a x0 + b eps.

With x_t = alpha x0 + sigma eps and d = alpha b - sigma a, the mix is undone by

    x0 = (b x_t - sigma F) / d        eps = (alpha F - a x_t) / d

so an objective is its row (a, b), and for edm an input scale. Rows take floats or tensors and broadcast.

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

    def network_input(self, x_t: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """What the network sees of x_t."""
        return x_t

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
    """The velocity: F = alpha eps - sigma x0 (Sec. 4, Salimans & Ho 2022)."""

    def row(self, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar]:
        return -sigma, alpha


class Flow(Objective):
    """The straight path's velocity: F = eps - x0 (Eq. 5, Liu et al. 2023; Lipman et al. 2023 run time backwards)."""

    def row(self, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar]:
        return 0 * alpha - 1, 0 * alpha + 1


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
        scale = self._scale(alpha, sigma)
        return sigma / self.sigma_data * scale, -alpha * self.sigma_data * scale

    def network_input(self, x_t: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        return x_t * self._scale(alpha, sigma)

    def _scale(self, alpha: Scalar, sigma: Scalar) -> Scalar:
        """1 / S."""
        return (sigma**2 + alpha**2 * self.sigma_data**2) ** -0.5
