"""What is freed stays with the process, so that what is asked for next costs no page faults."""

import subprocess
import sys

import pytest

from src.memory import keep_freed

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


def test_the_memory_of_a_step_serves_the_next():
    """160 MiB are 40,960 pages, which by default come anew in some of the next steps, or all."""
    if not keep_freed():
        pytest.skip("no glibc")
    faults = []
    for kept in (False, True):
        run = [sys.executable, "-c", CODE.replace("KEPT", str(kept))]
        faults.append([int(word) for word in subprocess.run(run, check=True, capture_output=True).stdout.split()])
    (of_first, default), (of_first_kept, kept) = faults
    assert min(of_first, of_first_kept) >= 40_000
    assert kept < 10_000 < 30_000 < default
