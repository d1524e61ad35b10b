"""Muon: its step against singular values and torch's own, Adam's part to the bit, and a run that goes on."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from src.training.muon import COEFFICIENTS, ITERATIONS, Muon, is_matrix, orthogonal
from tests.faults import assert_same_run

KERNEL, TALL, BIAS = (32, 16, 3, 3), (64, 16), (32,)
READS_PIXELS, WRITES_PIXELS, LABELS = (64, 1, 3, 3), (3, 64, 3, 3), (11, 64)


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator) / 8) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, of: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(of, parameters(*(p.shape for p in of), seed=100 + step), strict=True):
            parameter.grad = gradient.detach().clone()
        optimizer.step()


def test_it_is_the_polynomial_of_the_singular_values():
    matrices = [p.detach() for p in parameters((32, 48), (64, 16), (16, 64), (32, 40), (16, 16))]
    matrices.append(torch.outer(*parameters((64,), (96,))) + 1e-6 * parameters((64, 96))[0])  # of almost one direction
    a, b, c = COEFFICIENTS
    for matrix, found in zip(matrices, orthogonal(matrices), strict=True):
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        s = s / s.norm()
        tiny = s.min() < 0.01
        for _ in range(ITERATIONS):
            s = a * s + b * s**3 + c * s**5
        torch.testing.assert_close(found.double(), u * s @ v, rtol=0, atol=6e-5)  # rounding, lifted up to a^5 times
        assert tiny or 0.65 < s.min() < s.max() < 1.25


def test_zero_stays_zero():
    assert torch.equal(orthogonal([torch.zeros(16, 32)])[0], torch.zeros(16, 32))


def test_it_steps_as_torchs_muon_does():
    """Theirs multiplies in bfloat16: hence the hundredth."""
    ours, theirs = (parameters(TALL, (24, 96)) for _ in range(2))
    own = Muon(ours, lr=0.01, weight_decay=0.1)
    peer = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = [p.detach().clone() for p in ours]
    for optimizer, of in ((own, ours), (peer, theirs)):
        train(optimizer, of, range(5))
    for a, b, first in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() / (b - first).norm() < 0.01


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_kernel_is_its_matrix(layout):
    kernel = [nn.Parameter(p.detach().to(memory_format=layout)) for p in parameters(KERNEL)]
    matrix = [nn.Parameter(kernel[0].detach().flatten(1).clone())]
    train(Muon(kernel, lr=0.01), kernel, range(1))
    gradient = parameters(KERNEL, seed=100)[0].detach().flatten(1)
    matrix[0].grad = gradient
    Muon(matrix, lr=0.01).step()
    assert torch.equal(kernel[0].detach().flatten(1), matrix[0].detach())


def test_everything_else_is_adams_to_the_bit():
    assert all(is_matrix(p) for p in parameters(KERNEL, TALL))
    small = (READS_PIXELS, WRITES_PIXELS, LABELS, BIAS)
    assert not any(is_matrix(p) for p in parameters(*small))
    both, others = parameters(*small), parameters(*small)
    mixed = [*both, *parameters(TALL)]
    train(Muon(mixed, lr=0.01, weight_decay=0.1), mixed, range(4))
    train(torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, foreach=True), others, range(4))
    assert all(torch.equal(a, b) for a, b in zip(both, others, strict=True))


def test_a_step_without_gradients_does_nothing():
    """Which is how the guard leaves a bad step out."""
    for steps in (0, 3):
        mixed = parameters(KERNEL, BIAS)
        optimizer = Muon(mixed, lr=0.01, weight_decay=0.1)
        train(optimizer, mixed, range(steps))
        weights, state = [p.detach().clone() for p in mixed], deepcopy(optimizer.state_dict()["state"])
        optimizer.zero_grad()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(mixed, weights, strict=True))
        after = optimizer.state_dict()["state"]
        assert after.keys() == state.keys()
        assert all(torch.equal(after[i][name], value) for i in state for name, value in state[i].items())


def test_it_goes_on_from_its_state_to_the_bit():
    shapes = (KERNEL, READS_PIXELS, TALL, BIAS)
    whole, first = parameters(*shapes), parameters(*shapes)
    train(Muon(whole, lr=0.01), whole, range(6))
    before = Muon(first, lr=0.01)
    train(before, first, range(3))
    after = Muon(first, lr=0.5)
    after.load_state_dict(before.state_dict())
    train(after, first, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, first, strict=True))


def test_a_run_goes_on_to_the_bit(command, tmp_path):
    runs = tmp_path / "whole", tmp_path / "parts"
    arguments = ["experiment=smoke", "optimizer=muon", "resume=auto"]
    assert command("train", *arguments, f"hydra.run.dir={runs[0]}").code == 0
    for steps in (10, 20):
        assert command("train", *arguments, f"hydra.run.dir={runs[1]}", f"trainer.max_steps={steps}").code == 0
    assert_same_run(*runs)
