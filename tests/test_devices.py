"""A GPU of its own for each job, without a GPU: names and locks are all there is to it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from src.devices import gpus

ROOT = Path(__file__).resolve().parents[1]
CLAIM = (
    "import os; from src.devices import claim_gpu; claim_gpu(); claim_gpu(); print(os.environ.get({!r}), flush=True)"
)
VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.fixture
def claim(tmp_path):
    """A process that claims a GPU and lives on, and the GPU: claim() -> (process, name)."""
    processes = []

    def start(visible: str = "5,GPU-ab/c") -> tuple[subprocess.Popen, str]:
        code = CLAIM.format(VISIBLE) + "; input()"
        env = {**os.environ, VISIBLE: visible, "TMPDIR": str(tmp_path)}
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_each_process_has_its_own_until_there_are_none_left(claim):
    assert [claim()[1] for _ in range(5)] == ["5", "GPU-ab/c", "5", "GPU-ab/c", "5"]


def test_a_killed_process_gives_its_gpu_back(claim):
    first, _ = claim()
    claim()
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert claim()[1] == "5"


def test_where_there_are_no_gpus(claim):
    assert claim("")[1] == ""
    assert claim("-1")[1] == "-1"


def test_the_gpus_of_a_machine(monkeypatch, tmp_path):
    monkeypatch.setenv(VISIBLE, "3, 1,-1,2")
    assert gpus() == ["3", "1"]
    monkeypatch.delenv(VISIBLE)
    listing = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    listing.write_text("#!/bin/sh\necho 'GPU 0: X (UUID: GPU-aa)'\necho 'GPU 1: X (UUID: GPU-bb)'\n")
    listing.chmod(0o755)
    assert gpus() == ["GPU-aa", "GPU-bb"]
    listing.write_text("#!/bin/sh\necho 'GPU 0: X (UUID: GPU-aa)'\necho '  MIG 1g Device 0: (UUID: MIG-cc)'\n")
    assert gpus() == ["MIG-cc"]
    listing.write_text("#!/bin/sh\nexit 9\n")
    assert gpus() == []
