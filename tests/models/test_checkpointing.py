"""Gradient checkpointing: the same gradients to the bit, dropout included, with fewer activations kept."""

import pytest
import torch

from src.models.dit import DiT
from src.models.dropout import Dropout, give_keys
from src.models.unet import UNet

UNET = {"channels": 3, "image_size": 16, "base_channels": 16, "channel_mults": (1, 2), "num_res_blocks": 1}
NETWORKS = {
    "unet": lambda on: UNet(**UNET, attention_resolutions=(8,), dropout=0.3, gradient_checkpointing=on),
    "dit": lambda on: DiT(3, 16, 4, 32, 3, 2, num_classes=4, gradient_checkpointing=on),
}


def step(make, on):
    """The gradients of a training step, and the bytes that its forward pass kept for its backward pass."""
    torch.manual_seed(0)
    net = make(on).train()
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    give_keys([m for m in net.modules() if isinstance(m, Dropout)], torch.tensor([5, 6], dtype=torch.int32))
    kept = {}

    def keep(v):
        kept[v.data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        loss = net(torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])).square().mean()
    before = dict(kept)
    loss.backward()
    weights = {p.data_ptr() for p in net.parameters()}
    return [p.grad for p in net.parameters()], sum(n for at, n in before.items() if at not in weights)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_same_and_activations_fewer(name):
    """Catches masks that are drawn anew in the second pass, and a switch that does nothing."""
    (plain, kept), (again, kept_again) = (step(NETWORKS[name], on) for on in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True) if a is not None)
    assert any(g is not None and g.abs().max() > 0 for g in plain)
    assert kept_again < 0.5 * kept
