"""Networks that take labels, and those that do not."""

import pytest
import torch

from src.models.dit import DiT
from src.models.simple_unet import SimpleUNet
from src.models.unet import UNet


def unet(num_classes):
    return UNet(1, 8, base_channels=16, channel_mults=(1, 2), num_res_blocks=1, dropout=0.0, num_classes=num_classes)


def simple_unet(num_classes):
    return SimpleUNet(1, 8, hidden_dims=8, time_emb_dim=16, num_classes=num_classes)


def dit(num_classes):
    return DiT(1, 8, hidden_dim=16, depth=1, num_heads=2, num_classes=num_classes)


def early(num_classes):
    return UNet(1, 8, base_channels=16, channel_mults=(1,), dropout=0.0, early_labels=True, num_classes=num_classes)


@pytest.fixture(params=[unet, simple_unet, dit, early])
def make(request):
    torch.manual_seed(0)

    def filled(num_classes):
        net = request.param(num_classes).eval()
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
        return net

    return filled


X, T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 500, 900])


def test_no_label_is_the_label_after_the_last(make):
    net = make(10)
    assert torch.equal(net(X, T), net(X, T, torch.tensor([10, 10, 10])))


def test_each_image_is_told_its_own_label(make):
    """Catches labels that are broadcast, or told to the wrong image."""
    net = make(10)
    y = torch.tensor([3, 7, 3])
    together = net(X, T, y)
    assert not torch.allclose(together, net(X, T))
    for i in range(3):
        torch.testing.assert_close(
            together[i : i + 1], net(X[i : i + 1], T[i : i + 1], y[i : i + 1]), rtol=0, atol=1e-5
        )


def test_a_network_without_classes_ignores_labels_exactly(make):
    net = make(None)
    assert torch.equal(net(X, T), net(X, T, torch.tensor([1, 2, 3])))


def test_labels_cost_their_table_and_nothing_else(make):
    count = [sum(p.numel() for p in make(n).parameters()) for n in (None, 10)]
    assert count[1] - count[0] == 11 * make(10).label_embedding.table.embedding_dim


def test_no_classes_at_all_are_refused():
    with pytest.raises(ValueError, match="num_classes=0 must be at least 1"):
        unet(0)
