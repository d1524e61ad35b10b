"""Learning-rate schedules: exact values, and the rate that the optimiser really gets."""

import pytest

from src.training.lr import Constant, Cosine
from tests.helpers import rows


def test_warmup_is_linear_and_never_zero():
    schedule = Constant(warmup_steps=4)
    assert [schedule(step, 100) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_no_warmup_is_one_from_the_first_step():
    assert Constant()(0, 100) == 1.0


def test_cosine_falls_from_one_to_final():
    schedule = Cosine(warmup_steps=10, final=0.1)
    assert schedule(10, 110) == pytest.approx(1.0)
    assert schedule(60, 110) == pytest.approx(0.55)
    assert schedule(110, 110) == pytest.approx(0.1)
    assert schedule(500, 110) == pytest.approx(0.1)


def test_the_optimiser_gets_the_scheduled_rate(command, tmp_path):
    arguments = ["lr_schedule=cosine", "lr_schedule.warmup_steps=5", "optimizer.lr=0.01", "trainer.log_every_n_steps=1"]
    assert command("train", "experiment=smoke", *arguments, f"hydra.run.dir={tmp_path}").code == 0
    schedule = Cosine(warmup_steps=5)
    rates = [float(row["train/lr"]) for row in rows(tmp_path)]
    assert rates == pytest.approx([0.01 * schedule(step, 20) for step in range(20)], rel=1e-12)
