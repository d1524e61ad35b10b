"""The tutorial's U-Net, whole and broken on purpose."""

import pytest
import torch
import torch.nn.functional as F

from src.models.simple_unet import SimpleUNet


def build(**settings):
    torch.manual_seed(0)
    return SimpleUNet(channels=2, image_size=16, hidden_dims=8, time_emb_dim=32, **settings).eval()


def images():
    return torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(1))


def blur(output):
    """Gives every 2x2 window its maximum: what the skip carries changes, what max-pooling hands down does not."""
    return F.interpolate(F.max_pool2d(output, 2), scale_factor=2.0)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_skip_connections_can_be_cut(level):
    """Catches a switch that does nothing, or that cuts the path through the bottom as well."""

    def output(skips, change):
        net = build(skip_connections=skips)
        net.encoder[level].register_forward_hook(lambda block, inputs, output: change(output))
        return net(images(), torch.tensor([3, 700]))

    whole, cut = output(True, torch.clone), output(False, torch.clone)
    assert (output(True, blur) - whole).abs().max() > 1e-3
    assert torch.equal(output(False, blur), cut)
    assert (output(False, torch.zeros_like) - cut).abs().max() > 1e-3


def test_each_weight_has_a_gradient_also_of_what_is_cut():
    """DDP waits for the gradient of every parameter."""
    net = build(time_conditioning=False, skip_connections=False)
    net(images(), torch.tensor([3, 700])).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_time_conditioning_can_be_cut():
    """Catches a switch that does nothing, and a time that still leaks in somewhere."""
    x = images()
    times = [torch.tensor([t, t]) for t in (0, 1, 999)]
    told = [build()(x, t) for t in times]
    deaf = [build(time_conditioning=False)(x, t) for t in times]
    assert torch.equal(deaf[0], deaf[1])
    assert torch.equal(deaf[0], deaf[2])
    assert (told[0] - told[1]).abs().max() > 1e-4
    assert (told[0] - told[2]).abs().max() > 1e-3


def test_each_image_has_its_own_time():
    """Catches one time for the whole batch, and statistics shared between images."""
    x, t = images(), torch.tensor([3, 700])
    net = build()
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(net(x, t), alone, rtol=0, atol=1e-5)
    assert (net(x, t) - net(x, t.flip(0))).abs().max() > 1e-4


def test_broken_variants_keep_the_parameters():
    """Catches an ablation that changes the network's size along with what it removes."""
    states = [
        {name: tuple(p.shape) for name, p in build(skip_connections=s, time_conditioning=c).named_parameters()}
        for s in (True, False)
        for c in (True, False)
    ]
    assert all(state == states[0] for state in states)
    assert sum(p.numel() for p in SimpleUNet().parameters()) == 4_019_331


def test_rectangular_images_keep_their_shape():
    """Catches height taken for width."""
    net = SimpleUNet(channels=1, image_size=(8, 24), hidden_dims=8, time_emb_dim=32)
    y = net(torch.randn(3, 1, 8, 24), torch.tensor([0, 1, 999]))
    assert y.shape == (3, 1, 8, 24)
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 28}, "28x28.*multiples of 8.*24 or 32"),
        ({"image_size": (32, 4)}, "32x4.*4: 8"),
        ({"hidden_dims": 12}, "hidden_dims=12.*8"),
        ({"hidden_dims": 0}, "hidden_dims=0"),
        ({"time_emb_dim": 5}, "5"),
    ],
)
def test_bad_settings_are_refused_by_value(settings, message):
    """Catches sizes that fail later, in the middle of a forward pass, with a shape error."""
    with pytest.raises(ValueError, match=message):
        SimpleUNet(**settings)
