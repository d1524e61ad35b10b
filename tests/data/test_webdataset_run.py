"""python -m src.train data=webdataset: a run that goes on equals one that was not interrupted, and what is refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_webdataset import write
from tests.helpers import rows


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
