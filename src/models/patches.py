"""Patches of pixels as channels, in the memory format that the images have."""

import torch
import torch.nn.functional as F
from torch import Tensor


def fold(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) to (B, C p p, H / p, W / p): F.pixel_unshuffle, which would leave channels-last."""
    if p == 1:
        return x
    if not is_channels_last(x):
        return F.pixel_unshuffle(x, p)
    B, C, H, W = x.shape
    patches = x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, H // p, W // p, C * p * p).permute(0, 3, 1, 2)


def unfold(x: Tensor, p: int) -> Tensor:
    """(B, C p p, H, W) to (B, C, H p, W p): F.pixel_shuffle, which would leave channels-last."""
    if p == 1:
        return x
    if not is_channels_last(x):
        return F.pixel_shuffle(x, p)
    B, C, H, W = x.shape
    pixels = x.view(B, C // p**2, p, p, H, W).permute(0, 4, 2, 5, 3, 1)
    return pixels.reshape(B, H * p, W * p, C // p**2).permute(0, 3, 1, 2)


def is_channels_last(x: Tensor) -> bool:
    """Whether (B, C, H, W) lies in memory as (B, H, W, C), and could not as well be called (B, C, H, W)."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
