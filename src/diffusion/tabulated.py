"""A schedule that is given as numbers: the betas of weights of others that no formula here makes."""

from collections.abc import Sequence

import torch

from src.diffusion.schedules import DiscreteSchedule


class Tabulated(DiscreteSchedule):
    """The betas themselves.

    Args:
        betas: T numbers in (0, 1), the variance that each step adds (Eq. 2, Ho et al. 2020); the last may be 1.

    Raises:
        ValueError: when they are not.
    """

    def __init__(self, betas: Sequence[float]) -> None:
        super().__init__(torch.tensor(list(betas), dtype=torch.float64))
