"""Self-attention over the positions of an image."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from src.models import kernel

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
        x = x + self.proj(attend(qkv).reshape(B, H, W, C).permute(0, 3, 1, 2))
        return x if self.skip_scale == 1 else x * self.skip_scale


def attend(qkv: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v of (B, positions, 3, heads, d), as (B, positions, heads, d), by the fastest way."""
    if _fast(qkv):
        return _Attention.apply(qkv)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    small = q.shape[-2] < FEW and q.device.type == "cpu" and q.dtype == torch.bfloat16
    if small and q.requires_grad and not torch.compiler.is_compiling():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _fast(qkv: Tensor) -> bool:
    """Whether attention.c takes it; of fewer heads than threads, which each take one, only some."""
    if not kernel.known(qkv) or qkv.dtype != torch.bfloat16 or not qkv.numel() or qkv.shape[-1] % kernel.STEP:
        return False
    busy = 2 * qkv.shape[0] * qkv.shape[3] >= torch.get_num_threads()
    return busy and qkv.is_contiguous() and kernel.in_bfloat16(qkv) and kernel.multiplies_bfloat16()


class _Attention(torch.autograd.Function):
    """Keeps its input and two numbers for each query; its gradient has none."""

    @staticmethod
    def forward(ctx, qkv):  # type: ignore[no-untyped-def]
        B, N, _, heads, d = qkv.shape
        out = qkv.new_empty((B, N, heads, d))
        stats = qkv.new_empty((B, heads, N, 2), dtype=torch.float32)
        kernel.run("attention", (qkv, out, stats), B, N, heads, d)
        ctx.save_for_backward(qkv, stats)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        qkv, stats = (v.contiguous() for v in ctx.saved_tensors)
        B, N, _, heads, d = qkv.shape
        dqkv = torch.empty_like(qkv)
        kernel.run("attention_gradient", (qkv, stats, dout.bfloat16().contiguous(), dqkv), B, N, heads, d)
        return dqkv
