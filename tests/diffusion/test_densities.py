"""How training draws u in [0, 1)."""

import pytest
import torch

from src.diffusion.continuous import VE, Flow, Karras
from src.diffusion.densities import Importance, LogitNormal, LogNormal, Stratified, Uniform
from src.diffusion.schedules import Cosine, Linear

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


@pytest.mark.parametrize("density", [LogitNormal(0.5, 0.8, stratified=True), LogNormal(-1.2, 1.2, stratified=True)])
def test_stratified_draws_have_one_in_each_part_of_equal_probability(density):
    """And over many batches the distribution that independent draws have: the mean over 1,000 within 5 errors."""
    torch.manual_seed(0)
    schedule, n = Karras(), 64
    batches = torch.stack([density(n, CPU, schedule).double() for _ in range(1000)])
    normal = batches.logit() if isinstance(density, LogitNormal) else schedule.time(batches).log()
    probability = torch.special.ndtr((normal - density.mean) / density.std)
    parts = (probability * n).sort(1).values
    assert ((parts - torch.arange(n) - 0.5).abs() <= 0.5 + 1e-3).all()
    error = (1 / 12 / n**2 / 1000) ** 0.5  # the offset alone is drawn
    assert abs(float(probability.mean()) - 0.5) < 5 * error


@pytest.mark.parametrize("schedule", [Linear(), Cosine(4000), Karras(), VE(), Flow(), Flow(shift=3.0)])
def test_log_normal_is_normal_in_log_sigma_under_every_schedule(schedule):
    """Catches a density of u where one of ln(sigma / alpha) is meant: median and quartiles of what is drawn."""
    torch.manual_seed(0)
    n = 200_000
    t = schedule.time(LogNormal(mean=-1.2, std=1.2)(n, CPU, schedule))
    alpha, sigma = (v.double() for v in schedule.level(t))
    quartiles = (sigma / alpha).log().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    expected = -1.2 + 1.2 * torch.tensor([-0.6744898, 0.0, 0.6744898], dtype=torch.float64)
    torch.testing.assert_close(quartiles, expected, rtol=0, atol=0.02)  # 5 standard errors, and a step of 1000


def test_log_normal_beyond_the_ends_is_the_ends():
    u = LogNormal(mean=0.0, std=100.0)(1000, CPU, Karras())
    assert u.min() == 0
    assert 0.9999 < u.max() < 1


class TestImportance:
    """Eq. 18 of Nichol & Dhariwal 2021."""

    SCHEDULE = Linear(4)
    U = torch.tensor([0.1, 0.3, 0.6, 0.9])

    def warm(self, history=3, uniform=0.0):
        density = Importance(history, uniform)
        density(1, CPU, self.SCHEDULE)
        for _ in range(history):
            density.learn(torch.tensor([1.0, 2.0, 3.0, 4.0]), self.U)
        return density

    def test_it_is_uniform_until_every_part_has_its_history(self):
        density = Importance(history=2)
        density(1, CPU, self.SCHEDULE)
        density.learn(
            torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), torch.tensor([0.1, 0.3, 0.6, 0.9, 0.1, 0.3, 0.6])
        )
        assert density.probabilities().tolist() == [0.25] * 4
        density.learn(torch.tensor([8.0]), torch.tensor([0.9]))
        assert len(set(density.probabilities().tolist())) == 4

    def test_p_is_proportional_to_the_root_mean_square(self):
        density = self.warm(history=2)
        density.learn(torch.tensor([7.0]), torch.tensor([0.1]))  # the older of two is forgotten
        rms = torch.tensor([((49 + 1) / 2) ** 0.5, 2.0, 3.0, 4.0])
        torch.testing.assert_close(density.probabilities(), rms / rms.sum(), rtol=1e-6, atol=0)

    def test_several_losses_of_one_part_at_once_are_all_remembered(self):
        density = self.warm(history=3)
        density.learn(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0.1, 0.15, 0.2]))
        expected = ((25 + 36 + 49) / 3) ** 0.5
        assert density.probabilities()[0].item() == pytest.approx(expected / (expected + 9), rel=1e-6)

    def test_the_corrected_loss_is_unbiased_and_of_least_variance(self):
        """Catches a weight that is p, or 1 / p without T: where the loss is what was learnt, it becomes constant."""
        density = self.warm(uniform=0.0)
        torch.manual_seed(0)
        u = density(100_000, CPU, self.SCHEDULE)
        losses = 1.0 + (u * 4).floor()
        corrected = density.correct(losses, u)
        torch.testing.assert_close(corrected, torch.full_like(corrected, 2.5), rtol=1e-6, atol=0)
        shares = torch.bincount((u * 4).long(), minlength=4) / len(u)
        torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.01)

    def test_a_share_stays_uniform(self):
        p = self.warm(uniform=0.2).probabilities()
        torch.testing.assert_close(p, 0.8 * torch.tensor([0.1, 0.2, 0.3, 0.4]) + 0.05, rtol=1e-6, atol=0)

    def test_its_history_is_its_state(self):
        density, other = self.warm(), Importance(history=3, uniform=0.0)
        other.load_state_dict(density.state_dict())
        other.learn(torch.tensor([9.0]), torch.tensor([0.1]))
        assert not torch.equal(other.probabilities(), density.probabilities())  # a copy
        density.learn(torch.tensor([9.0]), torch.tensor([0.1]))
        assert torch.equal(other.probabilities(), density.probabilities())

    @pytest.mark.parametrize("arguments", [{"history": 0}, {"uniform": 1.5}])
    def test_settings_that_mean_nothing_are_refused(self, arguments):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
            Importance(**arguments)
