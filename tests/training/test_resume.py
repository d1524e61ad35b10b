"""resume=auto, and what a continued run takes and refuses."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from src.training.guard import Guard
from src.training.step import TrainingModule
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
    ("began", "override", "gone"),
    [
        ((), "callbacks.samples=null", "callbacks.samples"),
        ((), "~callbacks.samples", "callbacks.samples"),
        (("averages=edm2",), "averages=none", "callbacks.ema.also.power_050"),
    ],
)
def test_what_was_on_can_be_switched_off(command, tmp_path, began, override, gone):
    """Catches leaves that are taken away one by one, and an empty node that is left of them."""
    run = tmp_path / "run"
    assert command("train", "experiment=smoke", "trainer.max_steps=4", *began, f"hydra.run.dir={run}").code == 0
    outcome = command("train", f"run={run}", "trainer.max_steps=8", override)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count(f"continuing without {gone}\n") == 1
    node = yaml.safe_load((run / "config.yaml").read_text())
    for name in gone.split("."):
        node = node.get(name)
    assert node is None


def test_a_checkpoint_that_one_goes_back_to_is_the_last(command, tmp_path):
    """Catches a later checkpoint that comes back by itself when the next attempt is killed early."""
    run = tmp_path / "run"
    keep = ["callbacks.checkpoint.keep_every_n_steps=2", "callbacks.checkpoint.every_n_steps=2"]
    die = ["+callbacks.stop._target_=tests.faults.DieAt", "+callbacks.stop.step=7"]
    assert command("train", "experiment=smoke", "trainer.max_steps=6", *keep, *die, f"hydra.run.dir={run}").code == 0
    kept, later = run / "checkpoints" / "step=2.ckpt", ["trainer.max_steps=9", "callbacks.checkpoint.every_n_steps=100"]
    outcome = command("train", f"run='{kept}'", *later)
    assert "died" in outcome.err
    assert "step=2.ckpt is the last checkpoint now" in outcome.out
    assert step_of(run) == 2
    assert not (run / "checkpoints" / "previous.ckpt").exists()


def test_whoever_goes_back_and_is_stopped_is_told_how_to_go_on_from_there(command, tmp_path, monkeypatch):
    """Catches the command of the checkpoint gone back to, which would throw the new steps away; also of a restart."""
    run = tmp_path / "run"
    stop = ["+callbacks.stop._target_=tests.faults.StopAt", "+callbacks.stop.steps=[7]"]
    keep = ["callbacks.checkpoint.keep_every_n_steps=2", "averages=edm2", "callbacks.ema.snapshot_every_n_steps=2"]
    assert command("train", "experiment=smoke", "trainer.max_steps=6", *keep, *stop, f"hydra.run.dir={run}").code == 0
    kept = run / "checkpoints" / "step=2.ckpt"
    outcome = command("train", f"run='{kept}'", "trainer.max_steps=9")
    assert outcome.code == 143, outcome.err
    assert re.search(rf"go on with python -m src.train run='?{run}'?\n", outcome.out)
    assert step_of(run) == 7
    assert (run / "ema" / "step=2.pt").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "step=2.ckpt is the last" not in command("train", f"run='{kept}'", "trainer.max_steps=9").out
    assert step_of(run) == 9


def test_grids_belong_to_whole_steps(command, tmp_path):
    """Catches a grid in the middle of step 1, and one drawn again in the first step after a stop."""
    split = ["data.batch_size=16", "trainer.accumulate_grad_batches=2", "callbacks.samples.every_n_steps=4"]
    arguments = ["experiment=smoke", *split, f"hydra.run.dir={tmp_path}", "resume=auto"]
    for steps in (4, 6):
        assert command("train", *arguments, f"trainer.max_steps={steps}").code == 0
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step=4.png", "step=6.png"]


def test_a_fused_optimiser_stays_one_after_a_run_without(monkeypatch):
    """Of a run in 16-mixed, whose optimiser is not: its checkpoint says so, and another precision's would take it."""
    make = partial(torch.optim.Adam, lr=1e-3, fused=True)
    old, new = (torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], fused=fused) for fused in (False, True))
    old.param_groups[0]["params"][0].grad = torch.ones(2)
    old.step()
    counts = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    progress = {"fit_loop": {"epoch_loop.batch_progress": {"total": counts, "current": dict(counts)}}}
    checkpoint = {"global_step": 1, "loops": progress, "optimizer_states": [old.state_dict()]}
    module = SimpleNamespace(accumulated=1, masters=None, make_optimizer=make)
    module.implementation = partial(TrainingModule.implementation, module)
    TrainingModule.on_load_checkpoint(module, checkpoint)
    new.load_state_dict(checkpoint["optimizer_states"][0])
    assert new.param_groups[0]["fused"]
    Guard.leave_out(new, new.param_groups[0]["params"], torch.tensor(False))
    new.param_groups[0]["params"][0].grad = torch.ones(2)
    new.step()
    assert new.state[new.param_groups[0]["params"][0]]["step"] == 2


def test_what_changes_no_weight_is_taken(command, smoke_run, tmp_path):
    run = tmp_path / "run"
    assert command("train", "experiment=smoke", "trainer.max_steps=10", f"hydra.run.dir={run}").code == 0
    changed = "trainer.val_every_n_steps=5", "callbacks.checkpoint.every_n_steps=3", "callbacks.guard.patience=5"
    outcome = command("train", f"run={run}", "trainer.max_steps=20", *changed)
    assert outcome.code == 0
    assert all(f"{override} instead of" in outcome.out for override in changed)
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
