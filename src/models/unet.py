"""The U-Net of Ho et al. 2020 (Appendix B), general in width, depth, attention, image size and channels.

Group norms have 32 groups and eps 1e-6; weights start Xavier-uniform, and the last convolution of each residual block,
of each attention and of the network at zero, so that every block begins as the identity; downsampling pads (0, 1, 0, 1)
as TensorFlow's SAME does.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.dropout import Dropout
from src.models.embeddings import LabelEmbedding, SinusoidalEmbedding, check_divisible
from src.models.norm import group_norm
from src.shapes import as_pair

EPS = 1e-6  # of the group norms


class ResidualBlock(nn.Module):
    """x + conv(dropout(act(norm(conv(act(norm(x))) + time)))), (B, C, H, W) to (B, D, H, W).

    With scale_shift the time does not shift before the norm, but after it: norm(...) (1 + scale) + shift.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int,
        dropout: float,
        norm_groups: int,
        scale_shift: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = group_norm(in_channels, norm_groups, EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, out_channels * (1 + scale_shift))
        self.norm2 = group_norm(out_channels, norm_groups, EPS)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """x + proj(softmax(q k / sqrt(d)) v) over the H W positions, (B, C, H, W) to the same."""

    def __init__(self, channels: int, num_heads: int, norm_groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels, norm_groups, EPS)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.num_heads, C // self.num_heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # (B, heads, H W, C / heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(out.transpose(-1, -2).reshape(B, C, H, W))


class Downsample(nn.Module):
    """Strided convolution, (B, C, H, W) to (B, C, H / 2, W / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution, (B, C, H, W) to (B, C, 2 H, 2 W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """A residual block and, where the resolution asks for it, attention."""

    def __init__(self, block: ResidualBlock, attention: Attention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.block(x, time)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """The U-Net of Ho et al. 2020; the defaults are their CIFAR-10 network, 35,746,307 parameters.

    Args:
        channels: image channels.
        image_size: height and width, or one number for both; multiples of patch_size * 2^(levels - 1).
        base_channels: width of the first level; a multiple of 4.
        channel_mults: width of each level over base_channels; their number is the depth.
        num_res_blocks: residual blocks a level on the way down; one more on the way up.
        attention_resolutions: heights of the feature maps that get attention after each block.
        num_heads: attention heads.
        middle_attention: attention between the two blocks at the bottom.
        dropout: probability, after the second norm and activation of each block.
        num_classes: of a network that takes labels; None for one that does not.
        learned_variance: a second output of the image's shape (Sec. 3.1, Nichol & Dhariwal 2021).
        self_conditioning: a second input of the image's shape, the last guess of x0 (Chen et al. 2023).
        scale_shift_norm: the time embedding scales and shifts after the second norm instead of being added before it
            (Eq. 18, Nichol & Dhariwal 2021, "adaptive group normalization").
        norm_groups: the most groups of a group norm; see `group_norm`.
        patch_size: folds patches of this size into channels at the input and back at the output. 2 quarters the work
            at the highest resolution, which pays where compute is scarce; 1 is the paper's network.

    Raises:
        ValueError: for sizes the depth cannot halve, heads that do not divide a width, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        base_channels: int = 128,
        channel_mults: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        num_heads: int = 1,
        middle_attention: bool = True,
        dropout: float = 0.1,
        norm_groups: int = 32,
        patch_size: int = 1,
        num_classes: int | None = None,
        learned_variance: bool = False,
        self_conditioning: bool = False,
        scale_shift_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_positive(base_channels=base_channels, num_res_blocks=num_res_blocks, num_heads=num_heads)
        _check_positive(channels=channels, norm_groups=norm_groups, patch_size=patch_size)
        if base_channels % 4:
            raise ValueError(f"base_channels={base_channels} must be a multiple of 4")
        if not channel_mults or min(channel_mults) < 1:
            raise ValueError(f"channel_mults={list(channel_mults)} must be a list of whole numbers from 1, one a level")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        levels = len(channel_mults)
        height, width = as_pair(image_size)
        check_divisible((height, width), patch_size * 2 ** (levels - 1), f"a U-Net of {levels} levels")

        time_dim = 4 * base_channels
        widths = [base_channels * mult for mult in channel_mults]
        for c in widths:
            if c % num_heads:
                raise ValueError(f"num_heads={num_heads} does not divide a level's {c} channels; choose a divisor")
        heights = [height // patch_size // 2**level for level in range(levels)]

        def stage(c_in: int, c_out: int, attend: bool) -> Stage:
            return Stage(
                ResidualBlock(c_in, c_out, time_dim, dropout, norm_groups, scale_shift_norm),
                Attention(c_out, num_heads, norm_groups) if attend else None,
            )

        self.patch_size = patch_size
        self.time_embedding = nn.Sequential(
            SinusoidalEmbedding(base_channels),
            nn.Linear(base_channels, time_dim),
            nn.SiLU(),
            nn.Linear(time_dim, time_dim),
        )
        self.num_classes = num_classes
        self.label_embedding = None if num_classes is None else LabelEmbedding(num_classes, time_dim)
        self.learned_variance = learned_variance
        self.self_conditioning = self_conditioning
        folded = channels * patch_size**2
        self.conv_in = nn.Conv2d(folded * (1 + self_conditioning), base_channels, 3, padding=1)

        self.down = nn.ModuleList()
        c, skips = base_channels, [base_channels]
        for level in range(levels):
            for _ in range(num_res_blocks):
                self.down.append(stage(c, widths[level], heights[level] in attention_resolutions))
                c = widths[level]
                skips.append(c)
            if level < levels - 1:
                self.down.append(Downsample(c))
                skips.append(c)

        self.middle = nn.ModuleList([stage(c, c, middle_attention), stage(c, c, False)])

        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            for _ in range(num_res_blocks + 1):
                self.up.append(stage(c + skips.pop(), widths[level], heights[level] in attention_resolutions))
                c = widths[level]
            if level > 0:
                self.up.append(Upsample(c))

        self.norm_out = group_norm(c, norm_groups, EPS)
        self.conv_out = nn.Conv2d(c, folded * (1 + learned_variance), 3, padding=1)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        last = [m.conv2 for m in self.modules() if isinstance(m, ResidualBlock)]
        last += [m.proj for m in self.modules() if isinstance(m, Attention)]
        for conv in [*last, self.conv_out]:
            nn.init.zeros_(conv.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        time = self.time_embedding(t)
        if self.label_embedding is not None:
            time = time + self.label_embedding(y, len(x))
        time = F.silu(time)  # every block starts with it
        x = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        skips = [x]
        for layer in self.down:
            x = layer(x) if isinstance(layer, Downsample) else layer(x, time)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, time)
        for layer in self.up:
            x = layer(x) if isinstance(layer, Upsample) else layer(torch.cat([x, skips.pop()], dim=1), time)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch_size)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
