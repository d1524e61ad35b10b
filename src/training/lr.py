"""Learning-rate schedules: the factor on the optimiser's rate as a pure function of the step, so nothing to resume."""

import math
from dataclasses import dataclass

from src.training.units import Steps


@dataclass(frozen=True)
class Constant:
    """Linear warm-up over `warmup_steps`, then 1 (Ho et al. 2020 warm up for 5000 steps)."""

    warmup_steps: Steps = 0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not be negative")

    def __call__(self, step: int, max_steps: int) -> float:
        """The factor, in (0, 1], for the step that is about to be taken, counted from 0."""
        return min(1.0, (step + 1) / (self.warmup_steps + 1))


@dataclass(frozen=True)
class Cosine(Constant):
    """Warm-up, then half a cosine from 1 to `final` at max_steps (Loshchilov & Hutter 2017, without restarts)."""

    final: float = 0.0

    def __call__(self, step: int, max_steps: int) -> float:
        done = min(1.0, max(0.0, (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)))
        decay = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))
        return super().__call__(step, max_steps) * decay
