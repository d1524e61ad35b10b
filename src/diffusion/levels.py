"""Noise levels, and the paths of them that samplers walk: what every schedule has in common.

A level is a pair (alpha, sigma): x = alpha x0 + sigma eps. Between schedules ln(alpha / sigma), half the log of the
signal-to-noise ratio, is the only clock that means the same.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

TimeSpacing = Literal["leading", "linspace", "trailing", "quadratic"]
Spacing = Literal["leading", "linspace", "trailing", "quadratic", "log_snr", "karras"]
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1
# alpha / sigma; a schedule that ends above it leaves so much of the image that pure noise is a wrong start
TERMINAL_ALPHA = 0.02
LEAST_ALPHA = 0.005  # below it x_t is noise to any network, and steps decide nothing


class Level(NamedTuple):
    """One noise level of a sampler's path: x = alpha x0 + sigma eps, and `t`, what the network is told."""

    t: float
    alpha: float
    sigma: float


CLEAN = Level(t=-1.0, alpha=1.0, sigma=0.0)  # where every path ends; no network is ever evaluated there


class Schedule:
    """How much signal (alpha) and noise (sigma) an image holds at each time.

    Time is the schedule's own: the index of a step, sigma itself, or a number from 0 to 1. Training draws shares u in
    [0, 1) of its length, `time` makes times of them and `level` levels; samplers walk `levels`.

    Attributes:
        chain_length: steps of the whole chain; for a continuous schedule, what ancestral sampling takes for it.
        rho: of the spacing karras; larger is denser at small sigma.
    """

    chain_length: int
    rho: float = 7.0  # Karras et al. 2022, Sec. 3

    def time(self, u: Tensor) -> Tensor:
        """The time, (B,), at the share `u`, (B,) float32 in [0, 1), of the schedule's length."""
        raise NotImplementedError

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, (B,) float32 on the device of the times `t`, (B,)."""
        raise NotImplementedError

    def condition(self, t: Tensor) -> Tensor:
        """What the network is told of the times `t`, (B,)."""
        raise NotImplementedError

    def told(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, (B,) float64, from what the network is told, (B,): the inverse of `condition`."""
        raise NotImplementedError

    def share(self, log_snr: Tensor) -> Tensor:
        """The share u, (B,) float32 in [0, 1), of the level nearest to ln(alpha / sigma), (B,)."""
        raise NotImplementedError

    def slope(self, t: Tensor) -> Tensor:
        """-d ln(alpha^2 / sigma^2) / du, (B,) float32, at the times `t`, (B,)."""
        raise NotImplementedError

    def table(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma, float64, from the cleanest to the noisiest: all T levels, or chain_length of them."""
        raise NotImplementedError

    def prior_std(self, first: Level) -> float:
        """Standard deviation of the noise that sampling starts from at the first level of a path."""
        return 1.0

    def levels(self, steps: int, spacing: Spacing) -> list[Level]:
        """The `steps + 1` levels of a sampler's path, noisiest first, ending at `CLEAN`.

        With times in [0, 1], for a discrete schedule rounded as `DiscreteSchedule.timesteps` says:

        leading:   0, 1 / steps, 2 / steps, ...; never sees 1
        linspace:  from 0 to 1, both included
        trailing:  1, 1 - 1 / steps, ...
        quadratic: from 0 to 1, dense near 0
        log_snr:   ln(alpha / sigma) evenly between the ends, as suits the DPM-Solver family (Sec. 3.4, Lu et al. 2022a)
        karras:    (sigma / alpha)^(1 / rho) evenly between the ends (Eq. 5, Karras et al. 2022)

        The last two would spend most of their steps where a schedule such as cosine, whose alpha falls to 5e-5, has no
        signal to speak of: there they start at LEAST_ALPHA (as DPM-Solver does, near alpha = 0.008, and EDM, at
        sigma / alpha = 80). Where no signal at all is left, which they cannot measure, they take one step of trailing
        first.

        Raises:
            ValueError: when steps is out of range, or there is no such spacing.
        """
        self._check_steps(steps)
        if spacing not in get_args(Spacing):
            raise ValueError(f"spacing={spacing!r} is not one of {', '.join(get_args(Spacing))}")
        if spacing != "log_snr" and spacing != "karras":
            return [*self._in_time(steps, spacing), CLEAN]
        first, last = self._in_time(2, "linspace") if self.chain_length > 1 else self._in_time(1, "trailing") * 2
        before = []
        if first.alpha == 0:
            before = [first]
            first = self._in_time(steps, "trailing")[1] if steps > 1 else last
        elif first.alpha < LEAST_ALPHA < last.alpha:
            first = self.level_at(math.log(LEAST_ALPHA) - math.log1p(-(LEAST_ALPHA**2)) / 2)
        return [*before, *self._between(first, last, steps - len(before), spacing == "karras"), CLEAN]

    def _between(self, first: Level, last: Level, steps: int, karras: bool) -> list[Level]:
        """`steps` levels from `first` to `last`, both of which have signal and noise."""
        if steps < 2:
            return [first] * steps
        ends = torch.tensor([level.alpha / level.sigma for level in (first, last)], dtype=torch.float64).log()
        if karras:
            roots = (-ends / self.rho).exp()  # (sigma / alpha)^(1 / rho)
            log_snr = -self.rho * torch.linspace(float(roots[0]), float(roots[1]), steps, dtype=torch.float64).log()
        else:
            log_snr = torch.linspace(float(ends[0]), float(ends[1]), steps, dtype=torch.float64)
        # the ends as they are, not as rounding would have them
        return [first, *(self.level_at(float(v)) for v in log_snr[1:-1]), last]

    def level_at(self, log_snr: float) -> Level:
        """The level with this ln(alpha / sigma), which lies between the ends."""
        raise NotImplementedError

    @property
    def cleanest_share(self) -> float:
        """sigma / (alpha + sigma) of the cleanest level that the network knows."""
        alpha, sigma = (float(v[0]) for v in self.table())
        return sigma / (alpha + sigma)

    def _in_time(self, steps: int, spacing: TimeSpacing) -> list[Level]:
        """The `steps` levels of a path that is spaced in time, noisiest first."""
        raise NotImplementedError

    def _check_steps(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")


def shares(steps: int, spacing: TimeSpacing) -> Tensor:
    """`steps` shares in [0, 1], float64, largest first; see `Schedule.levels`."""
    i = torch.arange(steps, dtype=torch.float64).flip(0)
    if steps == 1 and spacing != "leading":
        return torch.ones(1, dtype=torch.float64)
    return {
        "leading": i / steps,
        "linspace": i / max(1, steps - 1),
        "trailing": (i + 1) / steps,
        "quadratic": (i / max(1, steps - 1)) ** 2,
    }[spacing]
