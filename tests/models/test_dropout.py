"""Dropout by row: rate, scale, and masks that go with their rows."""

import pytest
import torch

from src.models import kernel
from src.models.dropout import Dropout, give_keys
from src.models.unet import UNet


def layer(p: float, rows: torch.Tensor) -> Dropout:
    dropout = Dropout(p)
    give_keys([dropout], rows)
    return dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p):
    """Five standard deviations of a binomial, over all and at each of 49 places; what is kept is divided by 1 - p."""
    x = torch.ones(4000, 7, 7)
    y = layer(p, torch.arange(4000, dtype=torch.int32))(x)
    dropped = (y == 0).double()
    assert dropped.mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    assert (dropped.mean(0) - p).abs().max().item() < 5 * (p * (1 - p) / 4000) ** 0.5
    assert y[y != 0].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-4)


def test_a_mask_goes_with_its_row():
    """Catches masks that depend on the batch around a row, which is what splits over devices change."""
    x = torch.randn(8, 3, 5, 5)
    rows = torch.tensor([5, 3, 9, 1, 0, 2, 7, 100], dtype=torch.int32)
    whole = layer(0.3, rows)(x)
    for part in (slice(0, 1), slice(2, 7), slice(7, 8)):
        assert torch.equal(layer(0.3, rows[part])(x[part]), whole[part])
    assert len({tuple((row != 0).flatten().tolist()) for row in whole}) == 8


def test_layers_have_masks_of_their_own():
    first, second = Dropout(0.5), Dropout(0.5)
    give_keys([first, second], torch.arange(4, dtype=torch.int32))
    x = torch.ones(4, 1000)
    agree = ((first(x) == 0) == (second(x) == 0)).double().mean().item()
    assert agree == pytest.approx(0.5, abs=5 * 0.5 / 4000**0.5)


def test_without_keys_or_in_eval_it_is_torchs():
    x = torch.randn(4, 100)
    torch.manual_seed(1)
    ours = Dropout(0.4)(x)
    torch.manual_seed(1)
    assert torch.equal(ours, torch.nn.Dropout(0.4)(x))
    keyed = layer(0.4, torch.arange(4, dtype=torch.int32))
    assert torch.equal(keyed.eval()(x), x)
    assert torch.equal(layer(0.0, torch.arange(4, dtype=torch.int32))(x), x)


def test_the_gradient_is_masked_alike_and_types_stay():
    x = torch.randn(4, 33, dtype=torch.bfloat16, requires_grad=True)
    y = layer(0.5, torch.arange(4, dtype=torch.int32))(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7, 9, 3), (4, 8, 8, 8), (3, 33)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_one_is_the_same_to_the_bit(monkeypatch, shape, dtype, threads):
    """Values, signs of what is dropped, gradients; in either memory format, of an odd number of elements too."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(shape).to(dtype)
    dy = torch.randn(shape).to(dtype)
    formats = [x, x.to(memory_format=torch.channels_last)] if len(shape) == 4 else [x]
    for images in formats:
        dropout, leaf = layer(0.13, torch.arange(shape[0], dtype=torch.int32)), images.clone().requires_grad_()
        compiled = dropout(leaf)
        (of_compiled,) = torch.autograd.grad(compiled, leaf, dy)
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "can_drop", lambda *_: False)
            plain = dropout(leaf)
            (of_plain,) = torch.autograd.grad(plain, leaf, dy)
        assert type(compiled.grad_fn) is not type(plain.grad_fn)
        assert torch.equal(compiled, plain)
        assert torch.equal(compiled.signbit(), plain.signbit())
        assert torch.equal(of_compiled, of_plain)
        assert compiled.stride() == plain.stride() == leaf.stride()


def test_a_rate_next_to_one_keeps_hardly_any():
    y = layer(0.9999999, torch.arange(4, dtype=torch.int32))(torch.ones(4, 1000))
    assert set(y.unique().tolist()) <= {0.0, 2.0**16}
    assert (y != 0).sum() < 5


def test_keys_of_other_rows_are_refused():
    """Catches C that reads beyond them."""
    for rows in (1, 3, 5):
        with pytest.raises(RuntimeError):
            layer(0.5, torch.arange(rows + 1, dtype=torch.int32))(torch.ones(rows + 3, 8))


def test_the_gradient_has_a_gradient():
    x = torch.randn(3, 8, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(3, 8, requires_grad=True)
    y = layer(0.5, torch.arange(3, dtype=torch.int32))(x)
    (dx,) = torch.autograd.grad(y, x, weight, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), weight)
    assert torch.equal(second, (y != 0) * 2.0)


@pytest.mark.usefixtures("compiled")
def test_the_compiled_one_keeps_no_mask():
    """A mask takes as much memory as the images."""
    saved = []
    x = torch.randn(4, 8, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(0.5, torch.arange(4, dtype=torch.int32))(x)
    assert saved == [4]


def test_a_compiled_network_follows_new_keys():
    """Catches keys that a compiled graph has taken for constants."""
    net = UNet(1, 8, base_channels=16, channel_mults=(1,), num_res_blocks=1, dropout=0.5).train()
    torch.nn.init.normal_(net.conv_out.weight)
    layers = [m for m in net.modules() if isinstance(m, Dropout)]
    compiled = torch.compile(net, backend="aot_eager")
    x, t = torch.randn(2, 1, 8, 8), torch.zeros(2)
    for start in (0, 2, 4):
        give_keys(layers, torch.arange(start, start + 2, dtype=torch.int32))
        torch.testing.assert_close(compiled(x, t), net(x, t), atol=1e-5, rtol=1e-5)
