"""callbacks=scored: a score while training goes on, and the best checkpoint by it."""

import pytest
import torch

from src.evaluation.frechet import distance, moments
from tests.helpers import rows
from tests.warm import finish

SCORED = ("callbacks=scored", "callbacks.score.every_n_steps=8", "callbacks.score.num_samples=70")
NAME = "score/fd_pixels"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_score_is_that_of_the_averaged_weights_and_the_best_is_kept_by_it(command, cache, tmp_path, smoke_run):
    run = tmp_path / "run"
    outcome = command(
        "train", "experiment=smoke", *SCORED, f"callbacks.checkpoint.monitor={NAME}", f"hydra.run.dir={run}"
    )
    assert outcome.code == 0, outcome.err
    scored = {int(row["step"]): float(row[NAME]) for row in rows(run) if row[NAME]}
    assert list(scored) == [8, 16, 20]
    best = min(scored, key=scored.__getitem__)
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == best
    assert checkpoint["callbacks"]["Checkpoint"]["best"] == pytest.approx(scored[best], rel=1e-6)  # logged as float32

    # sampling touches none of training's randomness, and src.sample draws the same
    last, without = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (run, smoke_run))
    assert all(torch.equal(last["ema"][name], value) for name, value in without["ema"].items())
    out = tmp_path / "samples"
    outcome = command("sample", f"run={run}", "sampler=unipc", "sampler.steps=10", "num_samples=70", f"out={out}")
    assert outcome.code == 0, outcome.err
    import numpy as np

    from src.build import build
    from src.runs import Run

    images = torch.from_numpy(np.load(out / "samples.npz")["arr_0"])
    data = build(Run(run).config["data"], "data")
    data.setup()
    ours, real = (moments(x.flatten(1).double() / 255) for x in (images, data.train.images))
    assert scored[20] == pytest.approx(distance(ours, real).value, rel=1e-5)


def test_processes_wait_for_a_reference_that_takes_long(cache, tmp_path):
    """Catches the ten minutes after which a group gives a process up, where a large set's features take an hour."""
    run = tmp_path / "run"
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=8"]
    slow = ["+callbacks.slow._target_=tests.faults.SlowReference", "+callbacks.slow.patience=4"]
    code = finish("experiment=smoke", *SCORED, *two, *slow, f"hydra.run.dir={run}", output=tmp_path / "log")
    assert code == 0, (tmp_path / "log").read_text()
    assert [row[NAME] != "" for row in rows(run)] == [False, True]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["callbacks.checkpoint.monitor=score/fd_pixels"], "is not computed in this run; choose val/loss_ema, or add"),
        ([*SCORED, "callbacks.checkpoint.monitor=score/fd"], "choose val/loss_ema, or score/fd_pixels"),
        ([*SCORED, "callbacks.score.num_samples=60"], "fd_pixels has 64 dimensions and there are 60 samples"),
        ([*SCORED, "callbacks.score.num_samples=0"], "must be at least 1"),
        ([*SCORED, "callbacks.score.sampler.steps=2000"], "callbacks.score: steps=2000 is not between 1 and"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_written(command, cache, tmp_path, settings, sentence):
    outcome = command("train", "experiment=smoke", *settings, f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 2
    assert sentence in outcome.err
    assert not (tmp_path / "run").exists()
