"""What the network learns: one linear mix of the clean image and the noise, F = a x0 + b eps.

With x_t = alpha x0 + sigma eps and d = alpha b - sigma a, the mix is undone by

    x0 = (b x_t - sigma F) / d        eps = (alpha F - a x_t) / d

so an objective is its row (a, b) and nothing else. Rows take floats or tensors and broadcast.

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

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """F itself, (B, C, H, W), for images and noise (B, C, H, W) at levels that broadcast, (B, 1, 1, 1)."""
        a, b = self.row(alpha, sigma)
        return a * x0 + b * noise

    def x0(self, x_t: Tensor, F: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """The clean image that F means, at a level where alpha b != sigma a."""
        a, b = self.row(alpha, sigma)
        d = alpha * b - sigma * a
        if isinstance(d, Tensor):
            return (b * x_t - sigma * F) / d
        return (x_t * (b / d)).add_(F, alpha=-sigma / d)

    def eps(self, x_t: Tensor, F: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """The noise that F means, at a level where alpha b != sigma a."""
        a, b = self.row(alpha, sigma)
        return (alpha * F - a * x_t) / (alpha * b - sigma * a)


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
