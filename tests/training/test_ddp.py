"""Two processes on the CPU (gloo): one run, one writer, and every image once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers import rows

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_make_one_run(tmp_path):
    arguments = ["experiment=smoke", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    result = subprocess.run(
        [sys.executable, "-m", "src.train", *arguments, f"hydra.run.dir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert [int(row["step"]) for row in rows(tmp_path)] == [5, 10, 15, 20]
    assert [int(float(row["images"])) for row in rows(tmp_path)] == [320, 640, 960, 1280]
    assert result.stdout.count("20 steps, 1,280 images") == 1
    assert json.loads((tmp_path / "summary.json").read_text())["world_size"] == 2
    names = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"].keys()
    assert all(name.startswith("net.") for name in names)
