"""What is minimised: the weighted error alone, or with a bound on the likelihood, or divided by a learned variance.

New loss: one class with `__call__`, one YAML in conf/loss.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from src.diffusion.posterior import Posterior


class Terms(NamedTuple):
    """What a loss is made of.

    Attributes:
        error: (B,) w mean((F - (a x0 + b eps))^2).
        alpha, sigma: (B,) the levels.
        x0, x_t, x0_hat: (B, C, H, W) image, noisy image, and the network's guess.
        v: (B, C, H, W) the second half of the network's output, of a network with a learned variance.
        t: (B,) times.
        posterior: of the schedule, where it is discrete.
    """

    error: Tensor
    alpha: Tensor
    sigma: Tensor
    x0: Tensor
    x_t: Tensor
    x0_hat: Tensor
    v: Tensor | None
    t: Tensor
    posterior: Posterior | None

    def bits(self, levels: int) -> Tensor:
        """T times the term of the bound at t, (B,): each term an estimate of their sum, in bits per dimension.

        Args:
            levels: how many grey levels images have.
        """
        assert self.posterior is not None
        assert self.v is not None
        log_variance = self.posterior.learned_log_variance(self.v, self.t)
        term = self.posterior.bits(self.x0, self.x_t, self.x0_hat, log_variance, self.t, levels)
        return len(self.posterior.log_beta) * term


@dataclass(frozen=True)
class Simple:
    """The weighted error: L_simple where the weight is 1 and the objective eps (Eq. 14, Ho et al. 2020)."""

    learned_variance = False

    def __call__(self, terms: Terms) -> Tensor:
        """The loss of each image, (B,)."""
        return terms.error


@dataclass(frozen=True)
class Hybrid:
    """L_hybrid = L_simple + weight L_vlb, for networks that learn the variance (Eq. 16, Nichol & Dhariwal 2021).

    L_vlb is the sum over T terms of which one is drawn, hence T times it; the guess of x0 is detached there, so that
    L_vlb teaches the variance alone.

    Args:
        weight: of L_vlb in bits per dimension; Nichol & Dhariwal use 0.001.
        levels: grey levels that images have: 256 of 8 bits, 65536 of 16.

    Raises:
        ValueError: when weight is not positive, or levels less than 2.
    """

    weight: float = 0.001
    levels: int = 256
    learned_variance = True

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight} must be positive; Nichol & Dhariwal use 0.001")
        _check_levels(self.levels)

    def __call__(self, terms: Terms) -> Tensor:
        """The loss of each image, (B,)."""
        frozen = terms._replace(x0_hat=terms.x0_hat.detach())
        return terms.error + self.weight * frozen.bits(self.levels)


@dataclass(frozen=True)
class Vlb:
    """L_vlb, in bits per dimension: T times the term of the drawn t (Sec. 3.3, Nichol & Dhariwal 2021).

    Its terms differ by orders of magnitude over t; they draw t with density=importance.

    Args:
        levels: see `Hybrid`.

    Raises:
        ValueError: when levels is less than 2.
    """

    levels: int = 256
    learned_variance = True

    def __post_init__(self) -> None:
        _check_levels(self.levels)

    def __call__(self, terms: Terms) -> Tensor:
        """The loss of each image, (B,)."""
        return terms.bits(self.levels)


def _check_levels(levels: int) -> None:
    if levels < 2:
        raise ValueError(f"levels={levels} must be at least 2; images of 8 bits have 256, of 16 bits 65536")


class Uncertainty(nn.Module):
    """error / e^u + u with a learned u(noise level): every level counts as much as it can be predicted.

    u is the log-variance of the error, a linear layer on Fourier features of ln(sigma / alpha) / 4, zero at the start
    (Eq. 21, Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models").

    Args:
        channels: number of Fourier features, at least 1; Karras et al. use 128.

    Raises:
        ValueError: when channels is less than 1.
    """

    learned_variance = False
    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels={channels} must be at least 1; Karras et al. use 128")
        fixed = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2 * torch.pi * torch.randn(channels, generator=fixed))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(channels, generator=fixed))
        self.linear = nn.Linear(channels, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def u(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """u, (B,), at the levels (B,)."""
        c_noise = (sigma / alpha).log().clamp(-12, 12) / 4
        features = (c_noise[:, None] * self.frequencies + self.phases).cos() * 2**0.5
        return self.linear(features)[:, 0]

    def forward(self, terms: Terms) -> Tensor:
        """The loss of each image, (B,)."""
        u = self.u(terms.alpha, terms.sigma)
        return terms.error / u.exp() + u


Loss = Simple | Hybrid | Vlb | Uncertainty
