"""The curves: where their points lie, and that schedules are those of the configurations."""

import math

import pytest

from src.reporting.curves import by_level, images, progress, quarters, schedules, seconds
from src.reporting.folders import read_run
from src.reporting.settings import compare
from tests.reporting import fabricate


def folder(tmp_path, *lines, **settings):
    run = fabricate.run(tmp_path / "run", **settings)
    if lines:
        (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    return read_run(run, "run")


def test_points_lie_at_images_and_seconds(tmp_path):
    """The batch of the smoke experiment is 32; the last validation has no row of training's of its own."""
    run = folder(
        tmp_path,
        "step,train/loss,system/wall_seconds,val/loss_ema",
        *("10,1.0,4.0,", "15,,,0.5", "20,2.0,8.0,", "25,,,0.25"),
    )
    assert images(run, [10.0, 25.0]) == [320.0, 800.0]
    assert seconds(run, [5.0, 10.0, 15.0, 25.0]) == [2.0, 4.0, 6.0, 10.0]
    rows = progress(compare([run]), "val/loss_ema")
    assert [(r["images"], r["seconds"], r["value"]) for r in rows] == [(480.0, 6.0, 0.5), (800.0, 10.0, 0.25)]


def test_without_wall_time_speeds_stand_for_it(tmp_path):
    run = folder(tmp_path, "step,train/loss,images_per_second", "10,1.0,160.0", "20,2.0,320.0")
    assert seconds(run, [10.0, 15.0, 20.0]) == [2.0, 2.5, 3.0]
    bare = folder(tmp_path / "bare", "step,train/loss", "10,1.0")
    assert math.isnan(seconds(bare, [10.0])[0])
    assert progress(compare([bare]), "train/loss")[0]["seconds"] is None


def test_losses_by_level_are_means_of_the_last_tenth(tmp_path):
    header = "step,train/loss,train/loss_by_level/00,train/loss_by_level/19"
    lines = [f"{step},1.0,{step / 10},{'' if step == 100 else step}" for step in range(1, 101)]
    run = folder(tmp_path, header, *lines)
    clean, noisy = by_level(compare([run]), [])
    assert clean["value"] == pytest.approx(sum(range(91, 101)) / 100, rel=1e-12)
    assert noisy["value"] == pytest.approx(sum(range(91, 100)) / 9, rel=1e-12)  # an empty bin is no zero
    beta = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    kept = math.prod(1 - b for b in beta[:26])  # alpha bar at t = 25, in the middle of the first of 20 bins
    assert (clean["u"], noisy["u"]) == (0.025, 0.975)
    assert clean["log_snr"] == pytest.approx(math.log(kept / (1 - kept)), rel=1e-5)  # float32
    assert noisy["log_snr"] < clean["log_snr"]


def test_schedules_are_those_of_the_configurations(tmp_path):
    settings = [{"schedule.beta_end": b, "seed": s} for b in (0.01, 0.02) for s in (0, 1)]
    runs = [read_run(fabricate.run(tmp_path / str(i), **s), str(i)) for i, s in enumerate(settings)]
    rows = schedules(compare(runs), notes := [])
    assert notes == []
    for beta_end in (0.01, 0.02):
        own = [row for row in rows if row["setting"] == f"beta_end = {beta_end}"]  # once, though there are two seeds
        assert len(own) == 201
        kept = math.prod(1 - (1e-4 + (beta_end - 1e-4) * t / 999) for t in range(1000))
        assert own[-1]["alpha_bar"] == pytest.approx(kept, rel=1e-9)
        assert own[-1]["log_snr"] == pytest.approx(math.log(kept / (1 - kept)), rel=1e-9)
        assert own[0]["alpha_bar"] == pytest.approx(1 - 1e-4, rel=1e-12)
        assert [row["u"] for row in own] == sorted(row["u"] for row in own)


def test_a_schedule_that_cannot_be_built_is_said_and_not_drawn(tmp_path):
    run = folder(tmp_path, **{"schedule.beta_end": 2.0})
    found = compare([run])
    assert schedules(found, notes := []) == []
    assert "beta_end=2.0 must lie strictly between 0 and 1" in notes[0]
    assert by_level(found, notes) == []


def test_quarters_are_the_last(tmp_path):
    run = folder(tmp_path, "step,val/loss_ema_q1,val/loss_ema_q3", "10,1.0,2.0", "20,0.5,nan")
    assert [(r["quarter"], r["value"]) for r in quarters(compare([run]))] == [(1, 0.5)]
