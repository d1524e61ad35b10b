"""Two networks that this project and diffusers both have, to the parameter and the operation."""

from typing import Any

import torch
from torch import nn

# What is set of conf/model/unet.yaml, and of diffusers' UNet2DModel beside what all have in common.
LARGE = "large"
SMALL = "small"
SIZES: dict[str, dict[str, Any]] = {
    LARGE: {  # Ho et al. 2020 on CIFAR-10: 35,746,307 parameters
        "shape": (3, 32, 32),
        "ours": [],
        "diffusers": {
            "block_out_channels": (128, 256, 256, 256),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 256,
            "dropout": 0.1,
        },
    },
    SMALL: {
        "shape": (1, 32, 32),
        "ours": [
            "model.base_channels=64",
            "model.channel_mults=[1,2,2]",
            "model.num_res_blocks=1",
            "model.attention_resolutions=[8]",
            "model.dropout=0.0",
        ],
        "diffusers": {
            "block_out_channels": (64, 128, 128),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "attention_head_dim": 128,
            "dropout": 0.0,
        },
    },
}


def peers_network(size: str) -> nn.Module:
    """diffusers' network of this size."""
    from diffusers import UNet2DModel

    channels, height, _ = SIZES[size]["shape"]
    return UNet2DModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        **SIZES[size]["diffusers"],
    )


class Called(nn.Module):
    """diffusers' network, called as net(x, t) and as lucidrains' GaussianDiffusion calls its own."""

    self_condition = False
    random_or_learned_sinusoidal_cond = False

    def __init__(self, net: nn.Module, channels: int) -> None:
        super().__init__()
        self.net = net
        self.channels = self.out_dim = channels

    def forward(self, x: torch.Tensor, t: torch.Tensor, *_: Any) -> torch.Tensor:
        return self.net(x, t, return_dict=False)[0]


def facts_of(net: nn.Module, shape: tuple[int, int, int]) -> dict[str, int]:
    """Parameters, and operations of a forward pass of one image, a multiply-add as two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, *shape), torch.zeros(1))
    return {"parameters": sum(p.numel() for p in net.parameters()), "flops": counter.get_total_flops()}
