"""The blocks that U-Nets are made of, (B, C, H, W) in and out; each is called with the time embedding too."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.attention import Attention
from src.models.convolution import Conv3x3
from src.models.dropout import Dropout
from src.models.norm import GroupNorm

Norm = Callable[[int], GroupNorm]  # the normalisation of so many channels


class ResidualBlock(nn.Module):
    """(x + conv(dropout(act(norm(conv(act(norm(x))) + time))))) skip_scale, (B, C, H, W) to (B, D, H, W).

    With scale_shift the time does not shift before the norm, but after it: norm(...) (1 + scale) + shift.

    Args:
        norm: makes the normalisation of so many channels.
        skip_scale: 1, or sqrt(1/2) to keep the variance of a sum (Song et al. 2021).
        resample: halve or double height and width, before the first convolution and on the shortcut, by the mean of
            2x2 pixels and by nearest neighbours (Sec. 3, Dhariwal & Nichol 2021, after BigGAN).
        project: a 1x1 convolution on the shortcut of a block that resamples, also where the width stays.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int,
        dropout: float,
        norm: Norm,
        scale_shift: bool = False,
        skip_scale: float = 1.0,
        resample: Literal["down", "up"] | None = None,
        project: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.skip_scale = skip_scale
        self.resample = resample
        self.norm1 = norm(in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time = nn.Linear(time_dim, out_channels * (1 + scale_shift))
        self.norm2 = norm(out_channels)
        self.dropout = Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        plain = in_channels == out_channels and not (resample and project)
        self.shortcut = nn.Identity() if plain else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """`time` is (B, time_dim), activated already."""
        h = self.norm1(x, silu=True)
        if self.resample is not None:
            h, x = self._resampled(h), self._resampled(x)
        h = self.conv1(h)
        time = self.time(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        else:
            h = self.norm2(h + time, silu=True)
        h = self.conv2(self.dropout(h))
        x = self.shortcut(x) + h
        return x if self.skip_scale == 1 else x * self.skip_scale

    def _resampled(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """Strided convolution, (B, C, H, W) to (B, C, H / 2, W / 2).

    Args:
        padding: "tensorflow" pads (0, 1, 0, 1) as its SAME does, "symmetric" one pixel on each side as ADM does.
    """

    def __init__(self, channels: int, padding: Literal["tensorflow", "symmetric"] = "tensorflow") -> None:
        super().__init__()
        self.symmetric = padding == "symmetric"
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=int(self.symmetric))

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution, (B, C, H, W) to (B, C, 2 H, 2 W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """A residual block and, where the resolution asks for it, attention; on the way up, of x and a skip together."""

    def __init__(self, block: ResidualBlock, attention: Attention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, time: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.block(x if skip is None else torch.cat([x, skip], dim=1), time)
        return x if self.attention is None else self.attention(x)
