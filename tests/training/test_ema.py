"""The average: closed form, precision, warm-up, and that the network always gets its own weights back."""

import copy

import pytest
import torch
from torch import nn

from src.training.ema import EMA


def attached(net: nn.Module, **arguments) -> EMA:
    ema = EMA(**arguments)
    ema.attach(net)
    return ema


def test_constant_decay_is_the_closed_form():
    """After n steps with weights w_1 ... w_n: d^n w_0 + (1 - d) sum d^(n - k) w_k."""
    net = nn.Linear(3, 2)
    ema = attached(net, decay=0.9, warmup=False)
    history = [net.weight.detach().double().clone()]
    for step in range(1, 51):
        with torch.no_grad():
            net.weight.copy_(torch.randn(2, 3))
        ema.update(step)
        history.append(net.weight.detach().double().clone())
    expected = 0.9**50 * history[0] + sum(0.1 * 0.9 ** (50 - k) * w for k, w in enumerate(history) if k)
    torch.testing.assert_close(ema.state_dict_of_net()["weight"].double(), expected, atol=1e-6, rtol=0)


def test_warmup_forgets_the_initial_weights():
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 1000.0)
    ema = attached(net, decay=0.9999)
    nn.init.constant_(net.weight, 1.0)
    share = 1.0
    for step in range(1, 1001):
        ema.update(step)
        share *= min(0.9999, step / (9 + step))
    assert ema.state_dict_of_net()["weight"].item() == pytest.approx(1 + 999 * share, rel=1e-5)
    assert share < 1e-9


def test_the_warmup_is_that_of_the_papers_code():
    """min(decay, (1 + n) / (10 + n)) where n counts from 0 (tf.train.ExponentialMovingAverage)."""
    ema = EMA(decay=0.9999)
    assert [ema.decay_at(n + 1) for n in (0, 1, 90)] == [1 / 10, 2 / 11, 91 / 100]
    assert ema.decay_at(10**7) == 0.9999


def test_a_bfloat16_network_has_a_float32_average_that_moves():
    """In bfloat16 an average at 0.9999 never leaves its start: the update is below half a unit in the last place."""
    net = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(net.weight, 1.0)
    ema = attached(net, decay=0.9999, warmup=False)
    nn.init.constant_(net.weight, 2.0)
    for step in range(1, 1001):
        ema.update(step)
    averaged = ema.state_dict_of_net()["weight"]
    assert averaged.dtype == torch.float32
    assert averaged.item() == pytest.approx(2 - 0.9999**1000, abs=1e-4)


def test_buffers_are_copied_and_not_averaged():
    net = nn.BatchNorm1d(2)
    ema = attached(net, decay=0.5, warmup=False)
    net.running_mean.fill_(7.0)
    ema.update(1)
    assert ema.state_dict_of_net()["running_mean"].tolist() == [7.0, 7.0]


def test_the_average_is_no_part_of_the_network():
    net = nn.Linear(2, 2)
    before = copy.deepcopy(net.state_dict())
    ema = attached(net, decay=0.5, warmup=False)
    for step in range(1, 4):
        ema.update(step)
    assert net.state_dict().keys() == before.keys()
    assert torch.equal(net.weight, before["weight"])


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_gets_its_own_weights_back(fails):
    net = nn.Linear(2, 2)
    ema = attached(net, decay=0.5, warmup=False)
    nn.init.zeros_(net.weight)
    ema.update(1)
    own, average = net.weight.detach().clone(), ema.state_dict_of_net()["weight"].clone()
    with pytest.raises(RuntimeError) if fails else torch.no_grad(), ema.swapped():
        assert torch.equal(net.weight, average)
        if fails:
            raise RuntimeError
    assert torch.equal(net.weight, own)
    assert torch.equal(ema.state_dict_of_net()["weight"], average)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="must lie in"):
        EMA(decay=decay)
