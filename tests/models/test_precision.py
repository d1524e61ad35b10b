"""Networks whose weights are bfloat16, as trainer.precision=bf16-true makes them."""

import copy

import pytest
import torch

from src.models.dit import DiT
from src.models.simple_unet import SimpleUNet
from src.models.unet import UNet


@pytest.mark.parametrize(
    "make",
    [
        lambda: SimpleUNet(channels=1, image_size=8, hidden_dims=16, time_emb_dim=64),
        lambda: UNet(channels=1, image_size=8, base_channels=32, channel_mults=(1, 2), dropout=0.0),
        lambda: DiT(channels=1, image_size=8, hidden_dim=64, depth=2, num_heads=4),
    ],
    ids=["simple_unet", "unet", "dit"],
)
def test_a_network_in_bfloat16_is_the_same_function(make):
    """Catches float32 activations that meet bfloat16 weights, and a time that is told with eight bits."""
    torch.manual_seed(0)
    net = make()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    half = copy.deepcopy(net).to(torch.bfloat16)
    net.load_state_dict(half.state_dict())  # the rounded weights, in float32
    x, t = torch.randn(64, 1, 8, 8), torch.arange(64) * 15
    with torch.no_grad():
        expected, y = net(x.bfloat16().float(), t), half(x.bfloat16(), t)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).square().mean().sqrt() < 0.02 * expected.std()
