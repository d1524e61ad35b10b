"""Schedules in continuous time: variance exploding (alpha = 1) and the straight path of flow matching.

New schedule: subclass `Continuous`, add one YAML to conf/schedule.
"""

from math import exp, log

import torch
from torch import Tensor

from src.diffusion.levels import BELOW_ONE, Level, Schedule, TimeSpacing, shares

CHAIN_LENGTH = 1000


class Continuous(Schedule):
    """Base of the schedules that have a level at every share of their length; formulas take float32 or float64."""

    chain_length = CHAIN_LENGTH

    def table(self) -> tuple[Tensor, Tensor]:
        return self._exact(torch.linspace(0, 1, self.chain_length, dtype=torch.float64))

    def _exact(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.level(self.time(u))

    def _in_time(self, steps: int, spacing: TimeSpacing) -> list[Level]:
        t = self.time(shares(steps, spacing))
        alpha, sigma = self.level(t)
        rows = zip(self.condition(t).tolist(), alpha.tolist(), sigma.tolist(), strict=True)
        return [Level(*row) for row in rows]


class VarianceExploding(Continuous):
    """alpha = 1 and the time is sigma, from sigma_min to sigma_max; the network is told ln(sigma) / 4.

    Subclasses say how sigma rises. What the network is told is EDM's c_noise (Table 1, Karras et al. 2022).

    Args:
        sigma_min, sigma_max: the ends, of images in [-1, 1].

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min={sigma_min}, sigma_max={sigma_max}: both must be positive, and sigma_min below sigma_max; "
                "Karras et al. use 0.002 and 80"
            )
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def condition(self, t: Tensor) -> Tensor:
        return t.log() / 4

    def told(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (4 * condition.double()).exp()
        return torch.ones_like(sigma), sigma

    def prior_std(self, first: Level) -> float:
        return first.sigma

    def level_at(self, log_snr: float) -> Level:
        return Level(-log_snr / 4, 1.0, exp(-log_snr))


class Karras(VarianceExploding):
    """sigma^(1 / rho) evenly from sigma_min to sigma_max (Eq. 5, Karras et al. 2022).

    With the spacing linspace a sampler visits the noise levels of EDM.

    Args:
        rho: larger is denser at small sigma, here and in the spacing karras.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        super().__init__(sigma_min, sigma_max)
        if rho <= 0:
            raise ValueError(f"rho={rho} must be positive; Karras et al. use 7")
        self.rho = rho
        self._ends = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def time(self, u: Tensor) -> Tensor:
        low, high = self._ends
        return (low + u * (high - low)) ** self.rho

    def share(self, log_snr: Tensor) -> Tensor:
        low, high = self._ends
        return (((-log_snr / self.rho).exp() - low) / (high - low)).clamp(0, BELOW_ONE)

    def slope(self, t: Tensor) -> Tensor:
        low, high = self._ends
        return 2 * self.rho * (high - low) * t ** (-1 / self.rho)


class VE(VarianceExploding):
    """sigma rises exponentially: sigma_min (sigma_max / sigma_min)^u (Sec. 3.4, Song et al. 2021, "VE SDE")."""

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        super().__init__(sigma_min, sigma_max)

    def time(self, u: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u

    def share(self, log_snr: Tensor) -> Tensor:
        return ((-log_snr - log(self.sigma_min)) / log(self.sigma_max / self.sigma_min)).clamp(0, BELOW_ONE)

    def slope(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 2 * log(self.sigma_max / self.sigma_min))


class Flow(Continuous):
    """The straight path alpha = 1 - t, sigma = t, from images at 0 to noise at 1 (Liu et al. 2023).

    Time runs as in diffusion; Lipman et al. 2023 run it backwards. The network is told 1000 t.

    Args:
        shift: moves times towards noise, t = shift t' / (1 + (shift - 1) t'); with m times as many pixels sqrt(m) keeps
            the signal-to-noise ratio of what is seen (Eq. 23, Esser et al. 2024). 1 for none.
        t_min: the cleanest t' that is trained, and from which a sampler's last step may start.

    Raises:
        ValueError: unless shift > 0 and 0 < t_min < 1.
    """

    SCALE = 1000.0  # networks' time embeddings are made for numbers of this size

    def __init__(self, shift: float = 1.0, t_min: float = 1e-3) -> None:
        if shift <= 0:
            raise ValueError(f"shift={shift} must be positive; 1 is none, Esser et al. use 3 at 1024x1024")
        if not 0 < t_min < 1:
            raise ValueError(f"t_min={t_min} must lie strictly between 0 and 1; Liu et al. use 1e-3")
        self.shift = shift
        self.t_min = t_min

    def time(self, u: Tensor) -> Tensor:
        t = u + self.t_min * (1 - u)
        return self.shift * t / (self.shift * t + (1 - t))  # at 1 this is 1 to the last bit, with every shift

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def condition(self, t: Tensor) -> Tensor:
        return self.SCALE * t

    def told(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        t = condition.double() / self.SCALE
        return 1 - t, t

    def share(self, log_snr: Tensor) -> Tensor:
        return ((self._unshifted(log_snr.neg().sigmoid()) - self.t_min) / (1 - self.t_min)).clamp(0, BELOW_ONE)

    def slope(self, t: Tensor) -> Tensor:
        # ln SNR = 2 ln((1 - t) / t), so -d/dt is 2 / (t (1 - t)); and (1 - t) t' / (t (1 - t')) = 1 / shift
        s = self._unshifted(t)
        return 2 * (1 - self.t_min) / (s * (1 - s)).clamp_min(2**-24)  # float32 times reach the end itself

    def _unshifted(self, t: Tensor) -> Tensor:
        return t / (self.shift - (self.shift - 1) * t)

    def prior_std(self, first: Level) -> float:
        return first.sigma  # a path that starts before t = 1 (leading) has less noise there, not more signal

    def level_at(self, log_snr: float) -> Level:
        t = 1 / (1 + exp(log_snr))
        return Level(self.SCALE * t, 1 - t, t)
