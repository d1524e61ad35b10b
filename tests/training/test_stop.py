"""Signals: training stops at the step's end, saves, says how to go on, and what goes on is the same run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import rows

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = [
    *("experiment=smoke", "trainer.max_steps=80", "trainer.log_every_n_steps=1"),
    *("trainer.val_every_n_steps=10", "callbacks.checkpoint.every_n_steps=50", "callbacks.samples.every_n_steps=40"),
]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return {**checkpoint["state_dict"], **{f"ema {k}": v for k, v in checkpoint["ema"].items()}}


@pytest.fixture
def copied_run(smoke_run, tmp_path):
    return Path(shutil.copytree(smoke_run, tmp_path / "run"))


def test_ctrl_c_stops_at_the_steps_end_and_loses_nothing(command, tmp_path):
    """Before the first periodic checkpoint; then the resumed run must still validate and save where it would have.

    In an interpreter of its own; other signals are in test_faults.py.
    """
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command("train", *ARGUMENTS, f"hydra.run.dir={whole}").code == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "src.train", *ARGUMENTS, f"hydra.run.dir={stopped}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not (stopped / "metrics.csv").exists() or len(rows(stopped)) < 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped by SIGINT after step" in out
    assert f"go on with python -m src.train run={stopped}" in out
    step = torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 3 <= step < 80
    assert (stopped / "error.txt").read_text() == f"stopped by SIGINT after step {step}\n"
    assert int(rows(stopped)[-1]["step"]) == step

    assert command("train", f"run={stopped}").code == 0
    assert not (stopped / "error.txt").exists()
    wa, wb = weights(whole), weights(stopped)
    assert all(torch.allclose(wa[name], wb[name], rtol=0, atol=1e-5) for name in wa)  # other threads, other last bits
    assert [row["step"] for row in rows(whole)] == [row["step"] for row in rows(stopped)]
    assert [row["val/loss_ema"] != "" for row in rows(whole)] == [row["val/loss_ema"] != "" for row in rows(stopped)]


@pytest.mark.parametrize("missing", [["last.ckpt"], ["last.ckpt", "previous.ckpt"]])
def test_any_whole_checkpoint_is_continued_from(command, smoke_run, copied_run, tmp_path, missing):
    for name in missing:
        (copied_run / "checkpoints" / name).unlink()
    assert command("train", f"run={copied_run}", "trainer.max_steps=30").code == 0
    whole = Path(shutil.copytree(smoke_run, tmp_path / "whole"))
    assert command("train", f"run={whole}", "trainer.max_steps=30").code == 0
    wa, wb = weights(whole), weights(copied_run)
    assert all(torch.equal(wa[name], wb[name]) for name in wa)


@pytest.mark.parametrize(
    "override",
    ["trainer.accumulate_grad_batches=2", "callbacks.ema.decay=0.5", "trainer.gradient_clip_norm=9.0", "seed=7"],
)
def test_what_would_change_the_experiment_is_refused(command, smoke_run, override):
    outcome = command("train", f"run={smoke_run}", "trainer.max_steps=30", override)
    assert outcome.code == 2
    assert f"{override} is not what this run was started with" in outcome.err


def test_a_default_that_changed_since_is_not_the_runs(command, copied_run):
    """A run from before a default changed continues with what it was started with."""
    config = copied_run / "config.yaml"
    config.write_text(config.read_text().replace("weight_decay: 0.0", "weight_decay: 0.125"))
    assert command("train", f"run={copied_run}", "trainer.max_steps=25").code == 0
    assert "weight_decay: 0.125" in config.read_text()
    assert "max_steps: 25" in config.read_text()


def test_divergence_is_said_and_is_no_success(command, tmp_path):
    outcome = command("train", "experiment=smoke", "optimizer.lr=1e30", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert "training has diverged; lower optimizer.lr" in outcome.err
    assert "training has diverged; lower optimizer.lr" in (tmp_path / "error.txt").read_text()


def test_a_schedule_that_ends_with_signal_is_said(command, tmp_path):
    arguments = ["experiment=smoke", "schedule.num_timesteps=50", "trainer.max_steps=1"]
    assert "ends with alpha / sigma = " in command("train", *arguments, f"hydra.run.dir={tmp_path / 'a'}").out
    assert "ends with alpha" not in command("train", "experiment=smoke", f"hydra.run.dir={tmp_path / 'b'}").out


def test_no_grids_please(command, tmp_path):
    assert command("train", "experiment=smoke", "~callbacks.samples", f"hydra.run.dir={tmp_path}").code == 0
    assert not (tmp_path / "samples").exists()
