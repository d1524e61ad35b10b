"""Self-attention over the positions of an image."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

FEW = 128  # positions: below, on a CPU in bfloat16, the gradient of torch's fused kernel costs more than it saves


class Attention(nn.Module):
    """(x + proj(softmax(q k / sqrt(d)) v)) skip_scale over the H W positions, (B, C, H, W) to the same.

    The channels of `qkv` are q, k, v, and each of these its heads: (3, heads, d). Images that are channels-last stay
    so, and nothing is copied on the way: their positions are rows already.

    Args:
        channels: C, a multiple of num_heads.
        norm: makes the normalisation of so many channels.
        skip_scale: 1, or sqrt(1/2) to keep the variance of a sum (Song et al. 2021).
    """

    def __init__(
        self, channels: int, num_heads: int, norm: Callable[[int], nn.Module], skip_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.skip_scale = skip_scale
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(B, H * W, 3, self.num_heads, C // self.num_heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, H W, C / heads)
        out = attend(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        x = x + self.proj(out.permute(0, 3, 1, 2))
        return x if self.skip_scale == 1 else x * self.skip_scale


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v, (B, heads, positions, d) all, by the faster of torch's ways."""
    small = q.shape[-2] < FEW and q.device.type == "cpu" and q.dtype == torch.bfloat16
    if small and q.requires_grad and not torch.compiler.is_compiling():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)
