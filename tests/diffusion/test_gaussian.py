"""The forward process, the loss and the denoiser."""

import pytest
import torch

from src.diffusion.densities import Stratified, Uniform
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.objectives import X0, Edm, Eps, Flow, V
from src.diffusion.samplers import DDIM
from src.diffusion.schedules import Cosine, Linear
from src.diffusion.weightings import Constant
from src.models.unet import UNet


def ddpm(objective=None, schedule=None, weighting=None):
    return GaussianDiffusion(schedule or Linear(1000), objective or Eps(), weighting or Constant(), Uniform())


def test_q_sample_has_the_mean_and_variance_of_equation_4():
    """Catches sigma^2 for sigma, abar for its root, a shifted t, or one image's t used for all."""
    n = 20000
    schedule = Linear(1000)
    t = torch.tensor([0, 10, 300, 999])
    x0 = torch.tensor([0.9, -0.7, 0.5, 1.0]).view(4, 1, 1, 1).expand(4, 1, 1, n)
    noise = torch.randn(4, 1, 1, n, generator=torch.Generator().manual_seed(0))
    x_t = ddpm().q_sample(x0, t, noise).double()
    for i in range(4):
        abar = schedule.alphas_cumprod[t[i]].item()
        mean, variance = abar**0.5 * x0[i, 0, 0, 0].item(), 1 - abar
        assert abs(x_t[i].mean().item() - mean) < 5 * (variance / n) ** 0.5
        assert abs(x_t[i].var().item() - variance) < 5 * variance * (2 / (n - 1)) ** 0.5


@pytest.mark.parametrize("schedule", [Linear(1000), Cosine(1000)])
def test_q_sample_is_affine_in_image_and_noise(schedule):
    """Catches anything but alpha x0 + sigma noise, at all 1000 levels, to float32's rounding."""
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1000, 2, 3, 3, generator=g)
    x_t = ddpm(schedule=schedule).q_sample(x0, torch.arange(1000), noise)
    alpha, sigma = schedule.alpha.view(-1, 1, 1, 1), schedule.sigma.view(-1, 1, 1, 1)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t.double(), alpha * x0 + sigma * noise, rtol=0, atol=1e-6)


def test_p_losses_with_eps_is_L_simple():
    """Catches a target that is not the noise, a sum for a mean, a net fed x0 or another t, a lost dimension."""
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 6, generator=g)
    t = torch.tensor([0, 5, 400, 900, 999])
    schedule = Linear(1000)

    def net(x, t):
        return torch.sin(3 * x) + 0.001 * t.view(-1, 1, 1, 1)

    abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    difference = noise - net(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, t)
    by_hand = torch.stack([(difference[i] ** 2).sum() / (3 * 4 * 6) for i in range(5)])
    losses = ddpm().p_losses(net, x0, t, noise)
    assert losses.shape == (5,)
    torch.testing.assert_close(losses, by_hand.float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("objective", "answer"),
    [
        (Eps(), lambda x0, eps, alpha, sigma: eps),
        (X0(), lambda x0, eps, alpha, sigma: x0),
        (V(), lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0),
    ],
)
def test_a_perfect_network_has_no_loss(objective, answer):
    """Catches a target that is not the objective's; an answer that is off by 0.1 costs exactly 0.01."""
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1000, 1, 4, 4, generator=g)
    t = torch.arange(1000)
    schedule = Cosine(1000)
    F = answer(x0, noise, schedule.alpha.view(-1, 1, 1, 1), schedule.sigma.view(-1, 1, 1, 1))
    diffusion = ddpm(objective, schedule)
    assert diffusion.p_losses(lambda x, t: F, x0, t, noise).max() < 1e-12
    off = diffusion.p_losses(lambda x, t: F + 0.1, x0, t, noise)
    torch.testing.assert_close(off, torch.full((1000,), 0.01), rtol=1e-5, atol=0)


def test_weighting_counts_each_image_by_its_own_level():
    """Catches a weight that broadcasts over the wrong dimension or sees the wrong level."""

    def snr(alpha, sigma, d):
        return (alpha / sigma) ** 2

    x0, noise = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 100, 500, 999])
    plain = ddpm().p_losses(lambda x, t: x, x0, t, noise)
    weighted = ddpm(weighting=snr).p_losses(lambda x, t: x, x0, t, noise)
    abar = Linear(1000).alphas_cumprod[t]
    torch.testing.assert_close(weighted / plain, (abar / (1 - abar)).float(), rtol=1e-5, atol=0)
    assert torch.equal(Constant()(abar, abar, abar), torch.ones_like(abar))


def test_the_loss_of_a_bfloat16_network_is_float32():
    """Catches a loss that is subtracted and averaged with eight bits."""
    x0, noise = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    losses = ddpm().p_losses(lambda x, t: x.bfloat16(), x0, torch.arange(4), noise)
    x_t = ddpm().q_sample(x0, torch.arange(4), noise)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, (x_t.bfloat16().float() - noise).square().mean((1, 2, 3)), rtol=1e-6, atol=0)


def test_draw_u_is_the_density_on_the_schedule():
    """Catches a density that is ignored: stratified draws of a batch of T visit every time once."""
    torch.manual_seed(0)
    stratified = GaussianDiffusion(Linear(100), Eps(), Constant(), Stratified())
    t = stratified.schedule.time(stratified.draw_u(50, torch.device("cpu")))
    assert t.dtype == torch.int64
    assert torch.equal(t.sort().values // 2, torch.arange(50))
    uniform = ddpm(schedule=Linear(100)).draw_u(50, torch.device("cpu"))
    assert len(Linear(100).time(uniform).unique()) < 50


@pytest.mark.parametrize("objective", [Eps(), X0(), V(), Flow(), Edm(), Edm(sigma_data=1.3)])
def test_denoiser_recovers_x0_from_a_perfect_network(objective):
    """Catches a denoiser that undoes another objective's mix, or answers in the network's precision."""
    schedule = Linear(1000)
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for level in schedule.levels(1000, "trailing")[:-1]:
        F = objective.target(x0, noise, level.alpha, level.sigma)
        x_t = level.alpha * x0 + level.sigma * noise
        answer = ddpm(objective, schedule).denoiser(lambda x, t, F=F: F)(x_t, level).x0
        torch.testing.assert_close(answer, x0, rtol=0, atol=1e-10)
    half = ddpm(objective, schedule).denoiser(lambda x, t: x.bfloat16())(noise, schedule.levels(1, "trailing")[0]).x0
    assert half.dtype == torch.float32


def test_respaced_sampling_tells_the_network_the_original_times():
    """Catches a network that is told 4, 3, 2, 1, 0 where the chain was cut from 1000 to 5 steps."""
    told = []

    def net(x, t):
        told.append(t.tolist())
        return x

    schedule = Linear(1000)
    list(DDIM(steps=5)(ddpm().denoiser(net), schedule, torch.zeros(4, 1, 2, 2), lambda: torch.zeros(4, 1, 2, 2)))
    assert told == [[t] * 4 for t in (999.0, 799.0, 599.0, 399.0, 199.0)]


@pytest.mark.parametrize("num_classes", [None, 10])
def test_an_answer_does_not_depend_on_the_batch_to_the_bit(num_classes):
    """Catches kernels that round the last rows of a batch in another way: samples would depend on batch_size."""
    torch.manual_seed(0)
    net = UNet(
        1,
        8,
        base_channels=64,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        dropout=0.0,
        num_classes=num_classes,
    ).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    diffusion, x = ddpm(), torch.randn(64, 1, 8, 8)
    y = None if num_classes is None else torch.arange(64) % 10
    level = diffusion.schedule.levels(10, "trailing")[4]
    with torch.no_grad():
        whole = diffusion.denoiser(net, y)(x, level).x0
        for size in (1, 3, 5, 7, 16):
            part = diffusion.denoiser(net, None if y is None else y[:size])(x[:size], level).x0
            assert torch.equal(part, whole[:size]), size
