"""Our U-Net against diffusers' UNet2DModel with the same, random weights: the same function."""

import pytest
import torch
from diffusers import UNet2DModel

from src.models.unet import Stage, UNet

RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}


def randomise(net):
    """Fills every parameter, for our zeros would hide whatever lies behind them."""
    g = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        with torch.no_grad():
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(("norm" in name and "weight" in name) + 0.2 * noise)


def to_diffusers(net):
    """Our weights under diffusers' names."""
    state = {}

    def put(name, weight, bias):
        state[f"{name}.weight"], state[f"{name}.bias"] = weight, bias

    def put_stage(block, i, stage):
        for ours, theirs in RESNET.items():
            layer = getattr(stage.block, ours)
            if not isinstance(layer, torch.nn.Identity):
                put(f"{block}.resnets.{i}.{theirs}", layer.weight, layer.bias)
        if stage.attention is not None:
            name, attention = f"{block}.attentions.{i}", stage.attention
            put(f"{name}.group_norm", attention.norm.weight, attention.norm.bias)
            weights, biases = attention.qkv.weight[:, :, 0, 0].chunk(3), attention.qkv.bias.chunk(3)
            for key, weight, bias in zip("qkv", weights, biases, strict=True):
                put(f"{name}.to_{key}", weight, bias)
            put(f"{name}.to_out.0", attention.proj.weight[:, :, 0, 0], attention.proj.bias)

    for name in ("conv_in", "conv_out"):
        put(name, getattr(net, name).weight, getattr(net, name).bias)
    put("conv_norm_out", net.norm_out.weight, net.norm_out.bias)
    put("time_embedding.linear_1", net.time_embedding[1].weight, net.time_embedding[1].bias)
    put("time_embedding.linear_2", net.time_embedding[3].weight, net.time_embedding[3].bias)
    for side, layers in (("down", net.down), ("up", net.up)):
        level = i = 0
        for layer in layers:
            if isinstance(layer, Stage):
                put_stage(f"{side}_blocks.{level}", i, layer)
                i += 1
            else:
                put(f"{side}_blocks.{level}.{side}samplers.0.conv", layer.conv.weight, layer.conv.bias)
                level, i = level + 1, 0
    for i, stage in enumerate(net.middle):
        put_stage("mid_block", i, stage)
    return state


def their_unet(size, channels, widths, attend, norm_groups):
    kinds = ["Attn" if level in attend else "" for level in range(len(widths))]
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        layers_per_block=2,
        norm_num_groups=norm_groups,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,  # one head
    )


def assert_same_function(net, theirs, size, channels):
    missing, unexpected = theirs.load_state_dict(to_diffusers(net), strict=True)
    assert not missing
    assert not unexpected
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([7, 998])
    with torch.no_grad():
        a, b = net.eval()(x, t), theirs.eval()(x, t).sample
    assert 0.1 < a.std() < 10
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("contrast", [1.0, 1e-3])
def test_a_small_network_is_the_same_function(contrast):
    """Catches any difference in layout; with little contrast, in the group norms' eps, which large numbers hide."""
    net = UNet(
        channels=1,
        image_size=16,
        base_channels=32,
        channel_mults=(1, 2, 2),
        attention_resolutions=(8,),
        norm_groups=8,
    )
    randomise(net)
    with torch.no_grad():
        for parameter in net.conv_in.parameters():
            parameter.mul_(contrast)
    assert_same_function(net, their_unet(16, 1, (32, 64, 64), attend=[1], norm_groups=8), 16, 1)


def test_the_cifar10_network_is_that_of_google_ddpm_cifar10_32():
    """Catches a network that cannot take the published weights: the same 35,746,307 numbers, the same output."""
    net = UNet()
    randomise(net)
    theirs = their_unet(32, 3, (128, 256, 256, 256), attend=[1], norm_groups=32)
    assert sum(p.numel() for p in theirs.parameters()) == 35_746_307
    assert_same_function(net, theirs, 32, 3)
