"""Group normalisation that leaves a network its time, and its images their memory format."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models import kernel
from src.models.patches import is_channels_last


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm whose result lies in memory as its input does, and that is fast there.

    Of images that are channels-last, torch's kernel for GPUs makes channels-first ones, which every convolution after
    it rewrites; and its kernel for CPUs takes ten times as long as for others.
    """

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        """(B, C, H, W) to the same; with SiLU after it where that is asked for."""
        if kernel.can_take(x):
            return kernel.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu)
        x = self._normalized(x)
        return F.silu(x) if silu else x

    def _normalized(self, x: Tensor) -> Tensor:
        if x.is_cuda and not torch.compiler.is_compiling() and is_channels_last(x):
            return normalized(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def faster_channels_last(device: torch.device) -> bool:
    """Whether convolutional networks are known to be faster with images channels-last: on CPUs, if `GroupNorm` is."""
    return device.type == "cpu" and kernel.library() is not None


def normalized(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.group_norm of (B, C, H, W), written so that no step changes the memory format; float32 inside."""
    B, C, H, W = x.shape
    dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    x = x.float()
    var, mean = torch.var_mean(x.view(B, groups, C // groups, H, W), dim=(2, 3, 4), correction=0)
    scale = (var + eps).rsqrt()[:, :, None] * weight.view(groups, -1)  # (B, groups, C / groups)
    shift = torch.addcmul(bias.view(groups, -1), mean[:, :, None], scale, value=-1)
    return torch.addcmul(shift.reshape(B, C, 1, 1), x, scale.reshape(B, C, 1, 1)).to(dtype)


def group_norm(channels: int, groups: int, eps: float, smallest: int = 2) -> GroupNorm:
    """As many groups as `groups` allows that divide the channels and hold at least `smallest` each.

    A group of one channel subtracts what is constant over its image, and with it the time embedding that was added.

    Args:
        channels: at least `smallest`.
        groups: the most there may be.
        eps: 1e-6 in Ho et al. 2020, 1e-5 in ADM.
        smallest: 2; EDM has 4, and weights of others come with groups of 1.
    """
    most = max(1, min(groups, channels // smallest))
    return GroupNorm(next(g for g in range(most, 0, -1) if channels % g == 0), channels, eps=eps)
