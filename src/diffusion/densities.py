"""How training draws its noise levels: u in [0, 1), the share of the schedule's length.

New density: one class with `__call__`, one YAML in conf/density.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Uniform:
    """Independent draws (Algorithm 1, Ho et al. 2020)."""

    def __call__(self, batch: int, device: torch.device) -> Tensor:
        """u, (batch,) float32 in [0, 1), from torch's global generator."""
        return torch.rand(batch, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Stratified:
    """One draw in each of `batch` equal intervals, with one offset: u_i = (i / batch + u_0) mod 1.

    The low-discrepancy sampler of Kingma et al. 2021 ("Variational Diffusion Models", App. I.1). Each u_i is uniform,
    so the loss is unbiased; the batch covers all levels, so its variance is lower.
    """

    def __call__(self, batch: int, device: torch.device) -> Tensor:
        """u, (batch,) float32 in [0, 1), from torch's global generator."""
        offset = torch.rand(1, dtype=torch.float32, device=device)
        return (torch.arange(batch, dtype=torch.float32, device=device) / batch + offset) % 1


@dataclass(frozen=True)
class LogitNormal:
    """u = sigmoid(mean + std n), n standard normal: most in the middle of the schedule (Eq. 19, Esser et al. 2024).

    Args:
        mean: below 0 draws more clean images, above 0 more noise.
        std: width, positive.

    Raises:
        ValueError: when std is not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"std={self.std} must be positive; Esser et al. use 1")

    def __call__(self, batch: int, device: torch.device) -> Tensor:
        """u, (batch,) float32 in [0, 1), from torch's global generator."""
        n = torch.randn(batch, dtype=torch.float32, device=device)
        return (self.mean + self.std * n).sigmoid().clamp_(max=1 - 2**-24)
