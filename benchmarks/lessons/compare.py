"""Means over seeds, their standard errors, and whether a difference is one.

The runs of one seed start from the same weights, see the same images with the same noise, and are sampled from the same
latents. Settings are therefore compared seed by seed. A difference of n pairs is called one where it is larger than
Student's t (n - 1 degrees of freedom, two-sided 5%) allows: 4.3 standard errors for three seeds.
"""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import NamedTuple

LEVEL = 0.05
TOLD, OTHERWISE, UNDECIDED = "As told: ", "Otherwise than told: ", "Not shown here: "


class Estimate(NamedTuple):
    """A mean over seeds; the error is None for one seed."""

    value: float
    error: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.error is None else f"{self.value:.3f} ± {self.error:.3f}"

    @property
    def ratio(self) -> float:
        """The value in standard errors."""
        if not self.error:
            return float("inf") if self.error == 0 and self.value else 0.0
        return abs(self.value) / self.error

    @property
    def clear(self) -> bool:
        """Whether it differs from 0, as a difference."""
        return self.error is not None and self.ratio > threshold(self.n)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of at least one value."""
    n = len(values)
    return Estimate(fmean(values), stdev(values) / sqrt(n) if n > 1 else None, n)


def difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """a - b, seed by seed."""
    return estimate([x - y for x, y in zip(a, b, strict=True)])


def threshold(n: int) -> float:
    """How many standard errors a difference of n pairs must have."""
    from scipy.stats import t

    return float(t.ppf(1 - LEVEL / 2, n - 1))


def against(name: str, other: str, d: Estimate) -> str:
    """The sentence for a difference of distances, name minus other: the smaller is the better."""
    if d.clear:
        side = "farther from" if d.value > 0 else "nearer to"
        return f"{name} is {abs(d.value):.3f} {side} the real digits than {other} ({_errors(d)})"
    if d.error is None:
        return f"{name} and {other} differ by {d.value:+.3f}, and one seed cannot tell whether that is luck"
    found = f"{d.value:+.3f} ± {d.error:.3f}"
    return f"between {name} and {other} there is no difference that {seeds(d.n)} can show ({found})"


def verdict(d: Estimate, as_told: str, otherwise: str) -> str:
    """The sentence that fits a quantity which is told to be positive."""
    if not d.clear:
        return f"{UNDECIDED}{as_told}"
    return f"{TOLD}{as_told}" if d.value > 0 else f"{OTHERWISE}{otherwise}"


def seeds(n: int) -> str:
    return {1: "one seed", 2: "two seeds", 3: "three seeds", 4: "four seeds", 5: "five seeds"}.get(n, f"{n} seeds")


def _errors(d: Estimate) -> str:
    return f"{d.ratio:.1f} standard errors" if d.error else "in every seed"
