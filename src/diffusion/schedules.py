"""Noise schedules: how much signal (alpha) and noise (sigma) an image holds at each time.

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I)                                        (Eq. 4, Ho et al. 2020)

The discrete, variance-preserving schedules here are given by betas of T steps, 0 < beta < 1:

    alphas = 1 - betas,  alphas_cumprod = prod alphas,  alpha_t = sqrt(alphas_cumprod_t),  sigma_t^2 = 1 - alpha_t^2

Tables are float64: in float32 the product of 1000 factors loses the digits that 1 - alphas_cumprod needs near t = 0.
They are plain tensors, not buffers, so that a module cast to bfloat16 cannot take them along.

New schedule: subclass `DiscreteSchedule`, hand the betas to `super().__init__`, add one YAML to conf/schedule.
"""

from bisect import bisect_left
from collections.abc import Callable
from math import exp, sqrt

import torch
from torch import Tensor

from src.diffusion.levels import BELOW_ONE, Level, Schedule, TimeSpacing


class DiscreteSchedule(Schedule):
    """A variance-preserving schedule of T steps.

    Args:
        betas: (T,) float64, each in (0, 1): the variance that step t adds (Eq. 2, Ho et al. 2020). The last may be 1:
            zero terminal SNR.

    Attributes:
        betas, alphas, alphas_cumprod: (T,) float64, the symbols of Ho et al. 2020.
        alpha, sigma: (T,) float64, square roots of alphas_cumprod and of 1 - alphas_cumprod.

    Raises:
        ValueError: when betas are not in (0, 1), or alpha reaches 0 before the last step.
    """

    def __init__(self, betas: Tensor) -> None:
        inside = (betas > 0) & (betas < 1)
        if betas.ndim != 1 or len(betas) < 1 or not bool(inside[:-1].all()) or not 0 < betas[-1] <= 1:
            raise ValueError("betas must be a non-empty vector of numbers between 0 and 1; only the last may be 1")
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
        self._log_snr = (self.alpha / self.sigma).log()  # (T,) ln(alpha / sigma), falling
        self._rising: list[float] = self._log_snr.neg().tolist()
        self._float32: dict[torch.device, Tensor] = {}  # (2, T) alpha and sigma, one copy a device

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @property
    def chain_length(self) -> int:  # type: ignore[override]
        return self.num_timesteps

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

    def condition(self, t: Tensor) -> Tensor:
        return t

    def told(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        t = condition.double()
        below = t.floor().long().clamp(0, self.num_timesteps - 1)
        share = t - below
        log_snr = self._log_snr.to(t.device)
        low, high = log_snr[below], log_snr[(below + 1).clamp(max=self.num_timesteps - 1)]
        # on whole times, which may have no finite log-SNR, the table itself
        at = torch.where(share == 0, low, low + share * (high - low))
        return (2 * at).sigmoid().sqrt(), (-2 * at).sigmoid().sqrt()

    def share(self, log_snr: Tensor) -> Tensor:
        middles = (self._log_snr[1:] + self._log_snr[:-1]) / 2
        index = torch.searchsorted(-middles.float().to(log_snr.device), -log_snr.float())  # Apple's GPUs lack float64
        return ((index + 0.5) / self.num_timesteps).clamp(max=BELOW_ONE).float()

    def slope(self, t: Tensor) -> Tensor:
        # each time stands for the stretch of ln SNR that is nearest to it
        edges = (self._log_snr[1:] + self._log_snr[:-1]) / 2
        edges = torch.cat([self._log_snr[:1], edges, self._log_snr[-1:]])
        return (2 * self.num_timesteps * (edges[:-1] - edges[1:])).float().to(t.device)[t]

    def table(self) -> tuple[Tensor, Tensor]:
        return self.alpha, self.sigma

    def timesteps(self, steps: int, spacing: TimeSpacing) -> list[int]:
        """`steps` distinct times, largest first, that a sampler visits.

        leading:   0, r, 2r, ... with r = T // steps; never sees T - 1 unless steps = T, and far from it where steps
                   is no divisor of T (Song et al. 2021, linear tau, rounded as diffusers does)
        linspace:  from 0 to T - 1, both included (Nichol & Dhariwal 2021)
        trailing:  T - 1, T - 1 - T / steps, ... (Lin et al. 2023, Table 2)
        quadratic: c i^2, dense near 0, with c such that the last is T - 1 (Song et al. 2021, App. D.2)

        Raises:
            ValueError: when steps is not in [1, T].
        """
        T = self.num_timesteps
        self._check_steps(steps)
        i = torch.arange(steps, dtype=torch.float64)
        if spacing == "leading":
            t = i * (T // steps)
        elif spacing == "linspace":
            t = torch.linspace(0, T - 1, steps, dtype=torch.float64).round() if steps > 1 else torch.tensor([T - 1.0])
        elif spacing == "trailing":
            t = (T - i.flip(0) * (T / steps)).round() - 1
        else:
            t = ((T - 1) * (i / (steps - 1)) ** 2).round() if steps > 1 else torch.tensor([T - 1.0])
            t = t.maximum(i)  # rounding repeats small times when steps is close to T
        return [int(v) for v in t.flip(0)]

    def _in_time(self, steps: int, spacing: TimeSpacing) -> list[Level]:
        return [Level(float(t), float(self.alpha[t]), float(self.sigma[t])) for t in self.timesteps(steps, spacing)]

    def level_at(self, log_snr: float) -> Level:
        """Between the whole times, interpolated in ln(alpha / sigma)."""
        before = bisect_left(self._rising, -log_snr) - 1  # the ends are not asked for, so there is one
        low, high = self._rising[before], self._rising[before + 1]
        snr = exp(2 * log_snr)
        return Level(before + (-log_snr - low) / (high - low), sqrt(snr / (1 + snr)), sqrt(1 / (1 + snr)))

    def _check_steps(self, steps: int) -> None:
        T = self.num_timesteps
        if not 1 <= steps <= T:
            raise ValueError(
                f"steps={steps} is not between 1 and num_timesteps={T}; choose fewer steps or a longer schedule"
            )


def _check_num_timesteps(num_timesteps: int) -> None:
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps={num_timesteps} must be at least 1; Ho et al. use 1000")


class BetaRange(DiscreteSchedule):
    """betas that rise from beta_start to beta_end; subclasses say how, in `ramp`.

    Args:
        num_timesteps: T.
        beta_start, beta_end: the first and the last beta.
        zero_terminal_snr: see `zero_terminal_snr`.

    Raises:
        ValueError: unless 0 < beta_start < beta_end < 1 and num_timesteps >= 1.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        zero_terminal_snr: bool = False,
    ) -> None:
        _check_num_timesteps(num_timesteps)
        for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
            if not 0 < beta < 1:
                raise ValueError(f"{name}={beta} must lie strictly between 0 and 1; Ho et al. use 1e-4 to 0.02")
        if beta_end <= beta_start:
            raise ValueError(f"beta_end={beta_end} must be greater than beta_start={beta_start}: noise grows with time")
        betas = self.ramp(num_timesteps, beta_start, beta_end)
        super().__init__(rescale_to_zero_terminal_snr(betas) if zero_terminal_snr else betas)

    @staticmethod
    def ramp(T: int, start: float, end: float) -> Tensor:
        """The betas, (T,) float64."""
        raise NotImplementedError


class Linear(BetaRange):
    """betas evenly spaced (Sec. 4, Ho et al. 2020: 1e-4 to 0.02 with T = 1000)."""

    @staticmethod
    def ramp(T: int, start: float, end: float) -> Tensor:
        return torch.linspace(start, end, T, dtype=torch.float64)


class ScaledLinear(BetaRange):
    """Roots of the betas evenly spaced ("quad" in the code of Ho et al. 2020; Rombach et al. 2022: 8.5e-4 to 0.012)."""

    @staticmethod
    def ramp(T: int, start: float, end: float) -> Tensor:
        return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2


class Quadratic(BetaRange):
    """betas rise with the square of time: beta_start + (beta_end - beta_start) (t / (T - 1))^2."""

    @staticmethod
    def ramp(T: int, start: float, end: float) -> Tensor:
        return start + (end - start) * torch.linspace(0, 1, T, dtype=torch.float64) ** 2


class _AlphaBar(DiscreteSchedule):
    """alphas_cumprod_t = f((t + 1) / T) / f(0) for a falling f: beta_t = min(1 - f((t + 1) / T) / f(t / T), max_beta).

    Args:
        f: takes (T + 1,) float64 from 0 to 1.
        num_timesteps: T.
        max_beta: the largest beta that is allowed, in (0, 1).
        zero_terminal_snr: see `rescale_to_zero_terminal_snr`.
    """

    def __init__(
        self, f: Callable[[Tensor], Tensor], num_timesteps: int, max_beta: float, zero_terminal_snr: bool
    ) -> None:
        _check_num_timesteps(num_timesteps)
        if not 0 < max_beta < 1:
            raise ValueError(f"max_beta={max_beta} must lie strictly between 0 and 1; Nichol & Dhariwal use 0.999")
        abar = f(torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps)
        betas = (1 - abar[1:] / abar[:-1]).clamp(max=max_beta)
        super().__init__(rescale_to_zero_terminal_snr(betas) if zero_terminal_snr else betas)


class Cosine(_AlphaBar):
    """alphas_cumprod follows a squared cosine: f(u) = cos^2((u + s) / (1 + s) pi / 2) (Eq. 17, Nichol & Dhariwal 2021).

    Raises:
        ValueError: unless num_timesteps >= 1, s >= 0 and 0 < max_beta < 1.
    """

    def __init__(
        self, num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999, zero_terminal_snr: bool = False
    ) -> None:
        if s < 0:
            raise ValueError(f"s={s} must not be negative; Nichol & Dhariwal use 0.008")
        super().__init__(
            lambda u: torch.cos((u + s) / (1 + s) * torch.pi / 2) ** 2, num_timesteps, max_beta, zero_terminal_snr
        )


class Sigmoid(_AlphaBar):
    """alphas_cumprod follows a sigmoid, from 1 to (nearly) 0 (Eq. 4 and Algorithm 1, Jabri et al. 2022).

    f(u) = (S(end) - S(start + u (end - start))) / (S(end) - S(start)) with S(x) = sigmoid(x / tau)

    Raises:
        ValueError: unless start < end, tau > 0 and 0 < max_beta < 1.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
        max_beta: float = 0.999,
        zero_terminal_snr: bool = False,
    ) -> None:
        if not start < end or tau <= 0:
            raise ValueError(f"start={start}, end={end}, tau={tau}: start must be below end, and tau positive")

        def f(u: Tensor) -> Tensor:
            first, last = (torch.tensor(x / tau, dtype=torch.float64).sigmoid() for x in (start, end))
            return (last - ((start + u * (end - start)) / tau).sigmoid()) / (last - first)

        super().__init__(f, num_timesteps, max_beta, zero_terminal_snr)


class Laplace(_AlphaBar):
    """ln(alpha^2 / sigma^2) is spread as a Laplace distribution, most of it near mu (Table 1, Hang et al. 2024).

    ln SNR(u) = mu - b sgn(1/2 - u) ln(1 - 2 |u - 1/2|)

    Args:
        mu, b: centre and width of the distribution; at u = 1, where it is infinite, u keeps 1 / (2 T) away.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        mu: float = 0.0,
        b: float = 0.5,
        max_beta: float = 0.999,
        zero_terminal_snr: bool = False,
    ) -> None:
        if b <= 0:
            raise ValueError(f"b={b} must be positive; Hang et al. use 0.5")

        def f(u: Tensor) -> Tensor:
            u = u.clamp(max=1 - 0.5 / num_timesteps)
            return (mu - b * torch.sign(0.5 - u) * torch.log(1 - 2 * (u - 0.5).abs())).sigmoid()  # f(0) = 1

        super().__init__(f, num_timesteps, max_beta, zero_terminal_snr)


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose alpha is shifted to 0 at T - 1 and scaled to keep its first value (Algorithm 1, Lin et al. 2023).

    Sampling then starts from what training has seen. The noise objective tells nothing there and is refused.
    """
    alpha = (1 - betas).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    abar = torch.cat([torch.ones(1, dtype=torch.float64), alpha**2])
    return 1 - abar[1:] / abar[:-1]
