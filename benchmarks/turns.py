"""Contenders in processes of their own that live through all rounds and take turns, one at a time.

A contender is a function `contender(turns, **options)` that never returns: it calls `turns.step(facts)` after each of
its steps, which takes the time, and waits where a turn is over. Steps of warm-up, a compilation among them, come before
the first turn and are timed apart. On a GPU whoever waits gives the memory back that it does not need, and takes it
again in a step that is not timed.
"""

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Rounds, interleave

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of all contenders
ON_GPU = DEVICE.type == "cuda"


class Turns:
    """The contender's side.

    Args:
        warmup: steps before the first turn.
        steps: of a turn.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps = warmup, steps
        self.untimed = int(ON_GPU)  # steps at the beginning of a turn
        self.channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a contender prints is not what it is asked
        self.done = 0
        self.started = time.perf_counter()

    def step(self, facts: Mapping[str, Any] | None = None) -> None:
        """One step is done; facts are told once, with the warm-up."""
        self.done += 1
        of_turn = (self.done - self.warmup) % (self.steps + self.untimed)
        if self.done < self.warmup or of_turn not in (0, self.untimed):
            return
        if ON_GPU:
            torch.cuda.synchronize()
        if self.done > self.warmup and of_turn:
            self.started = time.perf_counter()
            return
        spent = time.perf_counter() - self.started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if ON_GPU:
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()  # what a warm-up tries out is not what a step needs
            torch.cuda.empty_cache()
        told = {**(facts or {}), "warmup_seconds": spent} if self.done == self.warmup else {"seconds": spent}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({**told, "peak_bytes": peak}), file=self.channel, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # nobody asks any more
        self.started = time.perf_counter()


@dataclass(frozen=True)
class Contender:
    """What runs in a process.

    Attributes:
        function: "module:function".
        options: of the function, plain values.
    """

    function: str
    options: Mapping[str, Any]


class Worker:
    """The asking side: a process that has warmed up.

    Raises:
        RuntimeError: when the contender fails, with the end of what it said.
    """

    def __init__(self, name: str, contender: Contender, warmup: int, steps: int) -> None:
        self.name, self.steps = name, steps
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process lives)
        plan = json.dumps([contender.function, dict(contender.options), warmup, steps])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.turns", plan],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )
        self.facts = self._answer()
        self.peak_bytes = 0

    def turn(self) -> float:
        """Seconds a step."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.peak_bytes = answer["peak_bytes"]
        return float(answer["seconds"]) / self.steps

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.said.seek(0)
            raise RuntimeError(f"{self.name} has ended: ...{self.said.read()[-2000:]}")
        return dict(json.loads(line))


@dataclass(frozen=True)
class Race:
    """What came of it: seconds a step by round, and by contender its facts and peak memory in bytes."""

    rounds: Rounds
    facts: Mapping[str, Mapping[str, Any]]
    peak_bytes: Mapping[str, int]

    def contender(self, entry: str) -> str:
        """Who ran under this name, which is another's where it was entered twice."""
        return entry if entry in self.facts else self.rounds.control


def race(
    contenders: Mapping[str, Contender],
    control: str,
    rounds: int,
    warmup: int = 2,
    steps: int = 1,
    equal: tuple[str, ...] = ("parameters", "flops"),
) -> Race:
    """Starts all contenders, one after the other, and lets them take turns.

    Args:
        control: the contender that is entered twice.
        equal: the facts that all must share before anything is timed.

    Raises:
        ValueError: when a fact that must be equal is not.
        RuntimeError: when a contender fails.
    """
    workers: dict[str, Worker] = {}
    try:
        for name, contender in contenders.items():
            print(f"starting {name}", file=sys.stderr, flush=True)
            workers[name] = Worker(name, contender, warmup, steps)
        for fact in equal:
            values = {name: worker.facts[fact] for name, worker in workers.items()}
            if len(set(values.values())) > 1:
                raise ValueError(f"the contenders differ in {fact}: {values}")
        measured = interleave({name: worker.turn for name, worker in workers.items()}, control, rounds)
        facts = {name: worker.facts for name, worker in workers.items()}
        return Race(measured, facts, {name: worker.peak_bytes for name, worker in workers.items()})
    finally:
        for worker in workers.values():
            worker.close()


def main() -> None:
    function, options, warmup, steps = json.loads(sys.argv[1])
    turns = Turns(warmup, steps)
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)(turns, **options)


if __name__ == "__main__":
    main()
