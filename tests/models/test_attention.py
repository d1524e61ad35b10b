"""The compiled attention: near float64, nearer than torch's fused kernel, and torch's for what it does not know."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from src.models import attention, kernel
from src.models.attention import Attention, attend
from src.models.norm import GroupNorm

pytestmark = pytest.mark.usefixtures("products")

SHAPES = {  # images, positions, heads, channels of a head
    "two positions": (2, 2, 3, 32),
    "odd": (2, 7, 2, 64),
    "7x7": (3, 49, 1, 128),
    "blocks of queries and one more": (1, 257, 2, 32),
    "pairs and one more": (2, 129, 1, 96),
    "whole blocks": (2, 256, 1, 256),
}


def case(shape, size=1.5):
    B, N, heads, d = shape
    torch.manual_seed(0)
    qkv = (size * torch.randn(B, N, 3, heads, d)).bfloat16().requires_grad_()
    return qkv, torch.randn(B, N, heads, d).bfloat16()


def ours(qkv, dout):
    assert attention._fast(qkv)
    out = attend(qkv)
    return out.detach(), *torch.autograd.grad(out, qkv, dout)[0].unbind(2)


def by_torch(qkv, dout, backend, dtype):
    qkv = qkv.detach().to(dtype).requires_grad_()
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*(v.transpose(1, 2) for v in qkv.unbind(2))).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, qkv, dout.to(dtype))[0].unbind(2)


def error(value, exact):
    return float((value - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_float64_up_to_roundings(shape):
    """Of the softmax, of its gradient and of results, 0.1% to 0.2% each; torch's fused kernel rounds once more."""
    qkv, dout = case(shape)
    exact = by_torch(qkv, dout, SDPBackend.MATH, torch.float64)
    theirs = by_torch(qkv, dout, SDPBackend.FLASH_ATTENTION, torch.bfloat16)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours(qkv, dout), theirs, exact, strict=True):
        assert error(a, c) < 4e-3, name
        assert error(a, c) < 1.15 * error(b, c), name


def test_greatest_logits_and_sums_are_kept_in_float():
    qkv, _ = case((2, 49, 2, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda v: v):
        attend(qkv)
    assert len(kept) == 2
    q, k, _ = (v.double().transpose(1, 2) for v in qkv.detach().unbind(2))
    products = q @ k.transpose(-1, -2)
    sums = ((products - products.amax(-1, keepdim=True)) / math.sqrt(64)).exp().sum(-1)
    exact = torch.stack([products.amax(-1), 1 / sums], dim=-1)
    torch.testing.assert_close(kept[1].double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("size", [60.0, 1e5])
def test_logits_that_are_far_apart_choose_one_key(size):
    """Of logits of thousands, whose exponentials no float holds; and of billions, of which no float holds the units."""
    qkv, dout = case((1, 64, 1, 32), size)
    exact = by_torch(qkv, dout, SDPBackend.MATH, torch.float64)
    out, dq, dk, dv = ours(qkv, dout)
    assert error(out, exact[0]) < 4e-3
    assert error(dv, exact[3]) < 4e-3
    assert dq.isfinite().all()
    assert dk.isfinite().all()


def test_equal_keys_give_the_mean():
    qkv, _ = case((2, 33, 2, 32))
    qkv = qkv.detach().clone()
    qkv[:, :, 1] = 1
    qkv[:, :, 2] = torch.arange(33)[:, None, None]
    assert (attend(qkv) == 16).all()  # what is beyond the 33 keys would make it smaller


def test_one_position_is_its_value():
    qkv, dout = case((4, 1, 2, 32))
    out, dq, dk, dv = ours(qkv, dout)
    assert torch.equal(out, qkv[:, :, 2])
    assert torch.equal(dv, dout)
    assert dq.abs().max() < 1e-6  # of a softmax that is 1
    assert dk.abs().max() < 1e-6


def test_every_bit_is_the_same_for_any_number_of_threads_and_images():
    qkv, dout = case((5, 130, 2, 32))
    together = ours(qkv, dout)
    before = torch.get_num_threads()
    try:
        for count in (1, 3, 7):
            torch.set_num_threads(count)
            for a, b in zip(ours(qkv, dout), together, strict=True):
                assert torch.equal(a, b)
        torch.set_num_threads(2)
        alone = ours(qkv.detach()[2:3].clone().requires_grad_(), dout[2:3])
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[2:3])
    finally:
        torch.set_num_threads(before)


def test_what_is_not_a_number_stays_in_its_image_and_head():
    qkv, _ = case((2, 40, 2, 32))
    qkv = qkv.detach().clone()
    qkv[1, 3, 1, 0, 5] = torch.nan  # of a key
    out = attend(qkv)
    assert out[1, :, 0].isnan().all()
    assert out[0].isfinite().all()
    assert out[1, :, 1].isfinite().all()


def test_gradients_of_any_layout_and_type_are_taken():
    qkv, _ = case((2, 40, 2, 32))
    ones = torch.autograd.grad(attend(qkv).float().sum(), qkv)[0]
    assert torch.equal(ones, torch.autograd.grad(attend(qkv), qkv, torch.ones(2, 40, 2, 32).bfloat16())[0])


def test_a_layer_of_images_takes_it_without_a_copy():
    """As the convolution before it leaves them, channels-last."""
    layer = Attention(64, 2, lambda c: GroupNorm(8, c)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 6, 6).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert "_AttentionBackward" in steps_before(y)
    expected = layer(x)
    assert error(y.detach() - x, expected.detach() - x) < 1e-2


def steps_before(y):
    """The names of what autograd goes back through."""
    found, left = set(), [y.grad_fn]
    while left:
        step = left.pop()
        if step is not None and step not in found:
            found.add(step)
            left += [before for before, _ in step.next_functions]
    return {step.name() for step in found}


def test_few_heads_for_many_threads_are_torchs():
    qkv, _ = case((1, 300, 1, 32))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert attention._fast(qkv)
        torch.set_num_threads(3)
        assert not attention._fast(qkv)
    finally:
        torch.set_num_threads(before)


def test_all_else_is_torchs():
    qkv, dout = case((2, 40, 2, 32))
    assert not attention._fast(qkv.float())
    assert not attention._fast(qkv.to("meta"))
    assert not attention._fast(qkv[:, ::2])
    assert attend(qkv[:0]).shape == (0, 40, 2, 32)
    assert not attention._fast(qkv[..., :24].contiguous())
    expected = by_torch(qkv, dout, SDPBackend.MATH, torch.float32)
    torch.testing.assert_close(attend(qkv.float()), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attend(qkv[..., :24]).float(), attend(qkv.float()[..., :24]), rtol=0.02, atol=0.02)


def test_a_library_that_attends_wrongly_is_not_used(monkeypatch):
    functions = kernel.library()
    assert kernel._attends(functions)
    for name in ("attention", "attention_gradient"):
        with monkeypatch.context() as patch:
            patch.setattr(functions, name, lambda *_: 0)
            assert not kernel._attends(functions)
            assert not kernel._right(functions)
