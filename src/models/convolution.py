"""3x3 convolutions, which are most of what a U-Net computes."""

import threading

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from src.models import kernel
from src.models.patches import is_channels_last

USUAL = ((1, 1), (1, 1), (1, 1), 1, "zeros")  # stride, padding, dilation, groups and what is around an image


class Conv3x3(nn.Conv2d):
    """nn.Conv2d of 3x3 pixels, stride 1 and a border of zeros: (B, C, H, W) to (B, D, H, W).

    On CPUs that multiply bfloat16, images that are channels-last and of that type, by autocast or of themselves, are
    convolved in 4 / 9 of the multiplications, by F(2x2, 3x3) of Lavin & Gray 2016 (convolution.c). What is rounded to
    bfloat16 is then what is multiplied, sums of pixels and of weights, and not the weights: results are off by 0.3% and
    gradients by 0.4%, where those of torch's convolution are by 0.2%. The gradient has no gradient of its own.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self._fast(x):
            return _Winograd.apply(x.bfloat16(), self.weight, self.bias)
        return super().forward(x)

    def _fast(self, x: Tensor) -> bool:
        """Whether convolution.c takes it; what torch would refuse is left to torch."""
        w, b = self.weight, self.bias
        if b is None or not kernel.known(x) or x.ndim != 4 or not x.numel() or not is_channels_last(x):
            return False
        (C, D), plain = (x.shape[1], len(b)), type(w) in (nn.Parameter, Tensor)
        shaped = w.shape == (D, C, 3, 3) and b.ndim == 1 and C % kernel.STEP == D % kernel.STEP == 0
        placed = w.device == b.device == x.device
        usual = (self.stride, self.padding, self.dilation, self.groups, self.padding_mode) == USUAL
        return plain and shaped and placed and usual and kernel.in_bfloat16(x, w, b) and kernel.multiplies_bfloat16()


class _Winograd(torch.autograd.Function):
    """Of x (B, C, H, W) in bfloat16 and w (D, C, 3, 3); keeps both, and nothing of what is between."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return _convolved(x, weight, kernel.plain(bias), turned=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        x = x.contiguous(memory_format=torch.channels_last)  # which those who save tensors may not keep
        dy = dy.bfloat16().contiguous(memory_format=torch.channels_last)
        dx = _convolved(dy, weight, None, turned=True) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return dx, None, None
        dweight = torch.empty_like(weight, dtype=torch.float32, memory_format=torch.channels_last)
        dbias = dweight.new_empty(len(weight))
        (B, C, H, W), D = x.shape, len(weight)
        kernel.run("winograd_gradient", (x, dy, dweight, dbias), B, H, W, C, D)
        return dx, dweight, dbias  # which autograd casts


_kept = threading.local()


def _room(count: int) -> Tensor:
    """So many bfloat16 of this thread: what is taken and freed between images would leave holes that nothing fits."""
    if not hasattr(_kept, "room") or len(_kept.room) < count:
        _kept.room = torch.empty(count, dtype=torch.bfloat16, device="cpu")
    return _kept.room


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
    """The convolution, or `turned` that which takes the gradient of its output to that of its input."""
    weight = weight.detach().float().contiguous(memory_format=torch.channels_last)
    D, C = weight.shape[:2]
    B, _, H, W = x.shape
    shape = (B, C if turned else D, H, W)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    filters = _room(16 * D * C)
    kernel.run("winograd_turned_filters" if turned else "winograd_filters", (weight, filters), C, D)
    kernel.run("winograd", (x, filters, bias, y), B, H, W, x.shape[1], y.shape[1])
    return y
