"""DiT: a transformer over patches of pixels (Peebles & Xie 2023).

The time and the label modulate every block (adaLN-Zero, Sec. 3.2): of an embedding c, layers that start at zero make
shifts, scales and gates, and a block is

    x = x + gate_1 attention(norm(x) (1 + scale_1) + shift_1)
    x = x + gate_2 mlp(norm(x) (1 + scale_2) + shift_2)

so that a fresh network's blocks are the identity, and its output is zero.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.models.attention import attend
from src.models.embeddings import LabelEmbedding, SinusoidalEmbedding
from src.models.patches import is_channels_last
from src.shapes import as_pair

EPS = 1e-6  # of the layer norms
FREQUENCIES = 256  # numbers that tell the time


class Block(nn.Module):
    """Attention and a perceptron over tokens, (B, N, D) to the same, each modulated.

    The rows of `qkv` are q, k, v, and each of these its heads; those of `modulation` shift, scale and gate of the
    attention, then of the perceptron.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(approximate="tanh"), nn.Linear(mlp_dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """`c` is (B, D), activated already."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self._attention(torch.addcmul(shift1, self.norm1(x), 1 + scale1)))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))

    def _attention(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        return self.proj(attend(qkv).reshape(B, N, D))


class DiT(nn.Module):
    """DiT on pixels, of any number of channels; the defaults are DiT-S/2.

    Args:
        channels: image channels.
        image_size: height and width, or one number for both; multiples of patch_size.
        patch_size: pixels along a side of a patch; half of it is four times the tokens and the work.
        hidden_dim: D, numbers a token; a multiple of 4 and of num_heads.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: width of the perceptrons over hidden_dim.
        num_classes: of a network that takes labels; None for one that does not.
        learned_variance: a second output of the image's shape (Sec. 3.1, Nichol & Dhariwal 2021).
        self_conditioning: a second input of the image's shape, the last guess of x0 (Chen et al. 2023).
        time_scale, endpoint: see `SinusoidalEmbedding`; diffusers' DiT has the endpoint, that of the paper has not.
        gradient_checkpointing: keep no activations inside the blocks and compute them again on the way back: less
            memory for a third more time, and the same gradients.

    Raises:
        ValueError: for sizes that patch_size does not divide, or a hidden_dim that 4 and num_heads do not divide.
    """

    positions: Tensor

    def __init__(
        self,
        channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        hidden_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        learned_variance: bool = False,
        self_conditioning: bool = False,
        time_scale: float = 1.0,
        endpoint: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "patch_size": patch_size, "hidden_dim": hidden_dim, "depth": depth}
        for name, value in {**sizes, "num_heads": num_heads, "mlp_ratio": mlp_ratio}.items():
            if not value >= 1:
                raise ValueError(f"{name}={value} must be at least 1")
        height, width = as_pair(image_size)
        if height % patch_size or width % patch_size:
            raise ValueError(f"patch_size={patch_size} does not divide images of {height}x{width}; choose a divisor")
        if hidden_dim % 4 or hidden_dim % num_heads:
            raise ValueError(f"hidden_dim={hidden_dim} must be a multiple of 4 and of num_heads={num_heads}")

        self.patch_size = patch_size
        self.gradient_checkpointing = gradient_checkpointing
        self.num_classes = num_classes
        self.learned_variance = learned_variance
        self.self_conditioning = self_conditioning
        grid = (height // patch_size, width // patch_size)
        self.register_buffer("positions", position_table(grid, hidden_dim), persistent=False)
        self.patches_in = nn.Linear(channels * (1 + self_conditioning) * patch_size**2, hidden_dim)
        self.time_embedding = nn.Sequential(
            SinusoidalEmbedding(FREQUENCIES, cosine_first=True, endpoint=endpoint, scale=time_scale),
            nn.Linear(FREQUENCIES, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
        )
        self.label_embedding = None if num_classes is None else LabelEmbedding(num_classes, hidden_dim)
        self.blocks = nn.ModuleList([Block(hidden_dim, num_heads, round(mlp_ratio * hidden_dim)) for _ in range(depth)])
        self.norm_out = nn.LayerNorm(hidden_dim, elementwise_affine=False, eps=EPS)
        self.modulation_out = nn.Linear(hidden_dim, 2 * hidden_dim)
        self.patches_out = nn.Linear(hidden_dim, channels * (1 + learned_variance) * patch_size**2)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        tables = [] if self.label_embedding is None else [self.label_embedding.table.weight]
        of_time = [m.weight for m in self.time_embedding if isinstance(m, nn.Linear)]
        for weight in [*of_time, *tables]:
            nn.init.normal_(weight, std=0.02)
        modulations = [m.modulation for m in self.modules() if isinstance(m, Block)]
        for layer in [*modulations, self.modulation_out, self.patches_out]:
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        channels_last = is_channels_last(x)
        c = self.time_embedding(t)
        if self.label_embedding is not None:
            c = c + self.label_embedding(y, x.shape[0])
        c = F.silu(c)
        B, C, H, W = x.shape
        p = self.patch_size
        patches = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
        x = self.patches_in(patches.reshape(B, -1, C * p * p)) + self.positions  # (B, N, D)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
        shift, scale = self.modulation_out(c)[:, None].chunk(2, dim=-1)
        x = self.patches_out(torch.addcmul(shift, self.norm_out(x), 1 + scale))
        x = x.view(B, H // p, W // p, p, p, -1)  # a patch's numbers: its rows, columns, channels
        if channels_last:
            return x.transpose(2, 3).reshape(B, H, W, -1).permute(0, 3, 1, 2)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W)


def position_table(grid: tuple[int, int], dim: int) -> Tensor:
    """Sinusoids of each patch's column in the first half, and of its row in the second, (1, N, dim).

    Each half is [sin(p f), cos(p f)] with f_i = 10000^(-4 i / dim): the fixed table of MAE (He et al. 2022), which DiT
    uses. Its halves are called height and width there, and hold the column first.

    Args:
        grid: patches down and across.
        dim: a multiple of 4.
    """
    frequencies = torch.exp(-math.log(10000.0) / (dim // 4) * torch.arange(dim // 4, dtype=torch.float64, device="cpu"))
    rows, columns = (torch.arange(n, dtype=torch.float64, device="cpu") for n in grid)
    row, column = (torch.cat([p.sin(), p.cos()], dim=1) for p in (torch.outer(v, frequencies) for v in (rows, columns)))
    halves = [column[None].expand(len(rows), -1, -1), row[:, None].expand(-1, len(columns), -1)]
    return torch.cat(halves, dim=-1).reshape(1, -1, dim).float()
