"""How training draws its noise levels: u in [0, 1), the share of the schedule's length.

New density: one subclass with `__call__`, one YAML in conf/density.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.diffusion.levels import BELOW_ONE, Schedule


class Density:
    """Base of all densities; most know nothing of losses."""

    learns = False
    weighs = False  # part of the loss: what is drawn more often counts for more

    def __call__(self, batch: int, device: torch.device, schedule: Schedule) -> Tensor:
        """u, (batch,) float32 in [0, 1), from torch's global generator."""
        raise NotImplementedError

    def correct(self, losses: Tensor, u: Tensor) -> Tensor:
        """The losses, (B,), times what makes their mean that of even draws, where a density is not part of the loss."""
        return losses

    def learn(self, losses: Tensor, u: Tensor) -> None:
        """Takes note of the losses, (B,), of all processes at the shares u, (B,)."""

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs of what was learnt."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


@dataclass(frozen=True)
class Uniform(Density):
    """Independent draws (Algorithm 1, Ho et al. 2020)."""

    def __call__(self, batch: int, device: torch.device, schedule: Schedule) -> Tensor:
        return torch.rand(batch, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Stratified(Density):
    """One draw in each of `batch` equal intervals, with one offset: u_i = (i / batch + u_0) mod 1.

    The low-discrepancy sampler of Kingma et al. 2021 ("Variational Diffusion Models", App. I.1). Each u_i is uniform,
    so the loss is unbiased; the batch covers all levels, so its variance is lower.
    """

    def __call__(self, batch: int, device: torch.device, schedule: Schedule) -> Tensor:
        return _evenly(batch, device)


def _evenly(batch: int, device: torch.device) -> Tensor:
    offset = torch.rand(1, dtype=torch.float32, device=device)
    return (torch.arange(batch, dtype=torch.float32, device=device) / batch + offset) % 1


@dataclass(frozen=True)
class _Normal(Density):
    """Draws that a normal number decides; the density is part of the loss.

    Args:
        mean, std: of the normal distribution.
        stratified: one draw in each of `batch` parts of equal probability, as `Stratified` has it: each is distributed
            as before, and the loss of a batch varies less.

    Raises:
        ValueError: when std is not positive.
    """

    mean: float = 0.0
    std: float = 1.0
    stratified: bool = False
    weighs = True

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"std={self.std} must be positive")

    def normal(self, batch: int, device: torch.device) -> Tensor:
        if not self.stratified:
            return self.mean + self.std * torch.randn(batch, dtype=torch.float32, device=device)
        inside = _evenly(batch, device).clamp_(2**-24, BELOW_ONE)  # where the normal distribution has a quantile
        return self.mean + self.std * math.sqrt(2) * (2 * inside - 1).erfinv()


@dataclass(frozen=True)
class LogitNormal(_Normal):
    """u = sigmoid(n), n ~ N(mean, std^2): most in the middle of the schedule (Eq. 19, Esser et al. 2024).

    A mean below 0 draws more clean images, above 0 more noise.
    """

    def __call__(self, batch: int, device: torch.device, schedule: Schedule) -> Tensor:
        return self.normal(batch, device).sigmoid().clamp_(max=BELOW_ONE)


@dataclass(frozen=True)
class LogNormal(_Normal):
    """ln(sigma / alpha) ~ N(mean, std^2) under every schedule (Table 1, Karras et al. 2022: -1.2 and 1.2).

    Draws beyond the schedule's ends are its ends.
    """

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, batch: int, device: torch.device, schedule: Schedule) -> Tensor:
        return schedule.share(-self.normal(batch, device))


class Importance(Density):
    """p(u) proportional to sqrt(E[loss^2 | u]), which gives the loss least variance (Eq. 18, Nichol & Dhariwal 2021).

    E is the mean over the last few losses in each of T equal parts of the schedule, one a time of a discrete schedule;
    draws are uniform until each part has as many. `correct` divides by p, so the loss stays what it was.

    Args:
        history: losses that are remembered a part, at least 1; Nichol & Dhariwal use 10.
        uniform: share of draws that stays uniform, in [0, 1]; theirs is 0.001.

    Raises:
        ValueError: when one is out of range.
    """

    learns = True

    def __init__(self, history: int = 10, uniform: float = 0.001) -> None:
        if history < 1:
            raise ValueError(f"history={history} must be at least 1; Nichol & Dhariwal use 10")
        if not 0 <= uniform <= 1:
            raise ValueError(f"uniform={uniform} must lie in [0, 1]; Nichol & Dhariwal use 0.001")
        self.history = history
        self.uniform = uniform
        self._losses: Tensor | None = None  # (T, history), a ring for each part
        self._counts = torch.zeros(0)  # (T,) how many have come

    def __call__(self, batch: int, device: torch.device, schedule: Schedule) -> Tensor:
        if self._losses is None:
            self._losses = torch.zeros(schedule.chain_length, self.history)
            self._counts = torch.zeros(schedule.chain_length, dtype=torch.int64)
        if self._losses.device != device:
            self._losses, self._counts = self._losses.to(device), self._counts.to(device)
        part = torch.multinomial(self.probabilities(), batch, replacement=True)
        within = torch.rand(batch, dtype=torch.float32, device=device)
        return ((part + within) / len(self._losses)).clamp_(max=BELOW_ONE)

    def probabilities(self) -> Tensor:
        """p of each part, (T,)."""
        assert self._losses is not None
        rms = self._losses.square().mean(1).sqrt()
        p = (1 - self.uniform) * rms / rms.sum().clamp_min(1e-30) + self.uniform / len(rms)
        warm = (self._counts >= self.history).all() & (rms.sum() > 0)
        return torch.where(warm, p, torch.full_like(p, 1 / len(p)))

    def correct(self, losses: Tensor, u: Tensor) -> Tensor:
        p = self.probabilities()
        return losses / (len(p) * p[self._part(u)])

    def learn(self, losses: Tensor, u: Tensor) -> None:
        assert self._losses is not None
        part = self._part(u)
        # of several in one part, each takes its own place in the ring
        earlier = ((part[:, None] == part[None, :]).tril(-1)).sum(1)
        self._losses[part, (self._counts[part] + earlier) % self.history] = losses.detach().float()
        self._counts.index_add_(0, part, torch.ones_like(part))

    def state_dict(self) -> dict[str, Any]:
        return {} if self._losses is None else {"losses": self._losses, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._losses, self._counts = state["losses"].clone(), state["counts"].clone()

    def _part(self, u: Tensor) -> Tensor:
        assert self._losses is not None
        return (u * len(self._losses)).long().clamp_(max=len(self._losses) - 1)
