"""What is freed stays with the process, so that what is asked for next costs no page faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.memory import OF_USERS

ROOT = Path(__file__).resolve().parents[1]

CODE = """
import resource, torch
from src.memory import keep_freed

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**20) for _ in range(40)]  # 4 MiB each
    while activations:
        activations.pop()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if KEPT:
    keep_freed()
first, *others = (step() for _ in range(4))
print(first, sum(others))
"""


def faults(kept: bool) -> tuple[int, int]:
    """In the first step, and in the three after it."""
    env = {name: value for name, value in os.environ.items() if name not in OF_USERS}
    run = subprocess.run(
        [sys.executable, "-c", CODE.replace("KEPT", str(kept))], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    first, others = run.stdout.split()
    return int(first), int(others)


def test_the_memory_of_a_step_serves_the_next():
    """160 MiB are 40,960 pages, which by default come anew in some of the next steps, or all."""
    first, others = faults(kept=False)
    if first < 40_000 or others < 30_000:
        pytest.skip("here memory does not come in pages of 4 KiB from glibc's malloc")
    assert faults(kept=True)[1] < 10_000


def test_settings_of_the_user_stand():
    code = "from src.memory import keep_freed; print(keep_freed())"
    env = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "1000000"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
