"""Higher-order solvers of the probability-flow ODE, for fewer network evaluations.

In the coordinates y = x / alpha and u = sigma / alpha the ODE of every schedule is the same (Eq. 14, Song et al. 2021;
Sec. 4, Karras et al. 2022):

    dy / du = eps(y, u) = (y - x0) / u

DDIM with eta = 0 is its Euler method. In lambda = -ln u its solution is exact where x0 is a polynomial in lambda, which
is what the DPM-Solver++ family uses (Eq. 8, Lu et al. 2022b): from t to s, with p the polynomial through known x0,

    x_s = (sigma_s / sigma_t) x_t + alpha_s integral over (lambda_t, lambda_s) of e^(v - lambda_s) p(v) dv

Levels without signal (alpha = 0) or without noise (sigma = 0) have no finite lambda: steps from or to them are DDIM's.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import expm1, log

from torch import Tensor

from src.diffusion.samplers import Denoiser, Sampler, Step, toward
from src.diffusion.schedules import DiscreteSchedule, Level


@dataclass(frozen=True)
class Solver(Sampler):
    """A sampler without noise; 25 steps where none are asked for."""

    def default_steps(self, schedule: DiscreteSchedule) -> int:
        return min(25, schedule.num_timesteps)


@dataclass(frozen=True)
class Heun(Solver):
    """The trapezoidal rule in (y, u), 2 steps - 1 evaluations (Algorithm 1, Karras et al. 2022, without churn)."""

    def __call__(
        self, denoise: Denoiser, schedule: DiscreteSchedule, x: Tensor, noise: Callable[[], Tensor]
    ) -> Iterator[Step]:
        for index, (t, s) in enumerate(pairwise(self.path(schedule)), 1):
            x0 = self.guess(denoise, x, t)
            x_euler = toward(x, x0, t, s, 0.0)
            if s.sigma > 0 and t.alpha > 0:
                # y_s = y_t + (u_s - u_t) (eps_t + eps_s) / 2, and the first half of it is half of Euler's step
                x0_s = self.guess(denoise, x_euler, s)
                half = (1 - t.sigma * s.alpha / (t.alpha * s.sigma)) / 2  # (u_s - u_t) / (2 u_s)
                x = x * (s.alpha / t.alpha)  # y_t in the scale of s
                x = x.add_(x_euler).mul_(0.5).add_(x_euler, alpha=half).add_(x0_s, alpha=-half * s.alpha)
            else:
                x = x_euler
            yield Step(index, t, x, x0)


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++, multistep (Lu et al. 2022b): one evaluation a step, earlier ones give the derivatives of x0.

    Args:
        order: 1 is DDIM, 2 is "2M", 3 is "3M"; the first steps have the order that what is known allows, the last is
            of the first, to sigma = 0 exactly.

    Raises:
        ValueError: for another order, or fewer steps than the order.
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order} is not one of 1, 2, 3")
        if self.steps is not None and self.steps < self.order:
            raise ValueError(f"steps={self.steps} are fewer than order={self.order} needs; take at least {self.order}")

    def __call__(
        self, denoise: Denoiser, schedule: DiscreteSchedule, x: Tensor, noise: Callable[[], Tensor]
    ) -> Iterator[Step]:
        known: deque[tuple[float, Tensor]] = deque(maxlen=self.order)  # (lambda, x0), the newest last
        for index, (t, s) in enumerate(pairwise(self.path(schedule)), 1):
            x0 = self.guess(denoise, x, t)
            if t.alpha > 0:
                known.append((_lambda(t), x0))
            if s.sigma == 0 or t.alpha == 0:
                x = toward(x, x0, t, s, 0.0)
            else:
                weights = multistep_weights([at for at, _ in known], _lambda(s))
                x = x * (s.sigma / t.sigma)
                for weight, (_, guess) in zip(weights, known, strict=True):
                    x.add_(guess, alpha=s.alpha * weight)
            yield Step(index, t, x, x0)


def multistep_weights(nodes: list[float], end: float) -> list[float]:
    """Weights w_j such that sum_j w_j f(nodes_j) = integral over (nodes[-1], end) of e^(v - end) p(v) dv.

    p is the polynomial through f at the nodes, written with Lagrange's polynomials in v - nodes[-1]; the integrals of
    e^(v - h) v^k over (0, h) are 1 - e^-h, h - 1 + e^-h and h^2 - 2 h + 2 - 2 e^-h.

    Args:
        nodes: lambdas at which x0 is known, the newest last; one to three.
        end: lambda at the step's end.
    """
    h = end - nodes[-1]
    m0, m1, m2 = -expm1(-h), h + expm1(-h), h * h - 2 * h - 2 * expm1(-h)
    v = [node - nodes[-1] for node in nodes]
    weights = []
    for j, at in enumerate(v):
        others = [other for i, other in enumerate(v) if i != j]
        if not others:
            integral, scale = m0, 1.0
        elif len(others) == 1:
            integral, scale = m1 - others[0] * m0, at - others[0]
        else:
            a, b = others
            integral, scale = m2 - (a + b) * m1 + a * b * m0, (at - a) * (at - b)
        weights.append(integral / scale)
    return weights


def _lambda(level: Level) -> float:
    """ln(alpha / sigma)."""
    return log(level.alpha / level.sigma)
