"""The compiled convolution: exact of whole numbers, near float64 of others, and torch's for what it does not know."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.models import kernel
from src.models.convolution import Conv3x3
from src.training.summary import flops_per_image

pytestmark = pytest.mark.usefixtures("products")

CHANNELS_LAST = torch.channels_last
SHAPES = {  # images, channels, of the output, height, width
    "square": (3, 32, 64, 8, 8),
    "odd": (2, 64, 32, 7, 5),
    "one tile a row": (5, 32, 32, 9, 2),
    "one pixel wide": (3, 96, 32, 4, 1),
    "two pixels": (1, 32, 32, 1, 2),
    "two blocks of tiles": (3, 32, 96, 30, 34),
    "wide": (1, 512, 256, 4, 4),
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def layer_and_images(B, C, D, H, W):
    torch.manual_seed(0)
    conv = Conv3x3(C, D).to(memory_format=CHANNELS_LAST)
    x = torch.randn(B, C, H, W).bfloat16().to(memory_format=CHANNELS_LAST).requires_grad_()
    return conv, x, torch.randn(B, D, H, W).bfloat16().to(memory_format=CHANNELS_LAST)


def whole_numbers(B, C, D, H, W):
    """Fours in the filter, of which sums of a quarter are whole; few enough that bfloat16 knows every one."""
    conv, x, dy = layer_and_images(B, C, D, H, W)
    with torch.no_grad():
        conv.weight.copy_(4 * torch.randint(-1, 2, conv.weight.shape))
        conv.bias.copy_(torch.randint(-9, 10, conv.bias.shape))
        x.copy_(torch.randint(-2, 3, x.shape))
    return conv, x, torch.randint_like(dy, -2, 3)


def ours(conv, x, dy):
    with torch.autocast("cpu", torch.bfloat16):
        assert conv._fast(x)
        y = conv(x)
    return y.detach(), *torch.autograd.grad(y, (x, conv.weight, conv.bias), dy)


def by_torch(conv, x, dy, dtype):
    inputs = [v.detach().to(dtype).requires_grad_() for v in (x, conv.weight, conv.bias)]
    y = F.conv2d(*inputs, padding=1)
    return y.detach(), *torch.autograd.grad(y, inputs, dy.to(dtype))


def error(value, exact):
    return float(((value - exact).norm() / exact.norm()).detach())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sums_of_whole_numbers_are_exact(shape):
    """No bit is lost before the last rounding, of float to bfloat16, which is torch's."""
    case = whole_numbers(*shape)
    y, dx, dweight, dbias = ours(*case)
    exact = by_torch(*case, torch.float64)
    assert torch.equal(y, exact[0].bfloat16())
    assert torch.equal(dx, exact[1].bfloat16())
    assert torch.equal(dweight, exact[2].float())
    assert torch.equal(dbias, exact[3].float())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_float64_up_to_roundings(shape):
    """A rounding to bfloat16 is an error of 2^-9 / sqrt(3) = 0.1%; V and U are rounded, and Y amplifies it by 1.7."""
    case = layer_and_images(*shape)
    exact = by_torch(*case, torch.float64)
    theirs = by_torch(*case, torch.bfloat16)
    for name, a, b, c in zip(("y", "dx", "dweight"), ours(*case), theirs, exact, strict=False):
        assert error(a, c) < 5e-3, name
        assert error(a, c) < 2.8 * error(b, c), name
    assert error(ours(*case)[3], exact[3]) < 1e-6


def test_what_is_rounded_has_no_bias():
    """The mean error of a million outputs, over what one output is off by, is that of chance."""
    conv, x, _ = layer_and_images(8, 64, 128, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        off = conv(x).double() - F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert abs(off.mean() / off.std()) < 5e-3
    pixels = off.square().mean((0, 1)).sqrt()  # which of the four of a tile it is makes no difference
    corners = torch.stack([pixels[a::2, b::2].mean() for a in (0, 1) for b in (0, 1)])
    assert corners.max() / corners.min() < 1.2


def test_every_bit_is_the_same_for_any_number_of_threads(threads):
    case = layer_and_images(14, 64, 96, 12, 14)  # two blocks of tiles, the second with one alone
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(ours(*case))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def test_an_image_does_not_depend_on_those_beside_it():
    conv, x, dy = layer_and_images(6, 32, 32, 11, 6)
    y, dx, *_ = ours(conv, x, dy)
    for i in range(len(x)):
        one = x.detach()[i : i + 1].requires_grad_()
        alone = ours(conv, one, dy[i : i + 1])
        assert torch.equal(alone[0], y[i : i + 1])
        assert torch.equal(alone[1], dx[i : i + 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_image_and_near_its_place(bad):
    conv, x, _ = layer_and_images(3, 32, 32, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x[1, 5, 3, 3] = bad
        y = conv(x)
    assert y[[0, 2]].isfinite().all()
    assert not y[1, :, 2:5, 2:5].isfinite().any()
    near = torch.zeros(8, 8, dtype=torch.bool)
    near[2:6, 2:6] = True  # the tiles that look at it
    assert y[1][:, ~near].isfinite().all()


def test_gradients_come_for_what_is_trained_alone():
    conv, x, dy = layer_and_images(2, 32, 64, 6, 6)
    expected = ours(conv, x, dy)
    with torch.autocast("cpu", torch.bfloat16):
        conv(x.detach()).backward(dy)
    assert torch.equal(conv.weight.grad, expected[2])
    assert conv.weight.grad.is_contiguous(memory_format=CHANNELS_LAST)
    assert x.grad is None
    conv.requires_grad_(False).weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        conv(x).backward(dy)
    assert torch.equal(x.grad, expected[1])
    assert conv.weight.grad is None


def test_gradients_of_any_layout_and_type_are_taken():
    conv, x, dy = layer_and_images(2, 32, 64, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    one = torch.autograd.grad(y.float().sum(), conv.weight, retain_graph=True)[0]  # of an expanded 1
    assert torch.equal(one, torch.autograd.grad(y, conv.weight, torch.ones_like(dy))[0])


def test_without_autocast_what_is_bfloat16_is_taken():
    conv, x, dy = whole_numbers(2, 32, 32, 6, 6)
    conv = conv.bfloat16()
    assert conv._fast(x)
    y = conv(x)
    expected = by_torch(conv, x, dy, torch.float64)
    assert torch.equal(y, expected[0].bfloat16())
    gradients = torch.autograd.grad(y, conv.parameters(), dy)
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2
    assert torch.equal(gradients[0], expected[2].bfloat16())
    conv.bias.data = conv.bias.data.float()
    with pytest.raises(RuntimeError, match="type"):
        conv(x)


def test_images_that_are_not_rounded_yet_are_by_autocast():
    conv, x, _ = whole_numbers(2, 32, 32, 6, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x.float()), conv(x))


def test_all_else_is_torchs():
    conv, x, _ = layer_and_images(2, 32, 64, 6, 6)
    few = Conv3x3(24, 32)
    assert not conv._fast(x)  # without autocast: torch's own error
    assert not conv._fast(x.float())
    assert torch.equal(conv(x.float()), F.conv2d(x.float(), conv.weight, conv.bias, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv._fast(x)
        assert not conv._fast(x.contiguous())
        assert not conv._fast(x.to("meta"))
        assert not few._fast(x[:, :24].contiguous(memory_format=CHANNELS_LAST))
    with torch.autocast("cpu", torch.float16):
        assert not conv._fast(x)


def test_what_torch_refuses_is_refused_by_torch():
    conv, x, _ = layer_and_images(2, 32, 64, 6, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert conv(x[:0]).shape == (0, 64, 6, 6)
        with pytest.raises(RuntimeError, match="channels"):
            conv(torch.zeros(2, 64, 6, 6).to(memory_format=CHANNELS_LAST))
        assert conv(x[0]).shape == (64, 6, 6)
        conv.bias = None
        assert conv(x).shape == (2, 64, 6, 6)


def test_operations_are_counted():
    net = Conv3x3(32, 64).bfloat16().to(memory_format=CHANNELS_LAST)
    net.classifies = True  # takes no times
    assert flops_per_image(net, (32, 6, 8), torch.device("cpu")) == 2 * 9 * 32 * 64 * 6 * 8


def test_what_is_kept_for_the_gradient_is_the_input():
    conv, x, _ = layer_and_images(2, 32, 64, 6, 6)
    kept = []
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda v: v):
        conv(x)
    assert [v.data_ptr() for v in kept] == [x.data_ptr(), conv.weight.data_ptr()]


def test_what_is_kept_may_come_back_in_another_layout():
    """As from the CPU, with torch.autograd.graph.save_on_cpu."""
    conv, x, dy = layer_and_images(2, 32, 64, 6, 6)
    expected = ours(conv, x, dy)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda v: v.contiguous(), lambda v: v),
    ):
        y = conv(x)
    for a, b in zip(torch.autograd.grad(y, (x, conv.weight, conv.bias), dy), expected[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["padding_mode", "stride", "dilation", "padding", "weight", "bias", "sizes"])
def test_what_is_changed_after_it_was_made_is_seen(name):
    conv, x, _ = layer_and_images(1, 32, 32, 8, 8)
    changes = {
        "padding_mode": {"padding_mode": "circular", "_reversed_padding_repeated_twice": [1, 1, 1, 1]},
        "stride": {"stride": (2, 2)},
        "dilation": {"dilation": (2, 2)},
        "padding": {"padding": (0, 0)},
        "weight": {"weight": nn.Parameter(conv.weight[:16]), "bias": nn.Parameter(conv.bias[:16])},
        "bias": {"bias": nn.Parameter(torch.zeros(1).expand(32))},
        "sizes": {"weight": nn.Parameter(conv.weight[:, :, :1, :1].clone())},
    }
    for key, value in changes[name].items():
        setattr(conv, key, value)
    with torch.no_grad():
        expected = conv(x.float().contiguous())
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
    assert y.shape == expected.shape
    assert error(y.float(), expected) < 1e-2


def test_transformations_of_functions_are_torchs():
    conv, x, _ = layer_and_images(2, 32, 32, 6, 6)
    conv, x = conv.bfloat16(), x.detach()
    _, y = torch.func.jvp(conv, (x,), (x,))
    assert error(y.float(), F.conv2d(x, conv.weight, padding=1).float()) < 1e-2
    each = torch.func.vmap(lambda v: conv(v[None])[0])(x)
    assert error(each.float(), conv(x).float()) < 1e-2
    with torch.autograd.forward_ad.dual_level():
        assert not conv._fast(x)


def test_weights_that_change_before_the_gradient_are_seen():
    conv, x, dy = layer_and_images(2, 32, 64, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    with torch.no_grad():
        conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_memory_that_there_is_not_is_an_error(monkeypatch):
    conv, x, _ = layer_and_images(2, 32, 64, 6, 6)
    monkeypatch.setattr(kernel.library(), "winograd", lambda *_: 1)
    with pytest.raises(MemoryError, match=r"winograd of \(2, 32, 6, 6\)"), torch.autocast("cpu", torch.bfloat16):
        conv(x)


def test_a_library_that_convolves_wrongly_is_not_used(monkeypatch):
    functions = kernel.library()
    assert kernel._convolves(functions)
    monkeypatch.setattr(functions, "winograd", lambda *_: 0)
    assert not kernel._convolves(functions)
    assert not kernel._right(functions)
    monkeypatch.undo()
    monkeypatch.setattr(functions, "winograd_gradient", lambda *_: 0)
    assert not kernel._right(functions)
    assert kernel.STEP == 32  # which _convolves takes
