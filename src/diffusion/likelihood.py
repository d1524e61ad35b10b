"""How likely images are under a model, in bits per dimension: a bound by its chain, and the density of its ODE.

The chain of a discrete schedule bounds the negative log-likelihood of images of K grey levels, 256 of 8 bits:

    L = KL(q(x_T | x_0) || N(0, I)) + sum_t L_t        L_t: see `Posterior.bits`        (Eq. 5, Ho et al. 2020)

The probability-flow ODE of any schedule has a density (Eq. 39, Song et al. 2021; Eq. 8, Chen et al. 2018). On the
straight path z = x / (alpha + sigma), r = sigma / (alpha + sigma) it is

    dz / dr = eps - x0 = (z - x0) / r        d ln p(z) / dr = -div (dz / dr) = -(C H W - tr dx0 / dz) / r

for every schedule, finite also where no signal is left. From the cleanest level r_0, where the image y has the place
z = (1 - r_0) y, it is integrated to the noisiest, r_1, whose density is the normal one that sampling starts from:

    ln p(y) = ln p(z_1) + integral from r_0 to r_1 of div (dz / dr) dr + C H W ln(1 - r_0)

This is the density of images with the noise of the cleanest level, u = sigma / alpha, which samplers take off last.

Grey levels have probabilities and no density. Spread evenly over their bins they have (Sec. 3.1, Theis et al. 2016):
y = (k + v - 1/2) w - 1, v in [0, 1), keeps each level k in the middle of its bin, whose width is w = 2 / (K - 1). As
E_v ln p(y) + C H W ln w <= ln P(k), the bits per dimension are -log2 p(y) / (C H W) - log2 w: at least those of P.
(With y = (k + v) / 128 - 1 the constant of 8 bits would be 7, and images darker than those that were trained on.)
"""

from collections.abc import Callable, Sequence
from math import inf, isfinite, log, pi
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from src.diffusion.guidance import Denoiser, as_guess
from src.diffusion.levels import Level, Schedule
from src.diffusion.posterior import Posterior, normal_kl
from src.diffusion.samplers import Noise
from src.diffusion.schedules import DiscreteSchedule

Variance = Literal["posterior", "beta", "learned"]
Progress = Callable[[float], object]  # is told the share that is done


def _untold(share: float) -> None: ...


class Bound(NamedTuple):
    """The variational bound of each image, in bits per dimension.

    Attributes:
        total: (B,) prior + T / n * the sum of the n terms.
        terms: (B, n) L_t of the times that were asked for; of all T, from t = 0, unless fewer were.
        prior: (B,) KL(q(x_T | x_0) || N(0, I)).
    """

    total: Tensor
    terms: Tensor
    prior: Tensor


def vlb(
    denoise: Denoiser,
    schedule: Schedule,
    x0: Tensor,
    noise: Noise,
    variance: Variance = "posterior",
    clip: bool = True,
    times: Sequence[int] | None = None,
    progress: Progress = _untold,
    levels: int = 256,
) -> Bound:
    """The variational bound of images, with one draw of x_t for each image and time.

    Args:
        denoise: its answer must depend on x_t and the level alone.
        x0: (B, C, H, W) images whose values are among the grey levels of [-1, 1], in the precision wanted.
        noise: gives a fresh standard normal like x0 a call.
        variance: of the reverse steps; see `samplers.DDPM`.
        clip: clip the guess of x0 to [-1, 1].
        times: see `stratified_times`; None for all.
        levels: how many grey levels there are.

    Raises:
        ValueError: for a schedule without a chain, or a learned variance of a denoiser that learns none.
    """
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(
            f"the variational bound is that of a chain of discrete steps, which {type(schedule).__name__} is not; "
            "take the likelihood of its ODE"
        )
    posterior, T = Posterior(schedule), schedule.num_timesteps
    times = range(T) if times is None else times
    terms = []
    for done, time in enumerate(times, 1):
        level = Level(float(time), float(schedule.alpha[time]), float(schedule.sigma[time]))
        x_t = level.alpha * x0 + level.sigma * noise().to(x0.dtype)
        guess = as_guess(denoise(x_t, level))
        t = torch.full((len(x0),), time, device=x0.device)
        if variance == "learned":
            if guess.v is None:
                raise ValueError("variance=learned needs a network that learns it; choose posterior or beta")
            log_variance = posterior.learned_log_variance(guess.v, t)
        else:
            log_variance = posterior.fixed_log_variance(t, x0, beta=variance == "beta")
        x0_hat = guess.x0.clamp(-1, 1) if clip else guess.x0
        terms.append(posterior.bits(x0, x_t, x0_hat, log_variance, t, levels))
        progress(done / len(times))
    each = torch.stack(terms, dim=1)
    prior = prior_bits(schedule, x0)
    return Bound(prior + T / len(times) * each.sum(1), each, prior)


def prior_bits(schedule: DiscreteSchedule, x0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, I)) of images (B, C, H, W), (B,) bits per dimension."""
    alpha, sigma = schedule.alpha[-1].to(x0), schedule.sigma[-1].to(x0)
    zero = torch.zeros_like(sigma)
    return normal_kl(alpha * x0, 2 * sigma.log(), zero, zero).flatten(1).mean(1) / log(2)


def stratified_times(T: int, n: int, generator: torch.Generator) -> list[int]:
    """n times, one from each n-th of the T: T / n times the sum of their terms is an unbiased estimate of all.

    Raises:
        ValueError: unless 1 <= n <= T.
    """
    if not 1 <= n <= T:
        raise ValueError(f"num_times={n} is not between 1 and num_timesteps={T}; null takes all")
    u = (torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
    return [min(int(t), T - 1) for t in u * T]


class Density(NamedTuple):
    """The density of images under a model's ODE.

    Attributes:
        log_p: (B,) ln p(y), nats.
        x: (B, C, H, W) the noise that the images are made of, at the noisiest level.
        evaluations: of the denoiser and its derivative.
    """

    log_p: Tensor
    x: Tensor
    evaluations: int


def ode_density(
    denoise: Denoiser,
    schedule: Schedule,
    y: Tensor,
    probes: Tensor,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    progress: Progress = _untold,
) -> Density:
    """The density of images under the model's probability-flow ODE.

    The step is chosen for the image of the batch whose error is largest; an error beyond the tolerances is one of z,
    whose values are about 1, or of ln p per dimension.

    Args:
        denoise: its answer must depend on x and the level alone, and be differentiable. A network of discrete times is
            asked between them.
        y: (B, C, H, W) images, in the precision wanted.
        probes: (P, B or 1, C, H, W) such that the mean over P of v^T J v estimates tr J: `rademacher` (Hutchinson 1990;
            Skilling 1989), or `unit_probes` for the trace itself.
        rtol, atol: tolerances, relative to the state and absolute.

    Raises:
        ValueError: for tolerances that are not positive, or that cannot be met, or a schedule of a single level.
    """
    if rtol <= 0 or atol <= 0:
        raise ValueError(f"rtol={rtol} and atol={atol} must be positive; Song et al. use 1e-5")
    noisiest, cleanest, _ = schedule.levels(2, "linspace")
    first, last = (level.sigma / (level.alpha + level.sigma) for level in (cleanest, noisiest))
    D = y[0].numel()
    evaluations = 0

    def derivative(r: float, state: Tensor) -> Tensor:  # of z and of -ln p(z) / D
        nonlocal evaluations
        evaluations += 1
        level = cleanest if r <= first else noisiest if r >= last else schedule.level_at(log((1 - r) / r))
        scale = level.alpha + level.sigma
        z = state[:, :-1].view(y.shape)
        x = (scale * z).requires_grad_()
        with torch.enable_grad():
            x0 = as_guess(denoise(x, level)).x0
        trace = torch.zeros_like(state[:, -1])
        for i, probe in enumerate(probes, 1):
            probe = probe.to(y).expand(y.shape)
            (product,) = torch.autograd.grad(x0, x, probe, retain_graph=i < len(probes))
            trace += (product * probe).flatten(1).sum(1) / len(probes)
        return torch.cat([(z - x0.detach()).flatten(1), 1 - scale / D * trace[:, None]], dim=1) / r

    start = torch.cat([(1 - first) * y.flatten(1), torch.zeros_like(y.flatten(1)[:, :1])], dim=1)
    end = dormand_prince(derivative, start, first, last, rtol, atol, progress)
    scale = noisiest.alpha + noisiest.sigma
    std = schedule.prior_std(noisiest) / scale
    z, expansion = end[:, :-1], end[:, -1]
    prior = -0.5 * (z / std).square().sum(1) - D * (log(std) + 0.5 * log(2 * pi))
    return Density(prior + D * (expansion + log(1 - first)), (scale * z).view(y.shape), evaluations)


def dormand_prince(
    f: Callable[[float, Tensor], Tensor],
    y: Tensor,
    t: float,
    end: float,
    rtol: float,
    atol: float,
    progress: Progress = _untold,
) -> Tensor:
    """y(end), (B, n), of dy / dt = f(t, y), by the pair of order 5 and 4 of Dormand & Prince 1980 (Table 2).

    A step's error is the root mean square over a row's first n - 1 numbers or that of its last, whichever is larger, in
    units of atol + rtol |y|; that of the worst row must not exceed 1 (Sec. II.4, Hairer et al. 1993).

    Raises:
        ValueError: when a step would have to be too small for the clock's digits.
    """
    start, h = t, (end - t) / 1000
    k = [f(t, y)]
    if not k[0].isfinite().all():
        raise ValueError("the network's answer or its derivative is NaN or infinity: its weights are broken")
    while t < end:
        if h < 1e-10 * (end - start):
            raise ValueError(f"rtol={rtol} and atol={atol} cannot be met; the network is not smooth enough for them")
        to = t + h if t + 1.001 * h < end else end  # no step is left that is too small
        h = to - t
        for c, row in zip(C, A, strict=True):
            k.append(f(to if c == 1 else t + c * h, _combined(y, h, row, k)))
        new = _combined(y, h, A[-1], k)  # the last slope is that of the next step
        scale = atol + rtol * torch.maximum(y.abs(), new.abs())
        error = (_combined(torch.zeros_like(y), h, E, k) / scale).square()
        worst = float(torch.maximum(error[:, :-1].mean(1), error[:, -1]).max().sqrt())
        accepted = worst <= 1
        k = k[-1:] if accepted else k[:1]
        if accepted:
            t, y = to, new
            progress((t - start) / (end - start))
        if not isfinite(worst):  # it went too far
            worst = inf
        h *= min(10.0, max(0.2, 0.9 * worst**-0.2 if worst > 0 else inf))
    return y


def _combined(y: Tensor, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=False):
        if weight:
            y = y + h * weight * slope
    return y


C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# the weights of order 5, which are A's last row, less those of order 4
E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def rademacher(shape: Sequence[int], n: int, generator: torch.Generator) -> Tensor:
    """n probes of one image, (n, *shape), whose numbers are 1 or -1."""
    return 2.0 * torch.randint(0, 2, (n, *shape), generator=generator) - 1


def unit_probes(shape: Sequence[int]) -> Tensor:
    """One probe for each of an image's D numbers, (D, 1, *shape), with which the trace is exact."""
    D = torch.Size(shape).numel()
    return D**0.5 * torch.eye(D).view(D, 1, *shape)


def dequantized(images: Tensor, v: Tensor, levels: int = 256) -> Tensor:
    """Images (B, C, H, W) uint8 or uint16, spread over the bins of their grey levels by v in [0, 1), float64."""
    return (images.double() + v.double() - 0.5) * (2 / (levels - 1)) - 1


def dequantized_bits(log_p: Tensor, D: int, levels: int = 256) -> Tensor:
    """Bits per dimension of grey levels from ln p of their dequantised images of D numbers."""
    return -(log_p / D + log(2 / (levels - 1))) / log(2)
