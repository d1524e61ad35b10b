"""A network sharded over two processes on the CPU (gloo): the run of one process, and checkpoints that are its own."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.faults import state
from tests.helpers import rows
from tests.warm import finish

TWO = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
FIRST = "trainer.channels_last=false"  # as fsdp has it, which counts the elements that dropout takes the same way
ALONE = ["trainer.strategy=auto", "trainer.devices=1", FIRST]


def fsdp(*arguments: str, output: Path) -> str:
    assert finish(*arguments, output=output) == 0, output.read_text()
    return output.read_text()


def assert_same_state(a: Path, b: Path, atol: float) -> None:
    """Weights, averages and moments."""
    of_a, of_b = state(a), state(b)
    assert of_a.keys() == of_b.keys()
    for name, value in of_a.items():
        torch.testing.assert_close(of_b[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Twenty steps in one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    assert finish("experiment=smoke", FIRST, f"hydra.run.dir={run}", output=run.parent / "log") == 0
    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Twenty steps in two processes."""
    run = tmp_path_factory.mktemp("two") / "run"
    parts = "+callbacks.parts._target_=tests.faults.CountParts"
    return run, fsdp("experiment=smoke", *TWO, parts, f"hydra.run.dir={run}", output=run.parent / "log")


def test_two_processes_have_the_weights_of_one(one, two):
    assert_same_state(one, two[0], atol=1e-6)
    for a, b in zip(rows(one), rows(two[0]), strict=True):
        for column in ("train/loss", "train/grad_norm", "val/loss_raw", "val/loss_ema", "val/loss_ema_q1"):
            if a[column]:
                assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-6)


def test_each_holds_half(two):
    """Of weights, averages and moments; what does not divide by two may lie in one alone."""
    (line,) = (line for line in two[1].splitlines() if "parts of" in line)
    total, *parts = (int(number) for number in line.partition("parts of")[2].split())
    assert sum(parts[0::3]) == sum(parts[1::3]) == total
    assert sum(parts[2::3]) == 2 * total  # two moments
    assert all(0.45 * total < part < 0.55 * total for part in (*parts[0::3], *parts[1::3]))


def test_its_checkpoint_samples_in_one_process(command, two, tmp_path):
    sampler = ["sampler=ddim", "sampler.steps=5", "num_samples=16"]  # of experiment=smoke
    outcome = command("sample", f"run={two[0]}", f"out={tmp_path}", *sampler)
    assert outcome.code == 0, outcome.err
    assert (two[0] / "samples" / "step=20.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


@pytest.mark.parametrize("direction", ["from two to one", "from one to two"])
def test_it_goes_on_from_step_10(one, two, tmp_path, direction):
    run = tmp_path / "run"
    to_one = direction == "from two to one"
    shutil.copytree(two[0] if to_one else one, run)
    (run / "checkpoints" / "last.ckpt").unlink()  # previous.ckpt is of step 10
    if to_one:
        assert finish(f"run={run}", *ALONE, output=tmp_path / "log") == 0
    else:
        fsdp(f"run={run}", "trainer.strategy=fsdp", "trainer.devices=2", output=tmp_path / "log")
    assert [int(row["step"]) for row in rows(run)] == [5, 10, 15, 20]
    assert_same_state(one, run, atol=1e-6)


def test_every_part_has_its_say(tmp_path):
    """What learns beside the network, and what calls it otherwise than once a step with as many images on each rank."""
    runs = tmp_path / "one", tmp_path / "two"
    settings = [
        *("loss=uncertainty", "model.num_classes=10", "model.self_conditioning=true"),
        *("density=importance", "density.history=1", "schedule.num_timesteps=10", "sampler.steps=5"),
        *("averages=edm2", "callbacks.ema.snapshot_every_n_steps=10", "data.val_images=65"),
        *("data.batch_size=16", "trainer.accumulate_grad_batches=2"),
    ]
    assert finish("experiment=smoke", FIRST, *settings, f"hydra.run.dir={runs[0]}", output=tmp_path / "log") == 0
    fsdp("experiment=smoke", *settings, *TWO, f"hydra.run.dir={runs[1]}", output=tmp_path / "log of two")
    assert_same_state(*runs, atol=2e-6)
    a, b = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in runs)
    torch.testing.assert_close(b["averages"], a["averages"], rtol=0, atol=2e-6)
    torch.testing.assert_close(b["density"], a["density"], rtol=1e-4, atol=1e-5)
    assert "loss.linear.weight" in a["state_dict"]
    a, b = (torch.load(run / "ema" / "step=20.pt", weights_only=True)["weights"] for run in runs)
    torch.testing.assert_close(b, a, rtol=0, atol=2e-6)


def test_bad_steps_are_left_out_and_divergence_goes_back(tmp_path):
    run = tmp_path / "run"
    poison = []
    for name, steps, once in (("ray", [5], "true"), ("rot", [12], "false")):
        poison += [f"+callbacks.{name}._target_=tests.faults.Poison", f"+callbacks.{name}.value='nan'"]
        poison += [f"+callbacks.{name}.steps={steps}", f"+callbacks.{name}.once={once}"]
        poison += [f"+callbacks.{name}.layer=conv_in.weight"]
    settings = ["trainer.precision=bf16-mixed", "trainer.log_every_n_steps=1", "callbacks.guard.patience=3"]
    out = fsdp("experiment=smoke", *TWO, *poison, *settings, f"hydra.run.dir={run}", output=tmp_path / "log")
    assert "step 6 was left out: the largest loss" in out
    assert "the weights conv_in.weight are not finite" in out
    assert "going back to step 10" in out
    table = rows(run)
    assert [int(row["step"]) for row in table] == list(range(1, 21))
    assert [float(row["train/skipped"]) for row in table] == [0] * 5 + [1] * 15
    assert all(torch.isfinite(value).all() for value in state(run).values())
