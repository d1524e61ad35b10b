"""The tutorial's U-Net: three blocks down, three blocks up, skips, and the time in every block.

It is here to be read, and to be broken: `skip_connections=False` feeds zeros in place of the skips, and
`time_conditioning=False` in place of the time embedding, so that a broken network has the parameters of a whole one.
"""

import torch
from torch import Tensor, nn

from src.models.convolution import Conv3x3
from src.models.embeddings import LabelEmbedding, SinusoidalEmbedding, check_divisible
from src.models.norm import group_norm
from src.shapes import as_pair


class Block(nn.Module):
    """Two 3x3 convolutions; the time embedding is added between them, (B, C, H, W) to (B, D, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, time_emb_dim: int) -> None:
        super().__init__()
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm1 = group_norm(out_channels, 8, eps=1e-5)
        self.time = nn.Linear(time_emb_dim, out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.norm2 = group_norm(out_channels, 8, eps=1e-5)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        x = x + self.time(time)[:, :, None, None]
        return self.act(self.norm2(self.conv2(x)))


class SimpleUNet(nn.Module):
    """The tutorial's U-Net.

    Args:
        channels: image channels.
        image_size: height and width, or one number for both; multiples of 8.
        hidden_dims: channels of the first block; the next two have twice and four times as many; a multiple of 8.
        time_emb_dim: size of the time embedding.
        skip_connections: hand each encoder block's output to its decoder block.
        time_conditioning: tell the network t.
        num_classes: of a network that takes labels; None for one that does not.

    Raises:
        ValueError: for sizes that cannot be halved three times, or hidden_dims that 8 does not divide.
    """

    def __init__(
        self,
        channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        hidden_dims: int = 64,
        time_emb_dim: int = 256,
        skip_connections: bool = True,
        time_conditioning: bool = True,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_divisible(as_pair(image_size), 8, "simple_unet")
        if hidden_dims < 8 or hidden_dims % 8:
            raise ValueError(f"hidden_dims={hidden_dims} must be a multiple of 8, so that its group norms divide it")
        self.skip_connections = skip_connections
        self.time_conditioning = time_conditioning
        d1, d2, d3 = hidden_dims, 2 * hidden_dims, 4 * hidden_dims
        self.time_embedding = nn.Sequential(
            SinusoidalEmbedding(time_emb_dim), nn.Linear(time_emb_dim, time_emb_dim), nn.SiLU()
        )
        self.num_classes = num_classes
        self.label_embedding = None if num_classes is None else LabelEmbedding(num_classes, time_emb_dim)
        self.encoder = nn.ModuleList(
            [Block(channels, d1, time_emb_dim), Block(d1, d2, time_emb_dim), Block(d2, d3, time_emb_dim)]
        )
        self.down = nn.MaxPool2d(2)
        self.middle = Block(d3, d3, time_emb_dim)
        self.up = nn.ModuleList([nn.ConvTranspose2d(d, d, 2, stride=2) for d in (d3, d2, d1)])
        self.decoder = nn.ModuleList(
            [Block(2 * d3, d2, time_emb_dim), Block(2 * d2, d1, time_emb_dim), Block(2 * d1, d1, time_emb_dim)]
        )
        self.out = nn.Conv2d(d1, channels, 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        time = self.time_embedding(t)
        if not self.time_conditioning:
            time = time * 0  # its parameters keep a gradient, which DDP waits for
        if self.label_embedding is not None:
            time = time + self.label_embedding(y, x.shape[0])
        skips = []
        for block in self.encoder:
            x = block(x, time)
            skips.append(x if self.skip_connections else torch.zeros_like(x))
            x = self.down(x)
        x = self.middle(x, time)
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(torch.cat([up(x), skips.pop()], dim=1), time)
        return self.out(x)
