"""python -m src.train data=webdataset: a run that goes on equals one that was not interrupted, and what is refused."""

import io
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data import test_webdataset as of_tests
from tests.data.test_webdataset import loader, module, numbers, write
from tests.helpers import rows
from tests.warm import call, finish, join


def write_shards(folder, name: str, shards: int) -> None:
    random = np.random.default_rng(len(name))
    for i in range(shards):
        files = {}
        for j in range(20):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(file, format="PNG")
            files |= {f"{i}_{j}.png": file.getvalue(), f"{i}_{j}.cls": str(j % 10).encode()}
        write(folder / f"{name}-{i}.tar", files)


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    write_shards(tmp_path, "train", 5)
    write_shards(tmp_path, "val", 1)
    return [
        *("experiment=smoke", "data=webdataset", f"data.dir={tmp_path}", "data.shards='train-{0..4}.tar'"),
        *("data.val_shards=val-*.tar", "data.channels=1", "data.image_size=8", "data.num_classes=10"),
        *("data.batch_size=8", "data.val_images=16", "data.shuffle=24", "data.workers=1", "trainer.accelerator=cpu"),
        *("model.augment_dim=9", "augment=edm", "augment.probability=0.5", "trainer.val_every_n_steps=10"),
    ]


def test_a_run_that_goes_on_equals_one_that_was_not_interrupted(arguments, command, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    outcome = command("train", *arguments, "trainer.max_steps=20", f"hydra.run.dir={whole}")
    assert outcome.code == 0, outcome.err
    command("train", *arguments, "trainer.max_steps=7", f"hydra.run.dir={stopped}")
    outcome = command("train", f"run={stopped}", "trainer.max_steps=20", "data.workers=0")
    assert outcome.code == 0, outcome.err
    a, b = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (whole, stopped))
    assert all(torch.equal(v, b["state_dict"][key]) for key, v in a["state_dict"].items())
    assert a["WebDataModule"] == b["WebDataModule"]
    assert a["WebDataModule"]["images_done"] == 160
    assert rows(whole)[-1] == rows(stopped)[-1]


def two_epochs(rank: int, folder: Path) -> None:
    """What one of two processes sees of 48 images, in batches of 8, and what it would save in between."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = module(folder, shards="train-*.tar", lanes=4, shuffle=12, workers=1)
    batches = iter(loader(data, rank, 2))
    seen, labels = [], []
    for step in range(1, 13):
        batch = next(batches)
        seen += numbers([batch])
        labels += batch.label.tolist()
        if step == 7:
            data.trainer.global_step = 7
            state = data.state_dict()  # asks the other process
    (folder / f"seen-{rank}.json").write_text(json.dumps([seen, labels, state]))
    torch.distributed.destroy_process_group()


def test_two_processes_see_each_image_once_an_epoch(tmp_path):
    """Processes that talk to each other, each with a worker; one process goes on from what they save."""
    of_tests.write_shards(tmp_path, (6,) * 8)
    of_tests.write_shards(tmp_path, (10,), first=200, name="val")
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    processes = [call(two_epochs, rank, tmp_path, output=log) for rank, log in enumerate(logs)]
    for process, log in zip(processes, logs, strict=True):
        join(process, log, 120)
        assert process.exitcode == 0, log.read_text()
    (left, labels, state), (right, _, other) = (json.loads((tmp_path / f"seen-{r}.json").read_text()) for r in range(2))
    assert [n % 10 for n in left] == labels
    for epoch in range(2):
        part = slice(24 * epoch, 24 * (epoch + 1))
        assert sorted(left[part] + right[part]) == list(range(48))
    assert left[:24] != left[24:]
    assert state == other
    alone = module(tmp_path, shards="train-*.tar", lanes=4, shuffle=12)
    alone.setup()
    alone.load_state_dict(state)
    rest = numbers(islice(loader(alone), 5))
    assert (sorted(rest[0::2]), sorted(rest[1::2])) == (sorted(left[28:]), sorted(right[28:]))
    assert rest[0::2] == left[28:]


def test_two_processes_train_the_weights_of_one(arguments, tmp_path):
    """From shards, with a worker each; eight steps in two processes, and four more in one. Catches images that meet the
    noise, the time or, in what an importance density learns, the loss of others."""
    arguments += ["density=importance", "density.history=1", "schedule.num_timesteps=10", "sampler.steps=5"]
    one, two = tmp_path / "one", tmp_path / "two"
    steps = ["trainer.max_steps=12", f"hydra.run.dir={one}"]
    assert finish(*arguments, *steps, output=tmp_path / "log") == 0
    split = ["trainer=ddp", "trainer.devices=2", "trainer.max_steps=8", f"hydra.run.dir={two}"]
    assert finish(*arguments, *split, output=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    alone = [f"run={two}", "trainer.devices=1", "trainer.max_steps=12"]
    assert finish(*alone, output=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    a, b = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (one, two))
    assert a["WebDataModule"] == b["WebDataModule"]
    torch.testing.assert_close(a["density"], b["density"], rtol=1e-4, atol=1e-5)
    assert all((v - b["state_dict"][key]).abs().max() <= 1e-6 for key, v in a["state_dict"].items())


def test_what_cannot_be_is_one_sentence(arguments, command, tmp_path):
    (tmp_path / "train-3.tar").write_bytes((tmp_path / "train-3.tar").read_bytes()[:6000])
    outcome = command("train", *arguments, f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 2
    assert "train-3.tar is cut short" in outcome.err
    assert "Traceback" not in outcome.err
    outcome = command("train", *arguments, "data.max_broken=1", f"hydra.run.dir={tmp_path / 'skips'}")
    assert outcome.code == 0, outcome.err
    assert "skipped: " in outcome.out
    outcome = command("evaluate", f"run={tmp_path / 'skips'}", "num_samples=20")
    assert outcome.code == 2
    assert "data=webdataset has no set of training images to look at" in outcome.err
    outcome = command("train", "experiment=smoke", "augment=edm", f"hydra.run.dir={tmp_path / 'leaky'}")
    assert outcome.code == 2
    assert "choose a U-Net with model.augment_dim=9" in outcome.err
