"""L_hybrid, L_vlb, the learned uncertainty, and self-conditioning: what p_losses makes of a network's output."""

import math

import pytest
import torch
from torch import nn

from src.diffusion.continuous import Flow as FlowSchedule
from src.diffusion.continuous import Karras
from src.diffusion.densities import Uniform
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.losses import Hybrid, Simple, Uncertainty, Vlb
from src.diffusion.objectives import Edm, Eps, Flow, V
from src.diffusion.samplers import DDPM, tau
from src.diffusion.schedules import Cosine, Linear
from src.diffusion.weightings import Constant

G = torch.Generator().manual_seed(0)
X0, NOISE = torch.randn(2, 6, 2, 4, 4, generator=G).clamp(-1, 1)


class TwoOutputs(nn.Module):
    """F = a x and v = b x, so that a teaches the mean and b the variance."""

    learned_variance = True

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.4))
        self.b = nn.Parameter(torch.tensor(-0.2))

    def forward(self, x, t):
        return torch.cat([self.a * x, self.b * x], dim=1)


def diffusion(loss, schedule=None, objective=None):
    return GaussianDiffusion(schedule or Cosine(50), objective or Eps(), Constant(), Uniform(), loss)


def by_hand(net, t, schedule, x0, noise):
    """KL(q || p) in bits per dimension in float64, for t > 0, from betas alone."""
    betas, abar = schedule.betas.tolist(), [1.0, *schedule.alphas_cumprod.tolist()]
    terms = []
    for i, k in enumerate(t.tolist()):
        x_t = abar[k + 1] ** 0.5 * x0[i].double() + (1 - abar[k + 1]) ** 0.5 * noise[i].double()
        eps, v = net.a.double() * x_t, net.b.double() * x_t
        x0_hat = (x_t - (1 - abar[k + 1]) ** 0.5 * eps) / abar[k + 1] ** 0.5
        c0, ct = betas[k] * abar[k] ** 0.5, (1 - abar[k]) * (1 - betas[k]) ** 0.5
        difference = c0 * (x0[i].double() - x0_hat) / (1 - abar[k + 1])
        assert math.isfinite(ct)
        small = math.log(betas[k] * (1 - abar[k]) / (1 - abar[k + 1]))
        log_variance = (v + 1) / 2 * math.log(betas[k]) + (1 - v) / 2 * small
        kl = 0.5 * (log_variance - small - 1 + (small - log_variance).exp() + difference**2 / log_variance.exp())
        terms.append(kl.mean() / math.log(2))
    return torch.stack(terms)


T = torch.tensor([1, 5, 20, 30, 48, 49])


def test_vlb_is_T_times_the_divergence_by_hand():
    """Catches nats for bits, a sum for a mean, tilde beta and beta exchanged, the wrong end of v."""
    net = TwoOutputs()
    losses = diffusion(Vlb()).p_losses(net, X0, T, NOISE)
    torch.testing.assert_close(losses.double(), 50 * by_hand(net, T, Cosine(50), X0, NOISE), rtol=2e-5, atol=0)


def test_hybrid_is_simple_plus_a_thousandth_of_vlb():
    """Improved-diffusion's T / 1000 is 0.001 times the T of the bound's estimate."""
    net = TwoOutputs()
    x_t = diffusion(Vlb()).q_sample(X0, T, NOISE)
    error = (net.a * x_t - NOISE).square().flatten(1).mean(1)
    expected = error.double() + 0.001 * 50 * by_hand(net, T, Cosine(50), X0, NOISE)
    torch.testing.assert_close(diffusion(Hybrid()).p_losses(net, X0, T, NOISE).double(), expected, rtol=2e-5, atol=0)


def test_in_the_hybrid_the_bound_teaches_the_variance_alone():
    """Catches a missing stop-gradient on the mean: the gradient of a is that of L_simple, to the last digits."""
    net = TwoOutputs()
    diffusion(Hybrid(weight=10.0)).p_losses(net, X0, T, NOISE).mean().backward()
    x_t = diffusion(Vlb()).q_sample(X0, T, NOISE)
    expected = (2 * (net.a * x_t - NOISE) * x_t).mean()
    assert net.a.grad.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(net.b.grad.item()) > 1e-4
    net.zero_grad()
    diffusion(Vlb()).p_losses(net, X0, T, NOISE).mean().backward()
    assert abs(net.a.grad.item() - expected.item()) > 1e-2


def test_what_does_not_fit_is_refused():
    """A learned variance on one side only, and a bound without a chain."""
    with pytest.raises(ValueError, match="chain of discrete steps, which Karras is not"):
        diffusion(Hybrid(), Karras(), Edm())
    with pytest.raises(ValueError, match="add loss=hybrid or loss=vlb"):
        diffusion(Simple()).check(TwoOutputs())
    with pytest.raises(ValueError, match=r"add model\.learned_variance=true"):
        diffusion(Vlb()).check(nn.Identity())
    with pytest.raises(ValueError, match="weight=0"):
        Hybrid(weight=0)


def test_ancestral_sampling_uses_the_learned_variance():
    """Catches v that is ignored or read upside down: -1 is tilde beta, 1 is beta, 0 their geometric mean."""
    schedule = Linear(10)
    path = schedule.levels(10, "trailing")

    class Constants(nn.Module):
        learned_variance = True

        def __init__(self, v):
            super().__init__()
            self.v = v

        def forward(self, x, t):
            return torch.cat([torch.zeros_like(x), torch.full_like(x, self.v)], dim=1)

    def stds(sampler, net):
        draws, t, s = [], path[3], path[4]
        z = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        for noise in (z, 0 * z):
            x, _ = sampler.step(diffusion(Hybrid(), schedule).denoiser(net), z, t, s, lambda noise=noise: noise)
            draws.append(x)
        return ((draws[0] - draws[1]) / z).mean().item()

    learned = DDPM(variance="learned")
    small = tau(path[3], path[4])
    large = schedule.betas[int(path[3].t)].item() ** 0.5
    assert stds(learned, Constants(-1.0)) == pytest.approx(small, rel=1e-5)
    assert stds(learned, Constants(1.0)) == pytest.approx(large, rel=1e-5)
    assert stds(learned, Constants(0.0)) == pytest.approx((small * large) ** 0.5, rel=1e-5)
    assert stds(DDPM(variance="posterior"), Constants(1.0)) == pytest.approx(small, rel=1e-5)
    learned.check(Constants(0.0))
    with pytest.raises(ValueError, match="variance=learned needs a network that learns the variance"):
        learned.check(nn.Identity())


def test_uncertainty_is_the_error_over_e_to_u_plus_u_and_finds_the_log_of_the_error():
    """Eq. 21 of Karras et al. 2024: at its minimum e^u is the expected error of each level."""
    torch.manual_seed(0)
    loss = Uncertainty(channels=64)
    net = lambda x, t: torch.zeros_like(x)  # noqa: E731
    d = diffusion(loss, FlowSchedule(), Flow())
    plain = diffusion(Simple(), FlowSchedule(), Flow())
    t = torch.tensor([0.01, 0.1, 0.3, 0.5, 0.9, 0.999])
    error = plain.p_losses(net, X0, t, NOISE)
    torch.testing.assert_close(d.p_losses(net, X0, t, NOISE), error, rtol=0, atol=0)  # u starts at 0
    with torch.no_grad():
        loss.linear.weight.normal_()
        u = loss.u(1 - t, t)
        torch.testing.assert_close(d.p_losses(net, X0, t, NOISE), error / u.exp() + u, rtol=1e-6, atol=1e-6)
        loss.linear.weight.zero_()
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=500)

    def closure():
        optimizer.zero_grad()
        value = d.p_losses(net, X0, t, NOISE).sum()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(loss.u(1 - t, t).exp(), error, rtol=1e-2, atol=0)


def test_uncertainty_is_finite_where_no_signal_is_left():
    alpha, sigma = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1e-8])
    loss = Uncertainty()
    nn.init.ones_(loss.linear.weight)
    assert torch.isfinite(loss.u(alpha, sigma)).all()


class SelfConditioned(nn.Module):
    """F = a third of x plus half of the guess that came along."""

    self_conditioning = True

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3))
        self.seen = []

    def forward(self, x, t):
        x, guess = x.chunk(2, dim=1)
        self.seen.append(guess.detach().clone())
        return self.a * x + 0.5 * guess


def test_self_conditioning_gives_the_first_guess_without_gradient():
    """Algorithm 1 of Chen et al. 2023: zeros, then the clipped x0 of the first answer, and no gradient through it."""
    net, d = SelfConditioned(), diffusion(Simple(), Linear(1000), V())
    t = torch.tensor([10, 100, 300, 500, 800, 999])
    losses = d.p_losses(net, X0, t, NOISE, self_condition=True)
    x_t = d.q_sample(X0, t, NOISE)
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in d.schedule.level(t))
    first = (alpha * x_t - sigma * (0.3 * x_t)).clamp(-1, 1)
    assert torch.equal(net.seen[0], torch.zeros_like(x_t))
    torch.testing.assert_close(net.seen[1], first, rtol=0, atol=1e-6)
    losses.mean().backward()
    error = 0.3 * x_t + 0.5 * first - (alpha * NOISE - sigma * X0)
    assert net.a.grad.item() == pytest.approx((2 * error * x_t).mean().item(), rel=1e-4)
    net.seen.clear()
    d.p_losses(net, X0, t, NOISE, self_condition=False)
    assert len(net.seen) == 1
    assert torch.equal(net.seen[0], torch.zeros_like(x_t))


def test_in_sampling_each_step_is_told_the_last_guess_and_each_batch_begins_without():
    """Catches a memory that outlives its batch, or is asked before it is known."""
    net, d = SelfConditioned(), diffusion(Simple(), Linear(1000), V())
    x = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    sampler = DDPM(steps=3, clip=False)
    for _ in range(2):
        net.seen.clear()
        steps = list(sampler(d.denoiser(net), d.schedule, x, lambda: torch.zeros_like(x)))
        assert torch.equal(net.seen[0], torch.zeros_like(net.seen[0]))
        for told, step in zip(net.seen[1:], steps, strict=False):
            assert torch.equal(told[:2], step.x0.clamp(-1, 1).detach())
