"""The compiled group norm: values and gradients of torch's in float64, for every image by itself, or torch's own."""

import pytest
import torch
import torch.nn.functional as F

from src.models import kernel
from src.models.norm import GroupNorm
from src.training.trainer import TrainerSettings

pytestmark = pytest.mark.usefixtures("compiled")

SHAPES = {"square": (3, 12, 8, 8), "rectangle": (2, 24, 9, 7), "one pixel wide": (2, 8, 5, 1), "many": (1, 4, 20, 16)}


def norm_and_images(shape, dtype=torch.float32, groups=4, offset=0.0):
    torch.manual_seed(0)
    norm = GroupNorm(groups, shape[1], eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (offset + torch.randn(shape)).to(dtype).to(memory_format=torch.channels_last)
    return norm, x.requires_grad_()


def gradients(y, inputs):
    torch.manual_seed(1)
    direction = torch.randn(y.shape, dtype=torch.float64).to(memory_format=torch.channels_last)
    return torch.autograd.grad((y.double() * direction).sum(), inputs)


def exact(norm, x, silu):
    """In float64, by torch."""
    inputs = [v.detach().double().requires_grad_() for v in (x, norm.weight, norm.bias)]
    y = F.group_norm(inputs[0], norm.num_groups, inputs[1], inputs[2], norm.eps)
    y = F.silu(y) if silu else y
    return y, gradients(y, inputs)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "of_value", "of_sum"), [(torch.float32, 2e-6, 2e-6), (torch.bfloat16, 2**-8, 1e-2)])
def test_values_and_gradients_are_torchs(shape, silu, dtype, of_value, of_sum):
    """bfloat16 rounds each value once, by half a unit of 2^-8; sums of gradients come from values so rounded."""
    norm, x = norm_and_images(shape, dtype)
    assert kernel.can_take(x)
    y = norm(x, silu=silu)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected, theirs = exact(norm, x, silu)
    assert (y - expected).abs().max() <= of_value * expected.abs().max()
    ours = gradients(y, [x, norm.weight, norm.bias])
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= of_sum * b.abs().max()


def test_a_mean_far_from_zero_costs_no_more_digits_than_its_subtraction():
    """The mean of squares less the square of the mean would be off by 1e-7 x 300^2 = 1%."""
    norm, x = norm_and_images((2, 8, 16, 16), offset=300.0)
    expected, _ = exact(norm, x, silu=False)
    assert (norm(x) - expected).abs().max() < 3e-4  # of 300 + x, float32 knows x to 1.5e-5


def test_far_values_are_right_through_silu():
    """exp overflows at 88; z of -200 to 200."""
    norm, x = norm_and_images((1, 8, 8, 8))
    torch.nn.init.constant_(norm.weight, 70.0)
    expected, theirs = exact(norm, x, silu=True)
    y = norm(x, silu=True)
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=1e-5)
    assert expected.abs().max() > 150
    for a, b in zip(gradients(y, [x, norm.weight, norm.bias]), theirs, strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(dtype, bad):
    """A diverged network must be seen to have diverged."""
    norm, x = norm_and_images((2, 8, 4, 4), dtype)
    with torch.no_grad():
        x[0, 0, 0, 0] = bad
    y = norm(x.detach(), silu=True)
    assert y[0, :2].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("silu", [False, True])
def test_an_image_is_the_same_to_the_bit_in_any_batch_and_with_any_number_of_threads(silu):
    norm, x = norm_and_images((7, 12, 6, 6), torch.bfloat16)
    together = norm(x, silu=silu)
    (whole,) = torch.autograd.grad(together.float().square().sum(), x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads != 3 else 2)
        for i in range(7):
            row = x[i : i + 1].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            alone = norm(row, silu=silu)
            assert torch.equal(alone[0], together[i])
            assert torch.equal(torch.autograd.grad(alone.float().square().sum(), row)[0][0], whole[i])
        assert torch.equal(norm(x, silu=silu), together)
    finally:
        torch.set_num_threads(threads)


def test_weights_in_bfloat16_get_gradients_of_their_type():
    norm, x = norm_and_images((2, 8, 4, 4), torch.bfloat16)
    norm.to(torch.bfloat16)
    norm(x).sum().backward()
    assert norm.weight.grad.dtype == norm.bias.grad.dtype == torch.bfloat16


def test_what_the_c_does_not_know_is_torchs():
    norm, x = norm_and_images((2, 8, 4, 4))
    assert not kernel.can_take(x.double())
    assert not kernel.can_take(x.contiguous())
    assert not kernel.can_take(x.half())
    assert not kernel.can_take(x.to("meta"))
    expected = F.group_norm(x, 4, norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(norm(x.contiguous()), expected)


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """Whether trainer=auto takes channels-last with this environment and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def ask(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        kernel.library.cache_clear()
        return TrainerSettings(accelerator="cpu").chosen_channels_last

    yield ask
    kernel.library.cache_clear()


def test_without_a_compiler_images_stay_channels_first(chosen, tmp_path, capfd):
    """And nothing is said or left."""
    assert not chosen(PATH=str(tmp_path), CC="")
    assert not list(tmp_path.rglob("*.so*"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("script", ["exit 1", 'echo nonsense > "${@: -2:1}"'], ids=["fails", "makes no library"])
def test_a_compiler_that_does_not_work_is_as_none(chosen, tmp_path, script):
    broken = tmp_path / "cc"
    broken.write_text(f"#!/bin/bash\n{script}\n")
    broken.chmod(0o755)
    assert not chosen(CC=str(broken))


def test_it_is_compiled_once(chosen, tmp_path):
    assert chosen()
    (made,) = tmp_path.rglob("*.so")
    before = made.stat().st_mtime_ns
    assert chosen()
    assert made.stat().st_mtime_ns == before


def test_products_that_a_compiler_does_not_know_leave_the_rest(chosen, tmp_path):
    """As one that fails at them, and one whose products are wrong."""
    cc = tmp_path / "cc"
    cc.write_text(f'#!/bin/bash\n[[ "$*" == *-DNO_PRODUCTS* ]] || exit 1\nexec {kernel.c_compiler()} "$@"\n')
    cc.chmod(0o755)
    assert chosen(CC=str(cc))
    assert not kernel.multiplies_bfloat16()
    assert kernel.can_take(norm_and_images((2, 8, 4, 4))[1])


def test_what_is_checked_does_not_depend_on_torchs_defaults(chosen):
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            with torch.device("meta"):
                assert chosen()
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_kept_may_come_back_in_another_layout():
    norm, x = norm_and_images((2, 8, 4, 4))
    with torch.autograd.graph.saved_tensors_hooks(lambda v: v.contiguous(), lambda v: v):
        y = norm(x)
    assert torch.equal(gradients(y, [x])[0], gradients(norm(x), [x])[0])


def test_what_is_asked_for_is_not_overruled():
    assert TrainerSettings(accelerator="cpu").chosen_channels_last
    assert not TrainerSettings(accelerator="cpu", channels_last=False).chosen_channels_last
    assert "channels-last" in TrainerSettings(accelerator="cpu").chosen
