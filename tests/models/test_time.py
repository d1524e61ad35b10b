"""Every network that the configurations offer listens to the time, however narrow it is."""

import pytest
import torch
from torch import nn

from src.models.dit import DiT
from src.models.norm import group_norm
from src.models.simple_unet import SimpleUNet
from src.models.unet import UNet

NETWORKS = {
    "unet_tiny": lambda: UNet(
        1, 8, base_channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,)
    ),
    "unet_small": lambda: UNet(
        1, 8, base_channels=64, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,)
    ),
    "unet of 8 channels": lambda: UNet(1, 8, base_channels=8, channel_mults=(1, 1), num_res_blocks=1),
    "dit": lambda: DiT(1, 8, hidden_dim=32, depth=2, num_heads=4),
    "simple_unet": lambda: SimpleUNet(1, 8, hidden_dims=64, time_emb_dim=256),
    "simple_unet of 8 channels": lambda: SimpleUNet(1, 8, hidden_dims=8, time_emb_dim=16),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_depends_on_the_time(name):
    """Catches norms with one channel a group: they subtract the time embedding, and the network is blind to t."""
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    x = torch.randn(1, 1, 8, 8)
    early, late = net(x, torch.tensor([10])), net(x, torch.tensor([900]))
    assert (early - late).abs().max() > 0.01 * early.std()


@pytest.mark.parametrize(
    ("channels", "groups", "expected"),
    [
        (128, 32, 32),
        (256, 32, 32),
        (64, 32, 32),
        (32, 32, 16),
        (16, 32, 8),
        (144, 32, 24),
        (8, 8, 4),
        (64, 8, 8),
        (2, 32, 1),
    ],
)
def test_groups_divide_the_channels_and_hold_two_at_least(channels, groups, expected):
    norm = group_norm(channels, groups, eps=1e-6)
    assert norm.num_groups == expected
    assert channels % norm.num_groups == 0
