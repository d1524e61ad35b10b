"""How training draws u in [0, 1)."""

import pytest
import torch

from src.diffusion.densities import LogitNormal, Stratified, Uniform
from src.diffusion.schedules import Linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("density", [Uniform(), Stratified()])
def test_u_is_uniform(density):
    """Catches a density that leaves out or favours some levels: moments and a histogram within 5 standard errors."""
    torch.manual_seed(0)
    n = 10000
    u = torch.stack([density(4, CPU, Linear()) for _ in range(n)])
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    for column in u.double().T:  # each u_i by itself, not only all of them together
        assert abs(column.mean().item() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
        assert abs(column.square().mean().item() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
        counts = torch.histc(column, 10, 0, 1)
        assert (counts - n / 10).abs().max() < 5 * (n * 0.1 * 0.9) ** 0.5


def test_uniform_draws_are_independent():
    """Catches one u shared by the batch."""
    torch.manual_seed(0)
    u = torch.stack([Uniform()(2, CPU, Linear()) for _ in range(10000)])
    assert abs(torch.corrcoef(u.T)[0, 1].item()) < 5 / 100


@pytest.mark.parametrize("batch", [1, 2, 7, 128, 1000])
def test_stratified_puts_one_u_in_each_interval(batch):
    """Catches independent draws, and an offset that moves only part of the batch."""
    torch.manual_seed(0)
    for _ in range(20):
        u = Stratified()(batch, CPU, Linear()).double()
        offset = u[0]
        expected = (torch.arange(batch, dtype=torch.float64) / batch + offset) % 1
        gap = (u - expected).abs()
        assert torch.minimum(gap, 1 - gap).max() < 1e-6
        cells = ((u - u.min()) * batch).round().long().sort().values
        assert torch.equal(cells, torch.arange(batch))


@pytest.mark.parametrize("density", [Uniform(), Stratified()])
def test_u_stays_float32_where_the_default_is_bfloat16(density):
    """Catches u drawn in Lightning's bf16-true context with 8 bits: of 1000 times, half would never be trained."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        u = torch.cat([density(1000, CPU, Linear()) for _ in range(20)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert u.dtype == torch.float32
    assert len(Linear(1000).time(u).unique()) == 1000


def test_logit_normal_is_the_sigmoid_of_a_normal():
    """Catches mean and std the wrong way round, and u = 1, which would be a time that the schedule has not."""
    torch.manual_seed(0)
    u = LogitNormal(mean=-0.5, std=0.8)(100_000, CPU, Linear())
    n = u.double().logit()
    assert n.mean().item() == pytest.approx(-0.5, abs=5 * 0.8 / 100_000**0.5)
    assert n.std().item() == pytest.approx(0.8, rel=5 / (2 * 100_000) ** 0.5)
    assert LogitNormal(mean=100.0)(10, CPU, Linear()).max() < 1
    with pytest.raises(ValueError, match="std=0 must be positive"):
        LogitNormal(std=0)
