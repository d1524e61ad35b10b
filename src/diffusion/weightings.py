"""How much each noise level counts in the loss: w in w mean((F - (a x0 + b eps))^2).

Papers state their weights on the error of x0 or of eps. With d = alpha b - sigma a these are multiples of one another,

    x0_hat - x0 = -(sigma / d) (F_hat - F)        eps_hat - eps = (alpha / d) (F_hat - F)

so a weight on the squared error of x0 is (sigma / d)^2 times as much on F's, whatever F is. A weighting whose paper
integrates over ln SNR says `over_log_snr`; it is then multiplied by the schedule's -d ln SNR / du.

New weighting: one class with `__call__`, one YAML in conf/weighting.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from src.diffusion import objectives


@dataclass(frozen=True)
class Constant:
    """w = 1: L_simple for eps (Eq. 14, Ho et al. 2020), flow matching for flow, EDM's weighted loss for edm."""

    def __call__(self, alpha: Tensor, sigma: Tensor, d: Tensor) -> Tensor:
        """w, (B,), for the levels alpha and sigma and the objective's determinant d, each (B,)."""
        return torch.ones_like(alpha)


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma) on the error of x0 (Eq. 8, Hang et al. 2023), right for every objective.

    Args:
        gamma: largest weight; Hang et al. use 5.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ValueError(f"gamma={self.gamma} must be positive; Hang et al. use 5")

    def __call__(self, alpha: Tensor, sigma: Tensor, d: Tensor) -> Tensor:
        """w, (B,), for the levels alpha and sigma and the objective's determinant d, each (B,)."""
        snr = (alpha / sigma) ** 2
        return snr.clamp(max=self.gamma) * (sigma / d) ** 2


@dataclass(frozen=True)
class P2:
    """1 / (k + SNR)^gamma on the error of eps (Eq. 8, Choi et al. 2022): less weight on what the eye does not see.

    Args:
        gamma: 0 is the constant weighting of eps; Choi et al. use 0.5 and 1.
        k: keeps the weight finite; Choi et al. use 1.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        if self.gamma < 0 or self.k <= 0:
            raise ValueError(f"gamma={self.gamma} must not be negative, and k={self.k} must be positive")

    def __call__(self, alpha: Tensor, sigma: Tensor, d: Tensor) -> Tensor:
        """w, (B,), for the levels alpha and sigma and the objective's determinant d, each (B,)."""
        snr = (alpha / sigma) ** 2
        return (alpha / d) ** 2 / (self.k + snr) ** self.gamma


@dataclass(frozen=True)
class Sigmoid:
    """sigmoid(bias - ln SNR) on the error of eps, over ln SNR (Eq. 11 and App. D.3, Kingma & Gao 2023, "VDM++").

    Their loss is an integral over ln SNR; where u is drawn evenly its weight is multiplied by the schedule's slope.

    Args:
        bias: the ln SNR at which the weight is a half; Kingma & Gao use 2.
    """

    bias: float = 2.0
    over_log_snr = True

    def __call__(self, alpha: Tensor, sigma: Tensor, d: Tensor) -> Tensor:
        """w, (B,), for the levels alpha and sigma and the objective's determinant d, each (B,)."""
        return (self.bias - 2 * (alpha / sigma).log()).sigmoid() * (alpha / d) ** 2


@dataclass(frozen=True)
class Edm:
    """lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the error of x0; EDM's sigma is sigma / alpha here.

    That is a weight of 1 on the error of the edm objective, whatever the network learns (Sec. 5, Karras et al. 2022).

    Args:
        sigma_data: standard deviation of the images in [-1, 1]; EDM uses 0.5.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        objectives.Edm(self.sigma_data)  # refuses what it cannot be

    def __call__(self, alpha: Tensor, sigma: Tensor, d: Tensor) -> Tensor:
        """w, (B,), for the levels alpha and sigma and the objective's determinant d, each (B,)."""
        return (objectives.Edm(self.sigma_data).determinant(alpha, sigma) / d) ** 2
