"""The reverse step of a discrete schedule as a distribution, and how far a model's is from it, in bits.

    q(x_{t-1} | x_t, x_0) = N(c0 x_0 + ct x_t, tilde beta_t)                         (Eq. 6 and 7, Ho et al. 2020)
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))                          (Eq. 5, Ho et al. 2020)

tilde beta_0 is 0; its logarithm is taken from t = 1, as is that of beta_0 where beta is the variance. At t = 0 the term
is the negative log-likelihood of the image's grey levels, 256 or as many as there are, under p(x_0 | x_1) (Eq. 13).
"""

from math import log

import torch
from torch import Tensor

from src.diffusion.schedules import DiscreteSchedule


class Posterior:
    """Tables of q(x_{t-1} | x_t, x_0), float64, one copy a device.

    Args:
        schedule: of T steps.

    Attributes:
        log_variance: (T,) ln tilde beta_t.
        log_beta: (T,) ln beta_t.
    """

    def __init__(self, schedule: DiscreteSchedule) -> None:
        betas, abar = schedule.betas, schedule.alphas_cumprod
        before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        variance = betas * (1 - before) / (1 - abar)
        if len(betas) > 1:
            variance[0] = variance[1]
        else:
            variance = betas
        self.log_variance = variance.log()
        self.log_beta = betas.log()
        self._x0 = betas * before.sqrt() / (1 - abar)
        self._x_t = (1 - before) * schedule.alphas.sqrt() / (1 - abar)
        self._tables: dict[torch.device, Tensor] = {}

    def mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of x_{t-1}, (B, C, H, W), for the times t (B,)."""
        c0, ct, _, _ = self._rows(t, x_t)
        return c0 * x0 + ct * x_t

    def learned_log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """ln variance, (B, C, H, W), between tilde beta_t (v = -1) and beta_t (v = 1) (Eq. 15, Nichol & Dhariwal)."""
        _, _, low, high = self._rows(t, v)
        return between(low, high, v)

    def fixed_log_variance(self, t: Tensor, like: Tensor, beta: bool) -> Tensor:
        """ln variance, (B, 1, 1, 1), of sampling with beta_t or with tilde beta_t."""
        _, _, small, large = self._rows(t, like)
        first = (t == 0).view(small.shape)
        return torch.where(first, small, large) if beta else small

    def bits(
        self, x0: Tensor, x_t: Tensor, x0_hat: Tensor, log_variance: Tensor, t: Tensor, levels: int = 256
    ) -> Tensor:
        """The term of each image's variational bound at its time t, (B,) bits per dimension.

        Args:
            x0: (B, C, H, W) images whose values are among the grey levels of [-1, 1].
            x_t: (B, C, H, W) the images with the noise of the times t (B,).
            x0_hat: (B, C, H, W) the model's guess of x0.
            log_variance: broadcasts to (B, C, H, W), the model's ln variance of x_{t-1}.
            levels: how many grey levels there are: 256 of 8 bits.
        """
        truth, guess = self.mean(x0, x_t, t), self.mean(x0_hat, x_t, t)
        _, _, true_log_variance, _ = self._rows(t, x_t)
        divergence = normal_kl(truth, true_log_variance, guess, log_variance)
        nll = -discretized_log_likelihood(x0, guess, log_variance, levels)
        first = (t == 0).view(-1, *[1] * (x0.ndim - 1))
        return torch.where(first, nll, divergence).flatten(1).mean(1) / log(2)

    def _rows(self, t: Tensor, like: Tensor) -> list[Tensor]:
        table = self._tables.get(t.device)
        if table is None:
            table = torch.stack([self._x0, self._x_t, self.log_variance, self.log_beta])
            table = (table.float() if t.device.type == "mps" else table).to(t.device)
            self._tables[t.device] = table
        shape = (-1, *[1] * (like.ndim - 1))
        return [row.to(like.dtype).view(shape) for row in table.index_select(1, t)]


def between(low: Tensor | float, high: Tensor | float, v: Tensor) -> Tensor:
    """low at v = -1, high at v = 1."""
    share = (v + 1) / 2
    return share * high + (1 - share) * low


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) of each number, in nats."""
    difference = log_variance2 - log_variance1
    return 0.5 * (difference - 1 + (-difference).exp() + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor, levels: int = 256) -> Tensor:
    """ln probability of the grey level x0 under N(mean, variance), whose first and last levels reach to infinity.

    With the exact normal distribution function, in the tail that holds the smaller numbers, where a difference keeps
    its digits (Eq. 13, Ho et al. 2020; their code approximates it by a tanh).
    """
    half = 1 / (levels - 1)  # of the distance of two levels in [-1, 1]
    centred = x0 - mean
    inverse_std = (-0.5 * log_variance).exp()
    # in the coordinate that points away from the mean both ends are in the same tail
    sign = torch.where(centred > 0, -1.0, 1.0)
    upper = torch.where(sign > 0, centred + half, -centred + half) * inverse_std
    lower = torch.where(sign > 0, centred - half, -centred - half) * inverse_std
    log_upper, log_lower = log_ndtr(upper), log_ndtr(lower)
    # ln(Phi(upper) - Phi(lower)); equal where the level is too far for any digits
    gap = (log_lower - log_upper).clamp(max=-1e-7)
    inside = log_upper + torch.log(-torch.expm1(gap))
    lowest = log_ndtr((centred + half) * inverse_std)
    highest = log_ndtr(-(centred - half) * inverse_std)
    return torch.where(x0 < -1 + half, lowest, torch.where(x0 > 1 - half, highest, inside))


def log_ndtr(z: Tensor) -> Tensor:
    """ln of the standard normal distribution function, with a gradient that keeps its digits in the tail.

    That of `torch.special.log_ndtr` is e to the difference of two numbers of the size of z^2 / 2: in float32 wrong by
    5% at z = -1000, and NaN further out.
    """
    tail = z < -1
    x = z.clamp(max=0) * -(0.5**0.5)  # each clamped beyond where it is taken, for clamp has no slope at its end
    return torch.where(tail, (torch.special.erfcx(x) / 2).log() - x**2, torch.special.log_ndtr(z.clamp(min=-2)))
