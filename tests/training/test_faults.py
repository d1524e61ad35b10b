"""Faults, done for real to runs in processes of their own; what comes back must be the same run.

`make chaos` writes what is measured here into docs/reliability.md: see `record` in tests/conftest.py.
"""

import os
import random
import re
import shutil
import signal
import struct
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch

from tests.faults import assert_same_run, saved_step, state, steps_logged
from tests.helpers import rows
from tests.warm import finish, start, wait_for

SMOKE = [
    *("experiment=smoke", "trainer.log_every_n_steps=1", "trainer.max_steps=60", "trainer.val_every_n_steps=20"),
    *("callbacks.checkpoint.every_n_steps=5", "callbacks.samples.every_n_steps=30"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(*SMOKE, f"hydra.run.dir={folder / 'run'}", output=folder / "log") == 0
    return folder / "run"


def test_twenty_kills_at_random_moments(tmp_path, record):
    """kill -9, most of them in the middle of a save that a hook slows down; each life begins with resume=auto."""
    slow = ["+callbacks.slow._target_=tests.faults.SlowWrites", "+callbacks.slow.seconds=0.1"]
    arguments = [*SMOKE, *slow, "trainer.max_steps=300", "trainer.val_every_n_steps=50", "resume=auto"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    log = tmp_path / "log"
    assert finish(*arguments, f"hydra.run.dir={whole}", output=log) == 0
    moments = random.Random(0)
    lost, in_a_save, kills = [], 0, 0
    while kills < 20:
        process = start(*arguments, f"hydra.run.dir={run}", output=log)
        before = steps_logged(run)
        if moments.random() < 0.8:  # the others die while they start
            wait_for(lambda n=before: steps_logged(run) > n, process)
        time.sleep(moments.uniform(0, 0.25))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()[-3000:]
        kills += 1
        in_a_save += any(run.glob("checkpoints/.*.tmp"))
        lost.append(steps_logged(run) - saved_step(run))
    assert finish(*arguments, f"hydra.run.dir={run}", output=log) == 0
    assert_same_run(whole, run)
    assert in_a_save >= 3
    record("kill -9 at random moments", tried=kills, lost=max(lost), note=f"{in_a_save} in the middle of a save")


@pytest.mark.parametrize(
    ("number", "settings", "code"),
    [
        (signal.SIGTERM, ["callbacks.checkpoint.every_n_steps=50"], 143),
        (signal.SIGUSR1, [], 143),
        (signal.SIGUSR1, ["trainer.requeue_code=85"], 85),
        (signal.SIGINT, ["trainer.requeue_code=85"], 130),
    ],
    ids=["SIGTERM", "SIGUSR1", "SIGUSR1 with a requeue code", "SIGINT"],
)
def test_a_signal_stops_at_the_steps_end(whole, tmp_path, record, number, settings, code):
    """SIGTERM before the first periodic checkpoint."""
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(*SMOKE, *settings, f"hydra.run.dir={run}", output=log)
    wait_for(lambda: steps_logged(run) >= 7, process)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    assert (
        f"stopped by {number.name} after step {saved_step(run)}; go on with python -m src.train run=" in log.read_text()
    )
    lost = steps_logged(run) - saved_step(run)
    assert lost == 0
    assert finish(f"run={run}", output=log) == 0
    assert_same_run(whole, run)
    record(f"{number.name} ({', '.join(settings) or 'as it comes'})", tried=1, lost=lost, note=f"exit code {code}")


def test_a_second_interrupt_ends_at_once(whole, tmp_path, record):
    """In a step that would take five minutes."""
    run, log = tmp_path / "run", tmp_path / "log"
    slow = ["+callbacks.slow._target_=tests.faults.SlowStep", "+callbacks.slow.step=12", "+callbacks.slow.seconds=300"]
    process = start(*SMOKE, *slow, f"hydra.run.dir={run}", output=log)
    wait_for(lambda: log.exists() and "in the slow step" in log.read_text(), process)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    assert "Traceback" not in log.read_text()
    lost = steps_logged(run) - saved_step(run)
    assert lost <= 5
    assert finish(f"run={run}", output=log) == 0
    assert_same_run(whole, run)
    record("SIGINT twice", tried=1, lost=lost, note="exit code 130, in the middle of a step")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 18 MiB: six checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=18m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_full_disk(whole, small_disk, tmp_path, record, on_failure):
    run, log = small_disk / "run", tmp_path / "log"
    fill = ["+callbacks.fill._target_=tests.faults.FillDisk", f"+callbacks.fill.folder={small_disk}"]
    settings = [*fill, "+callbacks.fill.full_at=31", f"callbacks.checkpoint.on_failure={on_failure}"]
    if on_failure == "continue":
        settings.append("+callbacks.fill.room_at=47")
    code = finish(*SMOKE, *settings, f"hydra.run.dir={run}", output=log)
    text = log.read_text()
    assert "Traceback" not in text
    assert "could not be written" in text
    assert "No space left on device" in text
    if on_failure == "stop":
        assert code == 2
        assert saved_step(run) == 30
        (small_disk / "filler").unlink()
        assert finish(f"run={run}", output=log) == 0
    else:
        assert code == 0
        assert "and training goes on" in text
    assert_same_run(whole, run)
    record(f"full disk, on_failure={on_failure}", tried=1, lost=0, note="the checkpoint before it stands")


@pytest.mark.parametrize("value", ["nan", "1e4"])
def test_a_bad_step_is_left_out(tmp_path, record, value):
    """A weight is bad in two steps and right again; an explosion is known by the mean of a hundred losses before."""
    run, log = tmp_path / "run", tmp_path / "log"
    poison = ["+callbacks.poison._target_=tests.faults.Poison", f"+callbacks.poison.value='{value}'"]
    where = ["+callbacks.poison.steps=[105,107]", "+callbacks.poison.layer=conv_out.weight"]
    assert finish(*SMOKE, *poison, *where, "trainer.max_steps=120", f"hydra.run.dir={run}", output=log) == 0
    table = rows(run)
    assert [int(row["step"]) for row in table if float(row["train/skipped"]) > 0] == list(range(106, 121))
    assert float(table[-1]["train/skipped"]) == 2
    assert all(float(row["train/loss"]) < 2 for row in table if row["train/loss"])
    assert "step 106 was left out: the largest loss" in log.read_text()
    assert "at noise level t=" in log.read_text()
    record(f"a step with a {value} weight", tried=2, lost=0, note="left out and counted")


def test_a_stop_at_a_step_that_was_left_out_loses_nothing(command, tmp_path):
    """Catches a signal there that says it has saved, and has not."""
    poison = ["+callbacks.poison._target_=tests.faults.Poison", "+callbacks.poison.value='nan'"]
    where = ["+callbacks.poison.steps=[16]", "+callbacks.poison.layer=conv_in.weight"]
    stop = ["+callbacks.stop._target_=tests.faults.StopAt", "+callbacks.stop.steps=[17]"]
    outcome = command("train", *SMOKE, *poison, *where, *stop, f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 143, outcome.err
    assert "after step 17" in outcome.out
    assert saved_step(tmp_path / "run") == 17


def test_a_stop_amid_a_divergence_does_not_become_what_training_goes_back_to(command, tmp_path):
    """Weights are spoilt for good, and finite, at step 22, and the stop comes at 24: step 20 is the last good one."""
    run = tmp_path / "run"
    poison = ["+callbacks.poison._target_=tests.faults.Poison", "+callbacks.poison.value='1e30'"]
    where = ["+callbacks.poison.steps=[21]", "+callbacks.poison.layer=conv_out.weight", "+callbacks.poison.once=false"]
    stop = ["+callbacks.stop._target_=tests.faults.StopAt", "+callbacks.stop.steps=[24]", "callbacks.guard.patience=4"]
    assert command("train", *SMOKE, *poison, *where, *stop, f"hydra.run.dir={run}").code == 143
    assert saved_step(run) == 24
    outcome = command("train", f"run={run}")  # which the stop at step 24 ends once more
    assert "going back to step 20, with another order of images and noise" in outcome.out


def test_what_learns_from_losses_learns_nothing_from_a_bad_step(tmp_path):
    """One NaN among the losses that the importance density remembers would be in its probabilities for good."""
    run, log = tmp_path / "run", tmp_path / "log"
    poison = ["+callbacks.poison._target_=tests.faults.Poison", "+callbacks.poison.value='nan'"]
    where = ["+callbacks.poison.steps=[20]", "+callbacks.poison.layer=conv_out.weight"]
    learning = ["density=importance", "density.history=1", "schedule.num_timesteps=10", "sampler.steps=5"]
    assert finish(*SMOKE, *poison, *where, *learning, f"hydra.run.dir={run}", output=log) == 0
    kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["density"]
    assert all(torch.isfinite(value).all() for value in kept.values() if isinstance(value, torch.Tensor))
    assert [float(row["train/skipped"]) for row in rows(run)] == [0.0] * 20 + [1.0] * 40


def test_divergence_goes_back_and_takes_another_order(tmp_path, record):
    """The weights are spoilt for good at step 22, once; the last good checkpoint is that of step 20."""
    run, log = tmp_path / "run", tmp_path / "log"
    poison = ["+callbacks.poison._target_=tests.faults.Poison", "+callbacks.poison.value='nan'"]
    where = ["+callbacks.poison.steps=[21]", "+callbacks.poison.layer=conv_in.weight", "+callbacks.poison.once=false"]
    assert finish(*SMOKE, *poison, *where, "callbacks.guard.patience=4", f"hydra.run.dir={run}", output=log) == 0
    text = log.read_text()
    assert "going back to step 20, with another order of images and noise" in text
    assert "the weights conv_in.weight are not finite" in text
    table = rows(run)
    assert [int(row["step"]) for row in table] == list(range(1, 61))
    assert all(torch.isfinite(value).all() for value in state(run).values())
    lost = int(re.search(r"diverged by step (\d+)", text)[1]) - 20
    record("weights spoilt by NaN", tried=1, lost=lost, note="back to the last good checkpoint, another order")


def test_divergence_without_end_stops_and_names_the_place(tmp_path, record):
    run, log = tmp_path / "run", tmp_path / "log"
    poison = ["+callbacks.poison._target_=tests.faults.Poison", "+callbacks.poison.value='inf'"]
    where = ["+callbacks.poison.steps=[21]", "+callbacks.poison.layer=down.0.block.conv1.weight"]
    forever = ["+callbacks.poison.once=false", "+callbacks.poison.restores=99"]
    limits = ["callbacks.guard.patience=3", "callbacks.guard.max_restores=2"]
    assert finish(*SMOKE, *poison, *where, *forever, *limits, f"hydra.run.dir={run}", output=log) == 2
    text = log.read_text()
    assert "Traceback" not in text
    assert text.count("going back to step 20") == 2
    (sentence,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert "after step 20, which it went back to 2 times, 3 steps in a row were left out" in sentence
    assert "noise level t=" in sentence
    assert "down.0.block.conv1.weight" in sentence
    assert saved_step(run) == 20
    assert all(torch.isfinite(value).all() for value in state(run).values())
    lost = int(re.search(r"diverged by step (\d+)", text)[1]) - 20
    record("divergence at the same step, three times", tried=1, lost=lost, note="stops, names noise level and layer")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped in the middle."""
    folder = tmp_path_factory.mktemp("stopped")
    process = start(*SMOKE, f"hydra.run.dir={folder / 'run'}", output=folder / "log")
    wait_for(lambda: steps_logged(folder / "run") >= 32, process)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    return folder / "run"


def bytes_of_records(path):
    """Where in a zip file its records are; what lies between them, names and padding, holds no weight."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        places = []
        for record in archive.infolist():
            file.seek(record.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            begin = record.header_offset + 30 + name + extra
            places += range(begin, begin + record.compress_size)
    return places


@pytest.mark.parametrize("damage", ["truncated", "a bit flipped", "empty", "gone"])
def test_a_damaged_last_checkpoint_is_passed_over(whole, stopped, tmp_path, record, damage):
    """Every bit of what is stored would do; one in each of eight parts of the file is tried."""
    run, log = stopped, tmp_path / "log"
    last = run / "checkpoints" / "last.ckpt"
    data, step = last.read_bytes(), saved_step(run)
    previous = torch.load(run / "checkpoints" / "previous.ckpt", weights_only=True)["global_step"]
    stored = bytes_of_records(last) if damage == "a bit flipped" else [0]
    places = [stored[len(stored) * part // 9] for part in range(1, 9)] if len(stored) > 1 else stored
    for place in places:
        copy = Path(shutil.copytree(run, tmp_path / f"copy{place}"))
        last = copy / "checkpoints" / "last.ckpt"
        if damage == "gone":
            last.unlink()
        else:
            flipped = data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
            content = {"truncated": data[: len(data) // 2], "a bit flipped": flipped, "empty": b""}[damage]
            last.write_bytes(content)
        if place in (places[0], places[-1]):
            log.unlink(missing_ok=True)
            assert finish(f"run={copy}", output=log) == 0
            assert_same_run(whole, copy)
            if damage != "gone":
                assert "last.ckpt is damaged or not a checkpoint (" in log.read_text()
                assert "passed over for previous.ckpt" in log.read_text()
        else:
            from src.runs import Run

            assert Run(copy).load_newest()["global_step"] == previous
    record(f"last.ckpt {damage}", tried=len(places), lost=step - previous, note="passed over for previous.ckpt")


def test_the_clock_is_set_back(whole, tmp_path, record):
    """A day back in the middle of a run, and files from the future; nothing goes by clocks or file times."""
    run, log = tmp_path / "run", tmp_path / "log"
    clock = ["+callbacks.clock._target_=tests.faults.ClockBack", "+callbacks.clock.step=8"]
    process = start(*SMOKE, *clock, f"hydra.run.dir={run}", output=log)
    wait_for(lambda: steps_logged(run) >= 32, process)
    process.kill()
    process.join()
    for path in (run / "checkpoints").iterdir():
        os.utime(path, (time.time() + 86400,) * 2 if path.name == "previous.ckpt" else (0, 0))
    lost = steps_logged(run) - saved_step(run)
    assert finish(f"run={run}", output=log) == 0
    assert_same_run(whole, run)
    record("clock set back by a day", tried=1, lost=lost, note="and file times that contradict it")


def test_a_second_process_on_the_same_folder_is_refused(tmp_path, record):
    """Also a new run; and after a kill -9 the lock is gone with its holder."""
    run, log = tmp_path / "run", tmp_path / "log"
    slow = ["+callbacks.slow._target_=tests.faults.SlowStep", "+callbacks.slow.step=12", "+callbacks.slow.seconds=300"]
    first = start(*SMOKE, *slow, f"hydra.run.dir={run}", output=log)
    wait_for(lambda: log.exists() and "in the slow step" in log.read_text(), first)
    before = (run / "metrics.csv").read_bytes()
    for arguments in (
        [f"run={run}"],
        [*SMOKE, f"hydra.run.dir={run}"],
        [*SMOKE, f"hydra.run.dir={run}", "resume=auto"],
    ):
        second = tmp_path / "second"
        assert finish(*arguments, output=second) == 2
        assert f"is being trained in by process {first.pid} on " in second.read_text()
        second.unlink()
    assert first.is_alive()
    assert (run / "metrics.csv").read_bytes() == before
    first.kill()
    first.join()
    assert finish(f"run={run}", "trainer.max_steps=14", output=log) == 0
    assert not (run / ".lock").exists()
    record("two processes on one folder", tried=3, lost=0, note="the second is refused")
