"""The clock of the race: how fast a loop is, how many steps a budget holds, and when it is used up.

Both clocks are told of each step as it ends, and say whether to stop. The first step that they hear of starts them, so
that what comes before it (imports, data, networks, a loader's workers) is not counted, and neither is that one step.
"""

import math
import time

SHARE = 0.98  # of the budget, for which steps are planned
WARM = 20  # steps before a pace is measured
PACE_SECONDS = 15.0


class Clock:
    """Counts steps, and says when `budget` seconds are over.

    Attributes:
        done: steps.
        seconds: from the end of the first step to the end of the last.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.done = 0
        self.seconds = 0.0
        self._started = 0.0

    def step(self) -> bool:
        """A step has ended; whether it is the last that there is time for."""
        now = time.perf_counter()
        if not self.done:
            self._started = now
        self.done += 1
        self.seconds = now - self._started
        return self.seconds >= self.budget


class Pace(Clock):
    """Starts after `warm` steps, and says when the pace is known."""

    def __init__(self, seconds: float = PACE_SECONDS, warm: int = WARM) -> None:
        super().__init__(seconds)
        self.done = -warm

    def step(self) -> bool:
        if self.done < 0:
            self.done += 1
            return False
        return super().step()

    @property
    def seconds_a_step(self) -> float:
        return self.seconds / (self.done - 1)


def planned_steps(budget: float, seconds_a_step: float) -> int:
    """How many steps a schedule is made for, so that they end before the budget does; at least one."""
    return max(1, math.floor(SHARE * budget / seconds_a_step))
