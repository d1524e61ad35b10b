"""Checkpoint files: beside training, whole or not at all, and what was there before is kept until then."""

import shutil
import threading
from pathlib import Path

import pytest
import torch

from src.errors import UserError
from src.runs import FORMAT, Run
from src.training.writer import CheckpointWriter


def checkpoint(step: int) -> dict:
    config = {
        name: {} for name in ("schedule", "objective", "weighting", "density", "loss", "model", "sampler", "data")
    }
    config = {**config, "name": "x", "overrides": []}
    weights = {"net.w": torch.full((1000,), float(step))}
    return {"global_step": step, "state_dict": weights, "ema": {}, "config": config, "format": FORMAT}


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_the_last_becomes_the_one_before(folder):
    writer = CheckpointWriter()
    for step in (1, 2, 3):
        writer.save_checkpoint(checkpoint(step), folder / "last.ckpt", [folder / "best.ckpt"] if step == 2 else [])
    writer.wait()
    assert {p.name: step_of(p) for p in folder.iterdir()} == {"last.ckpt": 3, "previous.ckpt": 2, "best.ckpt": 2}
    assert writer.last_bytes == (folder / "last.ckpt").stat().st_size
    assert writer.last_seconds > 0


def test_where_links_are_not_known_files_are_copied(folder, monkeypatch):
    def no_links(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    test_the_last_becomes_the_one_before(folder)


def test_training_goes_on_while_a_file_is_written(folder):
    """Saving returns before the file is there, and what training then does to the weights is not in it."""
    going_on = threading.Event()

    class Slow(CheckpointWriter):
        @staticmethod
        def dump(content, file):
            assert going_on.wait(60)
            torch.save(content, file)

    writer, content = Slow(), checkpoint(1)
    writer.save_checkpoint(content, folder / "last.ckpt")
    content["state_dict"]["net.w"].fill_(99.0)
    assert not (folder / "last.ckpt").exists()
    going_on.set()
    writer.wait()
    assert torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]["net.w"].tolist() == [1.0] * 1000


def test_a_write_that_fails_leaves_what_was_there_and_is_told_once(folder):
    class Full(CheckpointWriter):
        @staticmethod
        def dump(content, file):
            file.write(b"half")
            if content["global_step"] == 2:
                raise OSError(28, "No space left on device")
            file.seek(0)
            torch.save(content, file)

    writer = Full()
    writer.save_checkpoint(checkpoint(1), folder / "last.ckpt")
    writer.save_checkpoint(checkpoint(2), folder / "last.ckpt")
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    writer.wait()
    assert [p.name for p in folder.iterdir()] == ["last.ckpt"]
    assert step_of(folder / "last.ckpt") == 1


def test_every_damaged_byte_of_the_weights_is_noticed(folder):
    """torch.load does not check the checksums that torch.save writes."""
    path = folder / "last.ckpt"
    torch.save(checkpoint(1), path)
    data = path.read_bytes()
    start = data.index(torch.ones(4).numpy().tobytes())  # within the weights
    for place in range(start, start + 4000, 371):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        torch.load(path, weights_only=True)
        with pytest.raises(UserError, match=r"damaged or not a checkpoint \(the checksum of .* is wrong\)"):
            Run(path).load_checkpoint()


def test_a_newer_version_is_refused(folder, command, smoke_run, tmp_path):
    run = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**content, "format": FORMAT + 1}, run / "checkpoints" / "last.ckpt")
    for name, arguments in (("train", ["trainer.max_steps=30"]), ("sample", [f"out={tmp_path / 'out'}"])):
        outcome = command(name, f"run={run}", *arguments)
        assert outcome.code == 2
        assert f"was written by a newer version (format {FORMAT + 1}; this one reads up to {FORMAT})" in outcome.err
        assert "Traceback" not in outcome.err


def test_an_older_version_is_sampled_from_and_not_continued(command, smoke_run, tmp_path):
    run = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    del content["format"]
    torch.save(content, run / "checkpoints" / "last.ckpt")
    assert command("sample", f"run={run}", f"out={tmp_path / 'out'}", "num_samples=1", "sampler.steps=2").code == 0
    outcome = command("train", f"run={run}", "trainer.max_steps=30")
    assert outcome.code == 2
    assert "was written by an older version" in outcome.err
