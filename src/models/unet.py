"""The U-Net of Ho et al. 2020 (Appendix B), with the options that make it those of the papers after it.

Weights start Xavier-uniform, and the last convolution of each residual block, of each attention and of the network at
zero, so that every block begins as the identity. Which options make which paper's network: conf/model/unet_*.yaml.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.models.attention import Attention
from src.models.blocks import Downsample, ResidualBlock, Stage, Upsample
from src.models.embeddings import LabelEmbedding, SinusoidalEmbedding, check_divisible
from src.models.norm import group_norm
from src.models.patches import fold, unfold
from src.shapes import as_pair


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
        channels_per_head: instead of num_heads, of which wider levels then have more.
        middle_attention: attention between the two blocks at the bottom.
        middle_norm: normalises its input; diffusers leaves that out together with its "scale_shift".
        up_attention: on the way up, attention after "all" blocks of a level, or after its "last" alone (DDPM++).
        dropout: probability, after the second norm and activation of each block.
        norm_groups: the most groups of a group norm; see `group_norm`.
        norm_eps: of the group norms; 1e-6 in Ho et al. and DDPM++, 1e-5 in ADM.
        min_group_channels: the fewest channels that a group may have.
        patch_size: folds patches of this size into channels at the input and back at the output. 2 quarters the work
            at the highest resolution, which pays where compute is scarce; 1 is the papers' networks.
        num_classes: of a network that takes labels; None for one that does not.
        early_labels: labels are added to the sinusoids, before the layers that embed the time (DDPM++), not after.
        learned_variance: a second output of the image's shape (Sec. 3.1, Nichol & Dhariwal 2021).
        self_conditioning: a second input of the image's shape, the last guess of x0 (Chen et al. 2023).
        scale_shift_norm: the time embedding scales and shifts after the second norm instead of being added before it
            (Eq. 18, Nichol & Dhariwal 2021, "adaptive group normalization").
        resampling: between levels a convolution ("conv", Ho et al.), or a residual block that halves and doubles
            ("residual", ADM), whose shortcut may have a 1x1 convolution ("residual_projected", DDPM++).
        padding: of strided convolutions, see `Downsample`.
        skip_scale: what sums of a block and its shortcut are multiplied by; sqrt(1/2) in DDPM++.
        wide_stem: the first convolution has the first level's width and not base_channels (ADM).
        cosine_first, endpoint, time_scale: see `SinusoidalEmbedding`; what is not Ho et al.'s is ADM's.
        augment_dim: numbers that tell what augmentation did to an image; a layer of them, without a bias, is added to
            the sinusoids (Appendix F.2, Karras et al. 2022); without them, as with zeros, the image is as it was. 0 for
            none, 9 of augment=edm.
        gradient_checkpointing: keep no activations inside the blocks and compute them again on the way back: less
            memory for a third more time, and the same gradients.

    Raises:
        ValueError: for sizes the depth cannot halve, heads that do not divide a width, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        base_channels: int = 128,
        channel_mults: Sequence[float] = (1, 2, 2, 2),
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
        channels_per_head: int | None = None,
        up_attention: Literal["all", "last"] = "all",
        norm_eps: float = 1e-6,
        min_group_channels: int = 2,
        early_labels: bool = False,
        resampling: Literal["conv", "residual", "residual_projected"] = "conv",
        padding: Literal["tensorflow", "symmetric"] = "tensorflow",
        skip_scale: float = 1.0,
        wide_stem: bool = False,
        cosine_first: bool = False,
        endpoint: bool = True,
        time_scale: float = 1.0,
        gradient_checkpointing: bool = False,
        augment_dim: int = 0,
        middle_norm: bool = True,
    ) -> None:
        super().__init__()
        _check_positive(base_channels=base_channels, num_res_blocks=num_res_blocks, num_heads=num_heads)
        _check_positive(channels=channels, norm_groups=norm_groups, patch_size=patch_size)
        _check_positive(
            min_group_channels=min_group_channels,
            channels_per_head=1 if channels_per_head is None else channels_per_head,
        )
        widths = _widths(base_channels, channel_mults)
        levels = len(widths)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        if not norm_eps > 0 or not skip_scale > 0:
            raise ValueError(f"norm_eps={norm_eps} and skip_scale={skip_scale} must be positive")
        if augment_dim < 0:
            raise ValueError(f"augment_dim={augment_dim} must not be negative; 9 is that of augment=edm, 0 is none")
        height, width = as_pair(image_size)
        check_divisible((height, width), patch_size * 2 ** (levels - 1), f"a U-Net of {levels} levels")
        attends = [height // patch_size // 2**level in attention_resolutions for level in range(levels)]
        attending = {c for c, attend in zip(widths, attends, strict=True) if attend}
        _check_heads(widths, attending | ({widths[-1]} if middle_attention else set()), num_heads, channels_per_head)

        time_dim = 4 * base_channels
        norm = partial(group_norm, groups=norm_groups, eps=norm_eps, smallest=min_group_channels)
        residual = partial(
            ResidualBlock,
            time_dim=time_dim,
            dropout=dropout,
            norm=norm,
            scale_shift=scale_shift_norm,
            skip_scale=skip_scale,
        )
        resample = partial(residual, project=resampling == "residual_projected")

        def stage(c_in: int, c_out: int, attend: bool, normed: bool = True) -> Stage:
            heads = num_heads if channels_per_head is None else c_out // channels_per_head
            before = norm if normed else nn.Identity
            return Stage(residual(c_in, c_out), Attention(c_out, heads, before, skip_scale) if attend else None)

        self.patch_size = patch_size
        self.gradient_checkpointing = gradient_checkpointing
        self.time_embedding = nn.Sequential(
            SinusoidalEmbedding(base_channels, cosine_first=cosine_first, endpoint=endpoint, scale=time_scale),
            nn.Linear(base_channels, time_dim),
            nn.SiLU(),
            nn.Linear(time_dim, time_dim),
        )
        self.num_classes = num_classes
        self.early_labels = early_labels
        label_dim = base_channels if early_labels else time_dim
        self.label_embedding = None if num_classes is None else LabelEmbedding(num_classes, label_dim)
        self.augment_dim = augment_dim
        self.augment_embedding = nn.Linear(augment_dim, base_channels, bias=False) if augment_dim else None
        self.learned_variance = learned_variance
        self.self_conditioning = self_conditioning
        folded = channels * patch_size**2
        c = widths[0] if wide_stem else base_channels
        self.conv_in = nn.Conv2d(folded * (1 + self_conditioning), c, 3, padding=1)

        self.down = nn.ModuleList()
        skips = [c]
        for level in range(levels):
            for _ in range(num_res_blocks):
                self.down.append(stage(c, widths[level], attends[level]))
                c = widths[level]
                skips.append(c)
            if level < levels - 1:
                self.down.append(Downsample(c, padding) if resampling == "conv" else resample(c, c, resample="down"))
                skips.append(c)

        self.middle = nn.ModuleList([stage(c, c, middle_attention, middle_norm), stage(c, c, False)])

        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            for i in range(num_res_blocks + 1):
                attend = attends[level] and (up_attention == "all" or i == num_res_blocks)
                self.up.append(stage(c + skips.pop(), widths[level], attend))
                c = widths[level]
            if level > 0:
                self.up.append(Upsample(c) if resampling == "conv" else resample(c, c, resample="up"))

        self.norm_out = norm(c)
        self.conv_out = nn.Conv2d(c, folded * (1 + learned_variance), 3, padding=1)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        last: list[nn.Conv2d] = [m.conv2 for m in self.modules() if isinstance(m, ResidualBlock)]
        last += [m.proj for m in self.modules() if isinstance(m, Attention)]
        for conv in [*last, self.conv_out]:
            nn.init.zeros_(conv.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        time = self._embed(t, y, augment)
        x = self.conv_in(fold(x, self.patch_size))
        skips = [x]
        for layer in self.down:
            x = self._call(layer, x, time)
            skips.append(x)
        for layer in self.middle:
            x = self._call(layer, x, time)
        for layer in self.up:
            x = self._call(layer, x, time, skips.pop()) if isinstance(layer, Stage) else self._call(layer, x, time)
        return unfold(self.conv_out(self.norm_out(x, silu=True)), self.patch_size)

    def _embed(self, t: Tensor, y: Tensor | None, augment: Tensor | None) -> Tensor:
        """The embedding of times and labels, (B, time_dim), activated: every block starts with that."""
        sinusoids, *layers = self.time_embedding
        time = sinusoids(t)
        if self.augment_embedding is not None and augment is not None:
            time = time + self.augment_embedding(augment.to(time.dtype))
        if self.label_embedding is not None and self.early_labels:
            time = time + self.label_embedding(y, t.shape[0])
        for layer in layers:
            time = layer(time)
        if self.label_embedding is not None and not self.early_labels:
            time = time + self.label_embedding(y, t.shape[0])
        return F.silu(time)

    def _call(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


def _widths(base_channels: int, channel_mults: Sequence[float]) -> list[int]:
    """The channels of each level."""
    if base_channels % 4:
        raise ValueError(f"base_channels={base_channels} must be a multiple of 4")
    mults = list(channel_mults)
    widths = [round(base_channels * mult) for mult in mults]
    off = [abs(base_channels * mult - w) for mult, w in zip(mults, widths, strict=True)]
    if not widths or min(widths) < 4 or max(off) > 1e-6:  # a mult may be a third
        raise ValueError(
            f"channel_mults={mults} must be a list of numbers, one a level, each a whole number of channels with "
            f"base_channels={base_channels} and at least 4"
        )
    return widths


def _check_heads(widths: list[int], attending: set[int], num_heads: int, channels_per_head: int | None) -> None:
    if channels_per_head is None:
        for c in widths:
            if c % num_heads:
                raise ValueError(f"num_heads={num_heads} does not divide a level's {c} channels; choose a divisor")
        return
    if num_heads != 1:
        raise ValueError(f"num_heads={num_heads} and channels_per_head={channels_per_head} cannot both be; leave one")
    for c in attending:
        if c % channels_per_head:
            raise ValueError(
                f"channels_per_head={channels_per_head} does not divide the {c} channels of a level with attention; "
                "choose a divisor"
            )


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
