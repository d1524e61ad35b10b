"""Noise schedules: how much signal (alpha) and noise (sigma) an image holds at each time.

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I)                                        (Eq. 4, Ho et al. 2020)

The discrete, variance-preserving schedules here are given by betas of T steps, 0 < beta < 1:

    alphas = 1 - betas,  alphas_cumprod = prod alphas,  alpha_t = sqrt(alphas_cumprod_t),  sigma_t^2 = 1 - alpha_t^2

Tables are float64: in float32 the product of 1000 factors loses the digits that 1 - alphas_cumprod needs near t = 0.
They are plain tensors, not buffers, so that a module cast to bfloat16 cannot take them along.

New schedule: subclass `DiscreteSchedule`, hand the betas to `super().__init__`, add one YAML to conf/schedule.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Spacing = Literal["leading", "linspace", "trailing", "quadratic"]


class Level(NamedTuple):
    """One noise level of a sampler's path: x = alpha x0 + sigma eps, and the time `t` that the network is told."""

    t: float
    alpha: float
    sigma: float


CLEAN = Level(t=-1.0, alpha=1.0, sigma=0.0)  # where every path ends; no network is ever evaluated there


class DiscreteSchedule:
    """A variance-preserving schedule of T steps.

    Args:
        betas: (T,) float64, each in (0, 1): the variance that step t adds (Eq. 2, Ho et al. 2020).

    Attributes:
        betas, alphas, alphas_cumprod: (T,) float64, the symbols of Ho et al. 2020.
        alpha, sigma: (T,) float64, square roots of alphas_cumprod and of 1 - alphas_cumprod.
        prior_std: standard deviation of the noise that sampling starts from.

    Raises:
        ValueError: when betas are not in (0, 1), or alpha reaches 0 before the last step.
    """

    prior_std = 1.0

    def __init__(self, betas: Tensor) -> None:
        if betas.ndim != 1 or len(betas) < 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be a non-empty vector of numbers between 0 and 1")
        self.betas = betas.double()
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        self.alpha = self.alphas_cumprod.sqrt()
        self.sigma = (1 - self.alphas_cumprod).sqrt()
        destroyed = int((self.alpha > 0).sum())
        if destroyed < len(betas) - 1:
            raise ValueError(
                f"nothing of the image is left from t={destroyed} of {len(betas)} on (alpha is 0 even in float64); "
                "choose smaller betas or a smaller num_timesteps"
            )
        self._float32: dict[torch.device, Tensor] = {}  # (2, T) alpha and sigma, one copy a device

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, (B,) float32 on the device of `t`, (B,) integers in [0, T)."""
        table = self._float32.get(t.device)
        if table is None:
            table = torch.stack([self.alpha, self.sigma]).float().to(t.device)
            self._float32[t.device] = table
        alpha, sigma = table.index_select(1, t)
        return alpha, sigma

    def time(self, u: Tensor) -> Tensor:
        """The time, (B,) int64 in [0, T), at the share `u`, (B,) in [0, 1), of the schedule's length."""
        return (u * self.num_timesteps).long().clamp_(max=self.num_timesteps - 1)

    def timesteps(self, steps: int, spacing: Spacing) -> list[int]:
        """`steps` distinct times, largest first, that a sampler visits.

        leading:   0, r, 2r, ... with r = T // steps; never sees T - 1 unless steps = T (Song et al. 2021, linear tau)
        linspace:  from 0 to T - 1, both included (Nichol & Dhariwal 2021)
        trailing:  T - 1, T - 1 - T / steps, ... (Lin et al. 2023, Table 2)
        quadratic: c i^2, dense near 0, with c such that the last is T - 1 (Song et al. 2021, App. D.2)

        Raises:
            ValueError: when steps is not in [1, T] or the spacing has no such name.
        """
        T = self.num_timesteps
        if not 1 <= steps <= T:
            raise ValueError(
                f"steps={steps} is not between 1 and num_timesteps={T}; choose fewer steps or a longer schedule"
            )
        i = torch.arange(steps, dtype=torch.float64)
        if spacing == "leading":
            t = i * (T // steps)
        elif spacing == "linspace":
            t = torch.linspace(0, T - 1, steps, dtype=torch.float64).round() if steps > 1 else torch.tensor([T - 1.0])
        elif spacing == "trailing":
            t = (T - i.flip(0) * (T / steps)).round() - 1
        elif spacing == "quadratic":
            t = ((T - 1) * (i / (steps - 1)) ** 2).round() if steps > 1 else torch.tensor([T - 1.0])
            t = t.maximum(i)  # rounding repeats small times when steps is close to T
        else:
            raise ValueError(f"spacing={spacing!r} is not one of {', '.join(get_args(Spacing))}")
        return [int(v) for v in t.flip(0)]

    def levels(self, steps: int, spacing: Spacing) -> list[Level]:
        """The `steps + 1` levels of a sampler's path, noisiest first, ending at `CLEAN`."""
        path = [Level(float(t), float(self.alpha[t]), float(self.sigma[t])) for t in self.timesteps(steps, spacing)]
        return [*path, CLEAN]


def _check_num_timesteps(num_timesteps: int) -> None:
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps={num_timesteps} must be at least 1; Ho et al. use 1000")


class Linear(DiscreteSchedule):
    """betas evenly spaced from beta_start to beta_end (Sec. 4, Ho et al. 2020: 1e-4 to 0.02 with T = 1000).

    Raises:
        ValueError: unless 0 < beta_start < beta_end < 1 and num_timesteps >= 1.
    """

    def __init__(self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        _check_num_timesteps(num_timesteps)
        for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
            if not 0 < beta < 1:
                raise ValueError(f"{name}={beta} must lie strictly between 0 and 1; Ho et al. use 1e-4 to 0.02")
        if beta_end <= beta_start:
            raise ValueError(f"beta_end={beta_end} must be greater than beta_start={beta_start}: noise grows with time")
        super().__init__(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))


class Cosine(DiscreteSchedule):
    """alphas_cumprod follows a squared cosine (Eq. 17, Nichol & Dhariwal 2021).

    f(u) = cos^2((u + s) / (1 + s) pi / 2),  beta_t = min(1 - f((t + 1) / T) / f(t / T), max_beta)

    Raises:
        ValueError: unless num_timesteps >= 1, s >= 0 and 0 < max_beta < 1.
    """

    def __init__(self, num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> None:
        _check_num_timesteps(num_timesteps)
        if s < 0:
            raise ValueError(f"s={s} must not be negative; Nichol & Dhariwal use 0.008")
        if not 0 < max_beta < 1:
            raise ValueError(f"max_beta={max_beta} must lie strictly between 0 and 1; Nichol & Dhariwal use 0.999")
        u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        f = torch.cos((u + s) / (1 + s) * torch.pi / 2) ** 2
        super().__init__((1 - f[1:] / f[:-1]).clamp(max=max_beta))
