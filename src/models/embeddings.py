"""How a network is told the noise level."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    """[sin(s t f), cos(s t f)] with f_i = max_period^(-i / (dim / 2 - 1)), i = 0 ... dim / 2 - 1.

    The convention of Ho et al. 2020, who follow Vaswani et al. 2017 (Sec. 3.5): sines first, the last frequency is
    exactly 1 / max_period. ADM and DiT have cosines first and divide by dim / 2; weights of one do not fit the other.

    The angles stay float32 when the network is cast, since bfloat16 cannot tell t = 998 from t = 1000; the result has
    the dtype that the network was cast to.

    Args:
        dim: size of the embedding, even and at least 4.
        cosine_first: [cos, sin].
        endpoint: divide by dim / 2 - 1, and not by dim / 2.
        scale: s; for weights of networks that were told 1000 t / T.

    Raises:
        ValueError: when dim is odd or smaller than 4, or the scale is not positive.
    """

    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        max_period: float = 10000.0,
        cosine_first: bool = False,
        endpoint: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"an embedding of {dim} numbers is not possible; choose an even number from 4")
        if not scale > 0:
            raise ValueError(f"time_scale={scale} must be positive; 1 tells the network the time as it is")
        half = dim // 2
        i = torch.arange(half, dtype=torch.float64, device="cpu")  # also of a network that is built without memory
        self.exact = torch.exp(-math.log(max_period) / (half - endpoint) * i).float()
        self.register_buffer("frequencies", self.exact, persistent=False)
        self.cosine_first = cosine_first
        self.scale = scale
        self.dtype = torch.float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SinusoidalEmbedding":
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # a later move to another device leaves it
        self.frequencies = self.exact.to(self.frequencies.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, dim)."""
        angles = (t.float() * self.scale)[:, None] * self.frequencies
        parts = [angles.cos(), angles.sin()] if self.cosine_first else [angles.sin(), angles.cos()]
        return torch.cat(parts, dim=1).to(self.dtype)


class LabelEmbedding(nn.Module):
    """A vector for each class, and one for "no label", which is the label num_classes.

    Args:
        num_classes: at least 1.
        dim: size of the vectors.

    Raises:
        ValueError: when num_classes is less than 1.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1, or null for a network without labels")
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor | None, batch: int) -> Tensor:
        """(B,) int64 to (B, dim); None to (B, dim) of no label."""
        if y is None:
            y = torch.full((batch,), self.num_classes, device=self.table.weight.device)
        return self.table(y)


def check_divisible(image_size: tuple[int, int], factor: int, network: str) -> None:
    """Refuses image sizes that a network, which halves them log2(factor) times, cannot restore.

    Raises:
        ValueError: naming the nearest sizes that divide.
    """
    for size in image_size:
        if size < factor or size % factor:
            below, above = size // factor * factor, (size // factor + 1) * factor
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"{network} cannot halve images of {image_size[0]}x{image_size[1]}: sizes must be multiples of "
                f"{factor}, the nearest to {size}: {nearest}; resize or pad the images, or use fewer levels"
            )
