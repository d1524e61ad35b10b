"""resume=auto, and what a continued run takes and refuses."""

from pathlib import Path

import pytest
import torch

from tests.faults import assert_same_run


def step_of(run: Path) -> int:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize("key", ["hydra.run.dir", "run"])
def test_the_same_command_starts_goes_on_and_has_done(command, smoke_run, tmp_path, key):
    run = tmp_path / "run"
    arguments = ["experiment=smoke", "resume=auto", f"{key}={run}"]
    assert command("train", *arguments, "trainer.max_steps=13").code == 0
    assert step_of(run) == 13
    outcome = command("train", *arguments, "trainer.max_steps=20")
    assert outcome.code == 0
    assert "continuing with trainer.max_steps=20 instead of 13" in outcome.out
    a, b = (torch.load(r / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for r in (run, smoke_run))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "has trained 20 steps already" in command("train", *arguments, "trainer.max_steps=20").out


def test_each_job_of_a_sweep_goes_on_in_its_folder(command, tmp_path):
    arguments = ["experiment=smoke", "resume=auto", "seed=1,2", f"hydra.sweep.dir={tmp_path}"]
    assert command("train", "-m", *arguments, "trainer.max_steps=5").code == 0
    assert command("train", "-m", *arguments, "trainer.max_steps=9").code == 0
    assert [step_of(tmp_path / job) for job in "01"] == [9, 9]


def test_without_it_a_folder_that_holds_a_run_is_refused(command, smoke_run):
    outcome = command("train", "experiment=smoke", f"hydra.run.dir={smoke_run}")
    assert outcome.code == 2
    assert "already holds a run; continue it with run=" in outcome.err
    assert "let resume=auto do so" in outcome.err


@pytest.mark.parametrize(
    "override",
    ["model.base_channels=32", "schedule=cosine", "experiment=digits", "data.batch_size=64", "optimizer.lr=1e-3"],
)
def test_what_is_another_experiment_is_refused(command, smoke_run, override):
    for arguments in ([f"run={smoke_run}"], ["experiment=smoke", "resume=auto", f"hydra.run.dir={smoke_run}"]):
        outcome = command("train", *arguments, "trainer.max_steps=30", override)
        assert outcome.code == 2
        assert "is not what this run was started with" in outcome.err
        assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    "override", ["trainer.val_every_n_steps=5", "callbacks.checkpoint.every_n_steps=3", "callbacks.guard.patience=5"]
)
def test_what_changes_no_weight_is_taken(command, smoke_run, tmp_path, override):
    run = tmp_path / "run"
    assert command("train", "experiment=smoke", "trainer.max_steps=10", f"hydra.run.dir={run}").code == 0
    outcome = command("train", f"run={run}", "trainer.max_steps=20", override)
    assert outcome.code == 0
    assert f"continuing with {override} instead of" in outcome.out
    a, b = (torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (run, smoke_run))
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("state_dict", "ema") for k in a[part])


def test_rows_between_two_stops_are_those_of_a_run_that_was_not_stopped(command, tmp_path):
    """Stopped at 3, 8, 10 and 14 of 20 with a row every 5: the means are over the steps of both sides.

    Checkpoints to keep are due at 8, 10 and 14, a validation at 10, and at 20, where a stop comes too late to be one.
    """
    whole = tmp_path / "whole"
    intervals = ["callbacks.samples.every_n_steps=20", "callbacks.checkpoint.keep_every_n_steps=2"]
    arguments = ["experiment=smoke", "resume=auto", *intervals, "callbacks.checkpoint.every_n_steps=1"]
    assert command("train", *arguments, f"hydra.run.dir={whole}").code == 0
    run = tmp_path / "run"
    stop = ["+callbacks.stop._target_=tests.faults.StopAt", "+callbacks.stop.steps=[3,8,10,14,20]"]
    for _ in range(4):
        assert command("train", *arguments, *stop, f"hydra.run.dir={run}").code == 143
    assert command("train", *arguments, *stop, f"hydra.run.dir={run}").code == 0
    assert_same_run(whole, run)
    names = [{path.name for path in (folder / "checkpoints").iterdir()} for folder in (whole, run)]
    assert names[0] == names[1] >= {f"step={step}.ckpt" for step in range(2, 21, 2)}
