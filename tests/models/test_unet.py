"""The U-Net of Ho et al. 2020, apart from its parity with diffusers (tests/parity)."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.models.norm import group_norm
from src.models.unet import Attention, ResidualBlock, Stage, UNet

EIGHT = partial(group_norm, groups=8, eps=1e-6)


def small(**settings):
    """A network of two levels whose zeros are filled, so that every path reaches the output."""
    torch.manual_seed(0)
    settings = {"channels": 3, "image_size": 8, "channel_mults": (1, 2), "dropout": 0.0, **settings}
    net = UNet(base_channels=16, num_res_blocks=1, attention_resolutions=(4,), norm_groups=8, **settings)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net.eval()


def test_the_default_network_has_the_papers_parameters():
    """Catches a layer too many, attention at the wrong levels, biases that come or go."""
    assert sum(p.numel() for p in UNet().parameters()) == 35_746_307


def test_a_fresh_network_answers_zero_and_its_blocks_are_identities():
    """Catches last convolutions that do not start at zero, which costs the first steps of training."""
    torch.manual_seed(0)
    net = UNet(base_channels=32, channel_mults=(1, 2), image_size=16)
    assert not net(torch.randn(2, 3, 16, 16), torch.tensor([0, 999])).any()
    h, time = torch.randn(2, 64, 4, 4), torch.randn(2, 128)
    same_width = [m for m in net.modules() if isinstance(m, Stage) and isinstance(m.block.shortcut, nn.Identity)]
    stages = [s for s in same_width if s.block.conv1.in_channels == 64]
    assert len(stages) == 3
    assert any(s.attention is not None for s in stages)
    for stage in stages:
        assert torch.equal(stage(h, time), h)


def test_other_weights_start_xavier_uniform():
    """Catches torch's default, which is a third of it in these layers."""
    conv = UNet().down[4].block.conv1
    bound = math.sqrt(6 / (9 * conv.in_channels + 9 * conv.out_channels))
    assert conv.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=1e-2)
    assert not conv.bias.any()


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_the_formula(heads):
    """Catches a wrong scale, heads that mix, q for k, rows for columns; 3x5 positions so that H and W differ."""
    torch.manual_seed(0)
    attention = Attention(16, heads, EIGHT)
    x = torch.randn(2, 16, 3, 5)
    with torch.no_grad():
        y = attention(x)
        tokens = F.group_norm(x, 8, attention.norm.weight, attention.norm.bias, 1e-6).flatten(2).double()
        q, k, v = (attention.qkv.weight[:, :, 0, 0].double() @ tokens + attention.qkv.bias.double()[:, None]).chunk(
            3, 1
        )
        out = torch.zeros_like(v)
        d = 16 // heads
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            weights = torch.softmax(torch.einsum("bci,bcj->bij", q[:, part], k[:, part]) / math.sqrt(d), dim=-1)
            out[:, part] = torch.einsum("bij,bcj->bci", weights, v[:, part])
        out = attention.proj.weight[:, :, 0, 0].double() @ out + attention.proj.bias.double()[:, None]
    torch.testing.assert_close(y.double(), x + out.view(2, 16, 3, 5), rtol=0, atol=1e-6)


def test_dropout_acts_in_training_only_and_after_the_second_activation():
    """Catches dropout that samples with, or that sits where Ho et al. have none."""
    net = small(dropout=0.5)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    assert torch.equal(net(x, t), net(x, t))
    assert torch.equal(net(x, t), small(dropout=0.0)(x, t))
    net.train()
    assert (net(x, t) - net(x, t)).abs().max() > 1e-3

    block = ResidualBlock(8, 8, 4, dropout=0.5, norm=EIGHT)
    seen = []
    block.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    h, time = torch.randn(4, 8, 16, 16), torch.randn(4, 4)
    for mode in (True, False):
        block.train(mode)(h, time)
    dropped = seen[0] == 0
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(dropped.numel()))
    torch.testing.assert_close(seen[0], torch.where(dropped, 0, 2 * seen[1]))


def test_each_image_has_its_own_time():
    """Catches one time for the whole batch, and statistics shared between images."""
    net = small()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(net(x, t), alone, rtol=0, atol=1e-5)
    assert (net(x, t) - net(x, t.flip(0))).abs().max() > 1e-3


@pytest.mark.parametrize(("channels", "size", "patch_size"), [(1, (8, 24), 1), (4, (20, 6), 1), (1, (8, 4), 2)])
def test_any_channels_and_rectangles(channels, size, patch_size):
    """Catches height taken for width, and a channel count that is fixed somewhere."""
    y = small(channels=channels, image_size=size, patch_size=patch_size)(
        torch.randn(3, channels, *size), torch.arange(3)
    )
    assert y.shape == (3, channels, *size)
    assert y.isfinite().all()
    assert y.std() > 1e-3


def test_patches_are_channels_at_half_the_resolution():
    """Catches patches that are folded in one order and unfolded in another, or attention at the wrong depth."""
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    plain = small(channels=12, image_size=8)(F.pixel_unshuffle(x, 2), t)
    assert torch.equal(small(image_size=16, patch_size=2)(x, t), F.pixel_shuffle(plain, 2))


def test_attention_sits_where_it_is_asked_for():
    """Catches attention at the width's resolution, or left out on the way up or at the bottom."""

    def attending(**settings):
        net = UNet(base_channels=32, channel_mults=(1, 1, 1), image_size=(32, 16), **settings)
        return [
            [i for i, m in enumerate(part) if isinstance(m, Stage) and m.attention is not None]
            for part in (net.down, net.middle, net.up)
        ]

    assert attending(attention_resolutions=(16,)) == [[3, 4], [0], [4, 5, 6]]
    assert attending(attention_resolutions=(), middle_attention=False) == [[], [], []]
    assert attending(attention_resolutions=(32, 8)) == [[0, 1, 6, 7], [0], [0, 1, 2, 8, 9, 10]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 28}, "28x28.*multiples of 8.*24 or 32"),
        ({"image_size": (32, 36)}, "32x36.*32 or 40"),
        ({"image_size": 4}, "4x4.*4: 8;"),
        ({"image_size": 8, "patch_size": 2}, "8x8.*multiples of 16.*8: 16;"),
        ({"base_channels": 30}, "base_channels=30"),
        ({"channel_mults": ()}, "channel_mults=\\[\\]"),
        ({"channel_mults": (1, 0)}, "channel_mults=\\[1, 0\\]"),
        ({"channel_mults": (1, 1.001)}, "channel_mults=\\[1, 1.001\\]"),
        ({"channels_per_head": 48}, "channels_per_head=48 does not divide the 256 channels"),
        ({"channels_per_head": 64, "num_heads": 2}, "cannot both be"),
        ({"channels_per_head": 0}, "channels_per_head=0"),
        ({"min_group_channels": 0}, "min_group_channels=0"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"skip_scale": 0.0}, "skip_scale=0.0"),
        ({"time_scale": -1.0}, "time_scale=-1.0"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_res_blocks": 0}, "num_res_blocks=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"norm_groups": 0}, "norm_groups=0"),
        ({"channels": 0}, "channels=0"),
    ],
)
def test_bad_settings_are_refused_by_value(settings, message):
    """Catches settings that fail later, in the middle of a forward pass, with a shape error."""
    with pytest.raises(ValueError, match=message):
        UNet(**settings)
