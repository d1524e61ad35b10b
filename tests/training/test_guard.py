"""Which steps are left out, and that they leave no trace."""

import math

import pytest
import torch

from src.training.guard import Guard


def inspect(guard: Guard, loss: float, norm: float = 1.0) -> bool:
    return bool(guard.inspect(torch.tensor(loss), torch.tensor(norm)))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_left_out_from_the_first_step_on(loss, norm):
    guard = Guard()
    assert inspect(guard, loss, norm)
    assert not inspect(guard, 1.0)
    assert guard.skipped == 1
    assert not guard.in_trouble()


def test_an_explosion_is_one_against_the_mean_of_the_last_hundred():
    guard = Guard(explosion=10.0)
    assert not any(inspect(guard, 1000.0 / (1 + k)) for k in range(99))
    assert not inspect(guard, 1e5), "before a hundred losses nothing is called usual"
    guard = Guard(explosion=10.0)
    assert not any(inspect(guard, 2.0) for _ in range(100))
    assert not inspect(guard, 19.9)
    usual = 2.0 + 17.9 / 100
    assert inspect(guard, 10 * usual + 0.1)
    assert not inspect(guard, 10 * usual - 0.1)


def test_losses_may_fall_below_zero():
    """loss=uncertainty ends at 1 + ln(error), without a bound below; on its way it is near 0 for long."""
    guard = Guard()
    noise = torch.randn(600, generator=torch.Generator().manual_seed(0)) * 0.1
    assert not any(inspect(guard, 1.0 - k / 150 + float(noise[k])) for k in range(600))
    assert inspect(guard, 400.0)
    free = Guard(explosion=None)
    assert not any(inspect(free, -1.0) for _ in range(200))


def test_a_training_that_begins_anew_has_no_usual_loss():
    guard = Guard(explosion=10.0)
    for loss in (*[1.0] * 100, *[1e3] * 10):
        inspect(guard, loss)
    guard.begin_anew()
    assert not guard.in_trouble()
    assert not inspect(guard, 1e3)
    assert guard.skipped == 10


def test_bad_losses_do_not_become_usual():
    guard = Guard(explosion=10.0)
    for _ in range(100):
        inspect(guard, 1.0)
    assert all(inspect(guard, 1e3) for _ in range(50))
    assert guard.skipped == 50
    assert guard.in_trouble()


def test_its_state_goes_on():
    a, b = Guard(explosion=10.0), Guard(explosion=10.0)
    for _ in range(100):
        inspect(a, 1.0)
    inspect(a, math.nan)
    b.load_state_dict(a.state_dict())
    assert (b.skipped, b.in_trouble(), inspect(b, 11.0)) == (1, True, True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"explosion": 1.0}, "more than 1"), ({"patience": 0}, "at least 1"), ({"max_restores": -1}, "not be negative")],
)
def test_numbers_out_of_range_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Guard(**arguments)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_left_out_changes_nothing(fused):
    """Weights, moments and Adam's own count of steps: fused kernels skip by themselves, others get no gradient."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5, fused=fused)

    def step(bad: bool) -> None:
        parameter.grad = torch.full((3,), math.nan if bad else 1.0)
        Guard.leave_out(optimizer, [parameter], torch.tensor(bad))
        optimizer.step()

    step(bad=False)
    weight, state = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    step(bad=True)
    assert torch.equal(parameter, weight)
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state[parameter].items())
    step(bad=False)
    assert not torch.equal(parameter, weight)
