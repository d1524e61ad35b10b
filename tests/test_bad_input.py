"""A user's mistake is one sentence on stderr, exit code 2, and nothing left behind."""

import shutil
from pathlib import Path

import pytest
import torch

from src.data.geometry import Geometry
from src.data.packing import pack
from tests.data.made import Made, noise
from tests.warm import finish

TRAIN = [
    (["schedule=cosin"], "schedule=cosin; did you mean schedule=cosine"),
    (["shedule=cosine"], "no setting shedule; did you mean schedule"),
    (["experiment=cifar"], "did you mean experiment=cifar10"),
    (["schedule.beta_endd=0.1"], "did you mean schedule.beta_end"),
    (["+typo=1"], "no setting typo"),
    (["+schedule.beta_stop=0.1"], "no setting schedule.beta_stop"),
    (["+callbacks.ema.halflife=1"], "no setting callbacks.ema.halflife"),
    (["schedule.beta_end=abc"], "schedule.beta_end=abc is not a number"),
    (["schedule.num_timesteps=10.5"], "schedule.num_timesteps=10.5 is not a whole number"),
    (["seed=abc"], "seed=abc is not a whole number"),
    (["trainer.precision=fp16"], "is not one of auto, 32-true"),
    (["schedule.beta_end=1e-5"], "must be greater than beta_start=0.0001"),
    (["schedule.beta_end=1e-4"], "must be greater than beta_start=0.0001"),
    (["schedule.beta_end=1.0"], "strictly between 0 and 1"),
    (["schedule.beta_start=0"], "strictly between 0 and 1"),
    (["schedule.num_timesteps=0"], "must be at least 1"),
    (["sampler.steps=1001"], "steps=1001 is not between 1 and num_timesteps=1000"),
    (["sampler.steps=0"], "steps=0 is not between 1 and"),
    (["sampler.spacing=cubic"], "is not one of leading, linspace, trailing, quadratic"),
    (["sampler.eta=2"], "eta=2 must lie between 0"),
    (["model.channel_mults=[1,2,2,2,2]"], "cannot halve images of 8x8: sizes must be multiples of 16"),
    (["data.image_size=9"], "the nearest to 9: 8 or 10"),
    (["data.image_size=16"], "the images are 8x8 with 1 channel, not 16x16"),
    (["model.dropout=1"], "dropout=1 must lie in [0, 1)"),
    (["optimizer.lr=-1"], "Invalid learning rate"),
    (["optimizer.learning_rate=1"], "no setting optimizer.learning_rate"),
    (["data.batch_size=1734"], "data.batch_size=1734 is more than the 1733 training images"),
    (["data.val_images=1797"], "leaves nothing of 1797 images"),
    (["data=mnist", "data.dir={tmp}/nowhere"], "MNIST is not in {tmp}/nowhere (train-images-idx3-ubyte, "),
    (["data=cifar10", "data.dir={tmp}/nowhere"], "test_batch missing) and could not be downloaded ("),
    (["run={tmp}"], "is not a run"),
    (["run={tmp}/nowhere"], "neither a run folder nor a .ckpt file"),
    (["a=b=c"], "'a=b=c' is not a setting that Hydra can read"),
    (["run=runs/seed=1"], "'run=runs/seed=1' is not a setting that Hydra can read"),
    (["~model"], "the setting model is missing"),
    (["model=null"], "choose an option of its group"),
    (["~data.batch_size"], "missing a required argument: 'batch_size'"),
    (["~callbacks.ema"], "callbacks.ema cannot be left out"),
    (["+callbacks.mine.decay=1"], "callbacks.mine has no _target_"),
    (["optimizer.lr=nan"], "optimizer.lr=nan is not a number"),
    (["trainer.gradient_clip_norm=inf"], "trainer.gradient_clip_norm=inf is not a number"),
    (["trainer.devices=[0]"], "are indices of GPUs and there are none"),
    (
        ["trainer=fsdp"],
        "strategy=fsdp shares a network out over several devices and there is one; use trainer.strategy=auto",
    ),
    (
        ["trainer=fsdp", "trainer.devices=2", "trainer.precision=bf16-true"],
        "precision=bf16-true does not work with strategy=fsdp; use bf16-mixed",
    ),
    (
        ["trainer=fsdp", "trainer.devices=2", "trainer.channels_last=true"],
        "channels_last=true does not work with strategy=fsdp",
    ),
    (["trainer=fsdp", "trainer.devices=2", "optimizer=muon"], "optimizer=muon needs whole matrices"),
    (["optimizer=muon", "optimizer.momentum=1"], "momentum=1 must be in [0, 1)"),
    (["seed=-1"], "seed=-1 must lie between 0 and"),
    (["data.image_size=-8"], "image_size=-8 must be at least 1"),
    (["trainer.max_steps=0"], "max_steps=0 must be at least 1"),
    (["callbacks.ema.decay=1"], "decay=1 must lie in [0, 1)"),
    (
        ["callbacks.ema.half_life=5kim"],
        "half_life=5kim is not a whole number or a number of images such as 500kimg or null",
    ),
    (["averages=edm"], "no option averages=edm; did you mean averages=edm2"),
    (["averages=edm2", "callbacks.ema.also.power_050.length=0.3"], "callbacks.ema.also.power_050: length=0.3 must be"),
    (["+callbacks.ema.also.mine.length=0.1"], "also.mine is no average; give it _target_=src.training.ema.Power"),
    (["callbacks.ema.snapshot_every_n_steps=5"], "there are none; add averages=edm2"),
    (["averages=edm2", "trainer.max_steps=10kim"], "trainer.max_steps=10kim is not a whole number"),
    (["callbacks.checkpoint.every_n_steps=0"], "every_n_steps=0 must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "sentence"), TRAIN, ids=[" ".join(a) for a, _ in TRAIN])
def test_train_refuses(command, tmp_path, monkeypatch, arguments, sentence):
    import torchvision.datasets.utils as downloads

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(downloads, "_urlretrieve", no_network)
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    outcome = command("train", "experiment=smoke", f"hydra.run.dir={tmp_path / 'run'}", *arguments)
    assert outcome.code == 2
    assert sentence.format(tmp=tmp_path) in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_two_processes_refuse_is_told_once(tmp_path):
    log = tmp_path / "log"
    two = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu", "data.batch_size=33"]
    assert finish("experiment=smoke", *two, f"hydra.run.dir={tmp_path / 'run'}", output=log) == 2
    assert log.read_text().startswith(
        "error: data.batch_size=33 counts the images of all devices together, and 2 devices cannot share them evenly"
    )
    assert log.read_text().count("\n") == 1
    assert list(tmp_path.iterdir()) == [log]


def test_a_gpu_where_there_is_none(command, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = command("train", "experiment=smoke", "trainer=gpu", f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 2
    assert "this machine has none; use trainer=cpu" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_bound_counts_the_levels_that_images_have(command, tmp_path):
    """Of 16 bits and of floats; a packed store says which."""
    for dtype in ("uint16", "float32"):
        pack(Made(noise(20, (8, 8, 1), dtype)), Geometry((8, 8)), tmp_path / dtype)
    arguments = ["experiment=smoke", "data=packed", "data.val_images=4", "data.batch_size=4", "trainer.max_steps=1"]
    arguments += ["model.learned_variance=true", f"hydra.run.dir={tmp_path / 'run'}"]
    outcome = command("train", *arguments, f"data.dir={tmp_path / 'uint16'}", "loss=hybrid")
    assert outcome.code == 2
    assert "loss=hybrid counts the bits of 256 levels, and the images have 65536; set loss.levels=65536" in outcome.err
    outcome = command("train", *arguments, f"data.dir={tmp_path / 'float32'}", "loss=vlb")
    assert outcome.code == 2
    assert "the images are floats, which have none; use loss=simple" in outcome.err
    outcome = command("train", *arguments, f"data.dir={tmp_path / 'uint16'}", "loss=hybrid", "loss.levels=65536")
    assert outcome.code == 0, outcome.err


def test_an_output_folder_that_cannot_be_made_is_found_before_training(command, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = command("train", "experiment=smoke", f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert outcome.code == 2
    assert "choose another with hydra.run.dir" in outcome.err
    assert "training" not in outcome.err


def test_an_output_folder_that_cannot_be_written_to_is_found_before_training(command, tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_text", refuse)  # a root user may write anywhere
    outcome = command("train", "experiment=smoke", f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 2
    assert "cannot be written to" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_a_run_is_not_written_over(command, smoke_run):
    before = (smoke_run / "metrics.csv").read_bytes()
    outcome = command("train", "experiment=smoke", f"hydra.run.dir={smoke_run}")
    assert outcome.code == 2
    assert f"already holds a run; continue it with run={smoke_run}" in outcome.err
    assert (smoke_run / "metrics.csv").read_bytes() == before


def test_a_continued_run_keeps_its_experiment(command, smoke_run):
    outcome = command("train", f"run={smoke_run}", "trainer.max_steps=40", "schedule.beta_end=0.03")
    assert outcome.code == 2
    assert "schedule.beta_end=0.03 is not what this run was started with (schedule.beta_end=0.02)" in outcome.err


SAMPLE = [
    (["run={tmp}/nowhere"], "neither a run folder nor a .ckpt file"),
    (["run={tmp}"], "is not a run"),
    ([], "run has no value; set it with run=..."),
    (["run={run}", "sampler=ddmi"], "there is no option sampler=ddmi; did you mean"),
    (["run={run}", "sampler.steps=1001"], "steps=1001 is not between 1 and num_timesteps=1000"),
    (["run={run}", "weights=best"], "weights=best is not one of ema, raw"),
    (["run={run}", "num_samples=0"], "num_samples and batch_size must be at least 1"),
    (["run={run}", "batch_size=-1"], "num_samples and batch_size must be at least 1"),
    (["run={run}", "device=cuda"], "asks for a GPU and this machine has none"),
]


@pytest.mark.parametrize(("arguments", "sentence"), SAMPLE, ids=[" ".join(a) for a, _ in SAMPLE])
def test_sample_refuses(command, tmp_path, monkeypatch, smoke_run, arguments, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    arguments = [a.format(tmp=tmp_path, run=smoke_run) for a in arguments]
    outcome = command("sample", f"out={out}", *arguments)
    assert outcome.code == 2
    assert sentence in outcome.err
    assert not out.exists()


@pytest.fixture
def copied_run(smoke_run, tmp_path):
    return Path(shutil.copytree(smoke_run, tmp_path / "copy"))


def test_a_checkpoint_of_another_architecture(command, copied_run, tmp_path):
    config = copied_run / "config.yaml"
    config.write_text(config.read_text().replace("base_channels: 16", "base_channels: 32"))
    outcome = command("sample", f"run={copied_run}", f"out={tmp_path / 'out'}")
    assert outcome.code == 2
    assert "is of another architecture: time_embedding.1.weight is [64, 16] there and [128, 32]" in outcome.err


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None], ids=["empty", "text", "truncated"])
def test_a_damaged_checkpoint(command, copied_run, tmp_path, damage):
    checkpoint = copied_run / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000] if damage is None else damage)
    outcome = command("sample", f"run={copied_run}", f"out={tmp_path / 'out'}")
    assert outcome.code == 2
    assert "is damaged or not a checkpoint" in outcome.err


def test_a_pickle_with_code_in_it_is_not_run(command, copied_run, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"state_dict": Bomb()}, copied_run / "checkpoints" / "last.ckpt")
    outcome = command("sample", f"run={copied_run}", f"out={tmp_path / 'out'}")
    assert outcome.code == 2
    assert not (tmp_path / "exploded").exists()


def test_broken_weights_do_not_become_pictures(command, copied_run, tmp_path):
    path = copied_run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["ema"].values())).fill_(float("nan"))
    torch.save(checkpoint, path)
    outcome = command("sample", f"run={copied_run}", f"out={tmp_path / 'out'}", "num_samples=2")
    assert outcome.code == 2
    assert "hold NaN or infinity" in outcome.err
    assert not (tmp_path / "out").exists()
