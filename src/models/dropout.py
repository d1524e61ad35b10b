"""Dropout that a row of a batch takes with it, whatever batch, device or process the row is in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models import kernel
from src.models.patches import is_channels_last
from src.randomness import GOLDEN, scramble

LEVELS = 2**16  # masks are drawn from 16 bits an element, so p is rounded to a multiple of 1.5e-5


class Dropout(nn.Dropout):
    """nn.Dropout, with masks that are pure functions of a key for each row.

    torch's masks come from one stream for the whole batch: split over two processes, the same images get other masks.
    Here element e of row i, counted as the row lies in memory, is dropped when 16 bits of a hash of (key_i, e) are
    below 2^16 p. Without keys it is nn's.

    Attributes:
        keys: (B,) int32, one a row of the next batches, different in each layer; None for torch's own generator.
    """

    keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, ...)."""
        if self.keys is None or not self.training or self.p == 0:
            return F.dropout(x, self.p, self.training)
        dropped = min(round(self.p * LEVELS), LEVELS - 1)  # of p next to 1
        lowest, scale = dropped - LEVELS // 2, LEVELS / (LEVELS - dropped)
        if kernel.can_drop(x, self.keys):
            return kernel.dropout(x, self.keys, lowest, scale)
        pairs = torch.arange((x[0].numel() + 1) // 2, device=x.device, dtype=torch.int32)
        bits = scramble(pairs * GOLDEN + self.keys[:, None]).view(torch.int16)  # (B, elements), two of each hash
        kept = bits[:, : x[0].numel()] >= lowest
        if x.ndim == 4 and is_channels_last(x):
            B, C, H, W = x.shape
            kept = kept.view(B, H, W, C).permute(0, 3, 1, 2)
        return x * (kept.reshape(x.shape) * scale).to(x.dtype)


def give_keys(layers: list[Dropout], rows: Tensor) -> None:
    """Gives each layer a key for each row.

    Args:
        rows: (B,) int32, one number a row and step.
    """
    if layers:
        numbers = torch.arange(1, len(layers) + 1, device=rows.device, dtype=torch.int32)
        for layer, keys in zip(layers, scramble(numbers[:, None] * GOLDEN ^ rows), strict=True):
            layer.keys = keys
