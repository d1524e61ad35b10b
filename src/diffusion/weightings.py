"""How much each noise level counts in the loss.

New weighting: one class with `__call__`, one YAML in conf/weighting.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Constant:
    """w = 1: with the eps objective this is L_simple (Eq. 14, Ho et al. 2020)."""

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """w, (B,), for the levels alpha and sigma, (B,)."""
        return torch.ones_like(alpha)
