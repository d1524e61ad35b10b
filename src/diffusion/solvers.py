"""Higher-order solvers of the probability-flow ODE, for fewer network evaluations, and their stochastic forms.

In the coordinates y = x / alpha and u = sigma / alpha the ODE of every schedule is the same (Eq. 14, Song et al. 2021;
Sec. 4, Karras et al. 2022):

    dy / du = eps(y, u) = (y - x0) / u

DDIM with eta = 0 is its Euler method. In lambda = -ln u its solution is exact where x0 is a polynomial in lambda, which
is what the DPM-Solver++ family uses (Eq. 8, Lu et al. 2022b): from t to s, with p the polynomial through known x0,

    x_s = (sigma_s / sigma_t) x_t + alpha_s integral over (lambda_t, lambda_s) of e^(v - lambda_s) p(v) dv

Levels without signal (alpha = 0) or without noise (sigma = 0) have no finite lambda: steps from or to them are DDIM's.
On the straight path, z = x / (alpha + sigma) and r = sigma / (alpha + sigma), it is dz / dr = eps - x0, which is finite
at both ends (Liu et al. 2023).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, expm1, inf, log, sqrt
from typing import Literal

from torch import Tensor

from src.diffusion.guidance import Denoiser
from src.diffusion.levels import Level, Schedule
from src.diffusion.samplers import Noise, Sampler, Step, tau, toward


@dataclass(frozen=True)
class Solver(Sampler):
    """25 steps where none are asked for."""

    def default_steps(self, schedule: Schedule) -> int:
        return min(25, schedule.chain_length)

    def guess(self, denoise: Denoiser, x: Tensor, level: Level) -> Tensor:
        """E[x0 | x], clipped if the sampler clips."""
        return self.ask(denoise, x, level).x0


@dataclass(frozen=True)
class Heun(Solver):
    """The trapezoidal rule in (y, u), 2 steps - 1 evaluations, with EDM's churn (Algorithm 2, Karras et al. 2022).

    Before a step from u in [s_tmin, s_tmax] noise is added, up to u (1 + min(s_churn / steps, sqrt(2) - 1)).

    Args:
        s_churn: 0 is deterministic; Karras et al. use 30 on CIFAR-10 where they use any.
        s_tmin, s_tmax: bounds of u = sigma / alpha, in which EDM's sigma is measured.
        s_noise: standard deviation of the noise that is added.

    Raises:
        ValueError: for a negative number, or bounds that do not rise.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float | None = None
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.s_churn, self.s_tmin, self.s_noise) < 0:
            raise ValueError("s_churn, s_tmin and s_noise must not be negative")
        if self.s_tmax is not None and self.s_tmax <= self.s_tmin:
            raise ValueError(f"s_tmax={self.s_tmax} must be greater than s_tmin={self.s_tmin}, or null for no bound")

    def __call__(self, denoise: Denoiser, schedule: Schedule, x: Tensor, noise: Noise, skip: int = 0) -> Iterator[Step]:
        path = self.path(schedule)
        for index, (before, s) in enumerate(pairwise(path[skip:]), 1):
            x, t = self._churned(x, before, path, schedule, noise)
            x0 = self.guess(denoise, x, t)
            x_euler = toward(x, x0, t, s)
            if s.sigma > 0 and t.alpha > 0:
                # y_s = y_t + (u_s - u_t) (eps_t + eps_s) / 2, and the first half of it is half of Euler's step
                x0_s = self.guess(denoise, x_euler, s)
                half = (1 - t.sigma * s.alpha / (t.alpha * s.sigma)) / 2  # (u_s - u_t) / (2 u_s)
                x = x_euler.mul_(0.5 + half).add_(x, alpha=s.alpha / t.alpha / 2).add_(x0_s, alpha=-half * s.alpha)
            else:
                x = x_euler
            yield Step(index, t, x, x0)

    def _churned(
        self, x: Tensor, t: Level, path: list[Level], schedule: Schedule, noise: Noise
    ) -> tuple[Tensor, Level]:
        """x and its level with more noise; not beyond the noisiest level of the path."""
        if self.s_churn == 0 or t.alpha == 0:
            return x, t
        u = t.sigma / t.alpha
        noisiest = path[0].sigma / path[0].alpha if path[0].alpha > 0 else inf
        raised = min(u * (1 + min(self.s_churn / (len(path) - 1), sqrt(2) - 1)), noisiest)
        if raised <= u or not self.s_tmin <= u <= (inf if self.s_tmax is None else self.s_tmax):
            return x, t
        level = path[0] if raised == noisiest else schedule.level_at(-log(raised))
        x = (x * (level.alpha / t.alpha)).add_(noise(), alpha=level.alpha * sqrt(raised**2 - u**2) * self.s_noise)
        return x, level


@dataclass(frozen=True)
class Midpoint(Solver):
    """The midpoint rule on the straight path (z, r), 2 evaluations a step (order 2; Sec. 3.4, Lipman et al. 2024).

    Where half a step would be asked beyond the schedule's cleanest level it is Euler's.
    """

    def __call__(self, denoise: Denoiser, schedule: Schedule, x: Tensor, noise: Noise, skip: int = 0) -> Iterator[Step]:
        path = self.path(schedule)
        for index, (t, s) in enumerate(pairwise(path[skip:]), 1):
            x0 = self.guess(denoise, x, t)
            r = (t.sigma / (t.alpha + t.sigma) + s.sigma / (s.alpha + s.sigma)) / 2
            half = schedule.level_at(log((1 - r) / r)) if r >= schedule.cleanest_share else None
            if half is None:
                x = toward(x, x0, t, s)
            else:
                x_half = toward(x, x0, t, half)
                x0_half = self.guess(denoise, x_half, half)
                # z_s = z_t + (r_s - r_t) (eps - x0), with eps = (x_half - alpha x0) / sigma at the middle
                t_sum, s_sum, h_sum = (level.alpha + level.sigma for level in (t, s, half))
                dr = (s.sigma / s_sum - t.sigma / t_sum) * s_sum
                x = x * (s_sum / t_sum)
                x = x.add_(x_half, alpha=dr / half.sigma).add_(x0_half, alpha=-dr * h_sum / half.sigma)
            yield Step(index, t, x, x0)


@dataclass(frozen=True)
class _Multistep(Solver):
    """Solvers in lambda that remember: one evaluation a step, earlier ones give the derivatives of x0.

    Args:
        order: the first steps have the order that what is known allows; the last is of the first, to sigma = 0 exactly.
        solver_type: of the second order: "midpoint" extrapolates x0 to the middle of the step, as the papers'
            algorithms do; "heun" integrates the line through the two x0 exactly. Their difference is of third order.

    Raises:
        ValueError: for another order or type, or fewer steps than the order.
    """

    order: int = 2
    solver_type: Literal["midpoint", "heun"] = "midpoint"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order} is not one of 1, 2, 3")
        if self.solver_type not in ("midpoint", "heun"):
            raise ValueError(f"solver_type={self.solver_type!r} is not one of midpoint, heun")
        if self.steps is not None and self.steps < self.order:
            raise ValueError(f"steps={self.steps} are fewer than order={self.order} needs; take at least {self.order}")

    def weights(self, nodes: Sequence[float], start: float, end: float) -> list[float]:
        """`multistep_weights`, or the paper's of second order."""
        if len(nodes) == 2 and self.solver_type == "midpoint":
            whole = -expm1(start - end)
            second = ((start + end) / 2 - nodes[0]) / (nodes[1] - nodes[0])
            return [whole * (1 - second), whole * second]
        return multistep_weights(nodes, start, end)


@dataclass(frozen=True)
class DPMSolverPP(_Multistep):
    """DPM-Solver++, multistep (Lu et al. 2022b): order 1 is DDIM, 2 is "2M", 3 is "3M"; with eta their SDE forms.

    Args:
        eta: share of the reverse SDE's variance: 0 solves the ODE, 1 is "SDE-DPM-Solver++" (Eq. 17, Lu et al. 2022b).
            The exponent of the integral is then 1 + eta times as large.

    Raises:
        ValueError: for eta outside [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must lie between 0 (the ODE) and 1 (the SDE)")

    def __call__(self, denoise: Denoiser, schedule: Schedule, x: Tensor, noise: Noise, skip: int = 0) -> Iterator[Step]:
        rate = 1 + self.eta
        known: deque[tuple[float, Tensor]] = deque(maxlen=self.order)  # (rate lambda, x0), the newest last
        for index, (t, s) in enumerate(pairwise(self.path(schedule)[skip:]), 1):
            x0 = self.guess(denoise, x, t)
            if t.alpha > 0:
                known.append((rate * _lambda(t), x0))
            if s.sigma == 0:
                x = toward(x, x0, t, s)
            elif t.alpha == 0:
                std = tau(t, s, self.eta)
                x = toward(x, x0, t, s, std)
                if std > 0:
                    x.add_(noise(), alpha=std)
            else:
                h = _lambda(s) - _lambda(t)
                x = x * (s.sigma / t.sigma * exp(-self.eta * h))
                nodes = [at for at, _ in known]
                for weight, (_, guess) in zip(self.weights(nodes, nodes[-1], rate * _lambda(s)), known, strict=True):
                    x.add_(guess, alpha=s.alpha * weight)
                if self.eta > 0:
                    x.add_(noise(), alpha=s.sigma * sqrt(-expm1(-2 * self.eta * h)))
            yield Step(index, t, x, x0)


@dataclass(frozen=True)
class UniPC(_Multistep):
    """Predictor and corrector in lambda with one evaluation a step (Algorithm 2 and 3, Zhao et al. 2023).

    The predictor is DPM-Solver++'s. The corrector repeats the step with the polynomial that goes through the x0 at its
    end as well, which raises the order by one: UniP's and UniC's systems of equations (Eq. 5 and 9) say that all
    moments of that polynomial are integrated exactly, so that their B(h) cancels. It matters only where they cut the
    system short, in the corrector of the first step, whose two x0 count half each.
    """

    def __call__(self, denoise: Denoiser, schedule: Schedule, x: Tensor, noise: Noise, skip: int = 0) -> Iterator[Step]:
        known: deque[tuple[float, Tensor]] = deque(maxlen=self.order)
        began: tuple[Tensor, Level] | None = None  # the corrected state that the last step started from
        for index, (t, s) in enumerate(pairwise(self.path(schedule)[skip:]), 1):
            x0 = self.guess(denoise, x, t)
            if began is not None:
                x = self._advance(*began, t, [*known, (_lambda(t), x0)])
            if t.alpha > 0:
                known.append((_lambda(t), x0))
            if s.sigma == 0 or t.alpha == 0:
                began, x = None, toward(x, x0, t, s)
            else:
                began, x = (x, t), self._advance(x, t, s, list(known))
            yield Step(index, t, x, x0)

    def _advance(self, x: Tensor, t: Level, s: Level, known: list[tuple[float, Tensor]]) -> Tensor:
        """x at s from x at t, with x0 known at some lambdas."""
        x = x * (s.sigma / t.sigma)
        for weight, (_, x0) in zip(self.weights([at for at, _ in known], _lambda(t), _lambda(s)), known, strict=True):
            x.add_(x0, alpha=s.alpha * weight)
        return x


def multistep_weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Weights w_j such that sum_j w_j f(nodes_j) = integral over (start, end) of e^(v - end) p(v) dv.

    p is the polynomial through f at the nodes: w_j is the integral of Lagrange's, 1 at node j and 0 at the others, by
    the moments over (0, h), m_k = h^k - k m_(k-1), m_0 = 1 - e^-h. In plain numbers, which torch.compile can trace.

    Args:
        nodes: lambdas at which f is known.
    """
    h = end - start
    moments = [-expm1(-h), h + expm1(-h)]
    for k in range(2, len(nodes)):
        moments.append(h**k - k * moments[-1])
    weights = []
    for node in nodes:
        powers = [1.0]  # coefficients of Lagrange's polynomial in (v - start) / h
        for other in nodes:
            if other != node:
                root, slope = (other - start) / h, h / (node - other)
                powers = [slope * (a - root * b) for a, b in zip([0.0, *powers], [*powers, 0.0], strict=True)]
        weights.append(sum(c * m / h**k for k, (c, m) in enumerate(zip(powers, moments, strict=False))))
    return weights


def _lambda(level: Level) -> float:
    """ln(alpha / sigma)."""
    return log(level.alpha / level.sigma)
