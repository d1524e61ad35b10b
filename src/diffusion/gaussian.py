"""Gaussian diffusion = schedule + objective + weighting + density + loss: the forward process, p_losses, the denoiser.

Networks are called as net(x, t), or net(x, t, y) where there are labels y (B,) int64, with x (B, C, H, W), and t (B,)
what the schedule tells of the noise level. They return F of the same shape. Three attributes say more:

    self_conditioning   x is (B, 2 C, H, W): the noisy image, and the last guess of x0 or zeros (Chen et al. 2023)
    augment_dim         also called as net(x, t, ..., augment=a), a (B, augment_dim) what augmentation did to the images
    learned_variance    F is (B, 2 C, H, W): the objective's F, and v of the reverse variance (Nichol & Dhariwal 2021)
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from src.diffusion.densities import Density
from src.diffusion.guidance import Guess
from src.diffusion.levels import BELOW_ONE, Level, Schedule
from src.diffusion.losses import Loss, Simple, Terms
from src.diffusion.objectives import Objective
from src.diffusion.posterior import Posterior
from src.diffusion.schedules import DiscreteSchedule

# CPU kernels round a row in another way when its batch has another size. Networks are therefore asked there in batches
# of one size, about this many pixels, and a sample's bits do not depend on the batch that it is drawn in.
CHUNK_PIXELS, FEWEST_ROWS, MOST_ROWS = 8192, 4, 64
SMALLEST_D = 1e-30  # 1 / d must be a float32; see objectives.py


class Network(Protocol):
    def __call__(self, x: Tensor, t: Tensor, /, *labels: Tensor, **augment: Tensor) -> Tensor: ...


class Weighting(Protocol):
    def __call__(self, alpha: Tensor, sigma: Tensor, d: Tensor) -> Tensor: ...


class GaussianDiffusion:
    """The parts that define a diffusion model, network aside.

    Raises:
        ValueError: when at some level of the schedule the objective does not determine the image or the weight is not
            finite, or the loss needs a discrete schedule.
    """

    def __init__(
        self,
        schedule: Schedule,
        objective: Objective,
        weighting: Weighting,
        density: Density,
        loss: Loss | None = None,
    ) -> None:
        self.schedule = schedule
        self.objective = objective
        self.weighting = weighting
        self.density = density
        self.loss: Loss = Simple() if loss is None else loss
        alpha, sigma = schedule.table()
        d = objective.determinant(alpha, sigma).abs()
        if d.min() < SMALLEST_D:
            worst = int(d.argmin())
            raise ValueError(
                f"{type(objective).__name__} does not tell the image at t={worst} of {len(d)}, where alpha is "
                f"{alpha[worst].item():.1e} and sigma {sigma[worst].item():.1e}: use objective=v, or a schedule "
                "that keeps some signal to its end"
            )
        t = schedule.time(torch.linspace(0, BELOW_ONE, len(d)))
        alpha_t, sigma_t = schedule.level(t)
        infinite = ~torch.isfinite(self.weight(t, alpha_t, sigma_t))
        if infinite.any():
            worst = int(infinite.int().argmax())
            raise ValueError(
                f"{type(weighting).__name__} has no finite weight at t={t[worst].item():.4g}, where alpha is "
                f"{alpha_t[worst].item():.1e} and sigma {sigma_t[worst].item():.1e}: use weighting=constant, or a "
                "schedule that keeps some signal to its end"
            )
        # Where the objective is at home x_t is handed over as it is: no work, and no rounding.
        self.scaled = bool((objective.input_scale(alpha, sigma) - 1).abs().max() > 1e-6)
        self.posterior = Posterior(schedule) if isinstance(schedule, DiscreteSchedule) else None
        if self.loss.learned_variance and self.posterior is None:
            raise ValueError(
                f"loss {type(self.loss).__name__} bounds the likelihood of a chain of discrete steps, which "
                f"{type(schedule).__name__} is not; choose schedule=linear or cosine, or loss=simple"
            )

    @property
    def over_log_snr(self) -> bool:
        """Whether the weighting's paper integrates over ln SNR."""
        return getattr(self.weighting, "over_log_snr", False)

    def draw_u(self, batch: int, device: torch.device) -> Tensor:
        """Shares of the schedule's length for a training batch, (batch,) in [0, 1)."""
        return self.density(batch, device, self.schedule)

    def check(self, net: nn.Module) -> None:
        """Compares the network with the loss.

        Raises:
            ValueError: when only one of them knows of a learned variance.
        """
        learned = getattr(net, "learned_variance", False)
        if learned and not self.loss.learned_variance:
            raise ValueError("model.learned_variance=true needs a loss that trains it; add loss=hybrid or loss=vlb")
        if not learned and self.loss.learned_variance:
            raise ValueError(
                f"loss {type(self.loss).__name__} trains a learned variance, which the network does not have; add "
                "model.learned_variance=true, or choose loss=simple"
            )

    def weight(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """w, (B,), how much the square error of F counts at the times t, (B,), whose levels are alpha and sigma."""
        w = self.weighting(alpha, sigma, self.objective.determinant(alpha, sigma))
        return w * self.schedule.slope(t) if self.over_log_snr else w

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0): alpha_t x0 + sigma_t noise (Eq. 4, Ho et al. 2020).

        Args:
            x0: (B, C, H, W) in [-1, 1].
            t: (B,) times of the schedule; int64 in [0, T) of a discrete one.
            noise: (B, C, H, W) standard normal.
        """
        alpha, sigma = self._level(t, x0)
        return alpha * x0 + sigma * noise

    def p_losses(
        self,
        net: Network,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        y: Tensor | None = None,
        self_condition: bool = True,
        augment: Tensor | None = None,
    ) -> Tensor:
        """The loss of each image, (B,): w mean((F - (a x0 + b eps))^2) over C, H, W, and what `loss` makes of it.

        With the eps objective, w = 1 and the simple loss its mean over the batch is L_simple (Eq. 14, Ho et al. 2020).

        Args:
            self_condition: give a network with self-conditioning its own first guess, without gradient, instead of
                zeros (Algorithm 1, Chen et al. 2023).
            augment: (B, augment_dim) what augmentation did to x0, of a network that is told; None for nothing.
        """
        told = {} if augment is None else {"augment": augment}
        alpha, sigma = self._level(t, x0)
        x_t = alpha * x0 + sigma * noise
        condition = self.schedule.condition(t)
        x = x_t * self.objective.input_scale(alpha, sigma) if self.scaled else x_t
        if getattr(net, "self_conditioning", False):
            guess = torch.zeros_like(x)
            if self_condition:
                with torch.no_grad():
                    F = self.split(net, net(torch.cat([x, guess], 1), condition, *_given(y), **told).float())[0]
                    guess = self.objective.x0(x_t, F, alpha, sigma).clamp_(-1, 1)
            x = torch.cat([x, guess], 1)
        F, v = self.split(net, net(x, condition, *_given(y), **told).float())
        error = (F - self.objective.target(x0, noise, alpha, sigma)).square().flatten(1).mean(1)
        flat_alpha, flat_sigma = alpha.flatten(), sigma.flatten()
        weight = self.weight(t, flat_alpha, flat_sigma)
        if type(self.loss) is Simple:
            return weight * error
        x0_hat = self.objective.x0(x_t, F, alpha, sigma)
        return self.loss(Terms(weight * error, flat_alpha, flat_sigma, x0, x_t, x0_hat, v, t, self.posterior))

    def denoiser(self, net: Network, y: Tensor | None = None) -> "NetworkDenoiser":
        """The network as samplers use it, for batches whose images are all at one level.

        Args:
            y: (B,) int64 labels; None for none, also of a network that takes labels.
        """
        return NetworkDenoiser(self, net, y)

    def _level(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.level(t)
        shape = (-1, *[1] * (like.ndim - 1))
        return alpha.view(shape), sigma.view(shape)

    @staticmethod
    def split(net: Network, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """F, and v of a network that learns the variance."""
        if not getattr(net, "learned_variance", False):
            return output, None
        F, v = output.chunk(2, dim=1)
        return F, v


class NetworkDenoiser:
    """E[x0 | x_t, y] by a network, (B, C, H, W), which sees its own precision; x0 is float32 at least.

    One denoiser serves one batch on its way from noise to images: with self-conditioning it remembers its last guess.
    """

    def __init__(self, diffusion: GaussianDiffusion, net: Network, y: Tensor | None) -> None:
        self.diffusion = diffusion
        self.net = net
        self.y = y
        self.module = isinstance(net, nn.Module)
        floating = (p.dtype for p in net.parameters() if p.is_floating_point()) if isinstance(net, nn.Module) else ()
        self.dtype = next(iter(floating), None)
        self.self_conditioning = getattr(net, "self_conditioning", False)
        self.last: Tensor | None = None
        self._t: Tensor | None = None  # (rows,) what the network is told, filled anew each time

    def __call__(self, x_t: Tensor, level: Level) -> Guess:
        diffusion, objective = self.diffusion, self.diffusion.objective
        x = x_t * objective.input_scale(level.alpha, level.sigma) if diffusion.scaled else x_t
        if self.dtype is not None:
            x = x.to(self.dtype)
        if self.self_conditioning:
            x = torch.cat([x, torch.zeros_like(x) if self.last is None else self.last.to(x.dtype)], dim=1)
        if self.module and x.device.type == "cpu":
            rows = chunk_rows(x.shape)
            t = self._told(rows, level, x.device)
            output = torch.cat([self.net(part, t, *y) for part, *y in _chunks(rows, x, self.y)])[: len(x)]
        else:
            output = self.net(x, self._told(len(x), level, x.device), *_given(self.y))
        if output.dtype not in (torch.float32, torch.float64):
            output = output.float()
        F, v = diffusion.split(self.net, output)
        x0 = objective.x0(x_t.to(F.dtype), F, level.alpha, level.sigma)
        if self.self_conditioning:
            self.last = x0.clamp(-1, 1)
        return Guess(x0, v=v)

    def _told(self, rows: int, level: Level, device: torch.device) -> Tensor:
        if self._t is None or len(self._t) != rows:
            self._t = torch.empty(rows, device=device)
        return self._t.fill_(level.t)


def chunk_rows(shape: Sequence[int]) -> int:
    """Images of this shape, (..., H, W), that a network is asked for at once on the CPU."""
    rows = min(max(FEWEST_ROWS, CHUNK_PIXELS // (shape[-2] * shape[-1])), MOST_ROWS)
    return 1 << rows.bit_length() - 1  # of which most batches are a multiple


def _chunks(rows: int, x: Tensor, y: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """x, and y where there is one, in parts of `rows`, the last filled up with copies of the last row."""
    missing = -len(x) % rows
    tensors = (x, *_given(y))
    if missing:
        tensors = tuple(torch.cat([v, v[-1:].expand(missing, *v.shape[1:])]) for v in tensors)
    return zip(*(v.split(rows) for v in tensors), strict=True)


def _given(y: Tensor | None) -> tuple[Tensor, ...]:
    return () if y is None else (y,)
