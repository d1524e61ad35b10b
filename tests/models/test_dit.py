"""DiT, apart from its parity with diffusers (tests/parity)."""

import pytest
import torch

from src.models.dit import DiT, position_table


def tiny(**settings):
    """A network whose zeros are filled, so that every path reaches the output."""
    torch.manual_seed(0)
    settings = {"channels": 3, "image_size": 8, "patch_size": 2, "hidden_dim": 32, "depth": 2, **settings}
    net = DiT(**{"num_heads": 4, **settings})
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net.eval()


def test_a_fresh_network_answers_zero_and_its_blocks_are_identities():
    """adaLN-Zero: catches gates that do not start at zero."""
    torch.manual_seed(0)
    net = DiT(image_size=8, hidden_dim=32, depth=2, num_heads=4)
    assert not net(torch.randn(2, 3, 8, 8), torch.tensor([0, 999])).any()
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(net.blocks[0](x, c), x)


def test_positions_are_the_columns_then_the_rows():
    """Two patches down, three across: catches rows for columns, and tables that only squares have."""
    table = position_table((2, 3), 8).double()
    for n, (row, column) in enumerate((row, column) for row in range(2) for column in range(3)):
        f = torch.tensor([1.0, 10000.0**-0.5], dtype=torch.float64)
        expected = torch.cat([(column * f).sin(), (column * f).cos(), (row * f).sin(), (row * f).cos()])
        torch.testing.assert_close(table[0, n], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("channels", "size", "patch"), [(1, (8, 12), 4), (4, (6, 2), 2), (5, (3, 5), 1)])
def test_any_channels_and_rectangles(channels, size, patch):
    """Catches height taken for width, and a channel count that is fixed somewhere."""
    y = tiny(channels=channels, image_size=size, patch_size=patch)(torch.randn(3, channels, *size), torch.arange(3))
    assert y.shape == (3, channels, *size)
    assert y.std() > 1e-3


def test_a_token_is_its_patch():
    """Without attention between patches only the patch that is changed answers otherwise, and at its own place."""
    net = tiny(depth=1, image_size=(4, 6))
    net.blocks[0].proj.weight.data.zero_()
    x = torch.randn(1, 3, 4, 6)
    changed = x.clone()
    changed[:, :, 2:4, 4:6] += 1
    with torch.no_grad():
        moved = (net(changed, torch.tensor([5])) - net(x, torch.tensor([5]))).abs().amax(1)[0]
    assert moved[2:4, 4:6].min() > 1e-5
    moved[2:4, 4:6] = 0
    assert moved.max() == 0


def test_each_image_has_its_own_time_and_label():
    net = tiny(num_classes=3)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2])
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(net(x, t, y), alone, rtol=0, atol=1e-5)
    assert (net(x, t, y) - net(x, t.flip(0), y)).abs().max() > 1e-3
    assert (net(x, t, y) - net(x, t, y.flip(0))).abs().max() > 1e-3
    assert torch.equal(net(x, t), net(x, t, torch.tensor([3, 3])))


def test_more_inputs_and_outputs():
    """Self-conditioning's second input and the learned variance's second output."""
    net = tiny(self_conditioning=True, learned_variance=True)
    assert net(torch.randn(2, 6, 8, 8), torch.tensor([3, 700])).shape == (2, 6, 8, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 9}, "patch_size=2 does not divide images of 9x9"),
        ({"image_size": (8, 7)}, "8x7"),
        ({"hidden_dim": 30}, "hidden_dim=30 must be a multiple of 4 and of num_heads=6"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"depth": 0}, "depth=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"channels": 0}, "channels=0"),
        ({"mlp_ratio": 0.5}, "mlp_ratio=0.5"),
        ({"time_scale": 0.0}, "time_scale=0.0"),
        ({"num_classes": 0}, "num_classes=0"),
    ],
)
def test_bad_settings_are_refused_by_value(settings, message):
    with pytest.raises(ValueError, match=message):
        DiT(**settings)
