"""python -m src.sample: its files, and what a sample depends on."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.warm import TORCHRUN, finish, start, wait_for

FILES = ["grid.png", "samples.npz", "trajectory.gif", "trajectory.png"]


@pytest.fixture
def draw(command, smoke_run, tmp_path):
    """Draws from the smoke run and returns the samples; arguments as on the command line."""

    def run(*arguments: str) -> np.ndarray:
        out = tmp_path / "_".join(arguments).replace("/", "-")
        outcome = command("sample", f"run={smoke_run}", f"out='{out}'", *arguments)
        assert outcome.code == 0, outcome.err
        return np.load(out / "samples.npz")["arr_0"]

    return run


def test_the_files_are_those_of_the_contract(command, smoke_run, tmp_path):
    outcome = command("sample", f"run={smoke_run}", f"out={tmp_path / 'out'}", "num_samples=9", "trajectory=true")
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["grid.png", "samples.npz", "trajectory.gif", "trajectory.png"]
    samples = np.load(out / "samples.npz")
    assert samples.files == ["arr_0"]
    assert (samples["arr_0"].shape, samples["arr_0"].dtype) == ((9, 8, 8, 1), np.uint8)
    grid = np.asarray(Image.open(out / "grid.png"))[::8, ::8]  # enlarged 8 times
    assert grid.shape == (28, 28)
    np.testing.assert_array_equal(grid[10:18, 19:27], samples["arr_0"][5, :, :, 0])  # row 1, column 2
    assert "sampling" in outcome.err
    assert str(out / "grid.png") in outcome.out


def test_the_trajectory_ends_in_the_sample(command, smoke_run, tmp_path):
    """The strip's last column: x_t at the end above the predicted x0, which at the end are the same image."""
    out = tmp_path / "out"
    command("sample", f"run={smoke_run}", f"out={out}", "num_samples=2", "trajectory=true", "sampler.steps=7")
    sample = np.load(out / "samples.npz")["arr_0"][1, :, :, 0]
    strip = np.asarray(Image.open(out / "trajectory.png"))[::8, ::8]
    assert strip.shape == (4 * 9 + 1, 7 * 9 + 1)  # 2 samples of 2 rows, 7 steps
    last = 1 + 6 * 9
    np.testing.assert_array_equal(strip[19:27, last : last + 8], sample)
    np.testing.assert_array_equal(strip[28:36, last : last + 8], sample)
    gif = Image.open(out / "trajectory.gif")
    assert gif.n_frames == 7


@pytest.mark.parametrize("sampler", ["sampler=ddpm", "sampler=ddim"])
def test_sample_i_does_not_depend_on_the_batch_size(draw, sampler):
    whole = draw(sampler, "sampler.steps=20", "num_samples=21", "batch_size=21")
    parts = draw(sampler, "sampler.steps=20", "num_samples=21", "batch_size=4")
    fewer = draw(sampler, "sampler.steps=20", "num_samples=10", "batch_size=64")
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(whole[:10], fewer)


def test_samples_differ_from_each_other_and_between_seeds(draw):
    a, b = draw("num_samples=16", "seed=0"), draw("num_samples=16", "seed=1")
    assert len(np.unique(np.concatenate([a, b]).reshape(32, -1), axis=0)) == 32


def test_ema_and_raw_weights_draw_differently(draw):
    assert (draw("weights=ema", "num_samples=4") != draw("weights=raw", "num_samples=4")).any()


def test_ema_is_the_default(draw):
    np.testing.assert_array_equal(draw("num_samples=4"), draw("weights=ema", "num_samples=4"))


def test_a_run_brings_its_own_sampler(command, tmp_path):
    run = tmp_path / "run"
    arguments = ["experiment=smoke", "sampler=ddpm", "sampler.variance=beta", "sampler.steps=17", "trainer.max_steps=5"]
    assert command("train", *arguments, f"hydra.run.dir={run}").code == 0
    outcome = command("sample", f"run={run}", f"out={tmp_path / 'a'}", "num_samples=4")
    assert "17 steps" in outcome.out
    same = ["sampler=ddpm", "sampler.variance=beta", "sampler.steps=17"]
    command("sample", f"run={run}", f"out={tmp_path / 'b'}", "num_samples=4", *same)
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "ab")
    np.testing.assert_array_equal(a, b)
    assert "3 steps" in command("sample", f"run={run}", f"out={tmp_path / 'c'}", "sampler.steps=3").out


def test_a_checkpoint_file_will_do_for_a_run(draw, command, smoke_run, tmp_path):
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes((smoke_run / "checkpoints" / "last.ckpt").read_bytes())
    assert command("sample", f"run={moved}", f"out={tmp_path / 'out'}", "num_samples=4").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "samples.npz")["arr_0"], draw("num_samples=4"))


def test_bf16_sampling_stays_near_float32(draw):
    full = draw("num_samples=8").astype(int)
    half = draw("num_samples=8", "precision=bf16-mixed").astype(int)
    assert np.abs(full - half).mean() < 3  # of 255


def test_a_sweep_over_sampling_makes_a_folder_a_job(command, smoke_run, tmp_path, monkeypatch):
    arguments = [f"run={smoke_run}", "sampler.steps=2,3", "num_samples=2", f"hydra.sweep.dir={tmp_path}"]
    assert command("sample", "-m", *arguments).code == 0
    assert all((Path(tmp_path) / job / "samples.npz").exists() for job in "01")


def test_sample_i_does_not_depend_on_the_number_of_processes(command, smoke_run, tmp_path):
    """To the bit, and the first process alone prints and writes: under torchrun, and with devices."""
    arguments = ["num_samples=71", "batch_size=64", "sampler.steps=5", "trajectory=true", "seed=3"]
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert command("sample", f"run={smoke_run}", f"out={one}", *arguments).code == 0
    log = tmp_path / "log"
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    under = {"command": "sample", "launcher": TORCHRUN, "env": env, "output": log}
    assert finish(f"run={smoke_run}", f"out={two}", *arguments, "devices=7", **under) == 0, log.read_text()
    said = log.read_text()
    outcome = command("sample", f"run={smoke_run}", f"out={three}", *arguments, "devices=3", "batch_size=9")
    assert outcome.code == 0, outcome.err
    for folder, out, err in ((two, said, said), (three, outcome.out, outcome.err)):
        assert sorted(path.name for path in folder.iterdir()) == FILES
        assert all((folder / name).read_bytes() == (one / name).read_bytes() for name in FILES)
        assert out.count("71 samples of") == out.count(f"{folder / 'grid.png'}") == 1
        assert f"the share of 1 of {2 if folder == two else 3} processes: 100%" in err


def test_fewer_samples_than_processes_with_labels(command, tmp_path):
    run = tmp_path / "run"
    assert command("train", "experiment=smoke", "model.num_classes=10", "trainer.max_steps=1", f"hydra.run.dir={run}")
    arguments = [f"run={run}", "labels=[3,7]", "batch_size=1", "sampler.steps=3"]
    for devices in (1, 3):
        out, log = tmp_path / str(devices), tmp_path / "log"
        code = finish(*arguments, f"out={out}", f"devices={devices}", command="sample", output=log)
        assert code == 0, log.read_text()
    one, three = (np.load(tmp_path / devices / "samples.npz") for devices in "13")
    np.testing.assert_array_equal(one["arr_0"], three["arr_0"])
    assert three["arr_1"].tolist() == [3, 7]


def test_a_sweep_over_devices(smoke_run, tmp_path):
    arguments = [f"run={smoke_run}", "devices=1,2", "sampler.steps=2", "num_samples=40", f"hydra.sweep.dir={tmp_path}"]
    log = tmp_path / "log"
    assert finish("-m", *arguments, command="sample", output=log) == 0, log.read_text()
    assert (tmp_path / "0" / "samples.npz").read_bytes() == (tmp_path / "1" / "samples.npz").read_bytes()


@pytest.mark.parametrize("how", ["torchrun", "devices"])
def test_broken_weights_end_all_processes(smoke_run, tmp_path, how):
    run, out = shutil.copytree(smoke_run, tmp_path / "copy"), tmp_path / "out"
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["ema"].values())).fill_(float("nan"))
    torch.save(checkpoint, path)
    launcher = TORCHRUN if how == "torchrun" else ()
    arguments = [f"run={run}", f"out={out}", "num_samples=40", "sampler.steps=2", "devices=2"]
    log = tmp_path / "log"
    code = finish(*arguments, command="sample", launcher=launcher, output=log)
    assert code == (1 if how == "torchrun" else 2)
    assert log.read_text().count("error: the samples hold NaN or infinity; the weights in") == 1
    assert not out.exists()


REFUSED = [
    ("devices=0", "devices=0 must be at least 1, or auto"),
    ("devices=two", "devices=two is not a whole number or one of auto"),
    ("devices=5", "devices=5 asks for 5 GPUs and this machine has 4"),
]


@pytest.mark.parametrize(("argument", "sentence"), REFUSED)
def test_devices_that_there_are_not(command, smoke_run, tmp_path, monkeypatch, argument, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    outcome = command("sample", f"run={smoke_run}", f"out={tmp_path / 'out'}", argument)
    assert outcome.code == 2
    assert f"error: {sentence}" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_job_that_was_killed_goes_on_where_it_was(command, smoke_run, tmp_path):
    """To the bit, in other batches; what was half written at the kill is no shard."""
    settings = [f"run={smoke_run}", "sampler=ddpm", "sampler.steps=50", "num_samples=96"]
    out = tmp_path / "killed"
    process = start(*settings, "batch_size=4", f"out={out}", output=tmp_path / "log", command="sample")
    wait_for(lambda: len(list(out.glob("shards/*.npz"))) >= 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    there = len(list(out.glob("shards/*.npz")))
    assert not (out / "samples.npz").exists()

    refused = command("sample", *settings, f"out={out}", "seed=1")
    assert refused.code == 2
    assert "holds a part of other samples (seed differ)" in refused.err
    outcome = command("sample", *settings, f"out={out}")
    assert outcome.code == 0, outcome.err
    assert f"{4 * there} of 96 samples are there already" in outcome.out
    whole = command("sample", *settings, f"out={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    assert (out / "samples.npz").read_bytes() == (tmp_path / "whole" / "samples.npz").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "samples.npz"]
