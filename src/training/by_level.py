"""Where on the schedule the losses of training lie."""

import torch
from torch import Tensor

BINS = 20


class LossByLevel:
    """Mean loss in 20 equal bins of u, the place on the schedule: a sum on the device, without a synchronisation.

    Attributes:
        sums: (2, BINS): the losses and how many they are; None before the first.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, u: Tensor, losses: Tensor, bad: Tensor) -> None:
        """Adds the losses, (B,), of images at u, (B,) in [0, 1); not those of a bad step."""
        if self.sums is None:
            self.sums = torch.zeros(2, BINS, device=losses.device)
        bins = (u * BINS).long().clamp_(max=BINS - 1)
        both = torch.stack([losses.detach().float(), torch.ones_like(u)])
        self.sums.index_add_(1, bins, both.masked_fill_(bad, 0.0))
