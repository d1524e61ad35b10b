"""Group normalisation that leaves a network its time."""

from torch import nn


def group_norm(channels: int, groups: int, eps: float) -> nn.GroupNorm:
    """As many groups as `groups` allows that divide the channels and hold at least two each.

    A group of one channel subtracts what is constant over its image, and with it the time embedding that was added.

    Args:
        channels: at least 2.
        groups: the most there may be.
        eps: 1e-6 in Ho et al. 2020, 1e-5 in ADM.
    """
    most = min(groups, channels // 2)
    return nn.GroupNorm(next(g for g in range(most, 0, -1) if channels % g == 0), channels, eps=eps)
