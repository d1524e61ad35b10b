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
