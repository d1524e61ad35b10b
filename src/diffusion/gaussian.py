"""Gaussian diffusion = schedule + objective + weighting + density: the forward process, the loss and the denoiser.

Networks are called as net(x_t, t), or net(x_t, t, y) where there are labels y (B,) int64, with x_t (B, C, H, W) and
t (B,), and return F of the same shape as x_t.
"""

from typing import Protocol

import torch
from torch import Tensor

from src.diffusion.objectives import Objective
from src.diffusion.samplers import Denoiser
from src.diffusion.schedules import DiscreteSchedule, Level

# CPU kernels treat the rows beyond whole fours differently in the last bit: with whole fours, a sample's bits do not
# depend on the batch that it is drawn in.
GRAIN = 4
SMALLEST_D = 1e-30  # 1 / d must be a float32; see objectives.py


class Network(Protocol):
    def __call__(self, x: Tensor, t: Tensor, /, *labels: Tensor) -> Tensor: ...


class Weighting(Protocol):
    def __call__(self, alpha: Tensor, sigma: Tensor, d: Tensor) -> Tensor: ...


class Density(Protocol):
    def __call__(self, batch: int, device: torch.device) -> Tensor: ...


class GaussianDiffusion:
    """The parts that define a diffusion model, network aside.

    Raises:
        ValueError: when the objective does not determine the image at some level of the schedule.
    """

    def __init__(
        self, schedule: DiscreteSchedule, objective: Objective, weighting: Weighting, density: Density
    ) -> None:
        self.schedule = schedule
        self.objective = objective
        self.weighting = weighting
        self.density = density
        d = objective.determinant(schedule.alpha, schedule.sigma).abs()
        if d.min() < SMALLEST_D:
            t = int(d.argmin())
            raise ValueError(
                f"{type(objective).__name__} does not tell the image at t={t}, where alpha is "
                f"{schedule.alpha[t].item():.1e}: use objective=v, or a schedule with smaller betas"
            )

    def draw_t(self, batch: int, device: torch.device) -> Tensor:
        """Times for a training batch, (batch,)."""
        return self.schedule.time(self.density(batch, device))

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0): alpha_t x0 + sigma_t noise (Eq. 4, Ho et al. 2020).

        Args:
            x0: (B, C, H, W) in [-1, 1].
            t: (B,) int64 in [0, T).
            noise: (B, C, H, W) standard normal.
        """
        alpha, sigma = self._level(t, x0)
        return alpha * x0 + sigma * noise

    def p_losses(self, net: Network, x0: Tensor, t: Tensor, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """The loss of each image, (B,): w mean((F - (a x0 + b eps))^2) over C, H, W.

        With the eps objective and w = 1 its mean over the batch is L_simple (Eq. 14, Ho et al. 2020).
        """
        alpha, sigma = self._level(t, x0)
        x_t = alpha * x0 + sigma * noise
        F = net(self.objective.network_input(x_t, alpha, sigma), t, *_given(y)).float()
        error = (F - self.objective.target(x0, noise, alpha, sigma)).square().flatten(1).mean(1)
        alpha, sigma = alpha.flatten(), sigma.flatten()
        return self.weighting(alpha, sigma, self.objective.determinant(alpha, sigma)) * error

    def denoiser(self, net: Network, y: Tensor | None = None) -> Denoiser:
        """The network as samplers use it: E[x0 | x_t, y], (B, C, H, W), for a batch whose images are all at one level.

        Args:
            y: (B,) int64 labels; None for none, also of a network that takes labels.
        """

        def denoise(x_t: Tensor, level: Level) -> Tensor:
            x = _whole_grains(self.objective.network_input(x_t, level.alpha, level.sigma))
            t = torch.full((len(x),), level.t, device=x.device)
            labels = () if y is None else (_whole_grains(y),)
            F = net(x, t, *labels)[: len(x_t)].to(x_t.dtype)
            return self.objective.x0(x_t, F, level.alpha, level.sigma)

        return denoise

    def _level(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.level(t)
        shape = (-1, *[1] * (like.ndim - 1))
        return alpha.view(shape), sigma.view(shape)


def _whole_grains(batch: Tensor) -> Tensor:
    """The batch, filled up with copies of its last row to a multiple of `GRAIN` rows."""
    missing = -len(batch) % GRAIN
    return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing else batch


def _given(y: Tensor | None) -> tuple[Tensor, ...]:
    return () if y is None else (y,)
