"""Two processes on the CPU (gloo): one run, the same weights as one process, one writer, and one end for all."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from src.data.datamodule import ImageDataModule
from src.data.loader import EvalLoader
from src.data.sources import Digits
from src.runs import Run
from tests.faults import saved_step, steps_logged
from tests.helpers import rows
from tests.warm import TORCHRUN, finish, join, running, start, wait_for

ROOT = Path(__file__).resolve().parents[2]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
ENDLESS = ["trainer.log_every_n_steps=1", "trainer.max_steps=100000", "callbacks.checkpoint.every_n_steps=5"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return {**checkpoint["state_dict"], **{f"ema {name}": value for name, value in checkpoint["ema"].items()}}


def assert_same_weights(a: Path, b: Path, atol: float) -> None:
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys()
    assert max((wa[name] - wb[name]).abs().max().item() for name in wa) <= atol


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Twenty steps in one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    assert finish("experiment=smoke", f"hydra.run.dir={run}", output=run.parent / "log") == 0
    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same in two, as a user starts them: new interpreters."""
    run = tmp_path_factory.mktemp("two") / "run"
    result = subprocess.run(
        [sys.executable, "-m", "src.train", "experiment=smoke", *TWO, f"hydra.run.dir={run}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout
    return run, result.stdout


def test_two_processes_make_one_run(two):
    run, out = two
    assert [int(row["step"]) for row in rows(run)] == [5, 10, 15, 20]
    assert [int(float(row["images"])) for row in rows(run)] == [160, 320, 480, 640]
    assert out.count("20 steps, 640 images") == 1
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2
    assert all(name.startswith("net.") for name in weights(run) if not name.startswith("ema "))


def test_two_processes_have_the_weights_of_one(one, two):
    """Dropout, noise, times and order belong to the rows of the batch; only sums are rounded otherwise."""
    assert_same_weights(one, two[0], atol=1e-6)


def test_metrics_are_of_all_processes(one, two):
    """Catches a log of the first process's half batch, whose loss differs in the second digit."""
    for a, b in zip(rows(one), rows(two[0]), strict=True):
        for column in ("train/loss", "train/grad_norm", "val/loss_ema", "val/loss_ema_q1"):
            if a[column]:
                assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_are_the_same_step(one, tmp_path, parts):
    run = tmp_path / "run"
    split = [f"data.batch_size={32 // parts}", f"trainer.accumulate_grad_batches={parts}"]
    assert finish("experiment=smoke", *split, f"hydra.run.dir={run}", output=tmp_path / "log") == 0
    assert_same_weights(one, run, atol=1e-6)


def test_what_learns_from_losses_learns_the_same_from_parts(tmp_path):
    """The importance density takes in a step's losses in the order of its rows, whoever has computed them."""
    runs = []
    for name, split in (("whole", []), ("parts", ["data.batch_size=8", "trainer.accumulate_grad_batches=4"])):
        runs.append(tmp_path / name)
        learning = ["density=importance", "density.history=1", "schedule.num_timesteps=10", "sampler.steps=5"]
        arguments = ["experiment=smoke", *learning, *split, f"hydra.run.dir={runs[-1]}"]
        assert finish(*arguments, output=tmp_path / "log") == 0
    a, b = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["density"] for run in runs)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert_same_weights(*runs, atol=1e-5)


def test_another_number_of_devices_goes_on_with_the_same_batches(one, tmp_path):
    """Thirteen steps in one process, seven in two, with the batch split otherwise besides; 13 is no even number.

    What was taken away of the configuration is taken away once, in the process that starts the others and in those.
    """
    run, log = tmp_path / "run", tmp_path / "log"
    began = ["experiment=smoke", "trainer.max_steps=13", "~callbacks.samples"]
    assert finish(*began, f"hydra.run.dir={run}", output=log) == 0
    split = ["data.batch_size=16", "trainer.accumulate_grad_batches=2"]
    further = [f"run={run}", "trainer.max_steps=20", *split, "trainer.strategy=ddp", "trainer.devices=2"]
    assert finish(*further, output=log) == 0, log.read_text()
    assert "continuing with data.batch_size=16 instead of 32" in log.read_text()
    assert Run(run).config["overrides"] == [*began, *further[1:]]
    assert_same_weights(one, run, atol=1e-6)
    assert [row["train/loss"] for row in rows(run)[:2]] == [row["train/loss"] for row in rows(one)[:2]]
    assert [int(row["step"]) for row in rows(run) if row["val/loss_ema"]] == [10, 13, 20]
    assert [int(float(row["images"])) for row in rows(run)] == [160, 320, 416, 480, 640]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1)])
def test_a_batch_may_be_split_otherwise_at_any_step(one, tmp_path, before, after):
    run, log = tmp_path / "run", tmp_path / "log"
    split = [
        [f"data.batch_size={32 // parts}", f"trainer.accumulate_grad_batches={parts}"] for parts in (before, after)
    ]
    assert finish("experiment=smoke", "trainer.max_steps=13", *split[0], f"hydra.run.dir={run}", output=log) == 0
    assert finish(f"run={run}", "trainer.max_steps=20", *split[1], output=log) == 0
    assert_same_weights(one, run, atol=1e-6)
    assert [int(row["step"]) for row in rows(run) if row["val/loss_ema"]] == [10, 13, 20]


def test_nothing_of_lightnings_is_asked_of_the_others_each_step(tmp_path):
    """Two a step are ours: the loss, for the guard, and whether to stop; gradients are reduced below Python."""
    quiet = ["trainer.val_every_n_steps=20", "trainer.log_every_n_steps=20", "callbacks.checkpoint.every_n_steps=20"]
    count = ["+callbacks.count._target_=tests.faults.CountCollectives", "+callbacks.count.first=3"]
    grids = ["callbacks.samples.every_n_steps=20"]
    log = tmp_path / "log"
    code = finish("experiment=smoke", *TWO, *quiet, *grids, *count, f"hydra.run.dir={tmp_path / 'run'}", output=log)
    assert code == 0, log.read_text()
    assert "collectives in ten steps: {'all_reduce': 20}" in log.read_text()


def test_a_batch_of_another_size_is_another_experiment(command, smoke_run):
    outcome = command("train", f"run={smoke_run}", "trainer.max_steps=30", "data.batch_size=16")
    assert outcome.code == 2
    assert "data.batch_size=16 is not what this run was started with" in outcome.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_processes_stop_at_the_same_step(tmp_path, number):
    run, log = tmp_path / "run", tmp_path / "log"
    process = start("experiment=smoke", *TWO, *ENDLESS, f"hydra.run.dir={run}", output=log)
    wait_for(lambda: steps_logged(run) >= 3, process)
    os.kill(process.pid, number)
    join(process, log, timeout=60)
    out = log.read_text()
    assert process.exitcode == 128 + number, out
    assert out.count(f"stopped by {number.name} after step {saved_step(run)}") == 1
    assert "Traceback" not in out


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_when_the_starting_process_is_killed_the_others_end_and_the_run_goes_on(tmp_path, record):
    """kill -9 of what the user has started, who knows nothing of the others: they must not train on."""
    run, log = tmp_path / "run", tmp_path / "log"
    process = start("experiment=smoke", *TWO, *ENDLESS, f"hydra.run.dir={run}", output=log)
    wait_for(lambda: steps_logged(run) >= 7, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    process.kill()
    process.join()
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running(pid) for pid in ranks)
    lost, goal = steps_logged(run) - saved_step(run), saved_step(run) + 5
    assert finish(f"run={run}", f"trainer.max_steps={goal}", "trainer.devices=1", output=log) == 0
    record("starting process of a DDP run killed", tried=1, lost=lost, note="the others end, the run goes on")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_process_is_killed_the_others_end_with_a_message(tmp_path, record, rank):
    run, log = tmp_path / "run", tmp_path / "log"
    process = start("experiment=smoke", *TWO, *ENDLESS, f"hydra.run.dir={run}", output=log)
    wait_for(lambda: steps_logged(run) >= 7, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[rank], signal.SIGKILL)
    join(process, log, timeout=60)  # the minute that they have
    out = log.read_text()
    assert process.exitcode == 2, out
    assert f"process {rank} of 2 was ended by signal 9" in out
    assert "Traceback" not in out
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    record(
        f"DDP process {rank} killed",
        tried=1,
        lost=steps_logged(run) - saved_step(run),
        note="the other ends, no zombie",
    )


def test_restarted_under_torchrun_it_goes_on(tmp_path, record):
    """torchrun starts all again when one is killed; resume=auto goes on in the same folder."""
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = ["experiment=smoke", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.max_steps=80"]
    settings = ["callbacks.checkpoint.every_n_steps=5", "resume=auto", f"hydra.run.dir={run}"]
    process = start(*arguments, *settings, launcher=[*TORCHRUN, "--max-restarts=1"], output=log)
    wait_for(lambda: steps_logged(run) >= 7, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    lost = steps_logged(run) - saved_step(run)
    join(process, log, timeout=200)
    out = log.read_text()
    assert process.exitcode == 0, out
    assert [int(row["step"]) for row in rows(run)] == list(range(1, 81))
    assert re.search(r"80 steps, 2,560 images", out)
    whole = tmp_path / "whole"
    assert finish(*arguments, f"hydra.run.dir={whole}", output=tmp_path / "log") == 0
    assert_same_weights(whole, run, atol=1e-4)  # 80 steps, in which rounding grows
    record("DDP process killed under torchrun", tried=1, lost=lost, note="all restarted, went on in the same folder")


def test_ranks_share_the_validation_images():
    """Catches an image that counts twice, which moves val/loss."""
    data = ImageDataModule(Digits(), "data", 1, 8, 10, batch_size=32, flip=False, val_images=65)
    data.setup()
    loaders = [EvalLoader(data.val, torch.device("cpu"), 32, rank, world_size=2) for rank in (0, 1)]
    seen = [i for loader in loaders for batch in loader for i in batch.index.tolist()]
    assert sorted(seen) == list(range(65))
