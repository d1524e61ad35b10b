"""Intervals in images: what they mean, and that a run with them is the run with the steps they stand for."""

import pytest

from src.training.units import Images, in_steps, share
from tests.helpers import rows


@pytest.mark.parametrize(
    ("text", "number"),
    [("7img", 7), ("500kimg", 500_000), ("0.5Mimg", 500_000), (".25Mimg", 250_000), ("1Gimg", 10**9)],
)
def test_a_number_of_images(text, number):
    assert Images(text).number == number


@pytest.mark.parametrize("text", ["7", "kimg", "7 img", "-7img", "7Kimg", "7mimg", "1e3img", "1.2.3img", ""])
def test_what_is_no_number_of_images(text):
    with pytest.raises(ValueError, match="is not a number of images"):
        Images(text)


def test_only_steps_become_steps():
    node = {"every_n_steps": "10Mimg", "half_life": "500kimg", "sampler": {"steps": None, "warmup_steps": "10img"}}
    assert in_steps(node, 128) == {
        "every_n_steps": 78125,
        "half_life": "500kimg",
        "sampler": {"steps": None, "warmup_steps": 1},
    }
    assert in_steps({"warmup_steps": "0img"}, 128) == {"warmup_steps": 0}


def test_a_share_of_a_training():
    assert [share(n, 32) for n in (1000, 20, "200Mimg", "10img", "10kim", None)] == [
        31,
        1,
        "6250000img",
        "1img",
        "10kim",
        None,
    ]


def test_a_run_counted_in_images_is_the_run_counted_in_steps(command, smoke_run, tmp_path):
    """smoke: batches of 32, 20 steps, validated every 10, logged every 5."""
    images = ["trainer.max_steps=640img", "trainer.val_every_n_steps=0.32kimg", "trainer.log_every_n_steps=160img"]
    intervals = ["callbacks.checkpoint.every_n_steps=320img", "callbacks.samples.every_n_steps=320img"]
    assert command("train", "experiment=smoke", *images, *intervals, f"hydra.run.dir={tmp_path}").code == 0
    assert rows(tmp_path) == rows(smoke_run)
    assert "max_steps: 640img" in (tmp_path / "config.yaml").read_text()
    assert (tmp_path / "samples" / "step=10.png").exists()


def test_a_typo_in_a_number_of_images_is_one_sentence(command, tmp_path):
    outcome = command("train", "experiment=smoke", "lr_schedule.warmup_steps=10kim", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert "warmup_steps=10kim is not a whole number or a number of images such as 500kimg" in outcome.err
