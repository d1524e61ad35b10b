"""Networks in channels-last: the same function, and a profile without one tensor that is copied or converted."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.models.dit import DiT
from src.models.norm import normalized
from src.models.patches import fold, unfold
from src.models.unet import UNet

SMALL = {"channels": 3, "image_size": 16, "base_channels": 32, "channel_mults": (1, 2), "num_res_blocks": 1}
UNETS = {
    "ho": {"attention_resolutions": (8,), "dropout": 0.1},
    "adm": {
        "attention_resolutions": (16, 8),
        "channels_per_head": 16,
        "scale_shift_norm": True,
        "resampling": "residual",
        "padding": "symmetric",
        "learned_variance": True,
    },
    "ddpmpp": {
        "attention_resolutions": (16,),
        "up_attention": "last",
        "skip_scale": 0.5**0.5,
        "resampling": "residual_projected",
        "num_heads": 2,
    },
}
COPIES = ("aten.clone", "aten.copy_", "aten._to_copy", "aten.contiguous", "aten._unsafe_view")


class Copies(TorchDispatchMode):
    """Notes every operation that does nothing but write a tensor anew."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if str(function).startswith(COPIES) and args[0].ndim > 1:
            self.found.append((str(function), tuple(args[0].shape)))
        return out


def in_channels_last(net, train):
    torch.manual_seed(0)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    net = net.train(train).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last).requires_grad_(train)
    return net, x


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", UNETS)
def test_a_profile_of_a_unet_shows_no_copy_and_no_conversion(name, train):
    """Catches attention that permutes its heads into place, and layers that answer channels-first."""
    net, x = in_channels_last(UNet(**SMALL, **UNETS[name]), train)
    formats = []
    for module in net.modules():
        module.register_forward_hook(
            lambda m, inputs, y: formats.append(y.ndim != 4 or y.is_contiguous(memory_format=torch.channels_last))
        )
    with Copies() as copies, torch.set_grad_enabled(train):
        y = net(x, torch.tensor([1.0, 2.0]))
        if train:
            y.square().sum().backward()
    assert copies.found == []
    assert len(formats) > 40
    assert all(formats)


@pytest.mark.parametrize("make", [lambda: UNet(**SMALL, **UNETS["adm"]), lambda: DiT(3, 16, 2, 64, 2, 4)])
def test_a_network_in_channels_last_is_the_same_function(make):
    net, x = in_channels_last(make(), train=False)
    t = torch.tensor([3.0, 700.0])
    with torch.no_grad():
        last = net(x, t)
        first = net.to(memory_format=torch.contiguous_format)(x.contiguous(), t)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert first.is_contiguous()
    torch.testing.assert_close(last, first, rtol=0, atol=2e-5)


def test_patches_are_the_same_in_both_formats():
    """Against torch's own, which answers channels-first; 4x6 so that height and width differ."""
    x = torch.randn(2, 3, 4, 6)
    folded = fold(x.to(memory_format=torch.channels_last), 2)
    assert torch.equal(folded, torch.nn.functional.pixel_unshuffle(x, 2))
    assert folded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(unfold(folded, 2), x)
    assert unfold(folded, 2).is_contiguous(memory_format=torch.channels_last)


def test_the_group_norm_for_gpus_is_torchs():
    """The formula that keeps the format, against torch's kernel: values and all gradients."""
    torch.manual_seed(0)
    x = (3 + torch.randn(2, 12, 4, 6, dtype=torch.float64)).to(memory_format=torch.channels_last)
    inputs = [v.requires_grad_() for v in (x, torch.randn(12).double(), torch.randn(12).double())]
    ours = normalized(inputs[0], 4, inputs[1], inputs[2], 1e-5)
    theirs = torch.nn.functional.group_norm(inputs[0], 4, inputs[1], inputs[2], 1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # it computes in float32
    direction = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad((y * direction).sum(), inputs) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
